"""One pass over a file: read, rewrite, digest and write it piece by piece, by several threads at once.

The pieces are taken in order by whichever thread is free. Each is read, rewritten, and then waits for its
turn at the digests, so that these see both files from the first byte to the last whatever the number of
threads. Memory is two buffers a thread, and one for all of them where pieces need what several others read. Nothing
here knows of AWQ or Marlin.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import refuse
from awq2marlin.io.durable import finish_writing_back, reserve, start_writing_back, sync_file
from awq2marlin.io.folder import open_regular

Bytes = npt.NDArray[np.uint8]

#: Length of a piece in bytes, about. Smaller ones cost Python more time, larger ones the caches: of 256 KB to 8 MB, 2
#: and 4 MB took the least processor time, a tenth less than 1 MB (AWQ gemv_fast, 2 cores of an AMD EPYC, 2026-11-26).
PIECE_BYTES = 2 << 20

#: How much of a file is written before the disk is told to begin with it.
WRITE_BACK_BYTES = 8 << 20

#: How far the disk may be behind.
WRITE_BEHIND_BYTES = 64 << 20


class NamedPath(NamedTuple):
    """A file to read.

    Attributes:
        path: where it really lies, links resolved.
        name: what messages call it.
    """

    path: Path
    name: str


class Hash(Protocol):
    """What `hashlib` and `xxhash` objects have in common."""

    def update(self, data: memoryview | bytes, /) -> object:
        """Takes the next bytes."""

    def hexdigest(self) -> str:
        """Returns the digest of all bytes so far."""


class Step(NamedTuple):
    """A piece's part in filling or emptying the buffer that the pass has for all its pieces.

    Some pieces that follow one another read and write nothing: together they fill the buffer. The pieces after them
    write and read nothing: together they empty it. A step begins when every piece before it is through, so that it
    finds the buffer full, or free.

    Attributes:
        place: how many pieces of the same step come before this one.
        size: bytes of the buffer that are used.
        at: of a piece that rewrites nothing: where its bytes lie in the buffer.
    """

    place: int
    size: int
    at: int = 0


class Piece(NamedTuple):
    """A piece of a rewrite; offsets are in the files, in bytes.

    Attributes:
        read: (offset, length) in the source.
        write: (offset, length) in the target.
        rewrite: turns the bytes read into the bytes written; None copies them.
        step: where `rewrite` gets the pass's own buffer in place of what is not read, or not written; without a
            `rewrite`, bytes are read straight into the buffer, or written straight from it.
    """

    read: tuple[int, int]
    write: tuple[int, int]
    rewrite: Callable[[Bytes, Bytes], None] | None = None
    step: Step | None = None


def copy_pieces(read_at: int, write_at: int, length: int) -> Iterator[Piece]:
    """Yields the pieces that copy ``length`` bytes from one offset to another."""
    for done in range(0, length, PIECE_BYTES):
        size = min(PIECE_BYTES, length - done)
        yield Piece((read_at + done, size), (write_at + done, size))


class _Turnstile:
    """Lets threads pass one at a time, in the order of their pieces."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._closed = False

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """Waits until every piece before ``index`` has passed."""
        with self._condition:
            self._condition.wait_for(lambda: self._next == index or self._closed)
            if self._closed:
                raise _AbandonedError
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()

    def wait_for_all_before(self, index: int) -> None:
        """Waits until every piece before ``index`` has passed, out of turn."""
        with self._condition:
            self._condition.wait_for(lambda: self._next >= index or self._closed)
            if self._closed:
                raise _AbandonedError

    def close(self) -> None:
        """Turns everybody away, because a thread failed or the user interrupted."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()


class _AbandonedError(Exception):
    """A thread stops because another one failed; the other's error is the one that is told."""


class _Rewriter:
    """The state that the threads of one pass share."""

    def __init__(
        self,
        source: NamedPath,
        target: Path,
        pieces: Iterator[Piece],
        source_hashes: Sequence[Hash],
        target_hashes: Sequence[Hash],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._source = source
        self._target_path = target
        self._pieces = enumerate(pieces)
        self._take = threading.Lock()
        self._turnstile = _Turnstile()
        self._buffer: Bytes = np.empty(0, np.uint8)
        self._source_hashes, self._target_hashes = source_hashes, target_hashes
        self.progress = progress
        self._changed = threading.Condition()
        self._at_work = 0
        self._failure: BaseException | None = None

    def close(self) -> None:
        """Leaves no piece to take, and turns away those who wait."""
        self._turnstile.close()
        with self._take:
            self._pieces = enumerate(iter(()))

    def enter(self) -> None:
        """Announces a thread that is going to `work`, so that `finish` waits for it."""
        with self._changed:
            self._at_work += 1

    def leave(self) -> None:
        """Takes an announcement back, or ends it."""
        with self._changed:
            self._at_work -= 1
            self._changed.notify_all()

    def work(self) -> None:
        """Takes pieces until none is left; the body of every thread that entered. `finish` tells what went wrong."""
        try:
            with (
                open_regular(*self._source) as source,
                self._target_path.open("r+b", buffering=0) as target,
            ):
                self._work(source, target)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._failure = self._failure or error
            self.close()
        finally:
            self.leave()

    def finish(self) -> None:
        """Waits for every thread that entered and raises what the first one that failed raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._at_work == 0)
        if self._failure is not None:
            raise self._failure

    def _work(self, source: BinaryIO, target: BinaryIO) -> None:
        buffers = _Buffers()
        while (taken := self._next_piece()) is not None:
            index, piece = taken
            found, made = self._sides(index, piece, buffers)
            if piece.read[1]:
                _read_exactly(source, piece.read[0], found, self._source.name)
            if piece.rewrite is not None:
                piece.rewrite(found, made)
            from_shared = piece.step is not None and piece.rewrite is None  # whoever comes next may fill it again
            if from_shared:
                _write(target, piece, made)
            with self._turnstile.turn(index):
                _update(self._source_hashes, found[: piece.read[1]])
                _update(self._target_hashes, made[: piece.write[1]])
            if not from_shared:  # so that nobody waits for the disk
                _write(target, piece, made)
            if self.progress is not None:
                self.progress(piece.read[1])

    def _sides(self, index: int, piece: Piece, buffers: _Buffers) -> tuple[Bytes, Bytes]:
        """Returns what is read into and what is written from; where there is a step, one is the pass's buffer."""
        if piece.step is None:
            found = buffers.source(piece.read[1])
            return found, found if piece.rewrite is None else buffers.target(piece.write[1])
        shared = self._buffer_of(index, piece.step)
        if piece.rewrite is None:
            part = shared[piece.step.at : piece.step.at + piece.read[1] + piece.write[1]]
            return part, part
        if piece.read[1]:
            return buffers.source(piece.read[1]), shared
        return shared, buffers.target(piece.write[1])

    def _buffer_of(self, index: int, step: Step) -> Bytes:
        """Returns the pass's buffer when the step can begin."""
        self._turnstile.wait_for_all_before(index - step.place)
        with self._take:
            if self._buffer.size < step.size:  # nobody uses it: a step that fills it is the first to need more
                self._buffer = np.empty(0, np.uint8)  # the smaller one goes first
                self._buffer = pages(step.size)
            return self._buffer[: step.size]

    def _next_piece(self) -> tuple[int, Piece] | None:
        with self._take:
            return next(self._pieces, None)


class _Buffers:
    """Two buffers that grow to the largest piece and are reused."""

    def __init__(self) -> None:
        self._source = np.empty(0, np.uint8)
        self._target = np.empty(0, np.uint8)

    def source(self, size: int) -> Bytes:
        if self._source.size < size:
            self._source = np.empty(max(size, PIECE_BYTES), np.uint8)
        return self._source[:size]

    def target(self, size: int) -> Bytes:
        if self._target.size < size:
            self._target = np.empty(max(size, PIECE_BYTES), np.uint8)
        return self._target[:size]


def pages(size: int) -> Bytes:
    """Returns memory that goes back to the system when it is let go; `malloc` keeps some of this size for later.

    In large pages, where there are any: 29 MB are there in 2 ms instead of 15.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _update(hashes: Sequence[Hash], data: Bytes) -> None:
    for each in hashes:
        each.update(data.data)


def _read_exactly(stream: BinaryIO, offset: int, buffer: Bytes, name: str) -> None:
    stream.seek(offset)
    view = buffer.data
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise refuse(
                "truncated",
                "the file became shorter while it was read; make sure that nothing writes to the source",
                file=name,
            )
        view = view[count:]


def _write_exactly(stream: BinaryIO, offset: int, buffer: Bytes) -> None:
    stream.seek(offset)
    view = buffer.data
    while view:
        view = view[stream.write(view) :]


def _write(target: BinaryIO, piece: Piece, made: Bytes) -> None:
    """Writes what a piece has made, if anything."""
    if piece.write[1]:
        _write_exactly(target, piece.write[0], made)
        _write_back(target, *piece.write)


def _write_back(stream: BinaryIO, offset: int, length: int) -> None:
    """Keeps the disk busy, and close behind: it begins at once with what is written, and is waited for.

    So the final sync has little left to do, and the memory that the system needs for a file is a few megabytes, used
    again and again. That is more than thrift: fresh memory costs more than a copy where a virtual machine has to ask
    its host for it.
    """
    before, after = offset // WRITE_BACK_BYTES, (offset + length) // WRITE_BACK_BYTES
    if after == before:
        return
    begin, end = before * WRITE_BACK_BYTES, after * WRITE_BACK_BYTES
    start_writing_back(stream.fileno(), max(0, begin - WRITE_BACK_BYTES), end)  # what other threads wrote late, too
    if end > WRITE_BEHIND_BYTES:
        finish_writing_back(stream.fileno(), max(0, begin - WRITE_BEHIND_BYTES), end - WRITE_BEHIND_BYTES)


def rewrite_file(
    source: NamedPath,
    target: Path,
    pieces: Iterator[Piece],
    *,
    size: int = 0,
    prefix: bytes = b"",
    source_hashes: Sequence[Hash] = (),
    target_hashes: Sequence[Hash] = (),
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes ``target`` from ``source`` in one pass and makes it durable.

    Args:
        source: where it lies, and its name for messages.
        target: created or emptied; partial if anything is raised.
        size: bytes of the target, if it is known: so much room is set aside for it.
        pieces: in the order of both files; beyond the prefix they cover the target without holes.
        prefix: bytes the target begins with.
        source_hashes: see the bytes of the pieces as read, in order.
        target_hashes: see the prefix and the bytes of the pieces as written, in order.
        workers: how many threads.
        progress: called by any thread with the bytes read since its last call.

    Raises:
        CheckpointError: if the source ends early.
        OSError: if reading or writing fails.
    """
    with target.open("wb", buffering=0) as stream:
        reserve(stream.fileno(), size)
        _write_exactly(stream, 0, np.frombuffer(prefix, np.uint8))
        for each in target_hashes:
            each.update(prefix)
        shared = _Rewriter(source, target, pieces, source_hashes, target_hashes, progress)
        with _open_to_help(shared):
            _start_threads(shared, workers - 1)
            shared.enter()
            shared.work()
        try:
            shared.finish()
        except KeyboardInterrupt:  # met while waiting for the others
            shared.close()
            shared.finish()
            raise
        sync_file(stream.fileno())


def _start_threads(shared: _Rewriter, count: int) -> None:
    """Starts threads beside the caller's; fewer, where the system gives no more."""
    for _ in range(count):
        shared.enter()
        try:
            threading.Thread(target=shared.work, name="rewrite").start()
        except RuntimeError:
            shared.leave()
            return


_under_way: list[_Rewriter] = []
_under_way_lock = threading.Lock()


@contextmanager
def _open_to_help(shared: _Rewriter) -> Iterator[None]:
    """Lets threads that have nothing else to do join a pass while it is under way."""
    with _under_way_lock:
        _under_way.append(shared)
    try:
        yield
    except BaseException:
        shared.close()
        raise
    finally:
        with _under_way_lock:
            _under_way.remove(shared)


def help_others(progress: Callable[[int], None]) -> None:
    """Joins the passes that other threads are at, until none has work left. Their own threads tell what goes wrong.

    Args:
        progress: only passes that report to it are joined: those of the caller's own run.
    """
    helped: list[_Rewriter] = []
    while True:
        with _under_way_lock:
            shared = next((each for each in _under_way if each.progress is progress and each not in helped), None)
            if shared is None:
                return
            shared.enter()
        helped.append(shared)
        shared.work()


def digest_file(source: NamedPath, hashes: Sequence[Hash]) -> int:
    """Feeds a file to digests and returns its length in bytes.

    Args:
        source: where it lies, and its name for messages.
        hashes: see every byte, in order.
    """
    buffer = np.empty(PIECE_BYTES, np.uint8)
    size = 0
    with open_regular(*source) as stream:
        while count := stream.readinto(buffer.data):  # type: ignore[attr-defined]
            _update(hashes, buffer[:count])
            size += count
    return size
