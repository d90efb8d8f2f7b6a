"""Mixtures of experts: an engine loads per-expert tensors into ours, and what a rank holds is the AWQ source's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.serving.mixtures import (
    COUNT,
    HIDDEN,
    INNER,
    PREFIX,
    UNALIGNED,
    assert_expert_holds,
    layer_of,
    make_model,
    refusal,
)  # fmt: skip

RANKS = [(rank, ranks) for ranks in (1, 2, 4) for rank in range(ranks)]
KINDS = [(4, 128, True), (4, -1, True), (4, 64, False), (8, 32, False)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, harness, tmp_path_factory):
    return make_model(harness, tmp_path_factory.mktemp("experts"), *request.param, heads=(8, 8))


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_every_expert_holds_its_share(harness, experts, model, rank, ranks):
    """512 inner rows at 4 ranks leave one group of 128, two of 64, four of 32, or a part of the only group."""
    layer = layer_of(experts, model, rank, ranks)
    assert type(layer.quant_method).__name__ == "MarlinNativeMoEMethod"
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, layer, model, expert, rank, ranks)
    factor = 32 // model.recipe.bits
    inner = INNER // ranks
    assert layer.w13_qweight.shape == (COUNT, HIDDEN // 16, 2 * inner * 16 // factor)
    assert layer.w2_qweight.shape == (COUNT, inner // 16, HIDDEN * 16 // factor)


def test_a_rank_of_expert_parallelism_holds_its_experts(harness, experts, model):
    layer = layer_of(experts, model, rank=1, apart=2)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for local, expert in enumerate([2, 3]):
        assert_expert_holds(harness, layer, model, expert, 0, 1, local)


# --- processing once --------------------------------------------------------------------------------------


def test_processing_twice_changes_nothing_more(harness, experts, model):
    layer = layer_of(experts, model, 1, 4)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    once = harness.tensors(layer)
    experts.finish_experts(layer)
    harness.assert_same(harness.tensors(layer), once)


# --- experts kept in AWQ layout ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "has_qzeros"),
    [(4, 32, True), (4, 32, False), (8, 32, False), (4, -1, True), (8, -1, False)],
)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (2, 3)])
def test_awq_experts_are_repacked(harness, experts, tmp_path, bits, group_size, has_qzeros, rank, ranks):
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, UNALIGNED, heads=(3, 3), extra={"a": (128, 64)})
    layer = layer_of(experts, model, rank, ranks, sizes=UNALIGNED)
    assert layer.quant_method.tile == 1
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, layer, model, expert, rank, ranks)
    once = harness.tensors(layer)
    experts.finish_experts(layer)
    harness.assert_same(harness.tensors(layer), once)


# --- cuts that are not whole tiles -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size", "has_qzeros"), [(4, 32, True), (8, 32, False), (4, -1, True)])
@pytest.mark.parametrize("rank", [0, 5, 15])
def test_experts_cut_within_tiles_hold_their_share(harness, experts, tmp_path, bits, group_size, has_qzeros, rank):
    """512 inner columns at 16 ranks are 32 each, half a tile, and padded to 64 or 128."""
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, heads=(16, 16))
    layer = layer_of(experts, model, rank, 16)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, layer, model, expert, rank, 16)


@pytest.mark.parametrize(("bits", "group_size", "has_qzeros"), [(4, 32, True), (8, 32, False), (4, -1, True)])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (2, 3)])
def test_padded_experts_lose_their_padding(harness, experts, tmp_path, bits, group_size, has_qzeros, rank, ranks):
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, UNALIGNED, unaligned="pad", heads=(3, 3))
    assert len(model.config.contents.quantization.padded_modules) == 3 * COUNT
    layer = layer_of(experts, model, rank, ranks, sizes=UNALIGNED)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, layer, model, expert, rank, ranks)


@settings(max_examples=12)
@given(
    st.sampled_from([(4, 32, True), (8, 32, False), (4, 64, False), (4, -1, True)]),
    st.sampled_from([128, 256]),
    st.integers(1, 7),
    st.sampled_from([(rank, ranks) for ranks in (1, 2, 3, 5) for rank in range(ranks)]),
)
def test_experts_of_any_size_hold_their_share(harness, experts, tmp_path_factory, kind, hidden, units, place):
    """Padded in the file or not, and cut at tiles or within them."""
    rank, ranks = place
    sizes = (hidden, units * ranks * max(kind[1], 16))
    model = make_model(harness, tmp_path_factory.mktemp("m"), *kind, sizes, unaligned="pad", heads=(ranks, ranks))
    layer = layer_of(experts, model, rank, ranks, sizes=sizes)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, layer, model, expert, rank, ranks)


# --- what is missing or refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_of_an_expert_is_named(harness, experts, tmp_path, projection, part):
    model = make_model(harness, tmp_path)
    layer = layer_of(experts, model)
    name = f"{PREFIX}.2.{projection}.{part}"
    experts.load_experts(layer, model, PREFIX, leave_out=[name])
    (problem,) = refusal(experts.finish_experts, layer)
    assert (problem.tensor, problem.code) == (name, "missing-tensor")


def test_tensors_of_other_ranks_experts_are_not_missed(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    layer = layer_of(experts, model, rank=0, apart=2)
    absent = [name for name in model.marlin if name.startswith(f"{PREFIX}.3.")]
    experts.load_experts(layer, model, PREFIX, leave_out=absent)
    experts.finish_experts(layer)


def test_a_cut_through_a_group_names_the_largest_size_that_works(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, heads=(16, 16))
    (problem,) = refusal(layer_of, experts, model, 0, 8)
    assert problem.tensor == PREFIX
    assert problem.message == (
        "64 rows on one rank are not a multiple of the group size 128. The largest tensor-parallel size that works is "
        "4: serve it with --tensor-parallel-size 4"
    )
