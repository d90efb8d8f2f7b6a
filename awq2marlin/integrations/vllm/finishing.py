"""The little that is done to loaded tensors before vLLM's kernels take them: padding and two changes of order.

Pure functions on tensors, with any number of leading dimensions (experts). None repacks a ``qweight``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from awq2marlin.awq import inverse_order, pack_factor
from awq2marlin.marlin import GPTQ_MARLIN_TILE, SCALE_PERM, SCALE_PERM_SINGLE


def pad_qweight(
    qweight: torch.Tensor, size_k: int, size_n: int, padded_k: int, padded_n: int, num_bits: int
) -> torch.Tensor:
    """Returns a Marlin ``qweight`` with whole zero tiles added at its ends.

    Args:
        qweight: int32 [..., K / 16, N * 16 / f].
        size_k: K.
        size_n: N.
        padded_k: K of the result, a multiple of 16.
        padded_n: N of the result, a multiple of 64.
        num_bits: 4 or 8.

    Returns:
        int32 [..., padded K / 16, padded N * 16 / f]; the argument itself if there is nothing to add.
    """
    columns = (padded_n - size_n) * GPTQ_MARLIN_TILE // pack_factor(num_bits)
    return pad_ends(qweight, (padded_k - size_k) // GPTQ_MARLIN_TILE, columns)


def pad_ends(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns a tensor [..., R, C] with zero rows and columns added at its ends; itself if none are."""
    return pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor


def reorder_scales(scales: torch.Tensor, *, was_single: bool, is_single: bool) -> torch.Tensor:
    """Returns scales in the order that kernels expect of a slice.

    Args:
        scales: [..., G, N], N a multiple of 64.
        was_single: whether they stand in the 32-wide order of a single group.
        is_single: whether they shall.

    Returns:
        [..., G, N], a new tensor; the argument itself if the two orders are the same.
    """
    if was_single == is_single:
        return scales
    plain = _gather(scales, inverse_order(SCALE_PERM_SINGLE if was_single else SCALE_PERM))
    return _gather(plain, SCALE_PERM_SINGLE if is_single else SCALE_PERM)


def permute_bias(bias: torch.Tensor, padded_n: int) -> torch.Tensor:
    """Returns a bias [..., N] as vLLM's kernel adds it: zeros up to the padded N, columns in the 32-wide order."""
    return _gather(pad(bias, (0, padded_n - bias.shape[-1])), SCALE_PERM_SINGLE)


def _gather(tensor: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
    index = torch.tensor(columns, device=tensor.device)
    return tensor.reshape(*tensor.shape[:-1], -1, len(columns))[..., index].flatten(-2)
