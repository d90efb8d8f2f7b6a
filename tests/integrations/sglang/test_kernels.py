"""SGLang's own GEMM: with what arguments."""

import inspect
from unittest import mock

import pytest

from tests.integrations.serving.test_kernels import row_layer

KERNELS = "awq2marlin.integrations.sglang.kernels"


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_qzeros", [True, False])
def test_sglang_s_kernel_gets_padded_rows_and_gives_the_columns_of_the_layer(harness, tmp_path, has_qzeros, has_bias):
    """320 rows and 192 columns are padded to 384 and 192; 96 columns to 128."""
    torch, weights = harness.torch, {"mlp.down_proj.bias": (96,)} if has_bias else {}
    model = harness.Model(
        tmp_path, {"mlp.down_proj": (320, 96)}, has_qzeros=has_qzeros, group_size=64, unaligned="pad", weights=weights
    )
    layer = row_layer(harness, model, 320, 96, bias=has_bias)
    size_k, size_n = layer.qweight.shape[0] * 16, layer.scales.shape[1]
    assert (size_k, size_n) != (320, 96)
    x = torch.ones(2, 3, 320, dtype=torch.half)
    out = torch.arange(6 * size_n, dtype=torch.half).view(6, size_n)
    with mock.patch(f"{KERNELS}.apply_gptq_marlin_linear", return_value=out) as gemm:
        found = layer.quant_method.apply(layer, x, layer.bias)
    assert torch.equal(found, out[:, :96].view(2, 3, 96))
    given = gemm.call_args.kwargs
    assert torch.equal(given["input"], torch.cat([x.view(6, 320), x.new_zeros(6, size_k - 320)], dim=1))
    assert (given["input_size_per_partition"], given["output_size_per_partition"]) == (size_k, size_n)
    assert given["weight"] is layer.qweight
    assert given["weight_scale"] is layer.scales
    assert given["weight_zp"] is layer.qzeros if has_qzeros else given["weight_zp"].numel() == 0
    assert given["wtype"] == ("mock_uint4" if has_qzeros else "uint4b8")  # SGLang's names without its kernels
    assert given["is_k_full"] is True
    assert given["g_idx"].numel() == given["g_idx_sort_indices"].numel() == 0
    if has_bias:
        plain = torch.cat([model.awq["mlp.down_proj.bias"], x.new_zeros(size_n - 96)])
        assert torch.equal(given["bias"], plain), "SGLang adds it after its kernel"
    else:
        assert given["bias"] is None


def test_the_arguments_are_those_of_the_installed_sglang(harness):
    from awq2marlin.integrations.sglang.kernels import SglangMarlinKernel, apply_gptq_marlin_linear, weight_type

    kernel = SglangMarlinKernel(weight_type(4, True), True, 256, 128, harness.torch.device("cpu"))
    layer = mock.Mock(qweight=harness.torch.zeros(16, 256), scales=harness.torch.zeros(2, 128))
    with mock.patch(f"{KERNELS}.apply_gptq_marlin_linear") as gemm:
        gemm.return_value = harness.torch.zeros(1, 128)
        kernel(layer, harness.torch.zeros(1, 256), None)
    parameters = inspect.signature(apply_gptq_marlin_linear).parameters
    names = {*gemm.call_args.kwargs}
    assert names <= parameters.keys()
    required = {name for name, each in parameters.items() if each.default is each.empty}
    assert required <= names


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("bits", "zeros", "name"),
    [(4, True, "mock_uint4"), (4, False, "uint4b8"), (8, False, "uint8b128"), (8, True, "None")],
)
def test_types_of_weights(bits, zeros, name):
    from awq2marlin.integrations.sglang.kernels import weight_type

    assert str(weight_type(bits, zeros)) == name
