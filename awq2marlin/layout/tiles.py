"""Words that hold codes in sequence along K, straight to Marlin's tiles and back; and by way of tiles, to plain rows.

Several formats pack a column's codes like this and differ only in how the words lie: those of a column one after the
other (N first) or those of a row (K first). So the words come as a view of two dimensions with the strides of both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import Bytes, MarlinWeight, StrayBitsError

Words = npt.NDArray[np.uint32]

#: What a kernel needs to stage lines of a tile.
_SCRATCH_BYTES = 1024

#: Where N is first, kernels take as many words of a column at once as a cache line has.
LINE_WORDS = 16


def words_to_tiles(words: Words, bits: int, tiles: Bytes) -> None:
    """Turns words along K into tiles; what these hold besides is zero.

    Args:
        words: [K / f, N], one of the strides 4 bytes: entry (w, n) holds codes w * f, w * f + 1, ... of column n.
        bits: 4 or 8.
        tiles: uint8, contiguous: as many rows of as many tiles as hold them all; written.
    """
    whole = _Whole(words, bits)
    source, target = whole.buffer(filled=True), tiles
    if target.size != whole.tile_bytes:
        target = np.empty(whole.tile_bytes, np.uint8)
    whole.run("words_to_tiles", source, source, target)
    if target is not tiles:
        tiles[:] = target[: tiles.size]


def tiles_to_words(tiles: Bytes, bits: int, words: Words) -> None:
    """Undoes `words_to_tiles`."""
    whole = _Whole(words, bits)
    source, target = tiles, whole.buffer(filled=False)
    if source.size != whole.tile_bytes:
        source = np.zeros(whole.tile_bytes, np.uint8)
        source[: tiles.size] = tiles
    whole.run("tiles_to_words", target, source, target)
    if target is not words:
        words[:] = target[: words.shape[0], : words.shape[1]]


def words_to_rows(words: Words, bits: int, plain: Bytes, rows: int, size_k: int) -> None:
    """Turns words along K into plain rows, packed in AWQ's order.

    Args:
        words: as for `words_to_tiles`.
        bits: 4 or 8.
        plain: uint8, contiguous, the rows; written.
        rows: how many.
        size_k: how many the tensor has, for messages.

    Raises:
        StrayBitsError: if the last words are not zero past the last row.
    """
    layout = _tiles_of(words, bits)
    tiles = np.empty(layout.size, np.uint8)
    words_to_tiles(words, bits, tiles)
    tiles_to_rows(layout, tiles, plain, rows, size_k)


def rows_to_words(plain: Bytes, bits: int, words: Words, rows: int) -> None:
    """Undoes `words_to_rows`."""
    tiles_to_words(rows_to_tiles(plain, _tiles_of(words, bits), rows), bits, words)


def tiles_to_rows(layout: MarlinWeight, tiles: Bytes, plain: Bytes, rows: int, size_k: int) -> None:
    """Turns tiles into the plain rows that they hold.

    Args:
        layout: of the tiles.
        tiles: uint8, contiguous, perhaps of more rows and columns.
        plain: uint8, contiguous, the rows; written.
        rows: how many.
        size_k: how many the tensor has, for messages.

    Raises:
        StrayBitsError: if the tiles are not zero past the last row.
    """
    if plain.size == layout.size:
        layout.unpack(tiles, plain)
        return
    padded = np.empty(layout.size, np.uint8)
    layout.unpack(tiles, padded)
    table = padded.reshape(-1, layout.row_bytes)
    plain.reshape(rows, -1)[:] = table[:rows, : plain.size // rows]
    if table[rows:].any():
        raise StrayBitsError(f"its last words are not zero past the last of K={size_k} values")


def rows_to_tiles(plain: Bytes, layout: MarlinWeight, rows: int) -> Bytes:
    """Returns the tiles that hold plain rows; the other arguments are those of `tiles_to_rows`."""
    padded = plain
    if plain.size != layout.size:
        padded = np.zeros(layout.size, np.uint8)
        padded.reshape(-1, layout.row_bytes)[:rows, : plain.size // rows] = plain.reshape(rows, -1)
    tiles = np.empty(layout.size, np.uint8)
    layout.pack(padded, tiles)
    return tiles


def _tiles_of(words: Words, bits: int) -> MarlinWeight:
    """Returns the tiles that hold words."""
    codes, columns = words.shape[0] * pack_factor(bits), words.shape[1]
    return MarlinWeight("qweight", bits, _up(codes, GPTQ_MARLIN_TILE), _up(columns, MARLIN_TILE_N))


class _Whole:
    """Words filled up to the whole blocks that a kernel takes.

    Attributes:
        tile_bytes: of the tiles they make.
    """

    def __init__(self, words: Words, bits: int) -> None:
        self._words, self._bits = words, bits
        self._n_first = words.strides[0] == words.itemsize
        self._height = _up(words.shape[0], LINE_WORDS if self._n_first else bits // 2)
        self._width = _up(words.shape[1], MARLIN_TILE_N)
        self.tile_bytes = self._height * self._width * words.itemsize

    def buffer(self, *, filled: bool) -> Words:
        """Returns the words themselves if they are whole, else new ones like them, perhaps filled with theirs."""
        shape = self._height, self._width
        if self._words.shape == shape:
            return self._words
        whole = np.zeros(shape[::-1], np.uint32).T if self._n_first else np.zeros(shape, np.uint32)
        if filled:
            whole[: self._words.shape[0], : self._words.shape[1]] = self._words
        return whole

    def run(self, verb: str, words: Words, source: Words | Bytes, target: Words | Bytes) -> None:
        """Calls a kernel, one side of which are words."""
        scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        order, along = ("n_first", 1) if self._n_first else ("k_first", 0)
        shape = self._height // (self._bits // 2), self._width // MARLIN_TILE_N
        turn = kernel(f"{verb}_{self._bits}bit_{order}")
        turn(address(source), address(target), address(scratch), *shape, words.strides[along] // words.itemsize)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
