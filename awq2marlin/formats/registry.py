"""The formats there are. A new one is a file of this folder and a line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from awq2marlin.arguments import ArgumentError
from awq2marlin.errors import printable
from awq2marlin.formats.auto_round import AutoRound
from awq2marlin.formats.awq_gemm import AWQ_GEMM as AWQ_GEMM
from awq2marlin.formats.awq_gemv import AwqGemv
from awq2marlin.formats.awq_gemv_fast import AwqGemvFast
from awq2marlin.formats.awq_marlin import AwqMarlin
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.compressed_tensors import METHOD, CompressedTensors
from awq2marlin.formats.foreign import foreign
from awq2marlin.formats.gptq import GPTQ
from awq2marlin.formats.marlin_native import MarlinNative
from awq2marlin.io.safetensors import TensorInfo

COMPRESSED_TENSORS = CompressedTensors()
MARLIN_NATIVE = MarlinNative()

#: In the order in which they are asked whether a config is theirs.
FORMATS: list[Format] = [
    MARLIN_NATIVE,
    AWQ_GEMM,
    AwqGemv(),
    AwqGemvFast(),
    AwqMarlin(),
    COMPRESSED_TENSORS,
    GPTQ,
    AutoRound(),
]

#: The layout in which a module stays that the target's format cannot take, whatever the source was.
KEPT = AWQ_GEMM

#: Keys of ``config.json`` under which a format kept its quantization config once, with the method that they stand for.
FORMER_CONFIG_KEYS = {"compression_config": METHOD}

#: What a conversion writes if nothing else is asked for.
DEFAULT_TARGET: Format = MARLIN_NATIVE


def recognise(document: Mapping[str, Any], place: str) -> Format:
    """Returns the format of a quantization config.

    Args:
        document: the config.
        place: where it stands, for messages.

    Raises:
        CheckpointError: naming the format, if it is none of ours.
    """
    for format in FORMATS:
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
    for format in FORMATS:
        if format.is_source and format.has_own_layout and not format.is_own and format.name not in said:
            modules, problems = format.find(tensors, looked_for, shard_of)
            if modules and not problems:
                return format
    return None


def target_named(name: str) -> Format:
    """Returns a format that can be written.

    Args:
        name: what its layout is called, e.g. ``marlin``.

    Raises:
        ValueError: if there is none of that name.
    """
    targets = {format.layout_name: format for format in FORMATS if format.is_target}
    if name not in targets:
        raise ArgumentError(
            "{to} must be {targets}, found {name}", targets=" or ".join(map(repr, targets)), name=printable(repr(name))
        )
    return targets[name]


@contextmanager
def registered(format: Format) -> Iterator[Format]:
    """Adds a format for as long as the context lasts; it is asked first."""
    FORMATS.insert(0, format)
    try:
        yield format
    finally:
        FORMATS.remove(format)
