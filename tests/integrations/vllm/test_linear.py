"""What is vLLM's about its linear layers: weights of other processes."""

import pytest

from tests.skips import OLD_VLLM


@pytest.fixture
def finished(harness, tmp_path):
    """A layer of rank 3 of 4 with a bias and a single group, whose scales change their order: (model, layer)."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (512, 256)}, weights={"mlp.down_proj.bias": (256,)})
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 512, 256, bias=True, rank=3, ranks=4)
    harness.load(layer, model, {None: "mlp.down_proj"})
    loaded = harness.tensors(layer)
    harness.finish(layer)
    assert not harness.torch.equal(loaded["scales"], layer.scales)
    assert harness.torch.equal(loaded["bias"], layer.bias)
    assert not harness.torch.equal(loaded["bias"], layer.ordered_bias)
    return model, layer


def test_tensors_of_another_process_are_taken_as_they_are(harness, finished):
    """As vLLM 0.33 hands processed weights over: into fresh parameters, under weights_already_processed."""
    utils = pytest.importorskip("vllm.model_executor.utils")
    if not hasattr(utils, "weights_already_processed"):
        pytest.skip(OLD_VLLM)
    model, layer = finished
    done = harness.tensors(layer)
    for keep_parameters in (True, False):
        fresh = harness.build("RowParallelLinear", model, "mlp.down_proj", 512, 256, bias=True, rank=3, ranks=4)
        assert fresh.quant_method.supports_pre_processed_weights
        for name, tensor in done.items():
            if keep_parameters:
                getattr(fresh, name).data = tensor.clone()
            else:
                delattr(fresh, name)
                fresh.register_parameter(name, harness.torch.nn.Parameter(tensor.clone(), requires_grad=False))
        shared = harness.torch.full_like(layer.ordered_bias, 7)  # another process's, in another kernel's order
        fresh.register_buffer("ordered_bias", shared, persistent=False)
        with utils.weights_already_processed():
            harness.finish(fresh)
        harness.assert_same(harness.tensors(fresh), done)
        assert harness.torch.equal(fresh.ordered_bias, layer.ordered_bias)
        assert bool((shared == 7).all()), "it was written to"
