"""Getting what was written to the disk, early and for good, as far as the system and the file system can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: What ``fsync`` says of what a file system cannot sync: folders of CIFS, sshfs, drvfs and others of FUSE.
_CANNOT_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

#: Flags of Linux, which Python does not name: ``FALLOC_FL_KEEP_SIZE`` and those of ``sync_file_range``.
_KEEP_SIZE, _WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def sync_folder(folder: Path) -> bool:
    """Makes the names in a folder durable, where the system can do that.

    Returns:
        Whether it could. Where it cannot, the names are as durable as the file system makes them by itself.

    Raises:
        OSError: if it can, and failed.
    """
    if os.name != "posix":
        return True  # whose file systems keep a journal of names
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return False
    try:
        return sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> bool:
    """Makes what was written to an open file durable; returns and raises as `sync_folder`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        return False
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file: complete and synced before it has its name."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        sync_file(stream.fileno())
    partial.replace(path)


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Gives a place for a new version of a file, which then takes the file's name: complete or not at all.

    Args:
        path: the file. The place is in the same folder, and has the same ending.

    Raises:
        OSError: if it cannot be written. The error names the file, not the place, which a user never asked for.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # the reason for not writing it is told already
            partial.unlink(missing_ok=True)


def reserve(descriptor: int, size: int) -> None:
    """Finds room on the disk for an empty file at once, instead of page by page as it is written; it stays empty.

    Where the file system cannot do that, or there is not enough room, nothing happens: writing will tell. Nor on one
    without a disk of its own: on a RAM disk, finding room costs as much time as writing.

    Args:
        descriptor: of the file, open for writing.
        size: bytes it is going to have.
    """
    # Linux numbers file systems without a device under major 0.
    if _libc is not None and size > 0 and os.major(os.fstat(descriptor).st_dev):
        allocate = getattr(_libc, "fallocate64", _libc.fallocate)
        allocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))


def start_writing_back(descriptor: int, begin: int, end: int) -> None:
    """Lets the disk begin with a part of an open file, without waiting for it.

    Args:
        descriptor: of the file, open for writing.
        begin: offset of the part in bytes.
        end: offset past its last byte.

    Raises:
        OSError: if the disk failed.
    """
    _sync_range(descriptor, begin, end, _WRITE)


def finish_writing_back(descriptor: int, begin: int, end: int) -> None:
    """Waits until the disk has a part of an open file, and gives the memory that held it back; see above."""
    _sync_range(descriptor, begin, end, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is but advice
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _sync_range(descriptor: int, begin: int, end: int, flags: int) -> None:
    if _libc is None:
        return
    begin_and_length = ctypes.c_int64(begin), ctypes.c_int64(end - begin)
    if _libc.sync_file_range(descriptor, *begin_and_length, flags):
        error = ctypes.get_errno()
        if error not in _CANNOT_SYNC | {errno.ESPIPE}:
            raise OSError(error, os.strerror(error))
