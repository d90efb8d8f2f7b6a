"""Mixtures of experts: vLLM's container loads per-expert tensors into ours, and what it holds is the AWQ source's."""

from unittest import mock

import numpy as np
import pytest

from awq2marlin.errors import CheckpointError
from awq2marlin.layout import reference
from tests.equality import assert_identical
from tests.skips import OLD_VLLM

PREFIX = "mlp.experts"
COUNT, HIDDEN, INNER = 4, 256, 512
RANKS = [(rank, ranks) for ranks in (1, 2, 4) for rank in range(ranks)]
KINDS = [(4, 128, True), (4, -1, True), (4, 64, False), (8, 32, False)]


def modules(hidden=HIDDEN, inner=INNER, count=COUNT):
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {f"{PREFIX}.{expert}.{name}": size for expert in range(count) for name, size in sizes.items()}


def make_model(harness, folder, bits=4, group_size=128, has_qzeros=True, sizes=(HIDDEN, INNER), extra=(), **options):
    options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros, **options}
    return harness.Model(folder, {**modules(*sizes), **dict(extra)}, **options)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, harness, tmp_path_factory):
    return make_model(harness, tmp_path_factory.mktemp("experts"), *request.param, heads=(8, 8))


def refusal(call, *arguments, **options):
    with pytest.raises(CheckpointError) as refused:
        call(*arguments, **options)
    return refused.value.problems


def layer_of(harness, experts, model, rank=0, ranks=1, sizes=(HIDDEN, INNER), **options):
    with harness.as_rank(rank, ranks):
        return experts.experts_layer(model, PREFIX, COUNT, *sizes, rank, ranks, **options)


def padded(values, rows, columns):
    return None if values is None else np.pad(values, ((0, rows - len(values)), (0, columns - values.shape[1])))


def assert_expert_holds(harness, experts, layer, model, expert, rank, ranks, local=None):
    """Fails unless one expert holds its share of the source's values, and zeros where it is padded."""
    bits, group_size = model.recipe.bits, model.recipe.group_size
    gate, up, down = (model.values(f"{PREFIX}.{expert}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
    local = expert if local is None else local
    inner = layer.w2_qweight.shape[1] * 16  # with padding
    halves = [
        tuple(
            padded(each, len(each), inner) if each is not None else None for each in harness.columns(half, rank, ranks)
        )
        for half in (gate, up)
    ]
    w2_rows = harness.rows(down, group_size, rank, ranks)
    groups = layer.w2_scales.shape[1]
    w2 = tuple(
        padded(each, size, down[0].shape[1]) for each, size in zip(w2_rows, (inner, groups, groups), strict=True)
    )
    for group, wanted in (("w13", harness.side_by_side(*halves)), ("w2", w2)):
        found = experts.expert_values(layer, group, local, bits)
        for name, values, expected in zip("qzs", found, wanted, strict=True):
            if expected is None:
                assert values is None
            else:
                assert_identical(values, expected, f"{group} {name} of expert {expert}")


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_every_expert_holds_its_share(harness, experts, model, rank, ranks):
    """512 inner rows at 4 ranks leave one group of 128, two of 64, four of 32, or a part of the only group."""
    layer = layer_of(harness, experts, model, rank, ranks)
    assert type(layer.quant_method).__name__ == "MarlinNativeMoEMethod"
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 1
    for expert in range(COUNT):
        assert_expert_holds(harness, experts, layer, model, expert, rank, ranks)
    factor = 32 // model.recipe.bits
    inner = INNER // ranks
    assert layer.w13_qweight.shape == (COUNT, HIDDEN // 16, 2 * inner * 16 // factor)
    assert layer.w2_qweight.shape == (COUNT, inner // 16, HIDDEN * 16 // factor)
    assert (layer.w13_weight is layer.w13_qweight, layer.w2_weight is layer.w2_qweight) == (True, True)


def test_a_rank_of_expert_parallelism_holds_its_experts(harness, experts, model):
    layer = layer_of(harness, experts, model, local=[1, 3])
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for local, expert in enumerate([1, 3]):
        assert_expert_holds(harness, experts, layer, model, expert, 0, 1, local)


# --- processing once --------------------------------------------------------------------------------------


def test_processing_twice_changes_nothing_more(harness, experts, model):
    layer = layer_of(harness, experts, model, 1, 4)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    once = harness.tensors(layer)
    assert experts.finish_experts(layer) == 1  # the kernel is set up again, on the same tensors
    harness.assert_same(harness.tensors(layer), once)


def test_tensors_of_another_process_are_taken_as_they_are(harness, experts, model):
    utils = pytest.importorskip("vllm.model_executor.utils")
    if not hasattr(utils, "weights_already_processed"):
        pytest.skip(OLD_VLLM)
    layer = layer_of(harness, experts, model, 1, 4)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    done = harness.tensors(layer)
    fresh = layer_of(harness, experts, model, 1, 4)
    assert fresh.quant_method.supports_pre_processed_weights
    for name in [name for name, _ in fresh.named_parameters()]:
        getattr(fresh, name).data = done[name].clone()
    with utils.weights_already_processed():
        assert experts.finish_experts(fresh) == 1
    harness.assert_same(harness.tensors(fresh), {name: done[name] for name in harness.tensors(fresh)})


def test_a_bias_of_experts_is_padded_half_by_half_and_permuted(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, group_size=64, sizes=(192, 128), heads=(2, 2))
    layer = layer_of(harness, experts, model, 0, 2, sizes=(192, 128))
    experts.load_experts(layer, model, PREFIX)
    generator = np.random.default_rng(0)
    w13, w2 = (generator.random((COUNT, size)).astype(np.float16) for size in (2 * 64, 192))
    for name, values in (("w13_bias", w13), ("w2_bias", w2)):
        layer.register_parameter(
            name, harness.torch.nn.Parameter(harness.torch.from_numpy(values), requires_grad=False)
        )
    experts.finish_experts(layer)
    found = reference.unpermute_columns(layer.w13_bias.data.numpy(), single_group=True).reshape(COUNT, 2, 128)
    assert_identical(found[:, :, :64], w13.reshape(COUNT, 2, 64), "w13")
    assert not found[:, :, 64:].any()
    assert_identical(reference.unpermute_columns(layer.w2_bias.data.numpy(), single_group=True), w2, "w2")


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "has_qzeros"), [(64, True), (32, False), (-1, True)])
def test_an_inner_size_that_tiles_do_not_divide_is_padded(harness, experts, tmp_path, group_size, has_qzeros):
    """A hidden size of 192 asks for inner sizes that are multiples of 128; 128 at 2 ranks are 64."""
    sizes = (192, 128)
    model = make_model(harness, tmp_path, 4, group_size, has_qzeros, sizes, heads=(2, 2))
    for rank in range(2):
        layer = layer_of(harness, experts, model, rank, 2, sizes=sizes)
        experts.load_experts(layer, model, PREFIX)
        experts.finish_experts(layer)
        assert layer.w2_qweight.shape[1] * 16 == 128
        for expert in range(COUNT):
            assert_expert_holds(harness, experts, layer, model, expert, rank, 2)


# --- experts kept in AWQ layout ---------------------------------------------------------------------------

#: Hidden and inner size of experts whose inner size Marlin cannot take as it is.
UNALIGNED = (128, 96)


@pytest.mark.parametrize(
    ("bits", "group_size", "has_qzeros"), [(4, 32, False), (8, 32, False), (4, -1, True), (8, -1, False)]
)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (2, 3)])
def test_awq_experts_that_vllm_cannot_load_are_repacked(
    harness, experts, tmp_path, bits, group_size, has_qzeros, rank, ranks
):
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, UNALIGNED, heads=(3, 3), extra={"a": (128, 64)})
    layer = layer_of(harness, experts, model, rank, ranks, sizes=UNALIGNED)
    assert layer.quant_method.tile == 1
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 1
    for expert in range(COUNT):
        assert_expert_holds(harness, experts, layer, model, expert, rank, ranks)
    once = harness.tensors(layer)
    experts.finish_experts(layer)
    harness.assert_same(harness.tensors(layer), once)


def test_awq_experts_with_zero_points_go_to_vllm(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, 4, 32, True, UNALIGNED, extra={"a": (128, 64)})
    with mock.patch("vllm.model_executor.layers.quantization.auto_awq.AutoAWQConfig.get_quant_method") as vllm_s:
        method = model.config.get_quant_method(mock.Mock(spec=experts.RoutedExperts), PREFIX)
    assert method is vllm_s.return_value


def test_experts_in_full_precision_go_to_vllm(harness, experts, tmp_path):
    weights = {f"{PREFIX}.0.up_proj.weight": (64, 64)}
    model = harness.Model(tmp_path, {"mlp.down_proj": (128, 64)}, weights=weights)
    layer = mock.Mock(spec=experts.RoutedExperts, moe_config=None)
    with mock.patch("vllm.model_executor.layers.fused_moe.UnquantizedFusedMoEMethod") as vllm_s:
        method = model.config.get_quant_method(layer, PREFIX)
    assert method is vllm_s.return_value


# --- cuts that are not whole tiles -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size", "has_qzeros"), [(4, 32, True), (8, 32, False), (4, -1, True)])
@pytest.mark.parametrize("rank", [0, 5, 15])
def test_experts_cut_within_tiles_hold_their_share(harness, experts, tmp_path, bits, group_size, has_qzeros, rank):
    """512 inner columns at 16 ranks are 32 each, half a tile, and padded to 64 or 128."""
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, heads=(16, 16))
    layer = layer_of(harness, experts, model, rank, 16)
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 1
    for expert in range(COUNT):
        assert_expert_holds(harness, experts, layer, model, expert, rank, 16)


@pytest.mark.parametrize(("bits", "group_size", "has_qzeros"), [(4, 32, True), (8, 32, False), (4, -1, True)])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (2, 3)])
def test_padded_experts_lose_their_padding(harness, experts, tmp_path, bits, group_size, has_qzeros, rank, ranks):
    model = make_model(harness, tmp_path, bits, group_size, has_qzeros, UNALIGNED, unaligned="pad", heads=(3, 3))
    assert len(model.config.contents.quantization.padded_modules) == 3 * COUNT
    layer = layer_of(harness, experts, model, rank, ranks, sizes=UNALIGNED)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for expert in range(COUNT):
        assert_expert_holds(harness, experts, layer, model, expert, rank, ranks)


# --- what is missing or refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_of_an_expert_is_named(harness, experts, tmp_path, projection, part):
    model = make_model(harness, tmp_path)
    layer = layer_of(harness, experts, model)
    name = f"{PREFIX}.2.{projection}.{part}"
    experts.load_experts(layer, model, PREFIX, leave_out=[name])
    (problem,) = refusal(experts.finish_experts, layer)
    assert (problem.tensor, problem.code) == (name, "missing-tensor")


def test_tensors_of_other_ranks_experts_are_not_missed(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    layer = layer_of(harness, experts, model, local=[0, 1])
    absent = [name for name in model.marlin if name.startswith(f"{PREFIX}.3.")]
    experts.load_experts(layer, model, PREFIX, leave_out=absent)
    assert experts.finish_experts(layer) == 1


def test_a_cut_through_a_group_names_the_largest_size_that_works(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, heads=(16, 16))
    (problem,) = refusal(layer_of, harness, experts, model, 0, 8)
    assert problem.tensor == PREFIX
    assert problem.message == (
        "64 rows on one rank are not a multiple of the group size 128. The largest tensor-parallel size that works is "
        "4: serve it with --tensor-parallel-size 4"
    )


def test_8_bits_with_zero_points_are_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, bits=8)
    (problem,) = refusal(layer_of, harness, experts, model)
    assert problem.tensor == PREFIX
    assert "vLLM's Marlin experts know 8 bits only without them" in problem.message


def test_a_hidden_size_that_vllm_s_experts_cannot_take_is_refused(harness, experts, tmp_path):
    sizes = (96, 128)
    model = make_model(harness, tmp_path, 4, 32, False, sizes, extra={"a": (128, 64)})
    (problem,) = refusal(layer_of, harness, experts, model, sizes=sizes)
    assert "hidden size 96 is not a multiple of 64" in problem.message


def test_models_that_weigh_the_inputs_of_their_experts_are_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    (problem,) = refusal(layer_of, harness, experts, model, apply_router_weight_on_input=True)
    assert "weighs the inputs of its experts" in problem.message


def test_another_backend_that_the_user_asks_for_is_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    layer_of(harness, experts, model, moe={"moe_backend": "marlin"})
    (problem,) = refusal(layer_of, harness, experts, model, moe={"moe_backend": "triton"})
    assert "'triton'" in problem.message


def test_experts_that_vllm_s_kernels_do_not_run_are_refused_with_its_reason(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    with mock.patch.object(experts.MarlinExpertsBase, "_supports_activation", return_value=False):
        (problem,) = refusal(layer_of, harness, experts, model)
    assert problem.tensor == PREFIX
    assert "vLLM's Marlin experts do not serve it: kernel does not support" in problem.message
    assert "activation" in problem.message


def test_the_older_version_gets_the_order_of_rows_that_it_asks_for(harness, experts, tmp_path, monkeypatch):
    model = make_model(harness, tmp_path)
    for takes in (True, False):
        monkeypatch.setattr("awq2marlin.integrations.vllm.experts.TAKES_ACTIVATION_ORDER", takes)
        layer = layer_of(harness, experts, model)
        experts.load_experts(layer, model, PREFIX)
        experts.finish_experts(layer)
        assert hasattr(layer, "w13_g_idx_sort_indices") == takes
        if takes:
            assert layer.w2_g_idx_sort_indices.shape == (COUNT, 0)
