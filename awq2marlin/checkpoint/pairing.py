"""The same model in both layouts: which modules are converted, and whether every header agrees with that.

`verify` pairs the source's headers with the output's; `revert` pairs the headers in the manifest with the
converted files'. Both are hostile until they agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from awq2marlin.checkpoint.names import CONFIG_FILENAME
from awq2marlin.checkpoint.quantization import AwqQuantization, MarlinQuantization
from awq2marlin.checkpoint.source import Checkpoint, awq_modules
from awq2marlin.errors import printable, refuse
from awq2marlin.io.safetensors import Header
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, is_aligned, paddings
from awq2marlin.layout.modules import AwqModule, ModulePlan, module_name, target_shape
from awq2marlin.layout.packing import pack_factor


def pair_modules(
    source: Mapping[str, Header], quantization: AwqQuantization, marlin: Checkpoint, *, same_files: bool = True
) -> dict[str, ModulePlan]:
    """Returns every converted module, after checking that all headers agree.

    Args:
        source: headers of the AWQ checkpoint, by file name.
        quantization: of the AWQ checkpoint.
        marlin: the converted checkpoint.
        same_files: whether tensors must lie in files of the same names and in the same order.

    Raises:
        CheckpointError: if files, tensors, their order, types or shapes are not those that the conversion of
            ``source`` has, or the config's lists name what is not there.
    """
    assert isinstance(marlin.quantization, MarlinQuantization)
    shard_of = {name: shard for shard, header in source.items() for name in header.tensors}
    _same_names(shard_of, marlin)
    if same_files:
        _same_files(source, shard_of, marlin)
    tensors = {name: tensor for header in source.values() for name, tensor in header.tensors.items()}
    modules = awq_modules(tensors, quantization, shard_of)
    _known_modules(marlin, modules)
    converted = {
        name: _converted(module, marlin)
        for name, module in modules.items()
        if name not in marlin.quantization.awq_modules
    }
    shapes = {
        module_name(name, part): target_shape(module, part, quantization)
        for name, module in converted.items()
        for part in module.parts
    }
    for name, tensor in tensors.items():
        found, shape = marlin.tensors[name], shapes.get(name, tensor.shape)
        if (found.dtype, found.shape) != (tensor.dtype, shape):
            raise refuse(
                "wrong-shape",
                f"expected {tensor.dtype} {list(shape)}, found {found.dtype} {list(found.shape)}",
                file=shard_of[name],
                tensor=name,
            )
    return converted


def _same_names(shard_of: Mapping[str, str], marlin: Checkpoint) -> None:
    for name in sorted({*shard_of, *marlin.shard_of}):
        if name not in marlin.shard_of:
            raise refuse(
                "missing-tensor",
                "the source has this tensor, the converted checkpoint does not",
                file=shard_of[name],
                tensor=name,
            )
        if name not in shard_of:
            raise refuse(
                "extra-tensor",
                "the converted checkpoint has this tensor, the source does not",
                file=marlin.shard_of[name],
                tensor=name,
            )


def _same_files(source: Mapping[str, Header], shard_of: Mapping[str, str], marlin: Checkpoint) -> None:
    for name in sorted(shard_of):
        if shard_of[name] != marlin.shard_of[name]:
            raise refuse(
                "moved-tensor",
                f"in the source it lies in {shard_of[name]}",
                file=marlin.shard_of[name],
                tensor=name,
            )
    for shard in sorted({*source, *marlin.shards}):
        if shard not in source or shard not in marlin.shards:
            raise refuse("missing-file", "only one of source and converted checkpoint has this file", file=shard)
        if [tensor.name for tensor in source[shard].by_offset] != [
            tensor.name for tensor in marlin.shards[shard].by_offset
        ]:
            raise refuse("moved-tensor", "the tensors lie in another order than in the source", file=shard)


def _known_modules(marlin: Checkpoint, modules: Mapping[str, AwqModule]) -> None:
    quantization = marlin.quantization
    assert isinstance(quantization, MarlinQuantization)
    for key, known, what in (
        ("awq_modules", set(modules), "quantized"),
        ("padded_modules", set(modules), "quantized"),
        ("unquantized_modules", set(marlin.unquantized_modules), "in full precision"),
    ):
        unknown = sorted(set(getattr(quantization, key)) - known)
        if unknown:
            raise refuse(
                "unknown-module",
                f"{key} names {printable(unknown[0])}, which is not there {what}",
                file=CONFIG_FILENAME,
                tensor=unknown[0],
            )
    forgotten = sorted(set(marlin.unquantized_modules) - quantization.unquantized_modules)
    if forgotten:
        raise refuse(
            "contradiction",
            "the module is in full precision, but unquantized_modules does not name it",
            file=CONFIG_FILENAME,
            tensor=forgotten[0],
        )
    both = sorted(quantization.awq_modules & set(quantization.padded_modules))
    if both:
        raise refuse(
            "contradiction",
            "both awq_modules and padded_modules name it",
            file=CONFIG_FILENAME,
            tensor=both[0],
        )


def _converted(module: AwqModule, marlin: Checkpoint) -> ModulePlan:
    quantization = marlin.quantization
    assert isinstance(quantization, MarlinQuantization)
    padded_k, padded_n = module.size_k, module.size_n
    true_sizes = quantization.padded_modules.get(module.name)
    if true_sizes is not None:
        if true_sizes != (module.size_k, module.size_n):
            raise refuse(
                "contradiction",
                f"padded_modules says {list(true_sizes)}, the source has {[module.size_k, module.size_n]}",
                file=CONFIG_FILENAME,
                tensor=module.name,
            )
        shape = marlin.tensors[module_name(module.name, "qweight")].shape
        if len(shape) == 2:
            padded_k, padded_n = (
                shape[0] * GPTQ_MARLIN_TILE,
                shape[1] * pack_factor(quantization.bits) // GPTQ_MARLIN_TILE,
            )
        if (padded_k, padded_n) not in paddings(module.size_k, module.size_n):
            raise refuse(
                "unaligned",
                f"K={padded_k}, N={padded_n} is not how a source of K={module.size_k}, N={module.size_n} is padded",
                file=marlin.shard_of[module_name(module.name, "qweight")],
                tensor=module.name,
            )
    if not is_aligned(padded_k, padded_n, quantization.bits, quantization.group_size):
        raise refuse(
            "unaligned",
            f"K={padded_k}, N={padded_n} cannot be Marlin",
            file=marlin.shard_of[module_name(module.name, "qweight")],
            tensor=module.name,
        )
    return ModulePlan(module.name, module.size_k, module.size_n, padded_k, padded_n, module.parts, converted=True)
