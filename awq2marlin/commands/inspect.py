"""What a checkpoint is, from its headers and config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.names import MANIFEST_FILENAME
from awq2marlin.checkpoint.pairing import pair_modules
from awq2marlin.checkpoint.quantization import AwqQuantization, MarlinQuantization
from awq2marlin.checkpoint.source import Checkpoint, awq_modules, open_checkpoint
from awq2marlin.checkpoint.tensor_parallel import largest_tensor_parallel_size
from awq2marlin.hub.repository import open_source
from awq2marlin.layout.marlin import unaligned_reason
from awq2marlin.layout.modules import AwqModule, ModulePlan, is_output_embedding, module_name, planned_module
from awq2marlin.pipeline.plan import plan_modules


@dataclass(frozen=True)
class ModuleInfo:
    """One quantized module.

    Attributes:
        name: full name.
        size_k: in features K, without padding.
        size_n: out features N, without padding.
        group_size: rows of K that share scales; K where one group spans all.
        layout: ``awq`` or ``marlin``.
        parts: which of ``qweight``, ``qzeros``, ``scales`` it has.
        aligned: whether Marlin can take its shape.
        reason: why not, in words; empty if it can.
        padded: (K, N) in the file if it is padded, else None.
        bytes: bytes of its tensors in the files.
    """

    name: str
    size_k: int
    size_n: int
    group_size: int
    layout: Literal["awq", "marlin"]
    parts: tuple[str, ...]
    aligned: bool
    reason: str
    padded: tuple[int, int] | None
    bytes: int


@dataclass(frozen=True)
class InspectResult:
    """What a checkpoint is.

    Attributes:
        path: its folder, or ``org/name@commit``.
        format: ``awq`` or ``marlin_native``.
        bits: 4 or 8.
        group_size: as the config says; -1 for all of K.
        zero_point: as the config says.
        model_type: as ``config.json`` says; may be empty.
        modules: the quantized modules.
        largest_tensor_parallel_size: over how many GPUs vLLM can cut it, an AWQ checkpoint once it is converted;
            0 if vLLM cannot load it.
        unquantized_modules: modules with a floating-point weight of two or more dimensions.
        shards: bytes of every safetensors file.
        tensors: how many tensors there are.
        bytes: bytes of all safetensors files.
        files: side files that belong to it.
        left_behind: files that do not, with the reason.
        warnings: oddities that do no harm.
    """

    path: Path | str
    format: Literal["awq", "marlin_native"]
    bits: int
    group_size: int
    zero_point: bool
    model_type: str
    modules: tuple[ModuleInfo, ...]
    largest_tensor_parallel_size: int
    unquantized_modules: tuple[str, ...]
    shards: Mapping[str, int]
    tensors: int
    bytes: int
    files: tuple[str, ...]
    left_behind: Mapping[str, str]
    warnings: tuple[str, ...]


def inspect(path: str | os.PathLike[str]) -> InspectResult:
    """Returns what an AWQ or a converted checkpoint is; reads no tensor data.

    Args:
        path: its folder, or a repository of the Hub, ``org/name[@revision]``.

    Raises:
        CheckpointError: if it is neither, or malformed.
    """
    checkpoint = open_checkpoint(open_source(path))
    quantization = checkpoint.quantization
    if isinstance(quantization, MarlinQuantization):
        modules, plans = _marlin_modules(checkpoint, quantization)
    else:
        found = awq_modules(checkpoint.tensors, quantization, checkpoint.shard_of)
        modules = [_module_info(module, checkpoint, "awq", None) for module in found.values()]
        plans = list(plan_modules(found, checkpoint, quantization).values())
    return InspectResult(
        path=checkpoint.folder.where,
        format="marlin_native" if isinstance(quantization, MarlinQuantization) else "awq",
        bits=quantization.bits,
        group_size=quantization.group_size,
        zero_point=quantization.zero_point,
        model_type=_model_type(checkpoint.config),
        modules=tuple(modules),
        largest_tensor_parallel_size=largest_tensor_parallel_size(
            plans, quantization.bits, quantization.group_size, checkpoint.config
        ),
        unquantized_modules=tuple(checkpoint.unquantized_modules),
        shards={name: header.file_size for name, header in checkpoint.shards.items()},
        tensors=len(checkpoint.tensors),
        bytes=sum(header.file_size for header in checkpoint.shards.values()),
        files=tuple(sorted([*checkpoint.side_files, *([checkpoint.card] if checkpoint.card else [])])),
        left_behind=checkpoint.left_behind,
        warnings=checkpoint.warnings,
    )


def _model_type(config: Mapping[str, Any]) -> str:
    found = config.get("model_type")
    return found if isinstance(found, str) else ""


def _marlin_modules(
    checkpoint: Checkpoint, quantization: MarlinQuantization
) -> tuple[list[ModuleInfo], list[ModulePlan]]:
    """Reads the modules' true sizes from the source headers that the manifest keeps."""
    source = {name: shard.source_header for name, shard in read_manifest(checkpoint.folder).shards.items()}
    awq = AwqQuantization(quantization.bits, quantization.group_size, quantization.zero_point, None, MANIFEST_FILENAME)
    converted = pair_modules(source, awq, checkpoint)
    tensors = {name: tensor for header in source.values() for name, tensor in header.tensors.items()}
    infos, plans = [], []
    for module in awq_modules(tensors, awq, checkpoint.shard_of).values():
        plan = converted.get(module.name) or planned_module(module, "kept")
        padded = (plan.padded_k, plan.padded_n) if plan.is_padded else None
        infos.append(_module_info(module, checkpoint, "marlin" if plan.converted else "awq", padded))
        plans.append(plan)
    return infos, plans


def _module_info(
    module: AwqModule,
    checkpoint: Checkpoint,
    layout: Literal["awq", "marlin"],
    padded: tuple[int, int] | None,
) -> ModuleInfo:
    quantization = checkpoint.quantization
    reason = unaligned_reason(module.size_k, module.size_n, quantization.bits, quantization.group_size) or ""
    if is_output_embedding(module.name):
        reason = "output embedding, never converted"
    return ModuleInfo(
        name=module.name,
        size_k=module.size_k,
        size_n=module.size_n,
        group_size=module.size_k if quantization.group_size == -1 else quantization.group_size,
        layout=layout,
        parts=module.parts,
        aligned=not reason,
        reason=reason,
        padded=padded,
        bytes=sum(checkpoint.tensors[module_name(module.name, part)].size for part in module.parts),
    )
