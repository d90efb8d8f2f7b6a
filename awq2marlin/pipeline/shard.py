"""The unit of work: one shard in, one shard out. Picklable tasks, a pure function."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from awq2marlin._version import __version__
from awq2marlin.errors import ExecutorError, Problem, refuse
from awq2marlin.io.digest import FileDigest, Xxh3, hexdigest
from awq2marlin.io.folder import open_regular, other_contents, read_range
from awq2marlin.io.stream import NamedPath, Piece, copy_pieces, rewrite_file
from awq2marlin.layout.repack import Bytes, Place
from awq2marlin.pipeline.transfer import ShardPlan


@dataclass(frozen=True)
class ShardTask:
    """One shard to rewrite.

    Attributes:
        plan: what becomes of its bytes.
        source: resolved path of the source file.
        partial: where the output grows; every attempt adds letters of its own, so that two never write one file.
        workers: threads to use.
        sha256: what the source's has to be, 64 hexadecimal digits; None if that is not known.
        with_sha256: whether the output's SHA-256 is asked for.
        others: resolved paths of other source files that are read besides, by name.
        fetched: bytes of other source files that are not here.
        version: of this package; whoever does the task must have the same.
        number: a random one, so that an executor that keeps results (Dask does) never takes this task for an equal
            one of another run.
    """

    plan: ShardPlan
    source: Path
    partial: Path
    workers: int
    sha256: str | None = None
    with_sha256: bool = False
    others: Mapping[str, Path] = field(default_factory=dict)
    fetched: Mapping[Place, bytes] = field(default_factory=dict)
    version: str = __version__
    number: int = field(default_factory=lambda: secrets.randbits(64))


@dataclass(frozen=True)
class ShardResult:
    """A finished shard, complete and synced, but without its final name.

    Attributes:
        name: file name.
        partial: where the output is.
        source: what the source is known by, as it was read.
        target: what the output is known by, as it was written.
    """

    name: str
    partial: Path
    source: FileDigest
    target: FileDigest


def rewrite_shard(task: ShardTask, progress: Callable[[int], None] | None = None) -> ShardResult:
    """Rewrites one shard: reads it once, writes it once.

    Done twice, also at the same time, it writes the same bytes to two files; whoever asked for it gives one of them
    the final name.

    Args:
        task: what to do.
        progress: called by any thread with the bytes read since its last call.

    Raises:
        CheckpointError: if the source is not what was planned with, or what its SHA-256 says.
        ExecutorError: if this process is not of the version that made the task, or does not see its files.
        OSError: if reading or writing fails.
    """
    plan = task.plan
    _check_version(task)
    _check_seen(task)
    _check_unchanged(task)
    partial = task.partial.with_name(f"{secrets.token_hex(4)}-{task.partial.name}")
    read, made = Xxh3(plan.source.prefix), Xxh3()
    source_sha256 = hashlib.sha256(plan.source.prefix) if task.sha256 else None
    target_sha256 = hashlib.sha256() if task.with_sha256 else None
    rewrite_file(
        NamedPath(task.source, plan.name),
        partial,
        _pieces(task),
        size=plan.target.file_size,
        prefix=plan.target.prefix,
        source_hashes=[each for each in (read, source_sha256) if each],
        target_hashes=[each for each in (made, target_sha256) if each],
        workers=task.workers,
        progress=progress,
    )
    if source_sha256 and task.sha256 and source_sha256.hexdigest() != task.sha256:
        partial.unlink()
        raise other_contents(plan.name, task.source, source_sha256.hexdigest(), task.sha256)
    source = FileDigest(plan.source.file_size, str(read), hexdigest(source_sha256))
    target = FileDigest(plan.target.file_size, str(made), hexdigest(target_sha256))
    return ShardResult(plan.name, partial, source, target)


def _check_version(task: ShardTask) -> None:
    if task.version != __version__:
        raise ExecutorError(
            Problem(
                task.plan.name,
                "",
                "other-version",
                f"a worker has awq2marlin {__version__}, but this conversion was started with {task.version}; "
                "install the same version on all of them",
            )
        )


def _check_seen(task: ShardTask) -> None:
    for path in (task.source, task.partial.parent):
        if not path.exists():
            raise ExecutorError(
                Problem(
                    str(path),
                    "",
                    "not-shared",
                    f"it is gone, or this worker ({socket.gethostname()}) does not see it; source and "
                    "output must be on storage that all workers share, under the same path",
                )
            )


def _check_unchanged(task: ShardTask) -> None:
    prefix = task.plan.source.prefix
    with open_regular(task.source, task.plan.name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != task.plan.source.file_size or stream.read(len(prefix)) != prefix:
            raise refuse(
                "changed",
                "the file changed during the conversion; make sure that nothing writes to the source, "
                "and run the command again",
                file=task.plan.name,
            )


def _pieces(task: ShardTask) -> Iterator[Piece]:
    plan = task.plan
    for span in plan.spans:
        read_at, write_at = plan.source.data_start + span.source[0], plan.target.data_start + span.target[0]
        if span.rewrite is None:
            yield from copy_pieces(read_at, write_at, span.source[1] - span.source[0])
        else:
            yield from span.rewrite.pieces(read_at, write_at, partial(_read_beside, task))


def _read_beside(task: ShardTask, place: Place) -> Bytes:
    """Returns the bytes of another tensor, from this file or another one."""
    data = task.fetched.get(place)
    if data is None:
        path = task.source if place.file == task.plan.name else task.others[place.file]
        with open_regular(path, place.file) as stream:
            data = read_range(stream, place.begin, place.end, place.file)
    return np.frombuffer(data, np.uint8)
