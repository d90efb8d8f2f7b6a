"""One pass over a file where some pieces fill a buffer that others empty, as a tensor needs that has N first."""

import hashlib
import threading
import time
from functools import partial

import numpy as np
import pytest

from awq2marlin.errors import CheckpointError
from awq2marlin.io import stream
from awq2marlin.io.stream import NamedPath, Piece, Step, copy_pieces, help_others, rewrite_file
from awq2marlin.io.workers import run_side_by_side

PART = 1000


def fill(at, found, buffer):
    buffer[at : at + found.size] = found


def take_reversed(at, buffer, made):
    """The bytes of the whole buffer in reverse: whatever is taken first was filled last."""
    made[:] = buffer[::-1][at : at + made.size]


def no_change(_number):
    """Does nothing before a piece of this number."""


class Reversal:
    """Reverses a run of a file as a whole: it is read in parts, then written in parts of another size."""

    def __init__(self, size, before_fill=no_change, before_take=no_change):
        self.size, self.before_fill, self.before_take = size, before_fill, before_take

    def pieces(self, at):
        for place, start in enumerate(range(0, self.size, PART)):
            read = at + start, min(PART, self.size - start)
            yield Piece(read, (at, 0), partial(self._fill, place, start), Step(place, self.size))
        for place, start in enumerate(range(0, self.size, 2 * PART)):
            write = at + start, min(2 * PART, self.size - start)
            yield Piece((at + self.size, 0), write, partial(self._take, place, start), Step(place, self.size))

    def _fill(self, place, at, found, buffer):
        assert buffer.size == self.size
        self.before_fill(place)
        fill(at, found, buffer)

    def _take(self, place, at, buffer, made):
        assert buffer.size == self.size
        self.before_take(place)
        take_reversed(at, buffer, made)


class ReadStraight(Reversal):
    """As a `Reversal`, but bytes are read straight into the buffer."""

    def pieces(self, at):
        for piece in super().pieces(at):
            if piece.read[1]:
                piece = Piece(piece.read, piece.write, None, Step(piece.step.place, self.size, piece.read[0] - at))
            yield piece


class WrittenStraight(Reversal):
    """As a `Reversal`, but the buffer is filled in reverse and written straight."""

    def pieces(self, at):
        for piece in super().pieces(at):
            if piece.write[1]:
                piece = Piece(piece.read, piece.write, None, Step(piece.step.place, self.size, piece.write[0] - at))
            yield piece

    def _fill(self, place, at, found, buffer):
        self.before_fill(place)
        buffer[buffer.size - at - found.size : buffer.size - at] = found[::-1]


def random_bytes(size):
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


class Case:
    """A file of runs, some reversed and some copied, and what becomes of it."""

    def __init__(self, folder, *runs):
        self.source, self.target = folder / "source", folder / "target"
        sizes = [run if isinstance(run, int) else run.size for run in runs]
        data = random_bytes(sum(sizes))
        self.source.write_bytes(data)
        self.data, self.runs, self.sizes, self.expected, at = data, runs, sizes, b"", 0
        for run, size in zip(runs, sizes, strict=True):
            part = data[at : at + size]
            self.expected += part if isinstance(run, int) else part[::-1]
            at += size

    def pieces(self):
        at = 0
        for run, size in zip(self.runs, self.sizes, strict=True):
            yield from copy_pieces(at, at, size) if isinstance(run, int) else run.pieces(at)
            at += size

    def rewrite(self, **options):
        return rewrite_file(NamedPath(self.source, "source"), self.target, self.pieces(), **options)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_digests_see_both_files_in_order_whatever_the_threads(tmp_path, workers):
    case = Case(tmp_path, 5, Reversal(10 * PART), Reversal(3 * PART + 7), 7 * PART, Reversal(25 * PART), Reversal(1), 9)
    read, written, reported = hashlib.sha256(), hashlib.sha256(), []
    case.rewrite(source_hashes=[read], target_hashes=[written], workers=workers, progress=reported.append)
    assert case.target.read_bytes() == case.expected
    assert read.digest() == hashlib.sha256(case.data).digest()
    assert written.digest() == hashlib.sha256(case.expected).digest()
    assert sum(reported) == len(case.data)


def test_a_step_begins_when_all_before_it_is_through_however_slow(tmp_path):
    """Threads that have nothing to fill wait, and those that would fill again wait for the last that takes."""

    def slow(_place):
        time.sleep(0.002 * (_place % 3))

    case = Case(tmp_path, *(Reversal(size * PART, slow, slow) for size in (9, 4, 11, 2)))
    case.rewrite(workers=6)
    assert case.target.read_bytes() == case.expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_go_straight_into_the_buffer_and_straight_out_of_it(tmp_path, workers, monkeypatch):
    """Nobody fills it again while some of it is still to be written, however slow the disk."""
    write = stream._write_exactly

    def write_slowly(file, offset, data):
        time.sleep(0.001 * (offset // PART % 3))
        write(file, offset, data)

    monkeypatch.setattr(stream, "_write_exactly", write_slowly)
    kinds = WrittenStraight, ReadStraight, Reversal
    case = Case(tmp_path, *(kind(size * PART + 3) for size in (7, 4, 11, 2) for kind in kinds), 3 * PART)
    read, written = hashlib.sha256(), hashlib.sha256()
    case.rewrite(source_hashes=[read], target_hashes=[written], workers=workers)
    assert case.target.read_bytes() == case.expected
    assert read.digest() == hashlib.sha256(case.data).digest()
    assert written.digest() == hashlib.sha256(case.expected).digest()


def test_the_buffer_is_one_for_all_threads_and_grows_to_the_largest_run(tmp_path, monkeypatch):
    sizes = []
    pages = stream.pages
    monkeypatch.setattr(stream, "pages", lambda size: sizes.append(size) or pages(size))
    case = Case(tmp_path, *(Reversal(size * PART) for size in (4, 2, 9, 9, 3)))
    case.rewrite(workers=4)
    assert case.target.read_bytes() == case.expected
    assert sizes == [4 * PART, 9 * PART]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("step", ["before_fill", "before_take"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_an_error_in_the_middle_is_told_and_nobody_waits_for_ever(tmp_path, workers, step, place):
    def fail(number):
        if number == place:
            raise KeyError("this one")
        time.sleep(0.001)

    case = Case(tmp_path, 3 * PART, Reversal(5 * PART), Reversal(9 * PART, **{step: fail}), Reversal(5 * PART))
    before = threading.active_count()
    with pytest.raises(KeyError, match="this one"):
        case.rewrite(workers=workers)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_that_ends_while_the_buffer_is_filled_is_refused_by_name(tmp_path, workers):
    case = Case(tmp_path, 3 * PART, Reversal(9 * PART))
    case.source.write_bytes(case.data[: 6 * PART])
    with pytest.raises(CheckpointError, match="became shorter") as caught:
        case.rewrite(workers=workers)
    assert [(each.file, each.code) for each in caught.value.problems] == [("source", "truncated")]


def test_a_thread_that_is_stopped_by_its_report_stops_the_others(tmp_path):
    def report(_count):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Case(tmp_path, Reversal(20 * PART)).rewrite(workers=4, progress=report)


def test_helping_threads_take_part_in_both_steps(tmp_path):
    """They join when the pass is under way, and share its buffer."""
    names, joined = {"fill": set(), "take": set()}, threading.Event()

    def seen(step):
        def note(_place):
            joined.wait(10)
            names[step].add(threading.current_thread().name)
            time.sleep(0.002)

        return note

    def report(_count):
        pass

    case = Case(tmp_path, Reversal(40 * PART, seen("fill"), seen("take")))
    main = threading.Thread(target=case.rewrite, kwargs={"progress": report}, name="owner")
    main.start()
    while not stream._under_way:
        time.sleep(0.001)
    helper = threading.Thread(target=help_others, args=(report,), name="helper")
    helper.start()
    joined.set()
    for thread in (main, helper):
        thread.join(30)
        assert not thread.is_alive()
    assert names == {"fill": {"owner", "helper"}, "take": {"owner", "helper"}}
    assert case.target.read_bytes() == case.expected


def test_files_side_by_side_have_a_buffer_each(tmp_path):
    cases = []
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        cases.append(Case(tmp_path / str(number), 10, *(Reversal((number + size) * PART) for size in (3, 8, 1))))

    run_side_by_side(lambda case, report: case.rewrite(progress=report), cases, 3, lambda _: None, lambda _: None)
    for case in cases:
        assert case.target.read_bytes() == case.expected
