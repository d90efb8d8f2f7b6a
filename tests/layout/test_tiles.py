"""Words along K straight to tiles, to plain rows, and back: compared with the reference, value by value.

The words are a view of a larger array, with the words of a column one after the other or those of a row, as formats
have them; what lies around them must stay as it is.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from awq2marlin.layout import reference
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import StrayBitsError
from awq2marlin.layout.tiles import rows_to_words, tiles_to_words, words_to_rows, words_to_tiles
from tests.equality import assert_identical

ALL_ONES = np.uint32(0xFFFFFFFF)


def random_codes(bits, size_k, size_n, seed):
    return np.random.default_rng(seed).integers(0, 1 << bits, (size_k, size_n), np.uint8)


def view_of(shape, n_first, around):
    """Words all of ones, to be written, in the middle of others: (the larger array, the view)."""
    before, after = around
    size = before + (shape[0] if n_first else shape[1]) + after
    larger = np.full((shape[1], size) if n_first else (shape[0], size), ALL_ONES)
    cut = larger[:, before : size - after]
    return larger, cut.T if n_first else cut


def sequential(codes, bits, n_first, around=(0, 0)):
    """Words along K of codes [K, N]; fields past the last code are zero."""
    factor = pack_factor(bits)
    _, words = view_of((-(-len(codes) // factor), codes.shape[1]), n_first, around)
    words[:] = 0
    for k, row in enumerate(codes):
        words[k // factor] |= row.astype(np.uint32) << np.uint32(k % factor * bits)
    return words


def padded(codes, multiple_k, multiple_n):
    size_k, size_n = codes.shape
    return np.pad(codes, ((0, -size_k % multiple_k), (0, -size_n % multiple_n)))


def filled(size):
    return np.full(size, 0xA5, np.uint8)


shapes = given(
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(1, 400),
    st.integers(1, 200),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.integers(0, 99),
)


@shapes
@example(4, True, 128, 64, (0, 0), 0)  # exactly a block, on its own
@example(4, True, 128, 64, (16, 16), 1)
@example(8, True, 64, 128, (0, 0), 2)
@example(4, False, 16, 64, (0, 0), 3)
@example(8, False, 48, 192, (3, 5), 4)
@example(4, True, 64, 128, (0, 0), 5)  # rows of tiles that are half a cache line
@example(4, True, 1, 1, (0, 0), 6)
@example(8, False, 17, 65, (1, 0), 7)
@settings(max_examples=120)
def test_tiles_hold_the_codes_and_give_back_the_words(bits, n_first, size_k, size_n, around, seed):
    codes = random_codes(bits, size_k, size_n, seed)
    words = sequential(codes, bits, n_first, around)
    whole = padded(codes, 16, 64)
    tiles = filled(whole.size * bits // 8)
    words_to_tiles(words, bits, tiles)
    found = reference.unpack_marlin_qweight(tiles.view(np.uint32).reshape(len(whole) // 16, -1), bits)
    assert_identical(found, whole, "the tiles' codes")
    larger, back = view_of(words.shape, n_first, around)
    tiles_to_words(tiles, bits, back)
    assert_identical(np.ascontiguousarray(back), np.ascontiguousarray(words), "the words")
    back[:] = ALL_ONES
    assert (larger == ALL_ONES).all(), "words around were written"


@shapes
@example(4, True, 128, 64, (0, 0), 0)
@example(8, False, 16, 64, (0, 0), 1)
@example(4, False, 9, 63, (0, 2), 2)  # as many bytes in a row as 64 columns have
@settings(max_examples=120)
def test_rows_hold_the_codes_and_give_back_the_words(bits, n_first, size_k, size_n, around, seed):
    codes = random_codes(bits, size_k, size_n, seed)
    words = sequential(codes, bits, n_first, around)
    expected = padded(codes, 1, pack_factor(bits))
    plain = filled(expected.size * bits // 8)
    words_to_rows(words, bits, plain, size_k, size_k)
    found = reference.unpack_awq(plain.view(np.uint32).reshape(size_k, -1), bits)
    assert_identical(found, expected, "the rows' codes")
    larger, back = view_of(words.shape, n_first, around)
    rows_to_words(plain, bits, back, size_k)
    assert_identical(np.ascontiguousarray(back), np.ascontiguousarray(words), "the words")
    back[:] = ALL_ONES
    assert (larger == ALL_ONES).all(), "words around were written"


@pytest.mark.parametrize("n_first", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_bit_past_the_last_row_is_refused(bits, n_first):
    factor = pack_factor(bits)
    size_k = 2 * factor + 1
    words = sequential(random_codes(bits, size_k, 70, 0), bits, n_first)
    plain = filled(size_k * -(-70 // factor) * 4)
    for bit in range(bits, 32):
        for column in (0, 63, 69):
            damaged = words.copy(order="K")
            damaged[2, column] |= np.uint32(1 << bit)
            with pytest.raises(StrayBitsError, match=f"past the last of K={size_k} values"):
                words_to_rows(damaged, bits, plain, size_k, size_k)
