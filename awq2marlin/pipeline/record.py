"""What a conversion records of its source, so that `revert` can give it back."""

from __future__ import annotations

from collections.abc import Mapping

from awq2marlin.checkpoint.manifest import MAX_HEADERS_BYTES, Manifest, ManifestShard, SourceCard
from awq2marlin.errors import refuse
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import DEFAULT_TARGET, KEPT
from awq2marlin.io.digest import FileDigest, Xxh3, digest_of
from awq2marlin.io.folder import find_clash, is_plain_name
from awq2marlin.io.safetensors import MAX_HEADER_BYTES
from awq2marlin.io.source import MAX_JSON_BYTES, Source
from awq2marlin.pipeline.journal import FinishedFile
from awq2marlin.pipeline.plan import Plan
from awq2marlin.pipeline.transfer import ShardPlan

#: How many bytes of a JSON file one byte of a text may become: a control character is written ``\\u0000``.
_MOST_GROWTH = 6

#: How many one byte of a header or card may become, which is compressed and written in base64.
_MOST_PACKED_GROWTH = 1.4

#: What an entry of a JSON file needs beside its name and text: keys, numbers, digests, white space.
_ENTRY_BYTES = 1000

#: Stands for a digest that is not known yet; they are all of one length.
_ANY_DIGEST = str(Xxh3())


def manifest_of(plan: Plan, finished: Mapping[str, FinishedFile], files: Mapping[str, FileDigest]) -> Manifest:
    """Returns the manifest of a conversion.

    Args:
        plan: the conversion's.
        finished: what every shard and its source are known by.
        files: what every file that was carried over is known by.
    """
    checkpoint, folder = plan.checkpoint, plan.checkpoint.folder
    shards = {
        shard.name: _manifest_shard(shard, finished[shard.name], folder.sha256(shard.name)) for shard in plan.shards
    }
    texts = {name: _exact_text(folder, name) for name in _rewritten_names(plan)}
    digests = {name: digest_of(text.encode()) for name, text in texts.items()}
    repo_id, revision = folder.origin or (None, None)
    card = SourceCard.of(checkpoint.card, folder.read(checkpoint.card)) if checkpoint.card else None
    carried = {name: FileDigest(files[name].size, files[name].xxh3) for name in plan.transfer.carried}
    names_then = all(map(is_plain_name, carried)) and not find_clash([*carried])
    refused_then = MANIFEST_FILENAME in texts or checkpoint.index.copies or not names_then  # by version 0.1
    version = 1 if _is_known_to_0_1(plan) and not refused_then else 2
    made = {} if plan.new_index is None or checkpoint.has_index else {INDEX_FILENAME: digest_of(plan.new_index)}
    left_behind = checkpoint.left_behind
    return Manifest(
        shards, texts, digests, carried, repo_id, revision, left_behind, card=card, version=version, made=made
    )


def _is_known_to_0_1(plan: Plan) -> bool:
    """Returns whether version 0.1 can take a conversion back: AWQ to Marlin-native, no tensor dropped or made."""
    is_first_pair = (plan.counterparts.source, plan.target) == (KEPT, DEFAULT_TARGET)
    return is_first_pair and all(shard.source.tensors.keys() == shard.target.tensors.keys() for shard in plan.shards)


def _manifest_shard(shard: ShardPlan, done: FinishedFile, sha256: str | None) -> ManifestShard:
    return ManifestShard(shard.source, FileDigest(done.source.size, done.source.xxh3, sha256), done.target)


def _rewritten_names(plan: Plan) -> list[str]:
    """Returns the files whose text only the manifest holds."""
    index = [INDEX_FILENAME] if plan.new_index is not None and plan.checkpoint.has_index else []
    earlier = [MANIFEST_FILENAME] if plan.checkpoint.has_manifest else []
    return [CONFIG_FILENAME, *plan.checkpoint.legacy_configs, *index, *earlier]


def _exact_text(folder: Source, name: str) -> str:
    try:
        return folder.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("bad-json", f"it is not UTF-8 (byte {error.start})", file=name) from None


def refuse_unreadable(plan: Plan) -> None:
    """Refuses a conversion whose output would break a limit of those who read it, before anything is written.

    Args:
        plan: the whole plan.

    Raises:
        CheckpointError: if a header, the config, the index or the manifest would be too long.
    """
    for shard in plan.shards:
        _refuse_long(len(shard.target.text), MAX_HEADER_BYTES, "the header", shard.name)
    _refuse_long(len(plan.transfer.config), MAX_JSON_BYTES, "the file", CONFIG_FILENAME)
    if plan.new_index is not None:
        _refuse_long(len(plan.new_index), MAX_JSON_BYTES, "the file", INDEX_FILENAME)
    if _most_bytes(plan) <= MAX_JSON_BYTES and _header_bytes(plan) <= MAX_HEADERS_BYTES:
        return  # nearly always; spares compressing all headers twice
        return
    sizes = {shard.name: (shard.source.file_size, shard.target.file_size) for shard in plan.shards}
    done = {name: FinishedFile(_unknown(old), _unknown(new)) for name, (old, new) in sizes.items()}
    manifest_of(
        plan, done, {name: _unknown(plan.checkpoint.folder.size(name)) for name in plan.transfer.carried}
    ).encode()


def _unknown(size: int) -> FileDigest:
    return FileDigest(size, _ANY_DIGEST)


def _header_bytes(plan: Plan) -> int:
    """Returns how many bytes the headers of all source shards have together."""
    return sum(len(shard.source.text) for shard in plan.shards)


def _most_bytes(plan: Plan) -> float:
    """Returns how many bytes the manifest will have, at most."""
    checkpoint = plan.checkpoint
    texts, card = _rewritten_names(plan), [checkpoint.card] if checkpoint.card else []
    names = [*checkpoint.shards, *checkpoint.side_files, *checkpoint.left_behind, *checkpoint.left_behind.values()]
    written = sum(map(checkpoint.folder.size, texts)) + sum(2 * len(name) for name in names)
    packed = _header_bytes(plan) + sum(map(checkpoint.folder.size, card))
    entries = len(names) + len(texts) + len(card)
    return _MOST_GROWTH * written + _MOST_PACKED_GROWTH * packed + _ENTRY_BYTES * entries


def _refuse_long(size: int, limit: int, what: str, file: str) -> None:
    if size > limit:
        message = f"{what} would have {size} bytes in the output, more than the limit of {limit}; shorten the source's"
        raise refuse("too-large", message, file=file)
