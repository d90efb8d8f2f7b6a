"""The layout's bytes: three implementations that share no table, golden layers, and the rules worked by hand.

torch is `awq2marlin.layout`, Numba is `awq2marlin.repack.Repack`, NumPy is `awq2marlin.reference`. The
reference only unpacks, as verification needs; `Reference` below packs with the reference's own tables.
"""

import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.formats.registry import AWQ_GEMM, MARLIN_NATIVE
from awq2marlin.layout import reference
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.marlin import padded_shapes
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.layout.repack import MarlinScales, MarlinWeight, MarlinZeroPoints, PartLayout, Repack
from awq2marlin.layout.scheme import Scheme
from tests.equality import assert_identical
from tests.shapes import SMALL_SHAPES, UNALIGNED_SHAPES
from tests.skips import NO_GPU

# --- the three implementations behind one interface -------------------------------------------------------


class Layer(NamedTuple):
    """One quantized layer: q [K, N], z [G, N], s [G, N] as uint16 bit patterns."""

    size_k: int
    size_n: int
    group_size: int
    bits: int
    q: np.ndarray
    z: np.ndarray
    s: np.ndarray

    @property
    def single(self):
        """One group spans all of K."""
        return self.group_size == -1 or self.group_size >= self.size_k

    def awq(self):
        """The AWQ tensors: qweight, qzeros, scales."""
        return pack_awq(self.q, self.bits), pack_awq(self.z, self.bits), self.s


def pack_awq(values, bits):
    """AWQ words of plain values, by the specification's first sentence, with nothing of the package."""
    order = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    words = np.zeros((values.shape[0], values.shape[1] // len(order)), np.uint32)
    for field, column in enumerate(order):
        words |= values[:, column :: len(order)].astype(np.uint32) << np.uint32(bits * field)
    return words.view(np.int32)


def pack_ascending(fields, bits):
    """Words [..., W] of fields [..., W * f], lowest bits first."""
    grouped = fields.reshape(*fields.shape[:-1], -1, 32 // bits).astype(np.uint32)
    words = np.zeros(grouped.shape[:-1], np.uint32)
    for field in range(32 // bits):
        words |= grouped[..., field] << np.uint32(bits * field)
    return words.view(np.int32)


def random_layer(size_k, size_n, group_size, bits, seed=0):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-size_k // group_size)
    q = rng.integers(0, 1 << bits, (size_k, size_n), np.uint8)
    z = rng.integers(0, 1 << bits, (groups, size_n), np.uint8)
    s = rng.integers(0, 1 << 16, (groups, size_n), np.uint16)
    return Layer(size_k, size_n, group_size, bits, q, z, s)


def as_torch(array):
    """A tensor of the same bits; 16-bit patterns as int16, which every torch has."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy((array.view(np.int16) if array.dtype == np.uint16 else array).copy())


def as_numpy(tensor):
    array = tensor.numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array


class Torch:
    """`awq2marlin.layout`."""

    @staticmethod
    def forward(qweight, qzeros, scales, layer):
        k, n, g, b = layer[:4]
        return (
            as_numpy(layout.awq_marlin_repack(as_torch(qweight), k, n, b)),
            as_numpy(layout.awq_to_marlin_zero_points(as_torch(qzeros), len(qzeros), n, b)),
            as_numpy(layout.marlin_permute_scales(as_torch(scales), k, n, g)),
        )

    @staticmethod
    def backward(qweight, qzeros, scales, layer):
        k, n, g, b = layer[:4]
        return (
            as_numpy(layout.marlin_awq_repack(as_torch(qweight), k, n, b)),
            as_numpy(layout.marlin_to_awq_zero_points(as_torch(qzeros), len(qzeros), n, b)),
            as_numpy(layout.marlin_unpermute_scales(as_torch(scales), k, n, g)),
        )


class Numba:
    """`awq2marlin.repack`, on bytes."""

    @staticmethod
    def repacks(layer):
        k, n, _, b = layer[:4]
        groups = len(layer.z)
        return (
            Repack(PartLayout("qweight", b, k, n), MarlinWeight("qweight", b, k, n)),
            Repack(PartLayout("qzeros", b, groups, n), MarlinZeroPoints("qzeros", b, groups, n)),
            Repack(PartLayout("scales", b, groups, n), MarlinScales("scales", b, groups, n, layer.single)),
        )

    @classmethod
    def forward(cls, qweight, qzeros, scales, layer):
        k, n, _, b = layer[:4]
        shapes = ((k // 16, n * 16 * b // 32), qzeros.shape, scales.shape)
        found = []
        for repack, source, shape in zip(cls.repacks(layer), (qweight, qzeros, scales), shapes, strict=True):
            target = np.full(source.nbytes, 0xA5, np.uint8)
            repack.rewrite(as_bytes(source), target)
            found.append(target.view(source.dtype).reshape(shape))
        return tuple(found)

    @classmethod
    def backward(cls, qweight, qzeros, scales, layer):
        k, n, _, b = layer[:4]
        shapes = ((k, n * b // 32), qzeros.shape, scales.shape)
        found = []
        for repack, target, shape in zip(cls.repacks(layer), (qweight, qzeros, scales), shapes, strict=True):
            source = np.full(target.nbytes, 0xA5, np.uint8)
            repack.inverse.rewrite(as_bytes(target), source)
            found.append(source.view(target.dtype).reshape(shape))
        return tuple(found)


class Reference:
    """`awq2marlin.reference`: its unpacking, and packing by its tables."""

    @staticmethod
    def forward(qweight, qzeros, scales, layer):
        b = layer.bits
        q = reference.unpack_awq(qweight.view(np.uint32), b)
        tiles = q.reshape(layer.size_k // 16, 16, -1, 64).transpose(0, 2, 1, 3)  # [K/16, N/64, 16, 64]
        fields = np.zeros((*tiles.shape[:2], 1024), np.uint8)
        fields[..., reference.tile_table(b)] = tiles.reshape(fields.shape)
        return (
            pack_ascending(fields.reshape(layer.size_k // 16, -1), b),
            pack_awq(permuted(reference.unpack_awq(qzeros.view(np.uint32), b), single=False), b),
            permuted(scales, layer.single),
        )

    @staticmethod
    def backward(qweight, qzeros, scales, layer):
        b = layer.bits
        return (
            pack_awq(reference.unpack_marlin_qweight(qweight.view(np.uint32), b), b),
            pack_awq(reference.unpack_marlin_qzeros(qzeros.view(np.uint32), b), b),
            reference.unpermute_columns(scales, layer.single),
        )


def permuted(values, single):
    """Columns in Marlin's order, by the reference's table."""
    columns = reference.scale_columns(single)
    return values.reshape(len(values), -1, len(columns))[..., columns].reshape(values.shape)


def as_bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()


IMPLEMENTATIONS = (Torch, Numba, Reference)
PARTS = ("qweight", "qzeros", "scales")


def assert_layer(found, expected, what):
    for part, one, other in zip(PARTS, found, expected, strict=True):
        assert_identical(one, other, f"{what}, {part}")


# --- golden layers: what vLLM's own functions gave --------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden" / "marlin_layout.npz"
with np.load(GOLDEN) as _arrays:
    GOLDEN_CASES = sorted({name.split("/")[0] for name in _arrays.files})


class Golden(NamedTuple):
    """A golden case: the layer, its AWQ tensors and its Marlin tensors. Without zero points z is all 0."""

    layer: Layer
    awq: tuple
    marlin: tuple


def golden_case(golden, case):
    bits, k, n, g = (int(number) for number in re.match(r"b(\d+)_k(\d+)_n(\d+)_g(-?\d+)", case).groups())
    arrays = {name.split("/")[1]: array for name, array in golden.items() if name.startswith(f"{case}/")}
    for side in ("awq", "marlin"):
        arrays[f"{side}_scales"] = arrays[f"{side}_scales"].view(np.uint16)
    if "z" not in arrays:
        groups = len(arrays["awq_scales"])
        arrays["z"] = np.zeros((groups, n), np.uint8)
        arrays["awq_qzeros"] = arrays["marlin_qzeros"] = np.zeros((groups, n * bits // 32), np.int32)
    layer = Layer(k, n, g, bits, arrays["q"], arrays["z"], arrays["awq_scales"])
    awq, marlin = (tuple(arrays[f"{side}_{part}"] for part in PARTS) for side in ("awq", "marlin"))
    return Golden(layer, awq, marlin)


def test_golden_cases_cover_bits_groups_single_group_no_zero_points_and_bf16():
    assert len(GOLDEN_CASES) == 11
    assert {case.split("_")[0] for case in GOLDEN_CASES} == {"b4", "b8"}
    assert {case.split("_")[3] for case in GOLDEN_CASES} == {"g-1", "g32", "g64", "g128"}
    assert {case.split("_")[-1] for case in GOLDEN_CASES} >= {"nozp", "bf16"}


def test_golden_copy_is_the_original(golden, shared_dir):
    with np.load(shared_dir / "golden" / "marlin_layout.npz") as original:
        assert sorted(golden) == sorted(original.files)
        for name in original.files:
            assert_identical(golden[name], original[name], name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_layer_forward(golden, case, implementation):
    layer, awq, marlin = golden_case(golden, case)
    assert_layer(implementation.forward(*awq, layer), marlin, f"{case} by {implementation.__name__}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_layer_backward(golden, case, implementation):
    layer, awq, marlin = golden_case(golden, case)
    assert_layer(implementation.backward(*marlin, layer), awq, f"{case} by {implementation.__name__}")


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_plain_values_come_out_of_both_layouts(golden, case):
    layer, awq, marlin = golden_case(golden, case)
    for name, words, unpack in (
        ("AWQ q", awq[0], reference.unpack_awq),
        ("Marlin q", marlin[0], reference.unpack_marlin_qweight),
    ):
        assert_identical(unpack(words.view(np.uint32), layer.bits), layer.q, f"{case}, {name}")
    for name, words, unpack in (
        ("AWQ z", awq[1], reference.unpack_awq),
        ("Marlin z", marlin[1], reference.unpack_marlin_qzeros),
    ):
        assert_identical(unpack(words.view(np.uint32), layer.bits), layer.z, f"{case}, {name}")


@pytest.mark.parametrize("case", [case for case in GOLDEN_CASES if not case.endswith("_nozp")])
def test_golden_unpacked_zero_points(golden, case):
    layer, _, marlin = golden_case(golden, case)
    groups = len(layer.z)
    z = torch.from_numpy(layer.z)
    assert_identical(layout.marlin_zero_points(z, groups, layer.size_n, layer.bits).numpy(), marlin[1], case)
    back = layout.marlin_unpack_zero_points(as_torch(marlin[1]), groups, layer.size_n, layer.bits)
    assert_identical(back.numpy(), layer.z.astype(np.int32), case)


# --- by hand: one value set, all else zero ----------------------------------------------------------------
#
# A 16x64 tile: lane l and 16-column block j own rows r, r+1, r+8, r+9 (r = 2 (l mod 4)) first of column
# c = 16 j + l div 4, then of column c + 8; words go lane by lane, block by block within a lane.
# 4 bits, one word: fields 0..7 hold values 0 2 4 6 1 3 5 7. 8 bits, two words: fields 0..3 hold 0 2 1 3.


@pytest.mark.parametrize(
    ("bits", "row", "column", "source", "target"),
    [
        # (row, column): the AWQ word [row, word] and its lowest bit; the Marlin word and its lowest bit.
        # Lane 0, block 0, value 0, field 0: the same place in both.
        (4, 0, 0, (0, 0, 0), (0, 0, 0)),
        # Column 1 is lane 4's (1 = l div 4), its word 4 * 4 + 0 = 16; in AWQ column 1 is field 4.
        (4, 0, 1, (0, 0, 16), (0, 16, 0)),
        # Row 1 is value 1 of lane 0, in field 4.
        (4, 1, 0, (1, 0, 0), (0, 0, 16)),
        # Row 8 is value 2 of lane 0, in field 1.
        (4, 8, 0, (8, 0, 0), (0, 0, 4)),
        # Column 8 is value 4 of lane 0, in field 2; in AWQ it begins word 1.
        (4, 0, 8, (0, 1, 0), (0, 0, 8)),
        # Column 16 begins block 1: word 1.
        (4, 0, 16, (0, 2, 0), (0, 1, 0)),
        # Row 9, column 27 = 16 + 8 + 3: lane 4 * 3 + 0 = 12, block 1, word 49; value 4 + 3 = 7, field 7.
        # In AWQ: word 3, column 3 of it, field 5.
        (4, 9, 27, (9, 3, 20), (0, 49, 28)),
        # Row 6, column 63 = 48 + 8 + 7: lane 4 * 7 + 3 = 31, block 3, word 127; value 4, field 2.
        (4, 6, 63, (6, 7, 28), (0, 127, 8)),
        # Row 17 is row 1 of the second row of tiles, column 64 begins its second tile: word 128.
        (4, 17, 64, (17, 8, 0), (1, 128, 16)),
        # 8 bits: column 1 is lane 4's: word 4 * 8 = 32; in AWQ column 1 is field 2.
        (8, 0, 1, (0, 0, 16), (0, 32, 0)),
        # Row 1 is value 1, field 2. Row 8 is value 2, field 1.
        (8, 1, 0, (1, 0, 0), (0, 0, 16)),
        (8, 8, 0, (8, 0, 0), (0, 0, 8)),
        # Column 8 is value 4, the first of the lane's second word.
        (8, 0, 8, (0, 2, 0), (0, 1, 0)),
        # Row 9, column 27: lane 12, block 1, second word: 8 * 12 + 2 + 1 = 99; value 3 of it, field 3.
        # In AWQ: word 6, column 3 of it, field 3.
        (8, 9, 27, (9, 6, 24), (0, 99, 24)),
        # The second tile of the second row of tiles: 16 * 64 / 4 = 256 words a tile.
        (8, 16, 64, (16, 16, 0), (1, 256, 0)),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_weight_lands_in_the_word_and_field_worked_out_by_hand(implementation, bits, row, column, source, target):
    value = {4: 0xB, 8: 0xC5}[bits]
    layer = Layer(
        32, 128, -1, bits, *(np.zeros((rows, 128), kind) for rows, kind in ((32, "u1"), (1, "u1"), (1, "u2")))
    )
    qweight = np.zeros((32, 128 * bits // 32), np.uint32)
    qweight[source[:2]] = value << source[2]
    expected = np.zeros((2, 128 * 16 * bits // 32), np.uint32)
    expected[target[:2]] = value << target[2]
    _, qzeros, scales = layer.awq()

    found = implementation.forward(qweight.view(np.int32), qzeros, scales, layer)[0]

    assert_identical(found.view(np.uint32), expected, f"value at row {row}, column {column}")
    assert reference.unpack_awq(qweight, bits)[row, column] == value, "the AWQ word of this example is wrong"


@pytest.mark.parametrize(
    ("group_size", "column", "position"),
    [
        # Groups: position 8 i + m takes source column i + 8 m, so column 17 = 1 + 8 * 2 goes to 8 + 2.
        (32, 0, 0),
        (32, 1, 8),
        (32, 8, 1),
        (32, 17, 10),
        (32, 63, 63),
        (32, 64 + 17, 64 + 10),
        # One group: positions 8 i.. take 2 i + {0, 1, 8, 9, 16, 17, 24, 25}; 18 = 2 * 1 + 16 is the fifth.
        (-1, 0, 0),
        (-1, 1, 1),
        (-1, 8, 2),
        (-1, 2, 8),
        (-1, 18, 12),
        (-1, 31, 31),
        (-1, 32 + 18, 32 + 12),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_scale_lands_at_the_position_worked_out_by_hand(implementation, group_size, column, position):
    layer = random_layer(64, 128, group_size, 4)
    qweight, qzeros, scales = layer.awq()
    scales = np.zeros_like(scales)
    scales[0, column] = 0x3C01
    expected = np.zeros_like(scales)
    expected[0, position] = 0x3C01

    assert_identical(implementation.forward(qweight, qzeros, scales, layer)[2], expected, f"scale of column {column}")


@pytest.mark.parametrize(
    ("bits", "column", "source", "target"),
    [
        # Column 17 goes to position 10 (blocks of 64), word 1, number 2 of it, which is in field 1.
        # In AWQ: word 2, number 1 of it, which is in field 4.
        (4, 17, (2, 16), (1, 4)),
        (4, 0, (0, 0), (0, 0)),
        # Column 1 goes to position 8: word 1, field 0. Column 8 to position 1: word 0, field 4.
        (4, 1, (0, 16), (1, 0)),
        (4, 8, (1, 0), (0, 16)),
        # 8 bits: position 10 is word 2, number 2 of it, in field 1. In AWQ: word 4, number 1, field 2.
        (8, 17, (4, 16), (2, 8)),
        (8, 63, (15, 24), (15, 24)),
    ],
)
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_zero_point_lands_by_hand_in_blocks_of_64_even_with_one_group(
    implementation, group_size, bits, column, source, target
):
    value = {4: 0xD, 8: 0xE7}[bits]
    layer = random_layer(32, 64, group_size, bits)
    qweight, qzeros, scales = layer.awq()
    qzeros = np.zeros_like(qzeros).view(np.uint32)
    qzeros[0, source[0]] = value << source[1]
    expected = np.zeros_like(qzeros)
    expected[0, target[0]] = value << target[1]

    found = implementation.forward(qweight, qzeros.view(np.int32), scales, layer)[1]

    assert_identical(found.view(np.uint32), expected, f"zero point of column {column}")


def place_of_weight(row, column, bits):
    """(target row, word in it, lowest bit) of a weight: the specification's sentence, solved for the weight."""
    order = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    r, c = row % 16, column % 64
    lane = 4 * (c % 8) + (r % 8) // 2
    value = r % 2 + 2 * (r // 8) + 4 * (c % 16 // 8)
    words_of_lane = bits  # four blocks, of one word for 4 bits and two for 8
    word = 32 * words_of_lane * (column // 64) + words_of_lane * lane + (bits // 4) * (c // 16) + value // len(order)
    return row // 16, word, bits * order.index(value % len(order))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_lands_where_the_sentence_solved_for_it_says(bits):
    layer = random_layer(32, 128, -1, bits)
    expected = np.zeros((2, 128 * 16 * bits // 32), np.uint32)
    for (row, column), value in np.ndenumerate(layer.q):
        at_row, word, bit = place_of_weight(row, column, bits)
        expected[at_row, word] |= np.uint32(int(value) << bit)
    for implementation in IMPLEMENTATIONS:
        found = implementation.forward(*layer.awq(), layer)[0]
        assert_identical(found.view(np.uint32), expected, implementation.__name__)


# --- properties on random layers --------------------------------------------------------------------------


@st.composite
def layers(draw, max_tiles=4):
    """Layers of any shape that the layout is exact for, aligned or not."""
    bits, group_size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([-1, 32, 64, 128]))
    size_k = (16 if group_size == -1 else group_size) * draw(st.integers(1, max_tiles))
    size_n = 64 * draw(st.integers(1, max_tiles))
    return random_layer(size_k, size_n, group_size, bits, draw(st.integers(0, 2**32 - 1)))


@given(layers())
def test_three_implementations_agree_and_undo_themselves_on_random_layers(layer):
    awq = layer.awq()
    expected = Reference.forward(*awq, layer)
    for implementation in IMPLEMENTATIONS:
        name = implementation.__name__
        assert_layer(implementation.forward(*awq, layer), expected, f"{name} forward")
        assert_layer(implementation.backward(*expected, layer), awq, f"{name} backward")


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_three_implementations_agree_on_listed_shapes(shape):
    layer = random_layer(*shape[:4], seed=1)
    expected = Reference.forward(*layer.awq(), layer)
    for implementation in IMPLEMENTATIONS:
        assert_layer(
            implementation.forward(*layer.awq(), layer), expected, f"{implementation.__name__}, {shape.reason}"
        )


@given(layers())
def test_weights_survive_as_values(layer):
    qweight, qzeros, scales = Numba.forward(*layer.awq(), layer)
    assert_identical(reference.unpack_marlin_qweight(qweight.view(np.uint32), layer.bits), layer.q, "q")
    assert_identical(reference.unpack_marlin_qzeros(qzeros.view(np.uint32), layer.bits), layer.z, "z")
    assert_identical(reference.unpermute_columns(scales, layer.single), layer.s, "s")


@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pack_cols_and_unpack_cols_are_inverse_in_plain_ascending_fields(bits, rows, words, seed):
    factor = 32 // bits
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, words * factor), np.uint8)
    packed = layout.pack_cols(torch.from_numpy(values), bits, *values.shape)
    assert_identical(packed.numpy(), pack_ascending(values, bits), "packed")
    unpacked = layout.unpack_cols(packed, bits, *values.shape)
    assert_identical(unpacked.numpy(), values.astype(np.int32), "unpacked")


def test_pack_cols_by_hand():
    assert layout.pack_cols(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4, 1, 8).tolist() == [[0x87654321 - 2**32]]
    assert layout.pack_cols(torch.tensor([[0x11, 0x22, 0x33, 0x44]]), 8, 1, 4).tolist() == [[0x44332211]]
    assert layout.unpack_cols(torch.tensor([[-1]], dtype=torch.int32), 4, 1, 8).tolist() == [[15] * 8]
    assert layout.unpack_cols(torch.tensor([[-1]], dtype=torch.int32), 8, 1, 4).tolist() == [[255] * 4]


def test_scale_perms_are_the_two_orders_of_the_specification():
    grouped, single = layout.get_scale_perms()
    assert grouped[:10] == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert single[:9] == [0, 1, 8, 9, 16, 17, 24, 25, 2]
    assert sorted(grouped) == list(range(64))
    assert sorted(single) == list(range(32))
    assert grouped == reference.scale_columns(single_group=False)
    assert single == reference.scale_columns(single_group=True)


def test_scale_perms_given_out_cannot_spoil_the_next_call():
    layout.get_scale_perms()[0].reverse()
    assert layout.get_scale_perms()[0][:3] == [0, 8, 16]


# --- slicing ----------------------------------------------------------------------------------------------


@st.composite
def cuts(draw, size, multiple):
    """(begin, end) at multiples, not empty."""
    begin = draw(st.integers(0, size // multiple - 1))
    return begin * multiple, multiple * draw(st.integers(begin + 1, size // multiple))


@st.composite
def grouped_cuts(draw):
    """A layer with groups, and a cut of its rows and columns that leaves at least two groups."""
    bits, group_size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([32, 64, 128]))
    layer = random_layer(
        group_size * draw(st.integers(2, 5)), 64 * draw(st.integers(1, 4)), group_size, bits, draw(st.integers(0, 99))
    )
    rows = draw(cuts(layer.size_k, group_size).filter(lambda cut: cut[1] - cut[0] > group_size))
    return layer, rows, draw(cuts(layer.size_n, 64))


def cut_layer(layer, rows, columns):
    """The plain values of a cut, and their group size."""
    g = layer.size_k if layer.group_size == -1 else layer.group_size
    groups = slice(rows[0] // g, -(-rows[1] // g))
    values = layer.q[slice(*rows)], layer.z[groups], layer.s[groups]
    q, z, s = (np.ascontiguousarray(value[:, slice(*columns)]) for value in values)
    return Layer(rows[1] - rows[0], columns[1] - columns[0], layer.group_size, layer.bits, q, z, s)


def cut_target(marlin, layer, rows, columns):
    """The same cut of the Marlin tensors."""
    factor, g = 32 // layer.bits, layer.size_k if layer.group_size == -1 else layer.group_size
    qweight, qzeros, scales = marlin
    groups = slice(rows[0] // g, -(-rows[1] // g))
    return (
        qweight[rows[0] // 16 : rows[1] // 16, columns[0] * 16 // factor : columns[1] * 16 // factor],
        qzeros[groups, columns[0] // factor : columns[1] // factor],
        scales[groups, slice(*columns)],
    )


@given(grouped_cuts())
def test_a_slice_of_the_target_is_the_target_of_the_slice(drawn):
    layer, rows, columns = drawn
    found = cut_target(Numba.forward(*layer.awq(), layer), layer, rows, columns)
    part = cut_layer(layer, rows, columns)
    assert_layer(found, Numba.forward(*part.awq(), part), f"rows {rows}, columns {columns}")


@given(layers(), st.data())
def test_columns_can_be_cut_at_multiples_of_64_whatever_the_groups(layer, data):
    columns = data.draw(cuts(layer.size_n, 64))
    found = cut_target(Numba.forward(*layer.awq(), layer), layer, (0, layer.size_k), columns)
    part = cut_layer(layer, (0, layer.size_k), columns)
    assert_layer(found, Torch.forward(*part.awq(), part), f"columns {columns}")


@given(layers(max_tiles=3), layers(max_tiles=3))
def test_fusing_two_layers_side_by_side_is_a_plain_copy(one, other):
    # As q, k, v are fused: same K, bits and group size, columns side by side.
    other = random_layer(one.size_k, other.size_n, one.group_size, one.bits, seed=other.size_k)
    whole = Layer(
        one.size_k,
        one.size_n + other.size_n,
        one.group_size,
        one.bits,
        *(np.concatenate(pair, axis=1) for pair in zip(one[4:], other[4:], strict=True)),
    )
    halves = (Numba.forward(*layer.awq(), layer) for layer in (one, other))
    fused = tuple(np.concatenate(pair, axis=1) for pair in zip(*halves, strict=True))
    assert_layer(fused, Numba.forward(*whole.awq(), whole), "fused")


@given(st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(2, 4), st.integers(0, 3))
def test_a_row_cut_down_to_one_group_needs_its_scales_permuted_again(bits, group_size, groups, which):
    """The specification's first exception: kernels want the 32-wide order, the file holds the 64-wide one."""
    layer = random_layer(group_size * groups, 128, group_size, bits)
    rows = (group_size * (which % groups), group_size * (which % groups + 1))
    qweight, qzeros, scales = cut_target(Numba.forward(*layer.awq(), layer), layer, rows, (0, 128))
    part = cut_layer(layer, rows, (0, 128))
    expected = Numba.forward(*part.awq(), part)

    assert_identical(qweight, expected[0], "qweight")
    assert_identical(qzeros, expected[1], "qzeros")
    assert (scales != expected[2]).any(), "the file's order would do: the exception is gone"
    plain = reference.unpermute_columns(scales, single_group=False)
    again = layout.marlin_permute_scales(as_torch(plain), group_size, 128, group_size)
    assert_identical(as_numpy(again), expected[2], "scales permuted again")


@given(st.sampled_from([4, 8]), st.integers(2, 8), st.data())
def test_with_one_group_a_row_cut_cuts_only_qweight(bits, tile_rows, data):
    """The specification's second exception: scales and qzeros stay whole, in the order they have."""
    layer = random_layer(16 * tile_rows, 128, -1, bits)
    rows = data.draw(cuts(layer.size_k, 16))
    qweight, qzeros, scales = Numba.forward(*layer.awq(), layer)
    part = Layer(rows[1] - rows[0], 128, -1, bits, layer.q[slice(*rows)], layer.z, layer.s)
    found = (qweight[rows[0] // 16 : rows[1] // 16], qzeros, scales)
    assert_layer(found, Numba.forward(*part.awq(), part), f"rows {rows}")


# --- padding, and piece by piece --------------------------------------------------------------------------


def padded_layer(layer, padded_k, padded_n):
    """The same layer with zeros around: more rows, more columns, more groups."""
    padded = random_layer(padded_k, padded_n, layer.group_size, layer.bits)
    values = []
    for values_of, like in zip(layer[4:], padded[4:], strict=True):
        zeros = np.zeros_like(like)
        zeros[: values_of.shape[0], : values_of.shape[1]] = values_of
        values.append(zeros)
    return Layer(padded_k, padded_n, layer.group_size, layer.bits, *values)


def planned_repacks(layer, padded_k, padded_n):
    """How a conversion repacks the layer's tensors, from its plan."""
    module = ModulePlan("m", layer.size_k, layer.size_n, padded_k, padded_n, PARTS, converted=True)
    scheme = Scheme(layer.bits, layer.group_size, True)
    counterparts = Counterparts(AWQ_GEMM, MARLIN_NATIVE, scheme, {"m": module})
    return [counterparts.repack(module, part) for part in PARTS]


def source_range(repack, first, last):
    """The bytes of the source that make bands ``first`` to ``last`` of the target."""
    return tuple(min(band * repack.target.band, repack.source.rows) * repack.source.row_bytes for band in (first, last))


def check_padding(layer):
    padded_k, padded_n = padded_shapes([(layer.size_k, layer.size_n)], layer.group_size)[0]
    padded = padded_layer(layer, padded_k, padded_n)
    expected = Torch.forward(*padded.awq(), padded)
    for repack, source, target in zip(planned_repacks(layer, padded_k, padded_n), layer.awq(), expected, strict=True):
        found = np.full(target.nbytes, 0xA5, np.uint8)
        before = as_bytes(source)
        repack.rewrite(before, found)
        assert_identical(found, as_bytes(target), f"{repack.source.part} of K={layer.size_k}, N={layer.size_n}")
        assert_identical(before, as_bytes(source), f"{repack.source.part}: the source was changed")
        back = np.full(source.nbytes, 0xA5, np.uint8)
        repack.inverse.rewrite(found, back)
        assert_identical(back, as_bytes(source), f"{repack.source.part} of K={layer.size_k}, N={layer.size_n} and back")
        assert_identical(found, as_bytes(target), f"{repack.source.part}: the target was changed on the way back")


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([-1, 32, 64, 128]),
    st.integers(1, 300),
    st.integers(1, 24),
    st.integers(0, 99),
)
@example(4, 64, 64, 8, 0)  # one group of K, but two of the padded K: the grouped order
@example(8, -1, 7, 1, 0)  # fewer rows than a tile
def test_padding_is_the_layout_of_the_zero_padded_layer(bits, group_size, size_k, octets, seed):
    check_padding(random_layer(size_k, 8 * octets, group_size, bits, seed))


@pytest.mark.parametrize("shape", [shape for shape in UNALIGNED_SHAPES if shape.size_k < 2048], ids=str)
def test_padding_of_listed_shapes(shape):
    check_padding(random_layer(*shape[:4]))


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([-1, 32, 64, 128]),
    st.integers(1, 300),
    st.integers(1, 24),
    st.lists(st.integers(0, 100), max_size=4),
)
@hypothesis_settings(max_examples=50)
def test_pieces_make_the_same_bytes_as_the_whole(bits, group_size, size_k, octets, splits):
    layer = random_layer(size_k, 8 * octets, group_size, bits)
    padded_k, padded_n = padded_shapes([(size_k, 8 * octets)], group_size)[0]
    for repack, source in zip(planned_repacks(layer, padded_k, padded_n), layer.awq(), strict=True):
        source_bytes = as_bytes(source)
        whole = np.empty(repack.target.size, np.uint8)
        repack.rewrite(source_bytes, whole)
        bands = repack.target.rows // repack.target.band
        edges = sorted({0, bands, *(split % (bands + 1) for split in splits)})
        pieces, ranges, restored = [], [], np.full(source_bytes.size, 0xA5, np.uint8)
        for first, last in pairwise(edges):
            begin, end = source_range(repack, first, last)
            piece = np.full((last - first) * repack.target.band_bytes, 0xA5, np.uint8)
            repack.rewrite(source_bytes[begin:end].copy(), piece)
            back = np.empty(end - begin, np.uint8)
            repack.inverse.rewrite(piece, back)
            restored[begin:end] = back
            pieces.append(piece)
            ranges.append((begin, end))
        assert ranges[0][0] == 0, repack
        assert ranges[-1][1] == source_bytes.size, repack
        assert all(one[1] == other[0] for one, other in pairwise(ranges)), ranges
        assert_identical(np.concatenate(pieces), whole, f"{repack.source.part} in pieces {edges}")
        assert_identical(restored, source_bytes, f"{repack.source.part} in pieces {edges} and back")


def test_pieces_hold_whole_bands_of_both_sides(monkeypatch):
    class Band(PartLayout):
        band = 24  # as no layout has it yet: neither a multiple of Marlin's 16 nor a divisor

    monkeypatch.setattr("awq2marlin.layout.repack.PIECE_BYTES", 1)
    pieces = [*Repack(MarlinWeight("qweight", 4, 192, 64), Band("qweight", 4, 192, 64)).pieces(0, 0)]
    for ranges in ([piece.read for piece in pieces], [piece.write for piece in pieces]):
        ends = [start + size for start, size in ranges]
        assert [start for start, _ in ranges] == [0, *ends[:-1]]
        assert ends[-1] == 192 * 32


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_unpadded_pieces_keep_offset_and_length(shape):
    """What lets a file be rewritten in one pass: target rows lie where their source rows lay."""
    layer = random_layer(*shape[:4])
    for repack, source in zip(planned_repacks(layer, shape.size_k, shape.size_n), layer.awq(), strict=True):
        assert repack.target.size == source.nbytes
        for row in range(repack.target.rows // repack.target.band + 1):
            assert source_range(repack, 0, row)[1] == row * repack.target.band_bytes


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("piece_bytes", [1, 1 << 12, 1 << 20])
def test_pieces_of_a_tensor_rewrite_all_of_it(piece_bytes, inverse, monkeypatch):
    monkeypatch.setattr("awq2marlin.layout.repack.PIECE_BYTES", piece_bytes)
    layer = random_layer(200, 96, 64, 4)
    for repack, source in zip(planned_repacks(layer, 256, 128), layer.awq(), strict=True):
        awq, marlin = as_bytes(source), np.empty(repack.target.size, np.uint8)
        repack.rewrite(awq, marlin)
        old, new = (marlin, awq) if inverse else (awq, marlin)
        made = np.full(new.size, 0xA5, np.uint8)
        for piece in (repack.inverse if inverse else repack).pieces(1000, 5000):
            read, write = piece.read[0] - 1000, piece.write[0] - 5000
            part = np.empty(piece.write[1], np.uint8)
            piece.rewrite(old[read : read + piece.read[1]].copy(), part)
            made[write : write + piece.write[1]] = part
        assert_identical(made, new, f"{repack.source.part} in pieces")


# --- what torch callers may rely on -----------------------------------------------------------------------


def torch_calls(layer, device="cpu"):
    """Every map of `layout` with its input: (name, tensor, function of the tensor)."""
    k, n, g, b = layer[:4]
    groups = len(layer.z)
    awq = [as_torch(array).to(device) for array in layer.awq()]
    marlin = [as_torch(array).to(device) for array in Numba.forward(*layer.awq(), layer)]
    q = as_torch(layer.q.astype(np.int32)).to(device)
    z = as_torch(layer.z.astype(np.int32)).to(device)
    return [
        ("pack_cols", q, lambda t: layout.pack_cols(t, b, k, n)),
        ("unpack_cols", awq[0], lambda t: layout.unpack_cols(t, b, k, n)),
        ("marlin_zero_points", z, lambda t: layout.marlin_zero_points(t, groups, n, b)),
        ("marlin_unpack_zero_points", marlin[1], lambda t: layout.marlin_unpack_zero_points(t, groups, n, b)),
        ("awq_to_marlin_zero_points", awq[1], lambda t: layout.awq_to_marlin_zero_points(t, groups, n, b)),
        ("marlin_to_awq_zero_points", marlin[1], lambda t: layout.marlin_to_awq_zero_points(t, groups, n, b)),
        ("awq_marlin_repack", awq[0], lambda t: layout.awq_marlin_repack(t, k, n, b)),
        ("marlin_awq_repack", marlin[0], lambda t: layout.marlin_awq_repack(t, k, n, b)),
        ("marlin_permute_scales", awq[2], lambda t: layout.marlin_permute_scales(t, k, n, g)),
        ("marlin_unpermute_scales", marlin[2], lambda t: layout.marlin_unpermute_scales(t, k, n, g)),
    ]


TORCH_MAPS = [name for name, _, _ in torch_calls(random_layer(32, 64, 32, 4))]


def torch_call(name, shape=(128, 128, 32, 4), device="cpu"):
    return next(call[1:] for call in torch_calls(random_layer(*shape), device) if call[0] == name)


@pytest.mark.parametrize("shape", [(128, 128, 32, 4), (128, 128, 32, 8), (16, 64, -1, 4), (16, 64, -1, 8)])
@pytest.mark.parametrize("name", TORCH_MAPS)
def test_results_never_alias_their_input(name, shape):
    tensor, function = torch_call(name, shape)
    before = tensor.clone()
    result = function(tensor)
    assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), name
    assert result.is_contiguous(), name
    result.fill_(-1)
    assert_identical(tensor.numpy(), before.numpy(), f"{name} changed its input")


@pytest.mark.parametrize("name", TORCH_MAPS)
def test_inputs_need_not_be_contiguous(name):
    tensor, function = torch_call(name)
    expected = function(tensor).numpy()
    transposed = tensor.t().contiguous().t()
    strided = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    for other in (transposed, strided):
        assert not other.is_contiguous()
        assert_identical(function(other).numpy(), expected, name)


@pytest.mark.parametrize("name", TORCH_MAPS)
def test_results_lie_on_the_input_s_device(name):
    # The meta device stands for any other than the CPU: mixed arithmetic with a constant on the CPU fails there.
    tensor, function = torch_call(name)
    result, expected = function(tensor.to("meta")), function(tensor)
    assert result.device.type == "meta"
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("name", TORCH_MAPS)
def test_results_on_a_gpu_are_the_cpu_s(name):
    tensor, function = torch_call(name)
    on_gpu, same_function = torch_call(name, device="cuda")
    assert_identical(same_function(on_gpu).cpu().numpy(), function(tensor).numpy(), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_type_and_bits(dtype):
    scales = torch.arange(4 * 64).reshape(4, 64).to(dtype)
    permuted_scales = layout.marlin_permute_scales(scales, 128, 64, 32)
    assert permuted_scales.dtype == dtype
    assert permuted_scales[0].tolist() == [i + 8 * m for i in range(8) for m in range(8)]
    assert torch.equal(layout.marlin_unpermute_scales(permuted_scales, 128, 64, 32), scales)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64])
def test_values_to_pack_may_be_any_integers(dtype):
    values = torch.arange(16).repeat(2, 4)
    expected = layout.pack_cols(values.to(torch.int32), 4, 2, 64)
    assert torch.equal(layout.pack_cols(values.to(dtype), 4, 2, 64), expected)
    expected = layout.marlin_zero_points(values.to(torch.int32), 2, 64, 4)
    assert torch.equal(layout.marlin_zero_points(values.to(dtype), 2, 64, 4), expected)


SIGNATURES = {
    "verify_marlin_supported": ["quant_type", "group_size", "has_zp"],
    "verify_marlin_supports_shape": [
        "output_size_per_partition",
        "input_size_per_partition",
        "input_size",
        "group_size",
    ],
    "marlin_make_workspace": ["device"],
    "marlin_make_empty_g_idx": ["device"],
    "get_scale_perms": [],
    "marlin_permute_scales": ["s", "size_k", "size_n", "group_size"],
    "pack_cols": ["q_w", "num_bits", "size_k", "size_n"],
    "unpack_cols": ["packed", "num_bits", "size_k", "size_n"],
    "marlin_zero_points": ["zp", "size_k", "size_n", "num_bits"],
    "awq_to_marlin_zero_points": ["q_zp_packed", "size_k", "size_n", "num_bits"],
    "awq_marlin_repack": ["q_weight", "size_k", "size_n", "num_bits"],
    "replace_parameter": ["layer", "name", "new_data"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_that_the_field_uses(name):
    assert list(inspect.signature(getattr(layout, name)).parameters) == SIGNATURES[name]


def test_words_to_unpack_may_be_given_by_vllm_s_name():
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)
    expected = [list(range(8))]
    assert layout.unpack_cols(packed, 4, 1, 8).tolist() == expected
    assert layout.unpack_cols(packed=packed, num_bits=4, size_k=1, size_n=8).tolist() == expected
    assert layout.unpack_cols(packed_q_w=packed, num_bits=4, size_k=1, size_n=8).tolist() == expected
    for twice in ({"packed": packed}, {}):
        arguments = () if twice else (packed, 4, 1, 8)
        with pytest.raises(TypeError, match="packed"):
            layout.unpack_cols(*arguments, packed_q_w=packed, **twice)


# --- errors name what was found and what is needed --------------------------------------------------------


def words(rows, columns, dtype=torch.int32):
    return torch.zeros(rows, columns, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: layout.pack_cols(words(2, 8), 4, 3, 8), ["q_w", "[3, 8]", "[2, 8]"]),
        (lambda: layout.pack_cols(words(2, 9), 4, 2, 9), ["size_n", "multiple of 8", "found 9"]),
        (lambda: layout.pack_cols(words(2, 6), 8, 2, 6), ["size_n", "multiple of 4", "found 6"]),
        (lambda: layout.pack_cols(words(2, 8), 3, 2, 8), ["num_bits", "4, 8", "found 3"]),
        (lambda: layout.unpack_cols(words(2, 1), 4, 2, 16), ["packed ", "[2, 2]", "[2, 1]"]),
        (lambda: layout.unpack_cols(words(2, 1, torch.int64), 4, 2, 8), ["packed ", "int32", "int64"]),
        (lambda: layout.unpack_cols(words(2, 1), 4, 2, 9), ["size_n", "multiple of 8", "found 9"]),
        (lambda: layout.unpack_cols(words(2, 1), 2, 2, 8), ["num_bits", "4, 8", "found 2"]),
        (lambda: layout.unpack_cols(words(2, 1)[0], 4, 2, 8), ["packed ", "[2, 1]", "[1]"]),
        (lambda: layout.marlin_permute_scales(words(2, 64), 128, 64, 32), ["s", "[4, 64]", "[2, 64]"]),
        (lambda: layout.marlin_permute_scales(words(4, 96), 128, 96, 32), ["size_n", "multiple of 64", "found 96"]),
        (lambda: layout.marlin_permute_scales(words(1, 48), 128, 48, -1), ["size_n", "multiple of 32", "found 48"]),
        (lambda: layout.marlin_permute_scales(words(1, 64), 128, 64, 0), ["group_size", "-1 or positive", "found 0"]),
        (lambda: layout.marlin_permute_scales(words(1, 64), 128, 64, -2), ["group_size", "-1 or positive", "found -2"]),
        (lambda: layout.marlin_unpermute_scales(words(2, 64), 128, 64, 32), ["s", "[4, 64]", "[2, 64]"]),
        (lambda: layout.marlin_unpermute_scales(words(4, 96), 128, 96, 32), ["size_n", "multiple of 64", "found 96"]),
        (lambda: layout.marlin_unpermute_scales(words(1, 64), 128, 64, 0), ["group_size", "-1 or positive", "found 0"]),
        (lambda: layout.marlin_zero_points(words(2, 64), 4, 64, 4), ["zp", "[4, 64]", "[2, 64]"]),
        (lambda: layout.marlin_zero_points(words(2, 32), 2, 32, 4), ["size_n", "multiple of 64", "found 32"]),
        (lambda: layout.marlin_zero_points(words(2, 64), 2, 64, 3), ["num_bits", "4, 8", "found 3"]),
        (lambda: layout.marlin_unpack_zero_points(words(2, 4), 2, 32, 4), ["size_n", "multiple of 64", "found 32"]),
        (lambda: layout.marlin_unpack_zero_points(words(2, 4), 2, 64, 4), ["q_zp ", "[2, 8]", "[2, 4]"]),
        (lambda: layout.marlin_unpack_zero_points(words(2, 8), 2, 64, 3), ["num_bits", "4, 8", "found 3"]),
        (lambda: layout.awq_to_marlin_zero_points(words(2, 8), 3, 64, 4), ["q_zp_packed ", "[3, 8]", "[2, 8]"]),
        (lambda: layout.awq_to_marlin_zero_points(words(2, 4), 2, 32, 4), ["size_n", "multiple of 64", "found 32"]),
        (
            lambda: layout.awq_to_marlin_zero_points(words(2, 8, torch.int16), 2, 64, 4),
            ["q_zp_packed ", "int32", "int16"],
        ),
        (lambda: layout.awq_to_marlin_zero_points(words(2, 8), 2, 64, 5), ["num_bits", "4, 8", "found 5"]),
        (lambda: layout.marlin_to_awq_zero_points(words(2, 8), 3, 64, 4), ["q_zp ", "[3, 8]", "[2, 8]"]),
        (lambda: layout.awq_marlin_repack(words(24, 8), 24, 64, 4), ["size_k", "multiple of 16", "found 24"]),
        (lambda: layout.awq_marlin_repack(words(16, 4), 16, 32, 4), ["size_n", "multiple of 64", "found 32"]),
        (lambda: layout.awq_marlin_repack(words(16, 8), 16, 128, 4), ["q_weight ", "[16, 16]", "[16, 8]"]),
        (lambda: layout.awq_marlin_repack(words(16, 8, torch.float32), 16, 64, 4), ["q_weight ", "int32", "float32"]),
        (lambda: layout.awq_marlin_repack(words(16, 8), 16, 64, 3), ["num_bits", "4, 8", "found 3"]),
        (lambda: layout.awq_marlin_repack(words(0, 8), 0, 64, 4), ["size_k", "positive", "found 0"]),
        (lambda: layout.marlin_permute_scales(words(0, 64), 0, 64, 64), ["size_k", "positive", "found 0"]),
        (lambda: layout.marlin_zero_points(words(0, 64), 0, 64, 4), ["size_k", "positive", "found 0"]),
        (lambda: layout.marlin_unpack_zero_points(words(0, 8), 0, 64, 4), ["size_k", "positive", "found 0"]),
        (lambda: layout.awq_to_marlin_zero_points(words(0, 8), 0, 64, 4), ["size_k", "positive", "found 0"]),
        (lambda: layout.marlin_to_awq_zero_points(words(0, 8), 0, 64, 4), ["size_k", "positive", "found 0"]),
        (lambda: layout.pack_cols(words(0, 8), 4, 0, 8), ["size_k", "positive", "found 0"]),
        (lambda: layout.pack_cols(words(2, 8, torch.float16), 4, 2, 8), ["q_w", "integers", "float16"]),
        (lambda: layout.marlin_zero_points(words(2, 64, torch.float16), 2, 64, 4), ["zp", "integers", "float16"]),
        (lambda: layout.pack_cols(words(2, 8) + 16, 4, 2, 8), ["q_w ", "from 0 to 15", "found 16"]),
        (lambda: layout.pack_cols(words(2, 8) - 1, 8, 2, 8), ["q_w ", "from 0 to 255", "found -1"]),
        (
            lambda: layout.pack_cols(words(2, 8, torch.int64) + 2**32, 4, 2, 8),
            ["q_w ", "from 0 to 15", f"found {2**32}"],
        ),
        (lambda: layout.pack_cols((words(2, 8) + 16).to(torch.uint16), 4, 2, 8), ["q_w ", "from 0 to 15", "found 16"]),
        (lambda: layout.marlin_zero_points(words(2, 64) + 256, 2, 64, 8), ["zp ", "from 0 to 255", "found 256"]),
        (lambda: layout.verify_marlin_supported("uint4", 64, True), ["SCALAR_TYPE_UINT4", "'uint4'"]),
        (lambda: layout.marlin_awq_repack(words(1, 128), 24, 64, 4), ["size_k", "multiple of 16", "found 24"]),
        (lambda: layout.marlin_awq_repack(words(1, 64), 16, 32, 4), ["size_n", "multiple of 64", "found 32"]),
        (lambda: layout.marlin_awq_repack(words(1, 128), 32, 64, 4), ["q_weight", "[2, 128]", "[1, 128]"]),
        (lambda: layout.marlin_awq_repack(words(1, 128, torch.int64), 16, 64, 4), ["q_weight", "int32", "int64"]),
        (lambda: layout.marlin_awq_repack(words(1, 128), 16, 64, 3), ["num_bits", "4, 8", "found 3"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "call",
)
def test_errors_name_what_was_found_and_what_is_needed(call, said):
    with pytest.raises(ValueError, match="must") as raised:
        call()
    message = str(raised.value)
    for words_of_message in said:
        assert words_of_message in message, f"{message!r} does not say {words_of_message!r}"
