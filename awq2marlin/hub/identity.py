"""What the Hub knows a file by, and what a push says of the files that it sent."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from awq2marlin.hub.publication import FileIdentity, Publication
from awq2marlin.io.digest import FileDigest, digest_of_file
from awq2marlin.io.stream import NamedPath

#: Bytes up to which a file may lie in git on the Hub, which then knows it by git's own digest. The Hub decides that for
#: every upload, and takes no file over 10 MiB into git. This is three times as much: a digest that nobody asks for
#: costs only its time, while a file in git without one would count as not sent.
_MAX_GIT_FILE = 32_000_000


@dataclass(frozen=True)
class PushedFile:
    """A file of a checkpoint on the Hub.

    Attributes:
        name: relative path.
        size: bytes.
        sha256: 64 hexadecimal digits.
        uploaded: whether this run sent it; otherwise the repository had it already.
    """

    name: str
    size: int
    sha256: str
    uploaded: bool


@dataclass(frozen=True)
class PushResult:
    """What a push did, or with ``dry_run`` would do.

    Attributes:
        source: the folder.
        repo_id: the repository.
        revision: the branch, or ``refs/pr/N``.
        url: the repository's, the branch's or the pull request's address.
        commit: hash of the commit; None if there was nothing to commit, or nothing was written.
        pull_request: address of the pull request; None if none was opened.
        created: whether the repository was made.
        dry_run: whether nothing was written.
        files: every file of the checkpoint, sorted by name.
        removed: files of an earlier checkpoint that were removed.
        left_behind: files of the folder that are not part of the checkpoint, with the reason.
        seconds: wall time.
    """

    source: Path
    repo_id: str
    revision: str
    url: str
    commit: str | None
    pull_request: str | None
    created: bool
    dry_run: bool
    files: tuple[PushedFile, ...]
    removed: tuple[str, ...]
    left_behind: Mapping[str, str]
    seconds: float

    @classmethod
    def of(
        cls,
        publication: Publication,
        source: Path,
        files: Iterable[PushedFile],
        *,
        created: bool,
        removed: tuple[str, ...],
        started: float,
        dry_run: bool = False,
        left_behind: Mapping[str, str] = MappingProxyType({}),
    ) -> PushResult:
        """Returns what a push did to a repository, which says the rest itself.

        Args:
            publication: the repository, with what was committed.
            source: as the attribute.
            files: as the attribute, in any order.
            created: as the attribute.
            removed: as the attribute.
            started: when the push began, by `time.perf_counter`.
            dry_run: as the attribute.
            left_behind: as the attribute.
        """
        return cls(
            source=source,
            repo_id=publication.repo_id,
            revision=publication.revision,
            url=publication.url,
            commit=publication.commits[-1] if publication.commits else None,
            pull_request=publication.pull_request,
            created=created,
            dry_run=dry_run,
            files=tuple(sorted(files, key=lambda file: file.name)),
            removed=removed,
            left_behind=left_behind,
            seconds=time.perf_counter() - started,
        )

    @property
    def uploaded_bytes(self) -> int:
        """Bytes of the files that were not there already."""
        return sum(file.size for file in self.files if file.uploaded)


def identify(source: NamedPath) -> tuple[FileIdentity, FileDigest]:
    """Returns what the Hub knows a file by, and what a manifest does.

    Args:
        source: where it lies, and its name for messages.
    """
    expected = source.path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % expected, usedforsecurity=False)
    in_git = expected <= _MAX_GIT_FILE
    found = digest_of_file(source, [sha256, *([git] if in_git else [])])
    return FileIdentity(found.size, sha256.hexdigest(), git.hexdigest() if in_git else None), found
