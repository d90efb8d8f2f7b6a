"""Completes a Marlin-native checkpoint that an engine saved: its lists of modules, and a manifest for `revert`.

The files of the original source are not known then, so what the manifest describes, and `revert` gives back, is an
AWQ checkpoint of the same tensors, in files of the same names as those that the engine wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.converted import marlin_modules
from awq2marlin.checkpoint.manifest import Manifest, ManifestShard
from awq2marlin.checkpoint.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.checkpoint.quantization import (
    AwqQuantization,
    MarlinQuantization,
    marlin_document,
    read_marlin_quantization,
    without_quantization,
)
from awq2marlin.checkpoint.source import Checkpoint, open_checkpoint
from awq2marlin.errors import refuse
from awq2marlin.io.digest import Xxh3, xxh3_of_file
from awq2marlin.io.safetensors import Header, TensorInfo, encode_header
from awq2marlin.io.strict_json import encode_json
from awq2marlin.layout.marlin import num_groups
from awq2marlin.layout.modules import QUANTIZED_PARTS, ModulePlan, module_name
from awq2marlin.layout.packing import pack_factor


def complete_saved(root: Path, padded_modules: Mapping[str, tuple[int, int]]) -> None:
    """Makes what an engine saved a whole checkpoint: rewrites its quantization config, adds the manifest.

    Args:
        root: the folder. Its config has the quantization config that was loaded; its tensors are in the layout of the
            format, and which modules are AWQ is read off their shapes.
        padded_modules: true (K, N) of padded modules, by their names in the files.

    Raises:
        CheckpointError: if the folder holds no sound checkpoint of the format.
    """
    checkpoint = open_checkpoint(root)
    saved = checkpoint.quantization
    if not isinstance(saved, MarlinQuantization):
        raise refuse(
            "not-converted", "the saved config is not that of a Marlin-native checkpoint", file=CONFIG_FILENAME
        )
    unchanged = checkpoint.config["quantization_config"].get("modules_to_not_convert")
    awq = AwqQuantization(saved.bits, saved.group_size, saved.zero_point, unchanged, CONFIG_FILENAME)
    kept = [name for name in _quantized(checkpoint) if _is_awq(name, checkpoint, saved.bits)]
    document = marlin_document(awq, kept, checkpoint.unquantized_modules, padded_modules)
    quantization = read_marlin_quantization(document, CONFIG_FILENAME)
    modules = marlin_modules(checkpoint.tensors, quantization, checkpoint.shard_of)
    _publish(root / MANIFEST_FILENAME, _manifest(checkpoint, modules, awq).encode())
    _publish(root / CONFIG_FILENAME, encode_json(without_quantization(checkpoint.config, document)))


def _quantized(checkpoint: Checkpoint) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight"))


def _is_awq(module: str, checkpoint: Checkpoint, bits: int) -> bool:
    """Returns whether a module is in AWQ layout: a row of its ``qweight`` is one row of N, not a row of tiles."""
    scales = checkpoint.tensors.get(module_name(module, "scales"))
    columns = checkpoint.tensors[module_name(module, "qweight")].shape[-1] * pack_factor(bits)
    return scales is not None and columns == scales.shape[-1]


def _manifest(checkpoint: Checkpoint, modules: Mapping[str, ModulePlan], awq: AwqQuantization) -> Manifest:
    shards = {}
    for name, header in checkpoint.shards.items():
        source = _awq_header(header, modules, awq)
        size, digest = xxh3_of_file((checkpoint.folder.path(name), name))
        shards[name] = ManifestShard(source, source.file_size, (), size, digest)
    documents = {CONFIG_FILENAME: without_quantization(checkpoint.config, _awq_document(awq))}
    if checkpoint.has_index:
        documents[INDEX_FILENAME] = _awq_index(checkpoint, shards)
    texts = {name: encode_json(document).decode() for name, document in documents.items()}
    digests = {name: (len(text.encode()), str(Xxh3(text.encode()))) for name, text in texts.items()}
    return Manifest(shards, texts, digests, {}, None, None, {}, restores="tensors")


def _awq_document(awq: AwqQuantization) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": awq.bits,
        "group_size": awq.group_size,
        "zero_point": awq.zero_point,
        "modules_to_not_convert": awq.modules_to_not_convert,
    }


def _awq_header(header: Header, modules: Mapping[str, ModulePlan], awq: AwqQuantization) -> Header:
    """Returns the header of the AWQ file that `revert` will write in the place of a saved one."""
    tensors, position = {}, 0
    for tensor in header.by_offset:
        name, _, part = tensor.name.rpartition(".")
        module, shape, size = modules.get(name), tensor.shape, tensor.size
        if module is not None and module.converted and part in QUANTIZED_PARTS:
            shape = _awq_shape(part, module, awq)
            size = shape[0] * shape[1] * (2 if part == "scales" else 4)
        tensors[tensor.name] = TensorInfo(tensor.name, tensor.dtype, shape, position, position + size)
        position += size
    return encode_header(header, tensors)


def _awq_shape(part: str, module: ModulePlan, awq: AwqQuantization) -> tuple[int, int]:
    rows = module.size_k if part == "qweight" else num_groups(module.size_k, awq.group_size)
    return rows, module.size_n if part == "scales" else module.size_n // pack_factor(awq.bits)


def _awq_index(checkpoint: Checkpoint, shards: Mapping[str, ManifestShard]) -> Any:
    """Returns the saved index with the total size of the AWQ tensors."""
    document = checkpoint.folder.read_json(INDEX_FILENAME)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(shard.source_header.data_size for shard in shards.values())
    return document


def _publish(path: Path, data: bytes) -> None:
    """Writes a file: complete and synced before it has its name."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
