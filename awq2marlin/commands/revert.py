"""The way back: from a converted checkpoint to the AWQ one it was made from, byte for byte.

Headers come from the manifest, data from the inverse repack, side files and texts as they were. Every file
is compared with the size and digest that the manifest recorded before it gets its name. Of a checkpoint that an
engine saved the source's files are not known: its manifest describes an AWQ checkpoint of the same tensors.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from awq2marlin._version import __version__
from awq2marlin.checkpoint.manifest import Manifest, ManifestShard, Restores, read_manifest
from awq2marlin.checkpoint.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.checkpoint.pairing import pair_modules
from awq2marlin.checkpoint.quantization import AwqQuantization, MarlinQuantization
from awq2marlin.checkpoint.source import Checkpoint, open_checkpoint
from awq2marlin.errors import difference, refuse
from awq2marlin.hub.repository import open_source
from awq2marlin.io.digest import Xxh3
from awq2marlin.io.folder import Folder
from awq2marlin.io.safetensors import Header
from awq2marlin.io.stream import Piece, copy_pieces, rewrite_file
from awq2marlin.io.workers import check_workers, run_side_by_side, share_workers
from awq2marlin.layout.modules import ModulePlan, repack_of
from awq2marlin.pipeline.arrivals import arriving
from awq2marlin.pipeline.output import FinishedFile, OutputFolder, claim, refuse_overlap, told_as_output_error
from awq2marlin.progress import Progress, Silence


@dataclass(frozen=True)
class RestoredFile:
    """A file of the AWQ checkpoint that was given back.

    Attributes:
        name: relative path.
        size: bytes.
        sha256: 64 hexadecimal digits, of what was written.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class RevertResult:
    """What a reversion did.

    Attributes:
        source: the converted checkpoint's folder, or ``org/name@commit``.
        output: the AWQ checkpoint's folder.
        files: every restored file, sorted by name.
        left_behind: files of the original that the conversion had not carried over, with the reason.
        bytes: bytes written.
        seconds: wall time.
        restores: ``files`` if every file is the original, byte for byte; ``tensors`` if an engine saved the
            converted checkpoint, so that the tensors are those of the original but the files are not.
    """

    source: Path | str
    output: Path
    files: tuple[RestoredFile, ...]
    left_behind: Mapping[str, str]
    bytes: int
    seconds: float
    restores: Restores


def revert(
    converted: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> RevertResult:
    """Gives back the AWQ checkpoint that a converted one was made from, every file byte for byte.

    Of a checkpoint that an engine saved, such as ``save_pretrained`` of Transformers, the tensors are given back: they
    lie in the files in which the engine put them. Interrupted at any moment, the same call resumes.

    Args:
        converted: folder of the converted checkpoint, never written to; or a repository of the Hub,
            ``org/name[@revision]`` or ``hf://org/name[@revision]``, whose next shard is fetched while one is restored.
        output: folder to write; must not exist, be empty, or hold an unfinished run of the same call.
        workers: threads; by default as many as there are processors, at most eight.
        progress: told what is being done.

    Raises:
        DifferenceError: if a restored file is not the one recorded; the output has no ``config.json`` then.
        CheckpointError: if the folder is no sound converted checkpoint.
        HubError: if the Hub or the network refuses.
        OutputError: if the output folder is foreign, in use, full or unwritable.
    """
    started = time.perf_counter()
    progress, workers = progress or Silence(), check_workers(workers)
    marlin = open_checkpoint(open_source(converted))
    if not isinstance(marlin.quantization, MarlinQuantization):
        raise refuse(
            "not-converted",
            "this checkpoint is AWQ already; there is nothing to revert",
            file=CONFIG_FILENAME,
        )
    manifest = read_manifest(marlin.folder)
    files = _carried_files(manifest, marlin)
    texts = _checked_texts(manifest)
    modules = _paired_modules(manifest, marlin, marlin.quantization)
    root = Path(output)
    refuse_overlap(marlin.folder.root, root)
    names = [*manifest.shards, *files, *texts]
    if manifest.restores == "tensors":
        progress.note("an engine saved this checkpoint: the tensors of the original come back, not its files")
    digest = _plan_digest(marlin.folder)
    with told_as_output_error(root), claim(root, digest, names) as out:
        restored = _restore_shards(marlin, manifest, modules, out, workers, progress)
        restored += [_restore_file(name, recorded, marlin.folder, out) for name, recorded in files.items()]
        restored += [_restore_text(name, text, out) for name, text in texts.items() if name != CONFIG_FILENAME]
        config = texts[CONFIG_FILENAME]
        out.commit(config)
    restored.append(RestoredFile(CONFIG_FILENAME, len(config), hashlib.sha256(config).hexdigest()))
    restored.sort(key=lambda file: file.name)
    return RevertResult(
        marlin.folder.where,
        root,
        tuple(restored),
        manifest.left_behind,
        sum(file.size for file in restored),
        time.perf_counter() - started,
        manifest.restores,
    )


def _carried_files(manifest: Manifest, marlin: Checkpoint) -> Mapping[str, tuple[int, str] | None]:
    """Returns the side files to give back, with size and digest where they were recorded.

    Missing and unsafe ones are refused here, before anything is written.
    """
    if manifest.restores == "tensors":
        return dict.fromkeys(name for name in marlin.side_files if name not in manifest.texts)
    for name in manifest.files:
        if not marlin.folder.exists(name):
            raise refuse(
                "missing-file", "the manifest names this file, but it is not there; download it too", file=name
            )
        marlin.folder.path(name)
    return manifest.files


def _plan_digest(folder: Folder) -> str:
    identity = hashlib.sha256(f"revert {__version__}\n".encode())
    for name in (MANIFEST_FILENAME, CONFIG_FILENAME):
        identity.update(hashlib.sha256(folder.read(name)).digest())
    return "sha256:" + identity.hexdigest()


def _paired_modules(manifest: Manifest, marlin: Checkpoint, quantization: MarlinQuantization) -> dict[str, ModulePlan]:
    source = {name: shard.source_header for name, shard in manifest.shards.items()}
    awq = AwqQuantization(quantization.bits, quantization.group_size, quantization.zero_point, None, MANIFEST_FILENAME)
    return pair_modules(source, awq, marlin)


@dataclass(frozen=True)
class _RestoreTask:
    """One shard to restore.

    Attributes:
        name: file name.
        converted: resolved path of the converted file.
        header: its header.
        shard: what the manifest says of it.
        modules: every converted module.
        quantization: of the converted checkpoint.
        partial: where the restored file grows.
        workers: threads to use.
    """

    name: str
    converted: Path
    header: Header
    shard: ManifestShard
    modules: Mapping[str, ModulePlan]
    quantization: MarlinQuantization
    partial: Path
    workers: int


def _restore_shards(
    marlin: Checkpoint,
    manifest: Manifest,
    modules: Mapping[str, ModulePlan],
    out: OutputFolder,
    workers: int,
    progress: Progress,
) -> list[RestoredFile]:
    quantization, folder = marlin.quantization, marlin.folder
    assert isinstance(quantization, MarlinQuantization)
    restored = _trusted_shards(folder, manifest, out, progress)
    todo = {name: marlin.shards[name] for name in manifest.shards if name not in out.finished}
    at_once, threads = share_workers(workers, len(todo))

    def task(name: str) -> _RestoreTask:
        shard, partial = manifest.shards[name], out.partial(name)
        return _RestoreTask(name, folder.path(name), todo[name], shard, modules, quantization, partial, threads)

    def finish(done: tuple[RestoredFile, FinishedFile]) -> None:
        file, finished = done
        out.publish(file.name)
        out.remember(file.name, finished)
        restored.append(file)

    files = {name: header.file_size for name, header in todo.items()}
    fetched = 0 if folder.origin is None else sum(files.values())
    progress.start(
        "fetch and revert" if fetched else "revert",
        fetched + sum(manifest.shards[name].source_header.data_size for name in todo),
    )
    with arriving(folder, files, progress.advance) as arrivals:
        run_side_by_side(_restore_shard, map(task, arrivals), at_once, progress.advance, finish)
    progress.finish()
    return restored


def _trusted_shards(folder: Folder, manifest: Manifest, out: OutputFolder, progress: Progress) -> list[RestoredFile]:
    """Returns the shards that an earlier run restored, hashed again."""
    trusted = []
    for name, shard in manifest.shards.items():
        sha256 = hashlib.sha256()
        if name in out.finished and out.recheck(name, folder.path(name), progress.note, [sha256]):
            trusted.append(RestoredFile(name, shard.source_size, sha256.hexdigest()))
    return trusted


def _restore_shard(task: _RestoreTask, advance: Callable[[int], None]) -> tuple[RestoredFile, FinishedFile]:
    """Restores one shard under its partial name and compares it with what the manifest recorded."""
    shard, sha256 = task.shard, hashlib.sha256()
    read, made = Xxh3(task.header.prefix), Xxh3()
    rewrite_file(
        (task.converted, task.name),
        task.partial,
        _pieces(task.header, shard.source_header, task.modules, task.quantization),
        prefix=shard.source_header.prefix,
        source_hashes=[read],
        target_hashes=[made, sha256],
        workers=task.workers,
        progress=advance,
    )
    if (task.header.file_size, str(read)) != (shard.target_size, shard.target_digest):
        raise difference(
            "wrong-digest",
            "this converted file is not the one that the conversion wrote (recorded "
            f"{shard.target_size} bytes, {shard.target_digest}; found {task.header.file_size}, {read}); it was "
            "changed or damaged since: fetch it again",
            file=task.name,
        )
    known = {str(made), f"sha256:{sha256.hexdigest()}"}
    if shard.source_header.file_size != shard.source_size or not known.issuperset(shard.source_digests):
        raise difference(
            "wrong-digest",
            f"the restored file is not the original: recorded {shard.source_size} bytes, "
            f"{', '.join(shard.source_digests)}; restored {shard.source_header.file_size}, {', '.join(sorted(known))}",
            file=task.name,
        )
    return (
        RestoredFile(task.name, shard.source_size, sha256.hexdigest()),
        FinishedFile(task.header.file_size, str(read), shard.source_size, str(made)),
    )


def _pieces(
    converted: Header, source: Header, modules: Mapping[str, ModulePlan], quantization: MarlinQuantization
) -> Iterator[Piece]:
    for tensor in converted.by_offset:
        read_at = converted.data_start + tensor.start
        write_at = source.data_start + source.tensors[tensor.name].start
        name, _, part = tensor.name.rpartition(".")
        module = modules.get(name)
        if module is None or part not in module.parts:
            yield from copy_pieces(read_at, write_at, tensor.size)
        else:
            yield from repack_of(module, part, quantization).pieces(read_at, write_at, inverse=True)


def _restore_file(name: str, recorded: tuple[int, str] | None, folder: Folder, out: OutputFolder) -> RestoredFile:
    made, sha256, found = Xxh3(), hashlib.sha256(), folder.size(name)
    rewrite_file((folder.path(name), name), out.partial(name), copy_pieces(0, 0, found), target_hashes=[made, sha256])
    if recorded is not None and (found, str(made)) != recorded:
        raise difference(
            "wrong-digest",
            f"the file is not the original: recorded {recorded[0]} bytes, {recorded[1]}; found "
            f"{found}, {made}; it was changed since the conversion",
            file=name,
        )
    out.publish(name)
    return RestoredFile(name, found, sha256.hexdigest())


def _checked_texts(manifest: Manifest) -> dict[str, bytes]:
    """Returns the files that only the manifest holds, compared with their digests before the first byte is written."""
    texts = {name: text.encode("utf-8") for name, text in manifest.texts.items()}
    recorded = dict(manifest.text_digests)
    if manifest.card is not None:
        texts[manifest.card.name], recorded[manifest.card.name] = manifest.card.data, manifest.card.recorded
    for name, data in texts.items():
        if (len(data), str(Xxh3(data))) != recorded[name]:
            raise difference(
                "wrong-digest",
                "the text that the manifest keeps is not the one it recorded; the "
                "manifest was changed or damaged since the conversion: fetch it again",
                file=name,
            )
    return texts


def _restore_text(name: str, data: bytes, out: OutputFolder) -> RestoredFile:
    out.write(name, data)
    return RestoredFile(name, len(data), hashlib.sha256(data).hexdigest())
