"""Tensors in the layout of the Marlin kernels, whatever the config around them says.

A module has ``qweight`` int32 [K/16, N*16/f] in tiles, ``qzeros`` int32 [G, N/f] and ``scales`` [G, N] with permuted
columns; kernels/README.md pictures the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.formats.base import Format
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE
from awq2marlin.layout.modules import part_shape
from awq2marlin.layout.repack import MarlinScales, MarlinWeight, MarlinZeroPoints, PartLayout
from awq2marlin.layout.scheme import Scheme


class MarlinTensors(Format):
    """A format whose modules lie as the Marlin kernels read them."""

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N, padding included, as the shape of ``qweight`` says."""
        rows, words = tensors["qweight"].shape
        return rows * GPTQ_MARLIN_TILE, words * scheme.pack_factor // GPTQ_MARLIN_TILE

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:
        """Returns bits, K and groups: words of ``qweight`` beside columns of ``scales`` tell the bits."""
        del scheme
        (rows, words), (groups, size_n) = tensors["qweight"].shape, tensors["scales"].shape
        return 2 * words / max(size_n, 1), rows * GPTQ_MARLIN_TILE, groups

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: ``qweight`` in rows of tiles, the others in rows along K."""
        return part_shape(part, size_k, size_n, scheme, tile=GPTQ_MARLIN_TILE)

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns Marlin's tiles, or its order of columns."""
        if part == "qweight":
            return MarlinWeight(part, scheme.bits, size_k, size_n)
        groups = scheme.num_groups(size_k)
        if part == "qzeros":
            return MarlinZeroPoints(part, scheme.bits, groups, size_n)
        return MarlinScales(part, scheme.bits, groups, size_n, scheme.is_single_group(size_k))

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns 16 for tiles, 1 for the others."""
        del scheme
        return 16 if part == "qweight" else 1

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the values by the loops of the specification's sentences."""
        from awq2marlin.layout import reference  # a conversion that compares nothing does not need it

        if part == "scales":
            return reference.unpermute_columns(rows, scheme.group_size == -1 or scheme.group_size >= size_k)
        unpack = reference.unpack_marlin_qweight if part == "qweight" else reference.unpack_marlin_qzeros
        return unpack(rows.astype(np.uint32, copy=False), scheme.bits)
