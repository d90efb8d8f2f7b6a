"""Many tokens on compute capability 9.0: warpgroup instructions, fed by a warpgroup that only copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import ANY_NUMBER, HOPPER, GemmConfig, GemmProblem, StepTimes, sum_bytes


class _Candidate(NamedTuple):
    """Template parameters for either number of bits, and what a launch takes."""

    tokens: int
    blocks: int
    stages: dict[int, int]
    times: StepTimes


CANDIDATES = (
    # tokens, blocks of a multiprocessor, stages for 4 and 8 bits, microseconds
    _Candidate(32, 1, {4: 8, 8: 6}, StepTimes(step=0.59, ends=0.8, sharing=2.2)),
    _Candidate(32, 2, {4: 8, 8: 5}, StepTimes(step=0.88, ends=2.4, sharing=4.1)),
    _Candidate(64, 1, {4: 8, 8: 6}, StepTimes(step=0.58, ends=2.9, sharing=2.4)),
    _Candidate(128, 1, {4: 8, 8: 6}, StepTimes(step=0.75, ends=2.0, sharing=3.0)),
)


@dataclass(frozen=True, kw_only=True)
class HopperConfig(GemmConfig):
    """The shortest estimate wins.

    Attributes:
        tokens: of a block.
        stages: of the pipeline through shared memory.
        blocks: that a multiprocessor holds at once; two are possible with 32 tokens.
        times: what a launch takes.
    """

    header = "gemm_hopper.cuh"
    template = "HopperGemm"
    token_ranges = (range(1, ANY_NUMBER),)
    capabilities = (HOPPER, HOPPER)

    tokens: int
    stages: int
    blocks: int
    times: StepTimes

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields all of them for every problem."""
        for tokens, blocks, stages, times in CANDIDATES:
            yield cls(
                dtype=problem.dtype,
                num_bits=problem.num_bits,
                reduction=problem.reduction,
                tokens=tokens,
                stages=stages[problem.num_bits],
                blocks=blocks,
                times=times,
            )

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        return self.times.microseconds(self, problem)

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 256, self.tokens

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, later the sums; then two barriers a stage."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8)
        return max(self.stages * stage, sum_bytes(columns, tokens)) + 2 * self.stages * 8

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return self.blocks

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.tokens, self.stages, self.blocks
