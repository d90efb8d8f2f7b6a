"""Repacking one tensor, piece by piece: which bytes of the source make which bytes of the target.

A tensor is cut into bands of rows that repack independently: sixteen rows of ``qweight`` make one row of
tiles, one row of ``qzeros`` or ``scales`` makes one row. Unpadded, a piece keeps its offset and length, so
a file can be rewritten in one pass with two small buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from awq2marlin.io.stream import PIECE_BYTES, Piece
from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_INTERLEAVE, SCALE_PERM, SCALE_PERM_SINGLE
from awq2marlin.layout.packing import AWQ_PACK_ORDER, inverse_order, pack_factor

Bytes = npt.NDArray[np.uint8]

#: Bytes of one element of ``scales``, fp16 or bf16.
_SCALE_BYTES = 2

#: What a kernel of ``qweight`` needs to stage one tile.
_SCRATCH_BYTES = 512


@dataclass(frozen=True)
class Repack:
    """How one tensor of a module becomes its Marlin counterpart. Small and picklable.

    Attributes:
        part: which tensor of the module it is.
        num_bits: 4 or 8.
        source_rows: rows of the source: K for ``qweight``, G for the others.
        target_rows: rows of the target: padded K / 16 for ``qweight``, padded G for the others.
        size_n: columns N of the source.
        padded_n: columns of the target; N unless padded.
        single_group: whether one group spans all of K, so that scales take the 32-wide order.
    """

    part: Literal["qweight", "qzeros", "scales"]
    num_bits: int
    source_rows: int
    target_rows: int
    size_n: int
    padded_n: int
    single_group: bool

    @property
    def band(self) -> int:
        """Source rows that make one target row."""
        return GPTQ_MARLIN_TILE if self.part == "qweight" else 1

    @property
    def source_row_bytes(self) -> int:
        """Bytes of one row of the source."""
        return self._row_bytes(self.size_n)

    @property
    def target_row_bytes(self) -> int:
        """Bytes of one row of the target."""
        return self.band * self._row_bytes(self.padded_n)

    def _row_bytes(self, columns: int) -> int:
        return columns * _SCALE_BYTES if self.part == "scales" else columns * self.num_bits // 8

    def source_range(self, first: int, last: int) -> tuple[int, int]:
        """Returns the byte range of the source that makes target rows ``first`` to ``last``."""
        begin, end = (min(row * self.band, self.source_rows) for row in (first, last))
        return begin * self.source_row_bytes, end * self.source_row_bytes

    def pieces(self, read_at: int, write_at: int, *, inverse: bool = False) -> Iterator[Piece]:
        """Yields the pieces of the tensor that are repacked one by one, in any order.

        Args:
            read_at: where the tensor begins in the file that is read, in bytes.
            write_at: where it begins in the file that is written.
            inverse: whether Marlin is read and AWQ written.
        """
        rows_at_once = max(1, PIECE_BYTES // self.target_row_bytes)
        for first in range(0, self.target_rows, rows_at_once):
            last = min(first + rows_at_once, self.target_rows)
            begin, end = self.source_range(first, last)
            awq = begin, end - begin
            marlin = first * self.target_row_bytes, (last - first) * self.target_row_bytes
            read, write = (marlin, awq) if inverse else (awq, marlin)
            work = self.backward if inverse else self.forward
            yield Piece((read_at + read[0], read[1]), (write_at + write[0], write[1]), work)

    def forward(self, source: Bytes, target: Bytes) -> None:
        """Repacks a piece from AWQ to Marlin.

        Args:
            source: uint8, contiguous, aligned to 4 bytes: whole rows, as `source_range` says.
            target: uint8, likewise: whole target rows; written in full.
        """
        if target.size != source.size or self.padded_n != self.size_n:
            padded = np.zeros(target.size, np.uint8)
            rows = source.size // self.source_row_bytes
            whole = padded.reshape(-1, self._row_bytes(self.padded_n))
            whole[:rows, : self.source_row_bytes] = source.reshape(rows, self.source_row_bytes)
            source = padded
        self._apply(source, target, inverse=False)

    def backward(self, target: Bytes, source: Bytes) -> None:
        """Undoes `forward`: Marlin bytes in ``target``, AWQ bytes to ``source``."""
        if target.size == source.size and self.padded_n == self.size_n:
            self._apply(target, source, inverse=True)
            return
        padded = np.empty(target.size, np.uint8)
        self._apply(target, padded, inverse=True)
        rows = source.size // self.source_row_bytes
        whole = padded.reshape(-1, self._row_bytes(self.padded_n))
        source.reshape(rows, self.source_row_bytes)[:] = whole[:rows, : self.source_row_bytes]

    def _apply(self, source: Bytes, target: Bytes, *, inverse: bool) -> None:
        sizes_fit = source.size == target.size and target.size % self.target_row_bytes == 0 and self.padded_n % 64 == 0
        if not (sizes_fit and source.flags.c_contiguous and target.flags.c_contiguous):
            raise ValueError(  # the kernels trust their sizes
                f"pieces of {source.size} and {target.size} bytes are not whole rows of {self.target_row_bytes} bytes"
            )
        if self.part == "scales":
            table = _scale_columns(self.single_group, inverse)
            name, sizes = "gather_columns", (source.size // _SCALE_BYTES // table.size, table.size)
        elif self.part == "qzeros":
            table = _zero_point_fields(self.num_bits, inverse)
            name, sizes = f"gather_fields_{self.num_bits}bit", (source.size * 8 // self.num_bits // table.size, 0)
        else:
            table = np.empty(_SCRATCH_BYTES, np.uint8)
            name = f"{'unpack' if inverse else 'repack'}_qweight_{self.num_bits}bit"
            sizes = (target.size // self.target_row_bytes, self.padded_n // pack_factor(self.num_bits))
        kernel(name)(address(source), address(target), address(table), *sizes)


@cache
def _scale_columns(single_group: bool, inverse: bool) -> npt.NDArray[np.uint8]:
    perm = SCALE_PERM_SINGLE if single_group else SCALE_PERM
    return np.array(inverse_order(perm) if inverse else perm, np.uint8)


@cache
def _zero_point_fields(num_bits: int, inverse: bool) -> npt.NDArray[np.uint8]:
    """Returns the table of `gather_fields`: target field to source field, in a block of 64 columns."""
    factor = pack_factor(num_bits)
    field_of_column = inverse_order(AWQ_PACK_ORDER[num_bits])
    fields = []
    for position in range(len(SCALE_PERM)):
        word, field = divmod(position, factor)
        column = SCALE_PERM[word * factor + MARLIN_INTERLEAVE[num_bits][field]]
        fields.append(column // factor * factor + field_of_column[column % factor])
    return np.array(inverse_order(tuple(fields)) if inverse else fields, np.uint8)
