"""A checkpoint to convert: opened, with its quantized modules, all of them complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import refuse
from awq2marlin.formats.base import find_modules, require_modules
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.layout.modules import Linear


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint of a format that is read.

    Attributes:
        checkpoint: its configs and headers.
        modules: its quantized modules, by name, sorted.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, Linear]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SourceCheckpoint:
        """Finds the quantized modules of a checkpoint.

        Raises:
            CheckpointError: if it is converted already; naming every module with a missing tensor, a wrong type, or
                shapes that contradict each other or the config; or if there is no quantized module at all.
        """
        if checkpoint.is_converted:
            raise refuse(
                "already-converted",
                f"this checkpoint is already {checkpoint.format.title}; 'awq2marlin revert' gives the original back",
                file=CONFIG_FILENAME,
            )
        if checkpoint.folder.exists(MANIFEST_FILENAME):
            raise refuse(
                "already-converted",
                f"a checkpoint that is {checkpoint.format.title} must not hold a file of this name; remove it",
                file=MANIFEST_FILENAME,
            )
        quantization = checkpoint.quantization
        found = find_modules(checkpoint.format, checkpoint.tensors, quantization, checkpoint.shard_of)
        require_modules(*found, quantization)
        return cls(checkpoint, found[0])
