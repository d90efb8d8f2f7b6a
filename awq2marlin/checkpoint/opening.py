"""Opening a checkpoint of any format: everything its headers and configs say, before a byte of data is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from awq2marlin.checkpoint.choice import Choice
from awq2marlin.checkpoint.config import read_config, read_quantization
from awq2marlin.checkpoint.downloads import doubtful
from awq2marlin.checkpoint.files import OWN_FILENAMES, left_behind_warning, sort_files
from awq2marlin.checkpoint.index import open_index
from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.names import CARD_FILENAME, LEGACY_CONFIG_FILENAMES, MANIFEST_FILENAME, MAX_CARD_BYTES
from awq2marlin.io.folder import Folder, find_clash
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo
from awq2marlin.io.source import Source

_FLOAT_PREFIXES = ("F", "BF")
_NO_CHOICE = Choice()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by its headers.

    Attributes:
        folder: where it lies.
        config: ``config.json`` as a document.
        format: the format that its config names.
        quantization: how it is quantized.
        index: header of every safetensors file that belongs to it, sorted by name, and the tensors that count.
        has_index: whether an index names the shards.
        side_files: other files that belong to it (tokenizer, code, licence), sorted.
        card: name of its model card, or None: ``README.md``, in whatever case its letters are.
        left_behind: files that do not belong to it, with the reason.
        left_behind_bytes: bytes of each of them.
        oddities: what is to say of it otherwise; see `warnings`.
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
    left_behind_bytes: Mapping[str, int]
    oddities: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What everybody is told who has to do with it: on the screen, in JSON and on the model card."""
        return (*self.oddities, *left_behind_warning(self.left_behind, self.left_behind_bytes))

    @property
    def shards(self) -> Mapping[str, Header]:
        """Header of every safetensors file, by name."""
        return self.index.headers

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that counts, by name: of two shards that hold one, the index decides."""
        return self.index.tensors

    @property
    def shard_of(self) -> dict[str, str]:
        """The shard that holds each tensor."""
        return self.index.shard_of

    @property
    def title(self) -> str:
        """What messages call it, by its format."""
        return self.format.title_of(self.quantization)

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


def open_checkpoint(
    source: str | os.PathLike[str] | Source,
    choice: Choice = _NO_CHOICE,
    known: Mapping[str, Header] = MappingProxyType({}),
) -> Checkpoint:
    """Reads the configs and headers of a checkpoint.

    Args:
        source: its folder, or wherever it lies.
        choice: what is said of single files.
        known: headers that were read already, by file name.

    Raises:
        CheckpointError: if it is not a checkpoint, is malformed or unsafe, or of a foreign format.
    """
    folder: Source = Folder.at(source) if isinstance(source, (str, os.PathLike)) else source
    config = read_config(folder)
    format, quantization, warnings = read_quantization(folder, config)
    files = sort_files(folder, choice)
    index, oddities = open_index(folder, files.shards, files.weight_map, format, known)
    side_files = [*files.side_files, *sorted(set(files.shards) - index.headers.keys())]
    _refuse_clash([*OWN_FILENAMES, *index.headers, files.card or CARD_FILENAME], side_files)
    for name in side_files:
        folder.check(name)  # refuses what leads out of the folder before anything is written
    carried = side_files
    if files.card is not None:
        _refuse_long_card(folder, files.card)
        carried = [*carried, files.card]
    return Checkpoint(
        folder,
        config,
        format.variant(index),
        quantization,
        index,
        files.weight_map is not None,
        tuple(side_files),
        files.card,
        files.left_behind,
        files.left_behind_bytes,
        (*warnings, *files.warnings, *oddities, *doubtful(folder, carried)),
    )


def _refuse_clash(names: list[str], side_files: list[str]) -> None:
    """Refuses what could be taken for a file of ours on other file systems."""
    clash = find_clash(names, side_files)
    if clash:
        first, second = clash
        why = "differ only in case" if first.casefold() == second.casefold() else "are a folder and a file inside it"
        message = (
            f"this name and {printable(second)!r} {why}, so some file systems cannot hold both; rename or remove one"
        )
        raise refuse("unsafe-name", message, file=first)


def _refuse_long_card(folder: Source, name: str) -> None:
    size = folder.size(name)
    if size > MAX_CARD_BYTES:
        raise refuse("too-large", f"a model card of {size} bytes, more than {MAX_CARD_BYTES}; shorten it", file=name)


def needs_index(checkpoint: Checkpoint) -> bool:
    """Returns whether a conversion makes an index where the source has none: engines read every file otherwise.

    They do so where several ``.safetensors`` files lie side by side, and some, without an index, read only one.

    Args:
        checkpoint: the source.
    """
    files = [*checkpoint.shards, *checkpoint.side_files]
    return not checkpoint.has_index and sum("/" not in name and name.endswith(".safetensors") for name in files) > 1
