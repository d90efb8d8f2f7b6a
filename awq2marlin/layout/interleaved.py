"""Codes that lie N first with four columns in turn: int16 [N / 4, K], 4 bits.

A row of the tensor holds four columns, 64 codes of each in turn. In a run of 32 codes of a column, code 8 a + 2 b + c
stands at place 8 b + 4 c + a, and a word of 16 bits holds four places, the first in the lowest bits. Taken apart, the
columns are words along K, as in `transposed`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.tiles import Words, rows_to_words, tiles_to_words, words_to_rows, words_to_tiles
from awq2marlin.layout.transposed import Transposed

Bytes = npt.NDArray[np.uint8]

#: Columns that lie in turn, and how many codes of each.
COLUMNS_IN_TURN = 4
CODES_IN_TURN = 64


class InterleavedCodes(Transposed):
    """Codes int16 [N / 4, K]; K is a multiple of 64, N of 4."""

    turns_to_tiles: ClassVar[bool] = True

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self.rows // 2

    @property
    def word_rows(self) -> int:
        """The codes of a turn."""
        return CODES_IN_TURN

    @property
    def line_rows(self) -> int:
        """Two turns: taken apart, they are a cache line of each column."""
        return 2 * CODES_IN_TURN

    def unpack_tiles(self, data: Bytes, first: int, tiles: Bytes) -> None:
        """Turns some rows of the tensor into rows of tiles."""
        words_to_tiles(self._apart(data, first, tiles.size * 2 // self.columns), self.bits, tiles)

    def pack_tiles(self, tiles: Bytes, first: int, data: Bytes) -> None:
        """Turns rows of tiles into rows of the tensor."""
        words = self._empty(tiles.size * 2 // self.columns)
        tiles_to_words(tiles, self.bits, words)
        self._join(words, first, data)

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        words_to_rows(self._apart(data, first, count), self.bits, plain, count, self.rows)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        words = self._empty(count)
        rows_to_words(plain, self.bits, words, count)
        self._join(words, first, data)

    def _empty(self, count: int) -> Words:
        """Returns words along K [rows / 8, N], N first, to be written."""
        return np.empty((self.columns, count // 8), np.uint32).T

    def _apart(self, data: Bytes, first: int, count: int) -> Words:
        """Takes the columns of some rows apart."""
        words = self._empty(count)
        self._move("split", self._turns(data, first, count), words, count)
        return words

    def _join(self, words: Words, first: int, data: Bytes) -> None:
        """Undoes `_apart`."""
        count = len(words) * 8
        self._move("join", words, self._turns(data, first, count), count)

    def _turns(self, data: Bytes, first: int, count: int) -> Bytes:
        """Returns the turns that hold some rows: of all blocks, [N / 4, bytes]."""
        fits = self.bits == 4 and self.columns % COLUMNS_IN_TURN == 0 and 0 <= first < first + count <= self.rows
        if not fits or any(rows % CODES_IN_TURN for rows in (self.rows, first, count)):
            rows = f"rows {first} to {first + count} of {self.rows}"
            raise ValueError(f"{rows} of {self.columns} columns of {self.bits} bits are not whole columns in turn")
        row = self.rows * COLUMNS_IN_TURN // 2
        begin, end = (each * COLUMNS_IN_TURN // 2 for each in (first, first + count))
        return data.reshape(self.columns // COLUMNS_IN_TURN, row)[:, begin:end]

    def _move(self, verb: str, source: Bytes | Words, target: Bytes | Words, count: int) -> None:
        scratch = np.empty(2 * count, np.uint8)
        move = kernel(f"{verb}_columns_4bit")
        shape = self.columns // COLUMNS_IN_TURN, count // 16
        move(address(source), address(target), address(scratch), *shape, self.rows // 4)
