"""`MarlinLinear` and the repack of one module's tensors: golden layers, padding, biases, casts, refusals."""

import copy
import pickle

import pytest
import torch

from awq2marlin.gemm.config import AWQMarlinConfig
from awq2marlin.gemm.linear import AWQMarlinLinearMethod, MarlinLinear
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


# --- a packed layer stays of a type that the kernels take -------------------------------------------------


def marlin_linear():
    return MarlinLinear(128, 64, num_bits=4, group_size=64, bias=True)


def engine_layer():
    """A layer of an engine, between loading and serving."""
    layer = torch.nn.Module()
    AWQMarlinLinearMethod(AWQMarlinConfig(4, 64, True)).create_weights(layer, 128, [64], 128, 64, torch.float16)
    return layer


def processed_layer():
    layer = engine_layer()
    AWQMarlinLinearMethod(AWQMarlinConfig(4, 64, True)).process_weights_after_loading(layer)
    return layer


LAYERS = [marlin_linear, engine_layer, processed_layer]

WIDER = {
    "float": lambda layer: layer.float(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.float32),
    "to dtype=": lambda layer: layer.to(dtype=torch.float64),
    "to device and dtype": lambda layer: layer.to("cpu", torch.float32),
    "to another tensor": lambda layer: layer.to(torch.zeros(1)),
    "type": lambda layer: layer.type(torch.float32),
}

TAKEN = {
    "half": (lambda layer: layer.half(), torch.float16),
    "bfloat16": (lambda layer: layer.bfloat16(), torch.bfloat16),
    "to bfloat16": (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
    "to a device": (lambda layer: layer.to("cpu"), torch.float16),
    "to no device": (lambda layer: layer.to("meta"), torch.float16),
    "cpu": (lambda layer: layer.cpu(), torch.float16),
    "to_empty": (lambda layer: layer.to_empty(device="cpu"), torch.float16),
    "share_memory": (lambda layer: layer.share_memory(), torch.float16),
}


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("cast", WIDER.values(), ids=WIDER)
def test_a_packed_layer_refuses_types_that_the_kernels_do_not_take(make, cast):
    layer = make()
    model = torch.nn.Sequential(layer)
    before = {name: (each.dtype, each.data_ptr()) for name, each in layer.named_parameters()}
    for each in (layer, model):
        with pytest.raises(TypeError, match=r"must be torch\.float16 or torch\.bfloat16, found torch\.float(32|64)"):
            cast(each)
    assert {name: (each.dtype, each.data_ptr()) for name, each in layer.named_parameters()} == before


@pytest.mark.parametrize("make", LAYERS)
def test_a_packed_layer_keeps_its_words(make):
    with pytest.raises(TypeError, match=r"qweight of a packed layer must be torch\.int32, found torch\.float16"):
        make().type(torch.float16)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(("cast", "dtype"), TAKEN.values(), ids=TAKEN)
def test_a_packed_layer_moves_and_casts_to_what_they_take(make, cast, dtype):
    layer = make()
    assert cast(layer) is layer
    assert (layer.scales.dtype, layer.qweight.dtype) == (dtype, torch.int32)
    cast(torch.nn.Sequential(layer))
    assert layer.scales.dtype == dtype


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pickle"]
)
def test_a_copy_is_a_layer_of_its_own(make, copied):
    layer = make()
    other = copied(layer).bfloat16()
    assert (layer.scales.dtype, other.scales.dtype) == (torch.float16, torch.bfloat16)
    with pytest.raises(TypeError, match="must be"):
        other.float()
