"""Reading tensors by rows from the files of a checkpoint, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import refuse
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo
from awq2marlin.io.source import Source


@dataclass(frozen=True)
class TensorFiles:
    """Tensors that can be read by rows, wherever they lie.

    Attributes:
        folder: of the checkpoint.
        index: its headers.
    """

    folder: Source
    index: TensorIndex

    @classmethod
    def of(cls, folder: Source, headers: Mapping[str, Header]) -> TensorFiles:
        return cls(folder, TensorIndex(headers))

    @property
    def shard_of(self) -> Mapping[str, str]:
        """The file of each tensor."""
        return self.index.shard_of

    def info(self, name: str) -> TensorInfo:
        """Returns a tensor's description."""
        return self.index.tensors[name]

    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Returns bytes ``begin`` to ``end`` of a tensor's data."""
        shard = self.shard_of[name]
        with self.folder.open(shard) as stream:
            stream.seek(self.index.headers[shard].data_start + self.info(name).start + begin)
            data = stream.read(end - begin)
        if len(data) != end - begin:
            raise refuse("truncated", "the file became shorter while it was read", file=shard, tensor=name)
        return np.frombuffer(data, np.uint8)

    def small(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Returns a small two-dimensional tensor as elements of ``dtype``; its file is not fetched for it."""
        tensor, shard = self.info(name), self.shard_of[name]
        start = self.index.headers[shard].data_start
        data = self.folder.read_range(shard, start + tensor.start, start + tensor.end)
        return np.frombuffer(data, dtype).reshape(tensor.shape[0], -1)

    def rows(self, name: str, first: int, last: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Returns rows ``first`` to ``last`` of a two-dimensional tensor, as elements of ``dtype``."""
        tensor = self.info(name)
        row_bytes = tensor.size // tensor.shape[0]
        return self.read(name, first * row_bytes, last * row_bytes).view(dtype).reshape(last - first, -1)
