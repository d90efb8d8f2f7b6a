"""The way of the shards: fetched, converted, given their names; where disk is scarce, compared and released at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from awq2marlin.errors import CheckpointError, ExecutorError, Problem
from awq2marlin.io.folder import Folder
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers, run_on_executor, run_side_by_side, share_workers
from awq2marlin.layout.modules import ModulePlan, module_name
from awq2marlin.pipeline.arrivals import arriving
from awq2marlin.pipeline.output import FinishedFile, OutputFolder
from awq2marlin.pipeline.plan import Plan, ShardPlan
from awq2marlin.pipeline.shard import ShardResult, ShardTask, convert_shard
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.sampling import Layers, sample_modules

if TYPE_CHECKING:
    from awq2marlin.pipeline.departures import Departures

#: How many shards an executor is given at once; its workers should never wait for the next.
MAX_IN_FLIGHT = 64


@dataclass(frozen=True)
class Work:
    """How a conversion is done; nothing here changes a byte of the output.

    Attributes:
        workers: threads, of this process or for one shard of an executor; None for the default.
        executor: does the shards instead of threads of this process.
        verify: how many converted modules to compare with the source.
        compares_early: whether each shard is compared with its source as soon as it is converted, while the next is
            fetched; otherwise all are in the end.
        low_disk: whether each source shard is released after that.
        progress: told what is being done.
    """

    workers: int | None
    executor: Executor | None
    verify: Layers
    compares_early: bool
    low_disk: bool
    progress: Progress

    def chosen(self, plan: Plan) -> list[ModulePlan]:
        """Returns the modules that are compared."""
        return sample_modules(plan.converted, self.verify) if self.verify else []

    @property
    def early_check(self) -> str:
        """What the journal notes of the comparison where it comes before; empty where it comes at the end."""
        return f"verify {self.verify}" if self.compares_early else ""


def two_largest(sizes: Sequence[int]) -> int:
    """Returns how many bytes of shards are here at the same time where disk is scarce: of two of them."""
    return sum(sorted(sizes)[-2:])


def convert_shards(plan: Plan, out: OutputFolder, work: Work, departures: Departures | None = None) -> None:
    """Converts the shards that are not finished, each as it arrives.

    Args:
        plan: the whole plan.
        out: where they go.
        work: how.
        departures: sends every finished shard on, those of earlier runs too.

    Raises:
        DifferenceError: if a comparison finds a difference.
        Awq2MarlinError: whatever else stops it; what is finished stays.
    """
    folder, progress = plan.checkpoint.folder, work.progress
    todo = {shard.name: shard for shard in plan.shards if shard.name not in out.finished}
    files = {name: shard.source.file_size for name, shard in todo.items()}
    chosen = work.chosen(plan) if work.compares_early else []

    def finish(done: ShardResult) -> None:
        _publish(done, out)
        if work.executor is not None:  # from elsewhere, nothing is heard until a shard is done
            progress.advance(todo[done.name].source.data_size)
        if work.compares_early:
            _compare(plan, todo[done.name], chosen, out, check_workers(work.workers))
        out.remember(done.name, _journal_entry(done, work))
        if work.low_disk:
            arrivals.release(done.name)
        if departures is not None:
            departures.send(done.name)

    _announce(plan, out, todo, progress, departures is not None)
    if departures is not None:
        for name in out.finished:
            departures.send(name)
    room = two_largest([*files.values()]) if work.low_disk else None
    with arriving(folder, files, progress.advance, room) as arrivals:
        if work.executor is None:
            at_once, threads = share_workers(check_workers(work.workers), 1 if work.low_disk else len(todo))
        else:
            at_once, threads = MAX_IN_FLIGHT, check_workers(work.workers or 1)
        tasks = (
            ShardTask(todo[name], folder.path(name), out.partial(name), threads, folder.sha256(name))
            for name in arrivals
        )
        with _released_if_spoilt(folder):
            if work.executor is None:
                run_side_by_side(convert_shard, tasks, at_once, progress.advance, finish)
            else:
                run_on_executor(work.executor, convert_shard, tasks, at_once, finish)
    if departures is not None:
        departures.wait()
    progress.finish()


def _announce(plan: Plan, out: OutputFolder, todo: Mapping[str, ShardPlan], progress: Progress, are_sent: bool) -> None:
    """Tells what begins: one stage, in which all bytes are counted that are fetched, converted and sent."""
    steps = {"convert": sum(shard.source.data_size for shard in todo.values())}
    if plan.checkpoint.folder.origin is not None:
        steps = {"fetch": sum(shard.source.file_size for shard in todo.values())} | steps
    if are_sent:
        unsent = [shard for shard in plan.shards if shard.name in todo or not out.finished[shard.name].sent]
        steps["push"] = sum(shard.target.file_size for shard in unsent)
    progress.start(" and ".join(steps), sum(steps.values()))


@contextmanager
def _released_if_spoilt(folder: Folder) -> Iterator[None]:
    """Removes a file that was fetched to a place of our own and is not what was promised: a rerun fetches it anew."""
    try:
        yield
    except CheckpointError as error:
        for problem in error.problems:
            folder.release(problem.file)
        raise


def _publish(done: ShardResult, out: OutputFolder) -> None:
    """Gives a converted shard its name, unless a worker of an executor wrote it where this process cannot see it."""
    if not done.partial.is_file():
        raise ExecutorError(
            Problem(
                done.name,
                "",
                "not-shared",
                f"a worker wrote {done.partial}, but this process does not see it; "
                "the output folder must lie on storage that all workers share",
            )
        )
    out.publish(done.name, done.partial)


def _journal_entry(done: ShardResult, work: Work) -> FinishedFile:
    return FinishedFile(done.source_size, done.source_digest, done.target_size, done.target_digest, work.early_check)


def _compare(plan: Plan, shard: ShardPlan, chosen: Sequence[ModulePlan], out: OutputFolder, workers: int) -> None:
    """Compares those tensors of the chosen modules that lie in a shard, before its source goes."""
    from awq2marlin.verification.compare import verify_modules

    source = TensorFiles.of(plan.checkpoint.folder, {shard.name: shard.source})
    folder = Folder.at(out.root)
    output = TensorFiles.of(folder, {shard.name: folder.read_header(shard.name)})
    here = [
        replace(module, parts=tuple(part for part in module.parts if module_name(module.name, part) in source.shard_of))
        for module in chosen
    ]
    with out.distrusted_after_a_difference():
        verify_modules(here, plan.quantization, source, output, workers=workers, progress=Silence())
