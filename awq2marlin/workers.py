"""How many threads to use, and running shards side by side with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from awq2marlin.stream import help_others

#: Beyond this many, memory bandwidth and the disk are the limit, not the processors.
MAX_DEFAULT_WORKERS = 8

_Task = TypeVar("_Task")
_Done = TypeVar("_Done")


def default_workers() -> int:
    """Returns the number of processors this process may use, at most `MAX_DEFAULT_WORKERS`."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_DEFAULT_WORKERS)


def check_workers(workers: int | None) -> int:
    """Returns how many threads to use.

    Args:
        workers: as the caller says; None for `default_workers`.

    Raises:
        ValueError: if it is below 1.
    """
    if workers is None:
        return default_workers()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    return workers


def share_workers(workers: int, shards: int) -> tuple[int, int]:
    """Returns how many shards to work on at once, and with how many threads each.

    The system lets one thread at a time write a file, so each thread has a shard of its own as long as there are
    enough; then those that have none left help with the others.

    Args:
        workers: threads there shall be.
        shards: shards there are.
    """
    at_once = max(1, min(workers, shards))
    return at_once, workers // at_once


class StoppedError(Exception):
    """Raised in a thread to stop it, because another failed or the user interrupted."""


def run_side_by_side(
    function: Callable[[_Task, Callable[[int], None]], _Done],
    tasks: Sequence[_Task],
    at_once: int,
    advance: Callable[[int], None],
    finish: Callable[[_Done], None],
) -> None:
    """Calls ``function`` on every task, several at once.

    If one fails, or the user interrupts, the others are stopped at their next report of progress.

    Args:
        function: called with a task and with where to report progress, in bytes.
        tasks: what to do.
        at_once: how many at the same time.
        advance: told of the progress of all of them.
        finish: called in this thread with each result, in the order in which they come.

    Raises:
        Exception: what the first task that failed raised, or ``finish``.
    """
    if at_once == 1:
        for task in tasks:
            finish(function(task, advance))
        return
    stopped = threading.Event()

    def report(count: int) -> None:
        if stopped.is_set():
            raise StoppedError
        advance(count)

    with ThreadPoolExecutor(at_once, thread_name_prefix="shard") as pool:
        try:
            running = [pool.submit(function, task, report) for task in tasks]
            for _ in range(at_once - 1):  # what a thread does when no task is left
                pool.submit(help_others, report)
            for each in as_completed(running):
                finish(each.result())
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
