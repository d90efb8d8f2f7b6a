"""Tensors that lie the other way round: N first, so that they hold columns one after the other.

No part of such a tensor holds whole rows. So rows are taken out of all of it, and put into it, as many at a time as one
likes: those that share words or cache lines, together. What the plain rows do not hold, fields past the last row or
column, is zero in every tensor that is written; one that has anything else there is refused.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.modules import SCALE_BYTES
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import PartLayout, StrayBitsError
from awq2marlin.layout.tiles import Words, rows_to_words, tiles_to_words, words_to_rows, words_to_tiles

Bytes = npt.NDArray[np.uint8]

_LINE_BYTES = 64


class Transposed(PartLayout):
    """A tensor that holds columns one after the other."""

    is_plain: ClassVar[bool] = False
    is_transposed: ClassVar[bool] = True

    @property
    def band(self) -> int:
        """All rows lie together."""
        return self.rows

    @property
    def line_rows(self) -> int:
        """Rows in a cache line: of words or elements, one of each column and row."""
        return _LINE_BYTES // 4

    def held(self, data: Bytes, first: int, last: int) -> int:
        """Returns how many rows ``first`` to ``last`` there are: they are taken one by one."""
        del data
        return min(last, self.rows) - min(first, self.rows)

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns all of the tensor into plain rows; see `PartLayout.unpack`."""
        self.unpack_rows(data, 0, plain)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns all plain rows into the tensor."""
        self.pack_rows(plain, 0, data)

    def unpack_rows(self, data: Bytes, first: int, plain: Bytes) -> None:
        """Turns some rows of the tensor into plain rows; see `PartLayout.unpack_rows`."""
        if count := self._count(plain, first, data):
            self._unpack(data, first, count, plain)

    def pack_rows(self, plain: Bytes, first: int, data: Bytes) -> None:
        """Turns plain rows into those of the tensor."""
        if count := self._count(plain, first, data):
            self._pack(plain, first, count, data)

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        raise NotImplementedError

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        raise NotImplementedError

    def _count(self, plain: Bytes, first: int, data: Bytes) -> int:
        """Returns how many rows are plain; refuses what is not the whole tensor: the kernels trust their sizes."""
        count = plain.size // self.row_bytes
        fits = data.size == self.size and plain.size == count * self.row_bytes
        fits = fits and (not count or 0 <= first < first + count <= self.rows)
        if not (fits and plain.flags.c_contiguous and data.flags.c_contiguous):
            whole = f"{self.rows} rows of {self.columns} columns"
            raise ValueError(f"{plain.size} and {data.size} bytes are not rows of a tensor of {whole}")
        return count


class TransposedCodes(Transposed):
    """Codes int32 [N, ceil(K / f)], packed along K: field i of word w of row n is row w * f + i of column n."""

    turns_to_tiles: ClassVar[bool] = True

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self._row_words * 4

    @property
    def word_rows(self) -> int:
        """The codes of a word."""
        return pack_factor(self.bits)

    @property
    def line_rows(self) -> int:
        """Rows in a cache line of words."""
        return _LINE_BYTES * 8 // self.bits

    @property
    def _row_words(self) -> int:
        """Words of a column."""
        return -(-self.rows // pack_factor(self.bits))

    def unpack_tiles(self, data: Bytes, first: int, tiles: Bytes) -> None:
        """Turns some rows of the tensor into rows of tiles."""
        words_to_tiles(self._words(data, first, self._tiled_rows(tiles)), self.bits, tiles)

    def pack_tiles(self, tiles: Bytes, first: int, data: Bytes) -> None:
        """Turns rows of tiles into rows of the tensor."""
        tiles_to_words(tiles, self.bits, self._words(data, first, self._tiled_rows(tiles)))

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        words_to_rows(self._words(data, first, count), self.bits, plain, count, self.rows)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        rows_to_words(plain, self.bits, self._words(data, first, count), count)

    def _tiled_rows(self, tiles: Bytes) -> int:
        return tiles.size * 8 // self.bits // self.columns

    def _words(self, data: Bytes, first: int, count: int) -> Words:
        """Returns the words [K / f, N] of some rows, which begin with a word."""
        factor = pack_factor(self.bits)
        if first % factor or not 0 <= first < first + count <= self.rows:
            raise ValueError(f"rows {first} to {first + count} of {self.rows} are not those of whole words")
        table = data.view(np.uint32).reshape(self.columns, self._row_words)
        return table[:, first // factor : -(-(first + count) // factor)].T


class TransposedZeroPoints(Transposed):
    """Zero points int32 [ceil(N / f), G], packed along N: field i of word g of row w is group g of column w * f + i."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        words = self._words(data, first, count)
        if (words[-1] & ~self._last_fields).any():
            raise StrayBitsError(f"its last row is not zero past the last of N={self.columns} values")
        self._turn("unpack", words, plain, count)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        words = self._words(data, first, count)
        self._turn("pack", plain, words, count)
        words[-1] &= self._last_fields

    @property
    def _last_fields(self) -> np.uint32:
        """The bits of the last row's words that hold columns."""
        columns = self.columns % pack_factor(self.bits) or pack_factor(self.bits)
        return np.uint32((1 << columns * self.bits) - 1)

    def _words(self, data: Bytes, first: int, count: int) -> Words:
        """Returns the words of some groups: [N / f, how many]."""
        return data.view(np.uint32).reshape(-1, self.rows)[:, first : first + count]

    def _turn(self, verb: str, source: Bytes | Words, target: Bytes | Words, count: int) -> None:
        turn = kernel(f"{verb}_column_zeros_{self.bits}bit")
        turn(address(source), address(target), 0, self.row_bytes // 4, count, self.rows)


class SignedZeroPoints(Transposed):
    """Zero points int8 [N, G], not packed: z - 2^(b-1)."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self.rows

    @property
    def line_rows(self) -> int:
        """Zero points in a cache line."""
        return _LINE_BYTES

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        values = data.reshape(-1, self.rows)[:, first : first + count] + np.uint8(1 << (self.bits - 1))  # wraps around
        if (values > np.uint8((1 << self.bits) - 1)).any():
            raise StrayBitsError(f"a zero point does not fit into {self.bits} bits")
        fields = _filled(values.reshape(-1), self.row_bytes // 4 * pack_factor(self.bits) * count)
        shifted = fields.reshape(-1, pack_factor(self.bits), count) << self._shifts
        self._packed(count).unpack(np.bitwise_or.reduce(shifted, axis=1).reshape(-1).view(np.uint8), plain)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        words = np.empty(plain.size // 4, np.uint32)
        self._packed(count).pack(plain, words.view(np.uint8))
        fields = words.reshape(-1, 1, count) >> self._shifts & np.uint32((1 << self.bits) - 1)
        values = fields.astype(np.uint8).reshape(-1, count)[: self.columns] - np.uint8(1 << (self.bits - 1))
        data.reshape(-1, self.rows)[:, first : first + count] = values

    @property
    def _shifts(self) -> npt.NDArray[np.uint32]:
        return np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]

    def _packed(self, count: int) -> TransposedZeroPoints:
        """Returns how zero points of some groups are packed."""
        return TransposedZeroPoints(self.part, self.bits, count, self.columns)


class TransposedScales(Transposed):
    """Scales [N, G], 16 bits each."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self.rows * SCALE_BYTES

    @property
    def line_rows(self) -> int:
        """Scales in a cache line."""
        return _LINE_BYTES // SCALE_BYTES

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        here = address(data) + first * SCALE_BYTES
        kernel("transpose_scales")(here, address(plain), 0, self.columns, count, self.rows, self.columns)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        there = address(data) + first * SCALE_BYTES
        kernel("transpose_scales")(address(plain), there, 0, count, self.columns, self.columns, self.rows)


def _filled(data: Bytes, size: int) -> Bytes:
    """Returns bytes filled up with zeros."""
    if data.size == size:
        return data
    filled = np.zeros(size, np.uint8)
    filled[: data.size] = data
    return filled
