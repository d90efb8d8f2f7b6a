"""Cuts that are not whole tiles: what a rank holds is its slice of the AWQ source, padded as the kernels need it."""

import contextlib
from copy import copy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awq2marlin.errors import CheckpointError
from awq2marlin.formats.base import Quantization
from awq2marlin.integrations.serving.finishing import pad_to
from awq2marlin.integrations.serving.recut import PlainPart, plain_part
from awq2marlin.layout.marlin import padded_shapes
from awq2marlin.layout.modules import QUANTIZED_PARTS, part_shape
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.torch_parts import marlin_part
from tests.equality import assert_identical

#: Bits, group size, zero points.
KINDS = [(4, 32, True), (4, 32, False), (8, 32, True), (4, -1, True), (8, -1, False)]

GATE_UP = {0: "mlp.gate_proj", 1: "mlp.up_proj"}


@pytest.fixture
def notes(harness, monkeypatch):
    """Returns what the process says of modules that are brought back to plain order."""
    log = mock.Mock()
    monkeypatch.setattr(harness.kernels.RECUT_NOTE, "_log", log)
    monkeypatch.setattr(harness.kernels.RECUT_NOTE, "_is_said", False)
    return lambda: [call.args[0] % call.args[1:] for call in log.info.call_args_list]


def make(harness, folder, modules, kind, **options):
    bits, group_size, has_qzeros = kind
    return harness.Model(folder, modules, bits=bits, group_size=group_size, has_qzeros=has_qzeros, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_columns_that_end_within_a_tile_are_cut_from_the_codes(harness, tmp_path, kind, rank, notes):
    """192 columns at 4 ranks are 48 each: three quarters of a tile, gate and up side by side."""
    model = make(harness, tmp_path, {"mlp.gate_proj": (128, 192), "mlp.up_proj": (128, 192)}, kind, heads=(4, 4))
    options = {"rank": rank, "ranks": 4}
    layer = harness.build("MergedColumnParallelLinear", model, "mlp.gate_up_proj", 128, [192, 192], **options)
    harness.load(layer, model, GATE_UP)
    harness.finish(layer)
    parts = [harness.columns(model.values(name), rank, 4) for name in GATE_UP.values()]
    harness.assert_holds(layer, model, harness.side_by_side(*parts))
    (note,) = notes()
    assert "the first is mlp.gate_up_proj: 48 columns on one rank are not a multiple of 64" in note


def test_heads_narrower_than_a_tile_are_cut_and_repeated(harness, tmp_path):
    """Two key and value heads of 32 columns on four ranks: two ranks hold the same half tile."""
    modules = {"attn.q_proj": (128, 128), "attn.k_proj": (128, 64), "attn.v_proj": (128, 64)}
    model = harness.Model(tmp_path, modules, heads=(4, 2), group_size=32)
    for rank in range(4):
        layer = harness.build("QKVParallelLinear", model, "attn.qkv_proj", 128, 32, 4, 2, rank=rank, ranks=4)
        harness.load(layer, model, {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"})
        harness.finish(layer)
        key, value = (harness.columns(model.values(f"attn.{name}_proj"), rank // 2, 2) for name in "kv")
        query = harness.columns(model.values("attn.q_proj"), rank, 4)
        harness.assert_holds(layer, model, harness.side_by_side(query, key, value))


def test_rows_that_end_within_a_tile_are_cut_where_one_group_spans_all(harness, tmp_path, notes):
    """128 rows at 16 ranks are 8 each; the only group is on every rank."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (128, 128)}, group_size=-1, heads=(16, 16))
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 128, 128, rank=3, ranks=16)
    harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.rows(model.values("mlp.down_proj"), -1, 3, 16))
    assert "8 rows on one rank" in notes()[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("layer_kind", "prefix", "sizes", "parts", "ranks"),
    [
        ("MergedColumnParallelLinear", "mlp.gate_up_proj", (96, [160, 160]), GATE_UP, 1),
        ("MergedColumnParallelLinear", "mlp.gate_up_proj", (96, [160, 160]), GATE_UP, 2),
        ("QKVParallelLinear", "attn.qkv_proj", (96, 80, 1, 1), {None: "attn.qkv_proj"}, 1),
        ("RowParallelLinear", "mlp.down_proj", (192, 72), {None: "mlp.down_proj"}, 3),
    ],
)
def test_padded_modules_lose_their_padding_where_they_are_joined_or_cut(
    harness, tmp_path, kind, layer_kind, prefix, sizes, parts, ranks
):
    modules = {
        "mlp.gate_proj": (96, 160),
        "mlp.up_proj": (96, 160),
        "mlp.down_proj": (192, 72),
        "attn.qkv_proj": (96, 240),
    }
    model = make(harness, tmp_path, modules, kind, unaligned="pad", heads=(6, 6))
    assert model.config.contents.quantization.padded_modules.keys() == modules.keys()
    for rank in range(ranks):
        layer = harness.build(layer_kind, model, prefix, *sizes, rank=rank, ranks=ranks)
        harness.load(layer, model, parts)
        harness.finish(layer)
        values = [model.values(name) for name in parts.values()]
        if layer_kind == "RowParallelLinear":
            wanted = harness.rows(values[0], kind[1], rank, ranks)
        else:
            wanted = harness.side_by_side(*(harness.columns(each, rank, ranks) for each in values))
        harness.assert_holds(layer, model, wanted)


def test_parts_in_two_layouts_become_one_matrix(harness, tmp_path):
    modules = {"mlp.gate_proj": (128, 128), "mlp.up_proj": (128, 128)}
    model = harness.Model(tmp_path, modules, group_size=32)
    lists = harness.replace(model.config.contents.quantization, awq_modules=frozenset({"mlp.up_proj"}))
    model.config.contents = harness.replace(model.config.contents, quantization=lists)
    for part in ("qweight", "qzeros", "scales"):
        model.marlin[f"mlp.up_proj.{part}"] = model.awq[f"mlp.up_proj.{part}"]
    layer = harness.build("MergedColumnParallelLinear", model, "mlp.gate_up_proj", 128, [128, 128])
    harness.load(layer, model, GATE_UP)
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.side_by_side(*(model.values(name) for name in GATE_UP.values())))


def test_a_word_of_the_source_is_not_cut(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.up_proj": (128, 192)}, heads=(16, 16))
    with pytest.raises(CheckpointError) as refused:
        harness.build("ColumnParallelLinear", model, "mlp.up_proj", 128, 192, rank=0, ranks=16)
    (problem,) = refused.value.problems
    assert "12 columns on one rank are not a multiple of 8" in problem.message
    assert "The largest tensor-parallel size that works is 8" in problem.message


# --- whatever an engine cuts ------------------------------------------------------------------------------


def in_awq_layout(model):
    """Returns the same checkpoint as its source has it, which the engine cuts at will."""
    source = copy(model)
    source.config, source.marlin = copy(model.config), model.awq
    modules = frozenset(model.recipe.modules)
    lists = replace(model.config.contents.quantization, awq_modules=modules, padded_modules={})
    source.config.contents = replace(model.config.contents, quantization=lists)
    return source


@st.composite
def layers(draw):
    """Returns a kind of checkpoint, a layer of an engine, its modules in the file, and a rank."""
    kind = draw(st.sampled_from(KINDS))
    bits, group_size, _ = kind
    ranks, word = draw(st.sampled_from([1, 2, 3, 4, 6])), 32 // bits
    size_k = max(group_size, 8) * draw(st.integers(1, 6))
    wide, narrow = (word * draw(st.integers(1, 20)) for _ in range(2))
    heads = draw(st.sampled_from([1, 2, ranks])) if ranks % 2 == 0 else 1
    name, sizes, modules = draw(
        st.sampled_from(
            [
                ("ColumnParallelLinear", (size_k, wide * ranks), {None: wide * ranks}),
                ("RowParallelLinear", (size_k * ranks, wide), {None: wide}),
                (
                    "MergedColumnParallelLinear",
                    (size_k, [wide * ranks, narrow * ranks]),
                    {0: wide * ranks, 1: narrow * ranks},
                ),
                (
                    "QKVParallelLinear",
                    (size_k, narrow, heads * ranks, heads),
                    {"q": narrow * heads * ranks, "k": narrow * heads, "v": narrow * heads},
                ),
            ]
        )
    )
    parts = {part: f"m.{LAYERS[name][number]}" for number, part in enumerate(modules)}
    shapes = {parts[part]: (sizes[0], size_n) for part, size_n in modules.items()}
    return kind, name, sizes, parts, shapes, draw(st.integers(0, ranks - 1)), ranks


#: What the modules of a layer are called.
LAYERS = {
    "ColumnParallelLinear": ["up_proj"],
    "RowParallelLinear": ["down_proj"],
    "MergedColumnParallelLinear": ["gate_proj", "up_proj"],
    "QKVParallelLinear": ["q_proj", "k_proj", "v_proj"],
}
FUSED = {2: "gate_up_proj", 3: "qkv_proj"}


@settings(max_examples=40)
@given(layers())
def test_what_is_cut_within_tiles_is_what_the_engine_cuts_from_the_source(harness, tmp_path_factory, layer):
    kind, name, sizes, parts, modules, rank, ranks = layer
    prefix = f"m.{FUSED[len(parts)]}" if len(parts) > 1 else next(iter(parts.values()))
    model = make(harness, tmp_path_factory.mktemp("m"), modules, kind, unaligned="pad")
    options = {"rank": rank, "ranks": ranks}
    ours = harness.build(name, model, prefix, *sizes, **options)
    assume(ours.quant_method.tile == 1)
    theirs = harness.build(name, in_awq_layout(model), prefix, *sizes, **options)
    harness.load(ours, model, parts)
    harness.load(theirs, in_awq_layout(model), parts)
    harness.assert_same(harness.tensors(ours), harness.tensors(theirs))


# --- a rank takes the tiles of its part, and no more ------------------------------------------------------


def module_of(part, size_k, size_n, scheme, dtype=torch.half):
    """Returns a tensor of a random module in AWQ layout and in Marlin's, padded, and what a config says of it."""
    ((padded_k, padded_n),) = padded_shapes([(size_k, size_n)], scheme.group_size)
    shape = part_shape(part, size_k, size_n, scheme)
    plain = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    if part == "scales":
        plain = torch.randn(shape).to(dtype)
    whole = pad_to(plain, *part_shape(part, padded_k, padded_n, scheme))
    padded = {} if (padded_k, padded_n) == (size_k, size_n) else {"m": (size_k, size_n)}
    said = Quantization(scheme, None, "config.json", frozenset(), frozenset(), padded)
    return plain, marlin_part(part, whole, padded_k, padded_n, scheme), said


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside the block, not of views."""

    def __init__(self):
        super().__init__()
        self.bytes, self._known = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if PlainPart in types:  # counted is what comes of it
            return NotImplemented
        made = func(*args, **(kwargs or {}))
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if type(each) is torch.Tensor}
        for each in tree_leaves(made):
            if type(each) is torch.Tensor and each.untyped_storage()._cdata not in {*before, *self._known}:
                self._known[each.untyped_storage()._cdata] = each  # kept, so that no other takes its place
                self.bytes += each.untyped_storage().nbytes()
        return made


@st.composite
def cuts(draw):
    """A module, and a cut of it as an engine makes it: of rows or columns, or of both."""
    bits, group_size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([-1, 32, 64]))
    rows = draw(st.integers(1, 6)) * max(group_size, 8)
    columns = draw(st.integers(1, 40)) * 32 // bits
    part = draw(st.sampled_from(QUANTIZED_PARTS))
    scheme = Scheme(bits, group_size, zero_point=True)
    spans = []
    for size in part_shape(part, rows, columns, scheme):
        first = draw(st.integers(0, size - 1))
        spans.append((first, draw(st.integers(1, size - first))))
    return part, rows, columns, scheme, spans


@settings(max_examples=150)
@given(cuts(), st.sampled_from([torch.half, torch.bfloat16]))
def test_any_cut_is_that_of_the_source(cut, dtype):
    part, size_k, size_n, scheme, spans = cut
    plain, tiled, said = module_of(part, size_k, size_n, scheme, dtype)
    found, expected = plain_part(part, tiled, "m", size_k, said), plain
    assert found.shape == plain.shape
    for dim, (first, length) in enumerate(spans):
        found, expected = found.narrow(dim, first, length), expected.narrow(dim, first, length)
    assert type(found) is PlainPart, "nothing was read so far"
    target = torch.zeros(*expected.shape, dtype=plain.dtype)
    target.copy_(found)
    assert_identical(target.view(torch.int16).numpy(), expected.contiguous().view(torch.int16).numpy(), part)


def test_it_is_a_tensor_to_whatever_else_an_engine_does():
    plain, tiled, said = module_of("qweight", 64, 80, Scheme(4, 32, zero_point=True))
    whole = plain_part("qweight", tiled, "m", 64, said)
    for name, call in {
        "a step": lambda each: each[::2, 1:-1],
        "a part of a part": lambda each: each[-40:, 2:][3:30, :5],
        "a row": lambda each: each[7],
        "turned": lambda each: each.t().contiguous(),
        "in parts": lambda each: torch.cat(each.chunk(2, dim=1)[::-1]),
        "joined": lambda each: torch.cat([each, each], dim=1),
        "another type": lambda each: each.to(torch.int64) + 1,
        "in a line": lambda each: each.flatten(),
        "a part in a line": lambda each: each[:, 3:5].contiguous().view(-1),
        "nothing": lambda each: each[5:2],
    }.items():
        found, expected = call(whole), call(plain)
        assert torch.equal(torch.empty_like(expected).copy_(found), expected), name


def test_it_can_be_shown_in_a_message():
    _, tiled, said = module_of("qweight", 64, 80, Scheme(4, 32, zero_point=True))
    assert "PlainPart" in repr(plain_part("qweight", tiled, "m", 64, said)[:2, 3:5])


@pytest.mark.parametrize(
    "write",
    [
        lambda each: each.add_(1),
        lambda each: each.copy_(torch.zeros(64, 10, dtype=torch.int32)),
        lambda each: each.__setitem__(slice(0, 2), 0),
        lambda each: torch.add(each, 1, out=each),
        lambda each: torch._foreach_add_([each], 1),
        lambda each: torch._foreach_copy_([each], [torch.zeros(64, 10, dtype=torch.int32)]),
    ],
    ids=["add_", "copy_", "setitem", "out", "foreach_add_", "foreach_copy_"],
)
def test_what_is_written_to_it_is_not_lost_without_a_word(write):
    _, tiled, said = module_of("qweight", 64, 80, Scheme(4, 32, zero_point=True))
    with pytest.raises(TypeError, match="clone it first"):
        write(plain_part("qweight", tiled, "m", 64, said))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_taken", [True, False], ids=["taken", "given"])
def test_it_is_not_made_another_tensor_s_data_which_would_end_the_process(mode, is_taken):
    plain, tiled, said = module_of("qweight", 64, 80, Scheme(4, 32, zero_point=True))
    other, cut = torch.zeros(64, 5, dtype=torch.int32), plain_part("qweight", tiled, "m", 64, said)[:, :5]
    target, source = (other, cut) if is_taken else (cut, other)
    with mode():
        with pytest.raises((RuntimeError, TypeError), match=r"incompatible tensor type|clone it first"):
            target.data = source
        assert not other.any()
        other.data = cut.data  # which is read
        assert torch.equal(other, plain[:, :5])
        assert torch.equal(cut.clone(), plain[:, :5])
        assert cut.device == other.device == torch.device("cpu")


def test_other_libraries_get_its_values_and_not_an_address_that_is_none():
    """DLPack asks for the address, which ended the process."""
    plain, tiled, said = module_of("qweight", 64, 80, Scheme(4, 32, zero_point=True))
    cut = plain_part("qweight", tiled, "m", 64, said)[3:, 2:5]
    assert torch.equal(torch.from_dlpack(cut), plain[3:, 2:5])
    assert_identical(np.from_dlpack(cut), plain[3:, 2:5].contiguous().numpy(), "dlpack")


@pytest.mark.parametrize(("part", "bits"), [("qweight", 4), ("qweight", 8), ("qzeros", 4), ("scales", 4)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_takes_the_tiles_that_cover_its_part_and_no_more(part, bits, dim):
    """Of 12 ranks one has 288 of 3456 columns, which 6 of 54 tiles cover, or as many rows, which 18 of 216 do."""
    scheme = Scheme(bits, 32, zero_point=True)
    _, tiled, said = module_of(part, 3456, 3456, scheme)
    with Allocated() as allocated:
        whole = plain_part(part, tiled, "m", 3456, said)
        share = whole.shape[dim] // 12
        mine = whole.narrow(dim, 7 * share, share)
        target = torch.empty(*mine.shape, dtype=mine.dtype)
        target.copy_(mine)
    tiles = {0: 18 / 216, 1: 6 / 54}[dim]
    covering = tiled.nbytes * tiles
    # As it lies in the file (no copy of whole rows, which lie there together), in plain order, and where it goes.
    assert target.nbytes == tiled.nbytes // 12
    assert covering + target.nbytes <= allocated.bytes <= 2 * covering + target.nbytes
