"""Reading and writing JSON: strictly what a stranger wrote, plainly what we write."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from awq2marlin.errors import printable, refuse
from awq2marlin.io.impostors import HEAD_BYTES, impostor

#: How deep JSON may be nested: safetensors' own parser stops at 128, no config comes near.
_MAX_DEPTH = 100


def parse_json(text: bytes, file: str, *, constants: bool = False) -> Any:
    """Returns what a JSON document holds; duplicate keys and other ambiguities are refused.

    Args:
        text: UTF-8 bytes.
        file: the file's name, for messages.
        constants: whether ``NaN`` and ``Infinity`` are taken, as Python and Transformers write them, and
            ``-0``, a floating-point number to other readers, as a whole one.

    Raises:
        CheckpointError: if it is not UTF-8, not JSON, nested too deeply, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refuse("duplicate-key", f"the key {printable(key)!r} stands there twice", file=file)
            found[key] = value
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
            parse_int=None if constants else whole,
        )
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start})", file=file) from None
    except RecursionError:
        raise refuse("bad-json", "the JSON is nested too deeply", file=file) from None
    except ValueError as error:
        found = impostor(text[:HEAD_BYTES])
        if found is not None and not found.is_json:
            raise found.refusal(file) from None
        raise refuse("bad-json", f"it is not valid JSON ({printable(str(error))})", file=file) from None
    _refuse_depth(document, file)
    return document


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


def encode_json(document: Any) -> bytes:
    """Returns a JSON side file's bytes."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
