"""GPTQ's layouts against their sentences: fields in sequence, words of codes along K, zero points 1 less or not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq2marlin.errors import CheckpointError
from awq2marlin.layout.repack import PartLayout, Repack, UnclearBitsError
from awq2marlin.layout.sequential import (
    BorrowingZeroPoints,
    LowerZeroPoints,
    SequentialCodes,
    SequentialZeroPoints,
)
from tests.formats import peers


def in_sequence(values, bits):
    """Packs along the last axis, the first value in the lowest bits; as Python integers, so that nothing can wrap."""
    factor = 32 // bits
    words = [
        sum(int(value) << (bits * i) for i, value in enumerate(row[at : at + factor]))
        for row in values.reshape(-1, values.shape[-1])
        for at in range(0, values.shape[-1], factor)
    ]
    return np.array(words, np.uint64).astype(np.uint32).reshape(*values.shape[:-1], -1)


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def plain(values, bits):
    return raw(peers.awq_words(values, bits))


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_row_of_words_is_as_many_plain_rows_as_a_word_has_fields(bits, rows, groups, seed):
    factor = 32 // bits
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows * factor, groups * factor), dtype=np.uint8)
    layout = SequentialCodes("qweight", bits, *values.shape)
    words = in_sequence(values.T, bits).T
    assert words.shape == (rows, groups * factor)
    found, back = np.empty(layout.size, np.uint8), np.empty(layout.size, np.uint8)
    layout.unpack(raw(words), found)
    assert found.tobytes() == plain(values, bits).tobytes()
    layout.pack(found, back)
    assert back.tobytes() == raw(words).tobytes()


@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_zero_points_are_stored_as_they_are_or_1_less(bits, groups, words, seed):
    values = np.random.default_rng(seed).integers(0, 1 << bits, (groups, words * 32 // bits), dtype=np.uint8)
    stored = in_sequence(values, bits)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    lower = np.maximum(values, 1)  # of each field by itself, 0 has nothing below it
    for kind, zeros, expected in (
        (SequentialZeroPoints, values, stored),
        (BorrowingZeroPoints, values, stored - ones),
        (LowerZeroPoints, lower, in_sequence(lower - 1, bits)),
    ):
        layout = kind("qzeros", bits, *values.shape)
        found, back = np.empty(layout.size, np.uint8), np.empty(layout.size, np.uint8)
        layout.unpack(raw(expected), found)
        assert found.tobytes() == plain(zeros, bits).tobytes(), kind
        layout.pack(found, back)
        assert back.tobytes() == raw(expected).tobytes(), kind


@pytest.mark.parametrize(("bits", "largest"), [(4, 15), (8, 255)])
def test_a_zero_point_that_would_be_too_large_is_refused_in_every_field(bits, largest):
    factor = 32 // bits
    layout = LowerZeroPoints("qzeros", bits, 2, 2 * factor)
    for place in range(4 * factor):
        values = np.full(4 * factor, largest - 1, np.uint8)
        values[place] = largest
        with pytest.raises(UnclearBitsError, match=f"stored as {largest}; .* so that it is {largest + 1}"):
            layout.unpack(raw(in_sequence(values.reshape(2, -1), bits)), np.empty(layout.size, np.uint8))


def test_what_is_not_clear_is_told_with_its_file_and_tensor_and_nothing_else():
    layout = LowerZeroPoints("qzeros", 4, 1, 8)
    repack = Repack(layout, PartLayout("qzeros", 4, 1, 8), "model.safetensors", "m.qzeros")
    with pytest.raises(CheckpointError) as caught:
        repack.rewrite(np.full(4, 255, np.uint8), np.empty(4, np.uint8))
    (problem,) = caught.value.problems
    assert (problem.file, problem.tensor, problem.code) == ("model.safetensors", "m.qzeros", "contradiction")
    assert "could not be undone" not in problem.message


def test_pieces_that_are_not_whole_rows_never_reach_the_kernel():
    layout = SequentialCodes("qweight", 4, 16, 24)
    for size in (96 * 2 - 4, 96 + 48, 4):
        with pytest.raises(ValueError, match="not whole rows"):
            layout.unpack(np.zeros(size, np.uint8), np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="not whole rows"):
        SequentialCodes("qweight", 4, 8, 20).unpack(np.zeros(80, np.uint8), np.zeros(80, np.uint8))
