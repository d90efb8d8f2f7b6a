"""The CUDA launches of a layer of experts, on the current stream of the tensors' device.

A block of experts is up to four launches: the list of work (which pairs of a token and a choice go to which expert),
the two products, and the sum over a token's experts. Few tokens need no list, and one token no sum either.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from awq2marlin.gemm.checks import Weights, remembered
from awq2marlin.gemm.experts.checks import BlockTensors, ExpertTensors, check_block, check_gemm, check_reach, weights_of
from awq2marlin.gemm.experts.kernels import ALIGN_BLOCKS, ALIGN_THREADS, align_source, max_work_items, sum_source
from awq2marlin.gemm.experts.problem import Activation, ExpertProblem
from awq2marlin.gemm.experts.select import Launch, all_configs, is_direct, pick_launch, tile_rows_for
from awq2marlin.gemm.families.base import HOPPER
from awq2marlin.gemm.launch import DTYPES, device_of, launch_kernel, load_kernels
from awq2marlin.gemm.source import KernelSource
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE

_int = ctypes.c_int


class Choices(NamedTuple):
    """What the router said, in the types that kernels read.

    Attributes:
        ids: int32 or int64 [M, k], contiguous.
        weights: float32 [M, k], contiguous, or None: every row counts once.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def of(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None) -> Choices:
        """Returns checked tensors of a router, the weights as float32."""
        return cls(topk_ids, None if topk_weights is None else topk_weights.float())

    @property
    def has_long_ids(self) -> bool:
        """Whether the numbers of experts have 64 bits."""
        return self.ids.dtype == torch.int64


class Plan(NamedTuple):
    """What serves one product, or both of a block.

    Attributes:
        tile_rows: rows of an expert that are multiplied together.
        has_list: whether there is a list of work.
        launches: a kernel for each product.
    """

    tile_rows: int
    has_list: bool
    launches: tuple[Launch, ...]


def make_plan(*problems: ExpertProblem) -> Plan:
    """Picks what serves a product, or both of a block.

    Raises:
        ValueError: there are more tokens than one launch can have.
    """
    rows = tile_rows_for(problems[0])
    has_list = not is_direct(problems[0], rows)
    launches = tuple(pick_launch(problem, rows, has_list=has_list) for problem in problems)
    for (config, num_splits), problem in zip(launches, problems, strict=True):
        config.grid(problem, num_splits, has_list=has_list)  # before anything is launched
    return Plan(rows, has_list, launches)


# ---- the public calls ------------------------------------------------------------------------------------------


@remembered
def plan_gemm(tensors: ExpertTensors) -> tuple[Plan, ExpertProblem]:
    """Checks CUDA tensors with at least one token and picks what serves their product.

    Raises:
        TypeError: as `checks.check_gemm` does.
        ValueError: as `checks.check_gemm` does, or rows that a kernel cannot reach.
    """
    a, shape = tensors.a, check_gemm(tensors)
    check_reach("a", a.shape[0], a.stride(0), shape.size_k)
    problem = problem_of(_weights_of_gemm(tensors), tensors.topk_ids, tensors.num_bits)
    return make_plan(problem), problem


@remembered
def plan_block(block: BlockTensors) -> tuple[Plan, tuple[ExpertProblem, ExpertProblem]]:
    """Checks CUDA tensors with at least one token and picks what serves their block.

    Raises:
        TypeError: as `checks.check_block` does.
        ValueError: as `checks.check_block` does, or rows that a kernel cannot reach.
    """
    hidden, shape = block.hidden, check_block(block)
    check_reach("hidden", shape.num_tokens, hidden.stride(0), shape.hidden)
    check_reach("act(gate) * up", shape.num_tokens * shape.top_k, shape.inner, shape.inner)
    problems = block_problems(block)
    return make_plan(*problems), problems


def launch_gemm(plan: Plan, problem: ExpertProblem, tensors: ExpertTensors) -> torch.Tensor:
    """Returns every pair's product, [M, k, N], of tensors that `plan_gemm` has checked.

    Raises:
        KernelUnavailableError: a kernel cannot be compiled or loaded now.
    """
    choices = Choices.of(tensors.topk_ids, tensors.topk_weights)
    out = tensors.a.new_zeros((*tensors.topk_ids.shape, problem.size_n))
    work = write_work(plan, problem, choices)
    run_product(plan.launches[0], problem, tensors.a, _weights_of_gemm(tensors), choices, work, out)
    return out


def _weights_of_gemm(tensors: ExpertTensors) -> Weights:
    return Weights(tensors.qweight, tensors.scales, tensors.qzeros, tensors.bias)


def load_up_to(block: BlockTensors, max_tokens: int) -> int:
    """Compiles and loads every kernel that a layer may need, and returns how many they are.

    Args:
        block: the layer's checked tensors, with any number of tokens.
        max_tokens: the largest number of tokens to come.

    Raises:
        KernelUnavailableError: one cannot be compiled or loaded.
    """
    top_k = block.topk_ids.shape[1]
    sources: dict[KernelSource, int] = {}
    for problem in block_problems(block):
        largest = replace(problem, num_pairs=max_tokens * top_k)
        sources |= {config.source: config.shared_bytes for config in all_configs(largest)}
        sources[sum_source(problem.dtype)] = 0
        sources[align_source(1)] = 0
        if problem.capability >= HOPPER:
            sources[align_source(ALIGN_BLOCKS)] = 0
    load_kernels(sources, device_of(block.hidden.device.index))
    return len(sources)


# ---- a block, step by step --------------------------------------------------------------------------------------


def problem_of(
    weights: Weights,
    topk_ids: torch.Tensor,
    num_bits: int,
    *,
    activation: Activation = "none",
    sums_tokens: bool = False,
) -> ExpertProblem:
    """Describes one grouped product of checked tensors."""
    num_experts, num_groups, size_n = weights.scales.shape
    size_k = weights.qweight.shape[1] * GPTQ_MARLIN_TILE
    device = device_of(weights.qweight.device.index)
    return ExpertProblem(
        num_pairs=topk_ids.numel(),
        top_k=topk_ids.shape[1],
        num_experts=num_experts,
        size_n=size_n,
        size_k=size_k,
        group_size=size_k // num_groups,
        num_bits=num_bits,
        dtype=DTYPES[weights.scales.dtype],
        activation=activation,
        sums_tokens=sums_tokens,
        capability=device.capability,
        multiprocessors=device.multiprocessors,
    )


def block_problems(block: BlockTensors) -> tuple[ExpertProblem, ExpertProblem]:
    """Describes the products of a block."""
    w13, w2 = weights_of(block)
    return (
        problem_of(w13, block.topk_ids, block.num_bits, activation=cast(Activation, block.activation)),
        problem_of(w2, block.topk_ids, block.num_bits, sums_tokens=True),
    )


def launch_block(
    plan: Plan, problems: tuple[ExpertProblem, ExpertProblem], block: BlockTensors, out: torch.Tensor
) -> None:
    """Writes the result, [M, H], of a block that `plan_block` has checked, into ``out``, which may be its tokens.

    Raises:
        KernelUnavailableError: a kernel cannot be compiled or loaded now.
    """
    choices = Choices.of(block.topk_ids, block.topk_weights)
    (first, second), (w13, w2) = problems, weights_of(block)
    num_pairs, hidden = first.num_pairs, block.hidden
    work = write_work(plan, first, choices)
    inner = hidden.new_empty((num_pairs, second.size_k))
    run_product(plan.launches[0], first, hidden, w13, choices, work, inner)
    if plan.launches[1].config.sums_pairs:
        run_product(plan.launches[1], second, inner, w2, choices, work, out, reads_early=True)
        return
    rows = hidden.new_empty((num_pairs, second.size_n))
    run_product(plan.launches[1], second, inner, w2, choices, work, rows, reads_early=True)
    sum_rows(second, rows, choices, out)


def write_work(plan: Plan, problem: ExpertProblem, choices: Choices) -> torch.Tensor | None:
    """Returns the list of work, int32, or None where warps see the choices for themselves."""
    if not plan.has_list:
        return None
    items = max_work_items(problem.num_pairs, problem.num_experts, plan.tile_rows)
    work = choices.ids.new_empty(4 + 4 * items + 2 * problem.num_pairs, dtype=torch.int32)
    arguments = (
        choices.ids.data_ptr(),
        _address(choices.weights),
        work.data_ptr(),
        _int(problem.num_pairs),
        _int(problem.num_experts),
        _int(plan.tile_rows),
        _int(items),
        _int(choices.has_long_ids),
    )
    has_clusters = problem.capability >= HOPPER
    blocks = ALIGN_BLOCKS if has_clusters and problem.num_pairs > ALIGN_THREADS else 1
    launch_kernel(
        align_source(blocks),
        device_of(work.device.index),
        (blocks, 1, 1),
        ALIGN_THREADS,
        arguments,
        cluster=blocks,
        overlaps=has_clusters,
    )
    return work


def run_product(
    launch: Launch,
    problem: ExpertProblem,
    a: torch.Tensor,
    weights: Weights,
    choices: Choices,
    work: torch.Tensor | None,
    out: torch.Tensor,
    *,
    reads_early: bool = False,
) -> None:
    """Launches one grouped product of rows ``a``, [M, K] or [M * k, K], into ``out``, a row a pair (or a token).

    With ``reads_early`` the stream's last launch was one of these, too, and has written nothing but ``a``: what it had
    waited for itself, weights and choices among it, may be read before it is through.
    """
    config, num_splits = launch
    qweight, scales, qzeros, bias = weights
    arguments = (
        a.data_ptr(),
        qweight.data_ptr(),
        scales.data_ptr(),
        _address(qzeros),
        _address(bias),
        _address(choices.weights),
        choices.ids.data_ptr(),
        _address(work),
        out.data_ptr(),
        _int(problem.num_pairs),
        _int(problem.num_pairs // a.shape[0]),
        _int(problem.top_k),
        _int(problem.num_experts),
        _int(problem.size_n),
        _int(problem.size_k),
        _int(problem.group_size),
        _int(num_splits),
        _int(choices.has_long_ids),
        _int(reads_early),
        a.stride(0),
        qweight.stride(1),
        scales.stride(1),
        0 if qzeros is None else qzeros.stride(1),
        qweight.stride(0),
        scales.stride(0),
        0 if qzeros is None else qzeros.stride(0),
        0 if bias is None else bias.stride(0),
    )
    launch_kernel(
        config.source,
        device_of(a.device.index),
        config.grid(problem, num_splits, has_list=work is not None),
        config.threads,
        arguments,
        cluster=num_splits,
        shared_bytes=config.shared_bytes,
        overlaps=problem.capability >= HOPPER,
    )


def sum_rows(problem: ExpertProblem, rows: torch.Tensor, choices: Choices, out: torch.Tensor) -> None:
    """Sums each token's weighted rows [M * k, N] into ``out`` [M, N]."""
    arguments = (
        rows.data_ptr(),
        choices.ids.data_ptr(),
        out.data_ptr(),
        _int(out.shape[0]),
        _int(problem.top_k),
        _int(problem.num_experts),
        _int(problem.size_n),
        _int(choices.has_long_ids),
    )
    blocks = min(-(-out.numel() // 2048), 1 << 16)  # 256 threads, eight columns each
    has_clusters = problem.capability >= HOPPER
    launch_kernel(
        sum_source(problem.dtype), device_of(out.device.index), (blocks, 1, 1), 256, arguments, overlaps=has_clusters
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
