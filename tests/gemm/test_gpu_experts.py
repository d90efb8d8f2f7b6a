"""Experts on a GPU: both operators on every kind of weight, shape and routing, against float64."""

import threading
from dataclasses import replace

import pytest
import torch

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.driver import device_of
from awq2marlin.gemm.experts import launch, ops, select
from awq2marlin.gemm.experts.problem import ExpertProblem
from tests.gemm.expert_cases import (
    ROUTINGS,
    Known,
    assert_block,
    assert_products,
    listed_items,
    random_block,
    random_experts,
    random_routing,
    random_rows,
)
from tests.gemm.gemm_cases import DTYPES, from_both_devices
from tests.gemm.stand_in import forget_prepared_calls
from tests.skips import ONE_GPU

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
KINDS = [("fp16", 4), ("fp16", 8), ("bf16", 4), ("bf16", 8)]
GROUPS = [(32, True), (64, False), (128, True), (-1, True), (-1, False)]  # (group size, has zero points)

#: From one to many rows an expert, with every edge of a tile between.
TOKENS = [
    *range(1, 10),
    15,
    16,
    17,
    24,
    31,
    33,
    48,
    63,
    65,
    97,
    128,
    130,
    200,
    257,
    400,
    512,
    513,
    700,
    1000,
    2048,
    4096,
]


def gpu_experts(*arguments, **options):
    return random_experts(*arguments, device=DEVICE, **options)


def gpu_block(*arguments, **options):
    return random_block(*arguments, device=DEVICE, **options)


def routing(tokens, top_k, number, kind="uniform", **options):
    return random_routing(tokens, top_k, number, kind, device=DEVICE, **options)


def poison(dtype, *sizes):
    """Fills memory that is handed out next with NaN: what no block writes shows."""
    for size in sizes:
        torch.full((size,), float("nan"), dtype=dtype, device=DEVICE)
    kept = [torch.full((size,), float("nan"), dtype=dtype, device=DEVICE) for size in sizes]
    kept.clear()


def run_experts(experts, a, ids, shares=None):
    poison(a.dtype, ids.numel() * experts.size_n)
    return experts(a, ids, shares)


def run_block(block, x, ids, shares):
    pairs, hidden = ids.numel(), block.w2.size_n
    poison(x.dtype, x.numel(), pairs * hidden, pairs * block.w2.size_k, pairs * block.w13.size_n)
    return block(x, ids, shares)


def some_of(tokens, count=6):
    """A few tokens of many: the first, the last and some between."""
    if tokens <= count:
        return None
    return sorted({0, tokens - 1, *(tokens * i // count for i in range(1, count))})


def check_experts(experts, tokens, top_k, kind="uniform", *, known=None, sample=None, **options):
    """Runs and compares the grouped product: rows that are shared, and rows of each pair's own with weights."""
    ids, shares = routing(tokens, top_k, experts.number, kind, **options)
    known = known or Known(experts)
    a = random_rows(tokens, experts)
    assert_products(run_experts(experts, a, ids), a, experts, ids, tokens=sample, known=known)
    a = random_rows(tokens * top_k, experts, seed=3)
    out = run_experts(experts, a, ids, shares)
    assert_products(out, a, experts, ids, shares, tokens=sample, known=known)


def check_block(block, tokens, top_k, kind="uniform", *, known=None, sample=None, **options):
    """Runs and compares a block."""
    ids, shares = routing(tokens, top_k, block.w13.number, kind, **options)
    x = random_rows(tokens, block.w13)
    assert_block(run_block(block, x, ids, shares), x, block, ids, shares, tokens=sample, known=known)


@pytest.fixture
def large_layers(monkeypatch):
    """Layers count as large enough for kernels with three heights of tiles."""
    monkeypatch.setattr(select, "_MANY_ROWS", 0)
    forget_prepared_calls(monkeypatch)


# --- values -----------------------------------------------------------------------------------------------


def test_every_number_of_tokens_of_the_grouped_product():
    experts = gpu_experts(8, 256, 320, 128, has_bias=True)
    known = Known(experts)
    for tokens in TOKENS:
        check_experts(experts, tokens, 2, known=known)


def test_every_number_of_tokens_of_a_block():
    block = gpu_block(8, 256, 192, (128, 64), has_bias=True)
    known = Known(block.w13), Known(block.w2)
    for tokens in TOKENS:
        check_block(block, tokens, 2, known=known)


@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
@pytest.mark.parametrize(("group_size", "has_zeros"), GROUPS)
def test_every_kind_of_weight(group_size, has_zeros, dtype, num_bits):
    kind = {"num_bits": num_bits, "dtype": DTYPES[dtype], "has_zeros": has_zeros, "has_bias": has_zeros}
    experts = gpu_experts(8, 384, 192, group_size, **kind)
    known = Known(experts)
    for tokens in (1, 4, 40, 80, 300):
        check_experts(experts, tokens, 2, known=known)


@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
@pytest.mark.parametrize("groups", [(32, 64), (-1, 128), (128, -1)])
def test_every_kind_of_block(groups, dtype, num_bits):
    has_zeros = groups != (-1, 128)
    kind = {"num_bits": num_bits, "dtype": DTYPES[dtype], "has_zeros": has_zeros, "has_bias": has_zeros}
    block = gpu_block(8, 384, 256, groups, **kind)
    known = Known(block.w13), Known(block.w2)
    for tokens in (1, 40, 300):
        check_block(block, tokens, 2, known=known)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_activation(activation):
    block = gpu_block(8, 256, 128, (64, 64), activation=activation)
    for tokens in (1, 20, 100, 400):
        check_block(block, tokens, 2)


#: (E, H, I, groups, k): the experts of models in small, and what is odd.
SHAPES = [
    (1, 128, 64, (64, 64), 1),
    (1, 320, 128, (32, 128), 2),  # K of 64 times an odd number; an expert chosen twice
    (2, 256, 320, (128, 64), 8),  # more choices than experts
    (8, 512, 1408, (128, 128), 2),
    (128, 768, 256, (128, 128), 8),
    (128, 256, 768, (128, 128), 10),
    (128, 1408, 192, (128, 64), 6),
    (256, 448, 256, (64, 128), 8),
    (256, 1024, 128, (128, -1), 8),
    (1024, 128, 64, (32, 64), 4),
]


@pytest.mark.parametrize(("number", "hidden", "inner", "groups", "top_k"), SHAPES)
def test_every_shape(number, hidden, inner, groups, top_k):
    block = gpu_block(number, hidden, inner, groups)
    known = Known(block.w13), Known(block.w2)
    for tokens in (1, 3, 16, 70, 300, 1500):
        check_block(block, tokens, top_k, known=known, sample=some_of(tokens))
    for tokens in (1, 16, 300):
        check_experts(block.w13, tokens, top_k, known=known[0], sample=some_of(tokens))


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 10, 16, 32])
def test_every_number_of_choices(top_k):
    block = gpu_block(12, 256, 128, (128, 128))
    known = Known(block.w13), Known(block.w2)
    for tokens in (1, 2, 5, 33, 150):
        check_block(block, tokens, top_k, known=known)
        check_experts(block.w13, tokens, top_k, known=known[0])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_every_routing(kind, ids):
    for number, top_k in ((16, 2), (160, 8)):
        block = gpu_block(number, 256, 128, (64, 64), has_bias=True)
        known = Known(block.w13), Known(block.w2)
        for tokens in (1, 6, 64, 500):
            sample = some_of(tokens, 30)
            check_block(block, tokens, top_k, kind, known=known, sample=sample, dtype=ids)
            check_experts(block.w13, tokens, top_k, kind, known=known[0], sample=sample, dtype=ids)


#: On the average 25, 50, 94, 113 and 250 rows for each of 16 experts.
TOKENS_OF_16 = (200, 400, 750, 900, 2000)


@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
@pytest.mark.parametrize("groups", [(64, 32), (128, 128), (-1, 128)])
@pytest.mark.usefixtures("large_layers")
def test_tiles_of_several_heights(groups, dtype, num_bits):
    kind = {"num_bits": num_bits, "dtype": DTYPES[dtype], "has_zeros": groups[0] != -1, "has_bias": True}
    block = gpu_block(16, 640, 384, groups, **kind)
    known = Known(block.w13), Known(block.w2)
    for tokens in TOKENS_OF_16:
        for routing_kind in ("uniform", "zipf", "few", "foreign"):
            sample = some_of(tokens, 100)
            check_block(block, tokens, 2, routing_kind, known=known, sample=sample)
        check_experts(block.w2, tokens, 2, "zipf", known=known[1], sample=sample)


@pytest.mark.usefixtures("large_layers")
def test_heights_of_tiles_give_the_same_bits_every_time():
    """Which rows of an expert share a tile is up to chance."""
    block = gpu_block(16, 512, 256, (128, 64), has_bias=True)
    for tokens in TOKENS_OF_16:
        ids, shares = routing(tokens, 2, 16, "zipf")
        x = random_rows(tokens, block.w13)
        first, product = block(x, ids, shares), block.w13(x, ids)
        order = torch.randperm(tokens, device=DEVICE)
        assert torch.equal(block(x[order], ids[order], shares[order]), first[order])
        for _ in range(5):
            assert torch.equal(run_block(block, x, ids, shares), first)
            assert torch.equal(run_experts(block.w13, x, ids), product)


@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_the_list_of_work_says_what_a_plain_count_says(kind, ids_type):
    device = device_of(0)
    for number, top_k, tokens in ((1, 1, 3), (5, 3, 70), (16, 2, 900), (160, 8, 500), (1024, 4, 2000)):
        ids, shares = routing(tokens, top_k, number, kind, dtype=ids_type)
        for heights in ((8,), (24,), (80, 32), (80, 48, 32), (144, 80, 48)):
            plan = launch.Plan(heights, has_list=True, launches=())
            problem = ExpertProblem(
                tokens * top_k, top_k, number, 64, 64, 64, 4, "fp16", "none", False, device.capability, 132
            )
            words = torch.full((launch._work_bytes(plan, problem) // 4,), -7, dtype=torch.int32, device=DEVICE)
            launch._list_kernel(plan, problem, ids)(ids.data_ptr(), shares.data_ptr(), words.data_ptr())
            items = listed_items(ids.cpu(), number, heights)
            ends, listed, rows = (
                words[:3],
                words[4 : 4 + 4 * len(items)],
                words[4 + 4 * launch._work_items(plan, problem) :],
            )
            assert ends.tolist() == [
                sum(tile >= least for _, tile, _, _ in items) for least in (*heights, *heights[-1:] * 2)[:3]
            ]
            assert [tuple(item[:3]) for item in listed.view(-1, 4).tolist()] == [
                (expert, first, count) for expert, _, first, count in items
            ]
            pairs, weights = rows.view(-1, 2).unbind(1)
            assert torch.equal(weights[pairs >= 0].view(torch.float32), shares.view(-1)[pairs[pairs >= 0].long()])
            chosen = ids.view(-1)
            for expert, _, first, count in items:
                assert (chosen[pairs[first : first + count].long()] == expert).all()
            known = ((chosen >= 0) & (chosen < number)).nonzero().view(-1)
            assert torch.equal(pairs[: len(known)].sort().values.long(), known)


def test_ids_outside_the_rank_give_zeros_and_nothing_to_the_sum():
    block = gpu_block(8, 256, 128, (64, 64), has_bias=True)
    for tokens in (1, 10, 200):
        ids, shares = routing(tokens, 4, 8, "nobody")
        x = random_rows(tokens, block.w13)
        assert not run_block(block, x, ids, shares).any()
        assert not run_experts(block.w13, x, ids, shares).any()
        ids[0, 2] = 5
        out = run_block(block, x, ids, shares)
        assert_block(out, x, block, ids, shares)
        assert not out[1:].any()


def test_ranks_of_experts_add_up_to_the_whole_block():
    block = gpu_block(64, 512, 256, (128, 128))
    for tokens in (1, 32, 300):
        ids, shares = routing(tokens, 8, 64)
        x = random_rows(tokens, block.w13)
        parts = [block.of(first, first + 16)(x, ids - first, shares).double() for first in range(0, 64, 16)]
        torch.testing.assert_close(sum(parts), block(x, ids, shares).double(), rtol=4e-3, atol=4e-3)


def test_weights_of_the_activations_type_are_taken():
    for dtype in DTYPES.values():
        block = gpu_block(8, 256, 128, (64, 64), dtype=dtype)
        for tokens in (1, 50, 400):
            ids, shares = routing(tokens, 2, 8)
            x, shares = random_rows(tokens, block.w13), shares.to(dtype)
            assert_block(run_block(block, x, ids, shares), x, block, ids, shares)
            assert_products(run_experts(block.w13, x, ids, shares), x, block.w13, ids, shares)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_where_it_is(dtype):
    """NaN and infinity of a token, of a pair or of an expert reach nobody else: neither rows nor sums."""
    block = gpu_block(16, 512, 256, (128, 64), dtype=DTYPES[dtype], has_bias=True)
    broken = replace(block, w13=replace(block.w13), w2=replace(block.w2))
    for layer in (broken.w13, broken.w2):
        layer.scales = layer.scales.clone()
        layer.scales[3] = torch.nan
    for tokens in (1, 2, 9, 40, 130, 1000):
        ids, shares = routing(tokens, 4, 16, "foreign")
        x = random_rows(tokens, block.w13)
        rows = random_rows(tokens * 4, block.w13)
        known = (ids >= 0) & (ids < 16)
        poisoned = torch.where(known, shares, torch.nan)  # a pair that is nobody's
        bad = torch.arange(tokens, device=DEVICE) % 5 == 1
        worse, worst = x.clone(), rows.clone()
        worse[bad], worst[bad.repeat_interleave(4)] = torch.inf, torch.nan
        met = (ids == 3) & known
        assert torch.equal(run_block(block, x, ids, poisoned), block(x, ids, shares))
        assert torch.equal(run_block(block, worse, ids, shares)[~bad], block(x, ids, shares)[~bad])
        spared = ~met.any(1)
        assert torch.equal(run_block(broken, x, ids, shares)[spared], block(x, ids, shares)[spared])
        out = run_experts(broken.w13, worst, ids, poisoned)
        spared = ~met & ~bad[:, None]
        assert torch.equal(out[spared], block.w13(rows, ids, shares)[spared])
        assert not out[~known].any()


@pytest.mark.parametrize("kind", ["uniform", "foreign"])
@pytest.mark.parametrize("many_rows", [0, select._MANY_ROWS], ids=["large layer", "small layer"])
def test_a_row_s_bits_do_not_depend_on_who_else_is_there(monkeypatch, many_rows, kind):
    """For one number of tokens: neither on their order, nor on what the others are or choose."""
    monkeypatch.setattr(select, "_MANY_ROWS", many_rows)
    forget_prepared_calls(monkeypatch)
    block = gpu_block(16, 512, 256, (128, 64), has_bias=True)
    for tokens in (2, 8, 9, 40, 130, 300, 1000):
        ids, shares = routing(tokens, 4, 16, kind)
        x = random_rows(tokens, block.w13)
        out, product = block(x, ids, shares), block.w13(x, ids, shares)
        order = torch.randperm(tokens, device=DEVICE)
        assert torch.equal(block(x[order], ids[order], shares[order]), out[order])
        assert torch.equal(block.w13(x[order], ids[order], shares[order]), product[order])
        others = torch.arange(tokens, device=DEVICE) % 2 == 1
        fresh = routing(tokens, 4, 16, "zipf", seed=9)
        mixed_ids = torch.where(others[:, None], fresh[0], ids)
        mixed_shares = torch.where(others[:, None], fresh[1], shares)
        mixed = torch.where(others[:, None], random_rows(tokens, block.w13, seed=9), x)
        assert torch.equal(block(mixed, mixed_ids, mixed_shares)[~others], out[~others])
        assert torch.equal(block.w13(mixed, mixed_ids, mixed_shares)[~others], product[~others])


@pytest.mark.parametrize("num_bits", [4, 8])
def test_slices_need_no_copy(num_bits):
    experts = gpu_experts(12, 256, 640, 64, num_bits=num_bits, has_bias=True)
    factor = 32 // num_bits
    words, zeros = slice(128 * 16 // factor, 512 * 16 // factor), slice(128 // factor, 512 // factor)
    wide = random_rows(300, gpu_experts(1, 1024, 64, 64))
    for tokens in (1, 16, 300):
        a, (ids, shares) = wide[:tokens, 256:512], routing(tokens, 2, 4)
        part = ops.marlin_moe_gemm(
            a, experts.qweight[1::3, :, words], experts.scales[1::3, :, 128:512], experts.qzeros[1::3, :, zeros], ids,
            shares, experts.bias[1::3, 128:512], num_bits=num_bits,
        )  # fmt: skip
        out = torch.full((tokens, 2, 640), float("nan"), dtype=a.dtype, device=DEVICE)
        out[..., 128:512] = part
        whole = experts(a, 3 * ids + 1, shares)
        torch.testing.assert_close(out[..., 128:512], whole[..., 128:512], rtol=4e-3, atol=4e-3)
    block = gpu_block(8, 256, 128, (64, 64))
    for tokens in (1, 40, 300):
        ids, shares = routing(tokens, 2, 8)
        x = wide[:tokens, 512:768]
        assert torch.equal(block(x, ids, shares), block(x.contiguous(), ids, shares))


def test_no_tokens_give_an_empty_result():
    block = gpu_block(4, 128, 64, (64, 64))
    ids, shares = routing(0, 2, 4)
    x = torch.empty(0, 128, dtype=torch.float16, device=DEVICE)
    assert block.w13(x, ids, shares).shape == (0, 2, 128)
    assert block(x, ids, shares).shape == (0, 128)


def test_results_beyond_two_to_the_31():
    experts = gpu_experts(8, 128, 65536, 128)
    tokens, top_k = 4200, 8
    ids, shares = routing(tokens, top_k, 8)
    a = random_rows(tokens, experts)
    out = experts(a, ids, shares)
    assert out.numel() > 2**31
    assert_products(out, a, experts, ids, shares, tokens=[0, 1, tokens - 2, tokens - 1])


def test_weights_beyond_two_to_the_31_words():
    experts = gpu_experts(160, 4096, 28672, -1, has_zeros=False)
    assert experts.qweight.numel() > 2**31
    known = Known(experts)
    for tokens in (1, 40, 200):
        ids = torch.full((tokens, 2), 159, dtype=torch.int32, device=DEVICE)
        ids[tokens // 2, 1] = 0
        a = random_rows(tokens, experts)
        assert_products(experts(a, ids), a, experts, ids, tokens=sorted({0, tokens // 2}), known=known)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "zipf", "foreign"])
def test_repeated_runs_give_the_same_bits(kind):
    block = gpu_block(32, 1024, 512, (128, 128))
    for tokens in (1, 4, 16, 64, 300, 2000):
        ids, shares = routing(tokens, 4, 32, kind)
        x = random_rows(tokens, block.w13)
        first, product = block(x, ids, shares), block.w13(x, ids)
        for _ in range(10):
            assert torch.equal(run_block(block, x, ids, shares), first)
            assert torch.equal(run_experts(block.w13, x, ids), product)


def test_int64_ids_give_the_bits_of_int32():
    block = gpu_block(32, 256, 128, (64, 64))
    for tokens in (1, 30, 400):
        ids, shares = routing(tokens, 4, 32, "foreign")
        x = random_rows(tokens, block.w13)
        assert torch.equal(block(x, ids, shares), block(x, ids.long(), shares))
        assert torch.equal(block.w13(x, ids, shares), block.w13(x, ids.long(), shares))


def test_works_in_a_captured_graph_on_another_stream_with_a_routing_of_each_replay():
    block = gpu_block(16, 512, 256, (128, 128))
    assert ops.warm_up_experts(*block.arguments, top_k=4, max_tokens=512, **block.options) >= 2
    for tokens in (1, 16, 48, 500):
        ids, shares = routing(tokens, 4, 16)
        x = random_rows(tokens, block.w13)
        block.w13(x, ids)  # the grouped product has kernels of its own
        torch.cuda.synchronize()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            outs = [block(x, ids, shares) for _ in range(3)]
            product = block.w13(x, ids)
        for seed, kind in enumerate(("uniform", "one", "foreign", "zipf")):
            fresh = routing(tokens, 4, 16, kind, seed=seed)
            ids.copy_(fresh[0])
            shares.copy_(fresh[1])
            x.copy_(random_rows(tokens, block.w13, seed=seed))
            for out in (*outs, product):
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            expected = block(x, ids, shares)
            assert all(torch.equal(out, expected) for out in outs), (tokens, kind)
            assert torch.equal(product, block.w13(x, ids)), (tokens, kind)


@pytest.mark.parametrize("max_tokens", [1, 16, 200, 3000])
def test_a_warm_up_loads_all_that_calls_up_to_its_tokens_need(monkeypatch, max_tokens):
    """What is not loaded cannot be captured: every number of tokens can, once it is."""
    monkeypatch.setattr(jit, "_loaded", {})
    forget_prepared_calls(monkeypatch)
    block = gpu_block(8, 256, 128, (64, -1))
    ops.warm_up_experts(*block.arguments, top_k=2, max_tokens=max_tokens, **block.options)
    loaded = set(jit._loaded)
    for tokens in [each for each in TOKENS if each <= max_tokens]:
        ids, shares = routing(tokens, 2, 8, dtype=torch.int64 if tokens % 2 else torch.int32)
        block(random_rows(tokens, block.w13), ids, shares)
        assert set(jit._loaded) == loaded, tokens


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_first_use_in_a_capture_names_the_warm_up(monkeypatch):
    block = gpu_block(4, 128, 64, (64, 64))
    ids, shares = routing(1, 2, 4)
    x = random_rows(1, block.w13)
    monkeypatch.setattr(jit, "_loaded", {})
    forget_prepared_calls(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KernelUnavailableError, match="warm_up_experts"), torch.cuda.graph(graph):
        block(x, ids, shares)
    assert_block(block(x, ids, shares), x, block, ids, shares)


def test_streams_run_side_by_side():
    block = gpu_block(16, 1024, 512, (128, 128))
    calls = []
    for tokens in (1, 7, 16, 33, 100, 600):
        calls.append((random_rows(tokens, block.w13, seed=tokens), *routing(tokens, 4, 16, seed=tokens)))
    expected = [block(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(block(*call))
        torch.cuda.synchronize()
        assert all(torch.equal(out, each) for out, each in zip(outs, expected, strict=True))


def test_works_in_a_thread_that_is_new_to_cuda():
    block = gpu_block(4, 128, 64, (64, 64))
    ids, shares = routing(4, 2, 4)
    x, outs = random_rows(4, block.w13), []
    thread = threading.Thread(target=lambda: outs.append(block(x, ids, shares)))
    thread.start()
    thread.join()
    assert_block(outs[0], x, block, ids, shares)


def test_a_launch_sees_what_the_kernel_before_it_wrote():
    """Launches may overlap; what they read must not: neither tokens, nor choices, nor weights."""
    blocks = [gpu_block(32, 1024, 512, (128, 128), seed=seed) for seed in range(4)]
    routers = [torch.randn(1024, 32, dtype=torch.float16, device=DEVICE) for _ in blocks]

    def layers(x, wait):
        for block, router in zip(blocks, routers, strict=True):
            shares, ids = (x @ router).float().softmax(-1).topk(4)
            wait()
            x = block(x, ids, shares)
            x = x / x.abs().amax()  # four layers of random weights would overflow
            wait()
        return x

    for tokens in (1, 8, 64, 300, 1500):
        x = random_rows(tokens, blocks[0].w13)
        torch.cuda.synchronize()
        expected = layers(x, torch.cuda.synchronize)
        for _ in range(5):
            assert torch.equal(layers(x, lambda: None), expected)
        ids, shares = routing(tokens, 4, 32)
        first, second = blocks[:2]
        target = [each.clone() for each in first.arguments]
        for source in (second, first):
            for each, other in zip(target, source.arguments, strict=True):
                each.copy_(other)  # weights written by the kernel right before
            assert torch.equal(ops.marlin_experts(x, *target, ids, shares), source(x, ids, shares))


def test_calls_right_after_each_other_see_their_own_choices():
    """Lists of work lie at the same address, one after the other, and none but our own kernels run between."""
    block = gpu_block(32, 1024, 512, (128, 128))
    for tokens in (9, 64, 300, 1500):
        x = random_rows(tokens, block.w13)
        kinds = ("uniform", "one", "zipf", "foreign", "few", "nobody", "uniform", "twice")
        routings = [routing(tokens, 4, 32, kind, seed=seed) for seed, kind in enumerate(kinds)]
        expected = []
        for ids, shares in routings:
            torch.cuda.synchronize()
            expected.append(block(x, ids, shares))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [block(x, *each) for each in routings]
        for _ in range(20):
            outs = [block(x, *each) for each in routings]
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(out, each) for out, each in zip(outs, expected, strict=True))
            assert all(torch.equal(out, each) for out, each in zip(captured, expected, strict=True))


def test_works_under_torch_compile():
    block = gpu_block(8, 256, 128, (64, 64))
    router = torch.randn(256, 8, dtype=torch.float16, device=DEVICE)

    def mixture(x):
        shares, ids = (x @ router).float().softmax(-1).topk(2)
        return torch.relu(block(x, ids, shares) + block.w13(x, ids).sum(1))

    compiled = torch.compile(mixture, backend="eager", fullgraph=True)
    for tokens in (5, 70):
        x = random_rows(tokens, block.w13)
        assert torch.equal(compiled(x), mixture(x))


def test_refusals_leave_the_process_working():
    block = gpu_block(8, 256, 128, (64, 64))
    ids, shares = routing(5, 2, 8)
    x = random_rows(5, block.w13)
    with pytest.raises(ValueError, match="topk_ids must be on the device of a, cuda:0, found cpu"):
        block.w13(x, ids.cpu())
    arguments = list(block.arguments)
    arguments[4] = arguments[4].bfloat16()
    with pytest.raises(TypeError, match="w2_scales must be"):
        ops.marlin_experts(x, *arguments, ids, shares)
    wide = gpu_experts(2, 64, 1 << 20, 64)
    many = random_rows(1 << 16, wide)
    with pytest.raises(torch.OutOfMemoryError):
        wide(many, torch.zeros(1 << 16, 2, dtype=torch.int32, device=DEVICE))
    torch.cuda.empty_cache()
    assert_block(block(x, ids, shares), x, block, ids, shares)


def test_every_device_has_its_own_kernels():
    if torch.cuda.device_count() < 2:
        pytest.skip(ONE_GPU)
    block = gpu_block(8, 256, 128, (64, 64))
    ids, shares = routing(20, 2, 8)
    x = random_rows(20, block.w13)
    there = [each.to("cuda:1") for each in (x, *block.arguments, ids, shares)]
    outs = from_both_devices(lambda: ops.marlin_experts(*there), lambda: block(x, ids, shares))
    assert sorted(out.device.index for out in outs) == [0] * 4 + [1] * 9
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(out.cpu(), block(x, ids, shares).cpu()) for out in outs)
