"""The folder a conversion writes: claimed by one process, resumable, never loadable before it is whole.

While it is being written it holds ``.awq2marlin/`` with a lock, a journal and the partial files. A file
gets its final name only when it is complete and synced, ``config.json`` comes last, and ``.awq2marlin/``
goes after it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from awq2marlin.digest import is_digest, xxh3_of_file
from awq2marlin.errors import CheckpointError, OutputError, Problem, printable, problem_from_os_error, refuse
from awq2marlin.folder import CONFIG_FILENAME, check_name, hub_repository, is_safe_name
from awq2marlin.safetensors_header import parse_json
from awq2marlin.stream import Hash

WORK_DIRECTORY = ".awq2marlin"
JOURNAL_FILENAME = "journal.json"
_LOCK_FILENAME = "lock"
_JOURNAL_VERSION = 1
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class FinishedFile:
    """A shard that is complete, as the journal remembers it.

    Attributes:
        source_size: bytes of the source it was made from.
        source_digest: digest of that source.
        target_size: bytes of the output.
        target_digest: digest of the output.
    """

    source_size: int
    source_digest: str
    target_size: int
    target_digest: str


@dataclass
class Journal:
    """What an unfinished output folder remembers of itself.

    Attributes:
        plan: digest of the plan it follows.
        names: every file that the run may leave in the folder.
        finished: the shards that are complete.
    """

    plan: str
    names: list[str]
    finished: dict[str, FinishedFile] = field(default_factory=dict)


def _refused(code: str, path: Path, message: str) -> OutputError:
    return OutputError(Problem(str(path), "", code, message))


def refuse_overlap(source: Path, output: Path) -> None:
    """Refuses an output folder that is the source, lies inside it, or holds it.

    Args:
        source: the source's folder, resolved.
        output: where the output shall go; need not exist.

    Raises:
        OutputError: if either lies inside the other, or the output lies in the source's Hub cache.
    """
    resolved = output.resolve()
    protected = hub_repository(source) or source
    if resolved == source or (output.exists() and output.samefile(source)):
        raise _refused("overlap", output, "the output folder is the source; choose another")
    if resolved.is_relative_to(protected):
        raise _refused("overlap", output, "the output folder lies inside the source; choose one outside it")
    if source.is_relative_to(resolved):
        raise _refused("overlap", output, "the source lies inside the output folder; choose another")


class OutputFolder:
    """A claimed output folder. Made by `claim`.

    Attributes:
        root: where the finished files go.
        work: where partial files grow.
    """

    def __init__(self, root: Path, journal: Journal) -> None:
        """Takes a folder that `claim` has locked."""
        self.root = root
        self.work = root / WORK_DIRECTORY
        self._journal = journal

    @property
    def finished(self) -> Mapping[str, FinishedFile]:
        """The shards that an earlier run, or this one, completed."""
        return self._journal.finished

    def partial(self, name: str) -> Path:
        """Returns where the partial file of ``name`` grows."""
        return self.work / (name.replace("/", "+") + ".partial")

    def final(self, name: str) -> Path:
        """Returns the final path of ``name``; no link inside the folder leads it elsewhere.

        Raises:
            OutputError: if a folder on the way is a link that leads out of the output folder.
        """
        path = self.root / name
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise _refused("unsafe-link", path, "a folder on the way is a link that leads out of the output folder")
        return path

    def remember(self, name: str, finished: FinishedFile) -> None:
        """Writes into the journal that a shard is complete under its final name."""
        sync_folder(self.final(name).parent)
        self._journal.finished[name] = finished
        _write_journal(self.work, self._journal)

    def recheck(self, name: str, source: Path, note: Callable[[str], None], also: Sequence[Hash] = ()) -> bool:
        """Hashes a finished shard and its source again, before it is trusted.

        Args:
            name: a shard in `finished`.
            source: resolved path of the file it was made from.
            note: told if the shard is damaged; it is then forgotten and removed.
            also: further hashes that see the shard's bytes.

        Returns:
            Whether it is still what the journal remembers.

        Raises:
            OutputError: if the source is another one now.
        """
        entry = self._journal.finished[name]
        if xxh3_of_file((source, name)) != (entry.source_size, entry.source_digest):
            raise _refused(
                "other-plan",
                self.root,
                "the folder holds an unfinished conversion of another source: "
                f"{printable(name)} has other contents now; use --overwrite or another folder to start anew",
            )
        final = self.final(name)
        found = xxh3_of_file((final.resolve(), name), also) if final.is_file() else None
        if found == (entry.target_size, entry.target_digest):
            return True
        note(f"{printable(name)} was finished by an earlier run but is damaged now; it is made again")
        del self._journal.finished[name]
        _write_journal(self.work, self._journal)
        final.unlink(missing_ok=True)
        return False

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file: partial, synced, renamed."""
        partial = self.partial(name)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self.publish(name)

    def publish(self, name: str) -> None:
        """Gives a complete and synced partial file its final name."""
        final = self.final(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.partial(name).replace(final)

    def commit(self, config: bytes) -> None:
        """Writes ``config.json``, the mark of a whole checkpoint, once all else is durable."""
        for folder in {self.final(name).parent for name in self._journal.names}:
            if folder.is_dir():
                sync_folder(folder)
        self.write(CONFIG_FILENAME, config)
        sync_folder(self.root)


@contextmanager
def claim(root: Path, plan: str, names: Iterable[str], *, owned: Iterable[str] | None = None) -> Iterator[OutputFolder]:
    """Claims an output folder for one run, new or resumed.

    Everything of the run is undone by nobody but a later run: on an error the folder stays as it is, without
    ``config.json``, and the same command resumes. On success ``.awq2marlin/`` is removed.

    Args:
        root: the folder; created if needed.
        plan: digest of the plan; a journal of another plan is refused.
        names: every file that the run will leave in the folder.
        owned: with ``--overwrite``, what else may be removed first: the files that the folder's own manifest
            names. None refuses a folder that is not empty or this run's own.

    Yields:
        The folder, locked until the context ends.

    Raises:
        OutputError: if the folder is foreign, finished, in use, or of another plan.
        OSError: if it cannot be written.
    """
    _refuse_foreign(root, owned)
    created = _make_folder(root)
    work = root / WORK_DIRECTORY
    work.mkdir(exist_ok=True)
    lock = FileLock(work / _LOCK_FILENAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _refused(
            "in-use", root, "another process is writing this folder; wait for it or choose another"
        ) from None
    try:
        journal = _open_journal(root, plan, sorted(names), owned)
        yield OutputFolder(root, journal)
        _remove_work(work)
    except BaseException:
        if created and _holds_nothing(root):
            _remove_work(work)
            lock.release()
            shutil.rmtree(work, ignore_errors=True)
            root.rmdir()
        raise
    finally:
        lock.release()
        if not (work / JOURNAL_FILENAME).exists():
            shutil.rmtree(work, ignore_errors=True)


def _make_folder(root: Path) -> bool:
    if root.exists():
        return False
    root.mkdir(parents=True)
    return True


def _holds_nothing(root: Path) -> bool:
    work = root / WORK_DIRECTORY
    return [path.name for path in root.iterdir()] == [WORK_DIRECTORY] and not any(
        path.name not in (_LOCK_FILENAME, JOURNAL_FILENAME) for path in work.iterdir()
    )


def _refuse_foreign(root: Path, owned: Iterable[str] | None) -> None:
    if not os.path.lexists(root):
        return
    if not root.is_dir():
        raise _refused("not-a-folder", root, "there is a file of this name; choose another output folder")
    present = sorted(path.name for path in root.iterdir() if path.name != WORK_DIRECTORY)
    if not present or owned is not None or read_journal(root) is not None:
        return
    shown = ", ".join(printable(name) for name in present[:_MAX_NAMES_SHOWN])
    more = ", ..." if len(present) > _MAX_NAMES_SHOWN else ""
    raise _refused("not-empty", root, f"the folder is not empty ({shown}{more}); choose another, or an empty one")


def _open_journal(root: Path, plan: str, names: list[str], owned: Iterable[str] | None) -> Journal:
    work = root / WORK_DIRECTORY
    found = read_journal(root)
    if found is not None and found.plan != plan and owned is None:
        raise _refused(
            "other-plan",
            root,
            "the folder holds an unfinished conversion of another source, other options or "
            "another version; finish that one, or use --overwrite to start anew",
        )
    if owned is not None:
        _remove(root, {*owned, *(found.names if found else ())})
        found = None
    if found is None:
        leftovers = sorted(path.name for path in root.iterdir() if path.name in {name.split("/")[0] for name in names})
        if leftovers:
            raise _refused(
                "not-empty",
                root,
                f"it holds {printable(leftovers[0])}, which is not ours; choose another folder",
            )
        found = Journal(plan, names)
        _write_journal(work, found)
    (root / CONFIG_FILENAME).unlink(missing_ok=True)
    for partial in work.glob("*.partial"):
        partial.unlink()
    return found


def read_journal(root: Path) -> Journal | None:
    """Returns the journal of an unfinished output folder, or None if it has none.

    Raises:
        OutputError: if it is damaged.
    """
    path = root / WORK_DIRECTORY / JOURNAL_FILENAME
    if not path.is_file():
        return None
    try:
        return _parse_journal(parse_json(path.read_bytes(), JOURNAL_FILENAME))
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        raise _refused(
            "bad-journal",
            path,
            "the journal of the unfinished conversion is damaged; remove this output folder and convert again",
        ) from None


def _parse_journal(document: Any) -> Journal:
    names = [check_name(name, JOURNAL_FILENAME) for name in document["names"]]
    finished = {name: FinishedFile(**entry) for name, entry in document["finished"].items()}
    for name, entry in finished.items():
        if name not in names or not is_digest(entry.source_digest) or not is_digest(entry.target_digest):
            raise refuse("bad-journal", "an entry is malformed")
    if document["version"] != _JOURNAL_VERSION or not isinstance(document["plan"], str):
        raise refuse("bad-journal", "the version is another")
    return Journal(document["plan"], names, finished)


def _write_journal(work: Path, journal: Journal) -> None:
    finished = {name: asdict(entry) for name, entry in sorted(journal.finished.items())}
    document = {
        "version": _JOURNAL_VERSION,
        "plan": journal.plan,
        "names": journal.names,
        "finished": finished,
    }
    new = work / (JOURNAL_FILENAME + ".new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(work / JOURNAL_FILENAME)
    sync_folder(work)


def _remove(root: Path, names: set[str]) -> None:
    """Removes the files named, ``config.json`` first, and the folders that became empty; nothing else."""
    real_root = root.resolve()
    for name in sorted(names, key=lambda name: (name != CONFIG_FILENAME, name)):
        path = root / name
        if (
            is_safe_name(name)
            and path.parent.resolve().is_relative_to(real_root)
            and (path.is_file() or path.is_symlink())
        ):
            path.unlink()
    parents = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        folder = root / parent
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def _remove_work(work: Path) -> None:
    """Removes the journal, the mark of an unfinished folder; the lock goes when it is released."""
    (work / JOURNAL_FILENAME).unlink(missing_ok=True)
    for rest in work.glob("*.partial"):
        rest.unlink()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told_as_output_error(root: Path) -> Iterator[None]:
    """Turns system errors met while writing ``root`` into words for the user."""
    try:
        yield
    except OSError as error:
        problem = problem_from_os_error(error)
        raise OutputError(Problem(problem.file or str(root), "", problem.code, problem.message)) from None
