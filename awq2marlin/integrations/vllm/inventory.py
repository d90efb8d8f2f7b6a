"""What the headers of a checkpoint say, for decisions that its config alone does not settle.

Read once, when vLLM has parsed the config and before it builds the model, so that what is missing or cannot be
served is refused before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq2marlin.awq import QUANTIZED_PARTS, module_name, pack_factor
from awq2marlin.checkpoint import open_checkpoint
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.folder import CONFIG_FILENAME
from awq2marlin.manifest import read_manifest
from awq2marlin.marlin import GPTQ_MARLIN_TILE
from awq2marlin.plan import ModulePlan
from awq2marlin.quantization import MANIFEST_FILENAME, MARLIN_QUANT_METHOD, MarlinQuantization
from awq2marlin.slicing import largest_tensor_parallel_size

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inventory:
    """What the loader needs to know of a checkpoint's tensors. Picklable: it travels to vLLM's workers.

    Attributes:
        zero_point_modules: the modules that have ``qzeros``.
        largest_tensor_parallel_size: see `awq2marlin.slicing.largest_tensor_parallel_size`.
    """

    zero_point_modules: frozenset[str]
    largest_tensor_parallel_size: int


def read_inventory(path: Path, quantization: MarlinQuantization) -> Inventory:
    """Returns the inventory of a checkpoint in a folder, which must be complete.

    Args:
        path: the folder.
        quantization: what its config says.

    Raises:
        CheckpointError: naming every file and tensor that is missing or contradicts the config.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint.quantization, MarlinQuantization):
        raise refuse("contradiction", f"it does not say quant_method {MARLIN_QUANT_METHOD!r}", file=CONFIG_FILENAME)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    wanted: set[str] = set()
    if checkpoint.folder.exists(MANIFEST_FILENAME):
        manifest = read_manifest(checkpoint.folder)
        wanted = {name for shard in manifest.shards.values() for name in shard.source_header.tensors}
    return inventory_of(shapes, quantization, checkpoint.config, wanted)


def inventory_of(
    shapes: Shapes, quantization: MarlinQuantization, config: Mapping[str, Any], wanted: Collection[str] = ()
) -> Inventory:
    """Returns the inventory of a checkpoint whose tensors are known by name and shape.

    Args:
        shapes: the shape of every tensor, by name.
        quantization: what the config says.
        config: the model's ``config.json``.
        wanted: tensors that are known to belong to it; may be empty.

    Raises:
        CheckpointError: naming every tensor that is missing or no matrix, or that vLLM has no kernel for.
    """
    problems = [*_missing(shapes, quantization, wanted), *_misshapen(shapes), *_unserved(shapes, quantization)]
    if problems:
        raise CheckpointError(problems)
    with_zeros = frozenset(name.removesuffix(".qzeros") for name in shapes if name.endswith(".qzeros"))
    modules = _modules(shapes, quantization)
    size = largest_tensor_parallel_size(modules, quantization.bits, quantization.group_size, config)
    return Inventory(with_zeros, size)


def quantized_modules(shapes: Shapes) -> list[str]:
    """Returns the names of the modules that have a ``qweight``, sorted."""
    return sorted(name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight"))


def _missing(shapes: Shapes, quantization: MarlinQuantization, wanted: Collection[str]) -> list[Problem]:
    required = set(wanted)
    for module in quantization.unquantized_modules:
        required.add(module_name(module, "weight"))
    parts = [part for part in QUANTIZED_PARTS if part != "qzeros" or quantization.zero_point]
    started = {name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in ("qweight", "qzeros")}
    for module in started | quantization.awq_modules | quantization.padded_modules.keys():
        required.update(module_name(module, part) for part in parts)
    message = "it is missing from the checkpoint; download the files again, or convert again"
    return [Problem("", name, "missing-tensor", message) for name in sorted(required - shapes.keys())]


def _misshapen(shapes: Shapes) -> list[Problem]:
    weights = {name: shapes[name] for name in shapes if name.endswith(".qweight")}
    return [
        Problem("", name, "wrong-shape", f"its shape is {list(shape)}, needed are two dimensions; convert again")
        for name, shape in weights.items()
        if len(shape) != 2
    ]


def _unserved(shapes: Shapes, quantization: MarlinQuantization) -> list[Problem]:
    if quantization.bits != 8:
        return []
    message = (
        "8 bits with zero points: vLLM's Marlin kernels know 8 bits only without them. Serve the checkpoint with "
        "Transformers, or look for a 4-bit one of this model"
    )
    zeros = sorted(name for name in shapes if name.endswith(".qzeros"))
    return [Problem("", name, "unsupported-engine", message) for name in zeros]


def _modules(shapes: Shapes, quantization: MarlinQuantization) -> list[ModulePlan]:
    """Returns every quantized module as it lies in the file."""
    factor = pack_factor(quantization.bits)
    modules = []
    for name in quantized_modules(shapes):
        parts = tuple(part for part in QUANTIZED_PARTS if module_name(name, part) in shapes)
        rows, words = shapes[module_name(name, "qweight")]
        converted = name not in quantization.awq_modules
        tile = GPTQ_MARLIN_TILE if converted else 1
        file_k, file_n = rows * tile, words * factor // tile
        size_k, size_n = quantization.padded_modules.get(name, (file_k, file_n))
        modules.append(ModulePlan(name, size_k, size_n, file_k, file_n, parts, converted))
    return modules
