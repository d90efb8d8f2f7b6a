"""`verify`: are two checkpoints the same model, value for value?"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from awq2marlin.arguments import ArgumentError
from awq2marlin.checkpoint.choice import Recorded
from awq2marlin.checkpoint.converted import as_source_of, is_source_of, open_with_manifest
from awq2marlin.checkpoint.counterparts import Counterparts, Row
from awq2marlin.checkpoint.files import left_behind_warning
from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.checkpoint.pairing import pair
from awq2marlin.checkpoint.source import SourceCheckpoint
from awq2marlin.commands.options import VerifyOptions, check_helpers
from awq2marlin.errors import CheckpointError, DifferenceError, Problem, difference, printable
from awq2marlin.formats.registry import DEFAULT_TARGET
from awq2marlin.hub.repository import open_source
from awq2marlin.io.digest import FileDigest, digest_of_file
from awq2marlin.io.safetensors import TensorIndex
from awq2marlin.io.source import Source
from awq2marlin.io.stream import NamedPath
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.pipeline.journal import refuse_unfinished
from awq2marlin.progress import Progress, Silence, Stage
from awq2marlin.verification.checkpoints import compare_checkpoints
from awq2marlin.verification.differences import Differences
from awq2marlin.verification.headers import compare_configs, compare_headers, compare_side_files
from awq2marlin.verification.numbers import Side
from awq2marlin.verification.sampling import Device, Modules, check_device, sample_modules
from awq2marlin.verification.values import Comparison, Job, run_gemm, run_jobs

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun

#: A checkpoint, and its manifest if it has one that can be read.
_Opened = tuple[Checkpoint, Manifest | None]

#: What was compared: a source with its conversion, or two checkpoints of the same model.
Kind = Literal["conversion", "checkpoints"]


@dataclass(frozen=True)
class ComparedFormat:
    """What one of two checkpoints is.

    Attributes:
        name: of its format, as `inspect` says it.
        title: of its format, for people.
        layout: what results call the layout of its modules.
        bits: bits per value, 4 or 8.
        group_size: rows of K that share scales, -1 for all.
        zero_point: whether modules have zero points of their own.
        not_compared: files and tensors that belong to its format, and are not compared with the other's.
    """

    name: str
    title: str
    layout: str
    bits: int
    group_size: int
    zero_point: bool
    not_compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordedFile:
    """A file of a source or its conversion, as the manifest knows it.

    Attributes:
        side: ``source`` or ``output``.
        name: of the file.
        digest: its size and digests, as the conversion saw them.
        is_checked: whether the file was read and has them.
    """

    side: Literal["source", "output"]
    name: str
    digest: FileDigest
    is_checked: bool


@dataclass(frozen=True)
class VerifyResult:
    """What a verification looked at; where it finds a difference, it raises.

    Attributes:
        source: the first checkpoint's folder, or ``org/name@commit``; of a conversion, its source's.
        output: the second checkpoint's folder or repository; of a conversion, that of the converted one.
        modules: converted modules whose values were compared; of two checkpoints, all that both have.
        modules_total: such modules there are.
        tensors: other tensors, compared byte for byte.
        files: side files, compared byte for byte.
        bytes: bytes of the source's tensors and files that were compared.
        seconds: wall time.
        gemm: what the Marlin GEMM said of the same modules; None if it was not asked.
        kind: ``conversion``, if one is the conversion of the other and everything that a conversion has to keep was
            compared; ``checkpoints``, if two checkpoints of a model were compared by their values.
        formats: what each of the two is.
        notes: what two checkpoints have otherwise, and is no difference of the model; of a conversion, which files of
            the source it left behind.
        differences: of two checkpoints, how much was compared and what differs; None for a conversion.
        recorded: of a conversion, the files of both sides as its manifest knows them.
    """

    source: Path | str
    output: Path | str
    modules: tuple[ModulePlan, ...]
    modules_total: int
    tensors: int
    files: int
    bytes: int
    seconds: float
    gemm: GemmRun | None = None
    kind: Kind = "conversion"
    formats: tuple[ComparedFormat, ...] = ()
    notes: tuple[str, ...] = ()
    differences: Differences | None = None
    recorded: tuple[RecordedFile, ...] = ()


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    modules: Modules | None = None,
    workers: int | None = None,
    device: Device | None = None,
    progress: Progress | None = None,
    layers: Modules = "all",
    follow_links: bool = False,
) -> VerifyResult:
    """Compares two checkpoints of the same model, in any formats that this package reads or writes.

    If one is the conversion of the other, in either order, everything that a conversion must keep is compared:
    also headers, config, manifest and digests. It is one if its manifest describes the other; see
    `checkpoint.converted.is_source_of`. Otherwise, or if something differs and none of the source's weight files was
    converted, all numbers, tensors and files are compared to the end, and the error says how much differs.

    Args:
        source: checkpoint folder, or Hub repository, ``org/name[@revision]``.
        output: another checkpoint folder or Hub repository.
        modules: how many modules to compare value for value, spread over the model; by default ``"all"``,
            which of a conversion also hashes every file and compares the digests with the manifest's. Everything else
            is always compared in full.
        workers: number of threads; by default one per CPU, at most eight.
        device: also run the chosen modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` (an exact reference)
            or ``"auto"``, the GPU if there is one; only if the converted, or the second, checkpoint is Marlin-native.
        progress: receives what is being done.
        layers: earlier name of ``modules``.
        follow_links: also follow links that lead out of the folders, as for `convert`.

    Raises:
        ValueError: if an argument has a wrong value, ``modules`` is given by both its names, or ``device`` is given
            and there is nothing to run.
        DifferenceError: of a conversion, naming the first difference: file, tensor, row, column, both values.
            Of two checkpoints, naming the first place in every module, tensor and file that differs; its ``result``
            has the counts.
        CheckpointError: if one of the two cannot be read as a checkpoint.
        UnavailableError: if the machine lacks what ``device`` needs.
        OSError: if reading fails.
    """
    count = VerifyOptions(modules, workers, device, layers, follow_links).count
    check_helpers(None, progress)
    check_device(device)
    started = time.perf_counter()
    progress = progress or Silence()
    threads = check_workers(workers)
    opened = _opened(*(open_source(each, follow_links=follow_links, note=progress.note) for each in (source, output)))
    one, other = (checkpoint for checkpoint, _ in opened)
    converted = _conversion(*opened)
    last = converted[1] if converted else other
    if device is not None and not last.format.is_own:
        message = f"{{device}} runs modules that are {DEFAULT_TARGET.title}; {{folder}} is {{title}}"
        raise ArgumentError(message, folder=printable(str(last.folder.where)), title=last.format.title)
    by_values = partial(_verify_checkpoints, one, other, count, threads, device, progress)
    try:
        result = _verify_conversion(*converted, count, threads, device, progress) if converted else by_values()
    except DifferenceError as error:
        if converted is None or _is_source_intact(converted[0], converted[2]):
            raise
        progress.finish()
        by_values()
        raise error from None
    return replace(result, seconds=time.perf_counter() - started)


@contextmanager
def _in(folder: Source) -> Iterator[None]:
    """Says of what is refused in which of the two checkpoints it lies: files of both have the same names."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(_with_place(each, printable(str(folder.where))) for each in error.problems) from None


def _with_place(problem: Problem, where: str) -> Problem:
    return problem if where in problem.message else replace(problem, message=f"{problem.message} (in {where})")


def _opened(*folders: Source) -> list[_Opened]:
    """Returns both checkpoints; one that can be opened only as the other's manifest says is opened like that."""
    opened: list[_Opened | CheckpointError] = []
    for folder in folders:
        refuse_unfinished(folder)
        try:
            with _in(folder):
                opened.append(open_with_manifest(folder))
        except CheckpointError as error:
            opened.append(error)
    return [_reopened(*each) for each in zip(opened, opened[::-1], folders, strict=True)]


def _reopened(one: _Opened | CheckpointError, other: _Opened | CheckpointError, folder: Source) -> _Opened:
    if not isinstance(one, CheckpointError):
        return one
    manifest = None if isinstance(other, CheckpointError) else other[1]
    if manifest is None:
        raise one
    try:
        return open_checkpoint(folder, Recorded.of_source(manifest)), None
    except CheckpointError:
        raise one from None


def _side(label: str, checkpoint: Checkpoint) -> Side:
    with _in(checkpoint.folder):
        return Side.of(label, SourceCheckpoint.of(checkpoint))


def _conversion(one: _Opened, other: _Opened) -> tuple[Checkpoint, Checkpoint, Manifest] | None:
    """Returns source, converted checkpoint and its manifest, if either of two is the conversion of the other."""
    for (source, _), (output, manifest) in ((one, other), (other, one)):
        if output.is_converted:
            with _in(output.folder):
                manifest = manifest or read_manifest(output.folder)
            source = as_source_of(source, manifest)
            if is_source_of(source, manifest):
                return source, output, manifest
    return None


def _is_source_intact(source: Checkpoint, manifest: Manifest) -> bool:
    """Returns whether a file of the source is the one that was converted; if none is, this may be another model."""
    recorded = {name: shard.source for name, shard in manifest.shards.items() if name in source.shards}
    return not all(recorded.values()) or any(
        digest is not None and digest.is_of(digest_of_file(NamedPath(source.folder.path(name), name)))
        for name, digest in recorded.items()
    )


def _verify_checkpoints(
    one: Checkpoint, other: Checkpoint, count: Modules, workers: int, device: Device | None, progress: Progress
) -> VerifyResult:
    """Compares two checkpoints to the end."""
    sides = _side("A", one), _side("B", other)
    compared = compare_checkpoints(sides, count, workers, progress)
    result = VerifyResult(
        one.folder.where,
        other.folder.where,
        compared.modules,
        compared.modules_total,
        compared.tensors,
        compared.files,
        compared.bytes,
        0.0,
        kind="checkpoints",
        formats=(_format(one, compared.of_the_format[0]), _format(other, compared.of_the_format[1])),
        notes=compared.notes,
        differences=compared.differences,
    )
    if compared.differences:
        raise DifferenceError(compared.differences.problems, result)
    if device is None:
        return result
    converted = [module for module in compared.modules if module.converted]
    return replace(result, gemm=run_gemm(converted, _with_itself(sides[1], converted, progress), device))


def _with_itself(side: Side, modules: list[ModulePlan], progress: Progress) -> Comparison:
    """Returns a Marlin-native checkpoint as its own source: its values are the other's, whose layout may differ."""
    format, stored = side.opened.checkpoint.format, side.opened.modules
    counterparts = Counterparts(format, format, side.scheme, {module.name: module for module in modules}, stored)
    return Comparison(counterparts, side.files, side.files, progress)


def _format(checkpoint: Checkpoint, not_compared: tuple[str, ...] = ()) -> ComparedFormat:
    format, scheme = checkpoint.format, checkpoint.quantization.scheme
    numbers = (scheme.bits, scheme.group_size, scheme.zero_point)
    return ComparedFormat(format.name, checkpoint.title, format.layout_name, *numbers, not_compared)


def _verify_conversion(
    old: Checkpoint,
    new: Checkpoint,
    manifest: Manifest,
    count: Modules,
    workers: int,
    device: Device | None,
    progress: Progress,
) -> VerifyResult:
    """Compares a source with its conversion, up to the first difference."""
    counterparts = _paired(old, new, manifest)
    files = compare_side_files(old, new, manifest, counterparts) if manifest.restores == "files" else []
    chosen = sample_modules(counterparts.rewritten, count)
    rows, copies = _rows(old.index, counterparts)
    others = [row.source.name for row in rows if row.rewrite is None and row.source is not None]
    tensors = TensorFiles(old.folder, old.index), TensorFiles(new.folder, new.index)
    recorded = tuple(_recorded_files(manifest, is_checked=count == "all"))
    hashed = [each for each in recorded if each.is_checked]
    comparison = Comparison(counterparts, *tensors, progress)
    total = comparison.module_bytes(chosen) + sum(old.tensors[name].size for name in others)
    total += sum(row.source.size for each in copies.values() for row in each if row.source is not None)
    steps = {"compare": total, "hash": sum(each.digest.size for each in hashed)}
    stage = Stage(progress, "verify", total or steps["hash"], steps)
    comparison = replace(comparison, advance=stage.step("compare"))
    jobs: list[Job] = [
        *map(comparison.tensor_job, others),
        *map(comparison.module_job, chosen),
        *(comparison.derived_job(row) for row in rows if row.source is None or row.target is None),
        *(job for shard, each in copies.items() for job in _copy_jobs(shard, each, comparison)),
        *(
            _digest_job(old.folder if each.side == "source" else new.folder, each, stage.step("hash"))
            for each in hashed
        ),
    ]
    run_jobs(jobs, workers)
    progress.finish()
    return VerifyResult(
        old.folder.where,
        new.folder.where,
        tuple(chosen),
        len(counterparts.rewritten),
        len(others),
        len(files),
        total,
        0.0,
        run_gemm([module for module in chosen if module.converted], comparison, device),
        formats=(_format(old), _format(new)),
        recorded=recorded,
        notes=tuple(left_behind_warning(old.left_behind, old.left_behind_bytes)),
    )


def _rows(index: TensorIndex, counterparts: Counterparts) -> tuple[list[Row], dict[str, list[Row]]]:
    """Returns the rows of all tensors that count, and by file those of the copies that do not."""
    rows: list[Row] = []
    copies: dict[str, list[Row]] = defaultdict(list)
    for shard, header in index.headers.items():
        counts = True
        for row in counterparts.rows(shard, header):
            counts = index.counts(shard, row.source.name) if row.source else counts  # what is made follows its source
            (rows if counts else copies[shard]).append(row)
    return rows, copies


def _copy_jobs(shard: str, rows: list[Row], whole: Comparison) -> Iterator[Job]:
    """Yields the comparisons of the tensors of one file that do not count: engines read them too."""
    source, output = (
        TensorFiles.of(each.folder, {shard: each.index.headers[shard]}) for each in (whole.source, whole.output)
    )
    comparison = Comparison(whole.counterparts, source, output, whole.progress, whole.advance)
    for row in rows:
        if row.source is None or row.target is None:
            yield comparison.derived_job(row)
        elif row.rewrite is None:
            yield comparison.tensor_job(row.source.name)
        else:
            yield comparison.part_job(row.source.name)


def _paired(source: Checkpoint, output: Checkpoint, manifest: Manifest) -> Counterparts:
    """Compares everything that headers and configs say.

    An engine that saves a checkpoint writes its own headers and config; then only the tensors must agree.
    """
    whole = manifest.restores == "files"
    quantization = source.format.as_recorded(source.quantization, manifest.version)
    try:
        counterparts = pair(source.index, source.format, quantization, output, same_files=whole)
    except CheckpointError as error:
        raise DifferenceError(error.problems) from None
    if whole:
        compare_headers(source, output, counterparts)
    compare_configs(source, output, counterparts.modules.values(), whole=whole)
    return counterparts


def _recorded_files(manifest: Manifest, *, is_checked: bool) -> Iterator[RecordedFile]:
    """Yields every file whose digest the manifest records."""
    for name, shard in manifest.shards.items():
        if shard.source is not None:
            yield RecordedFile("source", name, shard.source, is_checked)
        yield RecordedFile("output", name, shard.target, is_checked)
    for name, file in {**manifest.files, **manifest.made}.items():
        yield RecordedFile("output", name, file, is_checked)


def _digest_job(folder: Source, recorded: RecordedFile, advance: Callable[[int], None]) -> Job:
    def job() -> None:
        found = digest_of_file(NamedPath(folder.path(recorded.name), recorded.name))
        if not recorded.digest.is_of(found):
            raise difference(
                "manifest",
                f"the manifest records {recorded.digest}; the file in {printable(str(folder.where))} has {found}",
                file=recorded.name,
            )
        advance(recorded.digest.size)

    return job
