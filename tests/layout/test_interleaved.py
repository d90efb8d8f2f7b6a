"""Four columns in turn, and zero points as products with scales: by the sentences of AutoAWQ's gemv_fast layer.

Source: AutoAWQ 0.2.9, ``awq/modules/linear/gemv_fast.py``; `interleaved` does what ``pack_intweight`` does.
"""

import hashlib

import numpy as np
import pytest

from awq2marlin.errors import CheckpointError
from awq2marlin.io.stream import NamedPath, rewrite_file
from awq2marlin.layout.interleaved import InterleavedCodes
from awq2marlin.layout.products import ProductZeroPoints
from awq2marlin.layout.repack import Companion, Holder, MarlinScales, MarlinZeroPoints, PartLayout, Place, Repack
from awq2marlin.layout.transposed import TransposedCodes, TransposedScales, TransposedZeroPoints
from tests.equality import assert_identical
from tests.layout.test_transposed import AWQ_ORDER, as_bytes, filled, packed


def interleaved(codes):
    """int16 [N / 4, K] of codes [K, N]."""
    size_k, size_n = codes.shape
    runs = codes.T.reshape(size_n, size_k // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    eights = runs.reshape(size_n, size_k // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    turns = eights.reshape(size_n // 4, 4, size_k // 64, 64).transpose(0, 2, 1, 3)
    words = turns.reshape(size_n // 4, size_k, 4).astype(np.uint16)
    return words[..., 0] | words[..., 1] << 4 | words[..., 2] << 8 | words[..., 3] << 12


def products(zeros, scales):
    """The fp16 bits of -(s z), rounded once."""
    with np.errstate(all="ignore"):
        return -(scales.view(np.float16).astype(np.float32) * zeros.astype(np.float32)).astype(np.float16)


@pytest.mark.parametrize(("size_k", "size_n"), [(64, 8), (128, 64), (192, 72), (1088, 264)])
def test_all_codes_are_where_the_sentences_say(size_k, size_n):
    codes = np.random.default_rng(size_k).integers(0, 16, (size_k, size_n), np.uint8)
    tensor, rows = as_bytes(interleaved(codes)), as_bytes(packed(codes, 4, AWQ_ORDER[4]))
    layout = InterleavedCodes("qweight", 4, size_k, size_n)
    found, back = filled(rows.size), filled(tensor.size)
    layout.unpack(tensor, found)
    assert_identical(found, rows, "plain rows")
    layout.pack(rows, back)
    assert_identical(back, tensor, "the tensor")


def test_sizes_that_are_none_never_reach_the_kernels():
    for layout in (InterleavedCodes("qweight", 4, 96, 8), InterleavedCodes("qweight", 8, 64, 8)):
        with pytest.raises(ValueError, match="columns in turn"):
            layout.unpack(filled(layout.size), filled(layout.size))
    odd = ProductZeroPoints("qzeros", 4, 2, 16, 2)
    with pytest.raises(ValueError, match="scales are needed"):
        odd.unpack(filled(64), filled(16))
    with pytest.raises(ValueError, match="are not rows of 16 columns"):
        odd.beside(np.ones((3, 16), np.uint16)).unpack(filled(64), filled(16))


def test_every_zero_point_is_found_with_every_finite_scale_whose_product_is_finite():
    scales = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for zero in range(16):
        zeros = np.full(scales.shape, zero, np.uint8)
        given = products(zeros, scales)
        finite = np.isfinite(given) & np.isfinite(scales.view(np.float16))
        held, count = scales[finite], int(finite.sum()) // 8 * 8
        layout = ProductZeroPoints("qzeros", 4, 1, count, 1).beside(held[None, :count])
        zeros = np.where(held[None, :count] & 0x7FFF == 0, 0, zeros[None, :count]).astype(np.uint8)
        found, back = filled(count // 2), filled(count * 2)
        layout.unpack(as_bytes(given[finite][:count]), found)
        assert_identical(found, as_bytes(packed(zeros, 4, AWQ_ORDER[4])), f"zero points {zero}")
        layout.pack(found, back)
        assert_identical(back, as_bytes(given[finite][:count]), f"products with {zero}")


def _matter(groups, columns, seed=0):
    """(zero points [G, N], scales [G, N] as bits, products of 8 rows more as bits)"""
    rng = np.random.default_rng(seed)
    zeros = rng.integers(0, 16, (groups, columns), np.uint8)
    scales = (rng.random((groups, columns)) / 50 + 0.001).astype(np.float16).view(np.uint16)
    stored = np.zeros((groups + 8, columns), np.uint16)
    stored[:groups] = products(zeros, scales).view(np.uint16)
    return zeros, scales, stored


ODD = {
    "a zero point of 16": (0, np.float16(-16 * 0.5).view(np.uint16), 0x3800),
    "a positive product": (0, np.float16(0.5).view(np.uint16), 0x3800),
    "half a zero point": (0, np.float16(-0.25).view(np.uint16), 0x3800),
    "a product one bit off": (0, int(np.float16(-1.5).view(np.uint16)) + 1, 0x3800),
    "zero of the other sign": (0, 0x0000, 0x3800),
    "a product with nothing": (0, np.float16(-0.5).view(np.uint16), 0x0000),
    "an infinite product": (0, 0xFC00, 0x7BFF),
    "a product that is no number": (0, 0x7E00, 0x3800),
    "an infinite scale": (0, 0xFC00, 0x7C00),
    "a scale that is no number": (0, 0x7E00, 0x7E00),
    "something past the last group": (3, 0x0001, None),
    "zero of the other sign past the last group": (3, 0x8000, None),
}


@pytest.mark.parametrize("name", ODD)
def test_what_could_not_be_made_again_is_refused_by_name(name):
    row, product, scale = ODD[name]
    _, scales, stored = _matter(3, 64)
    stored[row, 5] = product
    if scale is not None:
        scales[row, 5] = scale
    layout = ProductZeroPoints("qzeros", 4, 11, 64, 3)
    companion = Companion(Holder("m.scales", PartLayout("scales", 4, 3, 64)), Holder("", layout), Place("s", 0, 384))
    repack = Repack(layout, PartLayout("qzeros", 4, 3, 64), "file", "m.qzeros", companion)
    (piece,) = repack.pieces(0, 0, lambda _place: as_bytes(scales))
    with pytest.raises(CheckpointError, match="could not be undone") as caught:
        piece.rewrite(as_bytes(stored), filled(piece.write[1]))
    assert [(each.file, each.tensor) for each in caught.value.problems] == [("file", "m.qzeros")]


def test_scales_that_are_not_zero_past_the_last_group_are_refused_by_their_own_name():
    layout = ProductZeroPoints("qzeros", 4, 11, 64, 3)
    place = Place("other", 0, 11 * 128)
    companion = Companion(Holder("m.scales", PartLayout("scales", 4, 11, 64)), Holder("", layout), place)
    repack = Repack(layout, PartLayout("qzeros", 4, 3, 64), "file", "m.qzeros", companion)
    with pytest.raises(CheckpointError) as caught:
        [*repack.pieces(0, 0, lambda _place: np.ones(11 * 128, np.uint8))]
    assert [(each.file, each.tensor) for each in caught.value.problems] == [("other", "m.scales")]


TARGETS = {
    "rows": lambda groups, columns: (
        PartLayout("qzeros", 4, groups, columns),
        PartLayout("scales", 4, groups, columns),
    ),
    "Marlin": lambda groups, columns: (
        MarlinZeroPoints("qzeros", 4, groups, columns),
        MarlinScales("scales", 4, groups, columns),
    ),
    "Marlin, padded": lambda groups, columns: (
        MarlinZeroPoints("qzeros", 4, groups + 4, columns + 64),
        MarlinScales("scales", 4, groups + 4, columns + 64),
    ),
    "columns": lambda groups, columns: (
        TransposedZeroPoints("qzeros", 4, groups, columns),
        TransposedScales("scales", 4, groups, columns),
    ),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("groups", "columns"), [(3, 128), (300, 2112)])  # the second goes in pieces, or in runs
def test_zero_points_go_there_and_back_beside_their_scales(target, groups, columns, workers, tmp_path):
    zeros, scales, stored = _matter(groups, columns)
    layout, (points, held) = (
        ProductZeroPoints("qzeros", 4, groups + 8, columns, groups),
        TARGETS[target](groups, columns),
    )
    kept = np.empty(held.size, np.uint8)
    Repack(PartLayout("scales", 4, groups, columns), held).rewrite(as_bytes(scales), kept)
    own = PartLayout("scales", 4, groups, columns)
    there = Repack(layout, points, companion=Companion(Holder("s", own), Holder("t", held), Place("s", 0, 0)))
    back = Repack(points, layout, companion=Companion(Holder("t", held), Holder("s", own), Place("t", 0, 0)))
    (tmp_path / "source").write_bytes(stored.tobytes())
    for repack, beside, before, after in ((there, scales, "source", "made"), (back, kept, "made", "back")):
        pieces = repack.pieces(0, 0, lambda _place, beside=beside: as_bytes(beside).copy())
        rewrite_file(NamedPath(tmp_path / before, before), tmp_path / after, pieces, workers=workers)
    plain = np.empty(groups * columns // 2, np.uint8)
    made = np.fromfile(tmp_path / "made", np.uint8)
    Repack(points, PartLayout("qzeros", 4, groups, columns)).rewrite(made, plain)
    assert_identical(plain, as_bytes(packed(zeros, 4, AWQ_ORDER[4])), "zero points")
    assert hashlib.sha256((tmp_path / "back").read_bytes()).digest() == hashlib.sha256(stored.tobytes()).digest()


def test_codes_in_turn_go_in_runs_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("awq2marlin.layout.repack.PIECE_BYTES", 1 << 19)
    codes = np.random.default_rng(1).integers(0, 16, (2048, 1032), np.uint8)
    repack = Repack(InterleavedCodes("qweight", 4, *codes.shape), PartLayout("qweight", 4, *codes.shape))
    assert len([*repack.pieces(0, 0)]) > 2
    (tmp_path / "source").write_bytes(interleaved(codes).tobytes())
    for each, before, after in ((repack, "source", "made"), (repack.inverse, "made", "back")):
        rewrite_file(NamedPath(tmp_path / before, before), tmp_path / after, each.pieces(0, 0), workers=2)
    assert (tmp_path / "made").read_bytes() == packed(codes, 4, AWQ_ORDER[4]).tobytes()
    assert (tmp_path / "back").read_bytes() == (tmp_path / "source").read_bytes()
    apart = Repack(InterleavedCodes("qweight", 4, *codes.shape), TransposedCodes("qweight", 4, *codes.shape))
    found = np.empty(codes.size // 2, np.uint8)
    apart.rewrite(as_bytes(interleaved(codes)), found)
    assert_identical(found, as_bytes(packed(codes.T, 4)), "columns one after the other")
