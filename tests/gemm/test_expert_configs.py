"""Which kernels serve experts: every problem has one that fits its GPU, and a warm-up knows it."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq2marlin.gemm.compile_matrix import COMPLETE
from awq2marlin.gemm.experts import launch as experts_launch
from awq2marlin.gemm.experts.kernels import (
    DIRECT_PAIRS,
    TILE_HEIGHTS,
    HopperExpertsConfig,
    SmallExpertsConfig,
    max_work_items,
)
from awq2marlin.gemm.experts.launch import make_plan
from awq2marlin.gemm.experts.problem import ExpertProblem
from awq2marlin.gemm.experts.select import _expected_tiles, all_configs, all_sources
from awq2marlin.gemm.families.base import HOPPER, MAX_SPLITS
from tests.gemm.expert_cases import ROUTINGS, listed_items, random_routing

CAPABILITIES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
SHARED_LIMITS = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
MULTIPROCESSOR_SHARED = {
    (8, 0): 164 << 10,
    (8, 7): 164 << 10,
    (9, 0): 228 << 10,
    (10, 0): 228 << 10,
    (10, 3): 228 << 10,
}


def group_sizes(size_k):
    return st.sampled_from(sorted({size for size in (32, 64, 128, size_k) if size_k % size == 0}))


@st.composite
def layers(draw):
    """What a layer asks for as a grouped product, and as the two products of a block, with one token."""
    hidden, inner = (64 * draw(st.one_of(st.integers(1, 16), st.sampled_from([32, 112, 128, 256]))) for _ in range(2))
    top_k = draw(st.one_of(st.sampled_from([1, 2, 8]), st.integers(1, 32)))
    plain = ExpertProblem(
        num_pairs=top_k,
        top_k=top_k,
        num_experts=draw(st.one_of(st.sampled_from([1, 2, 8, 128, 1024]), st.integers(1, 1024))),
        size_n=hidden,
        size_k=inner,
        group_size=draw(group_sizes(inner)),
        num_bits=draw(st.sampled_from([4, 8])),
        dtype=draw(st.sampled_from(["fp16", "bf16"])),
        activation="none",
        sums_tokens=False,
        capability=draw(st.one_of(st.just(HOPPER), st.sampled_from(CAPABILITIES))),
        multiprocessors=draw(st.one_of(st.sampled_from([16, 108, 132, 148]), st.integers(1, 200))),
    )
    gated = replace(
        plain,
        size_n=2 * inner,
        size_k=hidden,
        group_size=draw(group_sizes(hidden)),
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
    )
    return (plain,), (gated, replace(plain, sums_tokens=True))


#: Numbers of tokens, with every edge between kernels for few of them.
NUMBERS = st.one_of(st.integers(1, 40), st.integers(1, 600), st.integers(1, 1 << 15))


#: Rows that every kernel's grid has room for, in tiles of eight, whoever gets them.
MOST_ROWS = 8 * (65535 - 1024)


def with_tokens(problems, tokens):
    return tuple(replace(each, num_pairs=min(tokens, MOST_ROWS // each.top_k) * each.top_k) for each in problems)


def check_launch(launch, problem, plan):
    """Checks all that the kernel's code takes for granted, which the compiler cannot know."""
    config, num_splits = launch
    assert config.shared_bytes <= SHARED_LIMITS.get(problem.capability, 99 << 10)
    assert config.heights == plan.heights
    assert 1 <= num_splits <= MAX_SPLITS
    blocks = config.grid(problem, num_splits, has_list=plan.has_list)
    assert blocks[0] % num_splits == 0
    assert blocks[0] > 0
    assert blocks[1] > 0
    if isinstance(config, HopperExpertsConfig):
        assert plan.has_list
        assert problem.capability == HOPPER
        assert config.stages >= 3
        assert list(config.heights) == sorted(set(config.heights), reverse=True)
        assert len(config.heights) <= TILE_HEIGHTS
        if config.scales_sums:
            assert config.stages % 2 == 0
            assert problem.size_k % 128 == 0
            assert problem.group_size in (128, problem.size_k)
        assert config.activation != "gelu" or config.heights[0] <= 80  # the error function leaves no registers for more
        assert num_splits == 1
        return
    assert isinstance(config, SmallExpertsConfig)
    assert config.warps >= 1
    shared = config.resident_blocks * (config.shared_bytes + 1024)
    assert config.resident_blocks == 1 or shared <= MULTIPROCESSOR_SHARED.get(problem.capability, 100 << 10)
    assert config.stages >= 2
    assert blocks[0] // num_splits * config.out_columns >= problem.out_columns
    assert problem.size_k % config.step_rows == 0
    assert config.group_rows in (32, 64, 128)
    assert problem.group_size in (config.group_rows, problem.size_k)
    if num_splits > 1:
        assert problem.capability >= HOPPER, "a cluster"
        assert config.token_tiles == 1
    if config.sums_pairs:
        assert (problem.num_pairs, num_splits) == (problem.top_k, problem.top_k)
    else:
        assert num_splits <= problem.size_k // config.step_rows


@settings(max_examples=50)
@given(layers(), NUMBERS, st.lists(NUMBERS, max_size=8))
def test_whatever_is_picked_fits_the_gpu_and_a_warm_up_knows_it(layer, most, fewer):
    for problems in layer:
        known = {config.source: config.shared_bytes for config in all_configs(*with_tokens(problems, most))}
        for tokens in {1, most, *(each for each in fewer if each <= most)}:
            asked = with_tokens(problems, tokens)
            plan = make_plan(*asked)
            assert plan.has_list or asked[0].num_pairs <= DIRECT_PAIRS
            for launch, problem in zip(plan.launches, asked, strict=True):
                check_launch(launch, problem, plan)
                assert known[launch.config.source] == launch.config.shared_bytes
                if problem.capability in COMPLETE:
                    assert launch.config.source in compiled(problem.capability)


@functools.cache
def compiled(capability):
    return set(all_sources(capability))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_a_warm_up_knows_the_kernels_of_all_fewer_tokens(num_bits):
    """Where no height of tiles holds all rows of an expert, it does not grow with their number."""
    problem = ExpertProblem(8, 8, 8, 512, 1024, 128, num_bits, "fp16", "none", True, HOPPER, 132)
    picked = set()
    for tokens in range(1, 500):
        asked = replace(problem, num_pairs=8 * tokens)
        picked.add(make_plan(asked).launches[0].config)
        assert picked <= set(all_configs(asked)), tokens
    tallest = {config.heights[0] for config in picked}
    assert tallest == {8, 16, 24, 32, 80, 112, 128} | ({48, 64, 144} if num_bits == 4 else set())


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(
    ("hidden", "inner", "groups"),
    [
        (2048, 704, (2048, 704)),  # 704 is no multiple of 128: one group is long in the first product only
        (704, 2048, (704, 2048)),
        (2048, 768, (128, 64)),
        (2048, 768, (64, 128)),
    ],
)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_warm_up_knows_both_products_kernels_where_only_one_has_long_groups(
    monkeypatch, activation, hidden, inner, groups, num_bits
):
    """Both have the heights of the first, which long groups decide with few experts."""
    gated = ExpertProblem(1, 1, 16, 2 * inner, hidden, groups[0], num_bits, "fp16", activation, False, HOPPER, 132)
    down = replace(gated, size_n=hidden, size_k=inner, group_size=groups[1], activation="none", sums_tokens=True)
    block = SimpleNamespace(topk_ids=torch.empty(1, 1), hidden=torch.empty(1))
    loaded = {}
    monkeypatch.setattr(experts_launch, "block_problems", lambda _: (gated, down))
    monkeypatch.setattr(experts_launch, "device_of", lambda _: None)
    monkeypatch.setattr(experts_launch, "load_kernels", lambda sources, _: loaded.update(sources))
    needed = {}
    for tokens in range(1, 400):
        plan = make_plan(*(replace(each, num_pairs=tokens) for each in (gated, down)))
        needed |= {config.source: config.shared_bytes for config, _ in plan.launches}
        loaded.clear()
        experts_launch.load_up_to(block, tokens)
        assert needed.items() <= loaded.items(), tokens


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "heights"),
    [
        (256, 4096, 1408, (24,)),
        (512, 4096, 1408, (80, 48, 32)),
        (1024, 4096, 1408, (80, 64, 32)),
        (1400, 4096, 1408, (112, 80, 48)),
        (4096, 4096, 1408, (144, 80, 48)),
        (1024, 2048, 768, (80, 32)),  # a block has few tiles
    ],
)
def test_an_expert_may_have_lower_or_taller_tiles_than_even_routing_would_give_it(tokens, hidden, inner, heights):
    gated = ExpertProblem(8 * tokens, 8, 128, 2 * inner, hidden, 128, 4, "fp16", "silu", False, HOPPER, 132)
    down = replace(gated, size_n=hidden, size_k=inner, activation="none", sums_tokens=True)
    plan = make_plan(gated, down)
    assert plan.heights == heights
    assert [config.heights for config, _ in plan.launches] == [heights, heights]
    others = make_plan(replace(gated, capability=(8, 0), multiprocessors=108))
    assert len(others.heights) == 1


@given(
    st.integers(1, 600),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 5, 16, 160]),
    st.sampled_from(ROUTINGS),
    st.sampled_from([(8,), (80, 32), (80, 48, 32), (80, 64, 32), (144, 80, 48)]),
)
def test_a_list_of_work_holds_every_pair_once_and_has_room(tokens, top_k, number, kind, heights):
    ids, _ = random_routing(tokens, top_k, number, kind)
    items = listed_items(ids, number, heights)
    counts = torch.zeros(number, dtype=torch.int64)
    begins = {}
    for expert, rows, first, count in items:
        assert 0 < count <= rows
        begins[first] = first + count
        counts[expert] += count
    known = ids[(ids >= 0) & (ids < number)].long()
    assert torch.equal(counts, torch.bincount(known, minlength=number))
    end = 0
    while end in begins:  # one after the other, without a gap
        end = begins.pop(end)
    assert (end, begins) == (len(known), {})
    assert len(items) <= max_work_items(ids.numel(), number, heights[-1])


def test_few_pairs_need_no_list_unless_most_share_an_expert():
    problem = ExpertProblem(32, 8, 128, 512, 1024, 128, 4, "fp16", "none", True, HOPPER, 132)
    assert not make_plan(problem).has_list
    assert make_plan(replace(problem, num_experts=8)).has_list
    assert not make_plan(replace(problem, num_pairs=8, num_experts=2)).has_list  # one token
    assert make_plan(replace(problem, num_pairs=40)).has_list


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("group_size", "rows", "is_hopper"), [(128, 32, True), (14336, 32, True), (64, 24, False)])
def test_few_experts_with_16_rows_have_tiles_of_32_where_scales_go_to_sums(num_bits, group_size, rows, is_hopper):
    """Mixtral-8x7B with 64 tokens: with short groups tiles of 32 rows take a third longer (H100, 2026-11-26)."""
    down = ExpertProblem(128, 2, 8, 4096, 14336, group_size, num_bits, "fp16", "none", True, HOPPER, 132)
    plan = make_plan(down)
    assert plan.heights == (rows,)
    assert isinstance(plan.launches[0].config, HopperExpertsConfig) == is_hopper
    if is_hopper:
        assert plan.launches[0].config.scales_sums
        assert plan.launches[0].config.blocks_at_once == 1
    elsewhere = make_plan(replace(down, capability=(8, 0), multiprocessors=108))
    assert elsewhere.heights == (24,)


def test_more_tokens_than_a_grid_has_room_for_are_refused_in_a_sentence():
    problem = ExpertProblem(32 << 16, 32, 8, 2048, 4096, 128, 4, "fp16", "none", True, (8, 0), 108)
    with pytest.raises(ValueError, match="the experts of 65536 tokens are more than one launch can have on this GPU"):
        make_plan(problem)  # not when the list of work is on its way already
    hopper = replace(problem, capability=HOPPER, multiprocessors=132)
    plan = make_plan(hopper)
    assert plan.launches[0].config.grid(hopper, 1, has_list=True) == (132, 1, 1)


def test_a_warm_up_for_few_tokens_leaves_out_the_rest():
    problem = ExpertProblem(8 << 16, 8, 128, 2048, 4096, 128, 4, "fp16", "none", True, HOPPER, 132)
    few, many = (all_configs(replace(problem, num_pairs=8 * tokens)) for tokens in (16, 1 << 16))
    assert set(few) < set(many)


@pytest.mark.parametrize("rows", [96, 144])
@pytest.mark.parametrize("mean", [0.5, 8.0, 95.0, 700.0, 1e6])
def test_the_expected_tiles_are_those_of_every_number_of_rows(mean, rows):
    """Counted from none: what surely is there is not added up one by one."""
    last = math.ceil((mean + 6 * math.sqrt(mean)) / rows)
    each = (math.erfc((tiles * rows - mean) / math.sqrt(2 * mean)) / 2 for tiles in range(last + 1))
    assert _expected_tiles(mean, rows) == pytest.approx(sum(each), rel=1e-9)
