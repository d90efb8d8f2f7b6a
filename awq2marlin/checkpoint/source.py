"""Opening a checkpoint: everything its headers and configs say, before a byte of data is read.

`open_checkpoint` works for AWQ and for converted checkpoints. `awq_modules` then finds the quantized
modules of an AWQ one and refuses, with all problems at once, whatever does not agree.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from awq2marlin.checkpoint.names import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    INDEX_FILENAME,
    LEGACY_CONFIG_FILENAMES,
    MANIFEST_FILENAME,
    MAX_CARD_BYTES,
)
from awq2marlin.checkpoint.quantization import AwqQuantization, MarlinQuantization, read_config, read_quantization
from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.io.folder import Folder, check_name, find_clash, is_safe_name
from awq2marlin.io.safetensors import DTYPE_BITS, Header, TensorInfo
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES, MAX_SIZE_N, num_groups
from awq2marlin.layout.modules import QUANTIZED_PARTS, SCALE_DTYPES, AwqModule, module_name
from awq2marlin.layout.packing import pack_factor

SINGLE_SHARD = "model.safetensors"
_OWN_FILENAMES = (CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME, *LEGACY_CONFIG_FILENAMES)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOAT_PREFIXES = ("F", "BF")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by its headers.

    Attributes:
        folder: where it lies.
        config: ``config.json`` as a document.
        quantization: how it is quantized.
        shards: header of every safetensors file that belongs to it, sorted by name.
        has_index: whether an index names the shards.
        side_files: other files that belong to it (tokenizer, code, licence), sorted.
        card: name of its model card, or None: ``README.md``, in whatever case its letters are.
        left_behind: files that do not belong to it, with the reason.
        warnings: oddities that do no harm.
    """

    folder: Folder
    config: dict[str, Any]
    quantization: AwqQuantization | MarlinQuantization
    shards: Mapping[str, Header]
    has_index: bool
    side_files: tuple[str, ...]
    card: str | None
    left_behind: Mapping[str, str]
    warnings: tuple[str, ...]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name; no two shards share one."""
        return {name: tensor for header in self.shards.values() for name, tensor in header.tensors.items()}

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The shard that holds each tensor."""
        return {name: shard for shard, header in self.shards.items() for name in header.tensors}

    @cached_property
    def unquantized_modules(self) -> list[str]:
        """Modules with a floating-point ``weight`` of two or more dimensions, sorted."""
        return sorted(
            name.removesuffix(".weight")
            for name, tensor in self.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) >= 2 and tensor.dtype.startswith(_FLOAT_PREFIXES)
        )

    @cached_property
    def legacy_configs(self) -> list[str]:
        """The quantization config files of older tools that stand beside ``config.json``."""
        return [name for name in LEGACY_CONFIG_FILENAMES if self.folder.exists(name)]


def open_checkpoint(source: str | os.PathLike[str] | Folder) -> Checkpoint:
    """Reads the configs and headers of a checkpoint.

    Args:
        source: its folder.

    Raises:
        CheckpointError: if it is not a checkpoint, is malformed or unsafe, or of a foreign format.
    """
    folder = source if isinstance(source, Folder) else Folder.at(source)
    config = read_config(folder)
    quantization = read_quantization(folder, config)
    names = list(folder.names())
    weight_map = _read_index(folder)
    shard_names = _shard_names(folder, names, weight_map)
    shards = folder.read_headers(shard_names)
    warnings = _check_inventory(shards, weight_map)
    cards = [name for name in names if name.casefold() == CARD_FILENAME.casefold()]
    side_files, left_behind = _sort_files(names, [*shard_names, *cards])
    _refuse_clash([*_OWN_FILENAMES, *shard_names, *side_files, *(cards or [CARD_FILENAME])])
    for name in side_files:
        folder.check(name)  # refuses what leads out of the folder before anything is written
    for name in cards:
        _refuse_long_card(folder, name)
    return Checkpoint(
        folder,
        config,
        quantization,
        shards,
        weight_map is not None,
        tuple(side_files),
        cards[0] if cards else None,
        left_behind,
        tuple(warnings),
    )


def _read_index(folder: Folder) -> dict[str, str] | None:
    if not folder.exists(INDEX_FILENAME):
        return None
    document = folder.read_json(INDEX_FILENAME)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("bad-index", "it must hold an object 'weight_map' from tensor names to files", file=INDEX_FILENAME)
    for shard in weight_map.values():
        check_name(shard, INDEX_FILENAME)
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(".safetensors"):
            raise refuse(
                "pickled-weights",
                f"it names {printable(shard)!r}; only .safetensors files are read",
                file=INDEX_FILENAME,
            )
    return weight_map


def _shard_names(folder: Folder, names: list[str], weight_map: dict[str, str] | None) -> list[str]:
    if weight_map is not None:
        named = sorted(set(weight_map.values()))
        missing = [name for name in named if not folder.exists(name)]
        if missing:
            message = "the index names this file, but it is not there; download it too"
            raise CheckpointError(Problem(name, "", "missing-file", message) for name in missing)
        return named
    if folder.exists(SINGLE_SHARD):
        return [SINGLE_SHARD]
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name and not _is_hidden(name)]
    if len(found) == 1 and is_safe_name(found[0]):
        return found
    if len(found) == 1:
        raise _unsafe(found[0])
    if found:
        raise refuse(
            "no-index",
            f"there are {len(found)} .safetensors files but no {INDEX_FILENAME} that says which "
            "tensors they hold; download it too",
            file=INDEX_FILENAME,
        )
    pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickled:
        raise refuse(
            "pickled-weights",
            "the weights are pickled, which can run code when opened and is never read here; "
            "look for a safetensors version of this model",
            file=pickled[0],
        )
    raise refuse("no-weights", "there is no .safetensors file; download the checkpoint completely", file=SINGLE_SHARD)


def _check_inventory(shards: Mapping[str, Header], weight_map: dict[str, str] | None) -> list[str]:
    problems, warnings = [], []
    owner: dict[str, str] = {}
    for shard, header in shards.items():
        for name in header.tensors:
            if name in owner:
                problems.append(
                    Problem(shard, name, "duplicate-tensor", f"{owner[name]} holds a tensor of this name too")
                )
            owner[name] = shard
            if weight_map is not None and weight_map.get(name, shard) != shard:
                problems.append(Problem(shard, name, "contradiction", f"the index says it lies in {weight_map[name]}"))
    if weight_map is not None:
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                problems.append(
                    Problem(
                        shard,
                        name,
                        "missing-tensor",
                        "the index says it lies here, but it does not; download the file again",
                    )
                )
        unlisted = sorted(set(owner) - set(weight_map))
        if unlisted:
            warnings.append(f"{len(unlisted)} tensors are not in the index, the first is {printable(unlisted[0])}")
    if problems:
        raise CheckpointError(problems)
    return warnings


def _unsafe(name: str) -> CheckpointError:
    return refuse("unsafe-name", "this file's name cannot be carried over; rename it", file=name)


def _refuse_clash(names: list[str]) -> None:
    """Refuses what other file systems could not hold, and `revert` would not give back."""
    clash = find_clash(names)
    if clash:
        raise refuse(
            "unsafe-name",
            f"this name and {printable(clash[1])!r} differ only in case, or one is inside the other, so that "
            "some file systems cannot hold both; rename or remove one",
            file=clash[0],
        )


def _refuse_long_card(folder: Folder, name: str) -> None:
    size = folder.size(name)
    if size > MAX_CARD_BYTES:
        raise refuse("too-large", f"a model card of {size} bytes, more than {MAX_CARD_BYTES}; shorten it", file=name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _sort_files(names: list[str], others: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the side files that are carried over, and what is left behind with the reason; ``others`` are neither."""
    handled = {*others, *_OWN_FILENAMES}
    side_files, left_behind = [], {}
    for name in names:
        if name in handled:
            continue
        if _is_hidden(name):
            left_behind[name.split("/")[0] if name.startswith(".") else name] = "hidden"
        elif name.endswith(".safetensors") or name.endswith(".safetensors.index.json"):
            left_behind[name] = "not named by the index"
        elif name.endswith(_PICKLE_SUFFIXES) or name.endswith(".bin.index.json"):
            left_behind[name] = "pickled weights"
        elif not is_safe_name(name):
            raise _unsafe(name)
        else:
            side_files.append(name)
    return side_files, left_behind


def awq_modules(
    tensors: Mapping[str, TensorInfo], quantization: AwqQuantization, shard_of: Mapping[str, str]
) -> dict[str, AwqModule]:
    """Returns the quantized modules of an AWQ checkpoint, by name, sorted.

    Args:
        tensors: every tensor of the checkpoint.
        quantization: what its config says.
        shard_of: the file of each tensor, for messages.

    Raises:
        CheckpointError: naming every module with a missing tensor, a wrong type, or shapes that contradict
            each other or the config; or if there is no quantized module at all.
    """
    problems: list[Problem] = []
    parts_of: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part not in (*QUANTIZED_PARTS, "g_idx", "weight"):
            continue
        if not name.startswith("."):
            parts_of[module].add(part)
        elif part != "weight":
            message = "its name begins with a dot, so its module has no name; rename it"
            problems.append(Problem(shard_of[name], name, "bad-name", message))
    modules = {}
    for name, parts in sorted(parts_of.items()):
        if not parts & {"qweight", "qzeros"}:
            continue  # `scales` alone belongs to a scaled activation, `weight` alone to an ordinary module
        found = list(_module_problems(name, parts, tensors, quantization))
        if found:
            first = min(tensor for tensor in (module_name(name, part) for part in sorted(parts)))
            problems += [
                Problem(shard_of.get(tensor, shard_of[first]), tensor, code, message) for tensor, code, message in found
            ]
            continue
        qweight, scales = tensors[module_name(name, "qweight")], tensors[module_name(name, "scales")]
        present = tuple(part for part in QUANTIZED_PARTS if part in parts)
        modules[name] = AwqModule(name, qweight.shape[0], scales.shape[1], present)
    if problems:
        raise CheckpointError(problems)
    if not modules:
        raise refuse(
            "no-quantized-modules",
            "the config says AWQ, but no tensor is named '.qweight': the config contradicts the tensors",
            file=quantization.origin,
        )
    return modules


def _module_problems(
    module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: AwqQuantization
) -> Iterator[tuple[str, str, str]]:
    """Yields (tensor, code, message) for what is wrong with one module."""
    if "g_idx" in parts:
        yield module_name(module, "g_idx"), "foreign-format", "this is a GPTQ module; only AWQ is converted"
        return
    if "weight" in parts:
        yield module_name(module, "weight"), "contradiction", "the module has both a qweight and a weight"
    required = ["qweight", "scales", *(["qzeros"] if quantization.zero_point else [])]
    for part in required:
        if part not in parts:
            why = " (zero_point is true)" if part == "qzeros" else ""
            yield (
                module_name(module, part),
                "missing-tensor",
                f"it is missing, but the module's {sorted(parts)} are there{why}",
            )
    wanted = {"qweight": ("I32",), "qzeros": ("I32",), "scales": SCALE_DTYPES}
    sound = set(required) <= parts
    for part in sorted(parts & set(wanted)):
        tensor = tensors[module_name(module, part)]
        if tensor.dtype not in wanted[part]:
            sound = False
            yield (
                tensor.name,
                "wrong-dtype",
                f"its type is {tensor.dtype}, needed is {' or '.join(wanted[part])}",
            )
        elif len(tensor.shape) != 2:
            sound = False
            yield tensor.name, "wrong-shape", f"its shape is {list(tensor.shape)}, needed are two dimensions"
    if sound:
        yield from _shape_problems(module, parts, tensors, quantization)


def _shape_problems(
    module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: AwqQuantization
) -> Iterator[tuple[str, str, str]]:
    factor = pack_factor(quantization.bits)
    size_k, words = tensors[module_name(module, "qweight")].shape
    size_n = words * factor
    scales = tensors[module_name(module, "scales")]
    if size_k == 0 or size_n == 0 or size_n > MAX_SIZE_N:
        yield (
            module_name(module, "qweight"),
            "wrong-shape",
            f"K={size_k}, N={size_n} is empty or wider than {MAX_SIZE_N} columns",
        )
        return
    if scales.shape[1] != size_n:
        for bits in DTYPE_BITS.values():
            if bits < 32 and words * 32 == scales.shape[1] * bits:
                hint = f"that fits {bits} bits, the config says {quantization.bits}"
                break
        else:
            hint = "perhaps it is packed in another layout (GPTQ, GEMV); only AWQ's 'gemm' is converted"
        yield (
            scales.name,
            "contradiction",
            f"qweight {[size_k, words]} and {quantization.bits} bits mean N={size_n}, "
            f"but scales are {list(scales.shape)}; {hint}",
        )
        return
    groups = num_groups(size_k, quantization.group_size)
    if scales.shape[0] != groups:
        fits = [size for size in MARLIN_SUPPORTED_GROUP_SIZES if num_groups(size_k, size) == scales.shape[0]]
        hint = f"that fits group size {fits[0]}" if fits else "that fits no supported group size"
        yield (
            scales.name,
            "contradiction",
            f"K={size_k} and group size {quantization.group_size} mean {groups} groups, "
            f"but there are {scales.shape[0]}: {hint}. One group size for all modules is needed",
        )
    if "qzeros" in parts:
        qzeros = tensors[module_name(module, "qzeros")]
        if qzeros.shape != (scales.shape[0], words):
            yield (
                qzeros.name,
                "contradiction",
                f"its shape is {list(qzeros.shape)}, needed is {[scales.shape[0], words]} as scales and qweight say",
            )
    bias = tensors.get(module_name(module, "bias"))
    if bias is not None and bias.shape != (size_n,):
        yield bias.name, "contradiction", f"its shape is {list(bias.shape)}, needed is {[size_n]}"
