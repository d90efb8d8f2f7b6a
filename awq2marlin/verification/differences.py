"""What differs between two checkpoints: counts, and the first place of each. Nothing here grows with the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from awq2marlin.errors import Problem

#: How many problems an error carries; the counts know of all.
MAX_PROBLEMS = 200


@dataclass(frozen=True)
class Count:
    """How much of something differs.

    Attributes:
        differing: how many.
        compared: out of how many.
        largest: the largest difference of two; of scales, as a part of the larger one.
    """

    differing: int = 0
    compared: int = 0
    largest: float = 0.0

    def __add__(self, other: Count) -> Count:
        """Returns the counts of both together."""
        largest = max(self.largest, other.largest)
        return Count(self.differing + other.differing, self.compared + other.compared, largest)


@dataclass(frozen=True)
class ModuleDifference:
    """A quantized module that both checkpoints have, with other numbers.

    Attributes:
        name: of the module.
        values: of its codes q.
        zero_points: of its zero points z.
        scales: of its scales s.
        padding: how much of its padding is not zero, in both together.
        first: the first place, with what both have there.
    """

    name: str
    values: Count
    zero_points: Count
    scales: Count
    padding: int
    first: Problem


@dataclass(frozen=True)
class Differences:
    """All that differs between two checkpoints.

    Attributes:
        modules: the modules whose numbers differ, by name.
        others: everything else: what one of them lacks, other shapes, tensors and files that differ.
        values: of the codes of all modules that were compared.
        zero_points: of all their zero points.
        scales: of all their scales.
    """

    modules: tuple[ModuleDifference, ...]
    others: tuple[Problem, ...]
    values: Count
    zero_points: Count
    scales: Count

    def __bool__(self) -> bool:
        """Returns whether anything differs."""
        return bool(self.modules or self.others)

    @property
    def problems(self) -> list[Problem]:
        """The first place of each thing that differs, capped; what is no number of a module comes first."""
        return [*self.others[:MAX_PROBLEMS], *(each.first for each in self.modules)][:MAX_PROBLEMS]


def total(counts: Sequence[Count]) -> Count:
    """Returns several counts together."""
    return sum(counts, Count())
