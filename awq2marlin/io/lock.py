"""Keeping other processes out: by the strongest lock that a file system has."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from awq2marlin.errors import printable

#: What ``flock`` says where a file system, or the server behind it, has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

#: Added to the name of a lock file for that of the file that names the owner, where there are no locks.
_OWNER_SUFFIX = ".owner"

#: How long to wait for a file that names no owner yet, in seconds: the library takes it for a dead one's after two.
_PATIENCE = 3.0


class HeldError(Exception):
    """Another process holds a lock; the text is empty, or says who and what to do if that one is gone."""


class Lock:
    """A lock by a file, for one process at a time.

    The system's own lock goes with its process, however that ends. Where the file system has none (NFS or Lustre
    without them, some of FUSE), a file beside the lock file names its owner: host, process, and when that one began. So
    a process that was killed on this machine is told from one that runs; of another machine nobody can be asked.

    Attributes:
        is_a_file: whether the lock that is held is but a file that names its owner.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock file's path; nothing is locked yet."""
        self.is_a_file = False
        self._path = path
        self._owner = path.with_name(path.name + _OWNER_SUFFIX)
        self._held: list[BaseFileLock] = []

    def acquire(self) -> None:
        """Takes the lock, without waiting for who has it.

        Raises:
            HeldError: if another process has it, or has just removed it.
            OSError: if the lock file cannot be made.
        """
        try:
            self._acquire(FileLock(self._path, fallback_to_soft=False), 0)
        except Timeout:
            raise HeldError from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.is_a_file = True
        if not self.is_a_file and not self._path.exists():  # who held it removed it between our opening and locking it
            self.release()
            raise HeldError
        if self.is_a_file or self._owner.exists():  # where this machine has locks, another may have none
            self._acquire_by_file()

    def _acquire_by_file(self) -> None:
        from filelock import SoftFileLock  # a third of the library, which hardly anybody needs

        try:
            self._acquire(SoftFileLock(self._owner), _PATIENCE)
        except Timeout:
            self.release()
            raise HeldError(
                f"this file system has no locks, and the lock file {printable(str(self._owner))} belongs to "
                f"{self._owner_text()}; if that process is gone, remove the file"
            ) from None

    def _acquire(self, lock: BaseFileLock, patience: float) -> None:
        lock.acquire(timeout=patience)
        self._held.append(lock)

    def _owner_text(self) -> str:
        try:
            process, host, *_ = self._owner.read_text(encoding="utf-8", errors="replace").split("\n")
        except (OSError, ValueError):
            return "an unknown process"
        return f"process {printable(process)} on {printable(host)}"

    def release(self, *, remove: bool = False) -> None:
        """Gives the lock back.

        Args:
            remove: whether its files go too; they go while the lock is held, so that nobody can lose his own.
        """
        if remove:
            self._path.unlink(missing_ok=True)
        while self._held:
            self._held.pop().release()  # which removes a file that names the owner
