"""The folder a conversion writes: claimed by one process, resumable, never loadable before it is whole.

While it is being written it holds ``.awq2marlin/`` with a lock, a journal and the partial files. A file
gets its final name only when it is complete and synced, ``config.json`` comes last, and ``.awq2marlin/``
goes after it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from awq2marlin.errors import Awq2MarlinError, OutputError, Problem, printable, problem_from_os_error, some_of
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.io.digest import digest_of_file
from awq2marlin.io.durable import sync_file, sync_folder
from awq2marlin.io.folder import hub_repository, is_safe_name
from awq2marlin.io.lock import HeldError, Lock
from awq2marlin.io.stream import Hash, NamedPath
from awq2marlin.pipeline.journal import (
    JOURNAL_FILENAME,
    NEW_SUFFIX,
    WORK_DIRECTORY,
    FinishedFile,
    Journal,
    Pinned,
    PullRequest,
    read_journal,
    write_journal,
)

#: Where source files of a repository lie while they are needed, inside of that.
FETCHED_DIRECTORY = "source"
_LOCK_FILENAME = "lock"
PARTIAL_SUFFIX = ".partial"
#: What a file system says of a name that it cannot hold, or that is the folder of a file there or the other way round.
_CANNOT_NAME = {errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]|[. ](?=/|$)')
_NO_SYNC = (
    "the output's file system cannot sync folders; if the machine loses power soon after the run, check "
    "the output with 'awq2marlin verify'"
)
_NO_LOCK = (
    "the output's file system has no locks, so a lock file is used; if a run is killed on another "
    "machine, the next one asks you to remove that file"
)
_START_ANEW = "choose another folder, or use --overwrite to start again"

#: Answers which files of an earlier conversion a run may remove; None if the folder must be empty or its own.
Owned = Callable[[], Iterable[str] | None]


def _refused(code: str, path: Path, message: str) -> OutputError:
    return OutputError(Problem(str(path), "", code, message))


def refuse_overlap(source: Path, output: Path) -> None:
    """Refuses an output folder that is the source, lies inside it, or holds it.

    Args:
        source: the source's folder, resolved.
        output: where the output shall go; need not exist.

    Raises:
        OutputError: if either lies inside the other, or the output lies in the source's Hub cache, or no folder can
            have its name.
    """
    if "\0" in str(output):
        raise _refused("unsafe-name", output, "a folder's name cannot hold a NUL character; choose another")
    resolved = _real(output)
    protected = hub_repository(source) or source
    if _is_same(resolved, source):
        raise _refused("overlap", output, "the output folder is the source; choose another")
    if any(_is_same(folder, protected) for folder in (resolved, *resolved.parents)):
        raise _refused("overlap", output, "the output folder is inside the source; choose one outside it")
    if any(_is_same(folder, resolved) for folder in source.parents):
        raise _refused("overlap", output, "the source is inside the output folder; choose another")


def _real(path: Path) -> Path:
    """Returns ``path`` with its links resolved, as far as it exists; unlike `Path.resolve`, also in a loop of links."""
    return Path(os.path.realpath(path))


def _is_same(path: Path, other: Path) -> bool:
    """Returns whether two resolved paths are one folder, be it by two mounts of it or by the case of letters."""
    try:
        return path == other or path.samefile(other)
    except OSError:  # one of them is not there
        return False


def _can_name(name: str) -> bool:
    """Returns whether a name is one here: Windows takes some for streams of another file, and cuts dots off."""
    return os.name != "nt" or not _NOT_ON_WINDOWS.search(name)


def _leads_outside(root: Path, path: Path) -> bool:
    """Returns whether a link on the way makes ``path``, which begins with ``root``, lie elsewhere."""
    return not _real(path.parent).is_relative_to(_real(root))


class OutputFolder:
    """A claimed output folder. Made by `claim`.

    Attributes:
        root: where the finished files go.
        work: where partial files grow.
        lacks: what its file system cannot do, and what that means, for people.
        left: files that it cannot hold, because of their names.
        was_begun: whether an earlier run of the same plan was stopped here.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        journal: Journal,
        *,
        may_replace: bool,
        lacks: Sequence[str] = (),
        was_begun: bool = False,
    ) -> None:
        """Takes a folder that `claim` has locked."""
        self.lacks = tuple(lacks)
        self.was_begun = was_begun
        self.left: list[str] = []
        self.root = root
        self.work = root.absolute() / WORK_DIRECTORY  # workers of an executor may be elsewhere
        self._names = names
        self._journal = journal
        self._may_replace = may_replace

    @property
    def finished(self) -> Mapping[str, FinishedFile]:
        """The shards that an earlier run, or this one, completed."""
        return self._journal.finished

    def partial(self, name: str) -> Path:
        """Returns where the partial file of ``name`` grows; its own name is short, however long or deep that one is."""
        return self.work / (hashlib.sha256(name.encode()).hexdigest()[:16] + PARTIAL_SUFFIX)

    def final(self, name: str) -> Path:
        """Returns the final path of ``name``; no link inside the folder leads it elsewhere.

        Raises:
            OutputError: if a folder on the way is a link that leads out of the output folder.
        """
        path = self.root / name
        if _leads_outside(self.root, path):
            raise _refused("unsafe-link", path, "a folder on the way is a link that leads out of the output folder")
        return path

    def remember(self, name: str, finished: FinishedFile) -> None:
        """Writes into the journal that a shard is complete under its final name."""
        self._sync_up(self.final(name).parent)
        self._journal.finished[name] = finished
        write_journal(self.work, self._journal)

    def sent(self, name: str, sha256: str) -> None:
        """Writes into the journal that the Hub has a finished shard, and removes it here."""
        self._journal.finished[name] = replace(self._journal.finished[name], sent=sha256)
        write_journal(self.work, self._journal)
        self.final(name).unlink(missing_ok=True)

    def note_pull_request(self, pull_request: PullRequest) -> None:
        """Writes into the journal where the run sends its files, so that a later one goes on there."""
        self._journal.pull_request = pull_request
        write_journal(self.work, self._journal)

    def discard(self) -> None:
        """Removes every file of the run: all of them are elsewhere."""
        _remove(self.root, {*self._journal.names})

    def forget_all(self) -> None:
        """Lets a later run make every shard again: one that held a wrong value speaks against all of them."""
        self._journal.finished.clear()
        write_journal(self.work, self._journal)

    def forget(self, name: str) -> None:
        """Lets this run make a shard again."""
        del self._journal.finished[name]
        write_journal(self.work, self._journal)
        self.final(name).unlink(missing_ok=True)

    def _sync_up(self, folder: Path) -> None:
        """Makes the names in a folder durable, and the folder's own name up to the root."""
        sync_folder(folder)
        while folder != self.root:
            folder = folder.parent
            sync_folder(folder)

    def recheck(self, name: str, source: Path | None, note: Callable[[str], None], also: Sequence[Hash] = ()) -> bool:
        """Hashes a finished shard and its source again, before it is trusted.

        Args:
            name: a shard in `finished`.
            source: resolved path of the file it was made from; None if something else fixes its contents.
            note: told if the shard is damaged; it is then forgotten and removed.
            also: further hashes that see the shard's bytes.

        Returns:
            Whether it is still what the journal remembers.

        Raises:
            OutputError: if the source is another one now, and the run is not one that replaces what it finds.
        """
        entry = self._journal.finished[name]
        if source is not None and digest_of_file(NamedPath(source, name)) != entry.source:
            if not self._may_replace:
                raise _refused(
                    "other-plan",
                    self.root,
                    "the folder holds an unfinished run from another source: "
                    f"{printable(name)} has changed; {_START_ANEW}",
                )
            note(f"{printable(name)} has changed; it is written again")
            self.forget(name)
            return False
        final = self.final(name)
        if final.is_file() and digest_of_file(NamedPath(final.resolve(), name), also) == entry.target:
            return True
        note(f"{printable(name)} was finished by an earlier run but is damaged now; it is written again")
        self.forget(name)
        return False

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file: partial, synced, renamed."""
        partial = self.partial(name)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            sync_file(stream.fileno())
        self.publish(name)

    def publish(self, name: str, partial: Path | None = None) -> None:
        """Gives a complete and synced partial file its final name.

        Args:
            name: the file's.
            partial: the partial file, where it is not the one that `partial` says.
        """
        final = self.final(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        (partial or self.partial(name)).replace(final)

    def publish_unless_unnameable(self, name: str) -> bool:
        """Gives a partial file its final name, unless the file system cannot hold that; then it is removed.

        It cannot where the name has characters that it does not take or is too long, and where it takes the name for
        that of a file which is there, because it does not tell the case of letters apart.

        Returns:
            Whether it has its name.
        """
        named = not os.path.lexists(self.final(name)) and _can_name(name)
        try:
            if named:
                self.publish(name)
        except OSError as error:
            if error.errno not in _CANNOT_NAME:
                raise
            named = False
        if not named:
            self.partial(name).unlink(missing_ok=True)
            self.left.append(name)
        return named

    def commit(self, config: bytes) -> None:
        """Makes all files durable, then writes ``config.json``, the mark of a whole checkpoint.

        A folder that has its ``config.json`` already keeps it.

        Args:
            config: its bytes.
        """
        for folder in {self.final(name).parent for name in self._names if name not in self.left}:
            self._sync_up(folder)
        if CONFIG_FILENAME in self._names:
            self.write(CONFIG_FILENAME, config)
            sync_folder(self.root)


def hindrance(root: Path, plan: str, owned: Owned) -> tuple[str, ...]:
    """Returns why a run would not begin in a folder as it is now, without touching it; empty if it would.

    Args:
        root: the folder; need not exist.
        plan: digest of the plan.
        owned: as for `claim`.
    """
    try:
        with as_output_errors(root):
            _refuse_unusable(root)
            _refuse_unwritable(root)
            removable, journal = owned(), read_journal(root)
            if journal is None:
                _refuse_foreign(root, removable)
            else:
                _refuse_another_plan(root, journal, plan, removable)
    except Awq2MarlinError as error:
        return (would_stop(error),)
    return ()


def would_stop(reason: object) -> str:
    """Returns how a dry run tells what would stop a run.

    Args:
        reason: an error or a problem.
    """
    return f"a run would stop: {reason}"


@contextmanager
def claim(
    root: Path,
    plan: str,
    names: Iterable[str],
    *,
    owned: Owned = lambda: None,
    pinned: Pinned | None = None,
) -> Iterator[OutputFolder]:
    """Claims an output folder for one run, new or resumed.

    Everything of the run is undone by nobody but a later run: on an error the folder stays as it is, without
    ``config.json``, and the same command resumes. On success ``.awq2marlin/`` is removed.

    Args:
        root: the folder; created if needed.
        plan: digest of the plan; a journal of another plan is refused.
        names: every file that the run will write.
        owned: asked when nobody else can change the folder: with ``--overwrite``, what may be removed first: the
            files that the folder's own manifest names. None refuses a folder that is not empty or this run's own.
        pinned: what `Journal.pinned` remembers for a later run.

    Yields:
        The folder, locked until the context ends.

    Raises:
        OutputError: if the folder is foreign, finished, in use, or of another plan.
        OSError: if it cannot be written.
    """
    _refuse_unusable(root)
    if not (root / WORK_DIRECTORY).exists():  # a foreign folder is not touched, not even to lock it
        _refuse_foreign(root, owned())
    created = _make_folder(root)
    names = sorted(names)
    try:
        with _locked(root) as lock:
            removable = owned()
            lacks = [] if sync_folder(root) else [_NO_SYNC]
            lacks += [_NO_LOCK] if lock.is_a_file else []
            was_begun = (found := read_journal(root)) is not None and found.plan == plan
            journal = _open_journal(root, plan, names, removable, pinned)
            with _journal_kept_while_needed(root, created):
                may_replace = removable is not None
                yield OutputFolder(root, names, journal, may_replace=may_replace, lacks=lacks, was_begun=was_begun)
    except BaseException:
        if created:
            with suppress(OSError):  # not empty: it keeps what was done, or another process has begun there
                root.rmdir()
        raise


@contextmanager
def _locked(root: Path) -> Iterator[Lock]:
    """Holds the lock of a folder, and on leaving removes ``.awq2marlin/`` unless there is a journal in it.

    The lock file goes while the lock is held, and then the folder only if it is empty: so nobody who comes in
    between can lose a lock or a journal of his own.
    """
    work = root / WORK_DIRECTORY
    lock = Lock(work / _LOCK_FILENAME)
    try:
        work.mkdir(exist_ok=True)
        lock.acquire()
    except FileNotFoundError:  # who held it removes the folder just now
        raise _in_use(root) from None
    except HeldError as error:
        raise _in_use(root, str(error)) from None
    finished = False
    try:
        yield lock
    finally:
        finished = not (work / JOURNAL_FILENAME).exists()
        if finished:
            _remove_leftovers(work)
            shutil.rmtree(work / FETCHED_DIRECTORY, ignore_errors=True)
        lock.release(remove=finished)
        if finished:
            with suppress(OSError):
                work.rmdir()


def _in_use(root: Path, who: str = "") -> OutputError:
    message = "another process is writing to this folder; wait for it, or choose another folder"
    return _refused("in-use", root, f"{message} ({who})" if who else message)


def tidy(root: Path) -> None:
    """Removes what a run left that was killed when its output was whole, before it had tidied up.

    Args:
        root: an output folder without a journal. What cannot be removed stays: it does no harm.
    """
    work = root / WORK_DIRECTORY
    if work.is_dir() and not work.is_symlink():
        with suppress(OutputError, OSError), _locked(root):  # whoever is at it now tidies up himself
            pass


@contextmanager
def _journal_kept_while_needed(root: Path, created: bool) -> Iterator[None]:
    """Removes the journal, the mark of an unfinished folder, after success or if a new folder got nothing at all."""
    journal = root / WORK_DIRECTORY / JOURNAL_FILENAME
    try:
        yield
    except BaseException:
        if created and _holds_nothing(root):
            journal.unlink()
        raise
    journal.unlink()


def _make_folder(root: Path) -> bool:
    """Makes a folder and those above it, durably; returns whether it was not there before."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    try:
        for folder in missing:
            sync_folder(folder.parent)
    except OSError:
        for folder in missing:
            with suppress(OSError):  # not empty: another process has begun there
                folder.rmdir()
        raise
    return root in missing


def _holds_nothing(root: Path) -> bool:
    present = [path.name for path in root.iterdir()]
    work = root / WORK_DIRECTORY
    return present == [WORK_DIRECTORY] and not any(
        path for path in (*work.glob("*" + PARTIAL_SUFFIX), *(work / FETCHED_DIRECTORY).glob("**/*")) if path.is_file()
    )


def _refuse_unusable(root: Path) -> None:
    if os.path.lexists(root) and not root.is_dir():
        raise _refused("not-a-folder", root, "a file of this name exists; choose another output folder")
    work = root / WORK_DIRECTORY
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise _refused(
            "unsafe-link", work, "awq2marlin needs this name for its own folder; remove or rename what is there"
        )
    if (work / FETCHED_DIRECTORY).is_symlink():
        raise _refused(
            "unsafe-link",
            work / FETCHED_DIRECTORY,
            "awq2marlin needs this name for its own folder; remove or rename what is there",
        )


def _refuse_unwritable(root: Path) -> None:
    """Refuses a folder that cannot be made or written, as the system refuses it then."""
    there = next(path for path in (root, *root.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        number = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(there))


def _refuse_foreign(root: Path, owned: Iterable[str] | None) -> None:
    """Refuses a folder that holds anything, unless something of it may be removed."""
    if owned is not None or not root.is_dir():
        return
    present = sorted(path.name for path in root.iterdir() if path.name != WORK_DIRECTORY)
    if not present:
        return
    shown = some_of(map(printable, present), 5)
    raise _refused("not-empty", root, f"the folder is not empty ({shown}); choose another, or an empty one")


def _refuse_another_plan(root: Path, journal: Journal, plan: str, owned: Iterable[str] | None) -> None:
    """Refuses a folder with an unfinished run of another plan, unless that may be removed."""
    if journal.plan != plan and owned is None:
        raise _refused(
            "other-plan",
            root,
            "the folder holds an unfinished run from another source, with other options or of another "
            f"version; finish that one, {_START_ANEW}",
        )


def _open_journal(
    root: Path,
    plan: str,
    names: Sequence[str],
    owned: Iterable[str] | None,
    pinned: Pinned | None,
) -> Journal:
    """Returns the journal of this plan, found or begun, and removes what is not finished.

    The journal names all that is going to be removed before anything is, so that a run killed on the way has
    lost track of nothing. It never names a file that was there before and is not ours.
    """
    journal = read_journal(root)
    if journal is None:
        _refuse_foreign(root, owned)
    else:
        _refuse_another_plan(root, journal, plan, owned)
    _remove_leftovers(root / WORK_DIRECTORY)
    ours = {*(owned or ()), *(journal.names if journal else ())}
    _refuse_clashes(root, names, ours)
    if journal is None or journal.plan != plan:
        journal = Journal(plan, sorted({*names, *ours}), pinned=pinned)
        write_journal(root / WORK_DIRECTORY, journal)
        sync_folder(root)
    elif not ours.issuperset(names):
        journal.names = sorted({*names, *ours})
        write_journal(root / WORK_DIRECTORY, journal)
    _remove(root, {*journal.names} - {*journal.finished})
    return journal


def _refuse_clashes(root: Path, names: Sequence[str], ours: set[str]) -> None:
    """Refuses what stands where a file of ours, or a folder for it, has to go."""
    for name in names:
        folders = [parent.as_posix() for parent in Path(name).parents if parent != Path()]
        taken = [each for each in folders if os.path.lexists(root / each) and not (root / each).is_dir()]
        taken += [name] if os.path.lexists(root / name) else []
        foreign = [printable(each) for each in taken if each not in ours]
        if foreign:
            raise _refused(
                "not-empty", root, f"it holds {foreign[0]}, which awq2marlin did not write; choose another folder"
            )


def _remove(root: Path, names: set[str]) -> None:
    """Removes the files named, ``config.json`` first, and the folders that became empty; nothing else."""
    for name in sorted(names, key=lambda name: (name != CONFIG_FILENAME, name)):
        path = root / name
        is_file = os.path.lexists(path) and (path.is_symlink() or path.is_file())
        if is_safe_name(name) and not _leads_outside(root, path) and is_file:
            path.unlink()
            if name == CONFIG_FILENAME:  # not loadable from here on, whatever happens
                sync_folder(root)
    parents = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        folder = root / parent
        is_folder = folder.is_dir() and not folder.is_symlink()
        if is_folder and not _leads_outside(root, folder) and not any(folder.iterdir()):
            folder.rmdir()


def _remove_leftovers(work: Path) -> None:
    """Removes what a run that was killed may have left half-written, half-fetched files too."""
    for pattern in ("*" + PARTIAL_SUFFIX, "*" + NEW_SUFFIX):
        for path in work.glob(pattern):
            path.unlink()
    for path in (work / FETCHED_DIRECTORY).glob("**/*.incomplete"):
        path.unlink()


@contextmanager
def as_output_errors(root: Path) -> Iterator[None]:
    """Turns system errors met while writing ``root``, a folder that a run resumes in, into words for the user."""
    try:
        yield
    except OSError as error:
        problem = problem_from_os_error(error)
        resumes = "; it resumes" if problem.code == "disk-full" else ""
        # Without a number it is no fault of the folder, but of a library that cannot be loaded.
        folder = "" if error.errno is None else str(root)
        message = problem.message + resumes
        raise OutputError(replace(problem, file=problem.file or folder, message=message)) from None
