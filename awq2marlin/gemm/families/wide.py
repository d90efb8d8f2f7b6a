"""A hundred tokens and more on compute capability 9.0: wide tiles, over which blocks walk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from awq2marlin.gemm.families.base import (
    ANY_NUMBER,
    HOPPER,
    SUM_THREADS,
    Box,
    GemmConfig,
    GemmProblem,
    Reduction,
    group_bytes,
    overlapped,
)
from awq2marlin.gemm.source import KernelSource, instantiation

#: Shared memory that a block can have.
_ROOM = 227 << 10

#: The most that the sums of split tiles may take: where there are more, to split them saves nothing.
_MAX_WORKSPACE_BYTES = 24 << 20

#: A warpgroup's rounded row, and what both of them need for two rounds of 64 tokens.
_ROW_BYTES = 2 * (64 + 8)
_ROUNDS_BYTES = 2 * 2 * 64 * _ROW_BYTES

#: What a megabyte of sums takes, in microseconds, on its way into a workspace and out of it.
_MEGABYTE = 0.46


class _Candidate(NamedTuple):
    """Template parameters, and what a launch takes in microseconds on an H100."""

    num_bits: int
    tokens: int
    step: float


#: Bits, tokens, microseconds of a step of 64 rows; those of 4 bits are fitted to a sweep over the shapes of
#: ``benchmarks/gemm.py`` (208 tokens lie between their neighbours), those of 8 bits are guesses.
CANDIDATES = (
    _Candidate(4, 256, 0.735),
    _Candidate(4, 208, 0.61),
    _Candidate(4, 192, 0.58),
    _Candidate(4, 176, 0.56),
    _Candidate(4, 128, 0.457),
    _Candidate(8, 256, 0.77),
    _Candidate(8, 192, 0.61),
    _Candidate(8, 128, 0.475),
)

#: What each tile takes beside its steps, a second launch that sums, and summing in a cluster.
_ENDS, _SUMMING, _SHARING = 1.5, 1.5, 4.1


@dataclass(frozen=True, kw_only=True)
class WideConfig(GemmConfig):
    """The shortest estimate wins. Only tiles that would fill a last wave in part are split along K.

    Attributes:
        tokens: of a tile.
        step: what 64 rows of K take, in microseconds.
    """

    header = "gemm_wide.cuh"
    template = "WideGemm"
    token_ranges = (range(97, 129), range(129, ANY_NUMBER))
    capabilities = (HOPPER, HOPPER)

    tokens: int
    step: float

    @classmethod
    def serves(cls, problem: GemmProblem) -> bool:
        """Returns whether the tokens are many, and lie apart: a map's rows are not known to be allowed to overlap.

        Up to 128 tokens it is slower than the Hopper kernel if groups have 32 rows.
        """
        is_fit = problem.size_m > 128 or problem.group_size >= 64
        return super().serves(problem) and is_fit and not problem.rows_overlap

    @classmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields those for the bits, and for up to 128 tokens only tiles of 128."""
        for candidate in CANDIDATES:
            is_fit = problem.size_m > 128 or candidate.tokens == 128
            if candidate.num_bits == problem.num_bits and is_fit:
                yield cls(dtype=problem.dtype, reduction="workspace", **candidate._asdict())

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields it with whole tiles, with a last wave split by two in clusters, and by every number otherwise."""
        for launch in super().launches(problem):
            if launch.num_splits == 1 or 0 < launch.workspace_bytes(problem) <= _MAX_WORKSPACE_BYTES:
                yield launch
        in_clusters = self.with_splits(2, "cluster")
        if in_clusters.split_tiles(problem) and problem.size_k >= 128 and problem.multiprocessors > 1:
            yield in_clusters

    def cost(self, problem: GemmProblem) -> float:
        """Returns the estimate in microseconds."""
        num_tiles, split_tiles, blocks = self._num_tiles(problem), self.split_tiles(problem), self.grid(problem)[0]
        steps = -(-problem.size_k // 64)
        waves = -(-(num_tiles - split_tiles) // blocks)
        multiplying = waves * steps * self.step
        if split_tiles:
            last_waves = -(-split_tiles * self.num_splits // blocks)
            multiplying += last_waves * -(-steps // self.num_splits) * self.step
            waves += last_waves
        return (
            overlapped(multiplying, problem.reading_microseconds) + waves * _ENDS + self._summing(problem, split_tiles)
        )

    def _summing(self, problem: GemmProblem, split_tiles: int) -> float:
        """Returns what adding the parts' sums takes, in microseconds."""
        if not split_tiles:
            return 0.0
        if self.reduction == "cluster":
            return _SHARING
        return _SUMMING + _MEGABYTE * 1e-6 * self.workspace_bytes(problem)

    def _num_tiles(self, problem: GemmProblem) -> int:
        columns, tokens = self.tile
        return -(-problem.size_n // columns) * -(-problem.size_m // tokens)

    def split_tiles(self, problem: GemmProblem) -> int:
        """Returns how many tiles are split: those of the last wave, if it is not full."""
        blocks = self.grid(problem)[0]
        last = self._num_tiles(problem) % blocks
        is_split = self.num_splits > 1 and (self.reduction == "workspace" or self.num_splits * last <= blocks)
        return last if is_split else 0

    def workspace_bytes(self, problem: GemmProblem) -> int:
        """Returns what the parts' sums take, a tile each."""
        columns, tokens = self.tile
        return 4 * self.num_splits * self.split_tiles(problem) * columns * tokens

    @property
    def sum_source(self) -> KernelSource:
        """The kernel of the second launch."""
        return instantiation(
            f"{self.implementation}::Sum",
            self.header,
            "MARLIN_GEMM",
            threads=SUM_THREADS,
            resident_blocks=4,
            shared_bytes=self.sum_shared_bytes,
        )

    @property
    def sum_shared_bytes(self) -> int:
        """Dynamic shared memory of its blocks: 16 rounded rows of both warpgroups."""
        return 2 * 16 * _ROW_BYTES

    def sum_grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns its blocks: split tiles, and 16 tokens of each."""
        return self.split_tiles(problem), self.tokens // 16, 1

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 128, self.tokens

    @property
    def boxes(self) -> tuple[Box, ...]:
        """For each stage: 64 numbers of the tokens, and two tiles of weights by four."""
        return Box("a", self.tokens, 64, 2, True), Box("qweight", 4, 32 * self.num_bits, 8, False)

    @property
    def parameters(self) -> str:
        """The maps of these boxes come first."""
        return "MARLIN_WIDE_GEMM"

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @functools.cached_property
    def stages(self) -> int:
        """Stages of the pipeline through shared memory: as many as find room, up to 8."""
        return min(8, (_ROOM - _ROUNDS_BYTES) // self._stage_bytes)

    @property
    def _stage_bytes(self) -> int:
        """Activations and weights of a stage, two groups of scales and zero points, and two barriers."""
        return 64 * (2 * self.tokens + 128 * self.num_bits // 8) + 2 * 2 * group_bytes(self.num_bits) + 16

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stages * self._stage_bytes + _ROUNDS_BYTES

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return 1

    @property
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""
        return self.num_bits, self.tokens, self.stages

    def with_splits(self, num_splits: int, reduction: Reduction | None = None) -> WideConfig:
        """Returns the config with K shared: by two blocks in a cluster if wished, else through a workspace."""
        in_cluster = num_splits == 2 and reduction == "cluster"
        return replace(self, num_splits=num_splits, reduction="cluster" if in_cluster else "workspace")

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns as many blocks as the GPU holds, or as there are parts of tiles: they walk over them."""
        blocks = min(self._num_tiles(problem) * self.num_splits, problem.multiprocessors)
        return max(blocks // self.cluster * self.cluster, self.cluster), 1, 1
