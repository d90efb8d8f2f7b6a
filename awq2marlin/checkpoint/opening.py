"""Opening a checkpoint of any format: everything its headers and configs say, before a byte of data is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from awq2marlin.checkpoint.config import read_config, read_quantization
from awq2marlin.checkpoint.nearby import weights_below
from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.names import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    INDEX_FILENAME,
    LEGACY_CONFIG_FILENAMES,
    MANIFEST_FILENAME,
    MAX_CARD_BYTES,
)
from awq2marlin.io.folder import Folder, check_name, find_clash, is_safe_name
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo
from awq2marlin.io.source import Source

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
        format: the format that its config names.
        quantization: how it is quantized.
        index: header of every safetensors file that belongs to it, sorted by name, and their tensors.
        has_index: whether an index names the shards.
        side_files: other files that belong to it (tokenizer, code, licence), sorted.
        card: name of its model card, or None: ``README.md``, in whatever case its letters are.
        left_behind: files that do not belong to it, with the reason.
        warnings: oddities that do no harm.
    """

    folder: Source
    config: dict[str, Any]
    format: Format
    quantization: Quantization
    index: TensorIndex
    has_index: bool
    side_files: tuple[str, ...]
    card: str | None
    left_behind: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def shards(self) -> Mapping[str, Header]:
        """Header of every safetensors file, by name."""
        return self.index.headers

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name; no two shards share one."""
        return self.index.tensors

    @property
    def shard_of(self) -> dict[str, str]:
        """The shard that holds each tensor."""
        return self.index.shard_of

    @property
    def has_manifest(self) -> bool:
        """Whether a file of the manifest's name is there."""
        return self.folder.exists(MANIFEST_FILENAME)

    @property
    def is_converted(self) -> bool:
        """Whether a conversion wrote it: formats that others write too tell it by the manifest."""
        return self.format.is_own or (self.format.is_target and self.has_manifest)

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


def open_checkpoint(source: str | os.PathLike[str] | Source) -> Checkpoint:
    """Reads the configs and headers of a checkpoint.

    Args:
        source: its folder, or wherever it lies.

    Raises:
        CheckpointError: if it is not a checkpoint, is malformed or unsafe, or of a foreign format.
    """
    folder: Source = Folder.at(source) if isinstance(source, (str, os.PathLike)) else source
    config = read_config(folder)
    format, quantization, warnings = read_quantization(folder, config)
    names = list(folder.names())
    weight_map = _read_index(folder)
    shard_names = _shard_names(folder, names, weight_map)
    shards = folder.read_headers(shard_names)
    index = TensorIndex(shards)
    warnings += _check_inventory(shards, weight_map)
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
        format.variant(index),
        quantization,
        index,
        weight_map is not None,
        tuple(side_files),
        cards[0] if cards else None,
        left_behind,
        tuple(warnings),
    )


def _read_index(folder: Source) -> dict[str, str] | None:
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


def _shard_names(folder: Source, names: list[str], weight_map: dict[str, str] | None) -> list[str]:
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
    advice = weights_below(folder) or "download the checkpoint completely"
    raise refuse("no-weights", f"there is no .safetensors file; {advice}", file=SINGLE_SHARD)


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


def _refuse_long_card(folder: Source, name: str) -> None:
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
