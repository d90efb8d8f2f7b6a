"""What a converted checkpoint's headers must hold: every quantized module, complete, in the shapes of its layout.

No engine checks that a quantized checkpoint is complete: a tensor that is missing is loaded as garbage. Loaders ask
here first. No tensor data is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from awq2marlin.checkpoint.names import CONFIG_FILENAME
from awq2marlin.checkpoint.quantization import AwqQuantization, MarlinQuantization
from awq2marlin.checkpoint.source import awq_modules
from awq2marlin.errors import CheckpointError, Problem, printable
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, num_groups, paddings, qweight_shape, unaligned_reason
from awq2marlin.layout.modules import QUANTIZED_PARTS, SCALE_DTYPES, ModulePlan, module_name, planned_module
from awq2marlin.layout.packing import pack_factor

_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": SCALE_DTYPES}

#: What a quantized module must not have: a dense weight, and the row order of GPTQ.
_FOREIGN_PARTS = ("g_idx", "weight")


def marlin_modules(
    tensors: Mapping[str, TensorInfo], quantization: MarlinQuantization, shard_of: Mapping[str, str]
) -> dict[str, ModulePlan]:
    """Returns the quantized modules of a converted checkpoint, by name, sorted.

    Those in Marlin layout are ``converted``; those in AWQ layout are not.

    Args:
        tensors: every tensor of the checkpoint.
        quantization: what its config says.
        shard_of: the file of each tensor, for messages.

    Raises:
        CheckpointError: naming every tensor that is missing or does not have the type and shape of its module's
            layout, and every name in the config's lists that is not there.
    """
    found = _parts_of_modules(tensors)
    kept, problems = _kept_modules(found, tensors, quantization, shard_of)
    problems += _missing_from_lists(found, tensors, quantization)
    modules = {}
    for name in found.keys() - quantization.awq_modules:
        parts = found[name]
        wrong = list(_problems_of(name, parts, tensors, quantization))
        for tensor, code, message in wrong:
            shard = next(shard_of[other] for other in (tensor, *_names(name, parts)) if other in shard_of)
            problems.append(Problem(shard, tensor, code, message))
        if not wrong:
            modules[name] = _marlin_module(name, parts, tensors, quantization)
    if problems:
        raise CheckpointError(problems)
    return dict(sorted({**modules, **kept}.items()))


def _parts_of_modules(tensors: Iterable[str]) -> dict[str, set[str]]:
    """Returns what every quantized module has: its parts, a bias, and what it must not have."""
    parts_of: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in (*QUANTIZED_PARTS, "bias", *_FOREIGN_PARTS):
            parts_of[module].add(part)
    # `scales` alone belongs to a scaled activation
    return {module: parts for module, parts in parts_of.items() if parts & {"qweight", "qzeros"}}


def _names(module: str, parts: set[str]) -> list[str]:
    return [module_name(module, part) for part in sorted(parts)]


def _missing_from_lists(
    found: Mapping[str, set[str]], tensors: Mapping[str, TensorInfo], quantization: MarlinQuantization
) -> Iterator[Problem]:
    """Yields what the config's lists name and the files do not hold."""
    for key in ("awq_modules", "padded_modules"):
        for module in getattr(quantization, key):
            if module not in found:
                message = f"{key} names its module, but no file holds it; download the checkpoint again, completely"
                yield Problem(CONFIG_FILENAME, module_name(module, "qweight"), "missing-tensor", message)
    for module in quantization.unquantized_modules:
        if module_name(module, "weight") not in tensors:
            message = "unquantized_modules names it, but no file holds it; download the checkpoint again, completely"
            yield Problem(CONFIG_FILENAME, module_name(module, "weight"), "missing-tensor", message)


def _kept_modules(
    found: Mapping[str, set[str]],
    tensors: Mapping[str, TensorInfo],
    quantization: MarlinQuantization,
    shard_of: Mapping[str, str],
) -> tuple[dict[str, ModulePlan], list[Problem]]:
    """Returns the modules in AWQ layout, and what is wrong with them."""
    kept = {
        tensor: tensors[tensor]
        for module in quantization.awq_modules & found.keys()
        for tensor in _names(module, found[module])
    }
    if not kept:
        return {}, []
    awq = AwqQuantization(quantization.bits, quantization.group_size, quantization.zero_point, None, CONFIG_FILENAME)
    try:
        modules = awq_modules(kept, awq, shard_of)
    except CheckpointError as error:
        return {}, list(error.problems)
    return {name: planned_module(module, "kept") for name, module in modules.items()}, []


def _problems_of(
    module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: MarlinQuantization
) -> Iterator[tuple[str, str, str]]:
    """Yields (tensor, code, message) for what is wrong with one module in Marlin layout."""
    required = {"qweight", "scales", *(["qzeros"] if quantization.zero_point else [])}
    for part in sorted(required - parts):
        message = f"it is missing, but the module's {', '.join(sorted(parts))} are there; download the file again"
        yield module_name(module, part), "missing-tensor", message
    for part in sorted(parts & set(_FOREIGN_PARTS)):
        message = f"the module has a qweight, and so must have no {part}; convert again"
        yield module_name(module, part), "contradiction", message
    if not required <= parts:
        return
    for part in sorted(parts & _DTYPES.keys()):
        tensor = tensors[module_name(module, part)]
        found = f"it is {printable(tensor.dtype)} {list(tensor.shape)}"
        if tensor.dtype not in _DTYPES[part]:
            yield tensor.name, "wrong-dtype", f"{found}, needed is {' or '.join(_DTYPES[part])}; convert again"
            return
        if len(tensor.shape) != 2:
            yield tensor.name, "wrong-shape", f"{found}, needed are two dimensions; convert again"
            return
    yield from _shape_problems(module, parts, tensors, quantization)


def _padded_sizes(module: str, tensors: Mapping[str, TensorInfo], bits: int) -> tuple[int, int]:
    """Returns K and N as the shape of ``qweight`` says: those of the padded module, if it is padded."""
    rows, words = tensors[module_name(module, "qweight")].shape
    return rows * GPTQ_MARLIN_TILE, words * pack_factor(bits) // GPTQ_MARLIN_TILE


def _shape_problems(
    module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: MarlinQuantization
) -> Iterator[tuple[str, str, str]]:
    bits, group_size = quantization.bits, quantization.group_size
    size_k, size_n = _padded_sizes(module, tensors, bits)
    true_sizes = quantization.padded_modules.get(module, (size_k, size_n))
    qweight = tensors[module_name(module, "qweight")]
    reason = unaligned_reason(size_k, size_n, bits, group_size)
    if not reason and qweight.shape != qweight_shape(size_k, size_n, bits):
        reason = f"a row of {qweight.shape[1]} words does not hold whole columns"
    if reason:
        yield qweight.name, "wrong-shape", f"{list(qweight.shape)} is no Marlin weight of {bits} bits: {reason}"
        return
    if module in quantization.padded_modules and (size_k, size_n) not in paddings(*true_sizes):
        message = f"K={size_k}, N={size_n} is not how K={true_sizes[0]}, N={true_sizes[1]} is padded"
        yield qweight.name, "wrong-shape", message
    groups = num_groups(size_k, group_size)
    shapes = {"scales": (groups, size_n), "qzeros": (groups, size_n // pack_factor(bits)), "bias": (true_sizes[1],)}
    for part in sorted(parts & shapes.keys()):
        tensor = tensors[module_name(module, part)]
        if tensor.shape != shapes[part]:
            message = f"its shape is {list(tensor.shape)}, needed is {list(shapes[part])} as qweight says"
            yield tensor.name, "wrong-shape", message


def _marlin_module(
    module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: MarlinQuantization
) -> ModulePlan:
    padded_k, padded_n = _padded_sizes(module, tensors, quantization.bits)
    size_k, size_n = quantization.padded_modules.get(module, (padded_k, padded_n))
    present = tuple(part for part in QUANTIZED_PARTS if part in parts)
    return ModulePlan(module, size_k, size_n, padded_k, padded_n, present, converted=True)
