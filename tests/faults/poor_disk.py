"""A file system that cannot sync folders, or has no locks: CIFS, sshfs, NFS or Lustre without locks, drvfs."""

import errno
import fcntl
import os
import stat


def _raising(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def make(flock=None, folder_sync=None, set_attribute=setattr):
    """Lets system calls fail from now on, each with an errno by name; None or ``-`` leaves a call as it is.

    Args:
        flock: of every lock.
        folder_sync: of ``fsync`` of every folder.
        set_attribute: how to replace a function; a test hands its ``monkeypatch.setattr``.
    """
    sync = os.fsync

    def no_flock(_descriptor, _operation):
        raise _raising(flock)

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise _raising(folder_sync)
        sync(descriptor)

    if flock not in (None, "-"):
        set_attribute(fcntl, "flock", no_flock)
    if folder_sync not in (None, "-"):
        set_attribute(os, "fsync", files_only)
