"""Tensors with N first: every value by the sentences that describe them, and rewritten in pieces by several threads.

The sentences are those of compressed-tensors' pack-quantized checkpoints: codes int32 [N, ceil(K/f)] packed along K;
zero points int32 [ceil(N/f), G] packed along N, or int8 [N, G] that are z - 2^(b-1); scales [N, G]. Field i of a word,
bits b * i upward, holds element i, and what is past the last element is zero.
"""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq2marlin.errors import CheckpointError
from awq2marlin.io.stream import PIECE_BYTES, NamedPath, rewrite_file
from awq2marlin.layout.repack import MarlinScales, MarlinWeight, MarlinZeroPoints, PartLayout, Repack, StrayBitsError
from awq2marlin.layout.transposed import SignedZeroPoints, TransposedCodes, TransposedScales, TransposedZeroPoints
from tests.equality import assert_identical

AWQ_ORDER = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


def packed(values, bits, order=None):
    """Words uint32 [R, ceil(C/f)] of values [R, C]: field i of a word holds its element ``order[i]``, or i."""
    factor = 32 // bits
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // factor)), np.uint32)
    for word in range(words.shape[1]):
        for field in range(factor):
            element = word * factor + (order[field] if order else field)
            if element < columns:
                words[:, word] |= values[:, element].astype(np.uint32) << np.uint32(bits * field)
    return words


def as_bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Codes:
    """[K, N]"""

    layout, part, marlin = TransposedCodes, "qweight", MarlinWeight

    @staticmethod
    def tensor(values, bits):
        return packed(values.T, bits)


class ZeroPoints:
    """[G, N]"""

    layout, part, marlin = TransposedZeroPoints, "qzeros", MarlinZeroPoints

    @staticmethod
    def tensor(values, bits):
        return packed(values, bits).T


class Signed(ZeroPoints):
    layout = SignedZeroPoints

    @staticmethod
    def tensor(values, bits):
        return (values.T.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


class Scales:
    layout, part, marlin = TransposedScales, "scales", MarlinScales

    @staticmethod
    def tensor(values, _bits):
        return values.T


KINDS = [Codes, ZeroPoints, Signed, Scales]


def random_values(kind, bits, rows, columns, seed=0):
    high, dtype = (1 << 16, np.uint16) if kind is Scales else (1 << bits, np.uint8)
    return np.random.default_rng(seed).integers(0, high, (rows, columns), dtype)


def plain(kind, values, bits):
    """The plain rows: packed in AWQ's order, or scales as they are."""
    return as_bytes(values if kind is Scales else packed(values, bits, AWQ_ORDER[bits]))


def filled(size):
    return np.full(size, 0xA5, np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@given(st.sampled_from([4, 8]), st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=60)
def test_all_values_are_where_the_sentences_say(kind, bits, rows, columns, seed):
    values = random_values(kind, bits, rows, columns, seed)
    layout = kind.layout(kind.part, bits, rows, columns)
    tensor, rows_of_words = as_bytes(kind.tensor(values, bits)), plain(kind, values, bits)
    assert layout.size == tensor.size
    assert layout.rows * layout.row_bytes == rows_of_words.size
    found, back = filled(rows_of_words.size), filled(tensor.size)
    layout.unpack(tensor.copy(), found)
    assert_identical(found, rows_of_words, "plain rows")
    layout.pack(rows_of_words.copy(), back)
    assert_identical(back, tensor, "the tensor")


def test_some_values_by_hand():
    codes = np.zeros((9, 10), np.uint8)  # K = 9, N = 10
    codes[8, 9] = 7  # the second word of the last row, lowest field
    codes[3, 2] = 5  # field 3 of the first word of row 2
    tensor = filled(10 * 2 * 4)
    TransposedCodes("qweight", 4, 9, 10).pack(plain(Codes, codes, 4), tensor)
    words = tensor.view(np.uint32).reshape(10, 2)
    assert (words[9, 1], words[2, 0], np.count_nonzero(words)) == (7, 5 << 12, 2)
    zeros = np.zeros((3, 10), np.uint8)  # G = 3, N = 10
    zeros[1, 9] = 11  # field 1 of the second row of words
    tensor = filled(2 * 3 * 4)
    TransposedZeroPoints("qzeros", 4, 3, 10).pack(plain(ZeroPoints, zeros, 4), tensor)
    words = tensor.view(np.uint32).reshape(2, 3)
    assert (words[1, 1], np.count_nonzero(words)) == (11 << 4, 1)


# --- what the plain rows do not hold ----------------------------------------------------------------------


def stray(kind, bits, rows, columns):
    """The fields of a tensor's words that hold nothing: (index of the word, field)."""
    held = kind.tensor(np.full((rows, columns), (1 << bits) - 1, np.uint8), bits).reshape(-1)
    fields = [(word, field) for word in range(held.size) for field in range(32 // bits)]
    return [(word, field) for word, field in fields if not held[word] >> (bits * field) & 1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "rows", "columns"), [(Codes, 13, 9), (Codes, 3, 130), (ZeroPoints, 3, 13)])
def test_a_field_past_the_last_value_that_is_not_zero_is_refused(kind, bits, rows, columns):
    values = random_values(kind, bits, rows, columns)
    layout = kind.layout(kind.part, bits, rows, columns)
    tensor = np.ascontiguousarray(kind.tensor(values, bits)).reshape(-1)
    fields = stray(kind, bits, rows, columns)
    assert fields
    for word, field in fields:
        for bit in (0, bits - 1):
            damaged = tensor.copy()
            damaged[word] |= np.uint32(1 << (bits * field + bit))
            with pytest.raises(StrayBitsError, match="not zero past the last of"):
                layout.unpack(as_bytes(damaged), filled(layout.rows * layout.row_bytes))


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_a_signed_zero_point_of_more_bits_is_refused(value):
    tensor = np.zeros((10, 3), np.int8)
    tensor[7, 2] = value
    with pytest.raises(StrayBitsError, match="a zero point does not fit into 4 bits"):
        SignedZeroPoints("qzeros", 4, 3, 10).unpack(as_bytes(tensor), filled(3 * 8))


@pytest.mark.parametrize("columns", [80, 40_000])
def test_a_repack_names_file_and_tensor_of_what_it_refuses(columns):
    """Whether the tensor is rewritten in one piece or in runs of rows."""
    source = TransposedCodes("qweight", 4, 60, columns)
    repack = Repack(source, PartLayout("qweight", 4, 60, columns), "model.safetensors", "m.weight_packed")
    tensor = np.zeros(source.size, np.uint8)
    tensor[-1] = 0x80
    with pytest.raises(CheckpointError, match=r"last of K=60 values, so the conversion could not be undone") as caught:
        in_pieces(repack, tensor)
    (problem,) = caught.value.problems
    assert (problem.file, problem.tensor, problem.code) == ("model.safetensors", "m.weight_packed", "contradiction")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_all_of_the_tensor_is_refused(kind):
    layout = kind.layout(kind.part, 4, 16, 64)
    data, rows = np.zeros(layout.size, np.uint8), np.zeros(layout.rows * layout.row_bytes, np.uint8)
    for one, other in ((data[:-4], rows), (data, rows[4:]), (np.zeros(2 * data.size, np.uint8)[::2], rows)):
        with pytest.raises(ValueError, match="are not rows of a tensor of 16 rows of 64 columns"):
            layout.unpack(one, other)
        with pytest.raises(ValueError, match="are not rows of a tensor of 16 rows of 64 columns"):
            layout.pack(other, one)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_that_a_wider_layout_has_besides_are_zero_and_not_written(bits):
    """On the way back from a padded tensor."""
    values = np.full((16, 128), (1 << bits) - 1, np.uint8)
    values[:, 109:] = 0
    for kind in (Codes, ZeroPoints, Signed):
        layout = kind.layout(kind.part, bits, 16, 109)
        found, repack = filled(layout.size), Repack(PartLayout(kind.part, bits, 16, 128), layout, "file", "name")
        repack.rewrite(plain(kind, values, bits), found)
        assert_identical(found, as_bytes(kind.tensor(values[:, :109], bits)), f"{kind.part} of {bits} bits")
        stray = values.copy()
        stray[3, 120] = 1
        with pytest.raises(CheckpointError, match="file: name: its padding is not zero"):
            repack.rewrite(plain(kind, stray, bits), found)


# --- in pieces --------------------------------------------------------------------------------------------


def in_pieces(repack, data, read_at=0, write_at=0):
    """Rewrites a tensor as a pass over a file does, but one piece after the other."""
    made, buffer = filled(repack.target.size), filled(0)
    for piece in repack.pieces(read_at, write_at):
        read, write = piece.read[0] - read_at, piece.write[0] - write_at
        found = data[read : read + piece.read[1]].copy()
        part = filled(piece.write[1])
        if piece.step is None:
            piece.rewrite(found, part)
        else:
            buffer = buffer if buffer.size == piece.step.size else filled(piece.step.size)
            if piece.rewrite:
                piece.rewrite(*((found, buffer) if piece.read[1] else (buffer, part)))
            elif piece.read[1]:
                buffer[piece.step.at : piece.step.at + found.size] = found
            else:
                part[:] = buffer[piece.step.at : piece.step.at + part.size]
        made[write : write + piece.write[1]] = part
    return made


def counterparts(kind, bits, rows, columns, padded_rows, padded_columns, single=False):
    """How the tensor becomes plain rows, and how it becomes Marlin's, perhaps padded."""
    source = kind.layout(kind.part, bits, rows, columns)
    extra = {"single_group": single} if kind is Scales else {}
    marlin = kind.marlin(kind.part, bits, padded_rows, padded_columns, **extra)
    return [Repack(source, PartLayout(kind.part, bits, rows, columns)), Repack(source, marlin)]


def expected_of(repack, kind, values, bits):
    """The bytes of the target: of the same numbers in plain rows, padded, by the way that plain rows take."""
    padded = np.zeros((repack.target.rows, repack.target.columns), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    rows = PartLayout(kind.part, bits, *padded.shape)
    made = filled(repack.target.size)
    Repack(rows, repack.target).rewrite(plain(kind, padded, bits), made)
    return made


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("awq2marlin.layout.repack.PIECE_BYTES", 1 << 12)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "padded_rows", "padded_columns"),
    [
        (128, 640, 128, 640),
        (208, 1472, 208, 1472),
        (100, 700, 128, 768),  # rows and columns that fill no word: padded
        (125, 1337, 160, 1408),
        (1, 3000, 16, 3008),
        (1001, 9, 1008, 64),
        (3, 5, 16, 64),
    ],
)
def test_pieces_make_what_plain_rows_make_and_give_it_back(kind, bits, rows, columns, padded_rows, padded_columns):
    values = random_values(kind, bits, rows, columns)
    tensor = as_bytes(kind.tensor(values, bits))
    for repack in counterparts(kind, bits, rows, columns, padded_rows, padded_columns):
        made = in_pieces(repack, tensor, 1000, 5000)
        what = f"{type(repack.target).__name__} of {values.shape}"
        assert_identical(made, expected_of(repack, kind, values, bits), what)
        assert_identical(in_pieces(repack.inverse, made, 3, 1), tensor, f"{what} and back")


@pytest.mark.usefixtures("small_pieces")
def test_scales_of_one_group_keep_their_order():
    values = random_values(Scales, 4, 1, 4096)
    repack = counterparts(Scales, 4, 1, 4096, 1, 4096, single=True)[1]
    assert len([*repack.pieces(0, 0)]) > 2
    made = in_pieces(repack, as_bytes(values.T))
    assert_identical(made, expected_of(repack, Scales, values, 4))


@pytest.mark.usefixtures("small_pieces")
def test_a_tensor_with_n_first_on_both_sides_is_one_piece():
    values = random_values(ZeroPoints, 4, 30, 1000)
    signed, words = (layout("qzeros", 4, 30, 1000) for layout in (SignedZeroPoints, TransposedZeroPoints))
    (piece,) = Repack(signed, words).pieces(0, 0)
    made = filled(words.size)
    piece.rewrite(as_bytes(Signed.tensor(values, 4)), made)
    assert_identical(made, as_bytes(ZeroPoints.tensor(values, 4)))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_file_of_several_tensors_is_rewritten_in_order_by_any_number_of_threads(
    tmp_path, monkeypatch, workers, inverse
):
    monkeypatch.setattr("awq2marlin.layout.repack.PIECE_BYTES", 1 << 19)
    repacks, old, new = [], b"", b""
    for kind, bits, rows, columns in (
        (Codes, 4, 1024, 4160),
        (Scales, 4, 8, 4160),
        (Codes, 8, 500, 3000),
        (ZeroPoints, 4, 8, 4160),
        (Codes, 4, 4096, 1024),
        (Scales, 4, 1000, 1024),
    ):
        values = random_values(kind, bits, rows, columns)
        padded = -(-rows // 16) * 16, -(-columns // 64) * 64
        repack = counterparts(kind, bits, rows, columns, *padded)[1]
        repacks.append(repack.inverse if inverse else repack)
        old += as_bytes(kind.tensor(values, bits)).tobytes()
        new += expected_of(repack, kind, values, bits).tobytes()
    read, write = (new, old) if inverse else (old, new)
    source, target, digests = tmp_path / "source", tmp_path / "target", (hashlib.sha256(), hashlib.sha256())
    source.write_bytes(read)

    def pieces():
        read_at = write_at = 0
        for repack in repacks:
            yield from repack.pieces(read_at, write_at)
            read_at, write_at = read_at + repack.source.size, write_at + repack.target.size

    hashes = {"source_hashes": digests[:1], "target_hashes": digests[1:]}
    rewrite_file(NamedPath(source, "source"), target, pieces(), workers=workers, **hashes)
    assert target.read_bytes() == write
    assert [each.digest() for each in digests] == [hashlib.sha256(data).digest() for data in (read, write)]


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192), (53248, 16384), (4096, 128256)]
)
def test_beside_one_buffer_of_the_tensor_pieces_are_small(rows, columns):
    for kind, count in ((Codes, rows), (Scales, rows // 32), (ZeroPoints, rows // 32)):
        for repack in counterparts(kind, 4, count, columns, count, columns):
            for each in (repack, repack.inverse):
                sizes = [(piece.read[1], piece.write[1], piece.step and piece.step.size) for piece in each.pieces(0, 0)]
                assert max(max(read, written) for read, written, _ in sizes) <= 2 * PIECE_BYTES
                assert {buffer for _, _, buffer in sizes} <= {None, each.target.size}


@pytest.mark.parametrize("kind", KINDS)
def test_a_repack_can_be_pickled(kind):
    for repack in counterparts(kind, 4, 64, 128, 64, 128):
        assert pickle.loads(pickle.dumps(repack)) == repack
