"""`revert`: the way back, from a converted checkpoint to the one it was made from, byte for byte."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from awq2marlin.checkpoint.converted import ConvertedCheckpoint
from awq2marlin.checkpoint.files import CANNOT_HOLD
from awq2marlin.checkpoint.manifest import Restores
from awq2marlin.commands.options import RevertOptions, check_helpers
from awq2marlin.errors import OutputError, Problem, printable
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.io.digest import FileDigest, digest_of, digest_of_file, hexdigest
from awq2marlin.io.stream import NamedPath
from awq2marlin.pipeline.journal import read_journal
from awq2marlin.pipeline.output import as_output_errors, refuse_overlap
from awq2marlin.pipeline.preflight import (
    LOW_DISK_IGNORED,
    hindrances,
    open_source_of_run,
    output_folder,
    refuse_full_disk,
)
from awq2marlin.pipeline.resume import trusted_shards
from awq2marlin.pipeline.reversion import plan_reversion, recorded_files
from awq2marlin.pipeline.run import Work, run
from awq2marlin.pipeline.sink import open_sink
from awq2marlin.pipeline.transfer import Transfer
from awq2marlin.progress import Progress, Silence

#: What the default name of the output ends with: never the name that the source had.
OUTPUT_SUFFIX = "-reverted"


@dataclass(frozen=True)
class RestoredFile:
    """A file of the source that was given back.

    Attributes:
        name: relative path.
        size: bytes.
        sha256: 64 hexadecimal digits, of what was written; empty in a dry run.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class RevertResult:
    """What a reversion did, or with ``dry_run`` would do.

    Attributes:
        source: the converted checkpoint's folder, or ``org/name@commit``.
        output: the restored checkpoint's folder.
        files: every restored file, sorted by name.
        left_behind: files of the original that the conversion had not carried over, with the reason.
        bytes: bytes of these files.
        seconds: wall time.
        restores: ``files`` if every file is the original, byte for byte; ``tensors`` if an engine saved the
            converted checkpoint, so that the tensors are those of the original but the files are not.
        dry_run: whether nothing was written.
        resumed: shards that an earlier run had restored.
        lacks: what the output's file system cannot do, and what that means.
        hindrances: with ``dry_run``, what would stop a run.
    """

    source: Path | str
    output: Path
    files: tuple[RestoredFile, ...]
    left_behind: Mapping[str, str]
    bytes: int
    seconds: float
    restores: Restores
    dry_run: bool = False
    resumed: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    hindrances: tuple[str, ...] = ()


def revert(
    converted: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    executor: Executor | None = None,
    low_disk: bool = False,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> RevertResult:
    """Restores the checkpoint that a converted one was made from, every file byte for byte.

    If an engine saved the converted checkpoint, as ``save_pretrained`` of Transformers does, the tensors are restored,
    in the files that the engine put them in. If it is interrupted, call it again: it resumes.

    Args:
        converted: converted checkpoint: a folder, which is never written to, or a Hub repository,
            ``org/name[@revision]`` or ``hf://org/name[@revision]``, whose next shard is downloaded while one is
            restored.
        output: folder to write; by default ``./<name>-reverted``.
        workers: number of threads; by default one per CPU, at most eight. With an executor, threads for one shard, by
            default one.
        overwrite: ``output`` may have files already: those that equal the restored ones stay as they are, different
            ones of the same name are refused, and what an unfinished run left is removed.
        dry_run: plan only; nothing is written.
        executor: restores the shards instead of threads of this process; see `convert`.
        low_disk: Hub repositories only: download the shards to the output folder, and delete each once it is restored.
        follow_links: also follow links that lead out of the folder, as for `convert`.
        progress: receives what is being done.

    Raises:
        DifferenceError: if a restored file differs from the one recorded; no ``config.json`` is written then.
        CheckpointError: if this is not a sound converted checkpoint.
        HubError: if the Hub or the network refuses.
        OutputError: if the output folder is not ours, in use, full or unwritable.
        ExecutorError: if the executor broke, or its workers do not see the same files.
        ValueError: if an argument has a wrong value.
    """
    RevertOptions(workers, overwrite, dry_run, low_disk, follow_links)  # which check themselves
    check_helpers(executor, progress)
    started, progress = time.perf_counter(), progress or Silence()
    root = output_folder(output, converted, OUTPUT_SUFFIX)
    folder, pinned = open_source_of_run(
        converted, root, overwrite=overwrite, low_disk=low_disk, progress=progress, follow_links=follow_links
    )
    source = ConvertedCheckpoint.open(folder, "awq2marlin did not convert this checkpoint; there is nothing to revert")
    transfer = plan_reversion(source)
    refuse_overlap(folder.root, root)
    if low_disk and folder.origin is None:
        progress.note(LOW_DISK_IGNORED)
    restores = source.manifest.restores
    if restores == "tensors":
        progress.note("an engine saved this checkpoint: the original tensors are restored, but not the original files")
    result = _planned(source, transfer, root)
    owned = partial(_owned, root, transfer.names, overwrite)
    if dry_run:
        would_stop = hindrances(transfer, root, owned, stays=True, low_disk=low_disk)
        for line in would_stop:
            progress.note(line)
        result = replace(result, hindrances=would_stop)
    else:
        kept = _kept_files(root, transfer, recorded_files(source, transfer), overwrite, progress)
        transfer = transfer.keeping(kept.keys())
        work = Work(progress, workers, executor, low_disk, with_sha256=True)
        with open_sink(transfer, root, owned, pinned, progress) as sink:
            trusted = trusted_shards(transfer, sink, work)
            refuse_full_disk(transfer, sink, work)
            made = run(transfer, sink, work)
            sink.commit(transfer.config)
        files = {CONFIG_FILENAME: digest_of(transfer.config, sha256=True), **kept, **trusted, **made}
        result = replace(result, dry_run=False, resumed=tuple(trusted), files=_restored(files), lacks=sink.out.lacks)
        result = _without(result, sink.out.left)
    return replace(result, seconds=time.perf_counter() - started)


def _without(result: RevertResult, names: Sequence[str]) -> RevertResult:
    """Returns a result that tells of files whose names the output's file system cannot hold."""
    if not names:
        return result
    lack = (
        "the output's file system does not allow some names, so these files were not restored: "
        f"{', '.join(map(printable, names))}; choose another disk to get them too"
    )
    left = {**result.left_behind, **dict.fromkeys(names, CANNOT_HOLD)}
    return replace(result, left_behind=left, lacks=(*result.lacks, lack))


def _owned(root: Path, names: Collection[str], overwrite: bool) -> list[str] | None:
    """Returns the files of ``root`` that may be removed, none in any case; None if it must be empty.

    Raises:
        OutputError: if it must be, and holds files of these names.
    """
    if overwrite:
        return []
    present = [name for name in names if os.path.lexists(root / name)]
    if present and read_journal(root) is None:
        message = (
            f"the folder is not empty ({printable(present[0])}); choose another, or use --overwrite, which keeps files "
            "that equal the restored ones and stops at others of the same name"
        )
        raise OutputError(Problem(str(root), "", "not-empty", message))
    return None


def _kept_files(
    root: Path, transfer: Transfer, recorded: Mapping[str, FileDigest], overwrite: bool, progress: Progress
) -> dict[str, FileDigest]:
    """Returns the files of ``root`` that are not ours and stay as they are: each is the one that comes back.

    A reverted folder bears no mark of ours, so it may be somebody's original. Only what a journal names is ours.

    Args:
        root: the output folder.
        transfer: what comes back.
        recorded: what the files that come back are known by, as far as that was recorded.
        overwrite: whether to look at all; else only a run that goes on does.
        progress: told what is being compared.

    Raises:
        OutputError: if a file has the name of one that comes back, and is another.
    """
    with as_output_errors(root):
        journal = read_journal(root)
        if not overwrite and (journal is None or journal.plan != transfer.digest):
            return {}
        ours = {*journal.names} if journal else set()
        present = [name for name in transfer.names if name not in ours and os.path.lexists(root / name)]
        if not present:
            return {}
        for name in present:
            path = root / name
            if name not in recorded or not path.is_file() or path.stat().st_size != recorded[name].size:
                raise _another(root, name)
        progress.start("compare", sum(recorded[name].size for name in present))
        kept = {name: _compared(root, name, recorded[name], progress) for name in present}
        progress.finish()
    return kept


def _compared(root: Path, name: str, recorded: FileDigest, progress: Progress) -> FileDigest:
    """Returns what a file is known by, once that is what was recorded."""
    sha256 = hashlib.sha256()
    found = digest_of_file(NamedPath((root / name).resolve(), name), [sha256])
    found = replace(found, sha256=hexdigest(sha256))
    if not recorded.is_of(found):
        raise _another(root, name)
    progress.advance(found.size)
    return found


def _another(root: Path, name: str) -> OutputError:
    message = (
        f"it holds a file {printable(name)} that differs from the one to be restored, and it is never "
        "replaced; choose another folder"
    )
    return OutputError(Problem(str(root), "", "not-empty", message))


def _planned(source: ConvertedCheckpoint, transfer: Transfer, root: Path) -> RevertResult:
    """Returns the result of a dry run: what would be given back."""
    sizes = {shard.name: shard.target.file_size for shard in transfer.shards}
    sizes |= {name: transfer.source.size(name) for name in transfer.carried}
    sizes |= {name: len(data) for name, data in {**transfer.texts, CONFIG_FILENAME: transfer.config}.items()}
    return RevertResult(
        transfer.source.where,
        root,
        tuple(RestoredFile(name, size, "") for name, size in sorted(sizes.items())),
        source.manifest.left_behind,
        sum(sizes.values()),
        0.0,
        source.manifest.restores,
        dry_run=True,
    )


def _restored(files: Mapping[str, FileDigest]) -> tuple[RestoredFile, ...]:
    return tuple(RestoredFile(name, file.size, file.sha256 or "") for name, file in sorted(files.items()))
