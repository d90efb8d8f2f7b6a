"""Taking values from a quantization config that a stranger wrote, each checked as it is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from awq2marlin.errors import enumerated, printable, refuse
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES
from awq2marlin.layout.packing import AWQ_SUPPORTED_BITS
from awq2marlin.layout.scheme import Scheme


def word(document: Mapping[str, Any], key: str, place: str) -> str:
    """Returns a value that names something, in small letters; empty if it is absent.

    Raises:
        CheckpointError: if it is no string.
    """
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise refuse("bad-config", f"{key} must be a string, found {printable(repr(value))}", file=place)
    return value.lower()


def flag(document: Mapping[str, Any], key: str, place: str) -> bool:
    """Returns a value that is true or false; false if it is absent.

    Raises:
        CheckpointError: if it is neither.
    """
    value = document.get(key)
    if value is not None and not isinstance(value, bool):
        raise refuse("bad-config", f"{key} must be true or false, found {printable(repr(value))}", file=place)
    return bool(value)


def method_of(document: Mapping[str, Any], place: str) -> str:
    """Returns what the config calls its method; empty if it does not.

    The oldest ones of bitsandbytes do not, but no other tool has their keys.
    """
    said = word(document, "quant_method", place) or word(document, "method", place)
    is_bitsandbytes = not said and any(document.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if is_bitsandbytes else said


def first_of(document: Mapping[str, Any], keys: Collection[str], place: str) -> Any:
    """Returns the value under one of several keys, which must agree where more than one is there.

    Raises:
        CheckpointError: if none is there, or they differ.
    """
    found = {key: document[key] for key in keys if document.get(key) is not None}
    if not found:
        message = f"the quantization config lacks {' or '.join(keys)}; download the file again, or correct it"
        raise refuse("bad-config", message, file=place)
    if len(set(map(repr, found.values()))) > 1:
        said = ", but ".join(f"{key} is {printable(repr(value))}" for key, value in found.items())
        raise refuse("contradiction", f"{said}; correct a copy of the config", file=place)
    return next(iter(found.values()))


def scheme_of(bits: Any, group_size: Any, zero_point: Any, place: str) -> Scheme:
    """Returns a scheme of values that a config gives.

    Raises:
        CheckpointError: if one is of the wrong type or not supported.
    """
    for name, value, code in (("bits", bits, "unsupported-bits"), ("group_size", group_size, "unsupported-group-size")):
        if type(value) is not int:
            message = f"{name} must be a whole number, found {printable(repr(value))}; correct a copy of the config"
            raise refuse(code, message, file=place)
    if bits not in AWQ_SUPPORTED_BITS:
        raise refuse(
            "unsupported-bits",
            f"it is quantized to {printable(str(bits))} bits, but only "
            f"{enumerated([*map(str, AWQ_SUPPORTED_BITS)])} are supported; look for another version of this model",
            file=place,
        )
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise refuse(
            "unsupported-group-size",
            f"its group size is {printable(str(group_size))}, but only "
            f"{enumerated([*map(str, MARLIN_SUPPORTED_GROUP_SIZES)])} are supported; look for another "
            "version of this model",
            file=place,
        )
    if not isinstance(zero_point, bool):
        raise refuse("bad-config", f"zero_point must be true or false, found {printable(repr(zero_point))}", file=place)
    return Scheme(bits, group_size, zero_point)
