"""More than a few tokens on compute capability 9.0: warpgroup instructions, fed by a warpgroup that only copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import (
    ANY_NUMBER,
    HOPPER,
    MAX_WORKSPACE_BYTES,
    GemmConfig,
    GemmProblem,
    StepTimes,
    group_bytes,
    sum_bytes,
)


class _Candidate(NamedTuple):
    """Template parameters, and what a launch takes."""

    num_bits: int
    tokens: int
    blocks: int
    stages: int
    times: StepTimes


CANDIDATES = (
    # bits, tokens, blocks of a multiprocessor, stages, microseconds
    _Candidate(4, 32, 1, 8, StepTimes(step=0.44, ends=3.0, cluster=1.8, workspace=2.4)),
    _Candidate(4, 32, 2, 8, StepTimes(step=0.88, ends=2.4, cluster=4.1, workspace=4.1)),
    _Candidate(4, 48, 1, 8, StepTimes(step=0.48, ends=3.3, cluster=2.1, workspace=2.4)),
    _Candidate(4, 64, 1, 8, StepTimes(step=0.53, ends=3.3, cluster=2.4, workspace=2.4)),
    _Candidate(4, 96, 1, 8, StepTimes(step=0.62, ends=3.0, cluster=3.7, workspace=2.4)),
    _Candidate(4, 128, 1, 8, StepTimes(step=0.70, ends=2.8, cluster=4.5, workspace=2.4)),
    _Candidate(8, 32, 1, 6, StepTimes(step=0.45, ends=3.1, cluster=2.2, workspace=2.1)),
    _Candidate(8, 48, 1, 6, StepTimes(step=0.49, ends=3.4, cluster=2.5, workspace=2.1)),
    _Candidate(8, 64, 1, 6, StepTimes(step=0.53, ends=3.5, cluster=2.7, workspace=2.1)),
    _Candidate(8, 96, 1, 6, StepTimes(step=0.61, ends=3.4, cluster=4.1, workspace=2.1)),
    _Candidate(8, 128, 1, 6, StepTimes(step=0.72, ends=3.3, cluster=4.6, workspace=2.1)),
)

#: What a megabyte of sums takes, in microseconds, on its way into a workspace and out of it.
_MEGABYTE = 0.23

#: By how much more tokens than one block has are slower than estimated: the GPU comes near its power limit.
_MANY_TOKENS = 1.11


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
    token_ranges = (range(17, ANY_NUMBER),)
    capabilities = (HOPPER, HOPPER)

    tokens: int
    stages: int
    blocks: int
    times: StepTimes

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields those for the bits."""
        for candidate in CANDIDATES:
            if candidate.num_bits == problem.num_bits:
                yield cls(dtype=problem.dtype, reduction=problem.reduction, **candidate._asdict())

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields it with every number of splits, as clusters and through a workspace.

        Clusters are the faster way to sum, but leave multiprocessors over; blocks without one go anywhere.
        """
        for launch in super().launches(problem):
            yield launch
            if launch.num_splits > 1 and launch.workspace_bytes(problem) <= MAX_WORKSPACE_BYTES:
                yield launch.with_splits(launch.num_splits, "workspace")

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        through_memory = self.num_splits > 1 and self.reduction == "workspace"
        megabytes = 2e-6 * self.workspace_bytes(problem) if through_memory else 0
        slower = _MANY_TOKENS if problem.size_m > 128 else 1.0
        return slower * (self.times.microseconds(self, problem) + _MEGABYTE * megabytes)

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
        """Shared memory of a block: the stages with their groups, later the sums; then two barriers a stage."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8) + 2 * 4 * group_bytes(self.num_bits)
        return max(self.stages * stage, sum_bytes(columns, tokens)) + 2 * self.stages * 8

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return self.blocks

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.tokens, self.stages, self.blocks
