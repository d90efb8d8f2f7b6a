"""What somebody says of single files of a checkpoint: a user by patterns, the manifest of a conversion by names.

What nobody speaks of, `checkpoint.files` decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from awq2marlin.formats.names import INDEX_FILENAME

if TYPE_CHECKING:
    from awq2marlin.checkpoint.manifest import Manifest

#: What shall become of a file: carried over as bytes that nobody opens, or left behind.
Fate = Literal["carry", "leave"]


@dataclass(frozen=True)
class Choice:
    """Patterns of a user.

    A pattern speaks of a file if it matches its whole relative path, or that of a folder it is in; ``*`` stands for
    slashes too. What both speak of is carried over.

    Attributes:
        carry: of files to carry over.
        leave: of files to leave behind.
    """

    carry: Sequence[str] = ()
    leave: Sequence[str] = ()

    @property
    def shards(self) -> Set[str] | None:
        """The files that are known to hold the tensors; None where nobody knows them."""
        return None

    @property
    def is_of_output(self) -> bool:
        """Whether it is known which files a conversion wrote, so that others may be somebody's."""
        return False

    def fate(self, name: str) -> Fate | None:
        """Returns what shall become of a file; None if nobody speaks of it."""
        if any(matches(name, pattern) for pattern in self.carry):
            return "carry"
        return "leave" if any(matches(name, pattern) for pattern in self.leave) else None

    def idle(self, names: Sequence[str]) -> Iterator[str]:
        """Yields the options that speak of none of some files, as the command line spells them."""
        for option, patterns in (("--carry", self.carry), ("--leave", self.leave)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    yield f"{option} {pattern}"


@dataclass(frozen=True)
class Recorded(Choice):
    """What a manifest remembers of the files of a source, or says of those of the output.

    Attributes:
        carried: files that were carried over.
        left: files, and folders, that were left behind.
        converted: files that hold the tensors.
        is_of_output: whether it describes the files that a conversion wrote.
    """

    carried: Set[str] = frozenset()
    left: Set[str] = frozenset()
    converted: Set[str] = frozenset()
    is_of_output: bool = False

    @classmethod
    def of_source(cls, manifest: Manifest) -> Recorded:
        """Returns what a conversion did with the files of its source."""
        return cls(carried=manifest.files.keys(), left=manifest.left_behind.keys(), converted=manifest.shards.keys())

    @classmethod
    def of_output(cls, manifest: Manifest) -> Recorded:
        """Returns what a conversion wrote."""
        return cls(carried=manifest.files.keys(), converted=manifest.shards.keys(), is_of_output=True)

    @property
    def shards(self) -> Set[str]:
        """The files that hold the tensors."""
        return self.converted

    def fate(self, name: str) -> Fate | None:
        """Returns what became of a file."""
        if name in self.carried and name != INDEX_FILENAME:
            return "carry"
        return "leave" if any(each in self.left for each in _with_parents(name)) else None


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern speaks of a file; see `Choice`.

    Args:
        name: relative path.
        pattern: as shells write it: ``*``, ``?``, ``[...]``; letters in their case.
    """
    return any(fnmatchcase(each, pattern.rstrip("/")) for each in _with_parents(name))


def _with_parents(name: str) -> Iterator[str]:
    yield name
    yield from (str(parent) for parent in PurePosixPath(name).parents if parent != PurePosixPath())
