"""Planning a conversion: from headers alone, every module's fate and every byte of every output file.

Pure: nothing is read or written here, and `--dry-run` ends with what `plan_conversion` returns.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from awq2marlin._version import __version__
from awq2marlin.checkpoint.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.checkpoint.quantization import (
    AwqQuantization,
    MarlinQuantization,
    marlin_document,
    without_quantization,
)
from awq2marlin.checkpoint.source import Checkpoint, awq_modules
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.io.safetensors import Header, TensorInfo, encode_header
from awq2marlin.layout.marlin import (
    fusion_group,
    padded_shapes,
    unaligned_reason,
)
from awq2marlin.layout.modules import (
    AwqModule,
    ModulePlan,
    is_output_embedding,
    module_name,
    planned_module,
    repack_of,
    target_shape,
)
from awq2marlin.layout.repack import Repack

#: What to do with modules whose shapes Marlin cannot take.
Unaligned = Literal["keep", "pad", "error"]
UNALIGNED_CHOICES: tuple[Unaligned, ...] = get_args(Unaligned)


@dataclass(frozen=True)
class Span:
    """A run of a shard's data and what is done with it; offsets are into the data, in bytes.

    Attributes:
        source: (start, end) in the source.
        target: (start, end) in the target.
        repack: how it is rewritten; None copies it.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    repack: Repack | None


@dataclass(frozen=True)
class ShardPlan:
    """How one file becomes one file. Picklable.

    Attributes:
        name: the file's name, the same in source and output.
        source: the source's header.
        target: the output's header.
        spans: runs that cover the data of both, in order.
    """

    name: str
    source: Header
    target: Header
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        checkpoint: the source.
        quantization: the source's quantization.
        unaligned: the option it was made with.
        modules: every quantized module's fate, by name.
        shards: every file's, sorted by name.
    """

    checkpoint: Checkpoint
    quantization: AwqQuantization
    unaligned: Unaligned
    modules: Mapping[str, ModulePlan]
    shards: tuple[ShardPlan, ...]

    @cached_property
    def converted(self) -> list[ModulePlan]:
        """The modules that become Marlin."""
        return [module for module in self.modules.values() if module.converted]

    @cached_property
    def kept(self) -> list[ModulePlan]:
        """The quantized modules that stay in AWQ layout."""
        return [module for module in self.modules.values() if not module.converted]

    @property
    def source_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(shard.source.file_size for shard in self.shards)

    @property
    def target_bytes(self) -> int:
        """Bytes of all output shards."""
        return sum(shard.target.file_size for shard in self.shards)

    @property
    def source_data_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(shard.source.data_size for shard in self.shards)

    @property
    def target_data_bytes(self) -> int:
        """Bytes of all tensors in the output; more than the source's only where modules are padded."""
        return sum(shard.target.data_size for shard in self.shards)

    def config(self) -> dict[str, Any]:
        """Returns the output's ``config.json``."""
        padded = {module.name: (module.size_k, module.size_n) for module in self.converted if module.is_padded}
        kept = [module.name for module in self.kept]
        document = marlin_document(self.quantization, kept, self.checkpoint.unquantized_modules, padded)
        return without_quantization(self.checkpoint.config, document)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides the output's bytes, but the data of tensors and side files."""
        folder = self.checkpoint.folder
        index = [INDEX_FILENAME] if self.checkpoint.has_index else []
        card = [self.checkpoint.card] if self.checkpoint.card else []
        texts = [CONFIG_FILENAME, *self.checkpoint.legacy_configs, *index, *card]
        identity = {
            "version": __version__,
            "origin": folder.origin,
            "unaligned": self.unaligned,
            "texts": [(name, _sha256(folder.read(name))) for name in texts],
            "shards": [
                (shard.name, shard.source.file_size, _sha256(shard.source.text), _sha256(shard.target.text))
                for shard in self.shards
            ],
            "side_files": [(name, folder.size(name)) for name in self.checkpoint.side_files],
        }
        return "sha256:" + _sha256(json.dumps(identity, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plan_conversion(checkpoint: Checkpoint, unaligned: Unaligned = "keep") -> Plan:
    """Returns the plan of a conversion.

    Args:
        checkpoint: an AWQ checkpoint.
        unaligned: what to do with modules whose shapes Marlin cannot take: ``keep`` them in AWQ layout,
            ``pad`` them with zeros, or ``error``.

    Raises:
        CheckpointError: if the checkpoint is already converted, its modules do not agree, or, with
            ``error``, any module is unaligned.
        ValueError: if ``unaligned`` is none of the three.
    """
    if unaligned not in UNALIGNED_CHOICES:
        choices = ", ".join(map(repr, UNALIGNED_CHOICES))
        raise ValueError(f"unaligned must be one of {choices}, found {unaligned!r}")
    quantization = checkpoint.quantization
    if isinstance(quantization, MarlinQuantization):
        raise refuse(
            "already-converted",
            "this checkpoint is already Marlin-native; 'awq2marlin revert' gives the AWQ one back",
            file=CONFIG_FILENAME,
        )
    if checkpoint.folder.exists(MANIFEST_FILENAME):
        raise refuse(
            "already-converted",
            "an AWQ checkpoint must not hold a file of this name; remove it",
            file=MANIFEST_FILENAME,
        )
    found = awq_modules(checkpoint.tensors, quantization, checkpoint.shard_of)
    modules = plan_modules(found, checkpoint, quantization, unaligned)
    if unaligned == "error":
        _refuse_unaligned(modules, checkpoint, quantization)
    shards = tuple(_plan_shard(name, header, modules, quantization) for name, header in checkpoint.shards.items())
    return Plan(checkpoint, quantization, unaligned, modules, shards)


def plan_modules(
    found: Mapping[str, AwqModule],
    checkpoint: Checkpoint,
    quantization: AwqQuantization,
    unaligned: Unaligned = "keep",
) -> dict[str, ModulePlan]:
    """Returns what becomes of every quantized module of an AWQ checkpoint, by name.

    Args:
        found: its quantized modules.
        checkpoint: the checkpoint, for what is not quantized.
        quantization: the checkpoint's.
        unaligned: what to do with modules whose shapes Marlin cannot take; ``error`` keeps them.
    """
    groups: dict[str, list[AwqModule]] = defaultdict(list)
    for module in found.values():
        groups[fusion_group(module.name)].append(module)
    in_full_precision = {fusion_group(name): name for name in reversed(checkpoint.unquantized_modules)}
    plans = {}
    for key, members in groups.items():
        for planned in _plan_group(members, in_full_precision.get(key), quantization, unaligned):
            plans[planned.name] = planned
    return {name: plans[name] for name in found}


def _plan_group(
    members: list[AwqModule],
    in_full_precision: str | None,
    quantization: AwqQuantization,
    unaligned: Unaligned,
) -> list[ModulePlan]:
    """Decides over modules that runtimes fuse: together or not at all."""
    reasons = {}
    for module in members:
        if is_output_embedding(module.name):
            reasons[module.name] = "output embedding"
        elif in_full_precision:
            reasons[module.name] = f"fused with {in_full_precision}, which is not quantized"
        elif unaligned != "pad":
            reason = unaligned_reason(module.size_k, module.size_n, quantization.bits, quantization.group_size)
            if reason:
                reasons[module.name] = f"unaligned: {reason}"
    if reasons:
        blocker = next(iter(reasons))
        return [
            planned_module(module, reasons.get(module.name, f"fused with {blocker}, which is kept"))
            for module in members
        ]
    sizes = [(module.size_k, module.size_n) for module in members]
    if any(unaligned_reason(*size, quantization.bits, quantization.group_size) for size in sizes):
        sizes = padded_shapes(sizes, quantization.group_size)
    return [
        replace(planned_module(module), padded_k=size_k, padded_n=size_n)
        for module, (size_k, size_n) in zip(members, sizes, strict=True)
    ]


def _refuse_unaligned(modules: Mapping[str, ModulePlan], checkpoint: Checkpoint, quantization: AwqQuantization) -> None:
    problems = []
    for module in modules.values():
        reason = unaligned_reason(module.size_k, module.size_n, quantization.bits, quantization.group_size)
        if reason and not is_output_embedding(module.name):
            shard = checkpoint.shard_of[module_name(module.name, "qweight")]
            message = f"unaligned: {reason}; use --unaligned keep or pad"
            problems.append(Problem(shard, module.name, "unaligned", message))
    if problems:
        raise CheckpointError(problems)


def _plan_shard(
    name: str, source: Header, modules: Mapping[str, ModulePlan], quantization: AwqQuantization
) -> ShardPlan:
    targets: dict[str, TensorInfo] = {}
    spans: list[Span] = []
    position = 0
    for tensor in source.by_offset:
        module, _, part = tensor.name.rpartition(".")
        plan = modules.get(module)
        repack, shape = None, tensor.shape
        if plan is not None and plan.converted and part in plan.parts:
            repack = repack_of(plan, part, quantization)
            shape = target_shape(plan, part, quantization)
        size = repack.target_rows * repack.target_row_bytes if repack else tensor.size
        targets[tensor.name] = TensorInfo(tensor.name, tensor.dtype, shape, position, position + size)
        spans.append(Span((tensor.start, tensor.end), (position, position + size), repack))
        position += size
    return ShardPlan(name, source, encode_header(source, targets), _merge_copies(spans))


def _merge_copies(spans: list[Span]) -> tuple[Span, ...]:
    """Joins neighbouring runs that are only copied, so that small tensors cost nothing."""
    merged: list[Span] = []
    for span in spans:
        if merged and span.repack is None and merged[-1].repack is None:
            before = merged.pop()
            span = Span((before.source[0], span.source[1]), (before.target[0], span.target[1]), None)
        merged.append(span)
    return tuple(merged)
