"""The kernels of a layer of experts: their parameters, and the source that instantiates each.

A config's fields are its kernel's template parameters, one to one; the generated source asserts that both sides count
threads and shared memory alike.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from awq2marlin.gemm.experts.problem import Activation, ExpertProblem
from awq2marlin.gemm.families.base import CPP_TYPES, MAX_SPLITS, Dtype, group_bytes, sum_bytes
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, instantiation

_CPP_ACTIVATIONS: dict[Activation, str] = {
    "none": "kNone",
    "silu": "kSilu",
    "gelu": "kGelu",
    "gelu_tanh": "kGeluTanh",
}

#: Pairs that a warp sees at once: up to so many need no list of work.
DIRECT_PAIRS = 32

#: Threads of a block that writes the list of work, and the blocks of its cluster where the pairs are many.
ALIGN_THREADS = 1024
ALIGN_BLOCKS = 8

#: Heights of tiles that a list of work can have.
TILE_HEIGHTS = 3

#: Blocks that the second dimension of a grid can have.
_MAX_ITEMS = 65535


def max_work_items(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Returns how many items a list of work has at most: ``max_work_items`` of ``kernels/experts.cuh``."""
    return min(num_pairs, num_experts) + num_pairs // tile_rows


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ABC):
    """A kernel that multiplies rows with their experts' weights.

    Attributes:
        header: in ``kernels/``.
        dtype: the type of everything that is not packed.
        num_bits: 4 or 8.
        activation: of the gate, whose product with the up projection leaves; "none": the product leaves as it is.
        sums_pairs: whether a cluster sums the pairs of a token.
    """

    header: ClassVar[str]

    dtype: Dtype
    num_bits: int
    activation: Activation = "none"
    sums_pairs: bool = False

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""

    @property
    @abstractmethod
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once: the compiler's limit on registers follows."""

    @property
    @abstractmethod
    def implementation(self) -> str:
        """The instantiated C++ class."""

    @property
    @abstractmethod
    def out_columns(self) -> int:
        """Columns of the result that a block writes at once."""

    @abstractmethod
    def grid(self, problem: ExpertProblem, num_splits: int, *, has_list: bool) -> tuple[int, int, int]:
        """Returns the blocks of a launch."""

    def steps(self, problem: ExpertProblem) -> int:
        """Returns how many steps of columns the result has."""
        return -(-problem.out_columns // self.out_columns)

    def blocks(self, problem: ExpertProblem) -> float:
        """Returns how many tiles there are to multiply, where no expert has more rows than a tile."""
        return problem.chosen_experts * self.steps(problem)

    @functools.cached_property
    def source(self) -> KernelSource:
        """The instantiation that it runs."""
        return instantiation(
            self.implementation,
            self.header,
            "MARLIN_EXPERT",
            threads=self.threads,
            resident_blocks=self.resident_blocks,
            shared_bytes=self.shared_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class SmallExpertsConfig(ExpertsConfig):
    """Few rows an expert: ``kernels/experts_small.cuh``.

    Attributes:
        group_rows: the group size, or any that divides K when there is one group.
        token_tiles: rows of a tile, in eights.
        step_rows: rows of K of a warp's step.
        warps: of a block; they share K.
        stages: steps in shared memory, one of which is being multiplied.
        tiles: of 64 columns that a warp owns.
        resident_warps: what the registers of a multiprocessor hold.
    """

    header = "experts_small.cuh"

    group_rows: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    tiles: int
    resident_warps: int

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of a tile."""
        return (8 * self.token_tiles,)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def out_columns(self) -> int:
        """Columns of the result that a block writes at once."""
        return 64 if self.activation != "none" else 64 * self.tiles

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: each warp's steps, later its sums; what other blocks send; the pairs."""
        rows = self.heights[0]
        step = self.step_rows * (2 * rows + self.tiles * 64 * self.num_bits // 8)
        received = (rows * 16 + MAX_SPLITS) * self.tiles * 16 if self.token_tiles == 1 else 0
        return self.warps * max(self.stages * step, self.tiles * sum_bytes(64, rows)) + received + 8 + 4 * rows

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return max(1, self.resident_warps // self.warps)

    def grid(self, problem: ExpertProblem, num_splits: int, *, has_list: bool) -> tuple[int, int, int]:
        """Returns the blocks: splits of steps of columns, by items of the list, pairs or tokens."""
        items = problem.num_pairs
        if self.sums_pairs:
            items //= problem.top_k
        elif has_list:
            items = max_work_items(problem.num_pairs, problem.num_experts, self.heights[-1])
        if items > _MAX_ITEMS:
            raise ValueError(
                f"the experts of {problem.num_pairs // problem.top_k} tokens are more than one launch can have "
                "on this GPU: split the tokens"
            )
        return self.steps(problem) * num_splits, items, 1

    @property
    def implementation(self) -> str:
        """The instantiated C++ class."""
        numbers = (
            self.num_bits,
            self.group_rows,
            self.token_tiles,
            self.step_rows,
            self.warps,
            self.stages,
            self.tiles,
        )
        activation = f"Activation::{_CPP_ACTIVATIONS[self.activation]}"
        arguments = (CPP_TYPES[self.dtype], *map(str, numbers), activation, str(self.sums_pairs).lower())
        return f"SmallExperts<{', '.join(arguments)}>"


@dataclass(frozen=True, kw_only=True)
class HopperExpertsConfig(ExpertsConfig):
    """Many rows an expert, on compute capability 9.0: ``kernels/experts_hopper.cuh``.

    Attributes:
        heights: rows of tiles, the tallest first.
        stages: of the pipeline through shared memory.
        blocks_at_once: that a multiprocessor holds.
        scales_sums: whether scales are applied to the sums of a group, of 128 rows or the only one, and not to weights.
    """

    header = "experts_hopper.cuh"

    heights: tuple[int, ...]
    stages: int
    blocks_at_once: int = 1
    scales_sums: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @property
    def out_columns(self) -> int:
        """Columns of the result that a block writes at once."""
        return 128 if self.activation != "none" else 256

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: stages with groups and barriers; rows that leave, and of the list, in halves."""
        rows = self.heights[0]
        stage = 64 * (2 * rows + 256 * self.num_bits // 8) + 2 * 4 * group_bytes(self.num_bits)
        return self.stages * (stage + 16) + rows * (2 * self.out_columns + 2 * (16 + 16))

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return self.blocks_at_once

    def grid(self, problem: ExpertProblem, num_splits: int, *, has_list: bool) -> tuple[int, int, int]:  # noqa: ARG002
        """Returns as many blocks as the GPU holds: they walk over the list."""
        return problem.multiprocessors * self.blocks_at_once, 1, 1

    @property
    def implementation(self) -> str:
        """The instantiated C++ class."""
        activation = f"Activation::{_CPP_ACTIVATIONS[self.activation]}"
        scales_sums = str(self.scales_sums).lower()
        numbers = (self.num_bits, self.stages, self.blocks_at_once, scales_sums, activation, *self.heights)
        return f"HopperExperts<{CPP_TYPES[self.dtype]}, {', '.join(map(str, numbers))}>"


@functools.cache
def align_source(blocks: int, heights: int) -> KernelSource:
    """Returns the kernel that writes the list of work: which pairs chose which expert.

    Args:
        blocks: of the cluster that shares the pairs; 1 needs no clusters.
        heights: that tiles may have: 1 or `TILE_HEIGHTS`, of which some may be equal.
    """
    return KernelSource(
        f"align_experts<{blocks}, {heights}>",
        f"""\
#include "experts.cuh"
using namespace marlin;
extern "C" __global__ void __launch_bounds__({ALIGN_THREADS}, kAlignBlocks)
    {ENTRY_POINT}(const void* topk_ids, const float* topk_weights, int* work, int num_pairs, int num_experts,
                  int tall, int middle, int low, int max_items, int has_long_ids) {{
  align_experts<{ALIGN_THREADS}, {blocks}, {heights}>(
      {{topk_ids, topk_weights, work, num_pairs, num_experts, tall, middle, low, max_items, has_long_ids}});
}}
""",
    )


@functools.cache
def sum_source(dtype: Dtype) -> KernelSource:
    """Returns the kernel that sums the rows of each token's experts."""
    # Four blocks leave 64 registers a thread, for the rows on their way.
    return KernelSource(
        f"sum_experts<{CPP_TYPES[dtype]}>",
        f"""\
#include "experts.cuh"
using namespace marlin;
extern "C" __global__ void __launch_bounds__(256, 4)
    {ENTRY_POINT}(const u16* rows, const void* topk_ids, u16* out, int num_tokens, int top_k, int num_experts,
                  int size_n, int has_long_ids) {{
  sum_experts<{CPP_TYPES[dtype]}>({{rows, topk_ids, out, num_tokens, top_k, num_experts, size_n, has_long_ids}});
}}
""",
    )
