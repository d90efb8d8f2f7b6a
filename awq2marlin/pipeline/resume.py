"""What an earlier run of the same transfer finished, and whether it is still to be trusted."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from awq2marlin.io.digest import FileDigest, hexdigest
from awq2marlin.pipeline.run import Work
from awq2marlin.pipeline.sink import Sink
from awq2marlin.pipeline.transfer import Transfer


def trusted_shards(
    transfer: Transfer,
    sink: Sink,
    work: Work,
) -> dict[str, FileDigest]:
    """Returns the shards that an earlier run finished, source and output hashed again; the others are forgotten.

    The contents of a repository's files are fixed by its commit, so they are not fetched again to be hashed.

    Args:
        transfer: what is read and written.
        sink: where it goes.
        work: how it is done: what was not compared as this run is asked to cannot be any more, its source may be gone.

    Returns:
        What each of them is known by.
    """
    out, source = sink.out, transfer.source
    had_finished = bool(out.finished)
    for name, entry in [*out.finished.items()]:
        if (work.check and entry.verified != work.check) or (entry.sent and not sink.has(name, entry)):
            out.forget(name)
    trusted = {}
    for shard in transfer.shards:
        if shard.name not in out.finished:
            continue
        entry = out.finished[shard.name]
        sha256 = hashlib.sha256() if work.with_sha256 else None
        path = None if source.origin else source.path(shard.name)
        also = [sha256] if sha256 else []
        if entry.sent or out.recheck(shard.name, path, work.progress.note, also):
            trusted[shard.name] = replace(entry.target, sha256=hexdigest(sha256))
    if trusted:
        work.progress.note(f"resuming: {len(trusted)} of {len(transfer.shards)} shards are already there")
    elif out.was_begun and not had_finished:
        work.progress.note("starting again: an earlier run left no finished shard here")
    return trusted
