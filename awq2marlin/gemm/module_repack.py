"""One module's tensors from AWQ to Marlin and back as torch functions, on any device, padded where Marlin needs it.

For engines that repack what a checkpoint keeps in AWQ layout. The layout is explained in kernels/README.md, the
padding in docs/marlin-native.md.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from awq2marlin.gemm.ops import repack_awq
from awq2marlin.layout.modules import ModulePlan, part_shape
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.torch_parts import awq_part, marlin_part


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
    scheme = Scheme(num_bits, group_size, "qzeros" in module.parts)
    rows, columns = part_shape(part, module.padded_k, module.padded_n, scheme)
    padded = functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
    return marlin_part(part, padded, module.padded_k, module.padded_n, scheme, _repack)


def _repack(qweight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    del size_k, size_n  # its shape says so
    return repack_awq(qweight, num_bits=num_bits)


def marlin_to_awq(
    part: str, tensor: torch.Tensor, module: ModulePlan, *, num_bits: int, group_size: int
) -> torch.Tensor:
    """Undoes `awq_to_marlin`; the padding goes."""
    scheme = Scheme(num_bits, group_size, "qzeros" in module.parts)
    rows, columns = part_shape(part, module.size_k, module.size_n, scheme)
    plain = awq_part(part, tensor, module.padded_k, module.padded_n, scheme)
    return plain[:rows, :columns].contiguous()
