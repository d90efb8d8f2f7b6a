"""What lies beside the shards: files carried over, the index, the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from awq2marlin.digest import Xxh3
from awq2marlin.errors import refuse
from awq2marlin.folder import CONFIG_FILENAME, INDEX_FILENAME, Folder
from awq2marlin.manifest import Manifest, ManifestShard, SourceCard
from awq2marlin.output import FinishedFile, OutputFolder
from awq2marlin.plan import Plan, ShardPlan
from awq2marlin.quantization import MANIFEST_FILENAME
from awq2marlin.stream import copy_pieces, rewrite_file


def encode_json(document: Any) -> bytes:
    """Returns a JSON side file's bytes."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def carry_side_files(plan: Plan, out: OutputFolder) -> dict[str, tuple[int, str]]:
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
        folder.release(name)
        carried[name] = (size, str(digest))
    return carried


def _padded_index(plan: Plan) -> bytes:
    """Returns the source's index with the total size that padding makes."""
    document = plan.checkpoint.folder.read_json(INDEX_FILENAME)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = plan.target_data_bytes
    return encode_json(document)


def write_manifest(plan: Plan, out: OutputFolder, carried: Mapping[str, tuple[int, str]]) -> None:
    """Writes what `revert` will need.

    Args:
        plan: the whole plan.
        out: the output folder, in which every shard is finished.
        carried: (size, digest) of the files that are there unchanged.
    """
    checkpoint = plan.checkpoint
    rewritten = [CONFIG_FILENAME, *checkpoint.legacy_configs]
    if checkpoint.has_index and INDEX_FILENAME not in carried:
        rewritten.append(INDEX_FILENAME)
    folder = checkpoint.folder
    shards = {
        shard.name: _manifest_shard(shard, out.finished[shard.name], folder.sha256(shard.name)) for shard in plan.shards
    }
    texts = {name: _exact_text(checkpoint.folder, name) for name in rewritten}
    digests = {name: (len(text.encode()), str(Xxh3(text.encode()))) for name, text in texts.items()}
    repo_id, revision = folder.origin or (None, None)
    card = SourceCard.of(checkpoint.card, folder.read(checkpoint.card)) if checkpoint.card else None
    manifest = Manifest(shards, texts, digests, carried, repo_id, revision, checkpoint.left_behind, card=card)
    out.write(MANIFEST_FILENAME, manifest.encode())


def _manifest_shard(shard: ShardPlan, done: FinishedFile, sha256: str | None) -> ManifestShard:
    digests = (done.source_digest, *([f"sha256:{sha256}"] if sha256 else []))
    return ManifestShard(shard.source, done.source_size, digests, done.target_size, done.target_digest)


def _exact_text(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start})", file=name) from None
