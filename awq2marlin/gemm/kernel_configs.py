"""Which kernel serves which problem: one description of the problem, one table, one place that picks.

A config is frozen and says everything about a launch; its fields are the kernel's template parameters, one
to one. The generated source asserts that both sides count threads and shared memory alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, repack_source

Dtype = Literal["fp16", "bf16"]
Reduction = Literal["cluster", "workspace"]

#: The compute capability from which the kernels work, and the one whose warpgroup instructions they know.
MIN_CAPABILITY = (8, 0)
HOPPER = (9, 0)

#: Splits of K that one cluster can hold on every GPU that has clusters.
MAX_SPLITS = 8

#: The most that partial sums may take where they go through global memory.
MAX_WORKSPACE_BYTES = 64 << 20

#: Shared memory of a multiprocessor of compute capability 9.0.
SHARED_BYTES = 228 << 10

_CPP_TYPES = {"fp16": "Half", "bf16": "Bfloat16"}


@dataclass(frozen=True)
class GemmProblem:
    """``out[size_m, size_n] = a[size_m, size_k] @ w``, on a kind of GPU.

    Attributes:
        size_m: tokens; at least 1.
        size_n: output features.
        size_k: input features.
        group_size: rows that share a scale; ``size_k`` if there is one group.
        num_bits: 4 or 8.
        dtype: of activations, scales, bias and output.
        capability: the GPU's compute capability.
        multiprocessors: how many the GPU has.
    """

    size_m: int
    size_n: int
    size_k: int
    group_size: int
    num_bits: int
    dtype: Dtype
    capability: tuple[int, int] = HOPPER
    multiprocessors: int = 132

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can sum their parts without a trip through global memory."""
        return self.capability >= HOPPER


class GemmConfig(Protocol):
    """What a launch needs to know of a config, whichever kernel it is for."""

    @property
    def num_splits(self) -> int:
        """How many blocks share a tile over K."""
        ...

    @property
    def reduction(self) -> Reduction:
        """How the parts of a split tile are summed."""
        ...

    @property
    def threads(self) -> int:
        """Threads of a block."""
        ...

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        ...

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        ...

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        ...

    @property
    def source(self) -> KernelSource:
        """The instantiation that it runs."""
        ...


def grid_of(config: GemmConfig, problem: GemmProblem) -> tuple[int, int, int]:
    """Returns the blocks of a launch: splits of K, tiles of columns, tiles of tokens."""
    columns, tokens = config.tile
    return config.num_splits, -(-problem.size_n // columns), -(-problem.size_m // tokens)


def _sum_bytes(columns: int, tokens: int) -> int:
    """What ``SumTile`` takes: fp32, rows padded by four."""
    return tokens * (columns + 4) * 4


def _gemm_source(header: str, implementation: str, threads: int, shared_bytes: int, min_blocks: int) -> KernelSource:
    return KernelSource(
        implementation,
        f"""\
#include "{header}"
using namespace marlin;
using Implementation = {implementation};
static_assert(Implementation::kThreads == {threads}, "the launch counts threads otherwise");
static_assert(Implementation::kSharedBytes == {shared_bytes}, "the launch counts shared memory otherwise");
extern "C" __global__ void __launch_bounds__({threads}, {min_blocks}) {ENTRY_POINT}(MARLIN_GEMM_PARAMETERS) {{
  Implementation::run(MARLIN_GEMM_ARGUMENTS);
}}
""",
    )


@dataclass(frozen=True)
class SmallConfig:
    """Few tokens: ``kernels/gemm_small.cuh``.

    Attributes:
        dtype: the type of everything that is not packed.
        num_bits: 4 or 8.
        group_rows: the group size, or any that divides K when there is one group.
        token_tiles: tokens, in eights.
        step_rows: rows of a warp's step.
        warps: of a block; they share K.
        stages: steps in shared memory, one of which is being multiplied.
        num_splits: blocks that share K.
        reduction: how their sums come together.
    """

    dtype: Dtype
    num_bits: int
    group_rows: int
    token_tiles: int
    step_rows: int
    warps: int
    stages: int
    num_splits: int = 1
    reduction: Reduction = "cluster"

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 64, 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: each warp's steps, later its sums; what other blocks send."""
        columns, tokens = self.tile
        step = self.step_rows * (2 * tokens + columns * self.num_bits // 8)
        received = (tokens * columns // 4 + MAX_SPLITS) * 16
        return self.warps * max(self.stages * step, _sum_bytes(columns, tokens)) + received

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once: the compiler's limit on registers follows."""
        warps = {(4, 1): 20, (4, 2): 12, (8, 1): 16, (8, 2): 12}[self.num_bits, self.token_tiles]
        if self.token_tiles == 2 and self.group_rows == 32:
            warps = 8  # two groups under way, each with its sums
        by_registers = warps // self.warps
        by_shared_memory = SHARED_BYTES // (self.shared_bytes + 1024)
        return max(1, min(by_registers, by_shared_memory))

    @functools.cached_property
    def source(self) -> KernelSource:
        """The kernel's source."""
        cpp = _CPP_TYPES[self.dtype]
        parameters = (
            f"{self.num_bits}, {self.group_rows}, {self.token_tiles}, {self.step_rows}, {self.warps}, {self.stages}"
        )
        implementation = f"SmallGemm<{cpp}, {parameters}>"
        return _gemm_source("gemm_small.cuh", implementation, self.threads, self.shared_bytes, self.resident_blocks)


@dataclass(frozen=True)
class PortableConfig:
    """Any number of tokens on any GPU: ``kernels/gemm_portable.cuh``.

    Attributes:
        dtype: the type of everything that is not packed.
        num_bits: 4 or 8.
        token_tiles: tokens, in eights.
        stages: of the pipeline through shared memory.
        num_splits: blocks that share K.
        reduction: how their sums come together.
    """

    dtype: Dtype
    num_bits: int
    token_tiles: int
    stages: int = 4
    num_splits: int = 1
    reduction: Reduction = "workspace"

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return 1

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 256, 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 256

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, later the sums."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8)
        return max(self.stages * stage, _sum_bytes(columns, tokens))

    @functools.cached_property
    def source(self) -> KernelSource:
        """The kernel's source."""
        parameters = f"{_CPP_TYPES[self.dtype]}, {self.num_bits}, {self.token_tiles}, {self.stages}"
        return _gemm_source("gemm_portable.cuh", f"PortableGemm<{parameters}>", self.threads, self.shared_bytes, 1)


@dataclass(frozen=True)
class HopperConfig:
    """Many tokens on compute capability 9.0: ``kernels/gemm_hopper.cuh``.

    Attributes:
        dtype: the type of everything that is not packed.
        num_bits: 4 or 8.
        tokens: of a block.
        stages: of the pipeline through shared memory.
        resident_blocks: that a multiprocessor holds at once; two are possible with 32 tokens.
        num_splits: blocks that share K.
        reduction: how their sums come together.
    """

    dtype: Dtype
    num_bits: int
    tokens: int
    stages: int
    resident_blocks: int = 1
    num_splits: int = 1
    reduction: Reduction = "cluster"

    @property
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""
        return 256, self.tokens

    @property
    def threads(self) -> int:
        """Threads of a block: two warpgroups that multiply and one that copies."""
        return 384

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, later the sums; then two barriers a stage."""
        columns, tokens = self.tile
        stage = 64 * (2 * tokens + columns * self.num_bits // 8)
        return max(self.stages * stage, _sum_bytes(columns, tokens)) + 2 * self.stages * 8

    @functools.cached_property
    def source(self) -> KernelSource:
        """The kernel's source."""
        parameters = f"{self.num_bits}, {self.tokens}, {self.stages}, {self.resident_blocks}"
        implementation = f"HopperGemm<{_CPP_TYPES[self.dtype]}, {parameters}>"
        return _gemm_source("gemm_hopper.cuh", implementation, self.threads, self.shared_bytes, self.resident_blocks)


# ---- the table: which kernels can serve a problem ---------------------------------------------------------


def small_configs(problem: GemmProblem) -> Iterator[SmallConfig]:
    """Yields what the kernel for up to 16 tokens can do: long steps first, then short ones by more warps."""
    if problem.size_m > 16:
        return
    is_single = problem.group_size == problem.size_k
    for step_rows, warps, stages in ((128, 4, 2), (64, 8, 2)) if problem.num_bits == 4 else ((64, 4, 3),):
        if step_rows == 128 and (problem.group_size < 128 or problem.size_k % 128):
            continue
        yield SmallConfig(
            dtype=problem.dtype,
            num_bits=problem.num_bits,
            group_rows=step_rows if is_single else problem.group_size,
            token_tiles=1 if problem.size_m <= 8 else 2,
            step_rows=step_rows,
            warps=warps,
            stages=stages,
            reduction="cluster" if problem.has_clusters else "workspace",
        )


def portable_configs(problem: GemmProblem) -> Iterator[PortableConfig]:
    """Yields what the portable kernel can do: everything, 32 or 64 tokens a block."""
    for token_tiles in (4, 8):
        yield PortableConfig(
            dtype=problem.dtype,
            num_bits=problem.num_bits,
            token_tiles=token_tiles,
            reduction="cluster" if problem.has_clusters else "workspace",
        )


def hopper_configs(problem: GemmProblem) -> Iterator[HopperConfig]:
    """Yields what the Hopper kernel can do: everything, on compute capability 9.0 alone."""
    if problem.capability != HOPPER:
        return
    for tokens, resident_blocks in ((32, 1), (32, 2), (64, 1), (128, 1)):
        stages = 8 if problem.num_bits == 4 else 5 if resident_blocks == 2 else 6
        yield HopperConfig(
            dtype=problem.dtype,
            num_bits=problem.num_bits,
            tokens=tokens,
            stages=stages,
            resident_blocks=resident_blocks,
        )


def all_configs(problem: GemmProblem) -> list[GemmConfig]:
    """Returns every unsplit config that serves a problem."""
    return [*small_configs(problem), *portable_configs(problem), *hopper_configs(problem)]


def with_splits(config: GemmConfig, num_splits: int, reduction: Reduction | None = None) -> GemmConfig:
    """Returns the config with K shared by ``num_splits`` blocks."""
    changed = replace(config, num_splits=num_splits)  # type: ignore[type-var]
    return changed if reduction is None else replace(changed, reduction=reduction)  # type: ignore[type-var]


# ---- the one place that picks -----------------------------------------------------------------------------


def candidates(problem: GemmProblem) -> list[GemmConfig]:
    """Returns the unsplit configs among which :func:`pick_config` chooses.

    They depend on the number of tokens only by whether it is at most 8, at most 16, or more.
    """
    few: list[GemmConfig] = [*small_configs(problem)]
    return few or [*hopper_configs(problem)] or [*portable_configs(problem)]


@functools.lru_cache(maxsize=1 << 14)
def pick_config(problem: GemmProblem) -> GemmConfig:
    """Picks the kernel and its parameters for a problem.

    The rules come from sweeps on an H200 over the eight layer shapes of ``benchmarks/gemm.py`` (4 bits, g = 128): few
    tokens want as many blocks as fit at once; for more, the shortest estimate wins.
    """
    if problem.size_m <= 16:
        return _pick_small(problem)
    choices = [
        with_splits(config, num_splits)
        for config in candidates(problem)
        for num_splits in range(1, MAX_SPLITS + 1)
        if num_splits * 64 <= problem.size_k and _may_split(problem, num_splits)
    ]
    return min(choices, key=lambda config: _microseconds(config, problem))


def _pick_small(problem: GemmProblem) -> GemmConfig:
    """Few tokens: fill the multiprocessors in one go, with long steps if that works out as well."""
    picked, picked_share = None, 0.0
    for config in small_configs(problem):
        num_splits = _small_splits(config, problem)
        slots = problem.multiprocessors * config.resident_blocks
        share = problem.size_n // config.tile[0] * num_splits / slots
        if picked is None or picked_share < 0.9 < share <= 1:
            picked, picked_share = with_splits(config, num_splits), share
    assert picked is not None, "some config serves every problem"
    return picked


def _small_splits(config: SmallConfig, problem: GemmProblem) -> int:
    """Returns how many blocks should share K: all that run at once, with a step for every warp of theirs."""
    tiles, steps = problem.size_n // config.tile[0], problem.size_k // config.step_rows
    possible = [
        splits
        for splits in range(1, MAX_SPLITS + 1)
        if splits == 1
        or (
            tiles * splits <= _blocks_at_once(problem, config.resident_blocks, splits)
            and splits * config.warps <= steps
        )
    ]
    if config.token_tiles == 1:
        return possible[-1]
    # With more tokens arithmetic counts, too: the fewest steps on the busiest multiprocessor.
    return min(
        reversed(possible),
        key=lambda splits: -(-tiles * splits // problem.multiprocessors) * -(-steps // (splits * config.warps)),
    )


def _blocks_at_once(problem: GemmProblem, resident_blocks: int, num_splits: int) -> int:
    """How many blocks run at the same time, when those that share K must start together."""
    slots = problem.multiprocessors * resident_blocks
    if not problem.has_clusters:
        return slots
    # A cluster lies within one GPC, so that larger ones leave multiprocessors over, and more so when they hold a block
    # each (the shares were found by timing on an H200).
    left_over = {1: 0.0, 2: 0.0, 3: 0.1}.get(num_splits, 0.17)
    return int(slots * (1 - left_over * (1.0 if resident_blocks == 1 else 0.9)))


def _may_split(problem: GemmProblem, num_splits: int) -> bool:
    """Whether the sums of the parts are small enough to go through a workspace, where there is no other way."""
    workspace_bytes = 4 * num_splits * problem.size_m * problem.size_n
    return num_splits == 1 or problem.has_clusters or workspace_bytes <= MAX_WORKSPACE_BYTES


def _microseconds(config: GemmConfig, problem: GemmProblem) -> float:
    """Estimates a launch: waves of blocks, each with its steps and its ends."""
    splits, tiles_n, tiles_m = grid_of(config, problem)
    waves = -(-tiles_n * tiles_m // (_blocks_at_once(problem, config.resident_blocks, splits) // splits))
    step, ends, sharing = _STEP_TIMES[type(config), config.tile[1], config.resident_blocks]
    return waves * (-(-problem.size_k // (64 * splits)) * step + ends + (sharing if splits > 1 else 0))


#: Microseconds on an H200, fitted to sweeps over the benchmark's shapes: for a step of 64 rows, for the ends of a
#: block, and for summing with the blocks that share K. Keys are kernel, tokens of a block, and blocks that a
#: multiprocessor holds.
_STEP_TIMES: dict[tuple[type, int, int], tuple[float, float, float]] = {
    (HopperConfig, 32, 1): (0.59, 0.8, 2.2),
    (HopperConfig, 32, 2): (0.88, 2.4, 4.1),
    (HopperConfig, 64, 1): (0.58, 2.9, 2.4),
    (HopperConfig, 128, 1): (0.75, 2.0, 3.0),
    (PortableConfig, 32, 1): (0.85, 2.0, 3.0),
    (PortableConfig, 64, 1): (1.05, 2.0, 3.0),
}


# ---- the other kernels ------------------------------------------------------------------------------------


def sum_splits_source(dtype: Dtype) -> KernelSource:
    """Returns the kernel that sums the workspace of a split GEMM, adds the bias and rounds."""
    return KernelSource(
        f"sum_splits<{_CPP_TYPES[dtype]}>",
        f"""\
#include "gemm_common.cuh"
using namespace marlin;
extern "C" __global__ void __launch_bounds__(256) {ENTRY_POINT}(MARLIN_GEMM_PARAMETERS) {{
  sum_splits<{_CPP_TYPES[dtype]}>(MARLIN_GEMM_ARGUMENTS);
}}
""",
    )


def all_sources(capability: tuple[int, int]) -> list[KernelSource]:
    """Returns every kernel that a GPU of that compute capability can be asked for."""
    sources = [repack_source(4), repack_source(8), sum_splits_source("fp16"), sum_splits_source("bf16")]
    for dtype in ("fp16", "bf16"):
        for num_bits in (4, 8):
            for group_size in (32, 64, 128):
                for size_m in (1, 16):
                    for size_k in (256, 192):  # a multiple of 128, and one of 64 only
                        if size_k % group_size == 0:
                            problem = GemmProblem(size_m, 256, size_k, group_size, num_bits, dtype, capability)
                            sources += [config.source for config in all_configs(problem)]
    return sorted(set(sources), key=lambda source: source.name)
