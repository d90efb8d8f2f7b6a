"""One module's tensors from AWQ to Marlin and back as torch functions, on any device, padded where Marlin needs it.

For engines that repack what a checkpoint keeps in AWQ layout. The layout is explained in kernels/README.md, the
padding in docs/marlin-native.md.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from awq2marlin.gemm.ops import repack_awq
from awq2marlin.layout.marlin import num_groups
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.torch_functions import (
    awq_to_marlin_zero_points,
    marlin_awq_repack,
    marlin_permute_scales,
    marlin_to_awq_zero_points,
    marlin_unpermute_scales,
)


def awq_to_marlin(
    part: str, tensor: torch.Tensor, module: ModulePlan, *, num_bits: int, group_size: int
) -> torch.Tensor:
    """Returns one tensor of a module in Marlin layout.

    Args:
        part: ``qweight`` (int32 [K, N/f]), ``qzeros`` (int32 [G, N/f]) or ``scales`` ([G, N]).
        tensor: the tensor, in AWQ layout.
        module: its sizes, true and padded.
        num_bits: 4 or 8.
        group_size: rows of K that share scales, -1 for all.

    Returns:
        A new tensor: [K/16, N*16/f], [G, N/f] or [G, N], with the padded K, N and G.
    """
    size_k, size_n = module.padded_k, module.padded_n
    columns = size_n if part == "scales" else size_n // pack_factor(num_bits)
    groups = num_groups(size_k, group_size)
    rows = size_k if part == "qweight" else groups
    padded = functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
    if part == "qweight":
        return repack_awq(padded, num_bits=num_bits)
    if part == "qzeros":
        return awq_to_marlin_zero_points(padded, groups, size_n, num_bits)
    return marlin_permute_scales(padded, size_k, size_n, group_size)


def marlin_to_awq(
    part: str, tensor: torch.Tensor, module: ModulePlan, *, num_bits: int, group_size: int
) -> torch.Tensor:
    """Undoes `awq_to_marlin`; the padding goes."""
    size_k, size_n = module.padded_k, module.padded_n
    groups = num_groups(size_k, group_size)
    if part == "qweight":
        rows, plain = module.size_k, marlin_awq_repack(tensor, size_k, size_n, num_bits)
    else:
        rows = num_groups(module.size_k, group_size)
        if part == "qzeros":
            plain = marlin_to_awq_zero_points(tensor, groups, size_n, num_bits)
        else:
            plain = marlin_unpermute_scales(tensor, size_k, size_n, group_size)
    columns = module.size_n if part == "scales" else module.size_n // pack_factor(num_bits)
    return plain[:rows, :columns].contiguous()
