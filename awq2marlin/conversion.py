"""The converter's story, on one page: open, plan, convert shard by shard, carry the rest, verify, commit.

Data flows one way. Nothing is written before the whole plan stands, nothing is loadable before it is
verified, and no step looks back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from awq2marlin.checkpoint import open_checkpoint
from awq2marlin.digest import Xxh3
from awq2marlin.errors import DifferenceError, OutputError, Problem, refuse
from awq2marlin.folder import CARD_FILENAME, CONFIG_FILENAME, INDEX_FILENAME, Folder, hub_repository
from awq2marlin.manifest import Manifest, ManifestShard, SourceCard, read_manifest
from awq2marlin.model_card import model_card
from awq2marlin.output import FinishedFile, OutputFolder, claim, read_journal, refuse_overlap, told_as_output_error
from awq2marlin.plan import ModulePlan, Plan, ShardPlan, Unaligned, plan_conversion
from awq2marlin.progress import Progress, Silence
from awq2marlin.quantization import MANIFEST_FILENAME
from awq2marlin.shard import ShardResult, ShardTask, convert_shard
from awq2marlin.stream import copy_pieces, rewrite_file
from awq2marlin.tensor_files import TensorFiles
from awq2marlin.verification import Device, check_count, check_device, run_gemm, sample_modules, verify_modules
from awq2marlin.workers import check_workers, run_side_by_side, share_workers

if TYPE_CHECKING:
    from awq2marlin.gemm_verification import GemmRun

#: How many converted modules are compared with the source before the output becomes loadable.
DEFAULT_VERIFIED = 8

Verify = int | Literal["all", "none"]


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: the source's folder.
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
    """

    source: Path
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
    verify: Verify = DEFAULT_VERIFIED,
    dry_run: bool = False,
    device: Device | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts an AWQ checkpoint to a Marlin-native one (docs/marlin-native.md).

    Interrupted at any moment, the same call resumes and ends with the same bytes.

    Args:
        source: folder of the AWQ checkpoint; never written to.
        output: folder to write; by default ``./<name>-marlin``.
        unaligned: what to do with modules whose shapes Marlin cannot take: ``"keep"`` them in AWQ layout,
            ``"pad"`` them with zeros, or ``"error"``.
        workers: threads; by default as many as there are processors, at most eight.
        overwrite: remove an earlier conversion in ``output`` first: only files that its own manifest or
            journal names.
        verify: how many converted modules to compare with the source, value for value, before the output
            becomes loadable; ``"all"`` or ``"none"``.
        dry_run: plan only; nothing is written.
        device: also run those modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` or ``"auto"``.
        progress: told what is being done.

    Raises:
        CheckpointError: if the source is no convertible AWQ checkpoint; nothing has been written.
        OutputError: if the output folder is foreign, in use, full or unwritable.
        ValueError: if an argument is none of its choices.
        DifferenceError: if the verification finds a difference; the output has no ``config.json`` then.
    """
    check_count("verify", verify, ("all", "none"))
    if device is not None and verify in ("none", 0):
        raise ValueError("device needs verify: it runs the modules that are compared")
    check_device(device)
    started = time.perf_counter()
    progress, workers = progress or Silence(), check_workers(workers)
    plan = plan_conversion(open_checkpoint(source), unaligned)
    root = Path(output) if output is not None else default_output(plan.checkpoint.folder.root)
    refuse_overlap(plan.checkpoint.folder.root, root)
    resumed: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    gemm: GemmRun | None = None
    if not dry_run:
        owned = partial(owned_files, root, overwrite)
        with told_as_output_error(root), claim(root, plan.digest, output_names(plan), owned=owned) as out:
            resumed = _trusted_shards(plan, out, progress)
            _refuse_full_disk(plan, out, resumed)
            _convert_shards(plan, out, workers, progress)
            _write_manifest(plan, out, _carry_side_files(plan, out))
            verified, gemm = _verify(plan, out, verify, workers, device, progress)
            out.write(CARD_FILENAME, model_card(plan, verified, gemm))
            out.commit(encode_json(plan.config()))
    return _result(plan, root, dry_run, resumed, verified, gemm, time.perf_counter() - started)


def default_output(source: Path) -> Path:
    """Returns ``./<name>-marlin`` for a source folder, a snapshot of the Hub cache by its repository's name."""
    repository = hub_repository(source)
    name = repository.name.split("--")[-1] if repository else source.name
    return Path(f"{name}-marlin")


def output_names(plan: Plan) -> list[str]:
    """Returns every file that a conversion leaves in its output folder."""
    shards = [shard.name for shard in plan.shards]
    index = [INDEX_FILENAME] if plan.checkpoint.has_index else []
    return sorted([*shards, *plan.checkpoint.side_files, *index, CARD_FILENAME, CONFIG_FILENAME, MANIFEST_FILENAME])


def encode_json(document: Any) -> bytes:
    """Returns a JSON side file's bytes."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def owned_files(root: Path, overwrite: bool) -> list[str] | None:
    """Returns the files that ``--overwrite`` may remove from ``root``, or None if it is not to be touched.

    What an unfinished conversion may remove stands in its journal, so that is not repeated here.

    Raises:
        OutputError: if ``root`` holds a finished conversion and ``overwrite`` is False.
    """
    unfinished = read_journal(root) is not None
    finished = not unfinished and (root / MANIFEST_FILENAME).exists()
    if finished and not overwrite:
        raise OutputError(
            Problem(
                str(root),
                "",
                "not-empty",
                "the folder holds a finished conversion; use --overwrite to replace it, or choose another",
            )
        )
    if not overwrite:
        return None
    if finished:
        return read_manifest(Folder.at(root)).names()
    return [] if unfinished else None


def _trusted_shards(plan: Plan, out: OutputFolder, progress: Progress) -> tuple[str, ...]:
    """Returns the shards that an earlier run finished, source and output hashed again."""
    folder = plan.checkpoint.folder
    trusted = tuple(
        shard.name
        for shard in plan.shards
        if shard.name in out.finished and out.recheck(shard.name, folder.path(shard.name), progress.note)
    )
    if trusted:
        progress.note(f"resuming: {len(trusted)} of {len(plan.shards)} shards are already there")
    return trusted


def _refuse_full_disk(plan: Plan, out: OutputFolder, resumed: tuple[str, ...]) -> None:
    folder = plan.checkpoint.folder
    needed = sum(shard.target.file_size for shard in plan.shards if shard.name not in resumed)
    needed += sum(folder.size(name) for name in plan.checkpoint.side_files)
    free = shutil.disk_usage(out.root).free
    if needed > free:
        raise OutputError(
            Problem(
                str(out.root),
                "",
                "disk-full",
                f"the conversion needs {needed / 1e9:.2f} GB, the disk has "
                f"{free / 1e9:.2f} GB free; free some space or choose another disk",
            )
        )


def _convert_shards(plan: Plan, out: OutputFolder, workers: int, progress: Progress) -> None:
    todo = [shard for shard in plan.shards if shard.name not in out.finished]
    at_once, threads = share_workers(workers, len(todo))
    folder = plan.checkpoint.folder
    tasks = [
        ShardTask(shard, folder.path(shard.name), out.partial(shard.name), out.final(shard.name), threads)
        for shard in todo
    ]

    def finish(done: ShardResult) -> None:
        out.remember(
            done.name, FinishedFile(done.source_size, done.source_digest, done.target_size, done.target_digest)
        )

    progress.start("convert", sum(shard.source.data_size for shard in todo))
    run_side_by_side(convert_shard, tasks, at_once, progress.advance, finish)
    progress.finish()


def _carry_side_files(plan: Plan, out: OutputFolder) -> dict[str, tuple[int, str]]:
    """Copies what belongs to the checkpoint unchanged; returns size and digest of each file."""
    folder = plan.checkpoint.folder
    names = list(plan.checkpoint.side_files)
    if plan.checkpoint.has_index:
        if plan.source_data_bytes == plan.target_data_bytes:
            names.append(INDEX_FILENAME)
        else:
            out.write(INDEX_FILENAME, _padded_index(plan))
    carried = {}
    for name in names:
        digest, size = Xxh3(), folder.size(name)
        rewrite_file((folder.path(name), name), out.partial(name), copy_pieces(0, 0, size), target_hashes=[digest])
        out.publish(name)
        carried[name] = (size, str(digest))
    return carried


def _padded_index(plan: Plan) -> bytes:
    """Returns the source's index with the total size that padding makes."""
    document = plan.checkpoint.folder.read_json(INDEX_FILENAME)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = plan.target_data_bytes
    return encode_json(document)


def _write_manifest(plan: Plan, out: OutputFolder, carried: Mapping[str, tuple[int, str]]) -> None:
    checkpoint = plan.checkpoint
    rewritten = [CONFIG_FILENAME, *checkpoint.legacy_configs]
    if checkpoint.has_index and INDEX_FILENAME not in carried:
        rewritten.append(INDEX_FILENAME)
    shards = {shard.name: _manifest_shard(shard, out.finished[shard.name]) for shard in plan.shards}
    texts = {name: _exact_text(checkpoint.folder, name) for name in rewritten}
    digests = {name: (len(text.encode()), str(Xxh3(text.encode()))) for name, text in texts.items()}
    card = SourceCard.of(checkpoint.card, checkpoint.folder.read(checkpoint.card)) if checkpoint.card else None
    manifest = Manifest(shards, texts, digests, carried, None, None, checkpoint.left_behind, card=card)
    out.write(MANIFEST_FILENAME, manifest.encode())


def _manifest_shard(shard: ShardPlan, done: FinishedFile) -> ManifestShard:
    return ManifestShard(shard.source, done.source_size, (done.source_digest,), done.target_size, done.target_digest)


def _exact_text(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start})", file=name) from None


def _verify(
    plan: Plan, out: OutputFolder, verify: Verify, workers: int, device: Device | None, progress: Progress
) -> tuple[tuple[str, ...], GemmRun | None]:
    """Compares converted modules with the source, from the disk, before the output becomes loadable."""
    if verify == "none" or verify == 0:
        return (), None
    chosen = sample_modules(plan.converted, verify)
    source = TensorFiles.of(plan.checkpoint.folder, plan.checkpoint.shards)
    folder = Folder.at(out.root)
    output = TensorFiles.of(folder, {shard.name: folder.read_header(shard.name) for shard in plan.shards})
    try:
        verify_modules(chosen, plan.quantization, source, output, workers=workers, progress=progress)
        gemm = run_gemm(chosen, plan.quantization, source, output, device, progress)
    except DifferenceError:
        out.forget_all()
        raise
    return tuple(each.name for each in chosen), gemm


def _result(
    plan: Plan,
    root: Path,
    dry_run: bool,
    resumed: tuple[str, ...],
    verified: tuple[str, ...],
    gemm: GemmRun | None,
    seconds: float,
) -> ConvertResult:
    checkpoint = plan.checkpoint
    return ConvertResult(
        source=checkpoint.folder.root,
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
    )
