"""What a checkpoint is, from its headers and config alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.converted import ConvertedCheckpoint, open_with_manifest
from awq2marlin.checkpoint.described import Described, describe
from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.checkpoint.source import SourceCheckpoint
from awq2marlin.checkpoint.tensor_parallel import ParallelSizes, parallel_sizes
from awq2marlin.errors import CheckpointError
from awq2marlin.formats.base import Format
from awq2marlin.formats.names import MANIFEST_FILENAME
from awq2marlin.formats.registry import DEFAULT_TARGET
from awq2marlin.formats.serving import Serving
from awq2marlin.hub.name import parse_source
from awq2marlin.hub.repository import open_source
from awq2marlin.io.safetensors import TensorIndex
from awq2marlin.io.source import Source
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.pipeline.journal import refuse_unfinished
from awq2marlin.pipeline.plan import plan_modules, refuse_what_is_told_otherwise, served
from awq2marlin.pipeline.preflight import default_output


@dataclass(frozen=True)
class ModuleInfo:
    """One quantized module.

    Attributes:
        name: full name.
        size_k: in features K, without padding.
        size_n: out features N, without padding.
        group_size: rows of K that share scales; K where one group spans all.
        layout: ``awq``, ``marlin`` and so on: how its tensors lie.
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
    layout: str
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
        format: ``awq``, ``compressed-tensors``, ``marlin_native`` and so on; see README.md.
        bits: 4 or 8; where it cannot be converted, what the config says, and 0 if it says nothing.
        group_size: as the config says; -1 for all of K, 0 if it says nothing.
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
        warnings: what is to know of it, and which files a conversion would leave behind.
        title: the format's name for people.
        reason: why it cannot be converted, and what to do; empty if it can. Then nothing is known of its modules.
        dtypes: how many tensors there are of each type.
        serving: how each engine serves it, or why it cannot; of one that is not Marlin-native, once it is converted
            with the default options.
        parallel_sizes: all numbers of GPUs over which vLLM can cut it, and what stands in the way of more.
        left_behind_bytes: bytes of the files that do not belong to it, by name.
    """

    path: Path | str
    format: str
    bits: float
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
    title: str = ""
    parallel_sizes: ParallelSizes = field(default_factory=ParallelSizes)
    left_behind_bytes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    serving: tuple[Serving, ...] = ()

    @property
    def is_convertible(self) -> bool:
        """Whether it is of a format that is read."""
        return not self.reason


def inspect(path: str | os.PathLike[str]) -> InspectResult:
    """Returns what a checkpoint is, from its headers and configs alone.

    Args:
        path: checkpoint folder, or Hub repository, ``org/name[@revision]``.

    Raises:
        CheckpointError: if it is not a checkpoint, or malformed. A sound one in a format that is not converted is
            described instead; see `InspectResult.reason`.
    """
    folder = open_source(path)
    refuse_unfinished(folder)
    try:
        return _inspected(*open_with_manifest(folder), path)
    except CheckpointError as error:
        is_output = folder.exists(MANIFEST_FILENAME)  # then it is damaged, not of another kind
        described = None if is_output else describe(folder, error)
        if described is None:
            raise
    return _unconvertible(described, folder)


def _inspected(checkpoint: Checkpoint, manifest: Manifest | None, path: str | os.PathLike[str]) -> InspectResult:
    quantization, origin = checkpoint.quantization, checkpoint.folder.origin
    if checkpoint.is_converted:
        place = origin.repo_id if origin else os.fspath(path)
        fates = ConvertedCheckpoint.of(checkpoint, manifest or read_manifest(checkpoint.folder)).counterparts
        modules = [_module_info(fate, checkpoint, fates.layout_of(fate)) for fate in fates.modules.values()]
    else:
        place = str(default_output(parse_source(path)))
        fates = plan_modules(SourceCheckpoint.of(checkpoint))
        refuse_what_is_told_otherwise(fates, checkpoint)
        modules = [_module_info(fate, checkpoint, fates.source_layout_of(fate)) for fate in fates.modules.values()]
    bits, group_size = quantization.bits, quantization.group_size
    sizes = parallel_sizes(fates.modules.values(), bits, group_size, checkpoint.config, checkpoint.tensors)
    return InspectResult(
        path=checkpoint.folder.where,
        format=checkpoint.format.name,
        title=checkpoint.title,
        bits=quantization.bits,
        group_size=quantization.group_size,
        zero_point=quantization.zero_point,
        model_type=_model_type(checkpoint.config),
        modules=tuple(modules),
        largest_tensor_parallel_size=sizes.largest,
        parallel_sizes=sizes,
        unquantized_modules=tuple(checkpoint.unquantized_modules),
        shards={name: header.file_size for name, header in checkpoint.shards.items()},
        tensors=len(checkpoint.tensors),
        bytes=sum(header.file_size for header in checkpoint.shards.values()),
        files=tuple(sorted([*checkpoint.side_files, *([checkpoint.card] if checkpoint.card else [])])),
        left_behind=checkpoint.left_behind,
        warnings=checkpoint.warnings,
        left_behind_bytes=checkpoint.left_behind_bytes,
        dtypes=_dtypes(checkpoint.index),
        serving=served(DEFAULT_TARGET, quantization.scheme, sizes, place),
    )


def _unconvertible(described: Described, folder: Source) -> InspectResult:
    index = described.index
    return InspectResult(
        path=folder.where,
        format=described.format,
        title=described.title,
        bits=described.bits,
        group_size=described.group_size,
        zero_point=False,
        model_type=_model_type(described.config),
        modules=(),
        largest_tensor_parallel_size=0,
        unquantized_modules=(),
        shards=described.files,
        tensors=len(index.tensors),
        bytes=sum(described.files.values()),
        files=(),
        left_behind={},
        warnings=(),
        reason=described.reason,
        dtypes=_dtypes(index),
    )


def _dtypes(index: TensorIndex) -> dict[str, int]:
    return dict(Counter(tensor.dtype for tensor in index.tensors.values()).most_common())


def _model_type(config: Mapping[str, Any]) -> str:
    found = config.get("model_type")
    return found if isinstance(found, str) else ""


def _module_info(fate: ModulePlan, checkpoint: Checkpoint, layout: Format) -> ModuleInfo:
    """Returns what a module is in the files.

    Args:
        fate: what becomes of it, or became.
        checkpoint: where it lies.
        layout: the format whose layout its tensors have.
    """
    scheme, target = checkpoint.quantization.scheme, DEFAULT_TARGET
    reason = target.unaligned_reason(fate.size_k, fate.size_n, scheme)
    if refusal := target.refusal(fate.name, fate.size_k, fate.size_n, scheme):
        reason = f"{refusal}, never converted"
    return ModuleInfo(
        name=fate.name,
        size_k=fate.size_k,
        size_n=fate.size_n,
        group_size=fate.size_k if scheme.group_size == -1 else scheme.group_size,
        layout=layout.layout_name,
        parts=fate.parts,
        aligned=not reason,
        reason=reason,
        padded=(fate.padded_k, fate.padded_n) if checkpoint.is_converted and fate.is_padded else None,
        bytes=sum(checkpoint.tensors[layout.tensor_name(fate.name, part)].size for part in fate.parts),
    )
