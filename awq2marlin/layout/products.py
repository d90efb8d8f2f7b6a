"""Zero points that are stored as products with the scales: fp16 [rows, N], -(s z) rounded once.

So the tensor can be read, and made, only with the module's scales beside it. A zero point is found as the whole number
nearest to the quotient, and 0 where the scale is 0; it is proven that its product is the very number that was found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.modules import SCALE_BYTES
from awq2marlin.layout.repack import Bytes, PartLayout, Scales, StrayBitsError

_EXPONENT = np.uint16(0x7C00)


@dataclass(frozen=True)
class ProductZeroPoints(PartLayout):
    """Zero points of 4 bits as fp16 products; N is a multiple of 8.

    Attributes:
        groups: how many rows hold zero points; the others are zero in every bit.
        scales: of the rows at hand, uint16 [R, N], without the rows past ``groups``; see `beside`.
    """

    groups: int = 0
    scales: Scales | None = field(default=None, compare=False, repr=False)

    is_plain: ClassVar[bool] = False
    needs_scales: ClassVar[bool] = True

    @property
    def band_bytes(self) -> int:
        """Bytes of a row of the tensor."""
        return self.columns * SCALE_BYTES

    @property
    def plain_scales(self) -> PartLayout:
        """What the scales are as plain rows."""
        return PartLayout("scales", self.bits, self.groups, self.columns)

    def beside(self, scales: Scales) -> ProductZeroPoints:
        """Returns the layout of some rows or columns, with their scales at hand."""
        return replace(self, scales=np.ascontiguousarray(scales))

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns products into plain rows.

        Raises:
            StrayBitsError: if a product is none of a zero point of 4 bits, or a scale is not finite.
        """
        scales = self._scales_of(data, plain)
        if any(((each & _EXPONENT) == _EXPONENT).any() for each in (scales, data.view(np.uint16))):
            raise StrayBitsError("a product, or a scale that it was made with, is infinite or NaN")
        self._apply("zeros_of_products", data, plain, scales)
        plain[scales.size // 2 :] = 0
        again = np.empty_like(data)
        self.pack(plain, again)
        if not np.array_equal(again, data):
            raise StrayBitsError("it holds more than products of the scales and whole numbers from 0 to 15")

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns plain rows into products."""
        scales = self._scales_of(data, plain)
        self._apply("products_of_zeros", plain, data, scales)
        data[scales.nbytes :] = 0

    def _apply(self, name: str, source: Bytes, target: Bytes, scales: npt.NDArray[np.uint16]) -> None:
        kernel(name)(address(source), address(target), address(scales), scales.size // 8)

    def _scales_of(self, data: Bytes, plain: Bytes) -> npt.NDArray[np.uint16]:
        """Returns the scales, flat; refuses what is not whole rows of the same columns: kernels trust their sizes."""
        if self.scales is None:
            raise ValueError("the scales are needed beside the products")
        rows, rest = divmod(data.size, self.band_bytes)
        fits = not rest and plain.size == rows * self.row_bytes and self.bits == 4 and self.columns % 8 == 0
        fits = fits and self.scales.shape[1] == self.columns and len(self.scales) <= rows
        if not (fits and plain.flags.c_contiguous and data.flags.c_contiguous):
            raise ValueError(f"{data.size} bytes of products and {plain.size} are not rows of {self.columns} columns")
        return self.scales.reshape(-1)
