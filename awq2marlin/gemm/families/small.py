"""Few tokens: a warp reads its own tile of 64 columns, and the warps of a block share K."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import MAX_SPLITS, SHARED_BYTES, GemmConfig, GemmProblem, sum_bytes


class _Candidate(NamedTuple):
    """Template parameters, and how many warps the registers of a multiprocessor hold."""

    num_bits: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    resident_warps: int


#: Long steps first, then short ones by more warps.
CANDIDATES = (
    # bits, eights of tokens, rows of a step, warps, stages, resident warps
    _Candidate(4, 1, 128, 4, 2, 20),
    _Candidate(4, 1, 64, 8, 2, 20),
    _Candidate(4, 2, 128, 4, 2, 12),
    _Candidate(4, 2, 64, 8, 2, 12),
    _Candidate(8, 1, 64, 4, 3, 16),
    _Candidate(8, 2, 64, 4, 3, 12),
)


@dataclass(frozen=True, kw_only=True)
class SmallConfig(GemmConfig):
    """Few tokens want as many blocks as fit at once (swept on an H200, 4 bits, g = 128).

    Attributes:
        group_rows: the group size, or any that divides K when there is one group.
        token_tiles: tokens, in eights.
        step_rows: rows of a warp's step.
        warps: of a block; they share K.
        stages: steps in shared memory, one of which is being multiplied.
        resident_warps: what the registers of a multiprocessor hold.
    """

    header = "gemm_small.cuh"
    template = "SmallGemm"
    token_ranges = (range(1, 9), range(9, 17))

    group_rows: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    resident_warps: int

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields the configs for these bits and tokens; long steps only where they lie within a group."""
        is_single = problem.group_size == problem.size_k
        for num_bits, token_tiles, step_rows, warps, stages, resident_warps in CANDIDATES:
            if (num_bits, token_tiles) != (problem.num_bits, -(-problem.size_m // 8)):
                continue
            if step_rows == 128 and (problem.group_size < 128 or problem.size_k % 128):
                continue
            yield cls(
                dtype=problem.dtype,
                num_bits=num_bits,
                reduction=problem.reduction,
                group_rows=step_rows if is_single else problem.group_size,
                token_tiles=token_tiles,
                step_rows=step_rows,
                warps=warps,
                stages=stages,
                resident_warps=resident_warps,
            )

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields one launch: split so that all blocks run at once, with a step for every warp of theirs."""
        tiles, steps = problem.size_n // self.tile[0], problem.size_k // self.step_rows

        def fits(splits: int) -> bool:
            at_once = problem.blocks_at_once(self.resident_blocks, splits)
            return splits == 1 or (tiles * splits <= at_once and splits * self.warps <= steps)

        def busiest(splits: int) -> int:
            """Returns the steps of the busiest multiprocessor."""
            return -(-tiles * splits // problem.multiprocessors) * -(-steps // (splits * self.warps))

        possible = [splits for splits in range(MAX_SPLITS, 0, -1) if fits(splits)]
        # With more than eight tokens arithmetic counts, too.
        yield self.with_splits(possible[0] if self.token_tiles == 1 else min(possible, key=busiest))

    def cost(self, problem: GemmProblem) -> float:
        """Returns 0 for a launch that fills the multiprocessors in one go, else 1."""
        slots = problem.multiprocessors * self.resident_blocks
        share = problem.size_n // self.tile[0] * self.num_splits / slots
        return 0.0 if 0.9 < share <= 1 else 1.0

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 64, 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: each warp's steps, later its sums; what other blocks send."""
        columns, tokens = self.tile
        step = self.step_rows * (2 * tokens + columns * self.num_bits // 8)
        received = (tokens * columns // 4 + MAX_SPLITS) * 16
        return self.warps * max(self.stages * step, sum_bytes(columns, tokens)) + received

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once, by registers and by shared memory."""
        # Two groups under way, each with its sums, take the registers of more warps.
        warps = 8 if self.token_tiles == 2 and self.group_rows == 32 else self.resident_warps
        by_shared_memory = SHARED_BYTES // (self.shared_bytes + 1024)
        return max(1, min(warps // self.warps, by_shared_memory))

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.group_rows, self.token_tiles, self.step_rows, self.warps, self.stages
