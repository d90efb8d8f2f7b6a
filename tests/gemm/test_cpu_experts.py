"""The operators of experts without a GPU: values, shapes, refusals, compilation by torch."""

import pytest
import torch
from torch.autograd import forward_ad

from awq2marlin.gemm import ops as dense
from awq2marlin.gemm.experts import checks, launch, ops
from awq2marlin.gemm.experts.checks import BlockTensors, ExpertTensors
from awq2marlin.gemm.launch import Device
from tests.gemm.expert_cases import (
    ACTIVATE,
    ROUTINGS,
    Known,
    assert_block,
    assert_products,
    random_block,
    random_experts,
    random_routing,
    random_rows,
)
from tests.gemm.gemm_cases import DTYPES

#: (E, K, N, group size, bits, zero points, bias)
LAYERS = [
    (4, 128, 64, 32, 4, True, True),
    (8, 192, 128, 64, 4, True, False),
    (3, 256, 192, 128, 8, True, True),
    (5, 64, 128, -1, 4, False, True),
    (1, 256, 64, -1, 8, True, False),
]


def by_hand(a, experts, ids, shares=None, known=None):
    """float64 [M, k, N], pair by pair."""
    weight = known or Known(experts)
    tokens, top_k = ids.shape
    out = torch.zeros(tokens, top_k, experts.size_n, dtype=torch.float64)
    for m in range(tokens):
        for j in range(top_k):
            expert, row = int(ids[m, j]), a[m if len(a) == tokens else m * top_k + j].double()
            if 0 <= expert < experts.number:
                out[m, j] = row @ weight(expert)
                if experts.bias is not None:
                    out[m, j] += experts.bias[expert].double()
                if shares is not None:
                    out[m, j] *= shares[m, j].double()
    return out


def block_by_hand(hidden, block, ids, shares, known=(None, None)):
    """float64 [M, H], pair by pair."""
    gate, up = by_hand(hidden, block.w13, ids, None, known[0]).chunk(2, -1)
    inner = ACTIVATE[block.activation](gate) * up
    return by_hand(inner.reshape(-1, inner.shape[-1]), block.w2, ids, shares, known[1]).sum(1)


def assert_rounded(out, exact):
    """Rounded once from float64, whose sums may be formed in another order."""
    torch.testing.assert_close(out, exact.to(out.dtype), rtol=1.01 * torch.finfo(out.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("number", "size_k", "size_n", "group_size", "bits", "has_zeros", "has_bias"), LAYERS)
def test_every_pair_gets_its_expert_s_product(number, size_k, size_n, group_size, bits, has_zeros, has_bias, kind):
    dtype = DTYPES["bf16" if number % 2 else "fp16"]
    experts = random_experts(
        *(number, size_k, size_n, group_size), num_bits=bits, has_zeros=has_zeros, has_bias=has_bias, dtype=dtype
    )
    known = Known(experts)
    for tokens, top_k, id_type in ((1, 1, torch.int32), (5, 3, torch.int64), (2, 8, torch.int32)):
        ids, shares = random_routing(tokens, top_k, number, kind, dtype=id_type)
        for a, weights in (
            (random_rows(tokens, experts), None),
            (random_rows(tokens * top_k, experts), shares),
            (random_rows(tokens, experts), shares.to(dtype)),
        ):
            out = experts(a, ids, weights)
            assert out.shape == (tokens, top_k, size_n)
            assert out.dtype == dtype
            assert_rounded(out, by_hand(a, experts, ids, weights, known))
            assert_products(out, a, experts, ids, weights, known=known)


@pytest.mark.parametrize(
    ("activation", "kind"), [*(("silu", kind) for kind in ROUTINGS), ("gelu", "uniform"), ("gelu_tanh", "uniform")]
)
def test_a_block_is_the_weighted_sum_of_its_experts(activation, kind):
    for (hidden, inner, groups), bits, has_zeros, dtype in (
        ((128, 64, (64, 32)), 4, True, torch.float16),
        ((192, 128, (-1, 128)), 4, False, torch.bfloat16),
        ((128, 192, (128, -1)), 8, True, torch.float16),
    ):
        block = random_block(
            *(6, hidden, inner, groups), num_bits=bits, has_zeros=has_zeros, has_bias=has_zeros, dtype=dtype,
            activation=activation,
        )  # fmt: skip
        known = Known(block.w13), Known(block.w2)
        for tokens, top_k in ((1, 8), (5, 2)):
            ids, shares = random_routing(tokens, top_k, 6, kind, dtype=torch.int64)
            x = random_rows(tokens, block.w13)
            out = block(x, ids, shares)
            assert out.shape == (tokens, hidden)
            assert_rounded(out, block_by_hand(x, block, ids, shares, known))
            assert_block(out, x, block, ids, shares, known=known)


def test_the_golden_layout_is_that_of_the_dense_gemm():
    experts = random_experts(3, 256, 128, 64, has_bias=True)
    a, ids = random_rows(4, experts), torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]])
    out = experts(a, ids)
    for m in range(4):
        for j in range(2):
            e = int(ids[m, j])
            alone = dense.marlin_gemm(
                a[m : m + 1], experts.qweight[e], experts.scales[e], experts.qzeros[e], experts.bias[e]
            )
            assert torch.equal(out[m, j], alone[0])


def test_a_pair_that_is_nobody_s_gives_zeros_whatever_it_is_weighted_with():
    ids, shares = torch.tensor([[1, -1], [4, 0]]), torch.tensor([[0.5, torch.nan], [torch.inf, 0.25]])
    x = random_rows(2, EXPERTS)
    product = EXPERTS(x, ids, shares)
    assert not product[0, 1].any()
    assert not product[1, 0].any()
    known = torch.where(shares.isfinite(), shares, 0)
    assert torch.equal(product, EXPERTS(x, ids, known))
    assert torch.equal(BLOCK(x, ids, shares), BLOCK(x, ids, known))


def test_ranks_of_experts_add_up_to_the_whole_block():
    block = random_block(8, 128, 64, (64, 64))
    ids, shares = random_routing(6, 3, 8)
    x = random_rows(6, block.w13)
    parts = [block.of(first, first + 4)(x, ids - first, shares).double() for first in (0, 4)]
    torch.testing.assert_close(sum(parts), block_by_hand(x, block, ids, shares), rtol=2e-3, atol=2e-3)


def test_no_tokens_give_an_empty_result():
    block = random_block(4, 128, 64, (64, 64))
    ids, shares = random_routing(0, 2, 4)
    x = torch.empty(0, 128, dtype=torch.float16)
    assert block.w13(x, ids, shares).shape == (0, 2, 128)
    assert block(x, ids, shares).shape == (0, 128)


def test_slices_are_taken_as_they_are():
    experts = random_experts(6, 128, 320, 32, has_bias=True)
    wide = random_rows(3, random_experts(1, 256, 64, 32))
    a, (ids, _) = wide[:, 128:], random_routing(3, 2, 3)
    part = ops.marlin_moe_gemm(
        a, experts.qweight[::2, :, 128:512], experts.scales[::2, :, 64:256], experts.qzeros[::2, :, 8:32], ids, None,
        experts.bias[::2, 64:256],
    )  # fmt: skip
    assert torch.equal(part, experts(a, ids * 2)[..., 64:256])


BLOCK = random_block(4, 256, 128, (64, 64), has_bias=True)
EXPERTS = BLOCK.w13
IDS, SHARES = random_routing(3, 2, 4)
ROWS = random_rows(3, EXPERTS)

GEMM_REFUSALS = [
    ({"num_bits": 3}, ValueError, r"num_bits must be one of \(4, 8\), found 3"),
    ({"a": ROWS.float()}, TypeError, r"a must be torch\.float16 or torch\.bfloat16, found torch\.float32"),
    ({"a": ROWS[:2]}, ValueError, r"a must have the shape \[3, K\] or \[6, K\], as topk_ids has \[3, 2\], found \[2, "),
    ({"a": ROWS[0]}, ValueError, r"a must have the shape \[M, K\], found \[256\]"),
    (
        {"a": ROWS[:, :128]},
        ValueError,
        r"qweight must have the shape \[4, 128/16, N\*16/8\], as a has \[3, 128\], found \[4, 16, 512\]",
    ),
    ({"a": torch.zeros(3, 257).half()[:, :256]}, ValueError, "a must have a row stride .* of 8, .* found 257 and 0"),
    ({"qweight": EXPERTS.qweight[0]}, ValueError, r"qweight must have the shape \[E, K/16, N\*16/f\], found \[16, 512"),
    ({"qweight": EXPERTS.qweight.long()}, TypeError, r"qweight must be torch\.int32, found torch\.int64"),
    ({"qweight": EXPERTS.qweight[..., :64]}, ValueError, r"qweight .*\[E, K/16, N\*16/f\] with N .*K = 256, N = 32"),
    (
        {"qweight": torch.zeros(4, 16, 1024, dtype=torch.int32)[..., ::2]},
        ValueError,
        "qweight must have a last stride of 1",
    ),
    (
        {"qweight": torch.zeros(4, 16, 514, dtype=torch.int32)[..., :512]},
        ValueError,
        "qweight must have row strides and an offset that are multiples of 4, .* found 8224, 514 and 0",
    ),
    ({"scales": EXPERTS.scales.bfloat16()}, TypeError, r"scales must be torch\.float16, found torch\.bfloat16"),
    ({"scales": EXPERTS.scales[:3]}, ValueError, r"scales must have the shape \[4, G, 256\], as qweight has \[4, 16, "),
    ({"scales": EXPERTS.scales[:, :3]}, ValueError, r"scales .*\[E, G, N\] with G = 1, or one of 8, 4, 2 .*\[4, 3, "),
    ({"qzeros": EXPERTS.qzeros[:, :2]}, ValueError, r"qzeros must have the shape \[4, 4, 32\], found \[4, 2, 32\]"),
    ({"bias": EXPERTS.bias[:3]}, ValueError, r"bias must have the shape \[4, 256\], found \[3, 256\]"),
    ({"bias": EXPERTS.bias.float()}, TypeError, r"bias must be torch\.float16, found torch\.float32"),
    ({"topk_ids": IDS.short()}, TypeError, r"topk_ids must be torch\.int32 or torch\.int64, found torch\.int16"),
    ({"topk_ids": IDS[0]}, ValueError, r"topk_ids must have the shape \[M, k\], found \[2\]"),
    ({"topk_ids": IDS[:, :0]}, ValueError, r"topk_ids .*\[M, k\] with k from 1 to 32, found \[3, 0\]"),
    ({"topk_ids": torch.zeros(3, 33, dtype=torch.int32)}, ValueError, r"topk_ids .* k from 1 to 32, found \[3, 33\]"),
    (
        {"topk_ids": torch.zeros(2, 3, dtype=torch.int32).t()},
        ValueError,
        r"topk_ids must be contiguous, found strides \(1, 3\); call topk_ids.contiguous\(\)",
    ),
    (
        {"topk_weights": SHARES[:2]},
        ValueError,
        r"topk_weights must have the shape \[3, 2\], as topk_ids has, found \[2",
    ),
    (
        {"topk_weights": SHARES.double()},
        TypeError,
        r"topk_weights must be torch\.float32 or torch\.float16, found torch\.float64",
    ),
    ({"topk_weights": SHARES.t().contiguous().t()}, ValueError, "topk_weights must be contiguous"),
    ({"topk_ids": IDS.to("meta")}, ValueError, "topk_ids must be on the device of a, cpu, found meta"),
    ({"qzeros": EXPERTS.qzeros.to("meta")}, ValueError, "qzeros must be on the device of a, cpu, found meta"),
]


def arguments_of_gemm():
    experts = EXPERTS
    tensors = ExpertTensors(ROWS, *experts.weights, IDS, SHARES, experts.bias, 4)
    return tensors._asdict()


@pytest.mark.parametrize(("change", "error", "message"), GEMM_REFUSALS)
def test_a_refusal_of_the_gemm_names_what_was_found_and_what_is_needed(change, error, message):
    # A mixture of devices does not get past torch's dispatcher on a CPU: the check itself is asked.
    def check(**arguments):
        return checks.check_gemm(ExpertTensors(**arguments))

    with pytest.raises(error, match=message):
        (check if "meta" in message else ops.marlin_moe_gemm)(**arguments_of_gemm() | change)


def half(tensor):
    return tensor[..., : tensor.shape[-1] // 2]


BLOCK_REFUSALS = [
    ({"num_bits": 5}, ValueError, "num_bits must be one of"),
    ({"activation": "relu"}, ValueError, r"activation must be one of \('silu', 'gelu', 'gelu_tanh'\), found 'relu'"),
    (
        {"hidden": ROWS[:2]},
        ValueError,
        r"hidden must have the shape \[3, H\], as topk_ids has \[3, 2\], found \[2, 256",
    ),
    ({"hidden": ROWS.double()}, TypeError, "hidden must be"),
    ({"hidden": ROWS[:, :128]}, ValueError, r"w13_qweight .*\[4, 128/16, N\*16/8\], as hidden has \[3, 128\]"),
    ({"w13_scales": BLOCK.w13.scales[:, :3]}, ValueError, r"w13_scales must have the shape \[E, G, N\] with G = 1"),
    ({"w13_qzeros": BLOCK.w13.qzeros[:3]}, ValueError, r"w13_qzeros must have the shape \[4, 4, 32\]"),
    ({"w13_bias": half(BLOCK.w13.bias)}, ValueError, r"w13_bias must have the shape \[4, 256\], found \[4, 128\]"),
    (
        {"w2_qweight": BLOCK.w2.qweight[:, :4]},
        ValueError,
        r"w2_qweight must have the shape \[4, 128/16, N\*16/8\], as w13_qweight has \[4, 16, 512\], found \[4, 4, ",
    ),
    ({"w2_scales": BLOCK.w2.scales.bfloat16()}, TypeError, r"w2_scales must be torch\.float16"),
    ({"w2_bias": BLOCK.w2.bias[:3]}, ValueError, r"w2_bias must have the shape \[4, 256\]"),
    ({"topk_weights": SHARES.double()}, TypeError, "topk_weights must be"),
    (
        {"w2_qzeros": BLOCK.w2.qzeros.to("meta")},
        ValueError,
        "w2_qzeros must be on the device of hidden, cpu, found meta",
    ),
]


def arguments_of_block():
    return BlockTensors(
        ROWS, *BLOCK.arguments, IDS, SHARES, BLOCK.w13.bias, BLOCK.w2.bias, activation="silu", num_bits=4
    )._asdict()


@pytest.mark.parametrize(("change", "error", "message"), BLOCK_REFUSALS)
def test_a_refusal_of_a_block_names_what_was_found_and_what_is_needed(change, error, message):
    def check(**arguments):
        return checks.check_block(BlockTensors(**arguments))

    with pytest.raises(error, match=message):
        (check if "meta" in message else ops.marlin_experts)(**arguments_of_block() | change)


def misplaced(tensor):
    """The same numbers, one element past where PyTorch lets memory begin."""
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


def test_a_tensor_begins_where_its_widest_load_may():
    """Offsets are checked of all tensors; addresses, which memory from elsewhere may have, of those on a GPU."""
    gemm, block = arguments_of_gemm(), arguments_of_block()
    for check, kind, arguments in (
        (checks.check_gemm_addresses, ExpertTensors, gemm),
        (checks.check_block_addresses, BlockTensors, block),
    ):
        check(kind(**arguments))
        for name in ("topk_ids", "topk_weights"):
            check(kind(**arguments | {name: misplaced(arguments[name])}))
        check(kind(**arguments | {"topk_weights": misplaced(SHARES.half())}))
        for name in arguments:
            if name.endswith(("qweight", "qzeros", "scales", "bias", "hidden")) or name == "a":
                with pytest.raises(ValueError, match=f"^{name} must begin at a multiple of (8|16) bytes"):
                    check(kind(**arguments | {name: misplaced(arguments[name])}))
    checks.check_gemm_addresses(ExpertTensors(**gemm | {"topk_weights": None, "qzeros": None, "bias": None}))


def meta_tensors(kind, arguments):
    """Tensors of any size, which take no memory."""
    return kind(**{name: each.to("meta") if torch.is_tensor(each) else each for name, each in arguments.items()})


def test_rows_out_of_a_kernel_s_reach_are_refused(monkeypatch):
    """A kernel counts the way to a row in 32 bits, in units of eight numbers."""
    monkeypatch.setattr(launch, "device_of", lambda _: Device(0, (9, 0), 132))
    gemm = meta_tensors(ExpertTensors, arguments_of_gemm())
    ids, weights = gemm.topk_ids.new_empty(4097, 2), gemm.topk_weights.new_empty(4097, 2)
    far = torch.empty_strided((4097, 256), (1 << 23, 1), dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"^a must span at most 34359738368 numbers, found 34359738624: split the"):
        launch.plan_gemm(gemm._replace(a=far, topk_ids=ids, topk_weights=weights))
    launch.plan_gemm(gemm._replace(a=far[:4096], topk_ids=ids[:4096], topk_weights=weights[:4096]))
    block = meta_tensors(BlockTensors, arguments_of_block())
    tokens = (1 << 27) + 1  # of two choices, each with 128 numbers between the products
    routing = {"topk_ids": ids.new_empty(tokens, 2), "topk_weights": weights.new_empty(tokens, 2)}
    same = block.hidden[:1].expand(tokens, 256)
    with pytest.raises(ValueError, match=r"^act\(gate\) \* up must span at most 34359738368 numbers, found"):
        launch.plan_block(block._replace(hidden=same, **routing))
    launch.plan_block(block._replace(hidden=same[1:], **{name: each[1:] for name, each in routing.items()}))


def test_experts_of_another_number_or_width_are_refused():
    fewer, narrow = BLOCK.w2.of(0, 3), random_experts(4, 128, 128, 64)
    for experts, found in ((fewer, r"\[3, 8, 512\]"), (narrow, r"\[4, 8, 256\]")):
        parts = dict(zip(("w2_qweight", "w2_scales", "w2_qzeros"), experts.weights, strict=True))
        message = rf"w2_qweight must have the shape \[4, 128/16, 256\*16/8\], as w13_qweight has .*, found {found}"
        with pytest.raises(ValueError, match=message):
            ops.marlin_experts(**arguments_of_block() | parts | {"w2_bias": None})


def test_an_inner_width_that_is_no_multiple_of_64_is_refused():
    odd = random_experts(4, 256, 192, 64)
    parts = dict(zip(("w13_qweight", "w13_scales", "w13_qzeros"), odd.weights, strict=True))
    with pytest.raises(ValueError, match=r"w13_qweight .*\[E, H/16, 2\*I\*16/f\] with I a multiple of 64.*2\*I = 192"):
        ops.marlin_experts(**arguments_of_block() | parts | {"w13_bias": None})


def test_too_many_experts_are_refused():
    layer = random_experts(1, 128, 64, -1)
    many = [None if each is None else each.expand(1025, *each.shape[1:]) for each in layer.weights]
    with pytest.raises(ValueError, match=r"qweight .* with E from 1 to 1024, found \[1025, 8, 128\]"):
        ops.marlin_moe_gemm(torch.zeros(1, 128).half(), *many, IDS[:1])
    none = [each[:0] for each in layer.weights]
    with pytest.raises(ValueError, match=r"qweight .* with E from 1 to 1024, found \[0, 8, 128\]"):
        ops.marlin_moe_gemm(torch.zeros(1, 128).half(), *none, IDS[:1])


def test_what_the_checks_return_is_what_the_shapes_say():
    gemm = checks.check_gemm(ExpertTensors(**arguments_of_gemm()))
    assert gemm == checks.ExpertShape(4, 256, 256, 64, 3, 2, shared_rows=True)
    own = checks.check_gemm(ExpertTensors(**arguments_of_gemm() | {"a": random_rows(6, EXPERTS)}))
    assert not own.shared_rows
    block = checks.check_block(BlockTensors(**arguments_of_block()))
    assert block == checks.BlockShape(4, 256, 128, 64, 64, 3, 2)


@pytest.mark.parametrize("name", ["a", "scales", "topk_weights", "bias"])
def test_an_argument_that_requires_a_gradient_is_refused_at_once(name):
    arguments = arguments_of_gemm()
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"marlin_moe_gemm has no gradients.*torch\.no_grad"):
        ops.marlin_moe_gemm(**arguments)
    with torch.no_grad():
        assert ops.marlin_moe_gemm(**arguments).shape == (3, 2, 256)


def test_a_block_whose_input_requires_a_gradient_is_refused_at_once():
    arguments = arguments_of_block()
    with pytest.raises(NotImplementedError, match="marlin_experts has no gradients"):
        ops.marlin_experts(**arguments | {"hidden": ROWS.clone().requires_grad_()})


@pytest.mark.parametrize("name", ["hidden", "topk_weights", "out"])
def test_a_block_that_writes_into_a_tensor_refuses_gradients_before_it_does(name):
    arguments = arguments_of_block() | {"out": torch.full_like(ROWS, 7)}
    arguments[name] = arguments[name].clone().requires_grad_() * 1
    with pytest.raises(NotImplementedError, match=r"^marlin_experts has no gradients"):
        ops.marlin_experts(**arguments)
    assert torch.all(arguments["out"] == 7)
    with torch.no_grad():
        ops.marlin_experts(**arguments)
    assert torch.equal(arguments["out"], ops.marlin_experts(**arguments_of_block()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when torch.func loads its rules
@pytest.mark.parametrize("name", ["hidden", "topk_weights", "w2_bias", "out"])
def test_derivatives_of_experts_in_forward_mode_are_refused_and_not_lost(name):
    tangent = r" has no derivatives in forward mode .*detach it"
    arguments = arguments_of_block() | {"out": torch.full_like(ROWS, 7), "w2_bias": torch.zeros(4, 256).half()}
    if name != "out":
        arguments["out"] = None

    def block(tensor):
        return ops.marlin_experts(**arguments | {name: tensor})

    with pytest.raises(NotImplementedError, match="marlin_experts" + tangent):
        torch.func.jvp(block, (arguments[name],), (arguments[name],))
    if name == "hidden":
        with pytest.raises(NotImplementedError, match="marlin_experts" + tangent):
            torch.func.jacfwd(block)(arguments[name])
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="gemm" + tangent):
            ops.marlin_moe_gemm(**arguments_of_gemm() | {"a": forward_ad.make_dual(ROWS, ROWS)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck_finds_nothing():
    torch.library.opcheck(torch.ops.awq2marlin.marlin_moe_gemm.default, tuple(arguments_of_gemm().values()))
    plain = random_experts(3, 64, 128, -1, num_bits=8, has_zeros=False)
    rows, (ids, _) = random_rows(8, plain), random_routing(4, 2, 3, "foreign", dtype=torch.int64)
    arguments = (rows, plain.qweight, plain.scales, None, ids, None, None, 8)
    torch.library.opcheck(torch.ops.awq2marlin.marlin_moe_gemm.default, arguments)
    block = tuple(arguments_of_block().values())
    torch.library.opcheck(torch.ops.awq2marlin.marlin_experts.default, block)
    torch.library.opcheck(torch.ops.awq2marlin.marlin_experts_into.default, (*block, torch.empty_like(block[0])))


def test_a_block_writes_where_it_is_told_to():
    arguments = arguments_of_block()
    wanted, hidden = ops.marlin_experts(**arguments), arguments["hidden"].clone()
    for out in (torch.empty_like(hidden), hidden):
        assert ops.marlin_experts(**arguments | {"hidden": hidden, "out": out}) is out
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (
            torch.empty(1, 1, dtype=torch.float16),
            ValueError,
            r"out must have the shape \[\d+, \d+\], as hidden has, found \[1, 1\]",
        ),
        (torch.empty(1, 1), TypeError, "out must be torch.float16"),
    ],
)
def test_a_block_writes_into_its_kind_of_tensor_only(out, error, message):
    with pytest.raises(error, match=message):
        ops.marlin_experts(**arguments_of_block(), out=out)


def test_works_under_torch_compile_and_export():
    class Mixture(torch.nn.Module):
        """With a router of its own, as models have."""

        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(256, 4, dtype=torch.float16)

        def forward(self, x):
            shares, ids = torch.topk(torch.softmax(self.gate(x).float(), -1), 2)
            first = BLOCK.w13(x, ids, shares)
            return BLOCK(x, ids, shares) + first.sum(1)

    model, more = Mixture(), random_rows(7, EXPERTS)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ROWS), model(ROWS))
        exported = torch.export.export(model, (ROWS,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
        assert torch.equal(exported.module()(more), model(more))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w13_qweight": EXPERTS.qweight[0]}, ValueError, r"w13_qweight must have the shape \[E, H/16, 2\*I\*16/f\]"),
        ({"w13_scales": EXPERTS.scales.float()}, TypeError, r"w13_scales must be torch\.float16 or torch\.bfloat16"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"top_k": 33}, ValueError, "k from 1 to 32"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, found 0"),
        ({}, ValueError, "w13_qweight must be on a CUDA device, .*, found cpu"),
    ],
)
def test_a_warm_up_names_the_argument_it_refuses(change, error, message):
    names = ("w13_qweight", "w13_scales", "w13_qzeros", "w2_qweight", "w2_scales", "w2_qzeros")
    arguments = dict(zip(names, BLOCK.arguments, strict=True)) | {"top_k": 2} | change
    with pytest.raises(error, match=message):
        ops.warm_up_experts(**arguments)
