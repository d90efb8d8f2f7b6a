"""Reading the plain values of a part of a module slowly, by rows, for comparison: shares nothing with the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from awq2marlin.formats.base import Format
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.layout.scheme import Scheme


@dataclass(frozen=True)
class PartRows:
    """A part's tensor, read by rows of its plain values.

    Attributes:
        files: where it lies.
        format: whose layout the module has.
        part: which part.
        size_k: K of the module, padding included.
        scheme: of the checkpoint.
        tensor: its description.
        step: plain rows in one row, or one column, of the tensor; 0 if only all of the tensor holds whole ones.
        whole: all of a tensor whose columns hold rows, packed as it is; None for others, which are read as needed.
        beside: the tensor without which this one cannot be read, as rows that hold the same; None for nearly all.
    """

    files: TensorFiles
    format: Format
    part: str
    size_k: int
    scheme: Scheme
    tensor: TensorInfo
    step: int
    whole: npt.NDArray[Any] | None
    beside: npt.NDArray[Any] | None

    @classmethod
    def of(cls, format: Format, files: TensorFiles, module: str, part: str, size_k: int, scheme: Scheme) -> PartRows:
        """Returns the reader of a part of a module whose layout is of a format.

        Args:
            format: that format.
            files: the tensors of the checkpoint.
            module: full name.
            part: ``qweight``, ``qzeros`` or ``scales``.
            size_k: K of the module, padding included.
            scheme: of the checkpoint.
        """
        tensor, step = files.info(format.tensor_name(module, part)), format.rows_per_row(part, scheme)
        whole = beside = None
        if not step:
            step = format.rows_per_column(part, scheme)
            whole = files.rows(tensor.name, 0, tensor.shape[0], format.element_type(part))
        if other := format.read_beside.get(part):
            beside = files.small(format.tensor_name(module, other), format.element_type(other))
        return cls(files, format, part, size_k, scheme, tensor, step, whole, beside)

    def bytes_of(self, count: int) -> int:
        """Returns the bytes that hold some plain rows."""
        return self.tensor.size // max(1, self._length) * count // self.step

    @property
    def _length(self) -> int:
        return self.tensor.shape[0] if self.whole is None else self.whole.shape[1]

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Returns the plain values of some rows, as far as there are any; perhaps more, where words hold more.

        Args:
            first: the first row; a multiple of `step`, if that is not 0.
            count: how many.
        """
        begin, end = 0, self._length
        if self.step:
            begin, end = min(first // self.step, end), min(-(-(first + count) // self.step), end)
        if self.whole is None:
            rows = self.files.rows(self.tensor.name, begin, end, self.format.element_type(self.part))
        else:
            rows = self.whole[:, begin:end]
        if self.beside is None:
            return self.format.values(self.part, rows, self.size_k, self.scheme)
        return self.format.values_beside(self.part, rows, self.beside[begin:end], self.size_k, self.scheme)
