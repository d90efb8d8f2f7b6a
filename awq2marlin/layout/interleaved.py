"""Codes that lie N first with four columns in turn: int16 [N / 4, K], 4 bits.

A row of the tensor holds four columns, 64 codes of each in turn. In a run of 32 codes of a column, code 8 a + 2 b + c
stands at place 8 b + 4 c + a, and a word of 16 bits holds four places, the first in the lowest bits. They go straight
to Marlin's tiles and back; and by way of tiles, to plain rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N
from awq2marlin.layout.repack import Bytes, MarlinWeight
from awq2marlin.layout.tiles import rows_to_tiles, tiles_to_rows
from awq2marlin.layout.transposed import Transposed

#: Columns that lie in turn, and how many codes of each.
COLUMNS_IN_TURN = 4
CODES_IN_TURN = 64

#: What a kernel needs to take 64 columns apart.
_SCRATCH_BYTES = 5120


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
        """Two turns: what the kernels take at once."""
        return 2 * CODES_IN_TURN

    def unpack_tiles(self, data: Bytes, first: int, tiles: Bytes) -> None:
        """Turns some rows of the tensor into rows of tiles."""
        turns = self._turns(data, first, tiles.size * 2 // self.columns)
        made = tiles if tiles.size == _layout_of(turns).size else np.empty(_layout_of(turns).size, np.uint8)
        _turns_to_tiles(turns, made)
        if made is not tiles:
            tiles[:] = made[: tiles.size]

    def pack_tiles(self, tiles: Bytes, first: int, data: Bytes) -> None:
        """Turns rows of tiles into rows of the tensor."""
        turns = self._turns(data, first, tiles.size * 2 // self.columns)
        whole = tiles if tiles.size == _layout_of(turns).size else np.zeros(_layout_of(turns).size, np.uint8)
        if whole is not tiles:
            whole[: tiles.size] = tiles
        _tiles_to_turns(whole, turns)

    def _unpack(self, data: Bytes, first: int, count: int, plain: Bytes) -> None:
        turns = self._turns(data, first, count)
        tiles = np.empty(_layout_of(turns).size, np.uint8)
        _turns_to_tiles(turns, tiles)
        tiles_to_rows(_layout_of(turns), tiles, plain, count, self.rows)

    def _pack(self, plain: Bytes, first: int, count: int, data: Bytes) -> None:
        turns = self._turns(data, first, count)
        _tiles_to_turns(rows_to_tiles(plain, _layout_of(turns), count), turns)

    def _turns(self, data: Bytes, first: int, count: int) -> Bytes:
        """Returns the turns that hold some rows: of all blocks, [N / 4, bytes]."""
        fits = self.bits == 4 and self.columns % COLUMNS_IN_TURN == 0 and 0 <= first < first + count <= self.rows
        if not fits or any(rows % CODES_IN_TURN for rows in (self.rows, first, count)):
            rows = f"rows {first} to {first + count} of {self.rows}"
            raise ValueError(f"{rows} of {self.columns} columns of {self.bits} bits are not whole columns in turn")
        row = self.rows * COLUMNS_IN_TURN // 2
        begin, end = (each * COLUMNS_IN_TURN // 2 for each in (first, first + count))
        return data.reshape(self.columns // COLUMNS_IN_TURN, row)[:, begin:end]


def _layout_of(turns: Bytes) -> MarlinWeight:
    """Returns the tiles that hold turns [N / 4, bytes], and so many rows and columns as the kernels take at once."""
    rows, columns = turns.shape[1] * 2 // COLUMNS_IN_TURN, len(turns) * COLUMNS_IN_TURN
    return MarlinWeight("qweight", 4, _up(rows, 2 * CODES_IN_TURN), _up(columns, MARLIN_TILE_N))


def _turns_to_tiles(turns: Bytes, tiles: Bytes) -> None:
    """Turns interleaved columns into their tiles; what these hold besides is zero."""
    whole = _whole(turns, np.zeros)
    if whole is not turns:
        whole[: len(turns), : turns.shape[1]] = turns
    _move("turns_to_tiles", whole, whole, tiles)


def _tiles_to_turns(tiles: Bytes, turns: Bytes) -> None:
    """Undoes `_turns_to_tiles`."""
    whole = _whole(turns, np.empty)
    _move("tiles_to_turns", whole, tiles, whole)
    if whole is not turns:
        turns[:] = whole[: len(turns), : turns.shape[1]]


def _whole(turns: Bytes, make: Callable[..., Bytes]) -> Bytes:
    """Returns the turns themselves if they are as many as the kernels take, else new ones."""
    layout = _layout_of(turns)
    if layout.size == turns.size:
        return turns
    return make((layout.columns // COLUMNS_IN_TURN, layout.rows * COLUMNS_IN_TURN // 2), np.uint8)


def _move(verb: str, turns: Bytes, source: Bytes, target: Bytes) -> None:
    """Calls a kernel, one side of which are whole turns."""
    layout, scratch = _layout_of(turns), np.empty(_SCRATCH_BYTES, np.uint8)
    shape = layout.rows // GPTQ_MARLIN_TILE, layout.columns // MARLIN_TILE_N
    kernel(f"{verb}_4bit")(address(source), address(target), address(scratch), *shape, turns.strides[0] // 8)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
