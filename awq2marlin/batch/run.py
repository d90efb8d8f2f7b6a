"""Many conversions, one after the other or side by side: what is done stays done, and one failure stops no other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from awq2marlin.arguments import Checked, Workers
from awq2marlin.batch.item import known, run_job
from awq2marlin.batch.jobs import Job, Sources, list_file, plan_jobs
from awq2marlin.batch.record import BatchRecord, ItemResult, open_record, read_record
from awq2marlin.errors import EXIT_DONE, EXIT_FAILED, Problem
from awq2marlin.io.workers import check_workers, run_side_by_side
from awq2marlin.pipeline.preflight import Disk, disks
from awq2marlin.progress import Progress, Silence

#: Added to the name of a list for that of its record.
RECORD_SUFFIX = ".record.jsonl"

#: How the codes of problems begin that name a repository instead of a file.
_OF_REPOSITORIES = ("hub-", "target-")


@runtime_checkable
class BatchProgress(Protocol):
    """Receives what a batch is doing."""

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        """The batch begins: how many items it has, and what became of some of them in earlier runs."""

    def item(self, source: str, output: str) -> Progress:
        """An item begins; returns where its conversion tells its progress. Called by any thread."""

    def done(self, result: ItemResult) -> None:
        """An item that began has ended."""

    def finish(self) -> None:
        """The batch has ended, or was interrupted."""


class _Silence:
    """Says nothing of a batch."""

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        pass

    def item(self, source: str, output: str) -> Progress:  # noqa: ARG002 - the protocol's
        return Silence()

    def done(self, result: ItemResult) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class BatchOptions(Checked):
    """How `convert_many` works; its docstring says what each means."""

    jobs: Workers = 1
    workers: Workers | None = None
    retry_failed: bool = False
    dry_run: bool = False
    executor: Executor | None = None
    progress: BatchProgress | None = None


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        items: what became of each item, in the list's order.
        file: the list's file; None if it was none.
        dry_run: whether nothing was written.
        record: the record's file; None if there is none.
        seconds: wall time.
        disks: in a dry run, the disks on which something is needed.
    """

    items: tuple[ItemResult, ...]
    file: Path | None
    dry_run: bool
    record: Path | None
    seconds: float
    disks: tuple[Disk, ...] = ()

    @property
    def done(self) -> list[ItemResult]:
        """The items that are done, or in a dry run could be."""
        return [item for item in self.items if item.exit_code == EXIT_DONE]

    @property
    def failed(self) -> list[ItemResult]:
        """The items that failed, now or in an earlier run."""
        return [item for item in self.items if item.exit_code != EXIT_DONE]

    @property
    def problems(self) -> list[Problem]:
        """What went wrong, each with its file's whole path, or with the repository of the Hub that refused."""
        return [
            problem if problem.code.startswith(_OF_REPOSITORIES) else _placed(problem, item.source)
            for item in self.failed
            for problem in item.errors
        ]

    @property
    def exit_code(self) -> int:
        """What ``awq2marlin batch`` ends with."""
        return EXIT_FAILED if self.failed else EXIT_DONE


def convert_many(
    sources: Sources,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    record: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    executor: Executor | None = None,
    progress: BatchProgress | None = None,
    **options: Any,
) -> BatchResult:
    """Converts many checkpoints. Call it again, and it does only what is left.

    If one item fails, the others go on; the result and the record say what happened to each.

    Args:
        sources: file of a list, as `batch.file.read_batch_file` reads it, or the list itself: sources, and mappings
            with ``source`` and options, which are keyword arguments of `convert`.
        out_dir: folder for the outputs of all items; by default the working directory.
        jobs: items at the same time.
        workers: number of threads for all jobs together; by default one per CPU, at most eight. With an executor,
            threads for one shard, by default one.
        part: (number, count): take only every count-th item, for several machines that share a list. By default all.
        retry_failed: also try again what failed in an earlier run.
        record: JSONL file that records the result of each item; by default the list's name with ``.record.jsonl``. A
            list that is not a file has none by default, and then only the outputs show what is done.
        dry_run: plan only; nothing is written.
        executor: converts the shards of all items, as for `convert`.
        progress: receives what is being done.
        **options: options for every item that does not set them itself.

    Raises:
        BatchError: if anything is wrong with the list, the options or the record; nothing has been done.
        OutputError: if another process runs the same batch.
        ExecutorError: if the executor broke; call again to do what is left.
        OSError: if the list cannot be read or the record cannot be written.
        ValueError: if an argument has a wrong value, or there is no such part.
    """
    started = time.perf_counter()
    BatchOptions(jobs, workers, retry_failed, dry_run, executor, progress)  # which check themselves
    threads = check_workers(workers)
    mine = plan_jobs(sources, out_dir, part, options)
    path = Path(record) if record is not None else _default_record(sources, part)
    watcher = progress or _Silence()
    with _opened(path, dry_run) as remembered:
        results = {job.output: found for job in mine if (found := known(job, remembered, retry_failed))}
        left = [job for job in mine if job.output not in results]
        watcher.start(len(mine), list(results.values()))

        def finish(done: tuple[Job, ItemResult]) -> None:
            job, result = done
            results[job.output] = result
            if not dry_run:
                remembered.append(result)
            watcher.done(result)

        at_once = max(1, min(jobs, len(left)))
        share = max(1, threads // at_once) if executor is None else workers

        def run(job: Job, report: Callable[[int], None]) -> tuple[Job, ItemResult]:
            report(0)
            told = _Watched(watcher.item(job.item.source, str(job.output)), report)
            return job, run_job(job, told, dry_run=dry_run, workers=share, executor=executor)

        try:
            run_side_by_side(run, left, at_once, lambda _count: None, finish)
        finally:
            watcher.finish()
    items = tuple(results[job.output] for job in mine)
    needed = tuple(disks((need for item in items for need in item.needs), at_once))
    return BatchResult(items, list_file(sources), dry_run, path, time.perf_counter() - started, needed)


def _placed(problem: Problem, source: str) -> Problem:
    """Returns a problem with its file's whole path; the source itself it may name as the list does."""
    if os.path.realpath(problem.file) == source:
        return replace(problem, file=source)
    return replace(problem, file=os.path.join(source, problem.file))  # noqa: PTH118 - may be absolute or empty


def _default_record(sources: Sources, part: tuple[int, int] | None) -> Path | None:
    """Returns where the record of a list's file lies: beside it, one for each part."""
    file, (number, count) = list_file(sources), part or (1, 1)
    if file is None:
        return None
    return file.with_name(f"{file.name}{f'.{number}-of-{count}' if count > 1 else ''}{RECORD_SUFFIX}")


@contextmanager
def _opened(path: Path | None, dry_run: bool) -> Iterator[BatchRecord]:
    """Opens the record; a dry run locks and writes nothing, and without a path there is none."""
    if path is not None and not dry_run:
        with open_record(path) as record:
            yield record
    else:
        yield BatchRecord(None, read_record(path) if path is not None else {})


class _Watched:
    """The progress of one item, which also tells the thread to stop when the batch does."""

    def __init__(self, progress: Progress, report: Callable[[int], None]) -> None:
        """Passes on to ``progress``; ``report`` raises when the work is to stop."""
        self._progress, self._report = progress, report

    def start(self, what: str, total: int) -> None:
        self._report(0)
        self._progress.start(what, total)

    def advance(self, count: int) -> None:
        self._report(count)
        self._progress.advance(count)

    def finish(self) -> None:
        self._progress.finish()

    def note(self, text: str) -> None:
        self._progress.note(text)
