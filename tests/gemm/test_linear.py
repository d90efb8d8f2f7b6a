"""A linear layer from AWQ tensors, through loading, to its product."""

import numpy as np
import pytest
import torch

from awq2marlin.gemm.config import AWQMarlinConfig
from awq2marlin.gemm.linear import AWQMarlinLinearMethod
from tests.gemm.test_cpu_gemm import CASES, golden, golden_weight


def loaded_layer(case, device="cpu"):
    bits = int(case[1])
    group_size = int(case.split("_g")[1].split("_")[0])
    scales, qzeros = golden(case, "awq_scales"), golden(case, "awq_qzeros")
    method = AWQMarlinLinearMethod(AWQMarlinConfig(bits, group_size, qzeros is not None))
    layer = torch.nn.Module()
    size_k, size_n = golden_weight(case).shape
    method.create_weights(layer, size_k, [size_n // 2, size_n // 2], size_k, size_n, scales.dtype, weight_loader=print)
    layer.qweight.data.copy_(golden(case, "awq_qweight"))
    layer.scales.data.copy_(scales)
    if qzeros is not None:
        layer.qzeros.data.copy_(qzeros)
    return method, layer.to(device)


@pytest.mark.parametrize("case", CASES)
def test_layer_applies_the_weight_that_it_was_given(case):
    method, layer = loaded_layer(case)
    assert layer.qweight.weight_loader is print
    assert (layer.qweight.input_dim, layer.qweight.output_dim, layer.qweight.packed_dim) == (0, 1, 1)
    method.process_weights_after_loading(layer)
    weight = torch.from_numpy(golden_weight(case))
    x = torch.randn(2, 3, weight.shape[0]).to(layer.scales.dtype)
    bias = torch.randn(weight.shape[1]).to(x.dtype)
    expected = np.asarray(x.double() @ weight + bias.double())
    out = method.apply(layer, x, bias)
    assert out.shape == (2, 3, weight.shape[1])
    torch.testing.assert_close(out, torch.from_numpy(expected).to(x.dtype))


def test_layer_refuses_the_wrong_order():
    method, layer = loaded_layer(CASES[0])
    with pytest.raises(RuntimeError, match="still holds AWQ tensors"):
        method.apply(layer, torch.zeros(1, 128, dtype=torch.float16))
    method.process_weights_after_loading(layer)
    with pytest.raises(RuntimeError, match="already"):
        method.process_weights_after_loading(layer)


def test_layer_refuses_shapes_and_types_without_kernels():
    method = AWQMarlinLinearMethod(AWQMarlinConfig(4, 128, True))
    with pytest.raises(ValueError, match="K = 128, N = 48"):
        method.create_weights(torch.nn.Module(), 128, [48], 128, 48, torch.float16)
    with pytest.raises(
        ValueError, match=r"params_dtype must be torch\.float16 or torch\.bfloat16, found torch\.float32"
    ):
        method.create_weights(torch.nn.Module(), 128, [64], 128, 64, torch.float32)


@pytest.mark.parametrize(
    ("prefix", "is_quantized"),
    [
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.gate", False),
        ("visual.blocks.0.qkv", False),
        ("lm_head", False),
    ],
)
def test_a_layer_that_the_source_left_alone_has_no_method(prefix, is_quantized):
    document = {"bits": 4, "group_size": 128, "modules_to_not_convert": ["visual", "mlp.gate"]}
    method = AWQMarlinConfig.from_config(document).get_quant_method(torch.nn.Linear(8, 8), prefix)
    assert isinstance(method, AWQMarlinLinearMethod) == is_quantized


def test_a_layer_whose_name_is_not_told_is_quantized():
    config = AWQMarlinConfig(4, 128, True, ["visual"])
    assert isinstance(config.get_quant_method(torch.nn.Linear(8, 8)), AWQMarlinLinearMethod)
    assert config.get_quant_method(torch.nn.LayerNorm(8)) is None
