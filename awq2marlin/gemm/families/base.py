"""What every family has: the problem it serves, and a class of configs with their candidates and their cost.

A config is frozen and says everything about a launch; its fields are the kernel's template parameters, one to one.
The generated source asserts that both sides count threads and shared memory alike.
"""

from __future__ import annotations

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, instantiation

Dtype = Literal["fp16", "bf16"]
Reduction = Literal["cluster", "workspace", "runs"]
Capability = tuple[int, int]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)

#: The compute capability from which the kernels work, and the one whose warpgroup instructions they know.
MIN_CAPABILITY: Capability = (8, 0)
HOPPER: Capability = (9, 0)

#: Where ranges of tokens and of compute capabilities have no end.
ANY_NUMBER = sys.maxsize
NEWEST: Capability = (sys.maxsize, 0)

#: Splits of K that one cluster can hold on every GPU that has clusters.
MAX_SPLITS = 8

#: The most that partial sums may take where they go through global memory.
MAX_WORKSPACE_BYTES = 64 << 20

#: Threads of a block of the launch that adds sums.
SUM_THREADS = 256

#: Shared memory of a multiprocessor of compute capability 9.0.
SHARED_BYTES = 228 << 10

CPP_TYPES = {"fp16": "Half", "bf16": "Bfloat16"}


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
        rows_overlap: whether tokens share memory, as those of an expanded tensor do.
    """

    size_m: int
    size_n: int
    size_k: int
    group_size: int
    num_bits: int
    dtype: Dtype
    capability: Capability = HOPPER
    multiprocessors: int = 132
    rows_overlap: bool = False

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can sum their parts without a trip through global memory."""
        return self.capability >= HOPPER

    @property
    def reduction(self) -> Reduction:
        """The better way to sum the parts of a split tile."""
        return "cluster" if self.has_clusters else "workspace"

    @property
    def reading_microseconds(self) -> float:
        """What an H100 takes to read the weights."""
        return self.size_k * self.size_n * self.num_bits / 8 / 3e6

    @property
    def shared_limit(self) -> int:
        """The shared memory that a block can have, in bytes; 8.0 has more than is said here."""
        return (227 if self.capability[0] in (9, 10) else 99) << 10

    def blocks_at_once(self, resident_blocks: int, cluster: int) -> int:
        """Returns how many blocks run at the same time.

        Args:
            resident_blocks: that a multiprocessor holds.
            cluster: how many must start together.
        """
        slots = self.multiprocessors * resident_blocks
        # A cluster lies within one GPC, so that larger ones leave multiprocessors over, and more so when they hold a
        # block each (the shares were found by timing on an H200).
        left_over = {1: 0.0, 2: 0.0, 3: 0.1}.get(cluster, 0.17)
        return int(slots * (1 - left_over * (1.0 if resident_blocks == 1 else 0.9)))


class Box(NamedTuple):
    """A part of a matrix that the hardware copies at a time.

    Attributes:
        tensor: the argument of the GEMM.
        rows: of the box.
        numbers: in each of them.
        number_bytes: of a number, as whom the tensor's memory is read.
        is_swizzled: whether 128-byte rows arrive as warpgroup instructions want them.
    """

    tensor: Literal["a", "qweight"]
    rows: int
    numbers: int
    number_bytes: Literal[2, 8]
    is_swizzled: bool


@dataclass(frozen=True, kw_only=True)
class GemmConfig(ABC):
    """A family's kernel with its parameters.

    A subclass is a family. Its fields beside these are template parameters, and what its cost depends on.

    Attributes:
        header: the family's, in ``kernels/``.
        template: the class in it that is instantiated.
        token_ranges: numbers of tokens that the family takes, cut where its candidates change.
        capabilities: the first and the last compute capability that it runs on.
        is_fallback: whether it is for problems only that no other family serves.
        dtype: the type of everything that is not packed.
        num_bits: 4 or 8.
        num_splits: blocks that share K.
        reduction: how their sums come together. With ``"runs"`` no tile has a number of splits of its own: all blocks
            that run at once share all tiles' K evenly, and leave parts in the workspace.
    """

    header: ClassVar[str]
    template: ClassVar[str]
    token_ranges: ClassVar[tuple[range, ...]]
    capabilities: ClassVar[tuple[Capability, Capability]] = (MIN_CAPABILITY, NEWEST)
    is_fallback: ClassVar[bool] = False

    dtype: Dtype
    num_bits: int
    num_splits: int = 1
    reduction: Reduction

    # ---- the family ------------------------------------------------------------------------------------------

    @classmethod
    def serves(cls, problem: GemmProblem) -> bool:
        """Returns whether the family takes so many tokens and runs on that GPU."""
        first, last = cls.capabilities
        return first <= problem.capability <= last and any(problem.size_m in tokens for tokens in cls.token_ranges)

    @classmethod
    @abstractmethod
    def candidates(cls, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields the family's unsplit configs for a problem that it serves; at least one.

        Of the tokens they depend only by `token_ranges`. Among equally good ones the first is picked.
        """

    def launches(self, problem: GemmProblem) -> Iterator[GemmConfig]:
        """Yields this candidate with every number of splits that is worth a look.

        Each split has a stage of K, and all splits of a tile run at once.
        """
        for num_splits in range(1, MAX_SPLITS + 1):
            launch = self.with_splits(num_splits)
            runs_at_once = num_splits <= launch.blocks_at_once(problem)
            fits = launch.cluster > 1 or num_splits == 1 or launch.workspace_bytes(problem) <= MAX_WORKSPACE_BYTES
            if num_splits * 64 <= problem.size_k and runs_at_once and fits:
                yield launch

    @abstractmethod
    def cost(self, problem: GemmProblem) -> float:
        """Returns the microseconds that the launch is thought to take; of all launches the shortest is picked."""

    # ---- the kernel ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """Columns and tokens of a block."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""

    @property
    def kernel_bytes(self) -> int:
        """What of it the kernel itself counts: a launch may ask for more, to keep other blocks away."""
        return self.shared_bytes

    @property
    @abstractmethod
    def template_arguments(self) -> tuple[int, ...]:
        """What follows the type among the kernel's template arguments."""

    @property
    @abstractmethod
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once: the compiler's limit on registers follows."""

    @property
    def parameters(self) -> str:
        """What the macros of the kernel's parameters and arguments begin with."""
        return "MARLIN_GEMM"

    @property
    def implementation(self) -> str:
        """The class with its template arguments."""
        arguments = ", ".join(map(str, (CPP_TYPES[self.dtype], *self.template_arguments)))
        return f"{self.template}<{arguments}>"

    @functools.cached_property
    def source(self) -> KernelSource:
        """The instantiation that it runs."""
        return instantiation(
            self.implementation,
            self.header,
            self.parameters,
            threads=self.threads,
            resident_blocks=self.resident_blocks,
            shared_bytes=self.kernel_bytes,
        )

    # ---- the launch ------------------------------------------------------------------------------------------

    def with_splits(self, num_splits: int, reduction: Reduction | None = None) -> GemmConfig:
        """Returns the config with K shared by ``num_splits`` blocks."""
        return replace(self, num_splits=num_splits, reduction=reduction or self.reduction)

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns the blocks of a launch: splits of K, tiles of columns, tiles of tokens."""
        columns, tokens = self.tile
        return self.num_splits, -(-problem.size_n // columns), -(-problem.size_m // tokens)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What the hardware copies by itself, in the order of the kernel's maps; none if the kernel reads all."""
        return ()

    @property
    def cluster(self) -> int:
        """Blocks that form a cluster."""
        return self.num_splits if self.reduction == "cluster" else 1

    def blocks_at_once(self, problem: GemmProblem) -> int:
        """Returns how many blocks of the launch run at the same time."""
        return problem.blocks_at_once(self.resident_blocks, self.cluster)

    def workspace_bytes(self, problem: GemmProblem) -> int:
        """Returns what the parts' sums take where they go through global memory."""
        return 4 * self.num_splits * problem.size_m * problem.size_n

    @property
    def needs_workspace(self) -> bool:
        """Whether a second launch adds up what this one left in a workspace."""
        return self.reduction == "runs" or (self.reduction == "workspace" and self.num_splits > 1)

    def splits_argument(self, problem: GemmProblem) -> int:  # noqa: ARG002 - of families whose blocks share all tiles
        """Returns what the kernel is told of the splits."""
        return self.num_splits

    @property
    def split_rows(self) -> int:
        """Rows of K that a split has a whole number of."""
        return 64

    # ---- the second launch, which adds what the first one left in a workspace --------------------------------

    @property
    def sum_source(self) -> KernelSource:
        """Its kernel."""
        return sum_splits_source(self.dtype)

    @property
    def sum_shared_bytes(self) -> int:
        """Dynamic shared memory of its blocks, in bytes."""
        return 0

    def sum_grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Returns its blocks."""
        return min(-(-problem.size_m * problem.size_n // 1024), 1 << 16), 1, 1


class StepTimes(NamedTuple):
    """What a launch takes, in microseconds on an H100, fitted to sweeps over the shapes of ``benchmarks/gemm.py``.

    Attributes:
        step: for a step of 64 rows.
        ends: for the ends of a block.
        cluster: for summing with the blocks that share K, in a cluster.
        workspace: for the same through a workspace, but for the traffic: mostly the second launch.
    """

    step: float
    ends: float
    cluster: float
    workspace: float

    def microseconds(self, config: GemmConfig, problem: GemmProblem) -> float:
        """Estimates a launch: waves of blocks, each with its steps and its ends."""
        splits, tiles_n, tiles_m = config.grid(problem)
        waves = -(-tiles_n * tiles_m // (config.blocks_at_once(problem) // splits))
        steps = -(-problem.size_k // (config.split_rows * splits)) * config.split_rows / 64
        summing = 0.0
        if splits > 1:
            summing = self.workspace if config.reduction == "workspace" else waves * self.cluster
        multiplying = waves * steps * self.step
        return overlapped(multiplying, problem.reading_microseconds) + waves * self.ends + summing


def overlapped(multiplying: float, reading: float) -> float:
    """Returns the time for both: the longer one, and more the less they differ, as neither hides all of the other."""
    return math.sqrt(math.hypot(multiplying**2, reading**2))


def group_bytes(num_bits: int) -> int:
    """Returns what a tile's scales and zero points take in one group, ``Layout::kGroupBytes``."""
    return 64 * 2 + 64 * num_bits // 8


def sum_bytes(columns: int, tokens: int) -> int:
    """Returns what ``SumTile`` takes: fp32, rows padded by four."""
    return tokens * (columns + 4) * 4


@functools.cache
def sum_splits_source(dtype: Dtype) -> KernelSource:
    """Returns the kernel that sums the workspace of a split GEMM, adds the bias and rounds."""
    return KernelSource(
        f"sum_splits<{CPP_TYPES[dtype]}>",
        f"""\
#include "gemm_base.cuh"
using namespace marlin;
extern "C" __global__ void __launch_bounds__({SUM_THREADS}) {ENTRY_POINT}(MARLIN_GEMM_PARAMETERS) {{
  sum_splits<{CPP_TYPES[dtype]}>(MARLIN_GEMM_ARGUMENTS);
}}
""",
    )
