"""vLLM's own GEMM: with what arguments, and how graphs that hold it are told from others."""

import inspect
from unittest import mock

import pytest

from tests.integrations.serving.test_kernels import row_layer

pytestmark = pytest.mark.usefixtures("harness")

KERNELS = "awq2marlin.integrations.vllm.kernels"


@pytest.mark.parametrize("setting", ["own", "engine", "auto"])
def test_compiled_graphs_are_kept_apart_by_kernel(harness, tmp_path, monkeypatch, setting):
    from vllm import envs

    from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE

    monkeypatch.setenv(KERNEL_VARIABLE, setting)
    row_layer(harness, harness.Model(tmp_path, {"mlp.down_proj": (256, 192)}), 256)
    assert envs.compile_factors()[KERNEL_VARIABLE] == ("own" if setting == "own" else "engine")


@pytest.mark.parametrize("takes_order", [True, False])
@pytest.mark.parametrize("has_qzeros", [True, False])
def test_vllm_s_kernel_gets_what_its_version_takes(harness, tmp_path, monkeypatch, takes_order, has_qzeros):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 192)}, has_qzeros=has_qzeros)
    workspace = harness.torch.zeros(1)
    helpers = "vllm.model_executor.layers.quantization.utils.marlin_utils"
    monkeypatch.setattr(f"{KERNELS}.TAKES_ACTIVATION_ORDER", takes_order)
    with (
        mock.patch(f"{helpers}.marlin_make_workspace_new", return_value=workspace, create=True),
        mock.patch(f"{KERNELS}.apply_gptq_marlin_linear") as gemm,
    ):
        layer = row_layer(harness, model, 256)
        x = harness.torch.ones(2, 256, dtype=harness.torch.half)
        assert layer.quant_method.apply(layer, x, None) is gemm.return_value
    given = gemm.call_args.kwargs
    assert given["input"] is x
    assert given["weight"] is layer.qweight
    assert given["weight_scale"] is layer.scales
    assert given["bias"] is None
    assert given["weight_zp"] is layer.qzeros if has_qzeros else given["weight_zp"].numel() == 0
    assert str(given["wtype"]) == ("uint4" if has_qzeros else "uint4b8")
    assert (given["input_size_per_partition"], given["output_size_per_partition"]) == (256, 192)
    order = {"g_idx", "g_idx_sort_indices", "is_k_full"}
    if takes_order:
        assert order <= given.keys()
        assert given["workspace"] is workspace
        assert given["is_k_full"] is True
        assert given["g_idx"].numel() == given["g_idx_sort_indices"].numel() == 0
    else:
        assert order.isdisjoint(given)
        assert given["workspace"] is None


def test_the_arguments_are_those_of_the_installed_vllm(harness):
    from awq2marlin.integrations.vllm.kernels import VllmMarlinKernel, apply_gptq_marlin_linear, weight_type

    helpers = "vllm.model_executor.layers.quantization.utils.marlin_utils"
    with mock.patch(f"{helpers}.marlin_make_workspace_new", create=True):
        kernel = VllmMarlinKernel(weight_type(4, True), True, 256, 128, harness.torch.device("cpu"))
    names = {"input", "weight", "weight_scale", "weight_zp", "bias", *kernel._facts}
    parameters = inspect.signature(apply_gptq_marlin_linear).parameters
    assert names <= parameters.keys()
    required = {name for name, each in parameters.items() if each.default is each.empty}
    assert required <= names


@pytest.mark.parametrize(
    ("bits", "zeros", "name"),
    [(4, True, "uint4"), (4, False, "uint4b8"), (8, False, "uint8b128"), (8, True, "None")],
)
def test_types_of_weights(bits, zeros, name):
    from awq2marlin.integrations.vllm.kernels import weight_type

    assert str(weight_type(bits, zeros)) == name
