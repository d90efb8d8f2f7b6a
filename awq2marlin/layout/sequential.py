"""Tensors of GPTQ: rows along K, as in AWQ's, but the fields of a word stand in sequence.

A word of codes lies along K: it holds the next f codes of one column, so that a row of words is f plain rows. A word of
zero points lies along N, as AWQ's does, in another order; the oldest version stores z - 1. Scales are plain.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import Bytes, PartLayout, UnclearBitsError
from awq2marlin.layout.tiles import Words, rows_to_words, tiles_to_words, words_to_rows, words_to_tiles

#: The swaps that turn fields in sequence to AWQ's order, the even ones and then the odd ones: bits apart, and where.
_SWAPS: dict[int, tuple[tuple[int, int], ...]] = {4: ((4, 0x00F000F0), (8, 0x0000FF00)), 8: ((8, 0x0000FF00),)}


class SequentialCodes(PartLayout):
    """Codes int32 [K / f, N], packed along K: field i of word n of row r is row r * f + i of column n."""

    is_plain: ClassVar[bool] = False
    turns_to_tiles: ClassVar[bool] = True

    @property
    def band(self) -> int:
        """A row of words is f rows."""
        return pack_factor(self.bits)

    @property
    def column_unit(self) -> int:
        """Whole words of plain rows are enough."""
        return pack_factor(self.bits)

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns rows of words into plain rows."""
        self._check(plain, data)
        words = self._words(data)
        words_to_rows(words, self.bits, plain, len(words) * self.band, self.rows)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns plain rows into rows of words."""
        self._check(plain, data)
        words = self._words(data)
        rows_to_words(plain, self.bits, words, len(words) * self.band)

    def unpack_tiles(self, data: Bytes, first: int, tiles: Bytes) -> None:
        """Turns rows of words into rows of tiles."""
        del first
        self._check(tiles, data)
        words_to_tiles(self._words(data), self.bits, tiles)

    def pack_tiles(self, tiles: Bytes, first: int, data: Bytes) -> None:
        """Turns rows of tiles into rows of words."""
        del first
        self._check(tiles, data)
        tiles_to_words(tiles, self.bits, self._words(data))

    def _words(self, data: Bytes) -> Words:
        return data.view(np.uint32).reshape(-1, self.columns)


class SequentialZeroPoints(PartLayout):
    """Zero points int32 [G, N / f], packed along N: field i of a word is its i-th column. GPTQ v2 writes them so."""

    is_plain: ClassVar[bool] = False

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns words of fields in sequence into AWQ's; see `PartLayout.unpack`."""
        words = self._stored(data.view(np.uint32))
        for shift, mask in _SWAPS[self.bits]:
            words = _swapped(words, shift, mask)
        plain.view(np.uint32)[:] = words

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Undoes `unpack`."""
        words = plain.view(np.uint32)
        for shift, mask in reversed(_SWAPS[self.bits]):
            words = _swapped(words, shift, mask)
        data.view(np.uint32)[:] = self._storable(words)

    def _stored(self, words: Words) -> Words:
        """Returns what stored words mean: the zero points themselves."""
        return words

    def _storable(self, words: Words) -> Words:
        """Undoes `_stored`."""
        return words


class BorrowingZeroPoints(SequentialZeroPoints):
    """The same with 1 less in every field, taken from the word as a whole: a zero point of 0 borrows from the next.

    GPTQModel writes them so, and adds it to the word when it reads them: that is exact, whatever was borrowed.
    """

    def _stored(self, words: Words) -> Words:
        return words + self._ones

    def _storable(self, words: Words) -> Words:
        return words - self._ones

    @property
    def _ones(self) -> np.uint32:
        """A word with 1 in every field."""
        return np.uint32(0xFFFFFFFF // ((1 << self.bits) - 1))


class LowerZeroPoints(BorrowingZeroPoints):
    """The same with 1 less in every field, taken from each: GPTQ's first version, whoever wrote it.

    2^bits - 1 is refused: it stands for 2^bits, which no other format can hold, or for 0, if it overflowed.
    """

    def _stored(self, words: Words) -> Words:
        largest = np.uint32((1 << self.bits) - 1)
        if any(((words >> np.uint32(shift) & largest) == largest).any() for shift in range(0, 32, self.bits)):
            raise UnclearBitsError(
                f"a zero point is stored as {largest}; this version of GPTQ stores one less than the zero point, so "
                f"that it is {largest + 1}, which {self.bits} bits cannot hold, or 0, and readers differ over which. "
                "Look for a checkpoint of this model that says checkpoint_format 'gptq_v2' or names GPTQModel as its "
                "quantizer"
            )
        return super()._stored(words)


def _swapped(words: Words, shift: int, mask: int) -> Words:
    """Returns words with the bits where ``mask`` is set swapped with those ``shift`` above."""
    change = (words >> np.uint32(shift) ^ words) & np.uint32(mask)
    swapped: Words = words ^ change ^ change << np.uint32(shift)
    return swapped
