"""Comparing the numbers of one quantized module in two checkpoints, whatever their formats.

Both are decoded by their formats' own slow readers (`Format.values`), in bands of about a megabyte. A tensor whose rows
hold no whole rows of values is read as a whole. Zero points that a checkpoint does not store are 2^(bits-1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.checkpoint.part_rows import PartRows
from awq2marlin.checkpoint.source import SourceCheckpoint
from awq2marlin.errors import Problem
from awq2marlin.formats.base import StoredModule
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.layout.modules import QUANTIZED_PARTS
from awq2marlin.layout.scheme import Scheme
from awq2marlin.verification.differences import Count, ModuleDifference
from awq2marlin.verification.values import BAND_BYTES

_WORDS = {"qweight": "value", "qzeros": "zero point", "scales": "scale"}

Band = npt.NDArray[Any]


@dataclass(frozen=True)
class Side:
    """One of two checkpoints that are compared.

    Attributes:
        label: what messages call it, ``A`` or ``B``.
        opened: its configs, headers and modules.
        files: its tensors.
    """

    label: str
    opened: SourceCheckpoint
    files: TensorFiles

    @classmethod
    def of(cls, label: str, opened: SourceCheckpoint) -> Side:
        """Makes it of an opened checkpoint."""
        return cls(label, opened, TensorFiles(opened.checkpoint.folder, opened.checkpoint.index))

    @property
    def scheme(self) -> Scheme:
        """Bits, groups and zero points."""
        return self.opened.checkpoint.quantization.scheme

    def groups_of(self, module: str) -> int:
        """Returns the groups that a module has, padding not included."""
        return self.scheme.num_groups(self.opened.modules[module].size_k)

    def problem(self, tensor: str, code: str, message: str) -> Problem:
        """Returns a problem of one of its tensors."""
        return Problem(self.files.shard_of[tensor], tensor, code, message)


@dataclass(frozen=True)
class _Part:
    """A part of a module in one checkpoint.

    Attributes:
        side: the checkpoint.
        module: the module.
        part: which part.
        rows: its tensor; None for zero points that are not stored.
    """

    side: Side
    module: StoredModule
    part: str
    rows: PartRows | None

    @classmethod
    def of(cls, side: Side, name: str, part: str) -> _Part:
        module = side.opened.modules[name]
        if part not in module.parts:
            return cls(side, module, part, None)
        rows = PartRows.of(module.layout, side.files, name, part, module.stored_k, side.scheme)
        return cls(side, module, part, rows)

    def count(self, size_k: int) -> int:
        """Returns the rows that K rows of weights have of this part."""
        return size_k if self.part == "qweight" else self.side.scheme.num_groups(size_k)

    @property
    def dtype(self) -> str:
        """The type of scales, as headers call it; codes and zero points are whole numbers, whatever holds them."""
        return self.rows.tensor.dtype if self.rows and self.part == "scales" else ""

    def read(self, first: int, count: int) -> Band:
        """Returns some rows of plain values, padding included, as far as there are any."""
        module, scheme = self.module, self.side.scheme
        if self.rows is None:
            held = max(0, min(count, self.count(module.size_k) - first))
            return np.full((held, module.size_n), scheme.middle, np.uint8)
        return self.rows.read(first, count)[:count, : module.stored_n]


@dataclass
class _Found:
    """What a comparison of one part has found so far.

    Attributes:
        differing: how many differ.
        largest: the largest difference.
        padding: how much of the padding is not zero.
        first: the first place, in words, with the part that it is told of.
    """

    differing: int = 0
    largest: float = 0.0
    padding: int = 0
    first: tuple[_Part, str] | None = field(default=None)

    def see_padding(self, part: _Part, first_row: int, held: Band) -> Band:
        """Returns a band without its padding, which has to be zero."""
        rows = max(0, part.count(part.module.size_k) - first_row)
        own = held[:rows, : part.module.size_n]
        if own.shape == held.shape:
            return own
        odd = held != 0
        odd[:rows, : part.module.size_n] = False
        count = int(np.count_nonzero(odd))
        if count:
            row, column = _first(odd)
            there = _shown(part, held[row, column])
            self._tell(part, f"padding at row {first_row + row}, column {column}: {there}, expected 0")
        self.padding += count
        return own

    def see(self, parts: tuple[_Part, _Part], first_row: int, bands: tuple[Band, Band]) -> None:
        """Counts what differs in a band without padding."""
        if parts[0].dtype == parts[1].dtype and np.array_equal(*bands):
            return
        one, other = (_numbers(part, band) for part, band in zip(parts, bands, strict=True))
        unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
        if not unequal.any():
            return
        row, column = _first(unequal)
        told = ", ".join(_shown(part, band[row, column]) for part, band in zip(parts, bands, strict=True))
        word = _WORDS[parts[0].part]
        self._tell(parts[1] if parts[1].rows else parts[0], f"{word} at row {first_row + row}, column {column}: {told}")
        self.differing += int(np.count_nonzero(unequal))
        self.largest = max(self.largest, _largest(one[unequal], other[unequal], parts[0].part == "scales"))

    def _tell(self, part: _Part, text: str) -> None:
        self.first = self.first or (part, text)


def compared_bytes(side: Side, name: str) -> int:
    """Returns the bytes that a module has in one checkpoint."""
    module = side.opened.modules[name]
    return sum(side.files.info(module.layout.tensor_name(name, part)).size for part in module.parts)


def compare_module(name: str, sides: tuple[Side, Side]) -> tuple[tuple[Count, Count, Count], ModuleDifference | None]:
    """Compares the numbers of a module that has the same K and N in both checkpoints.

    Where the numbers of groups differ, only the codes are compared.

    Args:
        name: the module.
        sides: both checkpoints, of the same bits.

    Returns:
        How many codes, zero points and scales there are and how many differ; and the difference, if there is any.
    """
    counts, padding, first = {}, 0, None
    same_groups = sides[0].groups_of(name) == sides[1].groups_of(name)
    for each in QUANTIZED_PARTS:
        parts = _Part.of(sides[0], name, each), _Part.of(sides[1], name, each)
        if (parts[0].rows is None and parts[1].rows is None) or not (same_groups or each == "qweight"):
            counts[each] = Count()
            continue
        found = _compare_part(parts)
        size = parts[0].count(parts[0].module.size_k) * parts[0].module.size_n
        counts[each] = Count(found.differing, size, found.largest)
        padding, first = padding + found.padding, first or found.first
    numbers = counts["qweight"], counts["qzeros"], counts["scales"]
    if first is None:
        return numbers, None
    part, text = first
    tensor = part.module.layout.tensor_name(name, part.part)
    return numbers, ModuleDifference(name, *numbers, padding, part.side.problem(tensor, "different-value", text))


def _compare_part(parts: tuple[_Part, _Part]) -> _Found:
    found = _Found()
    for first, held in _bands(parts):
        one, other = (found.see_padding(part, first, band) for part, band in zip(parts, held, strict=True))
        if one.size and other.size:
            found.see(parts, first, (one, other))
    return found


def _bands(parts: tuple[_Part, _Part]) -> Iterator[tuple[int, tuple[Band, Band]]]:
    """Yields (first row, values of both): bands of plain values, padding included."""
    total = max(part.count(part.module.stored_k) for part in parts)
    stored = [part.rows for part in parts if part.rows is not None]
    band = total
    if all(rows.step for rows in stored):
        band = math.lcm(*(rows.step for rows in stored))
        band *= max(1, BAND_BYTES // max(1, *(rows.bytes_of(band) for rows in stored)))
    for first in range(0, total, band):
        yield first, (parts[0].read(first, band), parts[1].read(first, band))


def _numbers(part: _Part, band: Band) -> Band:
    """Returns values as numbers that can be compared and subtracted; those of scales are exact."""
    if part.dtype == "BF16":
        return (np.ascontiguousarray(band).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if part.dtype == "F16":
        return np.ascontiguousarray(band).view(np.float16).astype(np.float32)
    return band.astype(np.float32)


def _shown(part: _Part, value: Any) -> str:
    """Returns a value in words, with the checkpoint it is of; a stored scale's bits too, as its digits are rounded."""
    number = _numbers(part, np.array([[value]]))[0, 0]
    bits = f" ({int(value):#06x})" if part.part == "scales" else ""
    return f"{number:g}{bits} in {part.side.label}"


def _first(mask: Band) -> tuple[int, int]:
    row, column = divmod(int(np.argmax(mask)), mask.shape[1])
    return row, column


def _largest(one: Band, other: Band, is_relative: bool) -> float:
    """Returns the largest difference, of scales as a part of the larger one; what is not finite has none."""
    with np.errstate(all="ignore"):
        apart = np.abs(one - other)
        if is_relative:
            apart = apart / np.maximum(np.abs(one), np.abs(other))
    return float(apart[np.isfinite(apart)].max(initial=0.0))
