"""A format of no use, in one small class: as unlike AWQ as a format can be, and read and written all the same.

Its tensors have other names, lie the other way round (N first, codes packed along K in plain order), and a module has
one tensor more, which follows from its shape. Importing this module with ``AWQ2MARLIN_TEST_TOY`` set registers it. A
second one, `MASKED`, has zero points that take the scales to be read, and to be written.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from awq2marlin.formats.base import DerivedTensor, Format, Quantization
from awq2marlin.formats.config import first_of, method_of, scheme_of
from awq2marlin.formats.registry import REGISTERED
from awq2marlin.layout import reference
from awq2marlin.layout.repack import PartLayout, StrayBitsError


def split(words, bits):
    """Fields of uint32 words along the last axis, lowest first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words[..., None] >> shifts & ((1 << bits) - 1)).reshape(*words.shape[:-1], -1).astype(np.uint8)


def join(fields, bits):
    """Undoes `split`; fills the last word up with zeros."""
    factor = 32 // bits
    filled = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, -fields.shape[-1] % factor)]).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(filled.reshape(*fields.shape[:-1], -1, factor) << shifts, axis=-1, dtype=np.uint32)


def awq_words(values, bits):
    """Rows of values, packed as AWQ packs them."""
    order = np.argsort(reference.field_order(bits))
    fields = np.empty_like(values).reshape(len(values), -1, len(order))
    fields[..., order] = values.reshape(fields.shape)
    return join(fields.reshape(values.shape), bits)


@dataclass(frozen=True)
class Transposed(PartLayout):
    """[N, rows], codes and zero points packed along the rows: only the whole tensor holds whole rows."""

    is_plain: ClassVar[bool] = False

    @property
    def band(self):
        return self.rows

    @property
    def band_bytes(self):
        return self.columns * (self.rows * 2 if self.part == "scales" else -(-self.rows * self.bits // 32) * 4)

    def unpack(self, data, plain):
        if self.part == "scales":
            plain.view(np.uint16).reshape(self.rows, -1)[:] = data.view(np.uint16).reshape(self.columns, -1).T
            return
        values = split(data.view(np.uint32).reshape(self.columns, -1), self.bits)[:, : self.rows].T
        plain.view(np.uint32).reshape(self.rows, -1)[:] = awq_words(values, self.bits)

    def pack(self, plain, data):
        if self.part == "scales":
            data.view(np.uint16).reshape(self.columns, -1)[:] = plain.view(np.uint16).reshape(self.rows, -1).T
            return
        values = reference.unpack_awq(plain.view(np.uint32).reshape(self.rows, -1), self.bits)
        data.view(np.uint32).reshape(self.columns, -1)[:] = join(values.T, self.bits)


def shape_bytes(size_k, size_n):
    return np.array([size_n, size_k], "<i8").tobytes()


class Toy(Format):
    """Codes int32 [N, K/f], zero points int32 [N, G/f], steps [N, G], and the shape again."""

    name = title = layout_name = layout_title = "toy"
    output_suffix = "-toy"
    is_source = is_target = True
    suffixes: ClassVar = {"qweight": "codes", "qzeros": "offsets", "scales": "steps"}

    def claims(self, document, place):
        return method_of(document, place) == "toy"

    def read_config(self, document, place):
        bits, group_size = (first_of(document, (key,), place) for key in ("bits", "group_size"))
        scheme = scheme_of(bits, group_size, document.get("zero_point", True), place)
        return Quantization(scheme, document.get("modules_to_not_convert"), place)

    def write_config(self, quantization):
        names = ("bits", "group_size", "zero_point", "modules_to_not_convert")
        return {"quant_method": "toy", **{name: getattr(quantization, name) for name in names}}

    def sizes(self, tensors, scheme):
        size_n, words = tensors["qweight"].shape
        return words * scheme.pack_factor, size_n

    def shape(self, part, size_k, size_n, scheme):
        rows = size_k if part == "qweight" else scheme.num_groups(size_k)
        return size_n, rows if part == "scales" else -(-rows // scheme.pack_factor)

    def layout(self, part, size_k, size_n, scheme):
        rows = size_k if part == "qweight" else scheme.num_groups(size_k)
        return Transposed(part, scheme.bits, rows, size_n)

    def derived(self, size_k, size_n, scheme):
        del scheme
        return [DerivedTensor("dims", "I64", (2,), partial(shape_bytes, size_k, size_n))]

    def rows_per_row(self, part, scheme):
        del part, scheme
        return 0  # one row of the tensor holds no whole row: all of it is needed

    def rows_per_column(self, part, scheme):
        return 1 if part == "scales" else scheme.pack_factor

    def values(self, part, rows, size_k, scheme):
        if part == "scales":
            return rows.T
        count = size_k if part == "qweight" else scheme.num_groups(size_k)
        bits = np.unpackbits(np.ascontiguousarray(rows).astype("<u4").view(np.uint8), axis=1, bitorder="little")
        fields = bits.reshape(len(rows), -1, scheme.bits) @ (1 << np.arange(scheme.bits))
        return fields[:, :count].T.astype(np.uint8)


@dataclass(frozen=True)
class Masked(PartLayout):
    """Zero points uint16 [rows, N], each masked with the bits of its scale."""

    scales: np.ndarray | None = None

    is_plain: ClassVar[bool] = False
    needs_scales: ClassVar[bool] = True

    @property
    def band_bytes(self):
        return self.columns * 2

    @property
    def plain_scales(self):
        return PartLayout("scales", self.bits, self.rows, self.columns)

    def beside(self, scales):
        return replace(self, scales=scales)

    def unpack(self, data, plain):
        values = data.view(np.uint16).reshape(-1, self.columns) ^ self.scales
        if (values >> self.bits).any():
            raise StrayBitsError("it is masked otherwise")
        plain.view(np.uint32).reshape(len(values), -1)[:] = awq_words(values.astype(np.uint8), self.bits)

    def pack(self, plain, data):
        values = reference.unpack_awq(plain.view(np.uint32).reshape(-1, self.row_bytes // 4), self.bits)
        data.view(np.uint16).reshape(-1, self.columns)[:] = values ^ self.scales


class MaskedToy(Toy):
    """The same with masked offsets and plain steps, both [G, N]."""

    dtypes: ClassVar = {**Toy.dtypes, "qzeros": ("U16",)}
    read_beside: ClassVar = {"qzeros": "scales"}

    def shape(self, part, size_k, size_n, scheme):
        return super().shape(part, size_k, size_n, scheme) if part == "qweight" else (scheme.num_groups(size_k), size_n)

    def layout(self, part, size_k, size_n, scheme):
        if part == "qweight":
            return super().layout(part, size_k, size_n, scheme)
        return (Masked if part == "qzeros" else PartLayout)(part, scheme.bits, scheme.num_groups(size_k), size_n)

    def rows_per_row(self, part, scheme):
        del scheme
        return 0 if part == "qweight" else 1

    def element_type(self, part):
        return np.uint32 if part == "qweight" else np.uint16

    def values(self, part, rows, size_k, scheme):
        return rows if part == "scales" else super().values(part, rows, size_k, scheme)

    def values_beside(self, part, rows, beside, size_k, scheme):
        del part, size_k, scheme
        return (rows ^ beside).astype(np.uint8)


TOY, MASKED = Toy(), MaskedToy()
if os.environ.get("AWQ2MARLIN_TEST_TOY"):
    REGISTERED.insert(0, TOY)
