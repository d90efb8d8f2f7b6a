"""Digests as the manifest writes them: ``xxh3_128:hex`` against accidents, ``sha256:hex`` where known.

XXH3 keeps up with memory, so it costs nothing beside reading; it proves nothing against malice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from awq2marlin.io.stream import Hash, NamedPath, digest_file

_FORM = re.compile(r"xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class FileDigest:
    """What a file's contents are known by.

    Attributes:
        size: bytes.
        xxh3: ``xxh3_128:hex``.
        sha256: 64 hexadecimal digits, where it is known.
    """

    size: int
    xxh3: str
    sha256: str | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests in the manifest's form, XXH3 first."""
        return (self.xxh3, f"sha256:{self.sha256}") if self.sha256 else (self.xxh3,)

    def is_of(self, found: FileDigest) -> bool:
        """Returns whether a file that was found is this one: no digest that both know differs."""
        same = (self.size, self.xxh3) == (found.size, found.xxh3)
        return same and (self.sha256 is None or found.sha256 is None or self.sha256 == found.sha256)

    def __str__(self) -> str:
        """Returns size and digests, for messages."""
        return f"{self.size} bytes, {', '.join(self.digests)}"


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


def hexdigest(hash: Hash | None) -> str | None:
    """Returns a hash's digest, or None if there is no hash."""
    return hash.hexdigest() if hash else None


def digest_of_file(source: NamedPath, also: Sequence[Hash] = ()) -> FileDigest:
    """Reads a file and returns what it is known by.

    Args:
        source: where it lies, and its name for messages.
        also: further hashes that see the same bytes.
    """
    digest = Xxh3()
    size = digest_file(source, [digest, *also])
    return FileDigest(size, str(digest))


def digest_of(data: bytes, *, sha256: bool = False) -> FileDigest:
    """Returns what a file with these bytes is known by, with its SHA-256 if that is asked for."""
    return FileDigest(len(data), str(Xxh3(data)), hashlib.sha256(data).hexdigest() if sha256 else None)
