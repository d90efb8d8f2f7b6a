"""Many conversions, one after the other or side by side: what is done stays done, and one failure stops no other.

What is left is decided by the record and by what is on the disk. An item counts as done if its record says so
and the output still has the manifest that was recorded, with every file in its length. A finished output that
the record does not tell of is compared with the source, completely, before it counts as done.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from awq2marlin.batch_file import BatchItem, check_entries, check_options, read_batch_file
from awq2marlin.batch_record import BatchRecord, ItemResult, open_record, read_record
from awq2marlin.checkpoint import open_checkpoint
from awq2marlin.conversion import DEFAULT_VERIFIED, convert, default_output
from awq2marlin.digest import xxh3_of_file
from awq2marlin.errors import (
    EXIT_DIFFERENCE,
    EXIT_DONE,
    EXIT_FAILED,
    Awq2MarlinError,
    BatchError,
    CheckpointError,
    DifferenceError,
    ExecutorError,
    HubError,
    OutputError,
    Problem,
    difference,
    printable,
    problem_from_os_error,
)
from awq2marlin.folder import CONFIG_FILENAME, Folder
from awq2marlin.hub import HUB_PREFIX, HubName, open_source, parse_source
from awq2marlin.manifest import read_manifest
from awq2marlin.output import read_journal
from awq2marlin.plan import plan_conversion
from awq2marlin.progress import Progress, Silence
from awq2marlin.publication import PushTarget
from awq2marlin.quantization import MANIFEST_FILENAME
from awq2marlin.side_files import encode_json
from awq2marlin.upload import push
from awq2marlin.verification import verify
from awq2marlin.workers import StoppedError, check_workers, run_side_by_side

#: Added to the name of a list for that of its record.
RECORD_SUFFIX = ".record.jsonl"

#: Options that decide neither what is written nor what is checked: the record leaves them out.
_PASSING = ("output", "workers", "commit_message")

_STATUS = {EXIT_DONE: "done", EXIT_FAILED: "failed", EXIT_DIFFERENCE: "difference"}


#: A list's file, or the list itself.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]


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
        """Does nothing."""

    def item(self, source: str, output: str) -> Progress:  # noqa: ARG002 - the protocol's
        """Returns what says nothing of an item."""
        return Silence()

    def done(self, result: ItemResult) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        items: what became of each item, in the list's order.
        file: the list's file; None if it was none.
        dry_run: whether nothing was written.
        record: the record's file; None if there is none.
        seconds: wall time.
    """

    items: tuple[ItemResult, ...]
    file: Path | None
    dry_run: bool
    record: Path | None
    seconds: float

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
        """What went wrong, each with its file's whole path."""
        return [
            replace(problem, file=os.path.join(item.source, problem.file))  # noqa: PTH118 - may be absolute or empty
            for item in self.failed
            for problem in item.errors
        ]

    @property
    def exit_code(self) -> int:
        """What ``awq2marlin batch`` ends with."""
        return EXIT_FAILED if self.failed else EXIT_DONE


@dataclass(frozen=True)
class _Job:
    """One item, with everything decided that can be without opening its source.

    Attributes:
        item: as the list says it.
        source: what tells this source from others: an absolute path, or ``hf://org/name[@revision]``.
        output: absolute path of the folder to write.
        options: keyword arguments of `convert` but ``output``.
    """

    item: BatchItem
    source: str
    output: Path
    options: Mapping[str, Any]

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options that the record remembers."""
        return {name: value for name, value in self.options.items() if name not in _PASSING}

    @property
    def target(self) -> PushTarget | None:
        """Where the result goes on the Hub, if it does.

        Raises:
            ValueError: if that cannot be.
        """
        if self.options["push_to"] is None:
            return None
        repo_id, private, revision, create_pr = (self.options[name] for name in _PUSHING)
        return PushTarget(repo_id, private, revision, create_pr, self.options["overwrite"])

    @property
    def passes_on(self) -> bool:
        """Whether the result goes to the Hub and nothing of it stays here."""
        return bool(self.options["low_disk"] and self.options["push_to"])

    def result(self, exit_code: int, **found: Any) -> ItemResult:
        """Returns a result of this item."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return ItemResult(
            **{
                "source": self.source,
                "output": str(self.output),
                "status": _STATUS[exit_code],
                "exit_code": exit_code,
                "options": self.recorded_options,
                "finished_at": now,
                **found,
            }
        )


#: Every option of an item that has a default; the same as `convert`'s.
_DEFAULTS: Mapping[str, Any] = {
    "unaligned": "keep",
    "verify": DEFAULT_VERIFIED,
    "device": None,
    "overwrite": False,
    "low_disk": False,
    "push_to": None,
    "private": False,
    "revision": None,
    "create_pr": False,
    "commit_message": None,
}

#: Options that say where a result goes on the Hub.
_PUSHING = ("push_to", "private", "revision", "create_pr")


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
    """Converts many checkpoints. Run again, it does only what is left.

    A failure of one item stops no other; what became of each stands in the result and in the record.

    Args:
        sources: a list's file, as `batch_file.read_batch_file` takes it, or the list itself: sources, and mappings
            with ``source`` and options, which are keyword arguments of `convert`.
        out_dir: folder for the outputs of all items; by default the working directory.
        jobs: items at the same time.
        workers: threads of all jobs together; by default one a processor, at most eight. With an executor, threads
            for one shard, by default one.
        part: (number, of how many): take only every so-manieth item, for several machines that share a list. By
            default all.
        retry_failed: try again what failed in an earlier run.
        record: JSONL file of what became of the items; by default the list's name with ``.record.jsonl``. A list
            that is no file has none by default, and then only the outputs tell what is done.
        dry_run: plan only; nothing is written.
        executor: does the shards of all items, as for `convert`.
        progress: told what is being done.
        **options: further options of every item that does not give them itself.

    Raises:
        BatchError: if anything is wrong with the list, the options or the record; nothing has been done.
        OutputError: if another process runs the same batch.
        ExecutorError: if the executor broke; what is left can be done by the same call.
        OSError: if the list cannot be read or the record not be written.
        ValueError: if ``jobs``, ``workers`` or ``part`` is out of range.
    """
    started = time.perf_counter()
    threads = check_workers(workers)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, found {jobs}")
    mine = _plan_jobs(sources, out_dir, part, options)
    path = Path(record) if record is not None else _default_record(sources, part)
    watcher = progress or _Silence()
    with _opened(path, dry_run) as remembered:
        results = {job.output: found for job in mine if (found := _known(job, remembered, retry_failed))}
        left = [job for job in mine if job.output not in results]
        watcher.start(len(mine), list(results.values()))

        def finish(done: tuple[_Job, ItemResult]) -> None:
            job, result = done
            results[job.output] = result
            if not dry_run:
                remembered.append(result)
            watcher.done(result)

        at_once = max(1, min(jobs, len(left)))
        share = max(1, threads // at_once) if executor is None else workers
        run = partial(_run, watcher=watcher, dry_run=dry_run, defaults={"workers": share, "executor": executor})
        try:
            run_side_by_side(run, left, at_once, lambda _count: None, finish)
        finally:
            watcher.finish()
    items = tuple(results[job.output] for job in mine)
    return BatchResult(items, _file(sources), dry_run, path, time.perf_counter() - started)


def _file(sources: Sources) -> Path | None:
    return Path(sources) if isinstance(sources, (str, os.PathLike)) else None


def batch_folders(
    sources: Sources,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    part: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[list[Path | HubName], list[Path]]:
    """Returns what `convert_many` would read, and the folders that it would write.

    Args:
        sources: as for `convert_many`, as all others are.
        out_dir: folder for the outputs.
        part: (number, of how many).
        **options: options of every item.

    Raises:
        BatchError: if anything is wrong with the list or the options.
    """
    jobs = _plan_jobs(sources, out_dir, part, options)
    return [parse_source(job.item.source) for job in jobs], [job.output for job in jobs]


def _default_record(sources: Sources, part: tuple[int, int] | None) -> Path | None:
    """Returns where the record of a list's file lies: beside it, one for each part."""
    file, (number, count) = _file(sources), part or (1, 1)
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


# --- before anything starts -------------------------------------------------------------------------------


def _plan_jobs(
    sources: Sources, out_dir: str | os.PathLike[str] | None, part: tuple[int, int] | None, options: Mapping[str, Any]
) -> list[_Job]:
    """Returns what is to be done by this part, in the list's order; all parts are checked.

    Raises:
        BatchError: with everything that is wrong with options and outputs.
        ValueError: if there is no such part.
    """
    number, count = part or (1, 1)
    if not 1 <= number <= count:
        raise ValueError(f"part must be (number, count) with 1 <= number <= count, found {part}")
    items = read_batch_file(Path(sources)) if isinstance(sources, (str, os.PathLike)) else check_entries(sources)
    wrong = list(check_options(options, "the options of all items"))
    if "output" in options:
        wrong.append("the options of all items: each item needs an output of its own; use out_dir")
    jobs = []
    for item in items:
        try:
            jobs.append(_job(item, Path(out_dir or ""), {**_DEFAULTS, **options}))
        except CheckpointError as error:  # its source cannot be a name
            wrong.append(f"{item.place}: {error}")
    for job in jobs:
        if job.options["device"] is not None and job.options["verify"] in ("none", 0):
            wrong.append(f"{job.item.place}: device needs verify: it runs the modules that are compared")
        if job.options["device"] is not None and job.options["low_disk"]:
            wrong.append(f"{job.item.place}: device needs the whole source at the end, which low_disk removes")
        wrong += (f"{job.item.place}: {each}" for each in _wrong_target(job))
    wrong += _clashes(jobs)
    if wrong:
        raise BatchError([Problem(str(_file(sources) or ""), "", "bad-batch", each) for each in wrong])
    return jobs[number - 1 :: count]


def _job(item: BatchItem, out_dir: Path, defaults: Mapping[str, Any]) -> _Job:
    name = parse_source(item.source)
    source = HUB_PREFIX + str(name) if isinstance(name, HubName) else os.path.realpath(name)
    output = item.options.get("output") or _default_output(name)
    path = Path(os.path.realpath(out_dir / output))
    options = {name: value for name, value in {**defaults, **item.options}.items() if name != "output"}
    owner = options["push_to"]
    if isinstance(owner, str) and "/" not in owner:
        options["push_to"] = f"{owner}/{path.name}"
    return _Job(item, source, path, options)


def _wrong_target(job: _Job) -> Iterator[str]:
    """Yields what is wrong with where an item shall go on the Hub."""
    alone = [name for name in (*_PUSHING, "commit_message") if name in job.item.options and name != "push_to"]
    if job.options["push_to"] is None and alone:
        yield f"{alone[0]} needs push_to"
    try:
        _ = job.target
    except ValueError as error:
        yield str(error)


def _default_output(source: Path | HubName) -> Path:
    """Returns what `convert` would write; also for a folder that is not there, whose item is going to fail."""
    try:
        return default_output(source)
    except CheckpointError:
        return Path(f"{Path(os.path.realpath(str(source))).name}-marlin")


def _clashes(jobs: Sequence[_Job]) -> Iterator[str]:
    """Yields every pair of items of which one would write where the other writes or reads."""
    outputs: dict[Path, _Job] = {}
    for job in jobs:
        other = outputs.setdefault(job.output, job)
        if other is not job:
            yield (
                f"{job.item.place}: its output {printable(str(job.output))} is that of {other.item.place} too; "
                "give one of them an 'output' of its own"
            )
    targets: dict[tuple[Any, Any], _Job] = {}
    for job in jobs:
        if job.options["push_to"] is not None:
            other = targets.setdefault((job.options["push_to"], job.options["revision"]), job)
            if other is not job:
                yield f"{job.item.place}: it would be pushed where {other.item.place} is; give it its own 'push_to'"
    sources = {Path(job.source): job for job in jobs if not job.source.startswith(HUB_PREFIX)}
    for job in jobs:
        for what, path, others in (
            ("its output lies in the output", job.output, outputs),
            ("its output lies in the source", job.output, sources),
            ("its source lies in the output", Path(job.source), outputs),
        ):
            for folder in (path, *path.parents):
                other = others.get(folder, job)
                if other.item is not job.item and not (folder == path and "output lies in the output" in what):
                    yield f"{job.item.place}: {what} of {other.item.place}; choose another"


# --- what is left -----------------------------------------------------------------------------------------


def _known(job: _Job, record: BatchRecord, retry_failed: bool) -> ItemResult | None:
    """Returns what became of an item in an earlier run, if nothing of it is left to do now."""
    last = record.last(str(job.output))
    if last is None or last.source != job.source:
        return None
    if last.exit_code == EXIT_DONE:
        passed_on = bool(last.options.get("low_disk") and last.options.get("push_to"))  # and nothing of it is here
        stands = passed_on == job.passes_on and (
            passed_on or (last.manifest is not None and _whole_manifest(job.output) == last.manifest)
        )
        return replace(last, earlier=True) if stands and _covers(last.options, job.options) else None
    is_same = dict(last.options) == job.recorded_options
    return replace(last, earlier=True) if is_same and not retry_failed else None


def _covers(done: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Returns whether what was done is all that is asked: the same bytes, compared as thoroughly, sent as far."""
    if done.get("unaligned") != asked["unaligned"]:
        return False
    if asked["device"] is not None and done.get("device") != asked["device"]:
        return False
    if asked["push_to"] is not None and any(done.get(name) != asked[name] for name in _PUSHING):
        return False
    return _thoroughness(done.get("verify")) >= _thoroughness(asked["verify"])


def _thoroughness(value: Any) -> float:
    words: dict[Any, float] = {"all": float("inf"), "none": 0}
    return words.get(value, value if type(value) is int else 0)


def _holds_finished(output: Path) -> bool:
    """Returns whether a folder looks like a finished conversion."""
    names = (CONFIG_FILENAME, MANIFEST_FILENAME)
    return all((output / name).is_file() for name in names) and read_journal(output) is None


def _whole_manifest(output: Path) -> str | None:
    """Returns the digest of the manifest of a finished conversion whose files all have their length, else None."""
    try:
        if not _holds_finished(output):
            return None
        folder = Folder.at(output)
        manifest = read_manifest(folder)
        sizes = {name: shard.target_size for name, shard in manifest.shards.items()}
        sizes |= {name: size for name, (size, _) in manifest.files.items()}
        if any(folder.size(name) != size for name, size in sizes.items()):
            return None
        return xxh3_of_file((folder.path(MANIFEST_FILENAME), MANIFEST_FILENAME))[1]
    except (Awq2MarlinError, OSError):
        return None


# --- one item ---------------------------------------------------------------------------------------------


class _Watched:
    """The progress of one item, which also tells the thread to stop when the batch does."""

    def __init__(self, progress: Progress, report: Callable[[int], None]) -> None:
        """Passes on to ``progress``; ``report`` raises when the work is to stop."""
        self._progress, self._report = progress, report

    def start(self, what: str, total: int) -> None:
        """A stage begins."""
        self._report(0)
        self._progress.start(what, total)

    def advance(self, count: int) -> None:
        """So many bytes are done."""
        self._report(count)
        self._progress.advance(count)

    def finish(self) -> None:
        """The stage is done."""
        self._progress.finish()

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._progress.note(text)


def _run(
    job: _Job, report: Callable[[int], None], *, watcher: BatchProgress, dry_run: bool, defaults: Mapping[str, Any]
) -> tuple[_Job, ItemResult]:
    """Does one item; what goes wrong with it becomes its result, but for an executor that can do no item."""
    report(0)
    started = time.perf_counter()
    progress = _Watched(watcher.item(job.item.source, str(job.output)), report)
    options = {**defaults, **{name: value for name, value in job.options.items() if value is not None}}
    try:
        result = _plan_only(job) if dry_run else _compare_finished(job, options["workers"], progress)
        result = result or _convert(job, options, progress)
    except Awq2MarlinError as error:
        if isinstance(error, ExecutorError) and error.problems[0].code != "killed-workers":
            raise  # it can do no other item either
        result = job.result(error.exit_code, errors=error.problems)
    except OSError as error:
        result = job.result(EXIT_FAILED, errors=(problem_from_os_error(error),))
    except MemoryError:
        problem = Problem("", "", "out-of-memory", "there is not enough memory; use fewer --workers or --jobs")
        result = job.result(EXIT_FAILED, errors=(problem,))
    except StoppedError:
        raise
    except Exception as error:  # a defect of ours: it must not cost the rest of a night's batch, nor be hidden
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}); this is a defect of "
            "awq2marlin: please report it, with what 'awq2marlin convert' prints for this source"
        )
        result = job.result(EXIT_FAILED, errors=(Problem("", "", "unexpected-error", message),))
    return job, replace(result, seconds=time.perf_counter() - started)


def _convert(job: _Job, options: Mapping[str, Any], progress: Progress) -> ItemResult:
    plain = {name: value for name, value in options.items() if name not in _PUSHING}
    try:
        done = convert(job.item.source, job.output, push_to=job.target, progress=progress, **plain)
    except HubError as error:
        if error.problems[0].code != "target-finished":
            raise
        progress.note("the repository holds this very conversion already")
        return job.result(EXIT_DONE, pushed=f"{HUB_PREFIX}{job.options['push_to']}")
    return job.result(
        EXIT_DONE,
        bytes=done.output_bytes,
        converted=len(done.converted),
        kept=len(done.kept),
        verified=len(done.verified),
        resumed=len(done.resumed),
        manifest=None if job.passes_on else _whole_manifest(job.output),
        pushed=done.pushed.url if done.pushed else None,
    )


def _plan_only(job: _Job) -> ItemResult:
    plan = plan_conversion(open_checkpoint(job.item.source), job.options["unaligned"])
    return job.result(
        EXIT_DONE, status="planned", bytes=plan.target_bytes, converted=len(plan.converted), kept=len(plan.kept)
    )


def _compare_finished(job: _Job, workers: int | None, progress: Progress) -> ItemResult | None:
    """Compares a finished output, which the record does not answer for, with the source, completely.

    Returns:
        The result, if it is what this item would give; None if there is no finished output, or one to replace.

    Raises:
        CheckpointError: if the source is no convertible AWQ checkpoint.
        OutputError: if the output is another one, and may not be replaced.
    """
    if not _holds_finished(job.output):
        return None
    folder = open_source(job.item.source)
    plan = plan_conversion(open_checkpoint(folder), job.options["unaligned"])
    progress.note(f"{job.output} is there already; it is compared with its source")
    try:
        if Folder.at(job.output).read(CONFIG_FILENAME) != encode_json(plan.config()):
            raise difference("config", "its config is another one", file=CONFIG_FILENAME)
        if job.options["low_disk"] and folder.origin is not None:
            verified = 0  # the source is not fetched again for that: its commit says that it is the same
            _check_recorded(job.output, folder.origin)
        else:
            device = job.options["device"]
            found = verify(job.item.source, job.output, workers=workers, device=device, progress=progress)
            verified = len(found.modules)
    except (CheckpointError, DifferenceError) as error:
        if job.options["overwrite"]:
            return None
        raise _not_this_one(job.output, error) from None
    return job.result(
        EXIT_DONE,
        bytes=plan.target_bytes,
        converted=len(plan.converted),
        kept=len(plan.kept),
        verified=verified,
        manifest=_whole_manifest(job.output),
        pushed=_push(job, progress),
    )


def _push(job: _Job, progress: Progress) -> str | None:
    """Sends a finished output to where it shall go, if anywhere; what is there already is not sent again."""
    target = job.target
    if target is None:
        return None
    sent = push(
        job.output,
        target.repo_id,
        private=target.private,
        revision=target.revision,
        create_pr=target.create_pr,
        commit_message=job.options["commit_message"],
        overwrite=target.overwrite,
        progress=progress,
    )
    return sent.url


def _check_recorded(output: Path, origin: tuple[str, str]) -> None:
    """Raises DifferenceError unless an output was made from a commit, and its files are those that it was."""
    folder = Folder.at(output)
    manifest = read_manifest(folder)
    if (manifest.repo_id, manifest.revision) != origin:
        raise difference("manifest", f"it was made from {manifest.repo_id}@{manifest.revision}")
    recorded = {name: (shard.target_size, shard.target_digest) for name, shard in manifest.shards.items()}
    for name, expected in (recorded | dict(manifest.files)).items():
        if xxh3_of_file((folder.path(name), name)) != expected:
            raise difference("manifest", "it is not the file that was written", file=name)


def _not_this_one(output: Path, error: Awq2MarlinError) -> OutputError:
    message = (
        f"the folder holds a finished conversion that is not what this item gives ({error.problems[0]}); "
        "use --overwrite to replace it, or choose another"
    )
    return OutputError(Problem(str(output), "", "not-empty", message))
