"""What a layer of experts asks of the kernels: one grouped product, on a kind of GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from awq2marlin.gemm.families.base import Capability, Dtype

#: What the gate goes through; "none": there is no gate.
Activation = Literal["none", "silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class ExpertProblem:
    """One grouped product on a kind of GPU.

    Attributes:
        num_pairs: tokens times top-k.
        top_k: experts that a token chooses.
        num_experts: E, on this rank.
        size_n: columns of an expert's weight.
        size_k: rows of it.
        group_size: rows that share a scale; ``size_k`` if there is one group.
        num_bits: 4 or 8.
        dtype: of activations, scales, bias and result.
        activation: what the gate goes through; "none" for a plain product.
        sums_tokens: whether a token's rows are to be summed.
        capability: the GPU's compute capability.
        multiprocessors: how many the GPU has.
    """

    num_pairs: int
    top_k: int
    num_experts: int
    size_n: int
    size_k: int
    group_size: int
    num_bits: int
    dtype: Dtype
    activation: Activation
    sums_tokens: bool
    capability: Capability
    multiprocessors: int

    @property
    def is_gated(self) -> bool:
        """Whether half of the columns are a gate's."""
        return self.activation != "none"

    @property
    def out_columns(self) -> int:
        """Columns of the result: half of the weight's where there is a gate."""
        return self.size_n // 2 if self.is_gated else self.size_n

    @property
    def mean_rows(self) -> float:
        """Rows of an expert, on the average."""
        return self.num_pairs / self.num_experts

    @property
    def chosen_experts(self) -> float:
        """Experts that are chosen at all, if all are equally likely."""
        if self.num_experts == 1:
            return 1.0
        return self.num_experts * -math.expm1(self.num_pairs * math.log1p(-1 / self.num_experts))

    @property
    def shared_limit(self) -> int:
        """The shared memory that a block can have, in bytes."""
        return (227 if self.capability[0] in (9, 10) else 99) << 10

    @property
    def multiprocessor_shared(self) -> int:
        """The shared memory of a multiprocessor, in bytes; each of its blocks takes 1024 more than it asks for."""
        if self.capability[0] in (9, 10):
            return 228 << 10
        return (164 if self.capability in ((8, 0), (8, 7)) else 100) << 10
