"""AWQ checkpoints of the "gemv_fast" version, as AutoAWQ wrote them.

``qweight`` int16 [N/4, K] holds four columns in turn (`layout.interleaved`); ``scales`` is fp16 [8 W, N], W as in
`awq_gemv`; ``qzeros`` is fp16 [8 W, N] and holds -(s z), rounded once, so that it takes the scales to know the zero
points (`layout.products`). What is past the last group is zero. Source: AutoAWQ 0.2.9,
``awq/modules/linear/gemv_fast.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.formats.awq import Awq
from awq2marlin.formats.awq_gemv import misfit, shown_groups, stored_groups
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.interleaved import CODES_IN_TURN, COLUMNS_IN_TURN, InterleavedCodes
from awq2marlin.layout.products import ProductZeroPoints
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme

#: What the slow reader says of a product that no zero point gives: a number that no zero point of 4 bits is.
_NO_ZERO_POINT = 255


class AwqGemvFast(Awq):
    """AWQ, version "gemv_fast"."""

    name = layout_name = "awq-gemv_fast"
    title = layout_title = "AWQ gemv_fast"
    is_source = True
    versions = ("gemv_fast", "gemv-fast", "gemvfast")
    has_always_zero_points = True
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"qweight": ("I16",), "qzeros": ("F16",), "scales": ("F16",)}
    read_beside: ClassVar[Mapping[str, str]] = {"qzeros": "scales"}

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N as ``qweight`` says."""
        del scheme
        blocks, size_k = tensors["qweight"].shape
        return size_k, blocks * COLUMNS_IN_TURN

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:
        """Returns bits, K and groups: rows of ``scales`` tell the groups."""
        size_k, _ = self.sizes(tensors, scheme)
        groups = shown_groups(size_k, tensors["scales"].shape[0], scheme)
        return None if groups is None else (scheme.bits, size_k, groups)

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: codes N first, the others in rows along K."""
        if part == "qweight":
            return size_n // COLUMNS_IN_TURN, size_k
        return stored_groups(size_k, scheme), size_n

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns the layout of a part; its padding is rows that the others have not."""
        if part == "qweight":
            return InterleavedCodes(part, scheme.bits, size_k, size_n)
        rows = stored_groups(size_k, scheme)
        if part == "scales":
            return PartLayout(part, scheme.bits, rows, size_n)
        return ProductZeroPoints(part, scheme.bits, rows, size_n, scheme.num_groups(size_k))

    def size_fault(self, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns why there is no module of a size: only groups are padded."""
        return super().size_fault(size_k, size_n, scheme) or misfit(size_k, size_n, CODES_IN_TURN, scheme)

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns 0 for codes, whose rows are columns; the others are plain."""
        del scheme
        return 0 if part == "qweight" else 1

    def rows_per_column(self, part: str, scheme: Scheme) -> int:
        """Returns 64: what `element_type` takes for one element holds so many codes of four columns."""
        del part, scheme
        return CODES_IN_TURN

    def element_type(self, part: str) -> npt.DTypeLike:
        """Returns the type in which `values` takes a part's tensor: all that four columns hold in one turn."""
        return f"V{2 * CODES_IN_TURN}" if part == "qweight" else np.uint16

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns scales as they are, and codes by the sentences of the format."""
        del size_k
        if part == "scales":
            return rows
        from awq2marlin.layout.reference import split_fields  # a conversion that compares nothing does not need it

        blocks, turns = rows.shape
        fields = split_fields(np.ascontiguousarray(rows).view(np.uint32), scheme.bits)
        # of each block and turn: four columns, two runs of 32, and the places b, c, a of code 8 a + 2 b + c
        places = fields.reshape(blocks, turns, COLUMNS_IN_TURN, 2, 4, 2, 4)
        codes = places.transpose(1, 3, 6, 4, 5, 0, 2)
        return codes.reshape(turns * CODES_IN_TURN, blocks * COLUMNS_IN_TURN)

    def values_beside(
        self, part: str, rows: npt.NDArray[Any], beside: npt.NDArray[Any], size_k: int, scheme: Scheme
    ) -> npt.NDArray[Any]:
        """Returns the zero points whose products these are; 255 where there is none, which no other side has."""
        del part, size_k, scheme
        products, scales = (each.view(np.float16) for each in (rows, beside))
        with np.errstate(all="ignore"):
            quotients = np.where(scales == 0, 0, np.rint(-products.astype(np.float64) / scales.astype(np.float64)))
            zeros = np.where((quotients >= 0) & (quotients <= 15), quotients, 0)
            again = -(scales.astype(np.float64) * zeros).astype(np.float16)
        fits = np.isfinite(products) & np.isfinite(scales) & (again == products)
        return np.where(fits, zeros, _NO_ZERO_POINT).astype(np.uint8)


AWQ_GEMV_FAST = AwqGemvFast()
