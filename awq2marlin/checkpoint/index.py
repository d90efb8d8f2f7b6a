"""The index of a checkpoint's shards, and what a conversion changes in it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from awq2marlin.io.safetensors import Header


def converted_index(document: Any, source: Mapping[str, Header], target: Mapping[str, Header]) -> Any | None:
    """Returns the index of a converted checkpoint, or None if it is the source's.

    It differs where padding makes another total size, and where tensors have other names.

    Args:
        document: the source's index.
        source: the source's headers, by file name.
        target: the converted ones.
    """
    before, after = (sum(header.data_size for header in headers.values()) for headers in (source, target))
    renamed = any(source[name].tensors.keys() != target[name].tensors.keys() for name in source)
    if before == after and not renamed:
        return None
    document = deepcopy(document)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = after
    if renamed:
        document["weight_map"] = {name: shard for shard, header in target.items() for name in header.tensors}
    return document
