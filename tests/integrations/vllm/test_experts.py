"""What is vLLM's about its experts: its kernels' shapes and reasons, biases, its own AWQ code, other processes."""

from unittest import mock

import numpy as np
import pytest

from awq2marlin.layout import reference
from tests.equality import assert_identical
from tests.integrations.serving.mixtures import (
    COUNT,
    PREFIX,
    UNALIGNED,
    assert_expert_holds,
    layer_of,
    make_model,
    refusal,
)  # fmt: skip
from tests.skips import OLD_VLLM


@pytest.fixture
def model(harness, tmp_path):
    return make_model(harness, tmp_path, heads=(8, 8))


def test_the_names_that_vllm_s_experts_look_for_are_the_tensors(experts, model):
    layer = layer_of(experts, model)
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 1, "the kernel is set up"
    assert experts.finish_experts(layer) == 1, "and again, on the same tensors"
    assert (layer.w13_weight is layer.w13_qweight, layer.w2_weight is layer.w2_qweight) == (True, True)


def test_tensors_of_another_process_are_taken_as_they_are(harness, experts, model):
    utils = pytest.importorskip("vllm.model_executor.utils")
    if not hasattr(utils, "weights_already_processed"):
        pytest.skip(OLD_VLLM)
    layer = layer_of(experts, model, 1, 4)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    done = harness.tensors(layer)
    fresh = layer_of(experts, model, 1, 4)
    assert fresh.quant_method.supports_pre_processed_weights
    for name in [name for name, _ in fresh.named_parameters()]:
        getattr(fresh, name).data = done[name].clone()
    with utils.weights_already_processed():
        assert experts.finish_experts(fresh) == 1
    harness.assert_same(harness.tensors(fresh), {name: done[name] for name in harness.tensors(fresh)})


def test_a_bias_of_experts_is_padded_half_by_half_and_permuted(harness, experts, tmp_path):
    model = make_model(harness, tmp_path, group_size=64, sizes=(192, 128), heads=(2, 2))
    layer = layer_of(experts, model, 0, 2, sizes=(192, 128))
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


def test_ours_stand_where_vllm_calls_its_marlin_experts(experts, model, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    layer = layer_of(experts, model)
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 0, "vLLM's kernel is not asked for"
    kernel = layer.quant_method.moe_kernel
    assert type(kernel.prepare_finalize).__name__ == "MoEPrepareAndFinalizeNoDPEPModular"
    assert type(kernel.fused_experts).__name__ == "OwnExperts"
    assert not kernel.supports_lora()
    kernel.fused_experts.post_gemm2_hook = lambda *_: None
    x = layer.w13_scales.new_zeros((1, 256))
    with pytest.raises(NotImplementedError, match="set AWQ2MARLIN_KERNEL=engine"):
        experts.run_experts(layer, x, x[:, :2].int(), x[:, :2].float())


def test_ours_add_biases_in_plain_order(harness, experts, model, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    torch, layer = harness.torch, layer_of(experts, model)
    experts.load_experts(layer, model, PREFIX)
    values = torch.randn(COUNT, 2 * 512 + 256, generator=torch.Generator().manual_seed(0)).half()
    for name, bias in (("w13_bias", values[:, :1024]), ("w2_bias", values[:, 1024:])):
        layer.register_parameter(name, torch.nn.Parameter(bias.contiguous(), requires_grad=False))
    experts.finish_experts(layer)
    x, ids = torch.zeros(1, 256).half(), torch.tensor([[1, 3]], dtype=torch.int32)
    found = experts.run_experts(layer, x, ids, torch.tensor([[1.0, 0.0]]))
    gate, up = values[1, :1024].double().chunk(2)
    q, z, s = (each.astype(np.float64) for each in model.values(f"{PREFIX}.1.down_proj"))
    down = (q - z.repeat(128, 0)) * s.repeat(128, 0)
    wanted = (torch.nn.functional.silu(gate) * up).numpy() @ down + values[1, 1024:].double().numpy()
    assert np.allclose(found[0].double().numpy(), wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe": {"is_lora_enabled": True}}, "takes no LoRA adapters on experts"),
        ({"swiglu_limit": 7.0}, "an activation with limits or factors"),
    ],
)
def test_vllm_s_experts_serve_what_ours_cannot(experts, model, monkeypatch, caplog, change, said):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    layer = layer_of(experts, model, **change)
    experts.load_experts(layer, model, PREFIX)
    assert experts.finish_experts(layer) == 1
    assert layer.quant_method.kernel == "engine"
    ((level, text),) = [(record.levelname, record.getMessage()) for record in caplog.records if said in record.message]
    assert level == "WARNING"
    assert "experts in Marlin layout run on vLLM's Marlin" in text


@pytest.mark.parametrize(("group_size", "has_qzeros"), [(64, True), (32, False), (-1, True)])
def test_an_inner_size_that_tiles_do_not_divide_is_padded(harness, experts, tmp_path, group_size, has_qzeros):
    """A hidden size of 192 asks for inner sizes that are multiples of 128; 128 at 2 ranks are 64."""
    sizes = (192, 128)
    model = make_model(harness, tmp_path, 4, group_size, has_qzeros, sizes, heads=(2, 2))
    for rank in range(2):
        layer = layer_of(experts, model, rank, 2, sizes=sizes)
        experts.load_experts(layer, model, PREFIX)
        experts.finish_experts(layer)
        assert layer.w2_qweight.shape[1] * 16 == 128
        for expert in range(COUNT):
            assert_expert_holds(harness, layer, model, expert, rank, 2)


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


def test_a_hidden_size_that_vllm_s_experts_cannot_take_is_refused(harness, experts, tmp_path):
    sizes = (96, 128)
    model = make_model(harness, tmp_path, 4, 32, False, sizes, extra={"a": (128, 64)})
    (problem,) = refusal(layer_of, experts, model, sizes=sizes)
    assert "hidden size 96 is not a multiple of 64" in problem.message


def test_models_that_weigh_the_inputs_of_their_experts_are_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    (problem,) = refusal(layer_of, experts, model, apply_router_weight_on_input=True)
    assert "applies router weights to expert inputs" in problem.message


def test_another_backend_that_the_user_asks_for_is_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    layer_of(experts, model, moe={"moe_backend": "marlin"})
    (problem,) = refusal(layer_of, experts, model, moe={"moe_backend": "triton"})
    assert "'triton'" in problem.message


def test_experts_that_vllm_s_kernels_do_not_run_are_refused_with_its_reason(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    with mock.patch.object(experts.MarlinExpertsBase, "_supports_activation", return_value=False):
        (problem,) = refusal(layer_of, experts, model)
    assert problem.tensor == PREFIX
    assert "vLLM's Marlin experts do not serve it: kernel does not support" in problem.message
    assert "activation" in problem.message


def test_the_older_version_gets_the_order_of_rows_that_it_asks_for(harness, experts, tmp_path, monkeypatch):
    model = make_model(harness, tmp_path)
    for takes in (True, False):
        monkeypatch.setattr("awq2marlin.integrations.vllm.experts.TAKES_ACTIVATION_ORDER", takes)
        layer = layer_of(experts, model)
        experts.load_experts(layer, model, PREFIX)
        experts.finish_experts(layer)
        assert hasattr(layer, "w13_g_idx_sort_indices") == takes
        if takes:
            assert layer.w2_g_idx_sort_indices.shape == (COUNT, 0)
