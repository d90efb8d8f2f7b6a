"""Codes that lie N first with four columns in turn: int16 [N / 4, K], 4 bits.

A row of the tensor holds four columns, 64 codes of each in turn. In a run of 32 codes of a column, code 8 a + 2 b + c
stands at place 8 b + 4 c + a, and a word of 16 bits holds four places, the first in the lowest bits. Taken apart, the
columns are a tensor of `transposed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.transposed import TransposedCodes

Bytes = npt.NDArray[np.uint8]

#: Columns that lie in turn, and how many codes of each.
COLUMNS_IN_TURN = 4
CODES_IN_TURN = 64


@dataclass(frozen=True)
class InterleavedCodes(PartLayout):
    """Codes int16 [N / 4, K]; K is a multiple of 64, N of 4."""

    is_plain: ClassVar[bool] = False
    is_transposed: ClassVar[bool] = True

    @property
    def band(self) -> int:
        """All rows lie together."""
        return self.rows

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self._apart.band_bytes

    @property
    def stripe_columns(self) -> int:
        """As many as where they lie apart."""
        return self._apart.stripe_columns

    @property
    def _apart(self) -> TransposedCodes:
        """The same columns, one after the other."""
        return TransposedCodes(self.part, self.bits, self.rows, self.columns)

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns all of the tensor into plain rows; see `PartLayout.unpack`."""
        apart = np.empty_like(data)
        self._move("split", data, apart)
        self._apart.unpack(apart, plain)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns all plain rows into the tensor."""
        apart = np.empty_like(data)
        self._apart.pack(plain, apart)
        self._move("join", apart, data)

    def _move(self, verb: str, source: Bytes, target: Bytes) -> None:
        fits = source.size == target.size == self.size and source.flags.c_contiguous and target.flags.c_contiguous
        if not fits or self.rows % CODES_IN_TURN or self.columns % COLUMNS_IN_TURN or self.bits != 4:
            raise ValueError(f"{source.size} and {target.size} bytes are not {self.columns} columns in turn")
        scratch = np.empty(2 * self.rows, np.uint8)
        move = kernel(f"{verb}_columns_4bit")
        move(address(source), address(target), address(scratch), self.columns // COLUMNS_IN_TURN, self.rows // 16)
