"""A checkpoint to convert: opened, with its quantized modules, all of them complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import CheckpointError, article, printable, refuse, some_of
from awq2marlin.formats.base import StoredModule, require_modules
from awq2marlin.formats.foreign import refuse_foreign_tensors
from awq2marlin.formats.names import INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import shown_by


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint of a format that is read.

    Attributes:
        checkpoint: its configs and headers.
        modules: its quantized modules, by name, sorted.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, StoredModule]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SourceCheckpoint:
        """Finds the quantized modules of a checkpoint.

        Raises:
            CheckpointError: naming every module with a missing tensor, a wrong type, or shapes that contradict each
                other or the config; if there is no quantized module at all; or if its manifest is none.
        """
        if checkpoint.has_manifest:
            _check_manifest(checkpoint)
        quantization = checkpoint.quantization
        modules, problems = checkpoint.format.find(checkpoint.tensors, quantization, checkpoint.shard_of)
        if (problems or not modules) and not checkpoint.is_converted:
            _refuse_other_tensors(checkpoint)
        if not (problems or modules):
            _refuse_files_beside_the_index(checkpoint)
        require_modules(modules, problems, quantization)
        return cls(checkpoint, modules)


def _refuse_other_tensors(checkpoint: Checkpoint) -> None:
    """Refuses a config that names one format beside tensors that are of another."""
    said, quantization = checkpoint.format, checkpoint.quantization
    refuse_foreign_tensors(checkpoint.tensors, quantization.origin)
    shown = shown_by(checkpoint.tensors, quantization, checkpoint.shard_of, but=said)
    if shown is not None:
        message = (
            f"the config says {said.title} ({quantization.scheme}), but the tensors are those of {shown.title}; "
            f"download the config that belongs to them, or correct it in a copy"
        )
        raise refuse("contradiction", message, file=quantization.origin)


def _refuse_files_beside_the_index(checkpoint: Checkpoint) -> None:
    """Refuses an index of which no tensor is quantized, where files lie that it does not name: it may be another's."""
    files = (*checkpoint.side_files, *checkpoint.left_behind)
    beside = [printable(name) for name in files if name.endswith(".safetensors") and "/" not in name]
    if checkpoint.has_index and beside:
        message = (
            "the config says that the checkpoint is quantized, but no tensor in the files that the index "
            f"lists is, and it does not list {some_of(beside)}. If the index is left "
            f"over from the checkpoint before quantization, ignore it: --leave {INDEX_FILENAME}"
        )
        raise refuse("no-quantized-modules", message, file=INDEX_FILENAME)


def _check_manifest(checkpoint: Checkpoint) -> None:
    """Refuses a file of the manifest's name that is none: a checkpoint that nobody converted has no such file."""
    try:
        read_manifest(checkpoint.folder)
    except CheckpointError as error:
        raise refuse(
            "already-converted",
            f"{article(checkpoint.format.title)} checkpoint must not hold a file of this name that is "
            f"not a valid manifest; remove it ({error.problems[0].message})",
            file=MANIFEST_FILENAME,
        ) from None
