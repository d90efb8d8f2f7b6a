"""Hundreds of tokens and more on compute capability 9.0: wide tiles, over which blocks walk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from awq2marlin.gemm.families.base import (
    ANY_NUMBER,
    HOPPER,
    MAX_WORKSPACE_BYTES,
    Box,
    GemmConfig,
    GemmProblem,
    Reduction,
    group_bytes,
    overlapped,
)

#: Shared memory that a block can have.
_ROOM = 227 << 10

#: What a megabyte of sums takes, in microseconds, on its way into a workspace and out of it.
_MEGABYTE = 0.11


class _Candidate(NamedTuple):
    """Template parameters, and what a launch takes in microseconds on an H100."""

    num_bits: int
    tokens: int
    step: float


#: Bits, tokens, microseconds of a step of 64 rows; those of 4 bits are fitted to a sweep over the shapes of
#: ``benchmarks/gemm.py`` (208 tokens lie between their neighbours), those of 8 bits are guesses.
CANDIDATES = (
    _Candidate(4, 256, 0.69),
    _Candidate(4, 208, 0.572),
    _Candidate(4, 192, 0.544),
    _Candidate(4, 176, 0.533),
    _Candidate(4, 128, 0.456),
    _Candidate(8, 256, 0.72),
    _Candidate(8, 192, 0.57),
    _Candidate(8, 128, 0.48),
)

#: What each tile takes beside its steps, and a second launch that sums.
_ENDS, _SUMMING = 2.3, 4.6


@dataclass(frozen=True, kw_only=True)
class WideConfig(GemmConfig):
    """The shortest estimate wins. Blocks that share K leave their sums in a workspace.

    Attributes:
        tokens: of a tile.
        step: what 64 rows of K take, in microseconds.
    """

    header = "gemm_wide.cuh"
    template = "WideGemm"
    parameters = "MARLIN_WIDE_GEMM"
    token_ranges = (range(129, ANY_NUMBER),)
    capabilities = (HOPPER, HOPPER)

    tokens: int
    step: float

    @classmethod
    def serves(cls, problem: GemmProblem) -> bool:
        """Returns whether the tokens are many, and lie apart: a map's rows are not known to be allowed to overlap."""
        return super().serves(problem) and not problem.rows_overlap

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields those for the bits."""
        for candidate in CANDIDATES:
            if candidate.num_bits == problem.num_bits:
                yield cls(dtype=problem.dtype, reduction="workspace", **candidate._asdict())

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields it with every number of splits whose sums fit the workspace."""
        for launch in super().launches(problem):
            if launch.num_splits == 1 or launch.workspace_bytes(problem) <= MAX_WORKSPACE_BYTES:
                yield launch

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        waves = -(-self._places(problem) // problem.multiprocessors)
        multiplying = waves * -(-problem.size_k // (64 * self.num_splits)) * self.step
        summing = _SUMMING + _MEGABYTE * 2e-6 * self.workspace_bytes(problem) if self.num_splits > 1 else 0.0
        return overlapped(multiplying, problem.reading_microseconds) + waves * _ENDS + summing

    def _places(self, problem: GemmProblem) -> int:
        """Returns how many tiles there are to multiply, a split of K counting as one."""
        columns, tokens = self.tile
        return -(-problem.size_n // columns) * -(-problem.size_m // tokens) * self.num_splits

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 128, self.tokens

    @property
    def boxes(self) -> tuple[Box, ...]:
        """For each stage: 64 numbers of the tokens, and two tiles of weights by four."""
        return Box("a", self.tokens, 64, 2, True), Box("qweight", 4, 32 * self.num_bits, 8, False)

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @functools.cached_property
    def stages(self) -> int:
        """Stages of the pipeline through shared memory: as many as find room, up to 8."""
        return min(8, (_ROOM - self._row_bytes) // self._stage_bytes)

    @property
    def _stage_bytes(self) -> int:
        """Activations and weights of a stage, two groups of scales and zero points, and two barriers."""
        return 64 * (2 * self.tokens + 128 * self.num_bits // 8) + 2 * 2 * group_bytes(self.num_bits) + 16

    @property
    def _row_bytes(self) -> int:
        """The rounded rows of a result."""
        return self.tokens * 2 * (128 + 8)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stages * self._stage_bytes + self._row_bytes

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return 1

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.tokens, self.stages

    def with_splits(self, num_splits: int, reduction: Reduction | None = None) -> GemmConfig:  # noqa: ARG002
        """Returns the config with K shared; the sums go through a workspace, as blocks that stay form no clusters."""
        return replace(self, num_splits=num_splits)

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns as many blocks as the GPU holds, or as there are tiles for: they walk over them."""
        return min(self._places(problem), problem.multiprocessors), 1, 1
