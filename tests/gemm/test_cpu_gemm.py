"""The operator without a GPU: values, shapes, refusals, compilation by torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from awq2marlin.gemm import checks, ops
from awq2marlin.gemm import cpu as cpu_gemm
from awq2marlin.gemm.checks import GemmTensors, check_addresses, check_gemm, remembered
from tests.gemm.gemm_cases import DTYPES, SMALL_SHAPES, random_layer, random_tokens

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "marlin_layout.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files})


def golden(case, name):
    key = f"{case}/{name}"
    if key not in GOLDEN.files:
        return None
    tensor = torch.from_numpy(GOLDEN[key])
    return tensor.view(torch.bfloat16) if case.endswith("bf16") and name.endswith("scales") else tensor


def golden_weight(case):
    """The weight in plain NumPy and float64, from the unpacked integers."""
    q = GOLDEN[f"{case}/q"].astype(np.float64)
    scales = golden(case, "awq_scales").double().numpy()
    bits = int(case[1])
    zeros = (
        GOLDEN[f"{case}/z"].astype(np.float64)
        if f"{case}/z" in GOLDEN.files
        else np.full(scales.shape, 2.0 ** (bits - 1))
    )
    rows = q.shape[0] // scales.shape[0]
    return (q - zeros.repeat(rows, 0)) * scales.repeat(rows, 0)


@pytest.mark.parametrize("case", CASES)
def test_golden_layer_gives_the_float64_product_rounded_once(case):
    bits, weight = int(case[1]), golden_weight(case)
    scales = golden(case, "marlin_scales")
    a = torch.randn(5, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(scales.dtype)
    bias = torch.randn(weight.shape[1]).to(scales.dtype)
    out = ops.marlin_gemm(a, golden(case, "marlin_qweight"), scales, golden(case, "marlin_qzeros"), bias, num_bits=bits)
    exact = torch.from_numpy(a.double().numpy() @ weight + bias.double().numpy())
    torch.testing.assert_close(out, exact.to(a.dtype), rtol=2 * torch.finfo(a.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_identity_returns_the_decoded_weight_bit_for_bit(case):
    bits, weight = int(case[1]), torch.from_numpy(golden_weight(case))
    scales = golden(case, "marlin_scales")
    eye = torch.eye(weight.shape[0], dtype=scales.dtype)
    out = ops.marlin_gemm(eye, golden(case, "marlin_qweight"), scales, golden(case, "marlin_qzeros"), num_bits=bits)
    assert torch.equal(out, weight.to(scales.dtype))


@pytest.mark.parametrize("case", CASES)
def test_repack_gives_the_golden_bytes(case):
    packed = ops.repack_awq(golden(case, "awq_qweight"), num_bits=int(case[1]))
    assert torch.equal(packed, golden(case, "marlin_qweight"))


def test_no_tokens_give_an_empty_result():
    layer = random_layer(128, 64, 32)
    assert layer(torch.empty(0, 128, dtype=torch.float16)).shape == (0, 64)


def test_column_slices_are_taken_as_they_are():
    layer = random_layer(128, 320, 32)
    a = random_tokens(3, layer)
    part = ops.marlin_gemm(a, layer.qweight[:, 128:512], layer.scales[:, 64:256], layer.qzeros[:, 8:32])
    assert torch.equal(part, layer(a)[:, 64:256])


def test_wide_layers_are_decoded_in_pieces(monkeypatch):
    layer = random_layer(128, 320, 64, has_bias=True)
    a = random_tokens(2, layer)
    whole = layer(a)
    monkeypatch.setattr(cpu_gemm, "PIECE_BYTES", 1)
    torch.testing.assert_close(layer(a), whole, rtol=1e-3, atol=0)


LAYER = random_layer(256, 128, 64, has_bias=True)
TOKENS = random_tokens(2, LAYER)

REFUSALS = [
    ({"num_bits": 3}, ValueError, r"num_bits must be one of \(4, 8\), found 3"),
    ({"a": TOKENS.float()}, TypeError, "a must be torch.float16 or torch.bfloat16, found torch.float32"),
    ({"a": TOKENS[0]}, ValueError, r"a must have the shape \[M, K\], found \[256\]"),
    (
        {"a": TOKENS[:, :128]},
        ValueError,
        r"qweight must have the shape \[128/16, N\*16/8\], as a has \[2, 128\], found \[16, 256\]",
    ),
    ({"a": random_tokens(256, LAYER).t()}, ValueError, "a must have a last stride of 1, found strides"),
    (
        {"a": torch.zeros(2, 257, dtype=torch.float16)[:, :256]},
        ValueError,
        "a must have a row stride and an offset that are multiples of 8, .* found 257 and 0",
    ),
    (
        {"a": torch.zeros(2, 264, dtype=torch.float16)[:, 4:260]},
        ValueError,
        "a must have a row stride .* found 264 and 4",
    ),
    ({"qweight": LAYER.qweight.long()}, TypeError, "qweight must be torch.int32, found torch.int64"),
    (
        {"qweight": LAYER.qweight[:, :64]},
        ValueError,
        r"qweight must have the shape .* with N a multiple of 64 and K of 128.*: K = 256, N = 32",
    ),
    ({"qweight": LAYER.qweight.t().contiguous().t()}, ValueError, "qweight must have a last stride of 1"),
    ({"scales": LAYER.scales.bfloat16()}, TypeError, "scales must be torch.float16, found torch.bfloat16"),
    ({"scales": LAYER.scales[:, :64]}, ValueError, r"scales must have the shape \[G, 128\], .*, found \[4, 64\]"),
    ({"scales": LAYER.scales[:3]}, ValueError, r"scales must have .* G = 1, or one of 8, 4, 2 .*, found \[3, 128\]"),
    ({"scales": LAYER.scales[:0]}, ValueError, r"scales must have .* G = 1, .*, found \[0, 128\]"),
    ({"qzeros": LAYER.qzeros[:2]}, ValueError, r"qzeros must have the shape \[4, 16\], found \[2, 16\]"),
    (
        {"qzeros": torch.zeros(4, 18, dtype=torch.int32)[:, :16]},
        ValueError,
        r"qzeros must have a row stride and an offset .* of 4, .* found 18 and 0; call qzeros.clone\(\)$",
    ),
    ({"qzeros": LAYER.scales}, TypeError, "qzeros must be torch.int32, found torch.float16"),
    ({"bias": LAYER.bias[:64]}, ValueError, r"bias must have the shape \[128\], found \[64\]"),
    ({"bias": LAYER.bias.float()}, TypeError, "bias must be torch.float16, found torch.float32"),
    ({"qzeros": LAYER.qzeros.to("meta")}, ValueError, "qzeros must be on the device of a, cpu, found meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_a_refusal_names_the_argument_what_was_found_and_what_is_needed(change, error, message):
    arguments = {
        "a": TOKENS,
        "qweight": LAYER.qweight,
        "scales": LAYER.scales,
        "qzeros": LAYER.qzeros,
        "bias": LAYER.bias,
    }

    # A mixture of devices does not get past torch's dispatcher on a CPU: the check itself is asked.
    def check(**arguments):
        return check_gemm(GemmTensors(**arguments))

    call = check if "meta" in message else ops.marlin_gemm
    with pytest.raises(error, match=message):
        call(**{"num_bits": 4, **arguments, **change})


@pytest.mark.parametrize(
    ("shape", "message"), [((15, 8), "K a multiple of 16"), ((16, 4), "N of 64"), ((16,), r"\[K, N/f\]")]
)
def test_repack_refuses_what_has_no_whole_tiles(shape, message):
    with pytest.raises(ValueError, match=message):
        ops.repack_awq(torch.zeros(shape, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck_finds_nothing():
    for layer in (LAYER, random_layer(128, 64, -1, num_bits=8, has_zeros=False)):
        a = random_tokens(3, layer)
        arguments = (a, layer.qweight, layer.scales, layer.qzeros, layer.bias, layer.num_bits)
        torch.library.opcheck(torch.ops.awq2marlin.marlin_gemm.default, arguments)
    packed = torch.zeros(32, 8, dtype=torch.int32)
    torch.library.opcheck(torch.ops.awq2marlin.awq_marlin_repack.default, (packed, 4))


def test_works_under_torch_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, a):
            return torch.relu(LAYER(a))

    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), Model()(TOKENS))
    exported = torch.export.export(Model(), (TOKENS,), dynamic_shapes={"a": {0: torch.export.Dim("tokens", min=2)}})
    more = random_tokens(7, LAYER)
    assert torch.equal(exported.module()(more), Model()(more))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size_k", "size_n"), SMALL_SHAPES)
def test_every_alignment_works(size_k, size_n, dtype):
    for group_size in (32, -1):
        layer = random_layer(size_k, size_n, group_size, num_bits=8, dtype=dtype)
        a = random_tokens(2, layer)
        torch.testing.assert_close(layer(a), (a.double() @ layer.weight).to(dtype))


def test_activations_and_bias_have_the_gradients_of_the_decoded_weight():
    layer = random_layer(256, 192, 64, has_bias=True)
    a, bias = random_tokens(5, layer).requires_grad_(), layer.bias.requires_grad_()
    grad = torch.randn(5, 192, generator=torch.Generator().manual_seed(3)).half()
    ops.marlin_gemm(a, layer.qweight, layer.scales, layer.qzeros, bias).backward(grad)
    torch.testing.assert_close(a.grad.double(), grad.double() @ layer.weight.t(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when torch.func loads its rules
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "dual tensors", "compiled"])
@pytest.mark.parametrize("name", ["a", "bias", "scales"])
def test_derivatives_in_forward_mode_are_refused_and_not_lost(name, transform):
    layer = random_layer(128, 64, 64, has_bias=True)
    whole = {"a": random_tokens(2, layer), "scales": layer.scales, "bias": layer.bias}
    given = whole[name]

    def product(tensor):
        arguments = whole | {name: tensor}
        return ops.marlin_gemm(arguments["a"], layer.qweight, arguments["scales"], layer.qzeros, arguments["bias"])

    def jvp(tensor):
        return torch.func.jvp(product, (tensor,), (tensor,))

    def with_dual_tensors(tensor):
        with torch.no_grad(), forward_ad.dual_level():
            return product(forward_ad.make_dual(tensor, tensor))

    refused = pytest.raises(Exception if transform == "compiled" else NotImplementedError, match="forward mode")
    call = {"jvp": jvp, "jacfwd": torch.func.jacfwd(product), "dual tensors": with_dual_tensors}.get(transform)
    with refused:
        (call or torch.compile(jvp, backend="aot_eager", fullgraph=True))(given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when torch.func loads its rules
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "of each row"])
@pytest.mark.parametrize("name", ["a", "bias"])
def test_gradients_of_torch_func_are_refused_in_our_words(name, transform):
    layer = random_layer(128, 64, 64, has_bias=True)
    whole = {"a": random_tokens(2, layer), "bias": layer.bias}

    def total(tensor):
        arguments = whole | {name: tensor}
        return ops.marlin_gemm(arguments["a"], layer.qweight, layer.scales, layer.qzeros, arguments["bias"]).sum()

    call = {
        "grad": torch.func.grad(total), "vjp": lambda tensor: torch.func.vjp(total, tensor),
        "jacrev": torch.func.jacrev(total),
        "of each row": lambda tensor: torch.vmap(torch.func.grad(total))(tensor[None]),
    }[transform]  # fmt: skip
    with pytest.raises(
        NotImplementedError, match=r"^marlin_gemm has no gradients under torch.func .* use backward\(\)"
    ):
        call(whole[name])
    gradient = torch.autograd.functional.vjp(total, whole[name])[1]  # what it names instead
    assert gradient.shape == whole[name].shape
    assert gradient.any()


def test_rows_of_torch_vmap_have_gradients():
    layer = random_layer(128, 64, 64)
    a = random_tokens(4, layer).reshape(2, 2, 128).requires_grad_()
    torch.vmap(lambda rows: ops.marlin_gemm(rows, layer.qweight, layer.scales, layer.qzeros))(a).sum().backward()
    assert torch.equal(a.grad[0, 0], a.grad[1, 1])
    assert a.grad.any()


def test_older_versions_of_pytorch_refuse_them_in_the_public_call():
    script = """
import torch
if hasattr(torch.library, "get_kernel"):
    del torch.library.get_kernel
from awq2marlin import marlin_gemm
weight, scales = torch.zeros(8, 128, dtype=torch.int32), torch.ones(1, 64, dtype=torch.half)
a = torch.ones(1, 128, dtype=torch.half)
assert marlin_gemm(a, weight, scales).shape == (1, 64)
for transform in (
    lambda f: torch.func.jvp(f, (a,), (a,)), lambda f: torch.func.jacfwd(f)(a), lambda f: torch.func.vjp(f, a)
):
    try:
        transform(lambda a: marlin_gemm(a, qweight=weight, scales=scales))
    except NotImplementedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        *2 * ["marlin_gemm has no derivatives in forward mode"], "marlin_gemm has no gradients under torch.func",
    ]  # fmt: skip


def test_scales_have_no_gradient_and_say_so():
    layer = random_layer(128, 64, 64)
    with pytest.raises(NotImplementedError, match="scales"):
        ops.marlin_gemm(random_tokens(1, layer), layer.qweight, layer.scales.requires_grad_(), layer.qzeros)


def test_memory_that_begins_between_the_steps_of_a_load_is_refused():
    whole = torch.zeros(1 << 10, dtype=torch.float16)
    shifted = torch.from_dlpack(whole[1:129].view(1, 128))  # an offset of 0, at an address that is no multiple of 16
    assert shifted.storage_offset() == 0
    with pytest.raises(ValueError, match=r"a must begin at a multiple of 16 bytes, .* found address 0x[0-9a-f]+"):
        check_addresses(a=(shifted, 16))
    check_addresses(a=(whole, 16), bias=(None, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": torch.ones(2, 64)}, TypeError, "scales must be .*, found torch.float32"),
        ({"qweight": torch.tensor(1, dtype=torch.int32)}, ValueError, r"qweight must have the shape .*, found \[\]"),
        ({}, ValueError, "qweight must be on a CUDA device, .*, found cpu"),
    ],
)
def test_a_warm_up_names_the_argument_it_refuses(change, error, message):
    layer = random_layer(128, 64, 64)
    arguments = {"qweight": layer.qweight, "scales": layer.scales, **change}
    with pytest.raises(error, match=message):
        ops.warm_up(**arguments)


def test_a_remembered_check_is_made_anew_for_whatever_it_looks_at():
    calls = []

    @remembered
    def check(*arguments):
        calls.append(arguments)
        return check_gemm(GemmTensors(*arguments))

    layer = random_layer(128, 128, 64)
    tensors = GemmTensors(random_tokens(3, layer), layer.qweight, layer.scales, layer.qzeros, None, 4)
    wide = torch.zeros(3, 512, dtype=torch.float16)
    others = [
        tensors,
        tensors._replace(a=random_tokens(4, layer)),  # a size
        tensors._replace(a=wide[:, :128]),  # a stride
        tensors._replace(qzeros=None),  # a tensor
        tensors._replace(a=tensors.a.bfloat16(), scales=layer.scales.bfloat16()),  # a type
    ]
    for each in others:
        assert check(*each) == check(*each) == check_gemm(each)
    assert len(calls) == len(others)
    for wrong in (tensors._replace(a=wide[:, 4:132]), tensors._replace(num_bits=3)):
        for _ in range(2):  # what was refused is refused again
            with pytest.raises(ValueError, match="must"):
                check(*wrong)


def test_remembered_checks_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(checks, "_MOST_REMEMBERED", 2)
    seen = []
    check = remembered(lambda numbers: seen.append(numbers) or numbers)
    for number in (1, 2, 2, 3, 3, 1):
        assert check(number) == number
    assert seen == [1, 2, 3, 1]
