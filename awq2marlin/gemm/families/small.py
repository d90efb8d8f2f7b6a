"""Few tokens: a warp reads its own tile of 64 columns, and the warps of a block share K."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import (
    HOPPER,
    MAX_SPLITS,
    SHARED_BYTES,
    GemmConfig,
    GemmProblem,
    group_bytes,
    overlapped,
    sum_bytes,
)

#: Shared memory that every block takes beside its own.
_RESERVED_BYTES = 1024


class SmallTimes(NamedTuple):
    """What a launch takes, in microseconds on an H100, fitted to a sweep over the shapes of ``benchmarks/gemm.py``.

    Attributes:
        alone: for a step of a block, however idle its multiprocessor.
        each: what it takes of a multiprocessor's time, which the blocks there share.
        ends: for the ends of a block.
        sharing: for summing with the blocks that share K.
    """

    alone: float
    each: float
    ends: float
    sharing: float


class _Candidate(NamedTuple):
    """Template parameters, how many warps the registers of a multiprocessor hold, and what a launch takes."""

    num_bits: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    resident_warps: int
    times: SmallTimes


CANDIDATES = (
    # bits, eights of tokens, rows of a step, warps, stages, resident warps, microseconds
    _Candidate(4, 1, 128, 8, 3, 20, SmallTimes(1.15, 0.60, 1.3, 0.7)),
    _Candidate(4, 1, 128, 4, 2, 20, SmallTimes(1.41, 0.41, 1.9, 1.1)),
    _Candidate(4, 1, 64, 8, 2, 20, SmallTimes(0.98, 0.14, 2.5, 0.5)),
    _Candidate(4, 2, 128, 2, 3, 12, SmallTimes(1.08, 0.07, 1.7, 1.4)),
    _Candidate(4, 2, 64, 8, 3, 12, SmallTimes(0.43, 0.31, 2.3, 0.2)),
    _Candidate(4, 2, 64, 8, 2, 12, SmallTimes(0.74, 0.38, 1.6, 0.8)),
    _Candidate(4, 3, 64, 8, 3, 8, SmallTimes(0.84, 0.46, 2.3, 0.1)),
    _Candidate(4, 4, 64, 8, 3, 8, SmallTimes(1.08, 0.56, 1.9, 0.7)),
    _Candidate(8, 1, 64, 2, 2, 20, SmallTimes(0.61, 0.33, 1.9, 0.5)),
    _Candidate(8, 1, 64, 8, 3, 20, SmallTimes(0.43, 0.40, 2.0, 0.3)),
    _Candidate(8, 1, 64, 8, 2, 20, SmallTimes(0.49, 0.57, 3.0, 0.0)),
    _Candidate(8, 2, 128, 8, 2, 12, SmallTimes(1.24, 0.94, 2.9, 0.6)),
    _Candidate(8, 2, 64, 2, 4, 12, SmallTimes(0.68, 0.19, 2.2, 1.6)),
    _Candidate(8, 2, 64, 8, 3, 12, SmallTimes(0.78, 0.38, 1.4, 0.8)),
    _Candidate(8, 3, 64, 8, 3, 8, SmallTimes(0.76, 0.49, 2.2, 0.8)),
    _Candidate(8, 4, 64, 8, 3, 8, SmallTimes(0.96, 0.44, 2.3, 1.0)),
)


@dataclass(frozen=True, kw_only=True)
class SmallConfig(GemmConfig):
    """The shortest estimate wins.

    A multiprocessor must hold as many blocks as is counted with, and not one more: of 128 blocks it would get two while
    others get none, and the launch takes 1.5 times as long. How many registers the compiler finds decides that only as
    long as they are many: `Bfloat16, 4, 32, 2, 64, 8, 3` has 128, and room for a second block. So a launch asks for
    shared memory that leaves no such room (H100, 2026-11-26: 17.4 instead of 27.0 µs for 8192 x 8192 and 16 tokens).

    Attributes:
        group_rows: the group size, or any that divides K when there is one group.
        token_tiles: tokens, in eights.
        step_rows: rows of a warp's step.
        warps: of a block; they share K.
        stages: steps in shared memory, one of which is being multiplied.
        resident_warps: what the registers of a multiprocessor hold.
        times: what a launch takes.
        is_alone: whether shared memory keeps further blocks away.
    """

    header = "gemm_small.cuh"
    template = "SmallGemm"
    token_ranges = (range(1, 9), range(9, 17), range(17, 25), range(25, 33))

    group_rows: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    resident_warps: int
    times: SmallTimes
    is_alone: bool

    @classmethod
    def serves(cls, problem: GemmProblem) -> bool:
        """Returns whether the tokens are few; more than 16 were timed on Hopper only."""
        return super().serves(problem) and (problem.size_m <= 16 or problem.capability == HOPPER)

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields those for the bits and tokens that the GPU holds, with steps that divide K."""
        is_single = problem.group_size == problem.size_k
        for candidate in CANDIDATES:
            if (candidate.num_bits, candidate.token_tiles) != (problem.num_bits, -(-problem.size_m // 8)):
                continue
            if problem.size_k % candidate.step_rows:
                continue
            config = cls(
                dtype=problem.dtype,
                reduction=problem.reduction,
                group_rows=candidate.step_rows if is_single else problem.group_size,
                is_alone=problem.capability == HOPPER,
                **candidate._asdict(),
            )
            if config.shared_bytes <= problem.shared_limit:
                yield config

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields it whole, and with every number of splits whose blocks all run at once, a step for each warp."""
        tiles, steps = problem.size_n // self.tile[0], problem.size_k // self.step_rows
        for splits in range(1, MAX_SPLITS + 1):
            launch = self.with_splits(splits)
            if splits == 1 or (tiles * splits <= launch.blocks_at_once(problem) and splits * self.warps <= steps):
                yield launch

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds.

        Blocks of a multiprocessor hide each other's waiting, the better the more they are: neither what a block takes
        alone nor what all take together is the time, but both count.
        """
        blocks = problem.size_n // self.tile[0] * self.num_splits
        waves = -(-blocks // self.blocks_at_once(problem))
        busiest = -(-blocks // problem.multiprocessors)
        steps = -(-problem.size_k // (self.step_rows * self.warps * self.num_splits))
        alone, each, ends, sharing = self.times
        multiplying = steps * math.hypot(waves * alone, busiest * each)
        summing = sharing if self.num_splits > 1 else 0
        return overlapped(multiplying, problem.reading_microseconds) + waves * ends + summing

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 64, 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @functools.cached_property
    def kernel_bytes(self) -> int:
        """Shared memory that the kernel uses: each warp's steps, later its sums; what other blocks send."""
        columns, tokens = self.tile
        groups = max(1, self.step_rows // self.group_rows)
        step = self.step_rows * (2 * tokens + columns * self.num_bits // 8) + groups * group_bytes(self.num_bits)
        of_warp = max(self.stages * step, sum_bytes(columns, tokens))
        received = (tokens * columns // 4 + MAX_SPLITS) * 16
        barrier = 16
        return self.warps * -(-of_warp // 128) * 128 + received + barrier

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block, too much for one block more than the registers are sure to hold."""
        too_much = SHARED_BYTES // (self._blocks_by_registers + 1) - _RESERVED_BYTES + 128
        return max(self.kernel_bytes, too_much) if self.is_alone else self.kernel_bytes

    @property
    def _blocks_by_registers(self) -> int:
        return self.resident_warps // self.warps

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once, by registers and by shared memory."""
        return max(1, min(self._blocks_by_registers, SHARED_BYTES // (self.shared_bytes + _RESERVED_BYTES)))

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.group_rows, self.token_tiles, self.step_rows, self.warps, self.stages
