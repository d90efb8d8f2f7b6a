"""Room set aside for a file, and the disk that begins early and stays close behind."""

import ctypes
import errno
import os
import sys
from types import SimpleNamespace

import pytest

from awq2marlin.io import durable, stream
from awq2marlin.io.stream import NamedPath, copy_pieces, rewrite_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="Only Linux is told when to write back.")


def failing(error):
    """Returns a system library whose calls fail."""

    def fail(*_):
        ctypes.set_errno(error)
        return -1

    return SimpleNamespace(sync_file_range=fail, fallocate=fail)


@linux
@pytest.mark.parametrize("device", [8, 0])
def test_room_is_found_at_once_if_there_is_a_disk_and_the_file_stays_empty(tmp_path, monkeypatch, device):
    monkeypatch.setattr(os, "major", lambda _: device)
    with (tmp_path / "file").open("wb") as file:
        durable.reserve(file.fileno(), 1_000_000)
        found = os.fstat(file.fileno())
    assert (found.st_size, found.st_blocks * 512 >= 1_000_000) == (0, device != 0)


@pytest.mark.parametrize("library", [None, failing(errno.EOPNOTSUPP), failing(errno.ENOSPC)])
def test_where_no_room_can_be_set_aside_writing_tells(tmp_path, monkeypatch, library):
    monkeypatch.setattr(durable, "_libc", library)
    with (tmp_path / "file").open("wb") as file:
        durable.reserve(file.fileno(), 1_000_000)
        assert os.fstat(file.fileno()).st_size == 0


@pytest.mark.parametrize("call", [durable.start_writing_back, durable.finish_writing_back])
def test_a_disk_that_fails_is_told_and_a_file_system_that_cannot_begin_early_is_not(tmp_path, monkeypatch, call):
    with (tmp_path / "file").open("wb") as file:
        for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            monkeypatch.setattr(durable, "_libc", failing(error))
            with pytest.raises(OSError, match=os.strerror(error)) as caught:
                call(file.fileno(), 0, 4096)
            assert caught.value.errno == error
        for error in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP):
            monkeypatch.setattr(durable, "_libc", failing(error))
            call(file.fileno(), 0, 4096)
        monkeypatch.setattr(durable, "_libc", None)
        call(file.fileno(), 0, 4096)


@linux
def test_what_the_disk_has_leaves_memory(tmp_path):
    """Told by ``mincore``, of a file system that has a disk."""
    size, path = 1 << 20, tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        file.write(os.urandom(size))
        assert pages_in_memory(path, size) == size // 4096
        durable.start_writing_back(file.fileno(), 0, size)
        durable.finish_writing_back(file.fileno(), 0, size)
    left = pages_in_memory(path, size)
    if left == size // 4096:
        pytest.skip("This file system keeps files in memory.")
    assert left == 0


def pages_in_memory(path, size):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    with path.open("rb") as file:
        address = libc.mmap(None, size, 1, 1, file.fileno(), 0)
    pages = (ctypes.c_ubyte * (size // 4096))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_disk_begins_with_every_part_once_it_is_written_and_stays_close_behind(tmp_path, monkeypatch, workers):
    part, behind, size = 2 << 20, 6 << 20, (20 << 20) + 5
    started, finished = [], []
    monkeypatch.setattr(stream, "WRITE_BACK_BYTES", part)
    monkeypatch.setattr(stream, "WRITE_BEHIND_BYTES", behind)
    monkeypatch.setattr(stream, "start_writing_back", lambda _, begin, end: started.append((begin, end)))
    monkeypatch.setattr(stream, "finish_writing_back", lambda _, begin, end: finished.append((begin, end)))
    (tmp_path / "source").write_bytes(bytes(size))
    pieces = copy_pieces(0, 0, size)
    rewrite_file(NamedPath(tmp_path / "source", "source"), tmp_path / "target", pieces, workers=workers)
    # Each part, and once more the one before it.
    assert sorted(started) == [(max(0, end - 2 * part), end) for end in range(part, size, part)]
    assert sorted(finished) == [(end - part, end) for end in range(part, size - behind, part)]
    if workers == 1:
        assert (started, finished) == (sorted(started), sorted(finished))
