"""Completes a Marlin-native checkpoint that an engine saved: its lists of modules, and a manifest for `revert`.

The files of the original source are not known then, so what the manifest describes, and `revert` gives back, is an
AWQ checkpoint of the same tensors, in files of the same names as those that the engine wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.config import written_config
from awq2marlin.checkpoint.converted import converted_modules
from awq2marlin.checkpoint.manifest import Manifest, ManifestShard
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.errors import refuse
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import AWQ_GEMM, MARLIN_NATIVE
from awq2marlin.io.digest import digest_of, digest_of_file
from awq2marlin.io.durable import replace_file
from awq2marlin.io.safetensors import Header, TensorInfo, encode_header
from awq2marlin.io.stream import NamedPath
from awq2marlin.io.strict_json import encode_json
from awq2marlin.layout.modules import QUANTIZED_PARTS, ModulePlan, module_name
from awq2marlin.layout.scheme import Scheme


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
    if checkpoint.format is not MARLIN_NATIVE:
        raise refuse(
            "not-converted", "the saved config is not that of a Marlin-native checkpoint", file=CONFIG_FILENAME
        )
    quantization = replace(
        checkpoint.quantization,
        awq_modules=frozenset(name for name in _quantized(checkpoint) if _is_awq(name, checkpoint)),
        unquantized_modules=frozenset(checkpoint.unquantized_modules),
        padded_modules=padded_modules,
    )
    modules = converted_modules(MARLIN_NATIVE, checkpoint.tensors, quantization, checkpoint.shard_of)
    replace_file(root / MANIFEST_FILENAME, _manifest(checkpoint, modules).encode())
    config = written_config(checkpoint.config, MARLIN_NATIVE, quantization)
    replace_file(root / CONFIG_FILENAME, encode_json(config))


def _quantized(checkpoint: Checkpoint) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight"))


def _is_awq(module: str, checkpoint: Checkpoint) -> bool:
    """Returns whether a module is in AWQ layout: a row of its ``qweight`` is one row of N, not a row of tiles."""
    scales = checkpoint.tensors.get(module_name(module, "scales"))
    factor = checkpoint.quantization.scheme.pack_factor
    columns = checkpoint.tensors[module_name(module, "qweight")].shape[-1] * factor
    return scales is not None and columns == scales.shape[-1]


def _manifest(checkpoint: Checkpoint, modules: Mapping[str, ModulePlan]) -> Manifest:
    shards = {}
    for name, header in checkpoint.shards.items():
        source = _awq_header(header, modules, checkpoint.quantization.scheme)
        found = digest_of_file(NamedPath(checkpoint.folder.path(name), name))
        shards[name] = ManifestShard(source, None, found)
    said = replace(checkpoint.quantization, unquantized_modules=frozenset())  # most AWQ configs list none
    documents = {CONFIG_FILENAME: written_config(checkpoint.config, AWQ_GEMM, said)}
    if checkpoint.has_index:
        documents[INDEX_FILENAME] = _awq_index(checkpoint, shards)
    texts = {name: encode_json(document).decode() for name, document in documents.items()}
    digests = {name: digest_of(text.encode()) for name, text in texts.items()}
    return Manifest(shards, texts, digests, {}, None, None, {}, restores="tensors")


def _awq_header(header: Header, modules: Mapping[str, ModulePlan], scheme: Scheme) -> Header:
    """Returns the header of the AWQ file that `revert` will write in the place of a saved one."""
    tensors, position = {}, 0
    for tensor in header.by_offset:
        name, _, part = tensor.name.rpartition(".")
        module, shape, size = modules.get(name), tensor.shape, tensor.size
        if module is not None and module.converted and part in QUANTIZED_PARTS:
            shape = AWQ_GEMM.shape(part, module.size_k, module.size_n, scheme)
            size = AWQ_GEMM.layout(part, module.size_k, module.size_n, scheme).size
        tensors[tensor.name] = [TensorInfo(tensor.name, tensor.dtype, shape, position, position + size)]
        position += size
    return encode_header(header, tensors)


def _awq_index(checkpoint: Checkpoint, shards: Mapping[str, ManifestShard]) -> Any:
    """Returns the saved index with the total size of the AWQ tensors."""
    document = checkpoint.folder.read_json(INDEX_FILENAME)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(shard.source_header.data_size for shard in shards.values())
    return document
