"""Reading a folder that a stranger wrote: safe names, safe links, plain files only."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from awq2marlin.errors import CheckpointError, printable, problem_from_os_error, refuse, some_of
from awq2marlin.io.safetensors import Header, read_header
from awq2marlin.io.source import COMMIT, MAX_JSON_BYTES, RepoCommit
from awq2marlin.io.strict_json import parse_json

_MAX_COMMIT_BYTES = 200

_MAX_NAME_LENGTH = 1024

#: Control characters, separators of lines, and what turns the direction of text: they deceive who reads a name.
_UNSAFE = re.compile("[\\0-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")

#: What stands for a byte that is no UTF-8.
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")

#: Where the Hub's client keeps the contents of files, by their digest: those of one repository, SHA-256 or what git
#: calls a small file by, and large ones that all repositories of a cache share.
_BLOB = re.compile(r"(?:.*/)?models--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_SHARED_BLOB = re.compile(r"(?:.*/)?blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_SHA256_DIGITS = 64

#: How many links one after the other are looked at; systems follow no more.
_MAX_LINKS = 40


def is_safe_name(name: str) -> bool:
    """Returns whether ``name`` is a relative path inside a folder, wherever it is taken for a path.

    Hidden names are not: no checkpoint needs one, and ours begin with a dot while an output is unfinished. Spaces of
    any width, joined emoji and colons are harmless; not every file system can hold them.

    Args:
        name: a path with forward slashes, from a file or the network.
    """
    if not name or len(name) > _MAX_NAME_LENGTH or "\\" in name or _UNSAFE.search(name) or _SURROGATE.search(name):
        return False
    windows = PureWindowsPath(name)
    if windows.drive or windows.root:
        return False
    return all(part and not part.startswith(".") for part in name.split("/"))


def is_plain_name(name: str) -> bool:
    """Returns whether ``name`` is a safe one that every file system can hold: printable, and without a colon."""
    return is_safe_name(name) and name.isprintable() and ":" not in name


def is_hostile_name(name: str) -> bool:
    """Returns whether ``name`` leads elsewhere or deceives: it is absolute, has ``..``, or what a terminal acts on.

    What is neither hostile nor safe only has no place in a manifest: bytes that are no UTF-8, a backslash.
    """
    parts = re.split(r"[/\\]", name)
    return bool(_UNSAFE.search(name) or _ABSOLUTE.match(name)) or ".." in parts


def check_name(name: Any, file: str, *, plain: bool = True) -> str:
    """Returns ``name`` if it is a safe relative path.

    Args:
        name: what ``file`` says.
        file: the file that says it, for the message.
        plain: whether every file system must be able to hold it.

    Raises:
        CheckpointError: if it is not a string, is absolute or hidden, has ``..`` or control characters.
    """
    if not isinstance(name, str) or not (is_plain_name(name) if plain else is_safe_name(name)):
        raise refuse(
            "unsafe-name",
            f"it names {printable(str(name))!r}; only plain relative paths inside the folder are allowed",
            file=file,
        )
    return name


def find_clash(names: Collection[str], others: Collection[str] = ()) -> tuple[str, str] | None:
    """Returns two of the names that cannot stand in one folder on every file system, or None.

    Such are equal names, names that differ in case only, and a file's name inside another file's.

    Args:
        names: safe relative paths of files.
        others: more of them, which may differ in case only among themselves, but not from ``names``.
    """
    folded: dict[str, str] = {}
    for name in names:
        other = folded.get(name.casefold())
        if other is not None:
            return name, other
        folded[name.casefold()] = name
    exact: set[str] = set()
    for name in others:
        other = name if name in exact else folded.get(name.casefold())
        if other is not None:
            return name, other
        exact.add(name)
    folded_others = {name.casefold(): name for name in others}
    for name in (*names, *others):
        for parent in map(str, PurePosixPath(name).parents):
            other = folded.get(parent.casefold()) or (parent if parent in exact else None)
            if other is None and name not in exact:
                other = folded_others.get(parent.casefold())
            if other is not None:
                return name, other
    return None


def hub_repository(folder: Path) -> Path | None:
    """Returns the repository folder if ``folder`` is a snapshot of the Hub cache, else None.

    The cache keeps ``models--ORG--NAME/snapshots/REVISION/FILE`` as links into ``models--ORG--NAME/blobs``.
    """
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        return repository
    return None


@dataclass(frozen=True)
class Folder:
    """A folder whose files are read with suspicion.

    Symbolic links are followed only to regular files inside the folder or, for a snapshot of the Hub's cache, inside
    that repository's ``blobs``; and to what such a cache keeps by its digest, wherever it lies.

    Attributes:
        root: resolved path.
        follows_links: whether all other links are followed too, on the user's word; to regular files only.
    """

    root: Path
    follows_links: bool = False

    @property
    def where(self) -> Path | str:
        """What results and messages call it."""
        return self.root

    @property
    def origin(self) -> RepoCommit | None:
        """None: what lies in a folder may change."""
        return None

    @classmethod
    def at(cls, path: str | os.PathLike[str], *, follow_links: bool = False) -> Folder:
        """Opens a folder; one that the Hub's cache keeps of a repository by the snapshot of its default branch.

        Args:
            path: where it lies.
            follow_links: whether links that lead out of it are followed.

        Raises:
            CheckpointError: if there is no such folder, it may not be read, or the cache has no such snapshot.
        """
        given = Path(path)
        try:
            root = given.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise _unopened(given, error) from None
        if not root.is_dir():
            needed, parent = "a checkpoint is a folder with config.json and .safetensors files", given.parent
            advice = f"pass the folder {printable(str(parent))}" if (parent / "config.json").exists() else "pass one"
            raise refuse("not-a-folder", f"this is a file; {needed}; {advice}", file=str(given))
        root = _default_snapshot(root)
        try:
            list(root.iterdir())
            os.stat(os.path.join(root, "."))  # noqa: PTH116, PTH118 - a path object would drop the dot
        except OSError as error:
            raise _unopened(given, error) from None
        return cls(root, follow_links)

    def path(self, name: str) -> Path:
        """Returns where a file of the folder really lies, links resolved.

        Args:
            name: safe relative path.

        Raises:
            CheckpointError: if it does not exist, is no regular file, or leads out of the folder.
        """
        try:
            resolved = (self.root / name).resolve(strict=True)
            mode = resolved.stat().st_mode
        except RuntimeError:
            raise refuse("unsafe-link", "it is a loop of links", file=name) from None
        except OSError as error:
            raise self._unreached(name, error) from None
        if not self._allows(name, resolved):
            raise refuse(
                "unsafe-link",
                "it is a link that leads out of the checkpoint's folder, to "
                f"{printable(str(resolved))}; copy the file there if it belongs to the checkpoint; or, "
                "if you trust the folder's links, use convert, verify or revert with --follow-links",
                file=name,
            )
        if not stat.S_ISREG(mode):
            raise refuse("not-a-file", "it is not a regular file; put the file itself there", file=name)
        return resolved

    def _unreached(self, name: str, error: OSError) -> CheckpointError:
        """Returns why a file cannot be reached, in words."""
        problem, path = problem_from_os_error(error), self.root / name
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            end = printable(os.path.realpath(path))
            message = f"it is a dangling link: it leads to {end}, which is missing; download the file again"
            return refuse("not-found", message, file=name)
        return refuse(problem.code, problem.message, file=name)

    def _allows(self, name: str, resolved: Path) -> bool:
        """Returns whether a file is read: it lies where it should, or the user said so, or its digest is its name."""
        return self.follows_links or self._is_own(resolved) or self._blob(name, resolved) is not None

    def _is_own(self, resolved: Path) -> bool:
        """Returns whether a file lies in the folder, or where the cache keeps files of the snapshot that this is."""
        if resolved.is_relative_to(self.root):
            return True
        repository = hub_repository(self.root)
        if repository is None:
            return False
        shared = resolved.is_relative_to(repository.parent / "blobs") and _SHARED_BLOB.fullmatch(resolved.as_posix())
        return resolved.is_relative_to(repository / "blobs") or bool(shared)

    def _blob(self, name: str, resolved: Path) -> str | None:
        """Returns the digest by which a repository's cache, wherever it lies, keeps a file; None if none does.

        The cache links a repository's blob to the one that all repositories share.
        """
        found = _BLOB.fullmatch(resolved.as_posix())
        if found:
            return found[1]
        shared = _SHARED_BLOB.fullmatch(resolved.as_posix())
        on_the_way = (_BLOB.fullmatch(each.as_posix()) for each in _ends(self.root / name)) if shared else ()
        return next((each[1] for each in on_the_way if each and shared and each[1] == shared[2]), None)

    def followed_links(self) -> Iterator[tuple[str, Path]]:
        """Yields the links that are followed on the user's word alone, with their ends; none of hidden files."""
        for name in self.names():
            path = self.root / name
            hidden = any(part.startswith(".") for part in name.split("/"))
            if self.follows_links and not hidden and path.is_symlink():
                end = Path(os.path.realpath(path))
                if not self._is_own(end) and self._blob(name, end) is None:
                    yield name, end

    def check(self, name: str) -> None:
        """Refuses a file that `path` would refuse; fetches nothing."""
        self.path(name)

    def fetch(self, name: str, advance: Callable[[int], None]) -> Path:
        """Returns where a file lies, as `path`, once it is here.

        Args:
            name: safe relative path.
            advance: told of the bytes that come, if it has to be fetched.
        """
        del advance  # it is here
        return self.path(name)

    def disk_need(self, names: Iterable[str]) -> tuple[Path, int]:
        """Returns where files have to be fetched to, and how many bytes: none, they are here."""
        del names
        return self.root, 0

    def release(self, name: str) -> None:
        """Says that a file is needed no more; what was fetched to a place of our own is removed."""

    def sha256(self, name: str) -> str | None:
        """Returns what the file's SHA-256 has to be, 64 hexadecimal digits; None if nobody said.

        A blob of a cache that is not this folder's own is taken because it is what its name says.
        """
        resolved = self.path(name)
        digest = None if self._is_own(resolved) else self._blob(name, resolved)
        return digest if digest and len(digest) == _SHA256_DIGITS else None

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading, unbuffered.

        Raises:
            CheckpointError: as `path`, or if it cannot be opened.
        """
        return open_regular(self.path(name), name)

    def exists(self, name: str) -> bool:
        """Returns whether there is something of that name, if only a broken link."""
        return os.path.lexists(self.root / name)

    def size(self, name: str) -> int:
        """Returns a file's length in bytes."""
        return self.path(name).stat().st_size

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Returns a small file's bytes.

        Raises:
            CheckpointError: as `open`, or if it is longer than ``limit`` bytes.
        """
        data, sha256 = read_small(self.path(name), name, limit), self.sha256(name)
        found = hashlib.sha256(data).hexdigest() if sha256 else None
        if found and sha256 and found != sha256:
            raise other_contents(name, self.path(name), found, sha256)
        return data

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Returns bytes ``begin`` to ``end`` of a file.

        Raises:
            CheckpointError: as `open`, or if the file is shorter.
        """
        with self.open(name) as stream:
            return read_range(stream, begin, end, name)

    def read_json(self, name: str, *, constants: bool = False) -> Any:
        """Returns the JSON document in a file; see `parse_json`."""
        return parse_json(self.read(name), name, constants=constants)

    def read_header(self, name: str) -> Header:
        """Returns the checked header of a safetensors file."""
        return read_header_of(self.path(name), name)

    def read_headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Returns the checked headers of safetensors files, by name; what is wrong with several is told of all."""
        return read_all(map, self.read_header, names)

    def names(self) -> Iterator[str]:
        """Yields the relative path of everything in the folder but folders, sorted; hidden names too.

        Links to folders are yielded as files are, not entered: they are refused when opened.
        """
        for parent, folders, files in os.walk(self.root, onerror=_raise):
            linked = [name for name in folders if (Path(parent) / name).is_symlink()]
            folders[:] = sorted(set(folders) - set(linked))
            relative = Path(parent).relative_to(self.root)
            for name in sorted(files + linked):
                yield (relative / name).as_posix()


def read_all(
    run: Callable[..., Iterable[Header | CheckpointError]], read: Callable[[str], Header], names: Iterable[str]
) -> dict[str, Header]:
    """Returns headers by the files' names.

    Args:
        run: calls a function with every name, such as `map` or that of a pool of threads.
        read: reads one header.
        names: of the files.

    Raises:
        CheckpointError: with everything that is wrong with any of them.
    """

    def tried(name: str) -> Header | CheckpointError:
        try:
            return read(name)
        except CheckpointError as error:
            return error

    names = list(names)
    found = dict(zip(names, run(tried, names), strict=True))
    problems = [problem for each in found.values() if isinstance(each, CheckpointError) for problem in each.problems]
    if problems:
        raise CheckpointError(problems)
    return {name: each for name, each in found.items() if isinstance(each, Header)}


def _unopened(given: Path, error: Exception) -> CheckpointError:
    """Returns why a folder cannot be opened; where it is not there, with names that are like it."""
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return refuse("no-permission", problem_from_os_error(error).message, file=str(given))
    reason = "a loop of links" if isinstance(error, RuntimeError) else "its name holds a NUL character"
    if isinstance(error, OSError):
        reason = problem_from_os_error(error).message + _likely(given)
    return refuse("not-found", f"cannot open it as a checkpoint: {reason}", file=str(given))


def _likely(given: Path) -> str:
    """Returns which folders beside one that is not there have names like it, as a part of a sentence."""
    try:
        there = [path.name for path in given.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    alike = [printable(str(given.parent / name)) for name in get_close_matches(given.name, there)]
    return f" (did you mean {' or '.join(alike)}?)" if alike else ""


def _default_snapshot(root: Path) -> Path:
    """Returns the snapshot of the default branch, if the Hub's cache keeps a repository in ``root``; else ``root``."""
    repository = root.parent if root.name == "snapshots" else root
    snapshots, branch = repository / "snapshots", repository / "refs" / "main"
    if not repository.name.startswith("models--") or not snapshots.is_dir():
        return root
    try:
        commit = read_small(branch, "refs/main", _MAX_COMMIT_BYTES).decode("ascii").strip()
    except (CheckpointError, UnicodeDecodeError):
        commit = ""
    if COMMIT.fullmatch(commit) and (snapshots / commit).is_dir() and not (snapshots / commit).is_symlink():
        return snapshots / commit
    names = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    found = f"pass one of its snapshots: {some_of(map(printable, names), 5)}" if names else "it is empty"
    message = f"this folder of the Hub's cache has no snapshot of the default branch (refs/main); {found}"
    raise refuse("not-found", message, file=str(root))


def _ends(path: Path) -> Iterator[Path]:
    """Yields where a link leads, and where that leads if it is a link too; folders on the way are not resolved."""
    for _ in range(_MAX_LINKS):
        if not path.is_symlink():
            return
        path = Path(os.path.normpath(path.parent / path.readlink()))
        yield path


def other_contents(name: str, path: Path, found: str, promised: str) -> CheckpointError:
    """Returns the refusal of a file whose contents are not what was promised, to be raised by the caller.

    Args:
        name: the file's.
        path: where it lies.
        found: its SHA-256, 64 hexadecimal digits.
        promised: what that should be, as the Hub or the name of a cached file says.
    """
    return refuse(
        "wrong-digest",
        f"its SHA-256 is {found}, but the Hub, or its name in the Hub's cache, says {promised}; "
        f"remove {printable(str(path))} and run the same command again, or download it again",
        file=name,
    )


def too_large(name: str, size: int, limit: int) -> CheckpointError:
    """Returns the refusal of a small file that is none.

    Args:
        name: the file's.
        size: its bytes.
        limit: how many are read.
    """
    message = f"it has {size} bytes, more than the {limit} that are read; download it again, or shorten it in a copy"
    return refuse("too-large", message, file=name)


def read_small(path: Path, name: str, limit: int) -> bytes:
    """Returns a small file's bytes.

    Args:
        path: resolved path.
        name: the file's name, for messages.
        limit: bytes above which it is refused.

    Raises:
        CheckpointError: if it is longer, or cannot be read.
    """
    with open_regular(path, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise too_large(name, size, limit)
        return stream.read(size)


def read_range(stream: BinaryIO, begin: int, end: int, name: str) -> bytes:
    """Returns bytes ``begin`` to ``end`` of an open file; ``name`` is for messages.

    Raises:
        CheckpointError: if it is shorter.
    """
    stream.seek(begin)
    data = stream.read(end - begin)
    if len(data) != end - begin:
        raise refuse("truncated", "the file became shorter while it was read", file=name)
    return data


def read_header_of(path: Path, name: str) -> Header:
    """Returns the checked header of a safetensors file; arguments as for `read_small`."""
    with open_regular(path, name) as stream:
        return read_header(stream, os.fstat(stream.fileno()).st_size, name)


def _raise(error: OSError) -> None:
    raise CheckpointError(problem_from_os_error(error)) from None


def open_regular(path: Path, name: str) -> BinaryIO:
    """Opens a regular file by its resolved path, unbuffered; never a link, never a pipe that would wait.

    Args:
        path: resolved path.
        name: the file's name, for messages.

    Raises:
        CheckpointError: if it cannot be opened or is no regular file.
    """
    flags = os.O_RDONLY
    for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        problem = problem_from_os_error(error)
        raise refuse(problem.code, problem.message, file=name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refuse("not-a-file", "it is not a regular file; put the file itself there", file=name)
    return NamedFile(descriptor, name)


class NamedFile(FileIO):
    """A file open for reading whose errors say its name, so that none is taken for an error of the output."""

    def __init__(self, descriptor: int, name: str) -> None:
        """Takes over a descriptor; ``name`` is for messages."""
        super().__init__(descriptor, "rb")
        self._name = name

    def readinto(self, buffer: Any, /) -> int | None:
        """Reads into a buffer."""
        with self._told():
            return super().readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes | Any:
        """Reads at most ``size`` bytes, by default all."""
        with self._told():
            return super().read(size)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = problem_from_os_error(error)
            raise refuse(problem.code, f"cannot read it: {problem.message}", file=self._name) from None
