"""A converted checkpoint: what its headers must hold, and the source that its manifest remembers.

No engine checks that a quantized checkpoint is complete: a tensor that is missing is loaded as garbage. Loaders ask
`converted_modules` first. No tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from awq2marlin.checkpoint.choice import Choice, Recorded
from awq2marlin.checkpoint.config import Document, quantization_documents
from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.index import index_of
from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.checkpoint.pairing import counterparts_of, expected_tensors, pair
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME, LEGACY_CONFIG_FILENAMES, MANIFEST_FILENAME
from awq2marlin.formats.registry import recognise
from awq2marlin.io.digest import digest_of
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo
from awq2marlin.io.source import Source
from awq2marlin.io.strict_json import parse_json
from awq2marlin.layout.modules import ModulePlan


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint that a conversion wrote, with what its manifest says of the source.

    Attributes:
        checkpoint: its configs and headers.
        manifest: what is known of its source.
        source: the headers of its source.
        counterparts: what became of the source's modules.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    source: TensorIndex
    counterparts: Counterparts

    @classmethod
    def open(cls, folder: Source, otherwise: str) -> ConvertedCheckpoint:
        """Opens a converted checkpoint, and checks that its headers and those in the manifest agree.

        Args:
            folder: where it lies.
            otherwise: what to say of a checkpoint that is not converted.

        Raises:
            CheckpointError: if it is none, or not sound.
        """
        checkpoint, manifest = open_with_manifest(folder)
        require_converted(checkpoint, otherwise)
        return cls.of(checkpoint, manifest or read_manifest(folder))

    @classmethod
    def of(cls, checkpoint: Checkpoint, manifest: Manifest) -> ConvertedCheckpoint:
        """Pairs a converted checkpoint with the headers in its manifest; raises as `open`."""
        source, format, quantization = _source(manifest, checkpoint)
        counterparts = pair(source, format, quantization, checkpoint)
        return cls(checkpoint, manifest, source, counterparts)


def open_with_manifest(folder: Source) -> tuple[Checkpoint, Manifest | None]:
    """Opens a checkpoint with its manifest, which says of a converted one which files are its own.

    Args:
        folder: where it lies.

    Returns:
        The checkpoint, and its manifest; None if there is none that can be read, of which whoever needs it tells.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    try:
        manifest = read_manifest(folder) if folder.exists(MANIFEST_FILENAME) else None
    except CheckpointError:
        manifest = None
    return open_checkpoint(folder, Recorded.of_output(manifest) if manifest else Choice()), manifest


def as_source_of(checkpoint: Checkpoint, manifest: Manifest) -> Checkpoint:
    """Returns a checkpoint with those files that its conversion took for its own.

    Args:
        checkpoint: what may be the source.
        manifest: of a converted checkpoint.
    """
    same_shards = checkpoint.shards.keys() == manifest.shards.keys()
    same_files = {*checkpoint.side_files} == {*manifest.files} - {INDEX_FILENAME}
    if manifest.restores == "tensors" or (same_shards and same_files):
        return checkpoint
    try:
        return open_checkpoint(checkpoint.folder, Recorded.of_source(manifest), checkpoint.shards)
    except CheckpointError:  # the manifest is another checkpoint's
        return checkpoint


def require_converted(checkpoint: Checkpoint, otherwise: str, file: str = CONFIG_FILENAME) -> None:
    """Refuses a checkpoint that is not converted.

    Args:
        checkpoint: any.
        otherwise: what to say then.
        file: what to say it of.

    Raises:
        CheckpointError: saying that.
    """
    if not checkpoint.is_converted:
        raise refuse("not-converted", otherwise, file=file)


def _source_headers(manifest: Manifest) -> dict[str, Header]:
    return {name: shard.source_header for name, shard in manifest.shards.items()}


def _source(manifest: Manifest, converted: Checkpoint) -> tuple[TensorIndex, Format, Quantization]:
    """Returns what a manifest knows of the source of a converted checkpoint."""
    headers = _source_headers(manifest)
    index = TensorIndex(headers)
    format, quantization = _source_format(manifest, index, converted.format)
    if index.copies or format.set_aside(index.tensors.keys(), index.tensors.keys()):  # which counts, the index says
        index = index_of(headers, _source_weight_map(manifest, converted), format)
    return index, format, quantization


def _source_weight_map(manifest: Manifest, converted: Checkpoint) -> Mapping[str, str] | None:
    """Returns what the source's index says, which is the output's too, or stands in the manifest; None without one."""
    if INDEX_FILENAME in manifest.files:
        return converted.index.weight_map
    document = _parsed(manifest, INDEX_FILENAME)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    return weight_map if isinstance(weight_map, dict) else None


def is_source_of(checkpoint: Checkpoint, manifest: Manifest) -> bool:
    """Returns whether a manifest speaks of a checkpoint, or of a damaged copy of it; contents are not looked at.

    Asked are the tensors that hold quantized modules in the checkpoint's format. At least half of them, counted where
    there are fewer, must be in both, and each of these must have the same type and shape and lie in the file of the
    same name. The config must be that of the source, or say the same of the quantization. A manifest that does not
    know the source's files is asked for tensors and shapes only.

    Args:
        checkpoint: what may be the source.
        manifest: of a converted checkpoint.
    """
    recorded = TensorIndex(_source_headers(manifest), checkpoint.index.weight_map)
    suffixes = {*checkpoint.format.suffixes.values()}
    known, there = (
        {name for name in tensors if name.rpartition(".")[2] in suffixes}
        for tensors in (recorded.tensors, checkpoint.tensors)
    )
    shared = known & there
    if 2 * len(shared) < max(1, min(len(known), len(there))):
        return False
    if any(recorded.tensors[name].shape != checkpoint.tensors[name].shape for name in shared):
        return False
    if manifest.restores == "tensors":
        return True
    same_files = all(
        recorded.shard_of[name] == checkpoint.shard_of[name]
        and recorded.tensors[name].dtype == checkpoint.tensors[name].dtype
        for name in shared
    )
    return same_files and _is_config_of(checkpoint, manifest, recorded)


def _is_config_of(checkpoint: Checkpoint, manifest: Manifest, recorded: TensorIndex) -> bool:
    """Returns whether a manifest knows a checkpoint's very config, or one that says the same of the quantization."""
    digest = manifest.text_digests.get(CONFIG_FILENAME)
    if digest is not None and digest.is_of(digest_of(checkpoint.folder.read(CONFIG_FILENAME))):
        return True
    try:
        format, quantization = _source_format(manifest, recorded)
    except CheckpointError:
        return False
    if format.name != checkpoint.format.name or (MANIFEST_FILENAME in manifest.texts) != checkpoint.has_manifest:
        return False
    said = checkpoint.format.as_recorded(checkpoint.quantization, manifest.version)
    known, there = ((each.scheme, each.modules_to_not_convert, each.layout) for each in (quantization, said))
    return known == there


def refuse_lost(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Refuses a converted checkpoint without a tensor that its manifest knows: an index cut short names none of them.

    Args:
        checkpoint: the converted one.
        manifest: its manifest.

    Raises:
        CheckpointError: naming every tensor that is lost.
    """
    source, format, quantization = _source(manifest, checkpoint)
    counterparts = counterparts_of(source, format, quantization, checkpoint)
    there = {name for header in checkpoint.shards.values() for name in header.tensors}
    message = "the manifest lists it, but no file holds it; download the complete checkpoint again"
    lost = [
        Problem(file, tensor.name, "missing-tensor", message)
        for file, tensors in expected_tensors(source, counterparts).items()
        for tensor in sorted(tensors, key=lambda tensor: tensor.name)
        if tensor.name not in there
    ]
    if lost:
        raise CheckpointError(lost)


def _source_format(manifest: Manifest, index: TensorIndex, target: Format | None = None) -> tuple[Format, Quantization]:
    """Returns the format of a source and how it is quantized, by the texts that the manifest keeps, and its headers."""
    document = _source_document(manifest)
    where, content = _in_manifest(document.place), document.content
    format = recognise(content, where)
    if target and format.name == target.name:
        message = (
            f"it is of a conversion from {format.title}, but so is this checkpoint: it belongs to another "
            "one. Remove it, or download the checkpoint again"
        )
        raise refuse("bad-manifest", message, file=MANIFEST_FILENAME)
    if not format.is_source:
        message = f"the source config in it is {format.title}, which cannot be converted; download it again"
        raise refuse("bad-manifest", message, file=MANIFEST_FILENAME)
    quantization = format.as_recorded(format.read_config(content, where), manifest.version)
    return format.variant(index), quantization


def _source_document(manifest: Manifest) -> Document:
    """Returns the quantization config of a source by the texts that the manifest keeps: the one that counted there."""
    config = _parsed(manifest, CONFIG_FILENAME)
    try:
        documents = quantization_documents(config if isinstance(config, dict) else {})
    except CheckpointError as error:
        raise CheckpointError([replace(each, file=_in_manifest(each.file)) for each in error.problems]) from None
    if documents:
        return documents[0]
    for name in LEGACY_CONFIG_FILENAMES:
        if name in manifest.texts and (content := _parsed(manifest, name)):
            if not isinstance(content, dict):
                raise refuse(
                    "bad-config", "it must hold a JSON object; download the manifest again", file=_in_manifest(name)
                )
            return Document(name, content)
    message = "the source config in it has no quantization config; download the checkpoint again"
    raise refuse("bad-manifest", message, file=MANIFEST_FILENAME)


def _parsed(manifest: Manifest, name: str) -> Any:
    """Returns the document in a text that the manifest keeps; None if it does not."""
    text = manifest.texts.get(name)
    return None if text is None else parse_json(text.encode(), _in_manifest(name), constants=True)


def _in_manifest(place: str) -> str:
    """Returns where a config of the source stands that only the manifest keeps."""
    return f"{MANIFEST_FILENAME} (text of {place})"


def converted_modules(
    format: Format, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
) -> dict[str, ModulePlan]:
    """Returns the quantized modules of a converted checkpoint, by name, sorted.

    Those in the layout of the format are ``converted``; those kept in AWQ layout are not.

    Args:
        format: of the checkpoint.
        tensors: every tensor of the checkpoint.
        quantization: what its config says.
        shard_of: the file of each tensor, for messages.

    Raises:
        CheckpointError: naming every tensor that is missing or does not have the type and shape of its module's
            layout, and every name in the config's lists that is not there.
    """
    found, problems = format.find(tensors, quantization, shard_of)
    if problems:
        raise CheckpointError(problems)
    return {
        name: ModulePlan(
            name,
            module.size_k,
            module.size_n,
            module.stored_k,
            module.stored_n,
            module.parts,
            converted=module.layout is format,
            reason="" if module.layout is format else "kept",
        )
        for name, module in found.items()
    }
