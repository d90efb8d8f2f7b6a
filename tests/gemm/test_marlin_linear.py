"""`MarlinLinear` and the repack of one module's tensors: golden layers, padding, biases, shapes that do not fit."""

import pytest
import torch

from awq2marlin.gemm.linear import MarlinLinear
from awq2marlin.gemm.module_repack import awq_to_marlin, marlin_to_awq
from awq2marlin.layout.modules import ModulePlan
from tests.gemm.test_cpu_gemm import CASES, golden, golden_weight

PARTS = ("qweight", "qzeros", "scales")


def module_of(case, padded=None):
    size_k, size_n = golden_weight(case).shape
    return ModulePlan("layer", size_k, size_n, *(padded or (size_k, size_n)), PARTS, converted=False)


def numbers_of(case):
    return {"num_bits": int(case[1]), "group_size": int(case.split("_g")[1].split("_")[0])}


@pytest.mark.parametrize("case", CASES)
def test_every_part_becomes_the_golden_one_and_comes_back(case):
    module, numbers = module_of(case), numbers_of(case)
    for part in PARTS:
        awq, marlin = golden(case, f"awq_{part}"), golden(case, f"marlin_{part}")
        if awq is not None:
            assert torch.equal(awq_to_marlin(part, awq, module, **numbers), marlin), part
            assert torch.equal(marlin_to_awq(part, marlin, module, **numbers), awq), part


def cut(case, size_k, size_n):
    """The AWQ tensors of the first rows and columns of a golden layer."""
    numbers = numbers_of(case)
    factor, rows = 32 // numbers["num_bits"], numbers["group_size"]
    qweight, scales = golden(case, "awq_qweight")[:size_k], golden(case, "awq_scales")[: size_k // rows]
    qzeros = golden(case, "awq_qzeros")
    parts = {"qweight": qweight[:, : size_n // factor], "scales": scales[:, :size_n]}
    return parts if qzeros is None else {**parts, "qzeros": qzeros[: size_k // rows, : size_n // factor]}


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("case", [case for case in CASES if numbers_of(case)["group_size"] == 32])
def test_a_padded_layer_gives_the_product_of_its_true_sizes(case, has_bias):
    numbers, weight = numbers_of(case), torch.from_numpy(golden_weight(case))
    size_k, size_n = weight.shape[0] - 32, weight.shape[1] - 40
    padded = (weight.shape[0], weight.shape[1])
    module = ModulePlan("layer", size_k, size_n, *padded, PARTS, converted=False)
    parts = cut(case, size_k, size_n)
    layer = MarlinLinear(
        size_k,
        size_n,
        **numbers,
        zero_points="qzeros" in parts,
        bias=has_bias,
        padded=padded,
        dtype=parts["scales"].dtype,
    )
    for part, tensor in parts.items():
        packed = awq_to_marlin(part, tensor, module, **numbers)
        assert packed.shape == getattr(layer, part).shape
        assert torch.equal(marlin_to_awq(part, packed, module, **numbers), tensor)
        getattr(layer, part).data.copy_(packed)
    x = torch.randn(2, 3, size_k, generator=torch.Generator().manual_seed(0)).to(layer.scales.dtype)
    expected = x.double() @ weight[:size_k, :size_n]
    if has_bias:
        layer.bias.data.copy_(torch.linspace(-1, 1, size_n))
        expected += layer.bias.double()
    out = layer(x)
    assert out.shape == (2, 3, size_n)
    torch.testing.assert_close(out, expected.to(x.dtype), rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6)
    assert torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), out)


def test_a_layer_that_kernels_do_not_take_is_refused():
    with pytest.raises(ValueError, match="K = 96, N = 64 cannot run on Marlin kernels"):
        MarlinLinear(96, 64, num_bits=4, group_size=32)


def test_activations_of_another_type_are_refused():
    layer = MarlinLinear(128, 64, num_bits=4, group_size=64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"scales must be torch\.float16, found torch\.bfloat16"):
        layer(torch.zeros(1, 128, dtype=torch.float16))
