"""What is SGLang's about its experts: which it does not serve, what its kernel is given, copies of experts."""

from unittest import mock

import numpy as np
import pytest

from tests.equality import assert_identical
from tests.integrations.serving.mixtures import (
    COUNT,
    HIDDEN,
    PREFIX,
    assert_expert_holds,
    layer_of,
    make_model,
    refusal,
)  # fmt: skip


@pytest.fixture
def model(harness, tmp_path):
    return make_model(harness, tmp_path, heads=(8, 8))


def loaded(experts, model, *arguments, **options):
    layer = layer_of(experts, model, *arguments, **options)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    return layer


@pytest.mark.parametrize(("group_size", "has_qzeros"), [(32, True), (32, False), (-1, True)])
def test_an_inner_size_that_tiles_do_not_divide_is_padded(harness, experts, tmp_path, group_size, has_qzeros):
    """192 at 2 ranks are 96, which come to 128."""
    sizes = (128, 192)
    model = make_model(harness, tmp_path, 4, group_size, has_qzeros, sizes, heads=(2, 2))
    for rank in range(2):
        layer = loaded(experts, model, rank, 2, sizes=sizes)
        assert layer.w2_qweight.shape[1] * 16 == 128
        for expert in range(COUNT):
            assert_expert_holds(harness, layer, model, expert, rank, 2)


def test_experts_without_a_gate_have_one_matrix_on_the_way_up(harness, experts, tmp_path):
    size = {"up_proj": (HIDDEN, 64), "down_proj": (64, HIDDEN)}
    modules = {f"{PREFIX}.{expert}.{name}": each for expert in range(COUNT) for name, each in size.items()}
    model = harness.Model(tmp_path, modules, group_size=64)
    layer = experts.experts_layer(model, PREFIX, COUNT, HIDDEN, 64, is_gated=False, activation="relu2")
    for expert in range(COUNT):
        for shard, group, name in (("w1", "w13", "up_proj"), ("w2", "w2", "down_proj")):
            for part in ("qweight", "qzeros", "scales"):
                parameter = getattr(layer, f"{group}_{part}")
                tensor = model.marlin[f"{PREFIX}.{expert}.{name}.{part}"]
                parameter.weight_loader(parameter, tensor, f"{group}_{part}", shard_id=shard, expert_id=expert)
    experts.finish_experts(layer)
    assert layer.w2_qweight.shape[1] * 16 == 128, "N of the way up is a multiple of 128"
    for expert in range(COUNT):
        found, wanted = experts.expert_values(layer, "w13", expert, 4), model.values(f"{PREFIX}.{expert}.up_proj")
        for part, one, other in zip("qzs", found, wanted, strict=True):
            assert_identical(one[:, :64], other, f"{part} of expert {expert}")
            assert not one[:, 64:].any()


def test_every_copy_of_an_expert_is_filled(harness, experts, model):
    """As with redundant experts: SGLang loads one of the file into several places."""
    places = mock.Mock(num_logical_experts=COUNT)
    places.logical_to_all_physical = lambda _layer, expert, _all: [expert, COUNT] if expert == 1 else [expert]
    with mock.patch(
        "sglang.srt.layers.moe.fused_moe_triton.layer.get_global_expert_location_metadata", return_value=places
    ):
        layer = experts.experts_layer(model, PREFIX, COUNT + 1, HIDDEN, 512)
        experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    for name, tensor in harness.tensors(layer).items():
        assert_identical(tensor[COUNT].numpy(), tensor[1].numpy(), name)


def test_a_copy_that_nobody_filled_is_missed(experts, model):
    layer = experts.experts_layer(model, PREFIX, COUNT + 1, HIDDEN, 512)
    experts.load_experts(layer, model, PREFIX)
    problems = refusal(experts.finish_experts, layer)
    assert {problem.tensor for problem in problems} == {
        f"{PREFIX}.{COUNT}.{name}.{part}"
        for name in ("gate_proj", "up_proj", "down_proj")
        for part in ("qweight", "qzeros", "scales")
    }


@pytest.mark.parametrize("apart", [1, 2])
@pytest.mark.parametrize("has_qzeros", [True, False])
def test_sglang_s_marlin_experts_get_our_tensors(harness, experts, tmp_path, has_qzeros, apart):
    model = make_model(harness, tmp_path, has_qzeros=has_qzeros)
    layer = loaded(experts, model, apart - 1, apart=apart)
    assert layer.runner_backend.is_marlin()
    layer.dispatcher.local_expert_mapping = mapping = object() if apart > 1 else None
    with mock.patch.object(layer.quant_method.runner, "run") as run:
        assert layer.quant_method.apply(layer, "tokens") is run.return_value
    tokens, given = run.call_args.args
    assert tokens == "tokens"
    for name in ("w13_qweight", "w2_qweight", "w13_scales", "w2_scales"):
        assert getattr(given, name) is getattr(layer, name)
    assert given.w13_qzeros is getattr(layer, "w13_qzeros", None)
    assert given.w2_qzeros is getattr(layer, "w2_qzeros", None)
    assert (given.w13_qzeros is None) != has_qzeros
    assert given.w13_g_idx_sort_indices.shape == given.w2_g_idx_sort_indices.shape == (COUNT // apart, 0)
    assert (given.weight_bits, given.w13_g_idx, given.w13_bias, given.w13_global_scale) == (4, None, None, None)
    assert given.expert_map is mapping
    assert given.global_num_experts == (-1 if apart == 1 else COUNT)


# --- what is refused --------------------------------------------------------------------------------------


def test_a_hidden_size_that_sglang_s_experts_cannot_take_is_refused(harness, experts, tmp_path):
    sizes = (192, 128)
    model = make_model(harness, tmp_path, 4, 64, sizes=sizes)
    (problem,) = refusal(layer_of, experts, model, sizes=sizes)
    assert "hidden size 192 is not a multiple of 128" in problem.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"apply_router_weight_on_input": True}, "applies router weights to expert inputs"),
        ({"activation": "gelu"}, "do not compute the activation 'gelu'"),
        ({"activation": "relu2"}, "do not compute the activation 'relu2'"),
        ({"with_bias": True}, "experts have biases"),
    ],
)
def test_models_that_sglang_s_experts_do_not_compute_are_refused(experts, model, options, said):
    (problem,) = refusal(layer_of, experts, model, **options)
    assert said in problem.message


@pytest.mark.parametrize(
    ("place", "backend", "said"),
    [
        ("get_moe_runner_backend", "triton", "--moe-runner-backend is triton"),
        ("get_moe_a2a_backend", "deepep", "--moe-a2a-backend is deepep"),
    ],
)
def test_other_ways_to_run_experts_are_refused(experts, model, place, backend, said):
    from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend

    chosen = (MoeRunnerBackend if place == "get_moe_runner_backend" else MoeA2ABackend)(backend)
    with mock.patch(f"awq2marlin.integrations.sglang.experts.{place}", return_value=chosen):
        (problem,) = refusal(layer_of, experts, model)
    assert said in problem.message


def test_marlin_that_the_user_asks_for_is_taken(experts, model):
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    marlin = MoeRunnerBackend("marlin")
    with mock.patch("awq2marlin.integrations.sglang.experts.get_moe_runner_backend", return_value=marlin):
        layer_of(experts, model)


def test_other_weights_for_a_running_engine_are_refused(experts, model):
    layer = layer_of(experts, model)
    (problem,) = refusal(layer.quant_method.restore_weights_before_loading, layer)
    assert "cannot be replaced while SGLang runs" in problem.message


def test_experts_in_full_precision_are_left_to_sglang(harness, experts, tmp_path):
    weights = {f"{PREFIX}.0.up_proj.weight": (64, 64)}
    model = harness.Model(tmp_path, {"mlp.down_proj": (128, 64)}, weights=weights)
    layer = layer_of(experts, model)
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"
    assert np.isfinite(layer.w2_weight.shape).all()
