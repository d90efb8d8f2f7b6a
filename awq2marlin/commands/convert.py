"""The converter's story, on one page: open, plan, convert shard by shard, carry the rest, verify, commit.

Data flows one way. Nothing is written before the whole plan stands, nothing is loadable before it is
verified, and no step looks back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin.checkpoint.names import CARD_FILENAME, CONFIG_FILENAME
from awq2marlin.checkpoint.source import open_checkpoint
from awq2marlin.commands.options import ConvertOptions, Unaligned, Verify
from awq2marlin.hub.name import parse_source
from awq2marlin.io.folder import Folder
from awq2marlin.io.strict_json import encode_json
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.pipeline.carried import carry_side_files, refuse_unreadable, write_manifest
from awq2marlin.pipeline.model_card import model_card
from awq2marlin.pipeline.output import FinishedFile, OutputFolder, claim, refuse_overlap, told_as_output_error
from awq2marlin.pipeline.plan import Plan, plan_conversion
from awq2marlin.pipeline.preflight import (
    default_output,
    open_source_of_run,
    open_target,
    output_names,
    owned_files,
    refuse_full_disk,
)
from awq2marlin.pipeline.run import Work, convert_shards
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.sampling import Device, check_device

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.hub.identity import PushResult
    from awq2marlin.hub.publication import Publication, PushTarget


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
        warnings: oddities of the source that do no harm.
        source_bytes: bytes of the source's shards.
        output_bytes: bytes of the output's shards.
        resumed: shards that an earlier run had finished.
        verified: modules compared value for value.
        gemm: what the Marlin GEMM said of them; None if it was not asked.
        seconds: wall time.
        pushed: what came of ``push_to``; None without it.
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

    @property
    def converted(self) -> list[ModulePlan]:
        """The modules that became Marlin."""
        return [module for module in self.modules if module.converted]

    @property
    def kept(self) -> list[ModulePlan]:
        """The quantized modules that stayed in AWQ layout, each with its reason."""
        return [module for module in self.modules if not module.converted]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    unaligned: Unaligned = "keep",
    workers: int | None = None,
    overwrite: bool = False,
    verify: Verify = ConvertOptions.verify,
    dry_run: bool = False,
    device: Device | None = None,
    executor: Executor | None = None,
    low_disk: bool = False,
    push_to: str | PushTarget | None = None,
    commit_message: str | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts an AWQ checkpoint to a Marlin-native one (docs/marlin-native.md).

    Interrupted at any moment, the same call resumes and ends with the same bytes.

    Args:
        source: folder of the AWQ checkpoint, never written to; or a repository of the Hub, ``org/name[@revision]``
            or ``hf://org/name[@revision]``, whose next shard is fetched while one is converted.
        output: folder to write; by default ``./<name>-marlin``.
        unaligned: what to do with modules whose shapes Marlin cannot take: ``"keep"`` them in AWQ layout,
            ``"pad"`` them with zeros, or ``"error"``.
        workers: threads; by default as many as there are processors, at most eight. With an executor, threads
            for one shard, by default one.
        overwrite: remove an earlier conversion in ``output`` first: only files that its own manifest or
            journal names.
        verify: how many converted modules to compare with the source, value for value, before the output
            becomes loadable; ``"all"`` or ``"none"``.
        dry_run: plan only; nothing is written.
        device: also run those modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` or ``"auto"``.
        executor: does the shards instead of threads of this process: of threads or processes, Dask's, MPI's. Its
            workers must see source and output under the same paths. Everything else is done here.
        low_disk: fetch the source's shards to a place of our own, compare each with its conversion at once, and then
            remove it, so that never more than two are there. With ``push_to`` finished shards are sent while others
            are converted, each in a commit of its own, and removed here; nothing is left in ``output``.
        push_to: repository of the Hub that the result is sent to, ``org/name`` or a `PushTarget`; in one commit once
            all is done, unless ``low_disk``.
        commit_message: first line of the commits' messages.
        progress: told what is being done.

    Raises:
        CheckpointError: if the source is no convertible AWQ checkpoint; nothing has been written.
        HubError: if the Hub or the network refuses.
        OutputError: if the output folder is foreign, in use, full or unwritable.
        ExecutorError: if the executor broke, or its workers do not see the same files.
        ValueError: if an argument is none of its choices, or does not go with another; see `ConvertOptions`.
        DifferenceError: if the verification finds a difference; the output has no ``config.json`` then.
    """
    options = ConvertOptions(unaligned, workers, overwrite, verify, dry_run, device, low_disk, push_to, commit_message)
    check_device(device)
    target = options.target
    started = time.perf_counter()
    progress = progress or Silence()
    root = Path(output) if output is not None else default_output(parse_source(source))
    folder, pinned = open_source_of_run(source, root, overwrite=overwrite, low_disk=low_disk, progress=progress)
    early = low_disk or folder.origin is not None
    work = Work(workers, executor, 0 if verify == "none" else verify, early, low_disk, progress)
    plan = plan_conversion(open_checkpoint(folder), unaligned)
    refuse_unreadable(plan)
    refuse_overlap(folder.root, root)
    publication = None if target is None else open_target(target, plan, root, overwrite)
    resumed: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    gemm: GemmRun | None = None
    pushed: PushResult | None = None
    if not dry_run:
        owned = partial(owned_files, root, overwrite)
        names = output_names(plan)
        with told_as_output_error(root), claim(root, plan.digest, names, owned=owned, pinned=pinned) as out:
            passing = publication if low_disk else None
            resumed = _trusted_shards(plan, out, work, passing)
            refuse_full_disk(plan, out, low_disk=low_disk, is_passed_on=passing is not None)
            verified = tuple(module.name for module in work.chosen(plan))
            if passing is not None:
                pushed = _pass_on(plan, out, work, passing, commit_message)
            else:
                gemm = _complete(plan, out, work, device)
                if publication is not None:
                    pushed = _push(root, publication, commit_message, progress)
        if passing is not None:
            with suppress(OSError):  # not empty: there is something that is not ours
                root.rmdir()
    return _result(plan, root, dry_run, resumed, verified, gemm, pushed, time.perf_counter() - started)


def _complete(plan: Plan, out: OutputFolder, work: Work, device: Device | None) -> GemmRun | None:
    """Makes the output whole: shards, side files, manifest, comparison, card, and ``config.json`` last."""
    convert_shards(plan, out, work)
    write_manifest(plan, out, carry_side_files(plan, out))
    gemm = _verify(plan, out, work, device)
    _write_card(plan, out, work, gemm)
    out.commit(encode_json(plan.config()))
    return gemm


def _push(root: Path, publication: Publication, message: str | None, progress: Progress) -> PushResult:
    from awq2marlin.commands.push import push_folder

    return push_folder(root, publication.target, message, False, progress)


def _pass_on(plan: Plan, out: OutputFolder, work: Work, publication: Publication, message: str | None) -> PushResult:
    """Converts shards and sends each to the Hub, where the checkpoint becomes whole; nothing of it stays here."""
    from awq2marlin.hub.identity import PushResult
    from awq2marlin.hub.publication import DEFAULT_MESSAGE
    from awq2marlin.pipeline.departures import departing

    started, created, removed = time.perf_counter(), not publication.exists, publication.stale
    with departing(publication, out, message or DEFAULT_MESSAGE, work.progress) as departures:
        convert_shards(plan, out, work, departures)
        write_manifest(plan, out, carry_side_files(plan, out))
        _write_card(plan, out, work, None)
        shards = {shard.name for shard in plan.shards}
        rest = [name for name in output_names(plan) if name not in shards and name != CONFIG_FILENAME]
        departures.send_rest(rest, encode_json(plan.config()))
    out.discard()
    return PushResult(
        source=out.root,
        repo_id=publication.repo_id,
        revision=publication.revision,
        url=publication.url,
        commit=publication.commits[-1] if publication.commits else None,
        pull_request=publication.pull_request,
        created=created,
        dry_run=False,
        files=tuple(sorted(departures.files, key=lambda file: file.name)),
        removed=removed,
        left_behind={},
        seconds=time.perf_counter() - started,
    )


def _write_card(plan: Plan, out: OutputFolder, work: Work, gemm: GemmRun | None) -> None:
    verified = [module.name for module in work.chosen(plan)]
    repo_id, revision = plan.checkpoint.folder.origin or (None, None)
    out.write(CARD_FILENAME, model_card(plan, verified, gemm, repo_id=repo_id, revision=revision))


def _trusted_shards(plan: Plan, out: OutputFolder, work: Work, publication: Publication | None) -> tuple[str, ...]:
    """Returns the shards that an earlier run finished, source and output hashed again.

    The contents of a repository's files are fixed by its commit, so they are not fetched again to be hashed. What was
    sent is trusted if ``publication`` has it.
    """
    folder = plan.checkpoint.folder
    if work.compares_early:  # what was not compared as this run is asked to, cannot be any more: its source may be gone
        for name in [name for name, entry in out.finished.items() if entry.verified != work.early_check]:
            out.forget(name)
    for name, entry in [*out.finished.items()]:
        if entry.sent and not (publication is not None and _is_there(name, entry, publication)):
            out.forget(name)
    trusted = tuple(
        shard.name
        for shard in plan.shards
        if shard.name in out.finished
        and (
            out.finished[shard.name].sent
            or out.recheck(shard.name, None if folder.origin else folder.path(shard.name), work.progress.note)
        )
    )
    if trusted:
        work.progress.note(f"resuming: {len(trusted)} of {len(plan.shards)} shards are already there")
    return trusted


def _is_there(name: str, sent: FinishedFile, publication: Publication) -> bool:
    from awq2marlin.hub.publication import FileIdentity

    return publication.has(name, FileIdentity(sent.target_size, sent.sent))


def _verify(plan: Plan, out: OutputFolder, work: Work, device: Device | None) -> GemmRun | None:
    """Compares converted modules with the source, from the disk, before the output becomes loadable."""
    chosen, workers = work.chosen(plan), check_workers(work.workers)
    if not chosen or (work.compares_early and device is None):
        return None
    from awq2marlin.verification.compare import run_gemm, verify_modules

    source = TensorFiles.of(plan.checkpoint.folder, plan.checkpoint.shards)
    folder = Folder.at(out.root)
    output = TensorFiles.of(folder, {shard.name: folder.read_header(shard.name) for shard in plan.shards})
    with out.distrusted_after_a_difference():
        if not work.compares_early:
            verify_modules(chosen, plan.quantization, source, output, workers=workers, progress=work.progress)
        return run_gemm(chosen, plan.quantization, source, output, device, work.progress)


def _result(
    plan: Plan,
    root: Path,
    dry_run: bool,
    resumed: tuple[str, ...],
    verified: tuple[str, ...],
    gemm: GemmRun | None,
    pushed: PushResult | None,
    seconds: float,
) -> ConvertResult:
    checkpoint = plan.checkpoint
    return ConvertResult(
        source=checkpoint.folder.where,
        output=root,
        dry_run=dry_run,
        modules=tuple(plan.modules.values()),
        shards={shard.name: shard.target.file_size for shard in plan.shards},
        files={name: checkpoint.folder.size(name) for name in checkpoint.side_files},
        left_behind=checkpoint.left_behind,
        warnings=checkpoint.warnings,
        source_bytes=plan.source_bytes,
        output_bytes=plan.target_bytes,
        resumed=resumed,
        verified=verified,
        gemm=gemm,
        seconds=seconds,
        pushed=pushed,
    )
