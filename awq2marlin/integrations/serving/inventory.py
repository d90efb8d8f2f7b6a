"""What the headers of a checkpoint say, for decisions that its config alone does not settle.

Read once, when the engine has parsed the config and before it builds the model, so that what is missing or cannot be
served is refused before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.converted import converted_modules, refuse_lost
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.tensor_parallel import largest_tensor_parallel_size
from awq2marlin.errors import refuse
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.marlin_native import MARLIN_QUANT_METHOD
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.io.safetensors import TensorInfo


@dataclass(frozen=True)
class Inventory:
    """What the loader needs to know of a checkpoint's tensors. Picklable: it travels to an engine's workers.

    Attributes:
        zero_point_modules: the modules that have ``qzeros``.
        largest_tensor_parallel_size: see `checkpoint.tensor_parallel.largest_tensor_parallel_size`.
        modules: the quantized modules.
    """

    zero_point_modules: frozenset[str]
    largest_tensor_parallel_size: int
    modules: frozenset[str] = frozenset()


def read_inventory(path: Path, quantization: Quantization) -> Inventory:
    """Returns the inventory of a checkpoint in a folder, which must be complete.

    Args:
        path: the folder.
        quantization: what its config says.

    Raises:
        CheckpointError: naming every file and tensor that is missing or contradicts the config.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.format is not MARLIN_NATIVE:
        raise refuse("contradiction", f"it does not say quant_method {MARLIN_QUANT_METHOD!r}", file=CONFIG_FILENAME)
    if checkpoint.folder.exists(MANIFEST_FILENAME):
        refuse_lost(checkpoint, read_manifest(checkpoint.folder))
    return inventory_of(checkpoint.tensors, quantization, checkpoint.config, checkpoint.shard_of)


def inventory_of(
    tensors: Mapping[str, TensorInfo],
    quantization: Quantization,
    config: Mapping[str, Any],
    shard_of: Mapping[str, str] | None = None,
) -> Inventory:
    """Returns the inventory of a checkpoint by its tensors.

    Args:
        tensors: every tensor, by name.
        quantization: what the config says.
        config: the model's ``config.json``.
        shard_of: the file of each tensor, for messages, where it is known.

    Raises:
        CheckpointError: naming every tensor that is missing or of the wrong kind.
    """
    modules = converted_modules(MARLIN_NATIVE, tensors, quantization, shard_of or dict.fromkeys(tensors, "")).values()
    with_zeros = frozenset(module.name for module in modules if "qzeros" in module.parts)
    size = largest_tensor_parallel_size(modules, quantization.bits, quantization.group_size, config)
    return Inventory(with_zeros, size, frozenset(module.name for module in modules))


def cached_folder(repository: str, revision: str | None, cache: str | None) -> Path | None:
    """Returns where a repository of the Hub lies that can only be loaded from the cache; None if it can be downloaded.

    Args:
        repository: its name.
        revision: branch, tag or commit; None for the main branch.
        cache: folder of the cache; None for the Hub's own.
    """
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        found = snapshot_download(repository, revision=revision, cache_dir=cache, local_files_only=True)
    except Exception:  # it is not there: whoever loads it will say so
        return None
    return Path(found)


def hub_metadata(repository: str, revision: str | None) -> dict[str, Any] | None:
    """Returns what the headers of a repository of the Hub say of its tensors, by name; None if they cannot be read.

    Args:
        repository: its name.
        revision: branch, tag or commit; None for the main branch.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().get_safetensors_metadata(repository, revision=revision).files_metadata
    except Exception:  # no network, no such repository, another site's name: whoever loads it will say so
        return None
    return {
        name: {"dtype": tensor.dtype, "shape": tensor.shape}
        for file in files.values()
        for name, tensor in file.tensors.items()
    }


def tensors_of(metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Returns the tensors of a repository, by name, without their places in its files.

    Args:
        metadata: what the repository's headers say: for each tensor its ``dtype`` and ``shape``.

    Raises:
        CheckpointError: if a shape is none.
    """
    tensors = {}
    for name, entry in metadata.items():
        if name == "__metadata__":  # vLLM leaves it in where it reads the files in the Hub's cache
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
            raise refuse("bad-header", "its shape must be a list of whole numbers, none negative", tensor=name)
        tensors[name] = TensorInfo(name, str(entry.get("dtype")), tuple(shape), 0, 0)
    aside = MARLIN_NATIVE.set_aside(tensors.keys(), tensors.keys())  # weights beside codes: a shard taken over
    return {name: tensor for name, tensor in tensors.items() if name not in aside}
