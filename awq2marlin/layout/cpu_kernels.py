"""The CPU repack: AWQ words to Marlin words and back, and to plain weights, compiled by Numba, on flat arrays.

The map is stated in docs/marlin-native.md and pictured in kernels/README.md. What makes it fast: for 4
bits the eight values that a lane and block own are the nibbles of eight source words, and a Marlin word
is one column of that 8x8 nibble matrix, so the repack is a transpose in three rounds of mask, shift and
swap (Hacker's Delight, 2nd ed., section 7-3, "Transposing a bit matrix", on nibbles). For 8 bits it is a
4x4 byte matrix and two rounds. Sixteen matrices (4 row pairs x 4 blocks) go side by side through the
rounds, which the compiler turns into vector instructions. Words that hold their codes along K are nearer to tiles than
AWQ's: four of them make four Marlin words in a round or two less.

This module is Numba's side: it is imported only where `machine_code` finds nothing compiled yet. The kernels
take plain pointers and allocate nothing, so that their machine code stands alone; the names of their
arguments are the same throughout.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import cfunc, float64, int32, njit, types, uint16, uint32, uint64
from numba.extending import intrinsic

float32: Any = types.float32


def _prefetch_line(_typing: Any, array: Any, index: Any) -> Any:
    """Asks for the cache line of ``array[index]`` in the second-level cache, wherever it lies; never fails."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
        builder.call(function, [place, number(0), number(2), number(1)])  # to read; second level; data

    return types.void(array, index), generate


_prefetch: Any = intrinsic(_prefetch_line)


def _transposition(size: int) -> Any:
    """Returns a function that transposes a square of words whose rows lie apart.

    It is drawn in vectors, because a loop would become one load and one store for every word: in three rounds, or two,
    two quarters of ever smaller squares change places. With it, kernels take 0.8 times as long (AMD EPYC, Zen 4,
    November 2026).

    Args:
        size: rows and columns, 4 or 8.
    """

    def typed(_typing: Any, source: Any, at: Any, read: Any, target: Any, to: Any, written: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            row = ir.VectorType(ir.IntType(32), size)

            def place(side: Any, number: int) -> Any:
                array, first, stride = side
                index = builder.add(first, builder.mul(stride, ir.Constant(stride.type, number)))
                return builder.bitcast(builder.gep(array, [index]), row.as_pointer())

            def picked(one: Any, other: Any, numbers: list[int]) -> Any:
                return builder.shuffle_vector(one, other, ir.Constant(row, numbers))

            rows = [builder.load(place(arguments[:3], number), align=4) for number in range(size)]
            half = size // 2
            while half:
                low = [i if not i & half else size + i - half for i in range(size)]
                high = [i + half if not i & half else size + i for i in range(size)]
                for r in range(size):
                    if not r & half:
                        one, other = rows[r], rows[r + half]
                        rows[r], rows[r + half] = picked(one, other, low), picked(one, other, high)
                half //= 2
            for number, each in enumerate(rows):
                builder.store(each, place(arguments[3:], number), align=4)
            return _context.get_dummy_value()

        return types.void(source, at, read, target, to, written), generate

    return intrinsic(typed)


_transpose_4, _transpose_8 = _transposition(4), _transposition(8)


@njit(forceinline=True)
def _exchange(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Swaps the fields of ``low`` above ``shift`` with those of ``high`` below it, where ``mask`` is set."""
    change = ((low >> shift) ^ high) & mask
    return low ^ (change << shift), high ^ change


@njit(forceinline=True)
def _exchange_narrow(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Does what `_exchange` does in 32 bits, where Numba would take 64; around it, one or the other is faster."""
    change = uint32((uint32(low >> shift) ^ high) & mask)
    return uint32(low ^ uint32(change << shift)), uint32(high ^ change)


@njit(forceinline=True)
def _transpose_nibbles(w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> Any:
    """Transposes the 8x8 nibble matrix whose row i is ``wi``; its own inverse."""
    mask, shift = uint32(0x0F0F0F0F), uint32(4)
    w0, w1 = _exchange(w0, w1, shift, mask)
    w2, w3 = _exchange(w2, w3, shift, mask)
    w4, w5 = _exchange(w4, w5, shift, mask)
    w6, w7 = _exchange(w6, w7, shift, mask)
    mask, shift = uint32(0x00FF00FF), uint32(8)
    w0, w2 = _exchange(w0, w2, shift, mask)
    w1, w3 = _exchange(w1, w3, shift, mask)
    w4, w6 = _exchange(w4, w6, shift, mask)
    w5, w7 = _exchange(w5, w7, shift, mask)
    mask, shift = uint32(0x0000FFFF), uint32(16)
    w0, w4 = _exchange(w0, w4, shift, mask)
    w1, w5 = _exchange(w1, w5, shift, mask)
    w2, w6 = _exchange(w2, w6, shift, mask)
    w3, w7 = _exchange(w3, w7, shift, mask)
    return w0, w1, w2, w3, w4, w5, w6, w7


@njit(forceinline=True)
def _transpose_bytes(w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """Transposes the 4x4 byte matrix whose row i is ``wi``; its own inverse."""
    mask, shift = uint32(0x00FF00FF), uint32(8)
    w0, w1 = _exchange(w0, w1, shift, mask)
    w2, w3 = _exchange(w2, w3, shift, mask)
    mask, shift = uint32(0x0000FFFF), uint32(16)
    w0, w2 = _exchange(w0, w2, shift, mask)
    w1, w3 = _exchange(w1, w3, shift, mask)
    return w0, w1, w2, w3


@njit(forceinline=True)
def _swap(word: Any, shift: Any, mask: Any) -> Any:
    """Swaps the fields of a word where ``mask`` is set with those ``shift`` bits above."""
    change = uint32((uint32(word >> shift) ^ word) & mask)
    return uint32(word ^ change ^ uint32(change << shift))


@njit(forceinline=True)
def _smaller(one: Any, other: Any) -> Any:
    """Returns the smaller; ``other`` where they cannot be compared."""
    return one if one < other else other


# In a tile, row r belongs to row pair p = (r % 8) // 2 and is value v = r % 2 + 2 * (r // 8) of its lane;
# columns 8..15 of a block are values v + 4. Matrix row i is value MARLIN_INTERLEAVE[i], so value v is row
# v // 2 + 4 * (v % 2) for v < 4, and the same plus 2 for v + 4. Matrix column i of the transpose is
# column AWQ_PACK_ORDER[i] of the block: 0 2 4 6 1 3 5 7. Sixteen matrices, index 4 p + block, stand side
# by side in ``staged``: word i of matrix x is staged[16 i + x]; so a column's sixteen words are contiguous.


def repack_qweight_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Repacks rows of tiles from AWQ to Marlin, 4 bits.

    Args:
        source: uint32 [16 * tile_rows * row_words], AWQ words, row by row.
        target: uint32, same length, Marlin words; written.
        staged: uint32 [128], scratch.
        tile_rows: how many rows of tiles.
        row_words: words in a row, N / 8, a multiple of 8.
    """
    words = uint64(row_words)
    tiles = words // uint64(8)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for r in range(16):
            at = (uint64(16) * tile_row + uint64(r)) * words + uint64(8) * tile_column
            to = uint64(16 * ((r >> 3) + 4 * (r & 1)) + 4 * ((r & 7) >> 1))
            for block in range(uint64(4)):
                staged[to + block] = source[at + uint64(2) * block]
                staged[to + uint64(32) + block] = source[at + uint64(2) * block + uint64(1)]
        at = uint64(128) * tile
        for x in range(uint64(16)):
            c0, c2, c4, c6, c1, c3, c5, c7 = _transpose_nibbles(
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x],
                staged[64 + x], staged[80 + x], staged[96 + x], staged[112 + x],
            )  # fmt: skip
            target[at + x] = c0
            target[at + x + uint64(16)] = c1
            target[at + x + uint64(32)] = c2
            target[at + x + uint64(48)] = c3
            target[at + x + uint64(64)] = c4
            target[at + x + uint64(80)] = c5
            target[at + x + uint64(96)] = c6
            target[at + x + uint64(112)] = c7


def unpack_qweight_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Undoes `repack_qweight_4bit`: Marlin words in ``source``, AWQ words to ``target``, same shapes."""
    words = uint64(row_words)
    tiles = words // uint64(8)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        at = uint64(128) * tile
        for x in range(uint64(16)):
            (
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x],
                staged[64 + x], staged[80 + x], staged[96 + x], staged[112 + x],
            ) = _transpose_nibbles(
                source[at + x],
                source[at + x + uint64(32)],
                source[at + x + uint64(64)],
                source[at + x + uint64(96)],
                source[at + x + uint64(16)],
                source[at + x + uint64(48)],
                source[at + x + uint64(80)],
                source[at + x + uint64(112)],
            )  # fmt: skip
        for r in range(16):
            to = (uint64(16) * tile_row + uint64(r)) * words + uint64(8) * tile_column
            at = uint64(16 * ((r >> 3) + 4 * (r & 1)) + 4 * ((r & 7) >> 1))
            for block in range(uint64(4)):
                target[to + uint64(2) * block] = staged[at + block]
                target[to + uint64(2) * block + uint64(1)] = staged[at + uint64(32) + block]


# For 8 bits a block of 16 columns is four source words; word ``part`` holds columns 4 part + order[i],
# and half = part // 2 says which of the lane's two target words they go to. Matrix row i is value
# MARLIN_INTERLEAVE[i]: 0 2 1 3, so value v is row (v >> 1) + 2 * (v & 1).


def repack_qweight_8bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Repacks rows of tiles from AWQ to Marlin, 8 bits.

    Args:
        source: uint32 [16 * tile_rows * row_words], AWQ words, row by row.
        target: uint32, same length, Marlin words; written.
        staged: uint32 [128], scratch.
        tile_rows: how many rows of tiles.
        row_words: words in a row, N / 4, a multiple of 16.
    """
    words = uint64(row_words)
    tiles = words // uint64(16)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for part in range(4):
            for r in range(16):
                at = (uint64(16) * tile_row + uint64(r)) * words + uint64(16) * tile_column + uint64(part)
                to = uint64(16 * ((r >> 3) + 2 * (r & 1)) + 4 * ((r & 7) >> 1))
                for block in range(uint64(4)):
                    staged[to + block] = source[at + uint64(4) * block]
            at = uint64(256) * tile + uint64(128 * (part & 1) + (part >> 1))
            for x in range(uint64(16)):
                c0, c2, c1, c3 = _transpose_bytes(staged[x], staged[16 + x], staged[32 + x], staged[48 + x])
                target[at + uint64(2) * x] = c0
                target[at + uint64(2) * x + uint64(32)] = c1
                target[at + uint64(2) * x + uint64(64)] = c2
                target[at + uint64(2) * x + uint64(96)] = c3


def unpack_qweight_8bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Undoes `repack_qweight_8bit`: Marlin words in ``source``, AWQ words to ``target``, same shapes."""
    words = uint64(row_words)
    tiles = words // uint64(16)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for part in range(4):
            at = uint64(256) * tile + uint64(128 * (part & 1) + (part >> 1))
            for x in range(uint64(16)):
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x] = _transpose_bytes(
                    source[at + uint64(2) * x],
                    source[at + uint64(2) * x + uint64(64)],
                    source[at + uint64(2) * x + uint64(32)],
                    source[at + uint64(2) * x + uint64(96)],
                )
            for r in range(16):
                to = (uint64(16) * tile_row + uint64(r)) * words + uint64(16) * tile_column + uint64(part)
                at = uint64(16 * ((r >> 3) + 2 * (r & 1)) + 4 * ((r & 7) >> 1))
                for block in range(uint64(4)):
                    target[to + uint64(4) * block] = staged[at + block]


def gather_fields_4bit(source: Any, target: Any, fields: Any, blocks: Any) -> None:
    """Rearranges the nibbles of every block of eight words by a table.

    Args:
        source: uint32 [8 * blocks].
        target: uint32, same length; written.
        fields: uint8 [64]; field i of a target block is field ``fields[i]`` of the source's, counted upward
            from the block's first word's lowest bits.
        blocks: how many.
    """
    for block in range(uint64(blocks)):
        for word in range(uint64(8)):
            value = uint32(0)
            for i in range(uint64(8)):
                field = uint64(fields[word * uint64(8) + i])
                found = source[block * uint64(8) + (field >> uint64(3))] >> uint32(uint64(4) * (field & uint64(7)))
                value |= (found & uint32(15)) << uint32(uint64(4) * i)
            target[block * uint64(8) + word] = value


def gather_fields_8bit(source: Any, target: Any, fields: Any, blocks: Any) -> None:
    """Rearranges the bytes of every block of sixteen words by a table; as `gather_fields_4bit`."""
    for block in range(uint64(blocks)):
        for word in range(uint64(16)):
            value = uint32(0)
            for i in range(uint64(4)):
                field = uint64(fields[word * uint64(4) + i])
                found = source[block * uint64(16) + (field >> uint64(2))] >> uint32(uint64(8) * (field & uint64(3)))
                value |= (found & uint32(255)) << uint32(uint64(8) * i)
            target[block * uint64(16) + word] = value


def gather_columns(source: Any, target: Any, columns: Any, blocks: Any, width: Any) -> None:
    """Rearranges 16-bit elements within every block by a table.

    Args:
        source: uint16 [blocks * width].
        target: uint16, same length; written.
        columns: uint8 [width]; element i of a target block is ``columns[i]`` of the source's.
        blocks: how many.
        width: elements of a block.
    """
    for block in range(uint64(blocks)):
        for i in range(uint64(width)):
            target[block * uint64(width) + i] = source[block * uint64(width) + uint64(columns[i])]


# Other words hold the codes of one column, in sequence along k. They lie in memory with one stride to the next word of
# their column and another to the next column; one of the two is 1. Four such words become four Marlin words, those of
# lanes 4 i + p of a block, p = 0..3. With 4 bits they are two of column c (rows 0..7 and 8..15 of the tile) and two of
# column c + 8; Marlin word p has the nibbles 2 p and 2 p + 1 of each: one round of nibbles and two of bytes. With 8
# bits they are the four words of one column; Marlin word p has the bytes 2 p and 2 p + 1 of rows 0..7 and those of rows
# 8..15: two rounds. So a tile is eight lines of Marlin words, i = 0..7, and a line has 4 or 8 fours, of columns
# i + 16 u or i + 8 u; word p of four u is word p * fours + u of the line.


@njit(forceinline=True)
def _four_to_marlin_4bit(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Turns words of rows 0..7 and 8..15 of a column, and of the eighth column after it, into four Marlin words."""
    nibbles, octets, halves = uint32(0x0F0F0F0F), uint32(0x00FF00FF), uint32(0x0000FFFF)
    a, b = _exchange_narrow(a, b, uint32(4), nibbles)
    c, d = _exchange_narrow(c, d, uint32(4), nibbles)
    a, c = _exchange_narrow(a, c, uint32(8), octets)
    b, d = _exchange_narrow(b, d, uint32(8), octets)
    a, b = _exchange_narrow(a, b, uint32(16), halves)
    c, d = _exchange_narrow(c, d, uint32(16), halves)
    return a, c, b, d


@njit(forceinline=True)
def _four_of_marlin_4bit(a: Any, c: Any, b: Any, d: Any) -> Any:
    """Undoes `_four_to_marlin_4bit`."""
    nibbles, octets, halves = uint32(0x0F0F0F0F), uint32(0x00FF00FF), uint32(0x0000FFFF)
    a, b = _exchange_narrow(a, b, uint32(16), halves)
    c, d = _exchange_narrow(c, d, uint32(16), halves)
    a, c = _exchange_narrow(a, c, uint32(8), octets)
    b, d = _exchange_narrow(b, d, uint32(8), octets)
    a, b = _exchange_narrow(a, b, uint32(4), nibbles)
    c, d = _exchange_narrow(c, d, uint32(4), nibbles)
    return a, b, c, d


@njit(forceinline=True)
def _four_to_marlin_8bit(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Turns a column's words of rows 0..3, 4..7, 8..11 and 12..15 into four Marlin words."""
    shift, middle, halves = uint32(8), uint32(0x0000FF00), uint32(0x0000FFFF)
    a, c = _exchange_narrow(a, c, uint32(16), halves)
    b, d = _exchange_narrow(b, d, uint32(16), halves)
    return _swap(a, shift, middle), _swap(c, shift, middle), _swap(b, shift, middle), _swap(d, shift, middle)


@njit(forceinline=True)
def _four_of_marlin_8bit(a: Any, c: Any, b: Any, d: Any) -> Any:
    """Undoes `_four_to_marlin_8bit`."""
    shift, middle, halves = uint32(8), uint32(0x0000FF00), uint32(0x0000FFFF)
    a, c = _exchange_narrow(_swap(a, shift, middle), _swap(c, shift, middle), uint32(16), halves)
    b, d = _exchange_narrow(_swap(b, shift, middle), _swap(d, shift, middle), uint32(16), halves)
    return a, b, c, d


def _tile_moves(bits: int, n_first: bool, at_hand: bool = False) -> tuple[Any, Any]:
    """Returns the functions that turn words along K into tiles, and back: a tile, or tiles below one another.

    Fours that follow one another in memory go side by side through the rounds: those of the eight lines of a tile, or
    where N is first, those of tiles below one another that share a cache line of words. Their Marlin words change
    places by way of ``staged``.

    Args:
        bits: 4 or 8.
        n_first: whether the words of a column follow one another; else those of a row do.
        at_hand: whether the words are in the first-level cache, so that none is asked for ahead.
    """
    to_marlin, of_marlin = _FOURS[bits]
    two_columns = bits == 4
    column_step, beside_step = 64 // bits, bits // 2 if n_first else 1
    is_far = n_first and not at_hand
    transpose = _transpose_4 if n_first and bits == 8 else _transpose_8

    # Numbers of fours and lines are arguments, so that loops stay loops until the compiler makes vectors of them.

    @njit(forceinline=True)
    def to_tiles(
        source: Any,
        target: Any,
        staged: Any,
        at: Any,
        to: Any,
        stride: Any,
        below: Any,
        fours: Any,
        lines: Any,
        beside: Any,
    ) -> None:
        """Turns the words of 64 columns into a tile, or into tiles below one another.

        Args:
            source: uint32, the words.
            target: uint32, the tiles; written.
            staged: uint32 [256], scratch.
            at: the first word.
            to: the first tile.
            stride: from a word to the next along K or N, whichever is not 1.
            below: from a tile to the one below it.
            fours: how many a line has.
            lines: how many are taken one after the other.
            beside: how many fours go side by side: of as many tiles or of as many further lines.
        """
        word, column = (uint64(1), stride) if n_first else (stride, uint64(1))
        second, third, fourth = word, uint64(2) * word, uint64(3) * word
        if two_columns:
            third, fourth = uint64(8) * column, uint64(8) * column + word
        part, line = fours * beside, uint64(4) * fours
        apart = below if n_first else line
        for i in range(lines):
            for four in range(fours):
                first, s = at + column * (i + uint64(column_step) * four), beside * four
                if is_far:  # words that are far from one another: those of the next 64 columns
                    _prefetch(source, first + uint64(64) * column)
                    if two_columns:
                        _prefetch(source, first + uint64(64) * column + third)
                for x in range(beside):
                    f = first + uint64(beside_step) * x
                    w0, w1, w2, w3 = to_marlin(source[f], source[f + second], source[f + third], source[f + fourth])
                    staged[s + x] = w0
                    staged[s + x + part] = w1
                    staged[s + x + uint64(2) * part] = w2
                    staged[s + x + uint64(3) * part] = w3
            for w in range(uint64(0), line, beside):
                transpose(staged, w * beside, beside, target, to + i * line + w, apart)

    @njit(forceinline=True)
    def of_tiles(
        source: Any,
        target: Any,
        staged: Any,
        at: Any,
        to: Any,
        stride: Any,
        below: Any,
        fours: Any,
        lines: Any,
        beside: Any,
    ) -> None:
        """Undoes `to_tiles`: tiles at ``at`` in ``source``, words at ``to`` in ``target``."""
        word, column = (uint64(1), stride) if n_first else (stride, uint64(1))
        second, third, fourth = word, uint64(2) * word, uint64(3) * word
        if two_columns:
            third, fourth = uint64(8) * column, uint64(8) * column + word
        part, line = fours * beside, uint64(4) * fours
        apart = below if n_first else line
        for i in range(lines):
            for w in range(uint64(0), line, beside):
                transpose(source, at + i * line + w, apart, staged, w * beside, beside)
            for four in range(fours):
                first, s = to + column * (i + uint64(column_step) * four), beside * four
                if is_far:
                    _prefetch(target, first + uint64(64) * column)
                    if two_columns:
                        _prefetch(target, first + uint64(64) * column + third)
                for x in range(beside):  # in place, or the compiler would make no vectors of it
                    w0, w1, w2, w3 = of_marlin(
                        staged[s + x],
                        staged[s + x + part],
                        staged[s + x + uint64(2) * part],
                        staged[s + x + uint64(3) * part],
                    )
                    staged[s + x] = w0
                    staged[s + x + part] = w1
                    staged[s + x + uint64(2) * part] = w2
                    staged[s + x + uint64(3) * part] = w3
                for x in range(beside):
                    f = first + uint64(beside_step) * x
                    target[f] = staged[s + x]
                    target[f + second] = staged[s + x + part]
                    target[f + third] = staged[s + x + uint64(2) * part]
                    target[f + fourth] = staged[s + x + uint64(3) * part]

    return to_tiles, of_tiles


def _tile_kernels(bits: int, n_first: bool) -> tuple[Any, Any]:
    """Returns the kernels that turn words along K into tiles, and back.

    Args:
        bits: 4 or 8.
        n_first: whether the words of a column follow one another; else those of a row do.
    """
    to_tiles, of_tiles = _tile_moves(bits, n_first)
    tile_words, tiles_at_once = 32 * bits, 32 // bits if n_first else 1

    def words_to_tiles(source: Any, target: Any, staged: Any, tile_rows: Any, tiles: Any, stride: Any) -> None:
        """Turns words along K into tiles.

        Args:
            source: uint32, the words of 16 * tile_rows rows of 64 * tiles columns.
            target: uint32 [32 * bits * tiles * tile_rows]; written.
            staged: uint32 [256], scratch.
            tile_rows: how many rows of tiles; where N is first a multiple of 32 / bits, which share cache lines.
            tiles: how many in a row.
            stride: from a word to the next, along N if ``n_first``, else along K.
        """
        word, column = (uint64(1), uint64(stride)) if n_first else (uint64(stride), uint64(1))
        below = uint64(tile_words) * uint64(tiles)
        lines, beside = (uint64(8), uint64(tiles_at_once)) if n_first else (uint64(1), uint64(8))
        for row in range(uint64(0), uint64(tile_rows), uint64(tiles_at_once)):
            for tile in range(uint64(tiles)):
                at = uint64(bits // 2) * row * word + uint64(64) * tile * column
                to = row * below + uint64(tile_words) * tile
                to_tiles(source, target, staged, at, to, uint64(stride), below, uint64(bits), lines, beside)

    def tiles_to_words(source: Any, target: Any, staged: Any, tile_rows: Any, tiles: Any, stride: Any) -> None:
        """Undoes `words_to_tiles`: tiles in ``source``, words to ``target``, other arguments the same."""
        word, column = (uint64(1), uint64(stride)) if n_first else (uint64(stride), uint64(1))
        below = uint64(tile_words) * uint64(tiles)
        lines, beside = (uint64(8), uint64(tiles_at_once)) if n_first else (uint64(1), uint64(8))
        for row in range(uint64(0), uint64(tile_rows), uint64(tiles_at_once)):
            for tile in range(uint64(tiles)):
                at = row * below + uint64(tile_words) * tile
                to = uint64(bits // 2) * row * word + uint64(64) * tile * column
                of_tiles(source, target, staged, at, to, uint64(stride), below, uint64(bits), lines, beside)

    return words_to_tiles, tiles_to_words


_FOURS = {4: (_four_to_marlin_4bit, _four_of_marlin_4bit), 8: (_four_to_marlin_8bit, _four_of_marlin_8bit)}


# Zero points of a tensor that has N first are packed along n in sequence, a row for each word of columns. So a word
# stays a word; its fields and its place change. AWQ's order is the even fields, then the odd ones: two rounds of swaps.


def unpack_column_zeros_4bit(source: Any, target: Any, _scratch: Any, words: Any, groups: Any, stride: Any) -> None:
    """Turns words of columns' zero points, one row of words a word of columns, into plain rows, 4 bits.

    Args:
        source: uint32, ``words`` rows of ``stride``; field i of row w holds column 8 w + i.
        target: uint32 [groups, words], rows of AWQ words; written.
        words: columns / 8.
        groups: how many zero points of each column to turn.
        stride: how many a column has.
    """
    for group in range(uint64(groups)):
        for w in range(uint64(words)):
            word = _swap(source[w * uint64(stride) + group], uint32(4), uint32(0x00F000F0))
            target[group * uint64(words) + w] = _swap(word, uint32(8), uint32(0x0000FF00))


def pack_column_zeros_4bit(source: Any, target: Any, _scratch: Any, words: Any, groups: Any, stride: Any) -> None:
    """Undoes `unpack_column_zeros_4bit`: plain rows in ``source``, same sizes."""
    for w in range(uint64(words)):
        for group in range(uint64(groups)):
            word = _swap(source[group * uint64(words) + w], uint32(8), uint32(0x0000FF00))
            target[w * uint64(stride) + group] = _swap(word, uint32(4), uint32(0x00F000F0))


def unpack_column_zeros_8bit(source: Any, target: Any, _scratch: Any, words: Any, groups: Any, stride: Any) -> None:
    """As `unpack_column_zeros_4bit`, with four columns to a word."""
    for group in range(uint64(groups)):
        for w in range(uint64(words)):
            word = source[w * uint64(stride) + group]
            target[group * uint64(words) + w] = _swap(word, uint32(8), uint32(0x0000FF00))


def pack_column_zeros_8bit(source: Any, target: Any, _scratch: Any, words: Any, groups: Any, stride: Any) -> None:
    """Undoes `unpack_column_zeros_8bit`."""
    for w in range(uint64(words)):
        for group in range(uint64(groups)):
            word = source[group * uint64(words) + w]
            target[w * uint64(stride) + group] = _swap(word, uint32(8), uint32(0x0000FF00))


# Codes may lie in a tensor of 16-bit words that holds four columns a row, 64 codes of each in turn. A run of 32 codes
# of a column is four words. Code k = 8 a + 2 b + c (a, b below 4, c below 2) is field 4 c + a of word b. So in every
# word the middle bytes change places, then the middle nibbles of each half, and then the words' bytes are turned over
# as a 4x4 matrix.


def _rearrangement(*, into_sequence: bool) -> Any:
    """Returns a function that puts 64 interleaved codes of a column in sequence, or undoes it.

    It is drawn in vectors, which the compiler would not find: the kernels take half the time (AMD EPYC, Zen 4,
    November 2026).
    """
    middle = [4 * word + byte for word in range(8) for byte in (0, 2, 1, 3)]
    over = [16 * run + 4 * byte + word for run in range(2) for word in range(4) for byte in range(4)]
    first, last = (middle, over) if into_sequence else (over, middle)
    octets, halves = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)

    def typed(_typing: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            def place(array: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(array, [index]), octets.as_pointer())

            def picked(vector: Any, numbers: list[int]) -> Any:
                return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), 32), numbers))

            def all_of(number: int) -> Any:
                return ir.Constant(halves, [number] * 16)

            half = builder.bitcast(picked(builder.load(place(*arguments[:2]), align=4), first), halves)
            change = builder.and_(builder.xor(builder.lshr(half, all_of(4)), half), all_of(0x00F0))
            half = builder.xor(builder.xor(half, change), builder.shl(change, all_of(4)))
            builder.store(picked(builder.bitcast(half, octets), last), place(*arguments[2:]), align=4)
            return _context.get_dummy_value()

        return types.void(source, at, target, to), generate

    return intrinsic(typed)


_in_sequence, _out_of_sequence = _rearrangement(into_sequence=True), _rearrangement(into_sequence=False)


def _typed_words_of(_typing: Any, array: Any, first: Any) -> Any:
    """Takes an array of 64 bits, from an element on, for one of 32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.gep(arguments[0], [arguments[1]]), ir.IntType(32).as_pointer())

    return types.CPointer(types.uint32)(array, first), generate  # type: ignore[no-untyped-call]


_words_of: Any = intrinsic(_typed_words_of)

#: How many blocks ahead are asked for: they lie far from one another, and the processor does not guess where.
_BLOCKS_AHEAD = uint64(16)

_to_tiles_at_hand, _of_tiles_at_hand = _tile_moves(4, n_first=True, at_hand=True)


def turns_to_tiles_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, tiles: Any, stride: Any) -> None:
    """Turns interleaved columns into tiles, 4 bits: 64 columns at a time are taken apart where they stay at hand.

    Args:
        source: uint64, blocks of four interleaved columns, 16 * tile_rows rows of them.
        target: uint32 [128 * tiles * tile_rows]; written.
        staged: uint64 [640], scratch.
        tile_rows: how many rows of tiles, a multiple of 8.
        tiles: how many in a row.
        stride: from a block to the next.
    """
    below = uint64(128) * uint64(tiles)
    columns, rest = _words_of(staged, uint64(0)), _words_of(staged, uint64(512))
    for row in range(uint64(0), uint64(tile_rows), uint64(8)):
        for tile in range(uint64(tiles)):
            for block in range(uint64(16)):
                at = (uint64(16) * tile + block) * uint64(stride) + uint64(4) * row
                for line in range(uint64(4)):
                    _prefetch(source, at + _BLOCKS_AHEAD * uint64(stride) + uint64(8) * line)
                for turn in range(uint64(2)):
                    for column in range(uint64(4)):
                        to = uint64(32) * block + uint64(8) * column + uint64(4) * turn
                        _in_sequence(source, at + uint64(16) * turn + uint64(4) * column, staged, to)
            to = row * below + uint64(128) * tile
            _to_tiles_at_hand(columns, target, rest, uint64(0), to, uint64(16), below, uint64(4), uint64(8), uint64(8))


def tiles_to_turns_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, tiles: Any, stride: Any) -> None:
    """Undoes `turns_to_tiles_4bit`: tiles in ``source``, blocks to ``target``, other arguments the same."""
    below = uint64(128) * uint64(tiles)
    columns, rest = _words_of(staged, uint64(0)), _words_of(staged, uint64(512))
    for row in range(uint64(0), uint64(tile_rows), uint64(8)):
        for tile in range(uint64(tiles)):
            at = row * below + uint64(128) * tile
            _of_tiles_at_hand(source, columns, rest, at, uint64(0), uint64(16), below, uint64(4), uint64(8), uint64(8))
            for block in range(uint64(16)):
                to = (uint64(16) * tile + block) * uint64(stride) + uint64(4) * row
                for line in range(uint64(4)):
                    _prefetch(target, to + _BLOCKS_AHEAD * uint64(stride) + uint64(8) * line)
                for turn in range(uint64(2)):
                    for column in range(uint64(4)):
                        at = uint64(32) * block + uint64(8) * column + uint64(4) * turn
                        _out_of_sequence(staged, at, target, to + uint64(16) * turn + uint64(4) * column)


# Zero points may be stored as their products with the scales: -(s z), rounded once to 16 bits. A finite number of 16
# bits becomes one of 32 when its bits move to their places there and it is multiplied by the ratio of the exponents'
# biases.


def _reinterpreted(given: Any, wanted: Any, kind: Any) -> Any:
    """Returns a function that takes the bits of one type for those of another."""

    def typed(_context: Any, _value: Any) -> Any:
        return wanted(given), lambda _c, builder, _s, values: builder.bitcast(values[0], kind)

    return intrinsic(typed)


_float_of_bits = _reinterpreted(uint32, float32, ir.FloatType())
_bits_of_float = _reinterpreted(float32, uint32, ir.IntType(32))


@njit(forceinline=True)
def _magnitude(half: Any) -> Any:
    """Returns the magnitude of a finite fp16 number; infinities and NaN become numbers above all others."""
    return float32(_float_of_bits(uint32(uint32(half & uint32(0x7FFF)) << uint32(13))) * float32(2.0**112))


@njit(forceinline=True)
def _whole(number: Any) -> Any:
    """Returns a number from 0 to 2^31 without its fraction; by way of a signed one, for which there are vectors."""
    return uint32(int32(number))


@njit(forceinline=True)
def _rounded(number: Any) -> Any:
    """Returns the fp16 bits of a number that is not negative; below 2^-14 it must be a multiple of 2^-24."""
    bits = _bits_of_float(number)
    normal = uint32(bits + uint32(0xC8000FFF) + ((bits >> uint32(13)) & uint32(1))) >> uint32(13)
    small = _whole(_smaller(number, float32(1)) * float32(2.0**24))
    finite = normal if number >= float32(2.0**-14) else small
    return uint32(0x7C00) if number >= float32(65520) else uint32(finite)


def zeros_of_products(source: Any, target: Any, scales: Any, words: Any) -> None:
    """Finds the zero points of which products with scales were made: the nearest, and 0 where the scale is.

    Args:
        source: uint16 [8 * words], fp16 products.
        target: uint32 [words], zero points of 4 bits in AWQ's order; written.
        scales: uint16 [8 * words], fp16.
        words: how many.
    """
    for w in range(uint64(words)):
        word = uint32(0)
        for i in range(uint64(8)):
            n = uint64(8) * w + uint64(2) * (i & uint64(3)) + (i >> uint64(2))
            scale = _magnitude(scales[n])
            ratio = _smaller(_magnitude(source[n]) / scale, float32(15))
            zero = _whole(ratio + float32(0.5)) if scale > float32(0) else uint32(0)
            word |= uint32(zero << uint32(uint64(4) * i))
        target[w] = word


def products_of_zeros(source: Any, target: Any, scales: Any, words: Any) -> None:
    """Undoes `zeros_of_products`: zero points in ``source``, products to ``target``, same sizes."""
    for w in range(uint64(words)):
        word = source[w]
        for i in range(uint64(8)):
            n = uint64(8) * w + uint64(2) * (i & uint64(3)) + (i >> uint64(2))
            zero = float32(uint32(word >> uint32(uint64(4) * i)) & uint32(15))
            sign = uint32(~uint32(scales[n])) & uint32(0x8000)
            target[n] = uint16(_rounded(float32(_magnitude(scales[n]) * zero)) | sign)


def transpose_scales(source: Any, target: Any, _scratch: Any, rows: Any, columns: Any, read: Any, written: Any) -> None:
    """Transposes 16-bit elements.

    It goes by blocks of 32 x 32, whose cache lines stay in the first-level cache until they are full.

    Args:
        source: uint16, ``rows`` rows of ``columns`` elements.
        target: uint16, ``columns`` rows of ``rows`` elements; written.
        rows: how many are read.
        columns: how many are written.
        read: from a row of the source to the next.
        written: from a row of the target to the next.
    """
    down, across = uint64(rows), uint64(columns)
    for row in range(uint64(0), down, uint64(32)):
        height = _smaller(down - row, uint64(32))
        for column in range(uint64(0), across, uint64(32)):
            width = _smaller(across - column, uint64(32))
            at, to = row * uint64(read) + column, column * uint64(written) + row
            for j in range(width):
                for i in range(height):
                    target[to + j * uint64(written) + i] = source[at + i * uint64(read) + j]


# Lane l = p + 4 i of a tile owns rows 2 p + {0, 1, 8, 9} of columns i and i + 8 of each block. So the words of
# lanes p, p + 4, ... hold, each in the same field, eight neighbouring columns of one row.


def decode_qweight_4bit(source: Any, target: Any, table: Any, tiles: Any) -> None:
    """Decodes one row of tiles to the weight ``(q - z) * s``, 4 bits.

    Args:
        source: uint32 [128 * tiles], Marlin words.
        target: float64 [16, N], N = 64 * tiles; written.
        table: float64 [2, N], the zero points and the scales of the rows' group, in plain order.
        tiles: how many.
    """
    size_n = uint64(64) * uint64(tiles)
    for tile in range(uint64(tiles)):
        for p in range(uint64(4)):
            for block in range(uint64(4)):
                at = uint64(128) * tile + uint64(4) * p + block
                for value in range(uint64(8)):
                    shift = uint32(uint64(4) * ((value >> uint64(1)) + uint64(4) * (value & uint64(1))))
                    row = uint64(2) * p + (value & uint64(1)) + uint64(8) * ((value >> uint64(1)) & uint64(1))
                    first = uint64(64) * tile + uint64(16) * block + uint64(8) * (value >> uint64(2))
                    for i in range(uint64(8)):
                        q = float64((source[at + uint64(16) * i] >> shift) & uint32(15))
                        n = first + i
                        target[row * size_n + n] = (q - table[n]) * table[size_n + n]


def decode_qweight_8bit(source: Any, target: Any, table: Any, tiles: Any) -> None:
    """Decodes one row of tiles, 8 bits: uint32 [256 * tiles]; as `decode_qweight_4bit`."""
    size_n = uint64(64) * uint64(tiles)
    for tile in range(uint64(tiles)):
        for p in range(uint64(4)):
            for block in range(uint64(4)):
                for value in range(uint64(8)):
                    at = uint64(256) * tile + uint64(8) * p + uint64(2) * block + (value >> uint64(2))
                    low = value & uint64(3)
                    shift = uint32(uint64(8) * ((low >> uint64(1)) + uint64(2) * (low & uint64(1))))
                    row = uint64(2) * p + (value & uint64(1)) + uint64(8) * ((value >> uint64(1)) & uint64(1))
                    first = uint64(64) * tile + uint64(16) * block + uint64(8) * (value >> uint64(2))
                    for i in range(uint64(8)):
                        q = float64((source[at + uint64(32) * i] >> shift) & uint32(255))
                        n = first + i
                        target[row * size_n + n] = (q - table[n]) * table[size_n + n]


def add_product(source: Any, target: Any, table: Any, rows: Any, size_n: Any) -> None:
    """Adds the product of one token and some rows of a weight, row by row.

    Args:
        source: float64 [rows, size_n], the weight's rows.
        target: float64 [size_n]; added to.
        table: float64 [rows], the token's values.
        rows: how many.
        size_n: N.
    """
    width = uint64(size_n)
    for row in range(uint64(rows)):
        value = table[row]
        for n in range(width):
            target[n] += value * source[row * width + n]


#: Kernels, and the types of each one's source and target elements, and of its table or scratch.
KERNELS: dict[str, tuple[Any, tuple[Any, Any, Any]]] = {
    function.__name__: (function, elements)
    for elements, functions in {
        (types.uint32, types.uint32, types.uint32): (
            repack_qweight_4bit,
            unpack_qweight_4bit,
            repack_qweight_8bit,
            unpack_qweight_8bit,
            unpack_column_zeros_4bit,
            pack_column_zeros_4bit,
            unpack_column_zeros_8bit,
            pack_column_zeros_8bit,
        ),
        (types.uint32, types.uint32, types.uint8): (gather_fields_4bit, gather_fields_8bit),
        (types.uint16, types.uint16, types.uint8): (gather_columns,),
        (types.uint64, types.uint32, types.uint64): (turns_to_tiles_4bit,),
        (types.uint32, types.uint64, types.uint64): (tiles_to_turns_4bit,),
        (types.uint16, types.uint32, types.uint16): (zeros_of_products,),
        (types.uint32, types.uint16, types.uint16): (products_of_zeros,),
        (types.uint16, types.uint16, types.uint16): (transpose_scales,),
        (types.uint32, types.float64, types.float64): (decode_qweight_4bit, decode_qweight_8bit),
        (types.float64, types.float64, types.float64): (add_product,),
    }.items()
    for function in functions
}
for _bits, _n_first in itertools.product((4, 8), (True, False)):
    _order = "n_first" if _n_first else "k_first"
    for _verb, _function in zip(("words_to_tiles", "tiles_to_words"), _tile_kernels(_bits, _n_first), strict=True):
        KERNELS[f"{_verb}_{_bits}bit_{_order}"] = _function, (types.uint32, types.uint32, types.uint32)


class CompiledKernel(NamedTuple):
    """A kernel's machine code.

    Attributes:
        symbol: its name there.
        sizes: how many integers it takes after its three pointers.
        code: an object file.
    """

    symbol: str
    sizes: int
    code: bytes


def compile_kernel(name: str) -> CompiledKernel:
    """Compiles a kernel for this processor.

    Args:
        name: which.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    function, elements = KERNELS[name]
    pointers = [types.CPointer(each) for each in elements]  # type: ignore[no-untyped-call]
    sizes = len(inspect.signature(function).parameters) - len(pointers)
    compiled = cfunc(types.void(*pointers, *[types.int64] * sizes), error_model="numpy")(function)
    code = machine.emit_object(binding.parse_assembly(compiled.inspect_llvm()))
    return CompiledKernel(compiled.native_name, sizes, code)
