"""`convert`, on one page: open, plan, look ahead, move every shard, verify, commit.

Data flows one way. Nothing is written before the whole plan stands, nothing is loadable before it is
verified, and no step looks back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from awq2marlin.checkpoint.files import CANNOT_HOLD
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.commands.options import ConvertOptions, Verify, check_helpers
from awq2marlin.formats.names import CARD_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import target_named
from awq2marlin.formats.serving import Serving
from awq2marlin.layout.modules import ModulePlan, Unaligned
from awq2marlin.pipeline.checks import Checks
from awq2marlin.pipeline.model_card import model_card
from awq2marlin.pipeline.output import OutputFolder, refuse_overlap
from awq2marlin.pipeline.plan import Plan, plan_conversion
from awq2marlin.pipeline.preflight import (
    LOW_DISK_IGNORED,
    hindrances,
    open_source_of_run,
    open_target,
    output_folder,
    owned_files,
    refuse_full_disk,
)
from awq2marlin.pipeline.record import manifest_of, refuse_unreadable
from awq2marlin.pipeline.resume import trusted_shards
from awq2marlin.pipeline.run import Work, run
from awq2marlin.pipeline.sink import Sink, Stay, open_sink
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.sampling import Device, check_device

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.hub.identity import PushResult
    from awq2marlin.hub.publication import Publication, PushTarget
    from awq2marlin.pipeline.departures import Relay


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: the source's folder, or ``org/name@commit``.
        output: the output's folder.
        dry_run: whether nothing was written.
        modules: every quantized module's fate, in order.
        shards: bytes of every output shard, by name.
        files: bytes of every side file carried over, by name.
        left_behind: files of the source that are not carried over, with the reason.
        warnings: what is to know of the source, and which files are left behind.
        source_bytes: bytes of the source's shards.
        output_bytes: bytes of the output's shards.
        resumed: shards that an earlier run had finished.
        verified: modules compared value for value.
        gemm: what the Marlin GEMM said of them; None if it was not asked.
        seconds: wall time.
        pushed: what came of ``push_to``; None without it.
        to: the layout of the converted modules, for people.
        layout: that layout, as reports name it.
        unserved: why vLLM cannot serve the output, in words; empty if it can.
        lacks: what the output's file system cannot do, and what that means.
        left_behind_bytes: bytes of the files that are not carried over, by name.
        serving: how each engine serves the output, or why it cannot.
        hindrances: with ``dry_run``, what would stop a run.
    """

    source: Path | str
    output: Path
    dry_run: bool
    modules: tuple[ModulePlan, ...]
    shards: Mapping[str, int]
    files: Mapping[str, int]
    left_behind: Mapping[str, str]
    warnings: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    resumed: tuple[str, ...]
    verified: tuple[str, ...]
    gemm: GemmRun | None
    seconds: float
    pushed: PushResult | None = None
    to: str = "Marlin"
    layout: str = "marlin"
    unserved: str = ""
    lacks: tuple[str, ...] = ()
    left_behind_bytes: Mapping[str, int] = field(default_factory=dict)
    serving: tuple[Serving, ...] = ()
    hindrances: tuple[str, ...] = ()

    @property
    def written_bytes(self) -> int:
        """Bytes of the shards that this run wrote, or in a dry run would write; earlier runs wrote the others."""
        return sum(size for name, size in self.shards.items() if name not in self.resumed)

    @property
    def converted(self) -> list[ModulePlan]:
        """The modules that took the layout of the format."""
        return [module for module in self.modules if module.converted]

    @property
    def kept(self) -> list[ModulePlan]:
        """The quantized modules that stayed in AWQ layout, each with its reason."""
        return [module for module in self.modules if not module.converted]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    unaligned: Unaligned | None = ConvertOptions.unaligned,
    workers: int | None = None,
    overwrite: bool = False,
    verify: Verify = ConvertOptions.verify,
    dry_run: bool = False,
    device: Device | None = None,
    executor: Executor | None = None,
    low_disk: bool = False,
    push_to: str | PushTarget | None = None,
    commit_message: str | None = None,
    to: str | None = ConvertOptions.to,
    carry: Sequence[str] = ConvertOptions.carry,
    leave: Sequence[str] = ConvertOptions.leave,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts a checkpoint to another format, by default to the Marlin-native one (docs/marlin-native.md).

    If it is interrupted, call it again: it resumes, and ends with the same bytes.

    Args:
        source: checkpoint folder, which is never written to; or Hub repository, ``org/name[@revision]`` or
            ``hf://org/name[@revision]``, whose next shard is downloaded while one is converted.
        output: folder to write; by default ``./<name>-marlin``.
        unaligned: what to do with modules whose shapes Marlin cannot take: ``"keep"`` them in AWQ layout (the
            default), ``"pad"`` them with zeros, or ``"error"``.
        workers: number of threads; by default one per CPU, at most eight. With an executor, threads for one shard, by
            default one.
        overwrite: replace an earlier conversion in ``output``; removes only files that its own manifest or journal
            lists.
        verify: how many converted modules to compare with the source, value for value, before the output can be
            loaded; or ``"all"`` or ``"none"``.
        dry_run: plan only; nothing is written.
        device: also run those modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` or ``"auto"``.
        executor: converts the shards in its workers (threads, processes, Dask, MPI) instead of in threads of this
            process. The workers must see source and output under the same paths. Everything else is done here.
        low_disk: download the source's shards to the output folder, compare each with its conversion at once, then
            delete it, so there are never more than two. With ``push_to``, finished shards are uploaded while others
            are converted, each in its own commit, and deleted here; nothing is left in ``output``.
        push_to: Hub repository to upload the result to, ``org/name`` or a `PushTarget`; in one commit at the end,
            unless ``low_disk``.
        commit_message: first line of the commit messages.
        to: the format to write: ``"marlin"`` (the default), ``"awq"`` or ``"compressed-tensors"``. By default the
            output is then ``./<name>-marlin``, ``./<name>-awq`` or ``./<name>-ct``.
        carry: patterns (``*.bin``, ``original/*``) of files to carry over, unopened, that would otherwise be left
            behind; without an index also of ``.safetensors`` files that hold no tensors of the model.
        leave: patterns of files to leave behind. A file that both match is carried over.
        follow_links: also follow links that lead out of the folder, but only to regular files; ``progress`` receives
            each link with its target before anything is read. Not with ``push_to``.
        progress: receives what is being done.

    Raises:
        CheckpointError: if the source cannot be converted; nothing has been written then. Or if it holds something
            that `revert` could not restore; the output cannot be loaded then.
        HubError: if the Hub or the network refuses.
        UnavailableError: if the machine lacks what ``device`` needs.
        OutputError: if the output folder is not ours, in use, full or unwritable.
        ExecutorError: if the executor broke, or its workers do not see the same files.
        ValueError: if an argument has a wrong value, or cannot be used with another; see `ConvertOptions`.
        DifferenceError: if the verification finds a difference; the output has no ``config.json`` then.
    """
    options = ConvertOptions(
        unaligned,
        workers,
        overwrite,
        verify,
        dry_run,
        device,
        low_disk,
        push_to,
        commit_message,
        to,
        carry,
        leave,
        follow_links,
    )
    check_helpers(executor, progress)
    check_device(device)
    target, progress = options.target, progress or Silence()
    started = time.perf_counter()
    root = output_folder(output, source, target_named(to).output_suffix)
    folder, pinned = open_source_of_run(
        source, root, overwrite=overwrite, low_disk=low_disk, progress=progress, follow_links=follow_links
    )
    plan = plan_conversion(open_checkpoint(folder, options.choice), unaligned, to)
    refuse_unreadable(plan)
    refuse_overlap(folder.root, root)
    publication = None if target is None else open_target(target, plan, root, overwrite)
    ignored = [LOW_DISK_IGNORED] if low_disk and folder.origin is None and target is None else []
    place = target.repo_id if target and low_disk else str(root)
    result = _planned(plan, root, ignored, place)
    if dry_run:
        owned, stays = partial(owned_files, root, overwrite), target is None or not low_disk
        would_stop = hindrances(plan.transfer, root, owned, stays=stays, low_disk=low_disk)
        result = replace(result, hindrances=would_stop)
    else:
        checks = Checks(plan, root, 0 if verify == "none" else verify, device, workers, progress)
        work = Work(progress, workers, executor, low_disk)
        if low_disk or folder.origin is not None:  # each shard while the next is fetched, not all at the end
            work = replace(work, compare=checks.compare_shard, check=checks.name)
        relay = partial(_relay, publication, commit_message, plan) if publication and low_disk else None
        with open_sink(plan.transfer, root, partial(owned_files, root, overwrite), pinned, progress, relay) as sink:
            resumed = trusted_shards(plan.transfer, sink, work)
            refuse_full_disk(plan.transfer, sink, work)
            files = run(plan.transfer, sink, work)
            plan = plan.without(sink.out.left, CANNOT_HOLD)
            sink.out.write(MANIFEST_FILENAME, manifest_of(plan, sink.out.finished, files).encode())
            gemm = checks.compare_output(sink.out, are_compared=work.compare is not None)
            sink.out.write(CARD_FILENAME, _card(plan, checks, gemm))
            sink.commit(plan.transfer.config)
            pushed = _pushed(sink, publication, commit_message, progress)
        result = replace(
            _planned(plan, root, ignored, place),
            dry_run=False,
            resumed=tuple(resumed),
            verified=checks.chosen_names,
            gemm=gemm,
            pushed=pushed,
            lacks=sink.out.lacks,
        )
    return replace(result, seconds=time.perf_counter() - started)


def _relay(publication: Publication, message: str | None, plan: Plan, out: OutputFolder) -> Relay:
    """Returns the sink that passes every finished file on to the Hub."""
    from awq2marlin.pipeline.departures import Relay

    return Relay(out, publication, message, plan.transfer)


def _pushed(sink: Sink, publication: Publication | None, message: str | None, progress: Progress) -> PushResult | None:
    """Sends a whole output to the Hub, unless it was passed on file by file."""
    if publication is None:
        return None
    if not isinstance(sink, Stay):
        return cast("Relay", sink).result()
    from awq2marlin.commands.push import push_folder

    return push_folder(sink.out.root, publication.target, message, False, progress)


def _card(plan: Plan, checks: Checks, gemm: GemmRun | None) -> bytes:
    repo_id, revision = plan.checkpoint.folder.origin or (None, None)
    return model_card(plan, checks.chosen_names, gemm, repo_id=repo_id, revision=revision)


def _planned(plan: Plan, root: Path, ignored: Sequence[str], place: str) -> ConvertResult:
    """Returns the result of a dry run: what would be done, which options do nothing, and how to serve it."""
    checkpoint = plan.checkpoint
    return ConvertResult(
        source=checkpoint.folder.where,
        output=root,
        dry_run=True,
        modules=tuple(plan.modules.values()),
        shards={shard.name: shard.target.file_size for shard in plan.shards},
        files={name: checkpoint.folder.size(name) for name in checkpoint.side_files},
        left_behind=checkpoint.left_behind,
        warnings=(*checkpoint.warnings, *ignored),
        source_bytes=plan.source_bytes,
        output_bytes=plan.target_bytes,
        resumed=(),
        verified=(),
        gemm=None,
        seconds=0.0,
        to=plan.target.layout_title,
        layout=plan.target.layout_name,
        unserved=plan.parallel_sizes.unserved if plan.parallel_sizes else "",
        left_behind_bytes=checkpoint.left_behind_bytes,
        serving=plan.serving(place),
    )
