"""Digests as the manifest writes them: ``xxh3_128:hex`` against accidents, ``sha256:hex`` where known.

XXH3 keeps up with memory, so it costs nothing beside reading; it proves nothing against malice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import xxhash

from awq2marlin.io.stream import Hash, digest_file

_FORM = re.compile(r"xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64}")


class Xxh3:
    """A running XXH3-128 (https://xxhash.com) whose text form carries its name."""

    def __init__(self, data: bytes = b"") -> None:
        """Starts with ``data``."""
        self._hash = xxhash.xxh3_128(data)

    def update(self, data: memoryview | bytes, /) -> None:
        """Takes the next bytes."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """Returns 32 hexadecimal digits."""
        return str(self._hash.hexdigest())

    def __str__(self) -> str:
        """Returns the manifest's form."""
        return f"xxh3_128:{self.hexdigest()}"


def is_digest(text: object) -> bool:
    """Returns whether ``text`` is a digest in the manifest's form."""
    return isinstance(text, str) and _FORM.fullmatch(text) is not None


def xxh3_of_file(source: tuple[Path, str], also: Sequence[Hash] = ()) -> tuple[int, str]:
    """Returns a file's length in bytes and its digest.

    Args:
        source: resolved path and the name that messages use.
        also: further hashes that see the same bytes.
    """
    digest = Xxh3()
    size = digest_file(source, [digest, *also])
    return size, str(digest)
