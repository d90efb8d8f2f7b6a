"""Any number of tokens on any GPU: tensor-core instructions of compute capability 8.0."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import ANY_NUMBER, GemmConfig, GemmProblem, StepTimes, sum_bytes


class _Candidate(NamedTuple):
    """Template parameters, and what a launch takes."""

    token_tiles: int
    stages: int
    times: StepTimes


CANDIDATES = (
    # eights of tokens, stages, microseconds
    _Candidate(4, 4, StepTimes(step=0.85, ends=2.0, cluster=3.0, workspace=3.0)),
    _Candidate(8, 4, StepTimes(step=1.05, ends=2.0, cluster=3.0, workspace=3.0)),
)


@dataclass(frozen=True, kw_only=True)
class PortableConfig(GemmConfig):
    """The shortest estimate wins.

    Attributes:
        token_tiles: tokens, in eights.
        stages: of the pipeline through shared memory.
        times: what a launch takes.
    """

    header = "gemm_portable.cuh"
    template = "PortableGemm"
    token_ranges = (range(1, ANY_NUMBER),)
    is_fallback = True

    token_tiles: int
    stages: int
    times: StepTimes

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields all of them for every problem."""
        for candidate in CANDIDATES:
            yield cls(
                dtype=problem.dtype, num_bits=problem.num_bits, reduction=problem.reduction, **candidate._asdict()
            )

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        return self.times.microseconds(self, problem)

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 256, 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 256

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, later the sums."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8)
        return max(self.stages * stage, sum_bytes(columns, tokens))

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return 1

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.token_tiles, self.stages
