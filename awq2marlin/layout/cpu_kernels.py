"""The CPU repack: AWQ words to Marlin words and back, and to plain weights, compiled by Numba, on flat arrays.

The map is stated in docs/marlin-native.md and pictured in kernels/README.md. What makes it fast: for 4
bits the eight values that a lane and block own are the nibbles of eight source words, and a Marlin word
is one column of that 8x8 nibble matrix, so the repack is a transpose in three rounds of mask, shift and
swap (Hacker's Delight, 2nd ed., section 7-3, "Transposing a bit matrix", on nibbles). For 8 bits it is a
4x4 byte matrix and two rounds. Sixteen matrices (4 row pairs x 4 blocks) go side by side through the
rounds, which the compiler turns into vector instructions. Tensors that have N first become AWQ words, and are made of
them, by the same transpose.

This module is Numba's side: it is imported only where `machine_code` finds nothing compiled yet. The kernels
take plain pointers and allocate nothing, so that their machine code stands alone; the names of their
arguments are the same throughout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import cfunc, float64, njit, types, uint16, uint32, uint64
from numba.extending import intrinsic

float32: Any = types.float32


@njit(forceinline=True)
def _exchange(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Swaps the fields of ``low`` above ``shift`` with those of ``high`` below it, where ``mask`` is set."""
    change = ((low >> shift) ^ high) & mask
    return low ^ (change << shift), high ^ change


@njit(forceinline=True)
def _exchange_narrow(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Does what `_exchange` does in 32 bits, where Numba would take 64.

    Which is faster depends on what is around it. Measured on an AMD EPYC (Zen 4) in November 2026: columns turn to rows
    at 3.3 GB/s instead of 2.4 with this one, but tiles of 4 bits to rows at 5.2 instead of 5.7.
    """
    change = uint32((uint32(low >> shift) ^ high) & mask)
    return uint32(low ^ uint32(change << shift)), uint32(high ^ change)


def _nibble_transpose(exchange: Any) -> Any:
    @njit(forceinline=True)
    def transpose(w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> Any:
        """Transposes the 8x8 nibble matrix whose row i is ``wi``; its own inverse."""
        mask, shift = uint32(0x0F0F0F0F), uint32(4)
        w0, w1 = exchange(w0, w1, shift, mask)
        w2, w3 = exchange(w2, w3, shift, mask)
        w4, w5 = exchange(w4, w5, shift, mask)
        w6, w7 = exchange(w6, w7, shift, mask)
        mask, shift = uint32(0x00FF00FF), uint32(8)
        w0, w2 = exchange(w0, w2, shift, mask)
        w1, w3 = exchange(w1, w3, shift, mask)
        w4, w6 = exchange(w4, w6, shift, mask)
        w5, w7 = exchange(w5, w7, shift, mask)
        mask, shift = uint32(0x0000FFFF), uint32(16)
        w0, w4 = exchange(w0, w4, shift, mask)
        w1, w5 = exchange(w1, w5, shift, mask)
        w2, w6 = exchange(w2, w6, shift, mask)
        w3, w7 = exchange(w3, w7, shift, mask)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return transpose


def _byte_transpose(exchange: Any) -> Any:
    @njit(forceinline=True)
    def transpose(w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
        """Transposes the 4x4 byte matrix whose row i is ``wi``; its own inverse."""
        mask, shift = uint32(0x00FF00FF), uint32(8)
        w0, w1 = exchange(w0, w1, shift, mask)
        w2, w3 = exchange(w2, w3, shift, mask)
        mask, shift = uint32(0x0000FFFF), uint32(16)
        w0, w2 = exchange(w0, w2, shift, mask)
        w1, w3 = exchange(w1, w3, shift, mask)
        return w0, w1, w2, w3

    return transpose


_transpose_nibbles, _transpose_bytes = _nibble_transpose(_exchange), _byte_transpose(_exchange)
_transpose_nibbles_narrow = _nibble_transpose(_exchange_narrow)
_transpose_bytes_narrow = _byte_transpose(_exchange_narrow)


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


def gather_fields_4bit(source: Any, target: Any, fields: Any, blocks: Any, _unused: Any) -> None:
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


def gather_fields_8bit(source: Any, target: Any, fields: Any, blocks: Any, _unused: Any) -> None:
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


# A tensor that lies the other way round has a row for each column n, its codes packed along k in sequence. Eight words
# of eight such rows are an 8x8 nibble matrix (8 bits: four words of four rows, 4x4 bytes). Its transpose, with the rows
# taken in AWQ's order, is eight words of eight plain rows; on the way back it is the rows written that are in this
# order. Blocks of 16x16 matrices read and write whole cache lines: matrices of the same source rows go side by side
# through the rounds, and the words of a block change places on their way out of ``staged``.
#
# An order of rows is a pair of steps, within half of the rows and to the other half: AWQ's 0 2 4 6 1 3 5 7 is (2, 1).
_AWQ_ORDER = (2, 1)
_SEQUENCE_4BIT = (1, 4)
_SEQUENCE_8BIT = (1, 2)


@njit(forceinline=True)
def _turn_matrices_4bit(
    source: Any, target: Any, staged: Any, at: Any, to: Any, read: Any, written: Any, size: Any, rows: Any, turned: Any
) -> None:
    """Turns a block of matrices.

    Args:
        source: uint32, rows of ``read`` words.
        target: uint32, rows of ``written`` words; written.
        staged: uint32 [2048], scratch.
        at: the source's first word of the block.
        to: the target's.
        read: words in a row of the source.
        written: words in a row of the target.
        size: matrices below one another in the source, and side by side; each at most 16.
        rows: order in which a matrix takes the source's rows.
        turned: order in which it gives the target's.
    """
    height, width = size
    near, far = uint64(rows[0]) * read, uint64(rows[1]) * read
    to_near, to_far = uint64(16 * turned[0]), uint64(16 * turned[1])
    for x in range(height):
        for j in range(width):
            low, s = at + uint64(8) * x * read + j, uint64(128) * x + j
            high, t = low + far, s + to_far
            (
                staged[s], staged[s + to_near], staged[s + uint64(2) * to_near], staged[s + uint64(3) * to_near],
                staged[t], staged[t + to_near], staged[t + uint64(2) * to_near], staged[t + uint64(3) * to_near],
            ) = _transpose_nibbles_narrow(
                source[low], source[low + near], source[low + uint64(2) * near], source[low + uint64(3) * near],
                source[high], source[high + near], source[high + uint64(2) * near], source[high + uint64(3) * near],
            )  # fmt: skip
    for j in range(width):
        for row in range(uint64(8)):
            for x in range(height):
                target[to + (uint64(8) * j + row) * written + x] = staged[uint64(128) * x + uint64(16) * row + j]


@njit(forceinline=True)
def _turn_matrices_8bit(
    source: Any, target: Any, staged: Any, at: Any, to: Any, read: Any, written: Any, size: Any, rows: Any, turned: Any
) -> None:
    """Turns a block of matrices of bytes; as `_turn_matrices_4bit`, with uint32 [1024] of scratch."""
    height, width = size
    near, far = uint64(rows[0]) * read, uint64(rows[1]) * read
    to_near, to_far = uint64(16 * turned[0]), uint64(16 * turned[1])
    for x in range(height):
        for j in range(width):
            low, s = at + uint64(4) * x * read + j, uint64(64) * x + j
            staged[s], staged[s + to_near], staged[s + to_far], staged[s + to_far + to_near] = _transpose_bytes_narrow(
                source[low], source[low + near], source[low + far], source[low + far + near]
            )
    for j in range(width):
        for row in range(uint64(4)):
            for x in range(height):
                target[to + (uint64(4) * j + row) * written + x] = staged[uint64(64) * x + uint64(16) * row + j]


@njit(forceinline=True)
def _turn_4bit(
    source: Any, target: Any, staged: Any, row: Any, column: Any, down: Any, across: Any, rows: Any, turned: Any
) -> None:
    """Turns the block of 16x16 matrices at (row, column) of [down, across], or what is left of one at an edge."""
    at, to = uint64(8) * row * across + column, uint64(8) * column * down + row
    height, width = min(down - row, uint64(16)), min(across - column, uint64(16))
    if height == width == uint64(16):  # then the compiler knows the size
        size = (uint64(16), uint64(16))
        _turn_matrices_4bit(source, target, staged, at, to, across, down, size, rows, turned)
    else:
        _turn_matrices_4bit(source, target, staged, at, to, across, down, (height, width), rows, turned)


@njit(forceinline=True)
def _turn_8bit(
    source: Any, target: Any, staged: Any, row: Any, column: Any, down: Any, across: Any, rows: Any, turned: Any
) -> None:
    """As `_turn_4bit`."""
    at, to = uint64(4) * row * across + column, uint64(4) * column * down + row
    height, width = min(down - row, uint64(16)), min(across - column, uint64(16))
    if height == width == uint64(16):
        size = (uint64(16), uint64(16))
        _turn_matrices_8bit(source, target, staged, at, to, across, down, size, rows, turned)
    else:
        _turn_matrices_8bit(source, target, staged, at, to, across, down, (height, width), rows, turned)


def unpack_columns_4bit(source: Any, target: Any, staged: Any, groups: Any, words: Any) -> None:
    """Turns columns, one a row, into plain rows, 4 bits.

    Args:
        source: uint32 [8 * groups, words]; row n holds the codes of column n in sequence.
        target: uint32 [8 * words, groups], rows of AWQ words; written.
        staged: uint32 [2048], scratch.
        groups: columns / 8.
        words: rows / 8.
    """
    down, across = uint64(groups), uint64(words)
    for column in range(uint64(0), across, uint64(16)):
        for row in range(uint64(0), down, uint64(16)):
            _turn_4bit(source, target, staged, row, column, down, across, _AWQ_ORDER, _SEQUENCE_4BIT)


def pack_columns_4bit(source: Any, target: Any, staged: Any, groups: Any, words: Any) -> None:
    """Undoes `unpack_columns_4bit`: plain rows in ``source``, columns to ``target``, same sizes."""
    down, across = uint64(words), uint64(groups)
    for row in range(uint64(0), down, uint64(16)):
        for column in range(uint64(0), across, uint64(16)):
            _turn_4bit(source, target, staged, row, column, down, across, _SEQUENCE_4BIT, _AWQ_ORDER)


def unpack_columns_8bit(source: Any, target: Any, staged: Any, groups: Any, words: Any) -> None:
    """Turns columns into plain rows, 8 bits: four to a word, scratch uint32 [1024]; as `unpack_columns_4bit`."""
    down, across = uint64(groups), uint64(words)
    for column in range(uint64(0), across, uint64(16)):
        for row in range(uint64(0), down, uint64(16)):
            _turn_8bit(source, target, staged, row, column, down, across, _AWQ_ORDER, _SEQUENCE_8BIT)


def pack_columns_8bit(source: Any, target: Any, staged: Any, groups: Any, words: Any) -> None:
    """Undoes `unpack_columns_8bit`."""
    down, across = uint64(words), uint64(groups)
    for row in range(uint64(0), down, uint64(16)):
        for column in range(uint64(0), across, uint64(16)):
            _turn_8bit(source, target, staged, row, column, down, across, _SEQUENCE_8BIT, _AWQ_ORDER)


# GPTQ's rows are those of K, and a word holds a column's next codes. Eight neighbouring words of a row are an 8x8
# nibble matrix (8 bits: four words, 4x4 bytes): taken in AWQ's order, its transpose is a word of each of eight plain
# rows. Sixteen matrices go side by side.


@njit(forceinline=True)
def _unpack_sequences_4bit(source: Any, target: Any, staged: Any, at: Any, to: Any, words: Any, width: Any) -> None:
    """Turns ``width`` neighbouring matrices, at most 16.

    Args:
        source: uint32, words along K.
        target: uint32, rows of ``words`` words; written.
        staged: uint32 [128], scratch.
        at: the source's first word.
        to: the target's.
        words: words in a plain row.
        width: how many.
    """
    for x in range(width):
        for i in range(uint64(8)):
            staged[uint64(16) * i + x] = source[at + uint64(8) * x + i]
    for x in range(width):
        (
            target[to + x], target[to + words + x],
            target[to + uint64(2) * words + x], target[to + uint64(3) * words + x],
            target[to + uint64(4) * words + x], target[to + uint64(5) * words + x],
            target[to + uint64(6) * words + x], target[to + uint64(7) * words + x],
        ) = _transpose_nibbles_narrow(
            staged[x], staged[32 + x], staged[64 + x], staged[96 + x],
            staged[16 + x], staged[48 + x], staged[80 + x], staged[112 + x],
        )  # fmt: skip


@njit(forceinline=True)
def _pack_sequences_4bit(source: Any, target: Any, staged: Any, at: Any, to: Any, words: Any, width: Any) -> None:
    """Undoes `_unpack_sequences_4bit`: plain rows in ``source``."""
    for x in range(width):
        (
            staged[x], staged[32 + x], staged[64 + x], staged[96 + x],
            staged[16 + x], staged[48 + x], staged[80 + x], staged[112 + x],
        ) = _transpose_nibbles_narrow(
            source[at + x], source[at + words + x],
            source[at + uint64(2) * words + x], source[at + uint64(3) * words + x],
            source[at + uint64(4) * words + x], source[at + uint64(5) * words + x],
            source[at + uint64(6) * words + x], source[at + uint64(7) * words + x],
        )  # fmt: skip
    for x in range(width):
        for i in range(uint64(8)):
            target[to + uint64(8) * x + i] = staged[uint64(16) * i + x]


@njit(forceinline=True)
def _unpack_sequences_8bit(source: Any, target: Any, staged: Any, at: Any, to: Any, words: Any, width: Any) -> None:
    """As `_unpack_sequences_4bit`, with four words to a matrix and uint32 [64] of scratch."""
    for x in range(width):
        for i in range(uint64(4)):
            staged[uint64(16) * i + x] = source[at + uint64(4) * x + i]
    for x in range(width):
        (
            target[to + x], target[to + words + x],
            target[to + uint64(2) * words + x], target[to + uint64(3) * words + x],
        ) = _transpose_bytes_narrow(staged[x], staged[32 + x], staged[16 + x], staged[48 + x])  # fmt: skip


@njit(forceinline=True)
def _pack_sequences_8bit(source: Any, target: Any, staged: Any, at: Any, to: Any, words: Any, width: Any) -> None:
    """Undoes `_unpack_sequences_8bit`."""
    for x in range(width):
        staged[x], staged[32 + x], staged[16 + x], staged[48 + x] = _transpose_bytes_narrow(
            source[at + x],
            source[at + words + x],
            source[at + uint64(2) * words + x],
            source[at + uint64(3) * words + x],
        )
    for x in range(width):
        for i in range(uint64(4)):
            target[to + uint64(4) * x + i] = staged[uint64(16) * i + x]


def unpack_sequences_4bit(source: Any, target: Any, staged: Any, rows: Any, words: Any) -> None:
    """Turns words along K into plain rows, 4 bits.

    Args:
        source: uint32 [rows, 8 * words]; field i of word n of row r is row 8 r + i of column n.
        target: uint32 [8 * rows, words], rows of AWQ words; written.
        staged: uint32 [128], scratch.
        rows: plain rows / 8.
        words: columns / 8.
    """
    width = uint64(words)
    for row in range(uint64(rows)):
        at = uint64(8) * row * width  # of source and target alike
        for x in range(uint64(0), width, uint64(16)):
            if width - x >= uint64(16):  # then the compiler knows the size
                _unpack_sequences_4bit(source, target, staged, at + uint64(8) * x, at + x, width, uint64(16))
            else:
                _unpack_sequences_4bit(source, target, staged, at + uint64(8) * x, at + x, width, width - x)


def pack_sequences_4bit(source: Any, target: Any, staged: Any, rows: Any, words: Any) -> None:
    """Undoes `unpack_sequences_4bit`: plain rows in ``source``, same sizes."""
    width = uint64(words)
    for row in range(uint64(rows)):
        at = uint64(8) * row * width
        for x in range(uint64(0), width, uint64(16)):
            if width - x >= uint64(16):
                _pack_sequences_4bit(source, target, staged, at + x, at + uint64(8) * x, width, uint64(16))
            else:
                _pack_sequences_4bit(source, target, staged, at + x, at + uint64(8) * x, width, width - x)


def unpack_sequences_8bit(source: Any, target: Any, staged: Any, rows: Any, words: Any) -> None:
    """Turns words along K into plain rows, 8 bits: four to a word; as `unpack_sequences_4bit`."""
    width = uint64(words)
    for row in range(uint64(rows)):
        at = uint64(4) * row * width
        for x in range(uint64(0), width, uint64(16)):
            if width - x >= uint64(16):
                _unpack_sequences_8bit(source, target, staged, at + uint64(4) * x, at + x, width, uint64(16))
            else:
                _unpack_sequences_8bit(source, target, staged, at + uint64(4) * x, at + x, width, width - x)


def pack_sequences_8bit(source: Any, target: Any, staged: Any, rows: Any, words: Any) -> None:
    """Undoes `unpack_sequences_8bit`."""
    width = uint64(words)
    for row in range(uint64(rows)):
        at = uint64(4) * row * width
        for x in range(uint64(0), width, uint64(16)):
            if width - x >= uint64(16):
                _pack_sequences_8bit(source, target, staged, at + x, at + uint64(4) * x, width, uint64(16))
            else:
                _pack_sequences_8bit(source, target, staged, at + x, at + uint64(4) * x, width, width - x)


# Zero points of a tensor that lies the other way round are packed along n in sequence, a row for each word of columns.
# So a word stays a word; its fields and its place change. AWQ's order is the even fields, then the odd ones: two rounds
# of swaps.


@njit(forceinline=True)
def _swap(word: Any, shift: Any, mask: Any) -> Any:
    """Swaps the fields of a word where ``mask`` is set with those ``shift`` bits above."""
    change = uint32((uint32(word >> shift) ^ word) & mask)
    return uint32(word ^ change ^ uint32(change << shift))


def unpack_column_zeros_4bit(source: Any, target: Any, _unused: Any, words: Any, groups: Any) -> None:
    """Turns words of columns' zero points, one row of words a word of columns, into plain rows, 4 bits.

    Args:
        source: uint32 [words, groups]; field i of row w holds column 8 w + i.
        target: uint32 [groups, words], rows of AWQ words; written.
        words: columns / 8.
        groups: how many zero points a column has.
    """
    for group in range(uint64(groups)):
        for w in range(uint64(words)):
            word = _swap(source[w * uint64(groups) + group], uint32(4), uint32(0x00F000F0))
            target[group * uint64(words) + w] = _swap(word, uint32(8), uint32(0x0000FF00))


def pack_column_zeros_4bit(source: Any, target: Any, _unused: Any, words: Any, groups: Any) -> None:
    """Undoes `unpack_column_zeros_4bit`: plain rows in ``source``, same sizes."""
    for w in range(uint64(words)):
        for group in range(uint64(groups)):
            word = _swap(source[group * uint64(words) + w], uint32(8), uint32(0x0000FF00))
            target[w * uint64(groups) + group] = _swap(word, uint32(4), uint32(0x00F000F0))


def unpack_column_zeros_8bit(source: Any, target: Any, _unused: Any, words: Any, groups: Any) -> None:
    """As `unpack_column_zeros_4bit`, with four columns to a word."""
    for group in range(uint64(groups)):
        for w in range(uint64(words)):
            word = source[w * uint64(groups) + group]
            target[group * uint64(words) + w] = _swap(word, uint32(8), uint32(0x0000FF00))


def pack_column_zeros_8bit(source: Any, target: Any, _unused: Any, words: Any, groups: Any) -> None:
    """Undoes `unpack_column_zeros_8bit`."""
    for w in range(uint64(words)):
        for group in range(uint64(groups)):
            word = source[group * uint64(words) + w]
            target[w * uint64(groups) + group] = _swap(word, uint32(8), uint32(0x0000FF00))


# Codes may lie in a tensor of 16-bit words that holds four columns a row, 64 codes of each in turn. A run of 32 codes
# of a column is four words. Code k = 8 a + 2 b + c (a, b below 4, c below 2) is field 4 c + a of word b: so nibbles
# change places in every word, and then the words' bytes are turned over as a 4x4 matrix. Two words go in one of 64
# bits.


@njit(forceinline=True)
def _swap_wide(word: Any, shift: Any, mask: Any) -> Any:
    """As `_swap`, in 64 bits."""
    change = ((word >> shift) ^ word) & mask
    return word ^ change ^ (change << shift)


@njit(forceinline=True)
def _in_sequence(low: Any, high: Any) -> Any:
    """Puts a run of 32 codes in sequence; ``low`` holds its first two words."""
    shift, mask = uint64(8), uint64(0x0000FF000000FF00)
    low, high = _swap_wide(low, shift, mask), _swap_wide(high, shift, mask)
    shift, mask = uint64(4), uint64(0x00F000F000F000F0)
    low, high = _swap_wide(low, shift, mask), _swap_wide(high, shift, mask)
    return _turn_bytes(low, high)


@njit(forceinline=True)
def _out_of_sequence(low: Any, high: Any) -> Any:
    """Undoes `_in_sequence`."""
    low, high = _turn_bytes(low, high)
    shift, mask = uint64(4), uint64(0x00F000F000F000F0)
    low, high = _swap_wide(low, shift, mask), _swap_wide(high, shift, mask)
    shift, mask = uint64(8), uint64(0x0000FF000000FF00)
    return _swap_wide(low, shift, mask), _swap_wide(high, shift, mask)


@njit(forceinline=True)
def _turn_bytes(low: Any, high: Any) -> Any:
    """Transposes the 4x4 matrix of bytes that four words are; its own inverse."""
    shift, mask = uint64(24), uint64(0x00000000FF00FF00)
    low, high = _swap_wide(low, shift, mask), _swap_wide(high, shift, mask)
    change = ((low >> uint64(16)) ^ high) & uint64(0x0000FFFF0000FFFF)
    return low ^ (change << uint64(16)), high ^ change


def split_columns_4bit(source: Any, target: Any, staged: Any, blocks: Any, words: Any) -> None:
    """Takes interleaved columns apart, four to a block, 4 bits.

    Args:
        source: uint64 [blocks, words * 4], blocks of interleaved columns.
        target: uint64 [4 * blocks, words], columns whose codes are in sequence; written.
        staged: uint64 [words * 4], scratch.
        blocks: columns / 4.
        words: rows / 16, a multiple of 4.
    """
    across = uint64(words)
    for block in range(uint64(blocks)):
        at = uint64(4) * block * across
        for x in range(uint64(2) * across):
            run = uint64(2) * x
            staged[run], staged[run + uint64(1)] = _in_sequence(source[at + run], source[at + run + uint64(1)])
        for column in range(uint64(4)):
            to = at + column * across
            for tile in range(across >> uint64(2)):
                for i in range(uint64(4)):
                    target[to + uint64(4) * tile + i] = staged[uint64(16) * tile + uint64(4) * column + i]


def join_columns_4bit(source: Any, target: Any, staged: Any, blocks: Any, words: Any) -> None:
    """Undoes `split_columns_4bit`: columns in ``source``, blocks of four to ``target``, same sizes."""
    across = uint64(words)
    for block in range(uint64(blocks)):
        at = uint64(4) * block * across
        for column in range(uint64(4)):
            begin = at + column * across
            for tile in range(across >> uint64(2)):
                for i in range(uint64(4)):
                    staged[uint64(16) * tile + uint64(4) * column + i] = source[begin + uint64(4) * tile + i]
        for x in range(uint64(2) * across):
            run = uint64(2) * x
            target[at + run], target[at + run + uint64(1)] = _out_of_sequence(staged[run], staged[run + uint64(1)])


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
def _rounded(number: Any) -> Any:
    """Returns the fp16 bits of a number that is not negative; below 2^-14 it must be a multiple of 2^-24."""
    bits = _bits_of_float(number)
    normal = uint32(bits + uint32(0xC8000FFF) + ((bits >> uint32(13)) & uint32(1))) >> uint32(13)
    small = uint32(min(number, float32(1)) * float32(2.0**24))
    finite = normal if number >= float32(2.0**-14) else small
    return uint32(0x7C00) if number >= float32(65520) else uint32(finite)


def zeros_of_products(source: Any, target: Any, scales: Any, words: Any, _unused: Any) -> None:
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
            ratio = min(_magnitude(source[n]) / scale, float32(15)) if scale > float32(0) else float32(0)
            word |= uint32(uint32(ratio + float32(0.5)) << uint32(uint64(4) * i))
        target[w] = word


def products_of_zeros(source: Any, target: Any, scales: Any, words: Any, _unused: Any) -> None:
    """Undoes `zeros_of_products`: zero points in ``source``, products to ``target``, same sizes."""
    for w in range(uint64(words)):
        word = source[w]
        for i in range(uint64(8)):
            n = uint64(8) * w + uint64(2) * (i & uint64(3)) + (i >> uint64(2))
            zero = float32(uint32(word >> uint32(uint64(4) * i)) & uint32(15))
            sign = uint32(~uint32(scales[n])) & uint32(0x8000)
            target[n] = uint16(_rounded(float32(_magnitude(scales[n]) * zero)) | sign)


def transpose_scales(source: Any, target: Any, _unused: Any, rows: Any, columns: Any) -> None:
    """Transposes 16-bit elements: uint16 [rows, columns] to uint16 [columns, rows].

    It goes by blocks of 32 x 32, whose cache lines stay in the first-level cache until they are full.
    """
    down, across = uint64(rows), uint64(columns)
    for row in range(uint64(0), down, uint64(32)):
        for column in range(uint64(0), across, uint64(32)):
            for j in range(column, min(column + uint64(32), across)):
                for i in range(row, min(row + uint64(32), down)):
                    target[j * down + i] = source[i * across + j]


# Lane l = p + 4 i of a tile owns rows 2 p + {0, 1, 8, 9} of columns i and i + 8 of each block. So the words of
# lanes p, p + 4, ... hold, each in the same field, eight neighbouring columns of one row.


def decode_qweight_4bit(source: Any, target: Any, table: Any, tiles: Any, _unused: Any) -> None:
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


def decode_qweight_8bit(source: Any, target: Any, table: Any, tiles: Any, _unused: Any) -> None:
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


#: Types of each kernel's source and target elements, and of its table or scratch.
_KERNELS: dict[Any, tuple[Any, Any, Any]] = {
    repack_qweight_4bit: (types.uint32, types.uint32, types.uint32),
    unpack_qweight_4bit: (types.uint32, types.uint32, types.uint32),
    repack_qweight_8bit: (types.uint32, types.uint32, types.uint32),
    unpack_qweight_8bit: (types.uint32, types.uint32, types.uint32),
    gather_fields_4bit: (types.uint32, types.uint32, types.uint8),
    gather_fields_8bit: (types.uint32, types.uint32, types.uint8),
    gather_columns: (types.uint16, types.uint16, types.uint8),
    unpack_columns_4bit: (types.uint32, types.uint32, types.uint32),
    pack_columns_4bit: (types.uint32, types.uint32, types.uint32),
    unpack_columns_8bit: (types.uint32, types.uint32, types.uint32),
    pack_columns_8bit: (types.uint32, types.uint32, types.uint32),
    unpack_sequences_4bit: (types.uint32, types.uint32, types.uint32),
    pack_sequences_4bit: (types.uint32, types.uint32, types.uint32),
    unpack_sequences_8bit: (types.uint32, types.uint32, types.uint32),
    pack_sequences_8bit: (types.uint32, types.uint32, types.uint32),
    unpack_column_zeros_4bit: (types.uint32, types.uint32, types.uint32),
    pack_column_zeros_4bit: (types.uint32, types.uint32, types.uint32),
    unpack_column_zeros_8bit: (types.uint32, types.uint32, types.uint32),
    pack_column_zeros_8bit: (types.uint32, types.uint32, types.uint32),
    split_columns_4bit: (types.uint64, types.uint64, types.uint64),
    join_columns_4bit: (types.uint64, types.uint64, types.uint64),
    zeros_of_products: (types.uint16, types.uint32, types.uint16),
    products_of_zeros: (types.uint32, types.uint16, types.uint16),
    transpose_scales: (types.uint16, types.uint16, types.uint16),
    decode_qweight_4bit: (types.uint32, types.float64, types.float64),
    decode_qweight_8bit: (types.uint32, types.float64, types.float64),
    add_product: (types.float64, types.float64, types.float64),
}


def compile_kernels() -> tuple[dict[str, str], bytes]:
    """Compiles every kernel for this processor.

    Returns:
        The symbol of each kernel, by the function's name, and one object file that holds them all.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    names, module = {}, binding.parse_assembly("")
    for function, elements in _KERNELS.items():
        pointers = [types.CPointer(each) for each in elements]  # type: ignore[no-untyped-call]
        compiled = cfunc(types.void(*pointers, types.int64, types.int64), error_model="numpy")(function)
        names[function.__name__] = compiled.native_name
        module.link_in(binding.parse_assembly(compiled.inspect_llvm()))
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    return names, machine.emit_object(module)
