"""AWQ checkpoints of the "marlin" version, as AutoAWQ wrote them for kernels that no engine has any more.

``qweight`` int32 [K/16, 2 N] and ``scales`` [G, N] lie exactly as Marlin-native's do, so that there they are copied.
There are no zero points: all are 8. Source: AutoAWQ 0.2.9, ``awq/modules/linear/marlin.py``; its ``workspace`` is
never saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from awq2marlin.errors import refuse
from awq2marlin.formats.awq import Awq
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.marlin_tensors import MarlinTensors
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N
from awq2marlin.layout.scheme import Scheme


class AwqMarlin(MarlinTensors, Awq):
    """AWQ, version "marlin"."""

    name = layout_name = "awq-marlin"
    title = layout_title = "AWQ marlin"
    is_source = True
    versions = ("marlin",)
    zero_point_if_unsaid = False
    suffixes: ClassVar[Mapping[str, str]] = {"qweight": "qweight", "scales": "scales"}
    marks: ClassVar[tuple[str, ...]] = ("qweight",)

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns bits and group size.

        Raises:
            CheckpointError: if it says that there are zero points.
        """
        quantization = super().read_config(document, place)
        if quantization.zero_point:
            message = (
                "version 'marlin' has no zero points (all are 8), but zero_point is true; the checkpoint is of another "
                "version, or zero_point must be false"
            )
            raise refuse("contradiction", message, file=place)
        return quantization

    def has_zero_points(self, scheme: Scheme) -> bool:
        """Returns False: there is no tensor for them."""
        del scheme
        return False

    def size_fault(self, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns why there is no module of a size: the layout has no padding."""
        if reason := super().size_fault(size_k, size_n, scheme):
            return reason
        if size_k % GPTQ_MARLIN_TILE or size_n % MARLIN_TILE_N:
            return f"K={size_k}, N={size_n} are not whole tiles of {GPTQ_MARLIN_TILE} by {MARLIN_TILE_N}"
        if scheme.group_size != -1 and size_k % scheme.group_size:
            return f"K={size_k} is not a multiple of the group size {scheme.group_size}"
        return ""


AWQ_MARLIN = AwqMarlin()
