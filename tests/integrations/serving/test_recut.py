"""Cuts that are not whole tiles: what a rank holds is its slice of the AWQ source, padded as the kernels need it."""

from unittest import mock

import pytest

from awq2marlin.errors import CheckpointError

#: Bits, group size, zero points.
KINDS = [(4, 32, True), (4, 32, False), (8, 32, True), (4, -1, True), (8, -1, False)]

GATE_UP = {0: "mlp.gate_proj", 1: "mlp.up_proj"}


@pytest.fixture
def notes(harness, monkeypatch):
    """Returns what the process says of modules that are brought back to plain order."""
    log = mock.Mock()
    monkeypatch.setattr(harness.RECUT_NOTE, "_log", log)
    monkeypatch.setattr(harness.RECUT_NOTE, "_is_said", False)
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
