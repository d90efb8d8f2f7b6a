"""Tensors that lie the other way round: N first, so that they hold columns one after the other.

No part of such a tensor holds whole rows, but some of its columns are a tensor of the same kind. `unpack` and `pack`
take all of a tensor, and `repack` hands them stripes of a large one. What the plain rows do not hold, fields past the
last row or column, is zero in every tensor that is written; one that has anything else there is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.io.stream import PIECE_BYTES
from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.modules import SCALE_BYTES
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import PartLayout, StrayBitsError

Bytes = npt.NDArray[np.uint8]

#: What a kernel of codes needs to stage a block.
_SCRATCH_BYTES = 8192

#: Stripes are cut at multiples of so many columns: every layout's words, tiles and permutations end there.
_STRIPE_UNIT = 64


@dataclass(frozen=True)
class _Transposed(PartLayout):
    """A tensor that holds columns one after the other."""

    is_plain: ClassVar[bool] = False
    is_transposed: ClassVar[bool] = True

    @property
    def band(self) -> int:
        """All rows lie together."""
        return self.rows

    @property
    def stripe_columns(self) -> int:
        """Columns of about `PIECE_BYTES`."""
        return self._columns_of(PIECE_BYTES)

    def _columns_of(self, size: int) -> int:
        columns = size * self.columns // self.band_bytes
        return max(columns // _STRIPE_UNIT, 1) * _STRIPE_UNIT

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns all of the tensor into plain rows; see `PartLayout.unpack`."""
        self._check(plain, data)
        self._unpack(data, plain)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns all plain rows into the tensor."""
        self._check(plain, data)
        self._pack(plain, data)

    def _unpack(self, data: Bytes, plain: Bytes) -> None:
        raise NotImplementedError

    def _pack(self, plain: Bytes, data: Bytes) -> None:
        raise NotImplementedError

    def _check(self, plain: Bytes, data: Bytes) -> None:
        """Refuses what is not the whole tensor: the kernels trust their sizes."""
        fits = data.size == self.size and plain.size == self.rows * self.row_bytes
        if not (fits and plain.flags.c_contiguous and data.flags.c_contiguous):
            raise ValueError(f"{plain.size} and {data.size} bytes are not {self.rows} rows of {self.columns} columns")


@dataclass(frozen=True)
class TransposedCodes(_Transposed):
    """Codes int32 [N, ceil(K / f)], packed along K: field i of word w of row n is row w * f + i of column n."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self._words * 4

    @property
    def stripe_columns(self) -> int:
        """Columns that fill two cache lines of a plain row; fewer, where they are long.

        4096x14336 of 4 bits, from and to the cache of one core of an AMD EPYC (Zen 4), November 2026: 5.5 GB/s by 256
        columns, 3 by 64, 4.7 by 128, 4 by 512.
        """
        return min(self._columns_of(2 * PIECE_BYTES), 1024 // self.bits)

    @property
    def _words(self) -> int:
        """Words of a column."""
        return -(-self.rows // pack_factor(self.bits))

    def _unpack(self, data: Bytes, plain: Bytes) -> None:
        factor = pack_factor(self.bits)
        groups = -(-self.columns // factor)
        source, target = _filled(data, groups * factor * self._words * 4), plain
        if self.rows % factor:
            target = np.empty(self._words * factor * self.row_bytes, np.uint8)
        self._turn("unpack", source, target, groups)
        if target is not plain:
            plain[:] = target[: plain.size]
            if target[plain.size :].any():
                raise StrayBitsError(f"its last words are not zero past the last of K={self.rows} values")

    def _pack(self, plain: Bytes, data: Bytes) -> None:
        factor = pack_factor(self.bits)
        groups = -(-self.columns // factor)
        source, target = _filled(plain, self._words * factor * self.row_bytes), data
        if self.columns % factor:
            target = np.empty(groups * factor * self._words * 4, np.uint8)
        self._turn("pack", source, target, groups)
        if target is not data:
            data[:] = target[: data.size]

    def _turn(self, verb: str, source: Bytes, target: Bytes, groups: int) -> None:
        scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        turn = kernel(f"{verb}_columns_{self.bits}bit")
        turn(address(source), address(target), address(scratch), groups, self._words)


@dataclass(frozen=True)
class TransposedZeroPoints(_Transposed):
    """Zero points int32 [ceil(N / f), G], packed along N: field i of word g of row w is group g of column w * f + i."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes

    def _unpack(self, data: Bytes, plain: Bytes) -> None:
        if (data.view(np.uint32)[-self.rows :] & ~self._last_fields).any():
            raise StrayBitsError(f"its last row is not zero past the last of N={self.columns} values")
        self._turn("unpack", data, plain)

    def _pack(self, plain: Bytes, data: Bytes) -> None:
        self._turn("pack", plain, data)
        data.view(np.uint32)[-self.rows :] &= self._last_fields

    @property
    def _last_fields(self) -> np.uint32:
        """The bits of the last row's words that hold columns."""
        columns = self.columns % pack_factor(self.bits) or pack_factor(self.bits)
        return np.uint32((1 << columns * self.bits) - 1)

    def _turn(self, verb: str, source: Bytes, target: Bytes) -> None:
        turn = kernel(f"{verb}_column_zeros_{self.bits}bit")
        turn(address(source), address(target), 0, self.row_bytes // 4, self.rows)


@dataclass(frozen=True)
class SignedZeroPoints(_Transposed):
    """Zero points int8 [N, G], not packed: z - 2^(b-1)."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self.rows

    def _unpack(self, data: Bytes, plain: Bytes) -> None:
        values = data + np.uint8(1 << (self.bits - 1))  # wraps around
        if (values > np.uint8((1 << self.bits) - 1)).any():
            raise StrayBitsError(f"a zero point is none of {self.bits} bits")
        fields = _filled(values, self.row_bytes // 4 * pack_factor(self.bits) * self.rows)
        shifted = fields.reshape(-1, pack_factor(self.bits), self.rows) << self._shifts
        self._packed.unpack(np.bitwise_or.reduce(shifted, axis=1).reshape(-1).view(np.uint8), plain)

    def _pack(self, plain: Bytes, data: Bytes) -> None:
        words = np.empty(plain.size // 4, np.uint32)
        self._packed.pack(plain, words.view(np.uint8))
        fields = words.reshape(-1, 1, self.rows) >> self._shifts & np.uint32((1 << self.bits) - 1)
        data[:] = fields.astype(np.uint8).reshape(-1)[: data.size] - np.uint8(1 << (self.bits - 1))

    @property
    def _shifts(self) -> npt.NDArray[np.uint32]:
        return np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]

    @property
    def _packed(self) -> TransposedZeroPoints:
        """The same zero points, packed."""
        return TransposedZeroPoints(self.part, self.bits, self.rows, self.columns)


@dataclass(frozen=True)
class TransposedScales(_Transposed):
    """Scales [N, G], 16 bits each."""

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.columns * self.rows * SCALE_BYTES

    def _unpack(self, data: Bytes, plain: Bytes) -> None:
        kernel("transpose_scales")(address(data), address(plain), 0, self.columns, self.rows)

    def _pack(self, plain: Bytes, data: Bytes) -> None:
        kernel("transpose_scales")(address(plain), address(data), 0, self.rows, self.columns)


def _filled(data: Bytes, size: int) -> Bytes:
    """Returns bytes filled up with zeros."""
    if data.size == size:
        return data
    filled = np.zeros(size, np.uint8)
    filled[: data.size] = data
    return filled
