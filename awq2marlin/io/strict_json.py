"""Reading and writing JSON: strictly what a stranger wrote, plainly what we write."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from typing import Any, NoReturn

from awq2marlin.errors import printable, refuse
from awq2marlin.io.impostors import HEAD_BYTES, impostor

#: How deep JSON may be nested: safetensors' own parser stops at 128, no config comes near.
_MAX_DEPTH = 100

#: How many values a document may have. It bounds the memory, because each takes some hundred bytes however short its
#: text is. The index of 740,000 tensors has as many, their headers together ten times as many.
MAX_VALUES = 8_000_000

#: Above this many bytes only ASCII is taken, as Python and Transformers write it: otherwise one character could make
#: all the others take four bytes each.
_MAX_UNICODE_BYTES = 32_000_000

_REMEDY = "; download the file again, or correct it"

#: What may be a zero with a sign; it also stands in names, so this only says where to look closer.
_SIGNED_ZERO = b"-0"


def parse_json(text: bytes, file: str, *, constants: bool = False) -> Any:
    """Returns what a JSON document holds; duplicate keys and other ambiguities are refused.

    It takes at most some two gigabytes, for a hostile document of the largest size that is read.

    Args:
        text: UTF-8 bytes.
        file: the file's name, for messages.
        constants: whether ``NaN`` and ``Infinity`` are taken, as Python and Transformers write them, and
            ``-0``, a floating-point number to other readers, as a whole one.

    Raises:
        CheckpointError: if it is not UTF-8, not JSON, nested too deeply, of too many values, or names a key twice.
    """
    _refuse_much(text, file)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise refuse("duplicate-key", f"the key {printable(_twice(pairs))!r} appears twice", file=file)
        return found

    def no_constant(name: str) -> NoReturn:
        raise refuse("bad-json", f"{name} is not JSON", file=file)

    def whole(digits: str) -> int:
        if digits == "-0":
            no_constant(digits)
        return int(digits)

    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=None if constants else no_constant,
            parse_int=whole if _SIGNED_ZERO in text and not constants else None,
        )
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start}){_REMEDY}", file=file) from None
    except RecursionError:
        raise refuse("bad-json", "the JSON is nested too deeply", file=file) from None
    except ValueError as error:
        found = impostor(text[:HEAD_BYTES])
        if found is not None and not found.is_json:
            raise found.refusal(file) from None
        raise refuse("bad-json", f"{_fault(text, error)}{_REMEDY}", file=file) from None
    _refuse_depth(document, file)
    return document


def _fault(text: bytes, error: ValueError) -> str:
    """Returns why a text is no JSON."""
    if not text.strip():
        return "it is empty"
    if text.startswith(BOM_UTF8):
        return "it begins with a byte order mark (BOM), which JSON must not have"
    return f"it is not valid JSON ({printable(str(error))})"


def _twice(pairs: list[tuple[str, Any]]) -> str:
    """Returns the first key that stood there before."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("unreachable")


def _refuse_much(text: bytes, file: str) -> None:
    """Refuses what would take much memory, before it is parsed."""
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > MAX_VALUES:
        message = f"it holds about {values} values, but at most {MAX_VALUES} are read; download it again, or shorten it"
        raise refuse("too-large", message, file=file)
    if len(text) > _MAX_UNICODE_BYTES and not text.isascii():
        message = (
            f"it has {len(text)} bytes, and above {_MAX_UNICODE_BYTES} only ASCII is read; write other "
            "characters as \\uNNNN, as Python's json does by default"
        )
        raise refuse("too-large", message, file=file)


def _refuse_depth(document: Any, file: str) -> None:
    """Refuses what later recursion could not take; parsing alone stops only at the interpreter's limit."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise refuse("bad-json", f"the JSON is nested too deeply, more than {_MAX_DEPTH} levels", file=file)


def same_json(left: Any, right: Any) -> bool:
    """Returns whether two documents hold the same; to Python, false equals 0 and NaN does not equal NaN."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def encode_json(document: Any) -> bytes:
    """Returns a JSON side file's bytes."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
