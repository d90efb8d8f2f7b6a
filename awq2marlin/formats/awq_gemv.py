"""AWQ checkpoints of the "gemv" version, as AutoAWQ wrote them.

A module lies N first: ``qweight`` int32 [N, K/8] holds eight codes of one column a word, along K; ``qzeros`` int32
[N, W] holds eight zero points of one column a word, along the groups; ``scales`` is [N, 8 W]. W is G / 8 rounded up,
for groups of 64 to a multiple of 2 and for groups of 32 to one of 4; what is past the last group is zero. Source:
AutoAWQ 0.2.9, ``awq/modules/linear/gemv.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.formats.awq import Awq
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES, num_groups
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.transposed import TransposedCodes, TransposedScales

#: Values in a word.
_FACTOR = 8


def stored_groups(size_k: int, scheme: Scheme) -> int:
    """Returns how many groups the tensors of a module have room for: 8 W."""
    rows_of_group = size_k if scheme.group_size == -1 else scheme.group_size
    multiple = _FACTOR * {64: 2, 32: 4}.get(rows_of_group, 1)
    return -(-scheme.num_groups(size_k) // multiple) * multiple


def shown_groups(size_k: int, stored: int, scheme: Scheme) -> int | None:
    """Returns how many groups a module has whose tensors have room for some; None if no supported size fits.

    Args:
        size_k: K.
        stored: rows or columns of scales, with the padding.
        scheme: of the checkpoint: its group size counts, if several fit.
    """
    sizes = [scheme.group_size, *MARLIN_SUPPORTED_GROUP_SIZES]
    fit = (size for size in sizes if stored_groups(size_k, replace(scheme, group_size=size)) == stored)
    return next((num_groups(size_k, size) for size in fit), None)


def misfit(size_k: int, size_n: int, multiple_k: int, scheme: Scheme) -> str:
    """Returns why a layout of 4 bits that has no padding but for groups cannot be of a size; empty if it can."""
    if size_k % multiple_k or size_n % _FACTOR:
        return f"K={size_k}, N={size_n} are not multiples of {multiple_k} and {_FACTOR}"
    if scheme.group_size != -1 and size_k % scheme.group_size:
        return f"K={size_k} is not a multiple of the group size {scheme.group_size}"
    return ""


class AwqGemv(Awq):
    """AWQ, version "gemv"."""

    name = layout_name = "awq-gemv"
    title = layout_title = "AWQ gemv"
    is_source = True
    versions = ("gemv",)
    has_always_zero_points = True

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N as ``qweight`` says."""
        size_n, words = tensors["qweight"].shape
        return words * scheme.pack_factor, size_n

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:
        """Returns bits, K and groups: columns of ``scales`` tell the groups."""
        size_k, _ = self.sizes(tensors, scheme)
        groups = shown_groups(size_k, tensors["scales"].shape[1], scheme)
        return None if groups is None else (scheme.bits, size_k, groups)

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: N first."""
        if part == "qweight":
            return size_n, size_k // _FACTOR
        groups = stored_groups(size_k, scheme)
        return size_n, groups if part == "scales" else groups // _FACTOR

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns the transposed layout of a part; its padding is rows that the others have not."""
        if part == "qweight":
            return TransposedCodes(part, scheme.bits, size_k, size_n)
        kind = TransposedScales if part == "scales" else TransposedCodes
        return kind(part, scheme.bits, stored_groups(size_k, scheme), size_n)

    def size_fault(self, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns why there is no module of a size: only groups are padded."""
        return super().size_fault(size_k, size_n, scheme) or misfit(size_k, size_n, _FACTOR, scheme)

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns 0: rows of the tensors are columns."""
        del part, scheme
        return 0

    def rows_per_column(self, part: str, scheme: Scheme) -> int:
        """Returns 8 for words, 1 for scales."""
        del scheme
        return 1 if part == "scales" else _FACTOR

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the fields of the words, one after the other, the right way round."""
        del size_k
        if part == "scales":
            return rows.T
        from awq2marlin.layout.reference import split_fields  # a conversion that compares nothing does not need it

        return split_fields(np.ascontiguousarray(rows, np.uint32), scheme.bits).T


AWQ_GEMV = AwqGemv()
