"""A converted checkpoint: what its headers must hold, and the source that its manifest remembers.

No engine checks that a quantized checkpoint is complete: a tensor that is missing is loaded as garbage. Loaders ask
`converted_modules` first. No tensor data is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from awq2marlin.checkpoint.config import quantization_documents
from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.manifest import Manifest, read_manifest
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.checkpoint.pairing import pair
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.formats.base import Format, Quantization, find_modules
from awq2marlin.formats.names import CONFIG_FILENAME, LEGACY_CONFIG_FILENAMES, MANIFEST_FILENAME
from awq2marlin.formats.registry import KEPT, recognise
from awq2marlin.io.safetensors import TensorIndex, TensorInfo
from awq2marlin.io.source import Source
from awq2marlin.io.strict_json import parse_json
from awq2marlin.layout.modules import ModulePlan, module_name


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
        checkpoint = open_checkpoint(folder)
        require_converted(checkpoint, otherwise)
        return cls.of(checkpoint, read_manifest(folder))

    @classmethod
    def of(cls, checkpoint: Checkpoint, manifest: Manifest) -> ConvertedCheckpoint:
        """Pairs a converted checkpoint with the headers in its manifest; raises as `open`."""
        source = TensorIndex({name: shard.source_header for name, shard in manifest.shards.items()})
        quantization = Quantization(checkpoint.quantization.scheme, origin=MANIFEST_FILENAME)
        counterparts = pair(source, _source_format(manifest), quantization, checkpoint)
        return cls(checkpoint, manifest, source, counterparts)


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


def _source_format(manifest: Manifest) -> Format:
    """Returns the format of a source by the texts of its configs that the manifest keeps."""
    config, *legacy = (
        parse_json(manifest.texts[name].encode(), _in_manifest(name), constants=True)
        if name in manifest.texts
        else None
        for name in (CONFIG_FILENAME, *LEGACY_CONFIG_FILENAMES)
    )
    older = {name: document for name, document in zip(LEGACY_CONFIG_FILENAMES, legacy, strict=True) if document}
    try:
        documents = quantization_documents(config if isinstance(config, dict) else {}, older)
    except CheckpointError as error:
        raise CheckpointError([replace(each, file=_in_manifest(each.file)) for each in error.problems]) from None
    if not documents:
        message = "the source's config that it keeps says nothing of a quantization; download the checkpoint again"
        raise refuse("bad-manifest", message, file=MANIFEST_FILENAME)
    place, document = next(iter(documents.items()))
    format = recognise(document, _in_manifest(place))
    if not format.is_source:
        message = f"the source's config that it keeps is {format.title}, which no conversion reads; download it again"
        raise refuse("bad-manifest", message, file=MANIFEST_FILENAME)
    return format


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
    listed = quantization.awq_modules
    kept, kept_problems = find_modules(KEPT, tensors, quantization, shard_of, among=listed.__contains__)
    own, own_problems = find_modules(format, tensors, quantization, shard_of, among=lambda module: module not in listed)
    problems = list(dict.fromkeys([*kept_problems, *own_problems]))
    troubled = {problem.tensor.rpartition(".")[0] for problem in problems}
    problems += _missing_from_lists({*kept, *own, *troubled}, tensors, quantization)
    if problems:
        raise CheckpointError(problems)
    modules = {name: ModulePlan.of(module, "kept") for name, module in kept.items()}
    for name, module in own.items():
        size_k, size_n = quantization.padded_modules.get(name, (module.size_k, module.size_n))
        modules[name] = ModulePlan(name, size_k, size_n, module.size_k, module.size_n, module.parts, converted=True)
    return dict(sorted(modules.items()))


def _missing_from_lists(
    found: set[str], tensors: Mapping[str, TensorInfo], quantization: Quantization
) -> Iterator[Problem]:
    """Yields what the config's lists name and the files do not hold."""
    for key in ("awq_modules", "padded_modules"):
        for module in getattr(quantization, key):
            if module not in found:
                message = f"{key} names its module, but no file holds it; download the checkpoint again, completely"
                yield Problem(CONFIG_FILENAME, module_name(module, "qweight"), "missing-tensor", message)
    for module in quantization.unquantized_modules:
        if module_name(module, "weight") not in tensors:
            message = "unquantized_modules names it, but no file holds it; download the checkpoint again, completely"
            yield Problem(CONFIG_FILENAME, module_name(module, "weight"), "missing-tensor", message)
