"""What lies beside the shards: files carried over, the index, the manifest."""

from __future__ import annotations

from collections.abc import Mapping

from awq2marlin.checkpoint.manifest import Manifest, ManifestShard, SourceCard
from awq2marlin.checkpoint.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.errors import refuse
from awq2marlin.io.digest import Xxh3
from awq2marlin.io.folder import MAX_JSON_BYTES, Folder
from awq2marlin.io.safetensors import MAX_HEADER_BYTES
from awq2marlin.io.stream import copy_pieces, rewrite_file
from awq2marlin.io.strict_json import encode_json
from awq2marlin.pipeline.output import FinishedFile, OutputFolder
from awq2marlin.pipeline.plan import Plan, ShardPlan

#: How many bytes of a JSON file one byte of a text may become: a control character is written ``\\u0000``.
_MOST_GROWTH = 6

#: What an entry of a JSON file needs beside its name and text: keys, numbers, digests, white space.
_ENTRY_BYTES = 1000

#: Stands for a digest that is not known yet; they are all of one length.
_ANY_DIGEST = str(Xxh3())


def refuse_unreadable(plan: Plan) -> None:
    """Refuses a conversion whose output would break a limit of those who read it, before anything is written.

    Args:
        plan: the whole plan.

    Raises:
        CheckpointError: if a header, the config, the index or the manifest would be too long.
    """
    for shard in plan.shards:
        _refuse_long(len(shard.target.text), MAX_HEADER_BYTES, "the header", shard.name)
    _refuse_long(len(encode_json(plan.config())), MAX_JSON_BYTES, "the file", CONFIG_FILENAME)
    if _is_index_rewritten(plan):
        _refuse_long(len(_padded_index(plan)), MAX_JSON_BYTES, "the file", INDEX_FILENAME)
    if _MOST_GROWTH * _recorded_bytes(plan) <= MAX_JSON_BYTES:  # nearly always; spares compressing all headers twice
        return
    sizes = {shard.name: (shard.source.file_size, shard.target.file_size) for shard in plan.shards}
    done = {name: FinishedFile(old, _ANY_DIGEST, new, _ANY_DIGEST) for name, (old, new) in sizes.items()}
    carried = {name: (plan.checkpoint.folder.size(name), _ANY_DIGEST) for name in _carried_names(plan)}
    _manifest(plan, done, carried).encode()


def _recorded_bytes(plan: Plan) -> int:
    """Returns how many bytes of the source the manifest holds in some form; no fewer."""
    checkpoint = plan.checkpoint
    files = [*_rewritten_names(plan), *([checkpoint.card] if checkpoint.card else [])]
    names = [*checkpoint.shards, *checkpoint.side_files, *checkpoint.left_behind, *checkpoint.left_behind.values()]
    texts = sum(map(checkpoint.folder.size, files)) + sum(len(shard.source.text) for shard in plan.shards)
    return texts + sum(len(name.encode()) for name in names) + _ENTRY_BYTES * (len(names) + len(files))


def _refuse_long(size: int, limit: int, what: str, file: str) -> None:
    if size > limit:
        message = f"{what} would have {size} bytes in the output, more than the limit of {limit}; shorten the source's"
        raise refuse("too-large", message, file=file)


def carry_side_files(plan: Plan, out: OutputFolder) -> dict[str, tuple[int, str]]:
    """Copies what belongs to the checkpoint unchanged; returns size and digest of each file."""
    folder = plan.checkpoint.folder
    if _is_index_rewritten(plan):
        out.write(INDEX_FILENAME, _padded_index(plan))
    carried = {}
    for name in _carried_names(plan):
        digest, size = Xxh3(), folder.size(name)
        rewrite_file((folder.path(name), name), out.partial(name), copy_pieces(0, 0, size), target_hashes=[digest])
        out.publish(name)
        folder.release(name)
        carried[name] = (size, str(digest))
    return carried


def _is_index_rewritten(plan: Plan) -> bool:
    return plan.checkpoint.has_index and plan.source_data_bytes != plan.target_data_bytes


def _carried_names(plan: Plan) -> list[str]:
    """Returns the files that are in the output as they are in the source."""
    has_same_index = plan.checkpoint.has_index and not _is_index_rewritten(plan)
    return [*plan.checkpoint.side_files, *([INDEX_FILENAME] if has_same_index else [])]


def _rewritten_names(plan: Plan) -> list[str]:
    """Returns the files whose text only the manifest holds."""
    index = [INDEX_FILENAME] if _is_index_rewritten(plan) else []
    return [CONFIG_FILENAME, *plan.checkpoint.legacy_configs, *index]


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
    out.write(MANIFEST_FILENAME, _manifest(plan, out.finished, carried).encode())


def _manifest(plan: Plan, finished: Mapping[str, FinishedFile], carried: Mapping[str, tuple[int, str]]) -> Manifest:
    checkpoint, folder = plan.checkpoint, plan.checkpoint.folder
    shards = {
        shard.name: _manifest_shard(shard, finished[shard.name], folder.sha256(shard.name)) for shard in plan.shards
    }
    texts = {name: _exact_text(folder, name) for name in _rewritten_names(plan)}
    digests = {name: (len(text.encode()), str(Xxh3(text.encode()))) for name, text in texts.items()}
    repo_id, revision = folder.origin or (None, None)
    card = SourceCard.of(checkpoint.card, folder.read(checkpoint.card)) if checkpoint.card else None
    return Manifest(shards, texts, digests, carried, repo_id, revision, checkpoint.left_behind, card=card)


def _manifest_shard(shard: ShardPlan, done: FinishedFile, sha256: str | None) -> ManifestShard:
    digests = (done.source_digest, *([f"sha256:{sha256}"] if sha256 else []))
    return ManifestShard(shard.source, done.source_size, digests, done.target_size, done.target_digest)


def _exact_text(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start})", file=name) from None
