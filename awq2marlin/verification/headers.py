"""Comparing everything of two checkpoints that is no tensor's data: headers, configs, files, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import partial

from awq2marlin.checkpoint.config import changed_keys
from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.index import converted_index, made_index
from awq2marlin.checkpoint.manifest import Manifest
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import difference
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.names import CARD_FILENAME, CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.io.source import Source
from awq2marlin.io.strict_json import same_json
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.verification.values import BAND_BYTES


def compare_side_files(
    source: Checkpoint, output: Checkpoint, manifest: Manifest, counterparts: Counterparts
) -> list[str]:
    """Compares everything that is no tensor, and the manifest; returns the files that both hold byte for byte.

    Raises:
        DifferenceError: naming the first file that differs.
    """
    files = [*source.side_files, *_same_index(source, output, manifest, counterparts)]
    for name in files:
        _compare_files(source.folder, output.folder, name)
    _compare_manifest(source, manifest, files)
    return files


def _same_index(source: Checkpoint, output: Checkpoint, manifest: Manifest, counterparts: Counterparts) -> list[str]:
    """Returns the index's name if both must hold the same; compares it with what it must be if not."""
    if not source.has_index:
        if manifest.made and not same_json(output.folder.read_json(INDEX_FILENAME), made_index(output.shards)):
            raise difference("different-bytes", "it is not the index of the output's files", file=INDEX_FILENAME)
        return []
    read = partial(source.folder.read_json, INDEX_FILENAME)
    expected = converted_index(read, source.index, output.shards, counterparts)
    if expected is None:
        return [INDEX_FILENAME]
    if not same_json(expected, output.folder.read_json(INDEX_FILENAME)):
        raise difference("different-bytes", "it differs from the source's in more than total_size", file=INDEX_FILENAME)
    return []


def compare_headers(source: Checkpoint, output: Checkpoint, counterparts: Counterparts) -> None:
    """Compares what the pairing does not ask: the metadata and the order of the names.

    Raises:
        DifferenceError: naming the first file that differs.
    """
    for name, header in source.shards.items():
        made = counterparts.target_header(header, counterparts.rows(name, header))
        expected, found = (json.loads(each.text) for each in (made, output.shards[name]))
        if expected.get("__metadata__") != found.get("__metadata__"):
            raise difference("header", "the header's metadata is not the source's", file=name)
        if list(expected) != list(found):
            raise difference("header", "the header's names are in a different order than in the source", file=name)


def compare_configs(source: Checkpoint, output: Checkpoint, modules: Collection[ModulePlan], *, whole: bool) -> None:
    """Compares the output's config with what its own lists of modules imply.

    Args:
        source: the source.
        output: the converted checkpoint.
        modules: every quantized module's fate.
        whole: whether the rest of the config must be the source's, too.

    Raises:
        DifferenceError: naming the keys that differ.
    """
    expected = output.format.write_config(
        Quantization(
            output.format.target_scheme(source.quantization.scheme),
            source.quantization.modules_to_not_convert,
            awq_modules=output.quantization.awq_modules,
            unquantized_modules=frozenset(source.unquantized_modules),
            padded_modules={each.name: (each.size_k, each.size_n) for each in modules if each.is_padded},
            quantized_modules=frozenset(each.name for each in modules),
        )
    )
    found = output.config.get("quantization_config")
    if not same_json(found, expected):
        known = found if isinstance(found, dict) else {}
        keys = [key for key in expected if not same_json(known.get(key), expected[key])]
        keys += [key for key in ("padded_modules",) if key in known and key not in expected]
        raise difference(
            "config",
            f"quantization_config differs from what the source implies, in {', '.join(keys) or 'an additional key'}",
            file=CONFIG_FILENAME,
        )
    keys_apart = changed_keys(source.config, output.config) if whole else ""
    if keys_apart:
        raise difference("config", f"it differs from the source's in {keys_apart}", file=CONFIG_FILENAME)


def _compare_manifest(source: Checkpoint, manifest: Manifest, files: Sequence[str]) -> None:
    """Compares what `revert` would give back with the source, but for digests.

    Args:
        source: the source.
        manifest: of the converted checkpoint.
        files: those that both hold, byte for byte.
    """
    texts = [CONFIG_FILENAME, *source.legacy_configs]
    if source.has_index and INDEX_FILENAME not in files:
        texts.append(INDEX_FILENAME)
    if source.has_manifest:
        texts.append(MANIFEST_FILENAME)
    for recorded, there in ((manifest.shards, source.shards), (manifest.files, files), (manifest.texts, texts)):
        for name in sorted(set(recorded) ^ set(there)):
            which = "the manifest" if name in recorded else "the source"
            raise difference("manifest", f"only {which} has it, so 'revert' would not restore it", file=name)
    _compare_card(source, manifest)
    for name, shard in manifest.shards.items():
        if shard.source_header.text != source.shards[name].text:
            raise difference("manifest", "the header in the manifest is not the source's", file=name)
    for name, text in manifest.texts.items():
        if text.encode("utf-8", "surrogatepass") != source.folder.read(name):
            raise difference("manifest", "the text in the manifest is not the source's", file=name)


def _compare_card(source: Checkpoint, manifest: Manifest) -> None:
    """Compares the model card that `revert` would give back; the output's own is free text for people."""
    recorded = manifest.card.name if manifest.card else None
    if source.card != recorded:
        which = "the manifest" if recorded else "the source"
        raise difference("manifest", f"only {which} has it, so 'revert' would not restore it", file=CARD_FILENAME)
    if source.card is not None and manifest.card is not None and source.folder.read(source.card) != manifest.card.data:
        raise difference("manifest", "the model card in the manifest is not the source's", file=source.card)


def _compare_files(old: Source, new: Source, name: str) -> None:
    if not new.exists(name):
        raise difference("missing-file", "the source has this file, the output does not", file=name)
    at = first_difference(old, new, name)
    if at is not None:
        raise difference("different-bytes", f"the file differs from the source's at byte {at}", file=name)


def first_difference(old: Source, new: Source, name: str) -> int | None:
    """Returns the first byte in which two files of one name differ, or None if they are equal."""
    with old.open(name) as expected, new.open(name) as found:
        offset = 0
        while True:
            left, right = expected.read(BAND_BYTES), found.read(BAND_BYTES)
            if left != right:
                shorter = min(len(left), len(right))
                unequal = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
                return offset + next(unequal, shorter)
            if not left:
                return None
            offset += len(left)
