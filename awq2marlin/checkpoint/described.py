"""What a checkpoint is that cannot be converted, as far as its config and headers tell."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from awq2marlin.checkpoint.config import Document, quantization_said
from awq2marlin.errors import CheckpointError
from awq2marlin.formats.foreign import foreign_kind, foreign_tensors, said_numbers
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.formats.registry import recognise
from awq2marlin.io.safetensors import Header, TensorIndex
from awq2marlin.io.source import Source

#: Why a checkpoint is one of those: it is sound, but of a kind that is not converted.
_CODES = {"foreign-format", "unsupported-bits", "unsupported-group-size"}


@dataclass(frozen=True)
class Described:
    """A checkpoint that cannot be converted.

    Attributes:
        format: what its format is called.
        title: what sentences call it.
        reason: why it cannot be converted, and what to do.
        bits: bits per value, as its config says; 0 if it does not.
        group_size: values that share a scale, as its config says; 0 if it does not.
        config: ``config.json`` as a document; empty if there is none.
        headers: of its safetensors files, by name, as far as they can be read.
        files: bytes of every file that holds weights, by name.
    """

    format: str
    title: str
    reason: str
    bits: float
    group_size: int
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    files: Mapping[str, int]

    @property
    def index(self) -> TensorIndex:
        """All tensors."""
        return TensorIndex(self.headers)


def describe(folder: Source, error: CheckpointError) -> Described | None:
    """Returns what a checkpoint is that was refused; None if it was not for its format.

    Args:
        folder: where it lies.
        error: why it was refused.
    """
    problem = error.problems[0]
    if problem.code not in _CODES:
        return None
    config = _config(folder)
    names = [name for name in folder.names() if "/" not in name and not name.startswith(".")]
    headers: dict[str, Header] = {}
    for name in names:
        if name.endswith(".safetensors"):
            with suppress(CheckpointError):
                headers[name] = folder.read_header(name)
    document = quantization_said(folder, config)
    format, title, numbers = _kind(document, TensorIndex(headers))
    if problem.code != "foreign-format" and not all(type(number) is int and number for number in numbers):
        return None  # it says what no format does
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    where = f"{problem.tensor}: " if problem.tensor else ""
    return Described(
        format,
        title,
        f"{where}{problem.message}",
        *numbers,
        config=config,
        headers=headers,
        files={name: folder.size(name) for name in weights},
    )


def _config(folder: Source) -> dict[str, Any]:
    if folder.exists(CONFIG_FILENAME):
        with suppress(CheckpointError):
            config = folder.read_json(CONFIG_FILENAME, constants=True)
            return config if isinstance(config, dict) else {}
    return {}


def _kind(document: Document | None, index: TensorIndex) -> tuple[str, str, tuple[float, int]]:
    """Returns name, title, bits and group size of the format that a checkpoint is of."""
    if document is None:
        return "gguf", "GGUF checkpoint", (0, 0)
    numbers = said_numbers(document.content)
    try:
        format = recognise(document.content, document.place)
    except CheckpointError:
        kind = foreign_kind(document.content, document.place)
        return kind.name, _without_article(kind.noun), numbers
    shown = foreign_tensors(index.tensors)
    if shown is not None:
        return shown.name, _without_article(shown.noun), numbers
    return format.name, f"{format.title} checkpoint", numbers


def _without_article(noun: str) -> str:
    return noun.removeprefix("an ").removeprefix("a ").removeprefix("the ")
