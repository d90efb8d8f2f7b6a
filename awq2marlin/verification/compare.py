"""Comparing a converted checkpoint with its source, value for value.

Both layouts are unpacked to plain values by `reference`, which shares nothing with the converter's repack,
and compared exactly: q, z and the bits of the scales. Every other tensor and file is compared byte for
byte, and the manifest with what `revert` has to give back. The first difference is named with its place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.names import CARD_FILENAME, CONFIG_FILENAME, INDEX_FILENAME
from awq2marlin.checkpoint.pairing import pair_modules
from awq2marlin.checkpoint.quantization import (
    AwqQuantization,
    MarlinQuantization,
    marlin_document,
    without_quantization,
)
from awq2marlin.checkpoint.source import Checkpoint, open_checkpoint
from awq2marlin.errors import CheckpointError, DifferenceError, difference, printable, refuse
from awq2marlin.hub.repository import open_source
from awq2marlin.io.digest import xxh3_of_file
from awq2marlin.io.folder import Folder
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers
from awq2marlin.layout.marlin import is_single_group
from awq2marlin.layout.modules import ModulePlan, module_name
from awq2marlin.layout.reference import unpack_awq, unpack_marlin_qweight, unpack_marlin_qzeros, unpermute_columns
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.sampling import Device, Layers, check_count, check_device, sample_modules

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun

_BAND_BYTES = 1 << 20


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
    layers: Layers = "all",
    workers: int | None = None,
    device: Device | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compares a converted checkpoint with its source.

    Args:
        source: folder of the AWQ checkpoint, or a repository of the Hub, ``org/name[@revision]``.
        output: folder of the converted one, or a repository.
        layers: how many converted modules to compare value for value, spread over the model, or ``"all"``,
            which also hashes every file and compares the digests with the manifest's. Everything else is
            always compared in full.
        workers: threads; by default as many as there are processors, at most eight.
        device: also run the chosen modules through the Marlin GEMM, on ``"cuda"``, ``"cpu"`` (an exact reference)
            or ``"auto"``, the GPU if there is one.
        progress: told what is being done.

    Raises:
        DifferenceError: naming the first difference: file, tensor, row, column, expected and found.
        CheckpointError: if either folder is no readable checkpoint of its kind.
        UnavailableError: if the device is not there, or cannot run the kernels.
        OSError: if reading fails.
    """
    check_count("layers", layers, ("all",))
    check_device(device)
    started = time.perf_counter()
    progress = progress or Silence()
    awq, marlin = _open_pair(source, output)
    manifest = read_manifest(marlin.folder)
    modules = _pair(awq, marlin, same_files=manifest.restores == "files")
    files = _compare_side_files(awq, marlin, manifest, modules) if manifest.restores == "files" else []
    chosen = sample_modules(modules, layers)
    parts = {module_name(each.name, part) for each in modules for part in each.parts}
    others = [name for name in awq.tensors if name not in parts]
    old, new = TensorFiles.of(awq.folder, awq.shards), TensorFiles.of(marlin.folder, marlin.shards)
    hashed = list(_recorded_files(manifest, awq, marlin)) if layers == "all" else []
    total = _module_bytes(chosen, old) + sum(old.info(name).size for name in others)
    progress.start("verify", total + sum(size for _, _, size, _ in hashed))
    jobs: list[Callable[[], None]] = [
        *(_tensor_job(name, old, new, progress) for name in others),
        *(_module_job(each, awq, old, new, progress) for each in chosen),
        *(_digest_job(*recorded, progress) for recorded in hashed),
    ]
    _run(jobs, check_workers(workers))
    progress.finish()
    assert isinstance(awq.quantization, AwqQuantization)
    gemm = run_gemm(chosen, awq.quantization, old, new, device, progress)
    return VerifyResult(
        awq.folder.where,
        marlin.folder.where,
        tuple(chosen),
        len(modules),
        len(others),
        len(files),
        total,
        time.perf_counter() - started,
        gemm,
    )


def run_gemm(
    modules: Sequence[ModulePlan],
    quantization: AwqQuantization,
    source: TensorFiles,
    output: TensorFiles,
    device: Device | None,
    progress: Progress,
) -> GemmRun | None:
    """Runs modules through the Marlin GEMM, if a device is named; see `gemm.verification.check_modules`."""
    if device is None:
        return None
    from awq2marlin.gemm.check import check_modules  # brings torch along

    return check_modules(modules, quantization, source, output, device, progress)


def _open_pair(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    awq, marlin = open_checkpoint(open_source(source)), open_checkpoint(open_source(output))
    if not isinstance(awq.quantization, AwqQuantization):
        raise refuse(
            "already-converted",
            "the first folder must be the AWQ source; this one is converted",
            file=str(source),
        )
    if not isinstance(marlin.quantization, MarlinQuantization):
        raise refuse(
            "not-converted",
            "the second folder must be a converted checkpoint; this one is AWQ",
            file=str(output),
        )
    return awq, marlin


def _pair(awq: Checkpoint, marlin: Checkpoint, *, same_files: bool) -> list[ModulePlan]:
    """Compares everything that headers and configs say; returns the converted modules.

    An engine that saves a checkpoint writes its own headers and config; then only the tensors must agree.
    """
    assert isinstance(awq.quantization, AwqQuantization)
    try:
        converted = pair_modules(awq.shards, awq.quantization, marlin, same_files=same_files)
    except CheckpointError as error:
        raise DifferenceError(error.problems) from None
    modules = list(converted.values())
    if same_files:
        _compare_headers(awq, marlin)
    _compare_configs(awq, marlin, modules, whole=same_files)
    return modules


def _compare_side_files(
    awq: Checkpoint, marlin: Checkpoint, manifest: Manifest, modules: Sequence[ModulePlan]
) -> list[str]:
    """Compares everything that is no tensor, and the manifest; returns the files that both hold byte for byte."""
    padded = any(each.is_padded for each in modules)
    files = [*awq.side_files, *([INDEX_FILENAME] if awq.has_index and not padded else [])]
    for name in files:
        _compare_files(awq.folder, marlin.folder, name)
    if awq.has_index and padded:
        _compare_padded_index(awq, marlin)
    _compare_manifest(awq, manifest, files)
    return files


def _compare_headers(awq: Checkpoint, marlin: Checkpoint) -> None:
    """Compares what the pairing does not ask: the metadata and the order of the names."""
    for name, header in awq.shards.items():
        expected, found = (json.loads(each.text) for each in (header, marlin.shards[name]))
        if expected.get("__metadata__") != found.get("__metadata__"):
            raise difference("header", "the header's metadata is not the source's", file=name)
        if list(expected) != list(found):
            raise difference("header", "the header's names stand in another order than in the source", file=name)


def _compare_configs(awq: Checkpoint, marlin: Checkpoint, modules: Sequence[ModulePlan], *, whole: bool) -> None:
    """Compares the output's config, or only its part on quantization, with what its own lists of modules imply."""
    quantization = marlin.quantization
    assert isinstance(quantization, MarlinQuantization)
    assert isinstance(awq.quantization, AwqQuantization)
    padded = {each.name: (each.size_k, each.size_n) for each in modules if each.is_padded}
    expected = marlin_document(awq.quantization, list(quantization.awq_modules), awq.unquantized_modules, padded)
    found = marlin.config.get("quantization_config")
    if not _same_json(found, expected):
        known = found if isinstance(found, dict) else {}
        keys = [key for key in expected if not _same_json(known.get(key), expected[key])]
        keys += [key for key in ("padded_modules",) if key in known and key not in expected]
        raise difference(
            "config",
            f"quantization_config differs from what the source implies, in {', '.join(keys) or 'an additional key'}",
            file=CONFIG_FILENAME,
        )
    if whole and not _same_json(without_quantization(awq.config), without_quantization(marlin.config)):
        raise difference(
            "config", "a key other than quantization_config differs from the source's", file=CONFIG_FILENAME
        )


def _same_json(left: Any, right: Any) -> bool:
    """Returns whether two documents hold the same; to Python, false equals 0 and NaN does not equal NaN."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _compare_padded_index(awq: Checkpoint, marlin: Checkpoint) -> None:
    """Compares the indexes where padding makes another total size."""
    expected, found = (each.folder.read_json(INDEX_FILENAME) for each in (awq, marlin))
    metadata = expected.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(header.data_size for header in marlin.shards.values())
    if not _same_json(expected, found):
        raise difference("different-bytes", "it differs from the source's in more than total_size", file=INDEX_FILENAME)


def _compare_manifest(awq: Checkpoint, manifest: Manifest, files: Sequence[str]) -> None:
    """Compares what `revert` would give back with the source, but for digests.

    Args:
        awq: the source.
        manifest: of the converted checkpoint.
        files: those that both hold, byte for byte.
    """
    texts = [CONFIG_FILENAME, *awq.legacy_configs]
    if awq.has_index and INDEX_FILENAME not in files:
        texts.append(INDEX_FILENAME)
    for recorded, there in ((manifest.shards, awq.shards), (manifest.files, files), (manifest.texts, texts)):
        for name in sorted(set(recorded) ^ set(there)):
            which = "the manifest" if name in recorded else "the source"
            raise difference("manifest", f"only {which} has it, so it would not come back as it was", file=name)
    _compare_card(awq, manifest)
    for name, shard in manifest.shards.items():
        if shard.source_header.text != awq.shards[name].text:
            raise difference("manifest", "the header that the manifest keeps is not the source's", file=name)
    for name, text in manifest.texts.items():
        if text.encode("utf-8", "surrogatepass") != awq.folder.read(name):
            raise difference("manifest", "the text that the manifest keeps is not the source's", file=name)


def _compare_card(awq: Checkpoint, manifest: Manifest) -> None:
    """Compares the model card that `revert` would give back; the output's own is free text for people."""
    recorded = manifest.card.name if manifest.card else None
    if awq.card != recorded:
        which = "the manifest" if recorded else "the source"
        raise difference("manifest", f"only {which} has it, so it would not come back as it was", file=CARD_FILENAME)
    if awq.card is not None and manifest.card is not None and awq.folder.read(awq.card) != manifest.card.data:
        raise difference("manifest", "the model card that the manifest keeps is not the source's", file=awq.card)


def _recorded_files(manifest: Manifest, awq: Checkpoint, marlin: Checkpoint) -> Iterator[tuple[Folder, str, int, str]]:
    """Yields folder, name, size and digest of every file whose digest the manifest records."""
    for name, shard in manifest.shards.items():
        if shard.source_digests:
            yield awq.folder, name, shard.source_size, shard.source_digests[0]
        yield marlin.folder, name, shard.target_size, shard.target_digest
    for name, (size, digest) in manifest.files.items():
        yield marlin.folder, name, size, digest


def _module_bytes(modules: Sequence[ModulePlan], files: TensorFiles) -> int:
    return sum(files.info(module_name(each.name, part)).size for each in modules for part in each.parts)


def _run(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Runs comparisons side by side; the error raised is that of the first job, in order, that found one."""
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def verify_modules(
    modules: Sequence[ModulePlan],
    quantization: AwqQuantization,
    source: TensorFiles,
    output: TensorFiles,
    *,
    workers: int,
    progress: Progress,
) -> None:
    """Compares modules value for value; the converter calls it before its output becomes loadable.

    Args:
        modules: which.
        quantization: the source's.
        source: the AWQ tensors.
        output: the Marlin tensors.
        workers: threads.
        progress: told of every module.

    Raises:
        DifferenceError: naming the first difference.
    """
    progress.start("verify", _module_bytes(modules, source))
    _run([_module_job_of(each, quantization, source, output, progress) for each in modules], workers)
    progress.finish()


def _module_job(
    each: ModulePlan, awq: Checkpoint, old: TensorFiles, new: TensorFiles, progress: Progress
) -> Callable[[], None]:
    assert isinstance(awq.quantization, AwqQuantization)
    return _module_job_of(each, awq.quantization, old, new, progress)


def _module_job_of(
    each: ModulePlan, quantization: AwqQuantization, old: TensorFiles, new: TensorFiles, progress: Progress
) -> Callable[[], None]:
    def job() -> None:
        for part in each.parts:
            for first, expected, found in _plain_bands(each, part, quantization, old, new):
                _compare_values(module_name(each.name, part), part, first, expected, found, new)
            progress.advance(old.info(module_name(each.name, part)).size)

    return job


def _plain_bands(
    each: ModulePlan, part: str, quantization: AwqQuantization, old: TensorFiles, new: TensorFiles
) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yields (first row, expected, found): bands of plain values of one tensor, padding included."""
    name = module_name(each.name, part)
    bits, size_n = quantization.bits, each.size_n
    source_rows, target = old.info(name).shape[0], new.info(name)
    band = 16 if part == "qweight" else 1
    rows_at_once = max(1, _BAND_BYTES // max(1, target.size // target.shape[0]))
    single = is_single_group(each.padded_k, quantization.group_size)
    for first in range(0, target.shape[0], rows_at_once):
        last = min(first + rows_at_once, target.shape[0])
        begin, end = (min(row * band, source_rows) for row in (first, last))
        if part == "scales":
            old_values = old.rows(name, begin, end, np.uint16)
            found = unpermute_columns(new.rows(name, first, last, np.uint16), single)
        else:
            old_values = unpack_awq(old.rows(name, begin, end, np.uint32), bits)
            unpack = unpack_marlin_qweight if part == "qweight" else unpack_marlin_qzeros
            found = unpack(new.rows(name, first, last, np.uint32), bits)
        expected = old_values
        if old_values.shape != found.shape:
            expected = np.zeros(found.shape, found.dtype)
            expected[: end - begin, :size_n] = old_values
        yield first * band, expected, found


def _compare_values(
    name: str,
    part: str,
    first_row: int,
    expected: npt.NDArray[Any],
    found: npt.NDArray[Any],
    files: TensorFiles,
) -> None:
    if np.array_equal(expected, found):
        return
    row, column = (int(index) for index in np.argwhere(expected != found)[0])
    what = {"qweight": "value", "qzeros": "zero point", "scales": "scale (bits)"}[part]
    raise difference(
        "different-value",
        f"{what} at row {first_row + row}, column {column}: "
        f"expected {expected[row, column]}, found {found[row, column]}",
        file=files.shard_of[name],
        tensor=name,
    )


def _tensor_job(name: str, old: TensorFiles, new: TensorFiles, progress: Progress) -> Callable[[], None]:
    def job() -> None:
        size = old.info(name).size
        for begin in range(0, size, _BAND_BYTES):
            end = min(begin + _BAND_BYTES, size)
            expected, found = old.read(name, begin, end), new.read(name, begin, end)
            if not np.array_equal(expected, found):
                at = int(np.argmax(expected != found))
                raise difference(
                    "different-bytes",
                    f"{_place(old.info(name), begin + at)}: expected byte {expected[at]:#04x}, found {found[at]:#04x}",
                    file=new.shard_of[name],
                    tensor=name,
                )
            progress.advance(end - begin)

    return job


def _digest_job(folder: Folder, name: str, size: int, digest: str, progress: Progress) -> Callable[[], None]:
    def job() -> None:
        found = xxh3_of_file((folder.path(name), name))
        if found != (size, digest):
            raise difference(
                "manifest",
                f"the manifest records {size} bytes, {digest}; the file in {printable(str(folder.where))} has "
                f"{found[0]}, {found[1]}",
                file=name,
            )
        progress.advance(size)

    return job


def _place(tensor: TensorInfo, offset: int) -> str:
    """Returns where a byte of a tensor lies, as row and column where that makes sense."""
    if len(tensor.shape) != 2 or not tensor.size:
        return f"byte {offset}"
    row, rest = divmod(offset, tensor.size // tensor.shape[0])
    return f"row {row}, column {rest * tensor.shape[1] // (tensor.size // tensor.shape[0])}, byte {offset}"


def _compare_files(old: Folder, new: Folder, name: str) -> None:
    if not new.exists(name):
        raise difference("missing-file", "the source has this file, the output does not", file=name)
    with old.open(name) as expected, new.open(name) as found:
        offset = 0
        while True:
            left, right = expected.read(_BAND_BYTES), found.read(_BAND_BYTES)
            if left != right:
                at = next(
                    (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                    min(len(left), len(right)),
                )
                raise difference(
                    "different-bytes", f"the file differs from the source's at byte {offset + at}", file=name
                )
            if not left:
                return
            offset += len(left)
