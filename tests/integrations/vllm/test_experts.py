"""What is vLLM's about its experts: its kernels' shapes and reasons, other processes."""

from unittest import mock

import pytest

from tests.integrations.serving.mixtures import (
    COUNT,
    PREFIX,
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe": {"is_lora_enabled": True}}, "does not support LoRA adapters on experts"),
        ({"swiglu_limit": 7.0}, "an activation with limits or factors"),
        ({"moe": {"swiglu_limit": 7.0}}, "an activation with limits or factors"),
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


def test_experts_with_biases_are_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    (problem,) = refusal(layer_of, experts, model, moe={"has_bias": True})
    assert "have biases, which this plugin does not load" in problem.message


def test_a_hidden_size_that_vllm_rounds_up_is_refused(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    place = "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_roundup_layer_hidden_size"
    with mock.patch(place, return_value=2048):
        (problem,) = refusal(layer_of, experts, model)
    assert "rounds the hidden size 256 up to 2048" in problem.message
    assert "--all2all-backend" in problem.message


@pytest.mark.parametrize(("weights", "ids"), [("float32", "int32"), ("float16", "int64"), ("bfloat16", "uint32")])
def test_whatever_types_a_router_has_ours_take(harness, experts, model, monkeypatch, weights, ids):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    torch, layer = harness.torch, layer_of(experts, model)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    chosen, shares = torch.tensor([[1, 3], [0, 2], [3, 0]]), torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.125, 0.5]])
    wanted = experts.run_experts(layer, x, chosen.int(), shares)
    found = experts.run_experts(layer, x, chosen.to(getattr(torch, ids)), shares.to(getattr(torch, weights)))
    assert wanted.abs().max() > 0
    assert torch.equal(found, wanted)


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
