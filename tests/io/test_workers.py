"""Threads: shared among shards, and never lent to another call's work."""

import threading
import time

import pytest

from awq2marlin.io.stream import NamedPath, copy_pieces, rewrite_file
from awq2marlin.io.workers import check_workers, run_side_by_side, share_workers


@pytest.mark.parametrize(
    ("workers", "shards", "expected"), [(1, 5, (1, 1)), (2, 1, (1, 2)), (2, 5, (2, 1)), (8, 3, (3, 2)), (4, 0, (1, 4))]
)
def test_shards_come_first_then_threads_on_one_shard(workers, shards, expected):
    assert share_workers(workers, shards) == expected


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, found 0"):
        check_workers(0)


def test_idle_threads_help_in_their_own_run_only(tmp_path):
    """A short call returns when it is done, though a long one is under way in the same process."""
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (32 << 12))  # 16 pieces

    def slow(task, report):
        def tell(count):
            time.sleep(task[1])
            report(count)

        pieces = copy_pieces(0, 0, source.stat().st_size)
        rewrite_file(NamedPath(source, "source"), tmp_path / task[0], pieces, progress=tell)
        return task[0]

    def run(name, pause, ended):
        run_side_by_side(slow, [(f"{name}1", pause), (f"{name}2", pause)], 2, lambda _: None, lambda _: None)
        ended.append((name, time.monotonic()))

    ended: list[tuple[str, float]] = []
    long = threading.Thread(target=run, args=("long", 0.05, ended))
    long.start()
    run("short", 0.001, ended)
    long.join()
    assert [name for name, _ in ended] == ["short", "long"]
    for name in ("long1", "long2", "short1", "short2"):
        assert (tmp_path / name).read_bytes() == source.read_bytes()


def test_a_failure_stops_the_other_shards_and_is_the_one_that_is_told():
    stopped = []

    def work(task, report):
        if task == "bad":
            raise KeyError("this one")
        try:
            for _ in range(1000):
                time.sleep(0.002)
                report(1)
        except Exception as error:
            stopped.append(type(error).__name__)
            raise

    with pytest.raises(KeyError, match="this one"):
        run_side_by_side(work, ["good", "bad", "never"], 2, lambda _: None, lambda _: None)
    assert stopped == ["StoppedError"]
