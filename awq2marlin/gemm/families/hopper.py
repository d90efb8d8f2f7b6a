"""More than a few tokens on compute capability 9.0: warpgroup instructions, fed by copies that the hardware makes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from awq2marlin.gemm.families.base import (
    ANY_NUMBER,
    CPP_TYPES,
    HOPPER,
    MAX_WORKSPACE_BYTES,
    SUM_THREADS,
    Box,
    GemmConfig,
    GemmProblem,
    StepTimes,
    group_bytes,
    overlapped,
)
from awq2marlin.gemm.source import KernelSource, instantiation


class _Candidate(NamedTuple):
    """Template parameters, and what a launch takes."""

    num_bits: int
    tokens: int
    stages: int
    times: StepTimes
    run_step: float


CANDIDATES = (
    # bits, tokens, stages, microseconds
    _Candidate(4, 32, 8, StepTimes(step=0.42, ends=2.4, cluster=1.8, workspace=2.2), 0.47),
    _Candidate(4, 48, 6, StepTimes(step=0.44, ends=2.1, cluster=2.1, workspace=2.2), 0.48),
    _Candidate(4, 64, 6, StepTimes(step=0.48, ends=2.4, cluster=2.6, workspace=2.2), 0.51),
    _Candidate(4, 96, 6, StepTimes(step=0.61, ends=2.8, cluster=3.2, workspace=2.4), 0.65),
    _Candidate(4, 128, 6, StepTimes(step=0.78, ends=2.8, cluster=4.7, workspace=1.9), 0.85),
    _Candidate(8, 32, 6, StepTimes(step=0.40, ends=2.7, cluster=2.4, workspace=1.9), 0.61),
    _Candidate(8, 48, 6, StepTimes(step=0.43, ends=3.5, cluster=2.0, workspace=2.4), 0.63),
    _Candidate(8, 64, 6, StepTimes(step=0.48, ends=4.0, cluster=2.0, workspace=2.7), 0.67),
    _Candidate(8, 96, 6, StepTimes(step=0.59, ends=3.6, cluster=2.8, workspace=2.6), 0.76),
    _Candidate(8, 128, 6, StepTimes(step=0.72, ends=3.7, cluster=5.0, workspace=1.8), 0.78),
)

#: What a megabyte of sums takes, in microseconds, on its way into a workspace and out of it.
_MEGABYTE = 0.23

#: What every further tile of a run takes beside its steps.
_NEXT_TILE = 1.0

#: By how much tiles of 48 and 64 tokens are slower than estimated where weights are scaled instead of sums, as with
#: groups of less than 128 rows. Tiles of 32 are not.
_SCALED_WEIGHTS = 1.1

#: By how much more tokens than one block has are slower than estimated: the GPU comes near its power limit.
_MANY_TOKENS = 1.11


@dataclass(frozen=True, kw_only=True)
class HopperConfig(GemmConfig):
    """The shortest estimate wins.

    Attributes:
        tokens: of a block.
        stages: of the pipeline through shared memory.
        scales_sums: whether scales are applied to the sums of a group, of 128 rows or the only one, and not to weights.
        times: what a launch takes.
        run_step: what a step takes with equal runs, where blocks are at different rows, in microseconds.
    """

    header = "gemm_hopper.cuh"
    template = "HopperGemm"
    token_ranges = (range(17, 129), range(129, ANY_NUMBER))
    capabilities = (HOPPER, HOPPER)

    tokens: int
    stages: int
    scales_sums: bool
    times: StepTimes
    run_step: float

    @classmethod
    def serves(cls, problem: GemmProblem) -> bool:
        """Returns whether the tokens lie apart, too: a map's rows are not known to be allowed to overlap."""
        return super().serves(problem) and not problem.rows_overlap

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields those for the bits; above 128 tokens only the highest tiles, which read weights least often."""
        has_long_groups = problem.size_k % 128 == 0 and problem.group_size in (128, problem.size_k)
        for candidate in CANDIDATES:
            is_high_enough = problem.size_m <= 128 or candidate.tokens == 128
            if candidate.num_bits == problem.num_bits and is_high_enough:
                yield cls(
                    dtype=problem.dtype,
                    reduction=problem.reduction,
                    scales_sums=has_long_groups and candidate.tokens <= 64,
                    **candidate._asdict(),
                )

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields it with every number of splits, as clusters and through a workspace, and with equal runs.

        Clusters are the faster way to sum, but leave multiprocessors over; blocks without one go anywhere.
        """
        for launch in super().launches(problem):
            yield launch
            if launch.num_splits > 1 and launch.workspace_bytes(problem) <= MAX_WORKSPACE_BYTES:
                yield launch.with_splits(launch.num_splits, "workspace")
        runs = self.with_splits(1, "runs")
        if problem.size_m <= self.tokens and runs.workspace_bytes(problem) <= MAX_WORKSPACE_BYTES:
            yield runs

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        slower = _MANY_TOKENS if problem.size_m > 128 else 1.0
        if self.tokens in (48, 64) and not self.scales_sums:
            slower *= _SCALED_WEIGHTS
        return slower * (self._runs_microseconds(problem) if self.reduction == "runs" else self._microseconds(problem))

    def _microseconds(self, problem: GemmProblem) -> float:
        megabytes = 8e-6 * self.num_splits * problem.size_m * problem.size_n if self.needs_workspace else 0
        return self.times.microseconds(self, problem) + _MEGABYTE * megabytes

    def _runs_microseconds(self, problem: GemmProblem) -> float:
        columns, _ = self.tile
        tiles, blocks = -(-problem.size_n // columns), self.blocks_at_once(problem)
        steps = -(-tiles * (problem.size_k // self.split_rows) // blocks) * self.split_rows / 64
        megabytes = 8e-6 * blocks * columns * problem.size_m  # a part and a half for each run, most of them early
        ends = self.times.ends + tiles / blocks * _NEXT_TILE
        multiplying = overlapped(steps * self.run_step, problem.reading_microseconds)
        return multiplying + ends + self.times.workspace + _MEGABYTE * megabytes

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 256, self.tokens

    @property
    def boxes(self) -> tuple[Box, ...]:
        """For each stage: 64 numbers of the tokens, and four tiles of weights by four, or with 8 bits by two.

        With 8 bits and scales on sums warps copy all, as `HopperGemm::kCopiedBy` says.
        """
        if self.num_bits == 8 and self.scales_sums:
            return ()
        return Box("a", self.tokens, 64, 2, True), Box("qweight", 4, 256, 8, False)

    @property
    def parameters(self) -> str:
        """The maps of the boxes come first, if there are any."""
        return "MARLIN_HOPPER_GEMM" if self.boxes else "MARLIN_GEMM"

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages with their groups, two barriers each, and one more."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8) + 2 * 4 * group_bytes(self.num_bits)
        return self.stages * (stage + 2 * 8) + 8

    @property
    def split_rows(self) -> int:
        """Rows of K that a split has a whole number of."""
        return 128 if self.scales_sums else 64

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns the blocks of a launch: splits of K, tiles of columns, tiles of tokens; with runs all in one row."""
        return (self.blocks_at_once(problem), 1, 1) if self.reduction == "runs" else super().grid(problem)

    def splits_argument(self, problem: GemmProblem) -> int:
        """Returns how many blocks share a tile's K, or, negative, that of all tiles."""
        return -self.blocks_at_once(problem) if self.reduction == "runs" else self.num_splits

    def workspace_bytes(self, problem: GemmProblem) -> int:
        """Returns what the parts take, each as much as a whole tile: two of every run."""
        columns, tokens = self.tile
        parts = 2 * self.blocks_at_once(problem) if self.reduction == "runs" else math.prod(self.grid(problem))
        return 4 * parts * columns * tokens

    @functools.cached_property
    def sum_source(self) -> KernelSource:
        """The kernel of the second launch."""
        implementation = f"HopperSum<{CPP_TYPES[self.dtype]}, {self.tokens}, {self.split_rows}>"
        return instantiation(
            implementation, self.header, "MARLIN_GEMM", threads=SUM_THREADS, resident_blocks=4, shared_bytes=0
        )

    def sum_grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns that kernel's blocks: eight tokens of a tile each."""
        columns, tokens = self.tile
        return -(-min(problem.size_m, tokens) // 8), -(-problem.size_n // columns), -(-problem.size_m // tokens)

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return 1

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.tokens, self.stages, int(self.scales_sums)
