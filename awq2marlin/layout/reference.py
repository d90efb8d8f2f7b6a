"""The slow, obvious oracle: both layouts unpacked to plain values with NumPy, straight from their definition.

Verification and the tests use it; the converter does not, and it shares no code and no table with the
converter's repack. Each table is built by the loops of the specification's sentences (docs/marlin-native.md).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

TILE_ROWS, TILE_COLUMNS = 16, 64


def field_order(num_bits: int) -> list[int]:
    """Returns which of a word's values its fields hold, lowest first: evens then odds, in the 8-bit case of four."""
    return [0, 2, 4, 6, 1, 3, 5, 7] if num_bits == 4 else [0, 2, 1, 3]


def split_fields(words: Words, num_bits: int) -> Values:
    """Returns the fields of packed words, lowest bits first.

    Args:
        words: uint32 [..., W].
        num_bits: 4 or 8.

    Returns:
        uint8 [..., W * 32 / num_bits].
    """
    octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if num_bits == 8:
        return octets
    nibbles = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=nibbles[..., 0])
    np.right_shift(octets, 4, out=nibbles[..., 1])
    return nibbles.reshape(*octets.shape[:-1], -1)


def unpack_awq(words: Words, num_bits: int) -> Values:
    """Returns the values of AWQ words: field i of a word holds column ``order[i]`` of the word's columns.

    Args:
        words: uint32 [R, N / f], rows of ``qweight`` or ``qzeros``.
        num_bits: 4 or 8.

    Returns:
        uint8 [R, N].
    """
    order = field_order(num_bits)
    fields = split_fields(words, num_bits).reshape(len(words), -1, len(order))
    values = np.empty_like(fields)
    for field, column in enumerate(order):
        values[..., column] = fields[..., field]
    return values.reshape(len(words), -1)


@cache
def tile_table(num_bits: int) -> npt.NDArray[np.intp]:
    """Returns, for each row and column of a 16x64 tile, the field of the tile's words that holds it.

    Returns:
        int [1024]: entry 64 r + c is a field number, counted from the tile's first word's lowest bits.
    """
    order = field_order(num_bits)
    where = np.empty((TILE_ROWS, TILE_COLUMNS), np.intp)
    field_of_tile = 0
    for lane in range(32):
        for block in range(4):
            first_row, first_column = 2 * (lane % 4), 16 * block + lane // 4
            owned = [(first_row + row, column) for column in (first_column, first_column + 8) for row in (0, 1, 8, 9)]
            for begin in range(0, len(owned), len(order)):
                for value in order:
                    where[owned[begin + value]] = field_of_tile
                    field_of_tile += 1
    return where.reshape(-1)


def unpack_marlin_qweight(words: Words, num_bits: int) -> Values:
    """Returns the values of a Marlin ``qweight``.

    Args:
        words: uint32 [T, N * 16 / f], rows of tiles.
        num_bits: 4 or 8.

    Returns:
        uint8 [16 T, N].
    """
    tile_rows = len(words)
    tiles = split_fields(words, num_bits).reshape(-1, TILE_ROWS * TILE_COLUMNS)
    plain = np.take(tiles, tile_table(num_bits), axis=1).reshape(tile_rows, -1, TILE_ROWS, TILE_COLUMNS)
    return plain.transpose(0, 2, 1, 3).reshape(tile_rows * TILE_ROWS, -1)


def scale_columns(single_group: bool) -> list[int]:
    """Returns, for each position in a block of permuted columns, the source column it takes."""
    if single_group:
        return [2 * i + offset for i in range(4) for offset in (0, 1, 8, 9, 16, 17, 24, 25)]
    return [i + 8 * m for i in range(8) for m in range(8)]


def unpermute_columns(values: npt.NDArray[np.generic], single_group: bool) -> npt.NDArray[np.generic]:
    """Returns rows of permuted scales (or unpacked zero points) in plain column order.

    Args:
        values: [G, N], any type.
        single_group: whether they stand in the 32-wide order of a single group.
    """
    columns = scale_columns(single_group)
    blocks = values.reshape(len(values), -1, len(columns))
    plain = np.empty_like(blocks)
    for position, column in enumerate(columns):
        plain[..., column] = blocks[..., position]
    return plain.reshape(values.shape)


def unpack_marlin_qzeros(words: Words, num_bits: int) -> Values:
    """Returns the values of a Marlin ``qzeros``: packed as AWQ packs, columns permuted in blocks of 64.

    Args:
        words: uint32 [G, N / f].
        num_bits: 4 or 8.

    Returns:
        uint8 [G, N].
    """
    plain: Values = unpermute_columns(unpack_awq(words, num_bits), single_group=False).astype(np.uint8, copy=False)
    return plain
