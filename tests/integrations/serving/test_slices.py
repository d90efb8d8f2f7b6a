"""Tensor parallelism and fusing: what an engine's loaders put into our parameters is the slice of the AWQ source."""

import pytest

RANKS = [(rank, ranks) for ranks in (1, 2, 4) for rank in range(ranks)]
KINDS = [(4, 128, True), (4, 32, False), (8, 64, False), (4, -1, True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, harness, tmp_path_factory):
    bits, group_size, has_qzeros = request.param
    modules = {
        "attn.q_proj": (512, 1024),
        "attn.k_proj": (512, 256),
        "attn.v_proj": (512, 256),
        "attn.o_proj": (1024, 512),
        "mlp.gate_proj": (512, 768),
        "mlp.up_proj": (512, 768),
        "mlp.down_proj": (768 if group_size == 32 else 1024, 512),
    }
    folder = tmp_path_factory.mktemp("model")
    options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros}
    return harness.Model(folder, modules, heads=(16, 4), **options)


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_a_column_parallel_layer_holds_its_columns(harness, model, rank, ranks):
    layer = harness.build("ColumnParallelLinear", model, "attn.q_proj", 512, 1024, rank=rank, ranks=ranks)
    harness.load(layer, model, {None: "attn.q_proj"})
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.columns(model.values("attn.q_proj"), rank, ranks))


@pytest.mark.parametrize(("rank", "ranks"), [*RANKS, (3, 8), (5, 8)])
def test_fused_query_key_and_value_hold_their_heads(harness, model, rank, ranks):
    layer = harness.build("QKVParallelLinear", model, "attn.qkv_proj", 512, 64, 16, 4, rank=rank, ranks=ranks)
    harness.load(layer, model, {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"})
    harness.finish(layer)
    copies = max(ranks // 4, 1)  # beyond four ranks, several hold the same key and value head
    key, value = (harness.columns(model.values(f"attn.{n}_proj"), rank // copies, min(ranks, 4)) for n in "kv")
    query = harness.columns(model.values("attn.q_proj"), rank, ranks)
    harness.assert_holds(layer, model, harness.side_by_side(query, key, value))


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_fused_gate_and_up_hold_their_columns(harness, model, rank, ranks):
    layer = harness.build(
        "MergedColumnParallelLinear", model, "mlp.gate_up_proj", 512, [768, 768], rank=rank, ranks=ranks
    )
    harness.load(layer, model, {0: "mlp.gate_proj", 1: "mlp.up_proj"})
    harness.finish(layer)
    parts = [harness.columns(model.values(f"mlp.{name}_proj"), rank, ranks) for name in ("gate", "up")]
    harness.assert_holds(layer, model, harness.side_by_side(*parts))


@pytest.mark.parametrize(("rank", "ranks"), [*RANKS, (0, 8), (7, 8)])
def test_a_row_parallel_layer_holds_its_rows_down_to_one_group(harness, model, rank, ranks):
    """1024 rows at 8 ranks leave one group of 128, two of 64, four of 32, or a part of the only group."""
    layer = harness.build("RowParallelLinear", model, "attn.o_proj", 1024, 512, rank=rank, ranks=ranks)
    harness.load(layer, model, {None: "attn.o_proj"})
    harness.finish(layer)
    group_size = model.recipe.group_size
    harness.assert_holds(layer, model, harness.rows(model.values("attn.o_proj"), group_size, rank, ranks))
    assert layer.scales.shape[0] == max(1024 // ranks // group_size, 1)
