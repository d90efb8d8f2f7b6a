"""One tensor of a module between AWQ and Marlin layout, as torch functions: what a loader does with a kept module.

The layout is explained in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, qweight_shape
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.torch_functions import (
    awq_marlin_repack,
    awq_to_marlin_zero_points,
    marlin_awq_repack,
    marlin_permute_scales,
    marlin_to_awq_zero_points,
    marlin_unpermute_scales,
)

#: Repacks a ``qweight`` int32 [K, N/f] of some bits, K and N aligned, to Marlin's tiles.
RepackWeight = Callable[[torch.Tensor, int, int, int], torch.Tensor]

#: How many codes are repacked at once: as integers, on their way, each takes a few times four bytes.
_CODES_AT_ONCE = 1 << 24


def repack_in_bands(qweight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Does what `awq_marlin_repack` does, without needing memory for all of it at once; arguments as there."""
    made = torch.empty(qweight_shape(size_k, size_n, num_bits), dtype=torch.int32, device=qweight.device)
    step = max(_CODES_AT_ONCE // size_n // GPTQ_MARLIN_TILE, 1)  # rows of tiles
    for first in range(0, len(made), step):
        rows = qweight[first * GPTQ_MARLIN_TILE : (first + step) * GPTQ_MARLIN_TILE]
        made[first : first + step] = awq_marlin_repack(rows, len(rows), size_n, num_bits)
    return made


def marlin_part(
    part: str,
    tensor: torch.Tensor,
    size_k: int,
    size_n: int,
    scheme: Scheme,
    repack_weight: RepackWeight = repack_in_bands,
) -> torch.Tensor:
    """Returns a tensor of an AWQ module in Marlin layout.

    Args:
        part: ``qweight``, ``qzeros`` or ``scales``.
        tensor: [..., R, C], of that part in AWQ layout; leading dimensions are experts.
        size_k: K, aligned.
        size_n: N, aligned.
        scheme: bits and group size.
        repack_weight: repacks ``qweight``: of tensor, K, N and bits.

    Returns:
        A new tensor, with the same leading dimensions.
    """
    if tensor.ndim > 2:
        return torch.stack([marlin_part(part, each, size_k, size_n, scheme, repack_weight) for each in tensor])
    if part == "qweight":
        return repack_weight(tensor, size_k, size_n, scheme.bits)
    if part == "qzeros":
        return awq_to_marlin_zero_points(tensor, scheme.num_groups(size_k), size_n, scheme.bits)
    return marlin_permute_scales(tensor, size_k, size_n, scheme.group_size)


def awq_part(part: str, tensor: torch.Tensor, size_k: int, size_n: int, scheme: Scheme) -> torch.Tensor:
    """Undoes `marlin_part` for one tensor [R, C]."""
    if part == "qweight":
        return marlin_awq_repack(tensor, size_k, size_n, scheme.bits)
    if part == "qzeros":
        return marlin_to_awq_zero_points(tensor, scheme.num_groups(size_k), size_n, scheme.bits)
    return marlin_unpermute_scales(tensor, size_k, size_n, scheme.group_size)
