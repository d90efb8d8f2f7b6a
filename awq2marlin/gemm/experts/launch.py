"""The CUDA launches of a layer of experts, on the current stream of the tensors' device.

A block of experts is up to four launches: the list of work (which pairs of a token and a choice go to which expert),
the two products, and the sum over a token's experts. Few tokens need no list, and one token no sum either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch

from awq2marlin.gemm.checks import Weights, check_addresses
from awq2marlin.gemm.driver import Blocks, PreparedKernel, device_of, load_kernels
from awq2marlin.gemm.experts.checks import (
    BlockTensors,
    ExpertTensors,
    check_block,
    check_block_addresses,
    check_gemm,
    check_gemm_addresses,
    check_reach,
    weights_of,
)
from awq2marlin.gemm.experts.kernels import (
    ALIGN_BLOCKS,
    ALIGN_THREADS,
    TILE_HEIGHTS,
    align_source,
    max_work_items,
    sum_source,
)
from awq2marlin.gemm.experts.problem import Activation, ExpertProblem
from awq2marlin.gemm.experts.select import Launch, align_sources, all_configs, heights_for, is_direct, pick_launch
from awq2marlin.gemm.families.base import HOPPER
from awq2marlin.gemm.launch import DTYPES
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE


class Plan(NamedTuple):
    """What serves one product, or both of a block.

    Attributes:
        heights: of tiles, the tallest first: so many rows of an expert are multiplied together.
        has_list: whether there is a list of work.
        launches: a kernel for each product.
    """

    heights: tuple[int, ...]
    has_list: bool
    launches: tuple[Launch, ...]


def make_plan(*problems: ExpertProblem) -> Plan:
    """Picks what serves a product, or both of a block.

    Raises:
        ValueError: there are more tokens than one launch can have.
    """
    heights = heights_for(problems[0])
    has_list = not is_direct(problems[0], heights)
    launches = tuple(pick_launch(problem, heights, has_list=has_list) for problem in problems)
    for (config, num_splits), problem in zip(launches, problems, strict=True):
        config.grid(problem, num_splits, has_list=has_list)  # before anything is launched
    return Plan(heights, has_list, launches)


# ---- what serves a call --------------------------------------------------------------------------------------------


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


# ---- the calls ---------------------------------------------------------------------------------------------------


class GemmCall:
    """A grouped product of tensors of one kind, checked, picked and prepared: each call says only where they are."""

    def __init__(self, tensors: ExpertTensors) -> None:
        """Compiles and loads the kernels, if that has not been done.

        Args:
            tensors: on a CUDA device, with at least one token; those of a call have their types, shapes, strides and
                device.

        Raises:
            TypeError: as `plan_gemm` does.
            ValueError: as `plan_gemm` does.
            KernelUnavailableError: a kernel cannot be compiled or loaded now.
        """
        plan, problem = plan_gemm(tensors)
        rows, stride = tensors.a.shape[0], tensors.a.stride(0)
        self._out_shape = (*tensors.topk_ids.shape, problem.size_n)
        self._work_bytes = _work_bytes(plan, problem)
        self._list = _list_kernel(plan, problem, tensors.topk_ids)
        self._product = _product_kernel(plan, 0, problem, rows, stride, _weights_of_gemm(tensors), tensors.topk_ids)

    def __call__(self, tensors: ExpertTensors) -> torch.Tensor:
        """Returns every pair's product, [M, k, N], formed on the current stream of the tensors' device.

        Raises:
            ValueError: a tensor begins where the widest load of a kernel may not.
        """
        a, qweight, scales, qzeros, topk_ids, topk_weights, bias, _ = tensors
        if topk_weights is not None and topk_weights.dtype is not torch.float32:
            topk_weights = topk_weights.float()
        weights = qweight.data_ptr(), scales.data_ptr(), _address(qzeros), _address(bias)
        a_at, ids_at, shares_at = a.data_ptr(), topk_ids.data_ptr(), _address(topk_weights)
        if _is_misplaced(a_at, *weights, ids_at, shares_at):
            check_gemm_addresses(tensors)
        out = a.new_zeros(self._out_shape)
        work_at = 0
        if self._list is not None:
            work = a.new_empty((self._work_bytes,), dtype=torch.uint8)
            work_at = work.data_ptr()
            self._list(ids_at, shares_at, work_at)
        self._product(a_at, *weights, shares_at, ids_at, work_at, out.data_ptr())
        return out


class BlockCall:
    """A block of experts on tensors of one kind, checked, picked and prepared: each call says only where they are."""

    def __init__(self, block: BlockTensors) -> None:
        """Compiles and loads the kernels, if that has not been done.

        Args:
            block: on a CUDA device, with at least one token; those of a call have their types, shapes, strides and
                device.

        Raises:
            TypeError: as `plan_block` does.
            ValueError: as `plan_block` does.
            KernelUnavailableError: a kernel cannot be compiled or loaded now.
        """
        plan, (first, second) = plan_block(block)
        (w13, w2), hidden, ids = weights_of(block), block.hidden, block.topk_ids
        pairs, has_rows = first.num_pairs, not plan.launches[1].config.sums_pairs
        # What is between the launches shares a piece of memory: the list, rows of I, rows of H; two bytes a number.
        self._inner_from = _up_to_line(_work_bytes(plan, first))
        self._rows_from = self._inner_from + _up_to_line(2 * pairs * second.size_k)
        self._scratch_bytes = self._rows_from + (2 * pairs * second.size_n if has_rows else 0)
        self._list = _list_kernel(plan, first, ids)
        self._first = _product_kernel(plan, 0, first, hidden.shape[0], hidden.stride(0), w13, ids)
        self._second = _product_kernel(plan, 1, second, pairs, second.size_k, w2, ids, reads_early=True)
        self._sum = _sum_kernel(second, ids) if has_rows else None

    def __call__(self, block: BlockTensors, out: torch.Tensor) -> None:
        """Writes the result, on the current stream of the tensors' device.

        Args:
            block: like the one that it was made for.
            out: where the result goes, contiguous [M, H]; it may be the block's tokens.

        Raises:
            ValueError: a tensor begins where the widest load of a kernel may not.
        """
        hidden, w13, s13, z13, w2, s2, z2, topk_ids, topk_weights, b13, b2, _, _ = block
        if topk_weights.dtype is not torch.float32:
            topk_weights = topk_weights.float()
        first = w13.data_ptr(), s13.data_ptr(), _address(z13), _address(b13)
        second = w2.data_ptr(), s2.data_ptr(), _address(z2), _address(b2)
        hidden_at, out_at = hidden.data_ptr(), out.data_ptr()
        ids_at, shares_at = topk_ids.data_ptr(), topk_weights.data_ptr()
        if _is_misplaced(hidden_at, *first, *second, ids_at, shares_at, out_at):
            check_block_addresses(block)
            check_addresses(out=(out, 16))
        scratch = hidden.new_empty((self._scratch_bytes,), dtype=torch.uint8)
        work_at = scratch.data_ptr()
        inner_at, rows_at = work_at + self._inner_from, work_at + self._rows_from
        if self._list is None:
            work_at = 0
        else:
            self._list(ids_at, shares_at, work_at)
        self._first(hidden_at, *first, shares_at, ids_at, work_at, inner_at)
        if self._sum is None:
            self._second(inner_at, *second, shares_at, ids_at, work_at, out_at)
        else:
            self._second(inner_at, *second, shares_at, ids_at, work_at, rows_at)
            self._sum(rows_at, ids_at, out_at)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_misplaced(*addresses: int) -> bool:
    """Returns whether an address is no multiple of 16, so that it is worth a look which tensor may have such a one."""
    union = 0
    for address in addresses:
        union |= address
    return union % 16 != 0


def _up_to_line(size: int) -> int:
    """Returns a size up to where the next piece of memory may begin."""
    return -(-size // 256) * 256


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
    num_pairs = max_tokens * block.topk_ids.shape[1]
    first, second = (replace(problem, num_pairs=num_pairs) for problem in block_problems(block))
    sources = {config.source: config.shared_bytes for config in all_configs(first, second)}
    sources |= dict.fromkeys((sum_source(first.dtype), *align_sources(first.capability)), 0)
    load_kernels(sources, device_of(block.hidden.device.index))
    return len(sources)


# ---- the kernels -------------------------------------------------------------------------------------------------


def _work_items(plan: Plan, problem: ExpertProblem) -> int:
    return max_work_items(problem.num_pairs, problem.num_experts, plan.heights[-1])


def _work_bytes(plan: Plan, problem: ExpertProblem) -> int:
    """Returns what the list of work takes: 0 where warps see the choices for themselves."""
    return 4 * (4 + 4 * _work_items(plan, problem) + 2 * problem.num_pairs) if plan.has_list else 0


def _list_kernel(plan: Plan, problem: ExpertProblem, ids: torch.Tensor) -> PreparedKernel | None:
    """Returns what writes the list of work, from the addresses of choices, their weights and the list; or None."""
    if not plan.has_list:
        return None
    has_clusters = problem.capability >= HOPPER
    blocks = ALIGN_BLOCKS if has_clusters and problem.num_pairs > ALIGN_THREADS else 1
    return PreparedKernel(
        align_source(blocks, 1 if len(plan.heights) == 1 else TILE_HEIGHTS),
        device_of(ids.device.index),
        Blocks((blocks, 1, 1), ALIGN_THREADS, cluster=blocks, overlaps=has_clusters),
        maps=0,
        addresses=3,
        numbers=(
            problem.num_pairs,
            problem.num_experts,
            *plan.heights,
            *plan.heights[-1:] * (TILE_HEIGHTS - len(plan.heights)),
            _work_items(plan, problem),
            _has_long(ids),
        ),
    )


def _product_kernel(
    plan: Plan,
    which: int,
    problem: ExpertProblem,
    num_rows: int,
    row_stride: int,
    weights: Weights,
    ids: torch.Tensor,
    *,
    reads_early: bool = False,
) -> PreparedKernel:
    """Returns what forms one of a plan's products.

    It takes the addresses of the rows, [M, K] or [M * k, K], qweight, scales, qzeros, bias, the choices' weights, the
    choices, the list of work and the result, a row a pair (or a token).

    With ``reads_early`` the stream's last launch was one of these, too, and has written nothing but the rows: what it
    had waited for itself, weights and choices among it, may be read before it is through.
    """
    config, num_splits = plan.launches[which]
    qweight, scales, qzeros, bias = weights
    return PreparedKernel(
        config.source,
        device_of(ids.device.index),
        Blocks(
            config.grid(problem, num_splits, has_list=plan.has_list),
            config.threads,
            cluster=num_splits,
            shared_bytes=config.shared_bytes,
            overlaps=problem.capability >= HOPPER,
        ),
        maps=0,
        addresses=9,
        numbers=(
            problem.num_pairs,
            problem.num_pairs // num_rows,
            problem.top_k,
            problem.num_experts,
            problem.size_n,
            problem.size_k,
            problem.group_size,
            num_splits,
            _has_long(ids),
            reads_early,
            row_stride,
            qweight.stride(1),
            scales.stride(1),
            0 if qzeros is None else qzeros.stride(1),
            qweight.stride(0),
            scales.stride(0),
            0 if qzeros is None else qzeros.stride(0),
            0 if bias is None else bias.stride(0),
        ),
    )


def _sum_kernel(problem: ExpertProblem, ids: torch.Tensor) -> PreparedKernel:
    """Returns what sums each token's weighted rows, from the addresses of rows, choices and result."""
    num_tokens = ids.shape[0]
    blocks = min(-(-num_tokens * problem.size_n // 2048), 1 << 16)  # 256 threads, eight columns each
    return PreparedKernel(
        sum_source(problem.dtype),
        device_of(ids.device.index),
        Blocks((blocks, 1, 1), 256, overlaps=problem.capability >= HOPPER),
        maps=0,
        addresses=3,
        numbers=(num_tokens, problem.top_k, problem.num_experts, problem.size_n, _has_long(ids)),
    )


def _has_long(ids: torch.Tensor) -> bool:
    """Returns whether the numbers of experts have 64 bits."""
    return ids.dtype == torch.int64
