"""The formats there are. A new one is a file of this folder and a line here.

A format is imported when its turn comes: a conversion of AWQ to Marlin needs two of them, and a command shall not wait
for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from awq2marlin.arguments import ArgumentError, one_of
from awq2marlin.errors import printable
from awq2marlin.formats.awq_gemm import AWQ_GEMM as AWQ_GEMM
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.foreign import foreign
from awq2marlin.formats.marlin_native import MARLIN_NATIVE as MARLIN_NATIVE
from awq2marlin.io.safetensors import TensorInfo

#: File and name of each format, in the order in which they are asked whether a config is theirs.
HOMES = (
    ("marlin_native", "MARLIN_NATIVE"),
    ("awq_gemm", "AWQ_GEMM"),
    ("awq_gemv", "AWQ_GEMV"),
    ("awq_gemv_fast", "AWQ_GEMV_FAST"),
    ("awq_marlin", "AWQ_MARLIN"),
    ("compressed_tensors", "COMPRESSED_TENSORS"),
    ("gptq", "GPTQ"),
    ("auto_round", "AUTO_ROUND"),
)

#: Formats of others, asked before ours; see `registered`.
REGISTERED: list[Format] = []

#: The layout in which a module stays that the target's format cannot take, whatever the source was.
KEPT = AWQ_GEMM

#: Keys of ``config.json`` under which a format kept its quantization config once, with the method that they stand for.
FORMER_CONFIG_KEYS = {"compression_config": "compressed-tensors"}

#: What a conversion writes if nothing else is asked for.
DEFAULT_TARGET: Format = MARLIN_NATIVE


def formats() -> Iterator[Format]:
    """Yields every format, in the order in which they are asked."""
    yield from tuple(REGISTERED)
    for file, name in HOMES:
        yield getattr(import_module(f"awq2marlin.formats.{file}"), name)


def recognise(document: Mapping[str, Any], place: str) -> Format:
    """Returns the format of a quantization config.

    Args:
        document: the config.
        place: where it stands, for messages.

    Raises:
        CheckpointError: naming the format, if it is none of ours.
    """
    for format in formats():
        if format.claims(document, place):
            return format
    raise foreign(document, place)


def shown_by(
    tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str], *, but: Format
) -> Format | None:
    """Returns the format that the tensors of a checkpoint show, where they contradict the one that its config names.

    Args:
        tensors: every tensor of the checkpoint.
        quantization: what its config says.
        shard_of: the file of each tensor.
        but: the format that the config names.
    """
    scheme = replace(quantization.scheme, zero_point=False)  # so that no zero points are missed, if there are none
    looked_for = replace(quantization, layout=None, scheme=scheme)
    said = {but.name, (quantization.layout or but).name}
    for format in formats():
        if format.is_source and format.has_own_layout and not format.is_own and format.name not in said:
            modules, problems = format.find(tensors, looked_for, shard_of)
            if modules and not problems:
                return format
    return None


def target_named(name: str | None) -> Format:
    """Returns a format that can be written.

    Args:
        name: what its layout is called, e.g. ``marlin``; None for the default.

    Raises:
        ValueError: if there is none of that name.
    """
    if name is None:
        return DEFAULT_TARGET
    target = next((format for format in formats() if format.is_target and format.layout_name == name), None)
    if target is None:
        targets = one_of(repr(format.layout_name) for format in formats() if format.is_target)
        raise ArgumentError("{to} must be {targets}, found {name}", targets=targets, name=printable(repr(name)))
    return target


@contextmanager
def registered(format: Format) -> Iterator[Format]:
    """Adds a format for as long as the context lasts; it is asked first."""
    REGISTERED.insert(0, format)
    try:
        yield format
    finally:
        REGISTERED.remove(format)
