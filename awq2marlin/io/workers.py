"""How many threads to use, and running shards side by side: with them, or by an executor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

from awq2marlin.errors import ExecutorError, Problem
from awq2marlin.io.stream import help_others

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
    tasks: Iterable[_Task],
    at_once: int,
    advance: Callable[[int], None],
    finish: Callable[[_Done], None],
) -> None:
    """Calls ``function`` on every task, several at once, in threads of this process.

    If one fails, or the user interrupts, the others are stopped at their next report of progress.

    Args:
        function: called with a task and with where to report progress, in bytes.
        tasks: what to do; each is taken when there is a thread for it.
        at_once: how many at the same time.
        advance: told of the progress of all of them.
        finish: called in this thread with each result, in the order in which they come.

    Raises:
        Exception: what the first task that failed raised, or ``tasks``, or ``finish``.
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

    def then_help() -> Iterator[_Task]:
        yield from tasks
        for _ in range(at_once - 1):  # what a thread does when no task is left
            pool.submit(help_others, report)

    with ThreadPoolExecutor(at_once, thread_name_prefix="shard") as pool:
        try:
            run_on_executor(pool, lambda task: function(task, report), then_help(), at_once, finish)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_on_executor(
    executor: Executor,
    function: Callable[[_Task], _Done],
    tasks: Iterable[_Task],
    in_flight: int,
    finish: Callable[[_Done], None],
) -> None:
    """Calls ``function`` on every task by an executor: threads, processes, or a cluster.

    If one fails, or the user interrupts, those that have not begun are cancelled. Those that have cannot be
    stopped from here, and are not waited for.

    Args:
        executor: any; it stays open.
        function: called with a task; picklable where the executor needs that, as tasks and results are.
        tasks: what to do; each is taken when there is room for it, by a thread of its own, so that waiting for
            one holds up nothing else.
        in_flight: how many the executor has at the same time.
        finish: called in this thread with each result, in the order in which they come.

    Raises:
        ExecutorError: if the executor broke, or gave a task up.
        Exception: what the first task that failed raised, or ``tasks``, or ``finish``.
    """
    feed = _Feed(executor, function, tasks, in_flight)
    try:
        for done in feed.results():
            finish(done)
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        raise told from None
    finally:
        feed.stop()


def _told(error: Exception) -> ExecutorError | None:
    """Returns in words what went wrong with the executor itself; None if the error is the task's own."""
    name = type(error).__name__
    resumes = "what is finished is kept: run the same command again to continue"
    if isinstance(error, (BrokenExecutor, CancelledError)):
        message = f"a worker died, possibly out of memory, or the executor was shut down ({name}); {resumes}"
        return ExecutorError(Problem("", "", "broken-executor", message))
    if name == "KilledWorker":  # Dask's; nothing of Dask is imported here
        message = f"several workers died one after another on the same shard, possibly out of memory; {resumes}"
        return ExecutorError(Problem("", "", "killed-workers", message))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("awq2marlin"):
        message = f"a worker has no awq2marlin, or an older one ({error}); install the same version on all of them"
        return ExecutorError(Problem("", "", "other-version", message))
    return None


class _Feed(Generic[_Task, _Done]):
    """Hands tasks to an executor as there is room, and gives the results back as they come."""

    def __init__(
        self, executor: Executor, function: Callable[[_Task], _Done], tasks: Iterable[_Task], in_flight: int
    ) -> None:
        self._executor, self._function, self._tasks = executor, function, iter(tasks)
        self._room = threading.Semaphore(in_flight)
        self._lock = threading.Lock()
        self._under_way: set[Future[_Done]] = set()
        self._stopped = False
        #: Finished tasks; then how many there are in all, or why there are no more.
        self._events: SimpleQueue[Future[_Done] | int | BaseException] = SimpleQueue()
        threading.Thread(target=self._feed, name="feed", daemon=True).start()

    def results(self) -> Iterator[_Done]:
        """Yields results in the order in which they come; raises what the first failure raised."""
        received, total = 0, None
        while received != total:
            event = self._events.get()
            if isinstance(event, int):
                total = event
            elif isinstance(event, BaseException):
                raise event
            else:
                received += 1
                yield event.result()

    def stop(self) -> None:
        """Submits nothing more, and cancels what has not begun."""
        with self._lock:
            self._stopped = True
            under_way = list(self._under_way)
        self._room.release()
        for future in under_way:
            future.cancel()

    def _feed(self) -> None:
        count = 0
        try:
            while self._has_room() and self._submit(next(self._tasks)):
                count += 1
        except StopIteration:
            self._events.put(count)
        except BaseException as error:
            self._events.put(error)

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._stopped

    def _submit(self, task: _Task) -> bool:
        with self._lock:
            if self._stopped:
                return False
            future = self._executor.submit(self._function, task)
            self._under_way.add(future)
        future.add_done_callback(self._finished)
        return True

    def _finished(self, future: Future[_Done]) -> None:
        with self._lock:
            self._under_way.discard(future)
            self._stopped = self._stopped or future.cancelled() or future.exception() is not None
        self._events.put(future)
        self._room.release()
