"""Running a transfer: each shard, as it arrives, is rewritten, compared, named and handed on; then all other files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from awq2marlin.errors import CheckpointError, DifferenceError, ExecutorError, Problem, difference
from awq2marlin.io.digest import FileDigest, Xxh3, digest_of, hexdigest
from awq2marlin.io.folder import other_contents
from awq2marlin.io.source import Source
from awq2marlin.io.stream import NamedPath, copy_pieces, rewrite_file
from awq2marlin.io.workers import check_workers, run_on_executor, run_side_by_side, share_workers
from awq2marlin.pipeline.arrivals import arriving
from awq2marlin.pipeline.journal import FinishedFile
from awq2marlin.pipeline.output import OutputFolder
from awq2marlin.pipeline.shard import ShardResult, ShardTask, rewrite_shard
from awq2marlin.pipeline.sink import Sink
from awq2marlin.pipeline.transfer import ShardPlan, Transfer
from awq2marlin.progress import Progress, Silence, Stage

#: How many shards an executor is given at once; its workers should never wait for the next.
MAX_IN_FLIGHT = 64

#: Files that are carried over have a stage of their own if they are larger than this, together.
LARGE_BYTES = 50_000_000


@dataclass(frozen=True)
class Work:
    """How a transfer is done; nothing here changes a byte of the output.

    Attributes:
        progress: told what is being done.
        workers: threads, of this process or for one shard of an executor; None for the default.
        executor: does the shards instead of threads of this process.
        low_disk: whether each source shard is released as soon as its output is finished.
        with_sha256: whether the SHA-256 of every file is asked for.
        compare: called with each shard once it has its name, before the journal remembers it; raises if it differs.
        check: what the journal notes of that comparison; empty without one.
    """

    progress: Progress
    workers: int | None = None
    executor: Executor | None = None
    low_disk: bool = False
    with_sha256: bool = False
    compare: Callable[[ShardPlan], None] | None = None
    check: str = ""


def two_largest(sizes: Sequence[int]) -> int:
    """Returns how many bytes of shards are here at the same time where disk is scarce: of two of them."""
    return sum(sorted(sizes)[-2:])


def run(transfer: Transfer, sink: Sink, work: Work) -> dict[str, FileDigest]:
    """Makes every file of a transfer but those that come later; what is finished already is not made again.

    Args:
        transfer: what to read and write.
        sink: where finished shards go.
        work: how.

    Returns:
        What each file that was made is known by.

    Raises:
        DifferenceError: if a comparison finds a difference, or a file is not what was recorded.
        Awq2MarlinError: whatever else stops it; what is finished stays.
    """
    made = {**_move_shards(transfer, sink, work), **_carry_all(transfer, sink.out, work)}
    for name, data in transfer.texts.items():
        sink.out.write(name, data)
        made[name] = digest_of(data, sha256=work.with_sha256)
    return made


def _move_shards(transfer: Transfer, sink: Sink, work: Work) -> dict[str, FileDigest]:
    source, out = transfer.source, sink.out
    todo = {shard.name: shard for shard in transfer.shards if shard.name not in out.finished}
    sizes = {name: shard.source.file_size for name, shard in todo.items()}
    made: dict[str, FileDigest] = {}

    def finish(done: ShardResult) -> None:
        _refuse_unexpected(done, transfer)
        _publish(done, out)
        if work.executor is not None:  # from elsewhere, nothing is heard until a shard is done
            advance(todo[done.name].source.data_size)
        if work.compare is not None:
            with distrusted_after_a_difference(out):
                work.compare(todo[done.name])
        out.remember(done.name, _journal_entry(done, work))
        if work.low_disk:
            arrivals.release(done.name)
        made[done.name] = done.target
        sink.finished(done.name)

    stage = _announce(transfer, todo, sink, work.progress)
    advance = stage.step(transfer.verb)
    sink.begin(stage.step("push"))
    room = two_largest([*sizes.values()]) if work.low_disk else None
    with arriving(source, sizes, stage.step("fetch"), room) as arrivals:
        at_once, threads = _share(work, len(todo))
        tasks = (_task(todo[name], source, out.partial(name), threads, work.with_sha256) for name in arrivals)
        with _released_if_spoilt(source):
            if work.executor is None:
                run_side_by_side(rewrite_shard, tasks, at_once, advance, finish)
            else:
                run_on_executor(work.executor, rewrite_shard, tasks, at_once, finish)
    sink.wait()
    work.progress.finish()
    return made


def _task(plan: ShardPlan, source: Source, target: Path, threads: int, with_sha256: bool) -> ShardTask:
    """Returns the task of a shard that is here; of other files that are not, the bytes that it needs are fetched."""
    others, fetched = {}, {}
    for place in plan.beside:
        if source.origin is None:
            others[place.file] = source.path(place.file)
        else:
            fetched[place] = source.read_range(*place)
    name = plan.name
    return ShardTask(plan, source.path(name), target, threads, source.sha256(name), with_sha256, others, fetched)


def _share(work: Work, shards: int) -> tuple[int, int]:
    """Returns how many shards are worked on at once, and with how many threads each."""
    if work.executor is not None:
        return MAX_IN_FLIGHT, check_workers(work.workers or 1)
    return share_workers(check_workers(work.workers), 1 if work.low_disk else shards)


def _announce(transfer: Transfer, todo: Mapping[str, ShardPlan], sink: Sink, progress: Progress) -> Stage:
    """Tells what begins: one stage of the bytes that are rewritten, whether they are fetched and sent too or not."""
    steps: dict[str, int] = {transfer.verb: sum(shard.source.data_size for shard in todo.values())}
    if transfer.source.origin is not None:
        steps = {"fetch": sum(shard.source.file_size for shard in todo.values())} | steps
    steps |= sink.steps(transfer.shards)
    return Stage(progress, " and ".join(steps), steps[transfer.verb] or max(steps.values()), steps)


@contextmanager
def _released_if_spoilt(source: Source) -> Iterator[None]:
    """Removes a file that was fetched to a place of our own and is not what was promised: a rerun fetches it anew."""
    try:
        yield
    except CheckpointError as error:
        for problem in error.problems:
            source.release(problem.file)
        raise


@contextmanager
def distrusted_after_a_difference(out: OutputFolder) -> Iterator[None]:
    """Forgets all shards if a comparison of one with its source fails in the context."""
    try:
        yield
    except DifferenceError:
        out.forget_all()
        raise


def _refuse_unexpected(done: ShardResult, transfer: Transfer) -> None:
    """Compares a shard with what was recorded of it, on both sides, before it gets its name."""
    expected = transfer.expected.get(done.name)
    if expected is None:
        return
    if not expected.source.is_of(done.source):
        raise difference(
            "wrong-digest",
            f"this file differs from the one that the conversion wrote (recorded {expected.source}; found "
            f"{done.source}); it was changed or damaged afterwards: download it again, or convert the source again",
            file=done.name,
        )
    if expected.target is not None and not expected.target.is_of(done.target):
        raise difference(
            "wrong-digest",
            f"the restored file differs from the original: recorded {expected.target}; restored {done.target}",
            file=done.name,
        )


def _publish(done: ShardResult, out: OutputFolder) -> None:
    """Gives a rewritten shard its name, unless a worker of an executor wrote it where this process cannot see it."""
    if not done.partial.is_file():
        raise ExecutorError(
            Problem(
                done.name,
                "",
                "not-shared",
                f"a worker wrote {done.partial}, but this process does not see it; "
                "the output folder must be on storage that all workers share",
            )
        )
    out.publish(done.name, done.partial)


def _journal_entry(done: ShardResult, work: Work) -> FinishedFile:
    source, target = (FileDigest(file.size, file.xxh3) for file in (done.source, done.target))
    return FinishedFile(source, target, work.check)


def _carry_all(transfer: Transfer, out: OutputFolder, work: Work) -> dict[str, FileDigest]:
    """Copies all files that belong to the checkpoint unchanged; a stage of its own where that takes a while."""
    source, progress = transfer.source, work.progress
    total = sum(map(source.size, transfer.carried))
    is_told = total >= LARGE_BYTES
    if is_told:
        progress.start("carry over", total)
    work = work if is_told else replace(work, progress=Silence())
    made = {name: _carry(name, expected, source, out, work) for name, expected in transfer.carried.items()}
    if is_told:
        progress.finish()
    return {name: found for name, found in made.items() if found is not None}


def _carry(name: str, expected: FileDigest | None, source: Source, out: OutputFolder, work: Work) -> FileDigest | None:
    """Copies a file that belongs to the checkpoint unchanged; returns None if the output cannot hold its name."""
    promised, size, path = source.sha256(name), source.size(name), source.fetch(name, work.progress.advance)
    xxh3, sha256 = Xxh3(), hashlib.sha256() if work.with_sha256 or promised else None
    hashes = [each for each in (xxh3, sha256) if each]
    read = work.progress.advance if source.origin is None else None  # of a repository, what comes is counted
    pieces = copy_pieces(0, 0, size)
    rewrite_file(NamedPath(path, name), out.partial(name), pieces, size=size, target_hashes=hashes, progress=read)
    if sha256 and promised and sha256.hexdigest() != promised:
        out.partial(name).unlink()
        source.release(name)
        raise other_contents(name, path, sha256.hexdigest(), promised)
    found = FileDigest(size, str(xxh3), hexdigest(sha256 if work.with_sha256 else None))
    if expected is not None and not expected.is_of(found):
        raise difference(
            "wrong-digest",
            f"the file differs from the original: recorded {expected}; found {found}; it was changed "
            "after the conversion",
            file=name,
        )
    named = out.publish_unless_unnameable(name)
    source.release(name)
    return found if named else None
