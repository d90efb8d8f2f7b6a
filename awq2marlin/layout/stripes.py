"""Rows and stripes: a tensor in memory whose columns come and go in stripes, and its rows in runs.

Between a tensor that is read by columns and one that is written by rows (or the other way around) all of the data has
to be there. It lies as stripes of columns, one after the other, each a tensor of its own: so a stripe is repacked from
and to memory that is contiguous, and a run of rows is a run of bytes in each stripe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from awq2marlin.io.stream import PIECE_BYTES

Bytes = npt.NDArray[np.uint8]

#: Rows of stripes as elements, [rows, stripes].
Shares = npt.NDArray[np.void]


@dataclass(frozen=True)
class Stripes:
    """How a tensor of ``rows`` rows is cut.

    Attributes:
        rows: rows of the tensor, and of every stripe.
        widths: bytes of a row that each stripe holds.
    """

    rows: int
    widths: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the tensor."""
        return sum(self.widths)

    @property
    def size(self) -> int:
        """Bytes of the tensor, and of all stripes together."""
        return self.rows * self.row_bytes

    def stripe(self, index: int, buffer: Bytes) -> Bytes:
        """Returns the bytes of one stripe.

        Args:
            index: which.
            buffer: uint8, contiguous, the stripes one after the other.
        """
        begin = self.rows * sum(self.widths[:index])
        return buffer[begin : begin + self.rows * self.widths[index]]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields rows, first and past the last, that make up about `PIECE_BYTES`, until all are."""
        step = max(1, PIECE_BYTES // self.row_bytes)
        for first in range(0, self.rows, step):
            yield first, min(first + step, self.rows)

    def split(self, first: int, rows: Bytes, buffer: Bytes) -> None:
        """Puts rows into the stripes.

        Args:
            first: the first row's number.
            rows: uint8, contiguous, whole rows.
            buffer: the stripes; written.
        """
        for of_rows, of_stripe in self._shares(first, rows, buffer):
            of_stripe[:] = of_rows

    def join(self, first: int, buffer: Bytes, rows: Bytes) -> None:
        """Undoes `split`: takes rows out of the stripes."""
        for of_rows, of_stripe in self._shares(first, rows, buffer):
            of_rows[:] = of_stripe

    def _shares(self, first: int, rows: Bytes, buffer: Bytes) -> Iterator[tuple[Shares, Shares]]:
        """Yields what stripes hold of some rows: where it lies in the rows, and where in the buffer.

        Stripes of one width are yielded together, a row of a stripe as one element: NumPy copies such elements in one
        call at 8 to 12 GB/s, stripe by stripe at 6 (AMD EPYC, Zen 4, stripes of 128 and 2048 bytes, November 2026).
        """
        table, begin = rows.reshape(-1, self.row_bytes), 0
        for width, equal in groupby(self.widths):
            count = len([*equal])
            end = begin + count * width
            stripes = buffer[self.rows * begin : self.rows * end].view(f"V{width}").reshape(count, self.rows)
            yield table[:, begin:end].view(f"V{width}"), stripes[:, first : first + len(table)].T
            begin = end
