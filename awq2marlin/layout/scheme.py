"""How a checkpoint is quantized, in three numbers that travel together."""

from __future__ import annotations

from dataclasses import dataclass

from awq2marlin.layout.marlin import is_single_group, num_groups
from awq2marlin.layout.packing import pack_factor


@dataclass(frozen=True)
class Scheme:
    """Bits, groups and zero points of quantized weights.

    Attributes:
        bits: bits per value, 4 or 8.
        group_size: rows of K that share a scale and a zero point; -1 for all rows.
        zero_point: whether modules have zero points of their own; without, every zero point is 2^(bits-1).
    """

    bits: int
    group_size: int
    zero_point: bool

    def __str__(self) -> str:
        """Returns words, e.g. "4 bits in groups of 128 with zero points"."""
        groups = "channels" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits in {groups} with{'' if self.zero_point else 'out'} zero points"

    @property
    def pack_factor(self) -> int:
        """Values per 32-bit word."""
        return pack_factor(self.bits)

    @property
    def middle(self) -> int:
        """The zero point of modules that have none of their own."""
        return 1 << (self.bits - 1)

    def num_groups(self, size_k: int) -> int:
        """Returns G, the rows of scales that K rows of weights have."""
        return num_groups(size_k, self.group_size)

    def is_single_group(self, size_k: int) -> bool:
        """Returns whether one group spans all K rows."""
        return is_single_group(size_k, self.group_size)
