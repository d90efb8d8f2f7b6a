"""Reading tensors by rows from the files of a checkpoint, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import refuse
from awq2marlin.io.folder import Folder
from awq2marlin.io.safetensors import Header, TensorInfo


@dataclass(frozen=True)
class TensorFiles:
    """Tensors that can be read by rows, wherever they lie.

    Attributes:
        folder: of the checkpoint.
        shards: headers by file name.
        shard_of: the file of each tensor.
    """

    folder: Folder
    shards: Mapping[str, Header]
    shard_of: Mapping[str, str]

    @classmethod
    def of(cls, folder: Folder, shards: Mapping[str, Header]) -> TensorFiles:
        """Makes it from the headers."""
        return cls(folder, shards, {name: shard for shard, header in shards.items() for name in header.tensors})

    def info(self, name: str) -> TensorInfo:
        """Returns a tensor's description."""
        return self.shards[self.shard_of[name]].tensors[name]

    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Returns bytes ``begin`` to ``end`` of a tensor's data."""
        shard = self.shard_of[name]
        with self.folder.open(shard) as stream:
            stream.seek(self.shards[shard].data_start + self.info(name).start + begin)
            data = stream.read(end - begin)
        if len(data) != end - begin:
            raise refuse("truncated", "the file became shorter while it was read", file=shard, tensor=name)
        return np.frombuffer(data, np.uint8)

    def rows(self, name: str, first: int, last: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Returns rows ``first`` to ``last`` of a two-dimensional tensor, as elements of ``dtype``."""
        tensor = self.info(name)
        row_bytes = tensor.size // tensor.shape[0]
        return self.read(name, first * row_bytes, last * row_bytes).view(dtype).reshape(last - first, -1)
