"""Where a checkpoint is read from: a folder here, or a repository whose files come when they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from awq2marlin.io.safetensors import Header

#: A JSON file (config, index, manifest) above this size is refused unread. The index of a model of 92 layers and 896
#: experts, 740,000 tensors, has 84 MB. What one may take when it is parsed is bounded by `io.strict_json` besides.
MAX_JSON_BYTES = 256_000_000

#: The name of a commit: a digest of git's, of either kind.
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


class RepoCommit(NamedTuple):
    """A repository of the Hub at one commit; these fix the contents of every file.

    Attributes:
        repo_id: ``org/name``.
        commit: the commit's hash.
    """

    repo_id: str
    commit: str


class Source(Protocol):
    """The files of a checkpoint, by safe relative names; `io.folder.Folder` and `hub.repository.Repository`.

    Whatever opens or reads a file raises `CheckpointError` if it is not there, not safe, or not readable.
    """

    @property
    def root(self) -> Path:
        """The folder where the files lie, or would lie once they are here."""

    @property
    def where(self) -> Path | str:
        """What results and messages call it."""

    @property
    def origin(self) -> RepoCommit | None:
        """Repository and commit, if it is one of the Hub."""

    def names(self) -> Iterator[str]:
        """Yields the relative path of everything but folders, sorted; hidden names too."""

    def exists(self, name: str) -> bool:
        """Returns whether there is something of that name."""

    def size(self, name: str) -> int:
        """Returns a file's length in bytes."""

    def sha256(self, name: str) -> str | None:
        """Returns what the file's SHA-256 has to be, where that is known: 64 hexadecimal digits."""

    def check(self, name: str) -> None:
        """Refuses a file that `path` would refuse; fetches nothing."""

    def path(self, name: str) -> Path:
        """Returns where a file really lies, links resolved; fetches it if need be."""

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading, unbuffered."""

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Returns a small file's bytes; one longer than ``limit`` bytes is refused."""

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Returns bytes ``begin`` to ``end`` of a file; never fetches all of it."""

    def read_json(self, name: str, *, constants: bool = False) -> Any:
        """Returns the JSON document in a file; see `io.strict_json.parse_json`."""

    def read_header(self, name: str) -> Header:
        """Returns the checked header of a safetensors file."""

    def read_headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Returns the checked headers of safetensors files, by name."""

    def fetch(self, name: str, advance: Callable[[int], None]) -> Path:
        """Returns where a file lies, as `path`, once it is here; ``advance`` is told of the bytes that come."""

    def disk_need(self, names: Iterable[str]) -> tuple[Path, int]:
        """Returns where files have to be fetched to, and how many bytes are not there yet."""

    def release(self, name: str) -> None:
        """Says that a file is needed no more; what was fetched to a place of our own is removed."""
