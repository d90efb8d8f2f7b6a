"""`verify`: is a converted checkpoint its source, value for value?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin.checkpoint.converted import require_converted
from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.checkpoint.pairing import pair
from awq2marlin.commands.options import VerifyOptions, check_helpers
from awq2marlin.errors import CheckpointError, DifferenceError, difference, printable, refuse
from awq2marlin.hub.repository import open_source
from awq2marlin.io.digest import FileDigest, digest_of_file
from awq2marlin.io.source import Source
from awq2marlin.io.stream import NamedPath
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.headers import compare_configs, compare_headers, compare_side_files
from awq2marlin.verification.sampling import Device, Modules, check_device, sample_modules
from awq2marlin.verification.values import Comparison, Job, run_gemm, run_jobs

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun


@dataclass(frozen=True)
class VerifyResult:
    """What a verification looked at; it raises where it finds a difference.

    Attributes:
        source: the AWQ checkpoint's folder, or ``org/name@commit``.
        output: the converted checkpoint's folder.
        modules: converted modules whose values were compared.
        modules_total: converted modules there are.
        tensors: other tensors, compared byte for byte.
        files: side files, compared byte for byte.
        bytes: bytes of the source's tensors and files that were compared.
        seconds: wall time.
        gemm: what the Marlin GEMM said of the same modules; None if it was not asked.
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


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    modules: Modules | None = None,
    workers: int | None = None,
    device: Device | None = None,
    progress: Progress | None = None,
    layers: Modules = "all",
) -> VerifyResult:
    """Compares a converted checkpoint with its source.

    Args:
        source: folder of the AWQ checkpoint, or a repository of the Hub, ``org/name[@revision]``.
        output: folder of the converted one, or a repository.
        modules: how many converted modules to compare value for value, spread over the model; by default ``"all"``,
            which also hashes every file and compares the digests with the manifest's. Everything else is
            always compared in full.
        workers: threads; by default as many as there are processors, at most eight.
        device: also run the chosen modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` (an exact reference)
            or ``"auto"``, the GPU if there is one.
        progress: told what is being done.
        layers: the earlier name of ``modules``.

    Raises:
        ValueError: if an argument is none of its choices, or ``modules`` is given by both its names.
        DifferenceError: naming the first difference: file, tensor, row, column, expected and found.
        CheckpointError: if either folder is no readable checkpoint of its kind.
        UnavailableError: if the machine lacks what ``device`` needs.
        OSError: if reading fails.
    """
    count = VerifyOptions(modules, workers, device, layers).count
    check_helpers(None, progress)
    check_device(device)
    started = time.perf_counter()
    progress = progress or Silence()
    old, new = _open_pair(source, output)
    manifest = read_manifest(new.folder)
    counterparts = _paired(old, new, whole=manifest.restores == "files")
    files = compare_side_files(old, new, manifest) if manifest.restores == "files" else []
    chosen = sample_modules(counterparts.rewritten, count)
    others = _other_tensors(counterparts, old)
    comparison = Comparison(
        counterparts, TensorFiles(old.folder, old.index), TensorFiles(new.folder, new.index), progress
    )
    hashed = list(_recorded_files(manifest, old, new)) if count == "all" else []
    total = comparison.module_bytes(chosen) + sum(old.tensors[name].size for name in others)
    progress.start("verify", total + sum(file.size for _, _, file in hashed))
    jobs: list[Job] = [
        *map(comparison.tensor_job, others),
        *map(comparison.module_job, chosen),
        *(_digest_job(*recorded, progress) for recorded in hashed),
    ]
    run_jobs(jobs, check_workers(workers))
    progress.finish()
    return VerifyResult(
        old.folder.where,
        new.folder.where,
        tuple(chosen),
        len(counterparts.rewritten),
        len(others),
        len(files),
        total,
        time.perf_counter() - started,
        run_gemm(chosen, comparison, device),
    )


def _open_pair(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    old, new = open_checkpoint(open_source(source)), open_checkpoint(open_source(output))
    if old.is_converted:
        raise refuse(
            "already-converted",
            "the first folder must be the AWQ source; this one is converted",
            file=str(source),
        )
    message = f"the second folder must be a converted checkpoint; this one is {new.format.title}"
    require_converted(new, message, file=str(output))
    return old, new


def _paired(source: Checkpoint, output: Checkpoint, *, whole: bool) -> Counterparts:
    """Compares everything that headers and configs say.

    An engine that saves a checkpoint writes its own headers and config; then only the tensors must agree.
    """
    try:
        counterparts = pair(source.index, source.format, source.quantization, output, same_files=whole)
    except CheckpointError as error:
        raise DifferenceError(error.problems) from None
    if whole:
        compare_headers(source, output, counterparts)
    compare_configs(source, output, counterparts.modules.values(), whole=whole)
    return counterparts


def _other_tensors(counterparts: Counterparts, source: Checkpoint) -> list[str]:
    """Returns the tensors that must be the same in both; what follows from a module's shape is in its headers."""
    return [
        row.source.name
        for name, header in source.shards.items()
        for row in counterparts.rows(name, header)
        if row.rewrite is None and row.source is not None
    ]


def _recorded_files(
    manifest: Manifest, source: Checkpoint, output: Checkpoint
) -> Iterator[tuple[Source, str, FileDigest]]:
    """Yields folder and name of every file whose digest the manifest records, and that digest."""
    for name, shard in manifest.shards.items():
        if shard.source is not None:
            yield source.folder, name, shard.source
        yield output.folder, name, shard.target
    for name, file in manifest.files.items():
        yield output.folder, name, file


def _digest_job(folder: Source, name: str, recorded: FileDigest, progress: Progress) -> Job:
    def job() -> None:
        found = digest_of_file(NamedPath(folder.path(name), name))
        if not recorded.is_of(found):
            raise difference(
                "manifest",
                f"the manifest records {recorded}; the file in {printable(str(folder.where))} has {found}",
                file=name,
            )
        progress.advance(recorded.size)

    return job
