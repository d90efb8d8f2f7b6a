"""Planning a conversion: from headers alone, every module's fate and every byte of every output file.

Pure: nothing is read or written here, and `--dry-run` ends with what `plan_conversion` returns.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from awq2marlin._version import __version__
from awq2marlin.arguments import ArgumentError
from awq2marlin.checkpoint.config import written_config
from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.index import converted_index, made_index, target_weight_map
from awq2marlin.checkpoint.opening import Checkpoint, needs_index
from awq2marlin.checkpoint.source import SourceCheckpoint
from awq2marlin.checkpoint.tensor_parallel import ParallelSizes, mixture, parallel_sizes
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.names import CARD_FILENAME, CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import DEFAULT_TARGET, KEPT, target_named
from awq2marlin.formats.serving import Serving
from awq2marlin.io.safetensors import Header, TensorIndex
from awq2marlin.io.strict_json import encode_json
from awq2marlin.layout.marlin import fusion_group
from awq2marlin.layout.modules import DEFAULT_UNALIGNED, UNALIGNED_CHOICES, Linear, ModulePlan, Unaligned, module_name
from awq2marlin.layout.scheme import Scheme
from awq2marlin.pipeline.transfer import ShardPlan, Transfer, spans_of


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        checkpoint: the source.
        counterparts: what becomes of its modules.
        unaligned: the option it was made with.
        shards: every file's, sorted by name.
    """

    checkpoint: Checkpoint
    counterparts: Counterparts
    unaligned: Unaligned
    shards: tuple[ShardPlan, ...]

    @property
    def quantization(self) -> Quantization:
        """How the source is quantized."""
        return self.checkpoint.quantization

    @property
    def target(self) -> Format:
        """The format of the output."""
        return self.counterparts.target

    @property
    def modules(self) -> Mapping[str, ModulePlan]:
        """Every quantized module's fate, by name."""
        return self.counterparts.modules

    @cached_property
    def converted(self) -> list[ModulePlan]:
        """The modules that take the target's layout."""
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

    @cached_property
    def parallel_sizes(self) -> ParallelSizes | None:
        """Over how many GPUs vLLM's loader of ours can cut the output; None if the output needs no loader of ours."""
        if not self.target.is_own:
            return None
        scheme = self.counterparts.target_scheme
        source = self.checkpoint
        modules = self.modules.values()
        return parallel_sizes(modules, scheme.bits, scheme.group_size, source.config, source.tensors)

    def serving(self, place: str) -> tuple[Serving, ...]:
        """Returns how each engine serves the output, or why it cannot.

        Args:
            place: the output's folder or repository.
        """
        return served(self.target, self.counterparts.target_scheme, self.parallel_sizes or self._mixture, place)

    @cached_property
    def _mixture(self) -> ParallelSizes | None:
        """Returns why engines cannot load the output with code of their own; None if they decide that for themselves.

        They refuse layers that they would have to join of quantized and other modules, or lose a part without a word:
        read in vLLM 0.33 (``is_layer_skipped``, ``should_ignore_layer``). How Transformers loads it is not known.
        """
        source = self.checkpoint
        found = mixture(self.modules.values(), source.config, source.tensors)
        return found and found._replace(not_in_transformers="")

    def config(self) -> dict[str, Any]:
        """Returns the output's ``config.json``."""
        quantization = Quantization(
            self.counterparts.target_scheme,
            self.quantization.modules_to_not_convert,
            awq_modules=frozenset(module.name for module in self.kept),
            unquantized_modules=frozenset(self.checkpoint.unquantized_modules),
            padded_modules={each.name: (each.size_k, each.size_n) for each in self.converted if each.is_padded},
            quantized_modules=frozenset(self.modules),
        )
        return written_config(self.checkpoint.config, self.target, quantization)

    def without(self, names: Collection[str], reason: str) -> Plan:
        """Returns the plan without some side files, which are left behind.

        Args:
            names: of the files.
            reason: why, in words.
        """
        if not names:
            return self
        checkpoint, sizes = self.checkpoint, {name: self.checkpoint.folder.size(name) for name in names}
        rest = replace(
            checkpoint,
            side_files=tuple(name for name in checkpoint.side_files if name not in sizes),
            left_behind={**checkpoint.left_behind, **dict.fromkeys(names, reason)},
            left_behind_bytes={**checkpoint.left_behind_bytes, **sizes},
        )
        return replace(self, checkpoint=rest)

    @cached_property
    def new_index(self) -> bytes | None:
        """The output's index, where it is not the source's, or the source has none and the output needs one."""
        target = {shard.name: shard.target for shard in self.shards}
        checkpoint = self.checkpoint
        if checkpoint.has_index:
            read = partial(checkpoint.folder.read_json, INDEX_FILENAME)
            document = converted_index(read, checkpoint.index, target, self.counterparts)
        else:
            document = made_index(target) if needs_index(checkpoint) else None
        return None if document is None else encode_json(document)

    def target_index(self, headers: Mapping[str, Header]) -> TensorIndex:
        """Returns the output's tensors that count.

        Args:
            headers: of files of the output, by name.
        """
        source = self.checkpoint.index
        weight_map = target_weight_map(source, headers, self.counterparts) if source.copies else None
        return TensorIndex(headers, weight_map)

    @cached_property
    def transfer(self) -> Transfer:
        """What the conversion reads and writes."""
        checkpoint, index = self.checkpoint, self.new_index
        same_index = [INDEX_FILENAME] if checkpoint.has_index and index is None else []
        return Transfer(
            "convert",
            checkpoint.folder,
            self.shards,
            dict.fromkeys([*checkpoint.side_files, *same_index]),
            {} if index is None else {INDEX_FILENAME: index},
            (MANIFEST_FILENAME, CARD_FILENAME),
            encode_json(self.config()),
            self.digest,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides the output's bytes, but the data of tensors and side files."""
        folder = self.checkpoint.folder
        index = [INDEX_FILENAME] if self.checkpoint.has_index else []
        card = [self.checkpoint.card] if self.checkpoint.card else []
        earlier = [MANIFEST_FILENAME] if self.checkpoint.has_manifest else []
        texts = [CONFIG_FILENAME, *self.checkpoint.legacy_configs, *index, *card, *earlier]
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
        if self.target is not DEFAULT_TARGET:  # version 0.1 knew no other, and its runs are gone on with
            identity["target"] = self.target.name
        return "sha256:" + _sha256(json.dumps(identity, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def served(target: Format, scheme: Scheme, sizes: ParallelSizes | None, place: str) -> tuple[Serving, ...]:
    """Returns how each engine serves an output of a format, or why it cannot.

    Args:
        target: the format.
        scheme: of the output.
        sizes: over how many GPUs engines can cut it, and which cannot load it; None if engines decide that.
        place: the output's folder or repository.
    """
    if sizes is None:
        return target.serving(scheme, place)
    ways, refusals = target.serving(scheme, place, sizes.sizes), sizes.refusals
    return tuple(
        Serving(each.engine, reason=refusals[each.engine]) if each.command and each.engine in refusals else each
        for each in ways
    )


def plan_conversion(checkpoint: Checkpoint, unaligned: Unaligned | None = None, to: str | None = None) -> Plan:
    """Returns the plan of a conversion.

    Args:
        checkpoint: the source.
        unaligned: what to do with modules whose shapes the target's layout cannot take: ``keep`` them in AWQ layout,
            ``pad`` them with zeros, or ``error``; None for the default, ``keep``.
        to: the layout to convert to, by name; None for the default.

    Raises:
        CheckpointError: if the checkpoint is already of the default format, its modules do not agree, or, with
            ``error``, any module is unaligned.
        ValueError: if ``unaligned`` is none of the three, or the source is already of the format that is asked for.
    """
    unaligned = DEFAULT_UNALIGNED if unaligned is None else unaligned
    if unaligned not in UNALIGNED_CHOICES:
        choices = ", ".join(map(repr, UNALIGNED_CHOICES))
        raise ValueError(f"unaligned must be one of {choices}, found {unaligned!r}")
    target = target_named(to)
    is_same = checkpoint.format.name == target.name  # a format's older form, too
    if to is None and is_same:  # nothing wrong was asked for
        raise refuse(
            "already-converted",
            f"this checkpoint is already {target.title}; 'awq2marlin revert' gives the original back",
            file=CONFIG_FILENAME,
        )
    source = SourceCheckpoint.of(checkpoint)  # first of all, whether the config says of which format it is
    if is_same:
        raise ArgumentError("{to} is {name}, but the source is in that format already", name=repr(target.layout_name))
    counterparts = plan_modules(source, unaligned, target)
    if unaligned == "error":
        _refuse_unaligned(counterparts, checkpoint)
    _refuse_unkeepable(counterparts, source)
    _refuse_strays(counterparts, checkpoint)
    _refuse_denied_zero_points(counterparts, checkpoint)
    shards = tuple(_plan_shard(name, counterparts, checkpoint.index) for name in checkpoint.shards)
    emptied = [shard.name for shard in shards if shard.source.tensors and not shard.target.tensors]
    if emptied:  # the output's index could not name it, so that it would be lost on the way back
        message = (
            f"no tensor of this file remains in {target.title}, so the conversion could not be undone; put its tensors "
            "into another file of a copy, and correct the index if there is one"
        )
        raise CheckpointError(Problem(name, "", "contradiction", message) for name in emptied)
    refuse_what_is_told_otherwise(counterparts, checkpoint)
    return Plan(checkpoint, counterparts, unaligned, shards)


def plan_modules(
    source: SourceCheckpoint, unaligned: Unaligned = DEFAULT_UNALIGNED, target: Format = DEFAULT_TARGET
) -> Counterparts:
    """Returns what becomes of every quantized module of a source.

    Args:
        source: the source.
        unaligned: what to do with modules whose shapes the target's layout cannot take; ``error`` keeps them.
        target: the format to convert to.
    """
    checkpoint, groups = source.checkpoint, defaultdict(list)
    for module in source.modules.values():
        groups[fusion_group(module.name)].append(module)
    in_full_precision = {fusion_group(name): name for name in reversed(checkpoint.unquantized_modules)}
    counterparts = Counterparts(checkpoint.format, target, checkpoint.quantization.scheme, {}, source.modules)
    fates = {
        fate.name: fate
        for key, members in groups.items()
        for fate in _plan_group(members, in_full_precision.get(key), counterparts, unaligned)
    }
    return replace(counterparts, modules={name: fates[name] for name in source.modules})


def _plan_group(
    members: Sequence[Linear], in_full_precision: str | None, counterparts: Counterparts, unaligned: Unaligned
) -> Iterable[ModulePlan]:
    """Decides over modules that runtimes fuse: together or not at all."""
    target, scheme = counterparts.target, counterparts.scheme
    reasons = {}
    for module in members:
        misfit = target.unaligned_reason(module.size_k, module.size_n, scheme)
        if refusal := target.refusal(module.name, module.size_k, module.size_n, scheme):
            reasons[module.name] = refusal
        elif in_full_precision and target.has_module_lists:  # others cannot say that a module is kept, and need not
            reasons[module.name] = f"fused with {in_full_precision}, which is not quantized"
        elif misfit and unaligned != "pad":
            reasons[module.name] = f"unaligned: {misfit}"
    if reasons:
        blocker = next(iter(reasons))
        return [ModulePlan.of(each, reasons.get(each.name, f"fused with {blocker}, which is kept")) for each in members]
    sizes = [(module.size_k, module.size_n) for module in members]
    if any(target.unaligned_reason(*size, scheme) for size in sizes):
        sizes = target.padded_shapes(sizes, scheme)
    return [ModulePlan.of(module, padded=size) for module, size in zip(members, sizes, strict=True)]


def _refuse_unaligned(counterparts: Counterparts, checkpoint: Checkpoint) -> None:
    target, scheme, problems = counterparts.target, counterparts.scheme, []
    for module in counterparts.modules.values():
        size = module.size_k, module.size_n
        reason = target.unaligned_reason(*size, scheme)
        if reason and not target.refusal(module.name, *size, scheme):
            shard = checkpoint.shard_of[counterparts.source_layout_of(module).tensor_name(module.name, "qweight")]
            choices = "pad" if KEPT.refusal(module.name, *size, scheme) else "keep or pad"
            message = f"unaligned: {reason}; use --unaligned {choices}"
            problems.append(Problem(shard, module.name, "unaligned", message))
    if problems:
        raise CheckpointError(problems)


def _refuse_unkeepable(counterparts: Counterparts, source: SourceCheckpoint) -> None:
    """Refuses modules that the target cannot take and that cannot be kept either, with the option that helps."""
    problems, checkpoint = [], source.checkpoint
    for module in counterparts.modules.values():
        reason = KEPT.refusal(module.name, module.size_k, module.size_n, counterparts.scheme)
        if reason and not module.converted:
            shard = checkpoint.shard_of[counterparts.source_layout_of(module).tensor_name(module.name, "qweight")]
            if counterparts.target is not KEPT:
                reason = f"{module.reason}; and it cannot be kept: {reason}"
            problems.append(Problem(shard, module.name, "unaligned", reason))
    if problems:
        advice = _advice(counterparts, source, [problem.tensor for problem in problems])
        raise CheckpointError(replace(each, message=f"{each.message}. {advice}") for each in problems)


def _advice(counterparts: Counterparts, source: SourceCheckpoint, names: Iterable[str]) -> str:
    """Returns what helps with modules that AWQ's layout cannot hold."""
    padded = plan_modules(source, "pad").modules
    if not all(padded[name].converted for name in names):
        return "No other format that is written can hold all such modules of this checkpoint"
    return "Use --unaligned pad" if counterparts.target is DEFAULT_TARGET else "Use --to marlin with --unaligned pad"


def _refuse_strays(counterparts: Counterparts, checkpoint: Checkpoint) -> None:
    """Refuses tensors that are no part of their module in the source, but would be taken for one in the target."""
    problems = []
    for module in counterparts.rewritten:
        known, layout = counterparts.source_layout_of(module), counterparts.layout_of(module)
        own = {known.suffixes[part] for part in module.parts}
        own |= {each.suffix for each in known.derived(*counterparts.stored_sizes(module), counterparts.scheme)}
        theirs = {*layout.suffixes.values(), *layout.foreign_suffixes}
        theirs |= {each.suffix for each in layout.derived(module.padded_k, module.padded_n, counterparts.target_scheme)}
        for suffix in sorted(theirs - own):
            name = module_name(module.name, suffix)
            if name in checkpoint.tensors:
                message = f"{known.title} has no such tensor, but in {layout.title} it would be a part of its module"
                problems.append(Problem(checkpoint.shard_of[name], name, "contradiction", message))
    if problems:
        raise CheckpointError(problems)


def _refuse_denied_zero_points(counterparts: Counterparts, checkpoint: Checkpoint) -> None:
    """Refuses zero points that the source's config denies, where readers of the target go by its config.

    Marlin-native's go by the tensors, and AWQ's config never denies them.
    """
    target, problems = counterparts.target, []
    if target.is_own or counterparts.target_scheme.zero_point:
        return
    for module in counterparts.modules.values():
        if "qzeros" in module.parts:
            name = counterparts.source_layout_of(module).tensor_name(module.name, "qzeros")
            message = (
                f"the config says that there are no zero points, and in {target.title} these would not be read; "
                "if they count, set zero_point to true in a copy of the config"
            )
            problems.append(Problem(checkpoint.shard_of[name], name, "contradiction", message))
    if problems:
        raise CheckpointError(problems)


def refuse_what_is_told_otherwise(counterparts: Counterparts, checkpoint: Checkpoint) -> None:
    """Proves tensors that say what the headers leave open: one for each answer; the others follow while they stream.

    Args:
        counterparts: what becomes of the modules.
        checkpoint: the source.

    Raises:
        CheckpointError: if one says another thing, so that the conversion could not be undone.
    """
    problems: list[Problem] = []
    seen: set[bytes] = set()
    for shard, tensor, proven in counterparts.telling(checkpoint.index):
        if proven.data() in seen:
            continue
        seen.add(proven.data())
        start = checkpoint.shards[shard].data_start
        found = np.frombuffer(checkpoint.folder.read_range(shard, start + tensor.start, start + tensor.end), np.uint8)
        try:
            proven.rewrite(found, found[:0])
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)


def _plan_shard(name: str, counterparts: Counterparts, index: TensorIndex) -> ShardPlan:
    source = index.headers[name]
    rows = counterparts.rows(name, source)
    return ShardPlan(name, source, counterparts.target_header(source, rows), spans_of(rows, index))
