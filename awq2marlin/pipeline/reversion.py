"""Planning the way back: from a converted checkpoint to the one it was made from, byte for byte.

Headers come from the manifest, data from the inverse repack, side files and texts as they were. Every file is compared
with what the manifest recorded of it. Of a checkpoint that an engine saved the source's files are not known: its
manifest describes a checkpoint of the same tensors in AWQ layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from awq2marlin._version import __version__
from awq2marlin.checkpoint.converted import ConvertedCheckpoint
from awq2marlin.checkpoint.counterparts import Row, inverse_row
from awq2marlin.checkpoint.manifest import Manifest
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import difference, refuse
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.io.digest import FileDigest, digest_of
from awq2marlin.io.safetensors import Header
from awq2marlin.io.source import Source
from awq2marlin.pipeline.transfer import Expected, ShardPlan, Transfer, spans_of


def plan_reversion(converted: ConvertedCheckpoint) -> Transfer:
    """Returns what the way back reads and writes.

    Args:
        converted: the converted checkpoint, whose headers agree with its manifest.

    Raises:
        CheckpointError: if a file that the manifest names is not there.
        DifferenceError: if a text in the manifest is not what it recorded.
    """
    checkpoint, manifest = converted.checkpoint, converted.manifest
    carried = _carried_files(manifest, checkpoint)
    texts = _checked_texts(manifest)
    config = texts.pop(CONFIG_FILENAME)
    return Transfer(
        "revert",
        checkpoint.folder,
        tuple(_plan_shard(name, converted) for name in sorted(manifest.shards)),
        carried,
        texts,
        (),
        config,
        _digest(checkpoint.folder),
        {name: Expected(shard.target, shard.source) for name, shard in manifest.shards.items()},
    )


def _plan_shard(name: str, converted: ConvertedCheckpoint) -> ShardPlan:
    """Returns how one converted file becomes the original: the rows of the conversion, the other way round."""
    source, target = converted.checkpoint.shards[name], converted.manifest.shards[name].source_header
    rows = [inverse_row(_placed(row, source), name) for row in converted.counterparts.rows(name, target)]
    return ShardPlan(name, source, target, spans_of(rows, converted.checkpoint.index))


def _placed(row: Row, converted: Header) -> Row:
    """Returns a row with the counterpart's real place in the converted file."""
    return row if row.target is None else replace(row, target=converted.tensors[row.target.name])


def _carried_files(manifest: Manifest, checkpoint: Checkpoint) -> Mapping[str, FileDigest | None]:
    """Returns the side files to give back, with what was recorded of them.

    Missing and unsafe ones are refused here, before anything is written.
    """
    if manifest.restores == "tensors":
        return dict.fromkeys(name for name in checkpoint.side_files if name not in manifest.texts)
    for name in manifest.files:
        if not checkpoint.folder.exists(name):
            raise refuse("missing-file", "the manifest lists this file, but it is missing; download it too", file=name)
        checkpoint.folder.check(name)
    return manifest.files


def _checked_texts(manifest: Manifest) -> dict[str, bytes]:
    """Returns the files that only the manifest holds, compared with their digests before the first byte is written."""
    texts = {name: text.encode("utf-8") for name, text in manifest.texts.items()}
    recorded = dict(manifest.text_digests)
    if manifest.card is not None:
        texts[manifest.card.name], recorded[manifest.card.name] = manifest.card.data, manifest.card.recorded
    for name, data in texts.items():
        if not recorded[name].is_of(digest_of(data)):
            raise difference(
                "wrong-digest",
                "the text in the manifest does not match its digest; the manifest was changed or "
                "damaged after the conversion: download it again, or convert the source again",
                file=name,
            )
    return texts


def _digest(folder: Source) -> str:
    identity = hashlib.sha256(f"revert {__version__}\n".encode())
    for name in (MANIFEST_FILENAME, CONFIG_FILENAME):
        identity.update(hashlib.sha256(folder.read(name)).digest())
    return "sha256:" + identity.hexdigest()


def recorded_files(converted: ConvertedCheckpoint, transfer: Transfer) -> dict[str, FileDigest]:
    """Returns what every file that comes back is known by, as far as it was recorded.

    Args:
        converted: the converted checkpoint.
        transfer: its way back.
    """
    if converted.manifest.restores == "tensors":
        return {}
    shards = {name: expected.target for name, expected in transfer.expected.items()}
    texts = {name: digest_of(data) for name, data in {**transfer.texts, CONFIG_FILENAME: transfer.config}.items()}
    return {name: file for name, file in {**shards, **transfer.carried, **texts}.items() if file is not None}
