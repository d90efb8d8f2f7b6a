"""Making what was written survive a crash, as far as the file system can."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: What ``fsync`` says of what a file system cannot sync: folders of CIFS, sshfs, drvfs and others of FUSE.
_CANNOT_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


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
