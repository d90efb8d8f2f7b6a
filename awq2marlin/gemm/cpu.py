"""The Marlin GEMM on a CPU: a few rows of tiles at a time are decoded by a compiled kernel and multiplied in float64.

The weights are exact, the sums are those of float64; the result is rounded once. The weight stays packed: what is
decoded at once fits a core's cache, so a token costs the time to decode the weight (about 0.65 ns a value on an AMD
EPYC of 2026), not the memory traffic of a dense one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_INTERLEAVE, MARLIN_TILE_N, SCALE_PERM, SCALE_PERM_SINGLE
from awq2marlin.layout.packing import inverse_order

#: Bytes of weight that are decoded at once.
PIECE_BYTES = 1 << 19

#: Up to so many tokens, pieces are multiplied in this thread: waking others for so little costs more than it saves,
#: by far on a busy machine.
_FEW_TOKENS = 4


def multiply(
    a: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None, num_bits: int
) -> torch.Tensor:
    """Returns ``a @ w`` as float64 [M, N], for CPU tensors that `ops.check_gemm` has accepted.

    Args:
        a: [M, K], any floating-point type.
        qweight: int32 [K/16, N*16/f]; rows may have a stride, and so for the rest.
        scales: [G, N].
        qzeros: int32 [G, N/f], or None.
        num_bits: 4 or 8.
    """
    size_k, (num_groups, size_n) = qweight.shape[0] * GPTQ_MARLIN_TILE, scales.shape
    decode, tiles = kernel(f"decode_qweight_{num_bits}bit"), size_n // MARLIN_TILE_N
    tables = _tables(scales, qzeros, num_bits)
    row_of_tiles = GPTQ_MARLIN_TILE * size_n * 8
    rows_at_once = GPTQ_MARLIN_TILE * max(1, PIECE_BYTES // row_of_tiles)
    piece = torch.empty((rows_at_once, size_n), dtype=torch.float64)
    source, source_stride = qweight.data_ptr(), qweight.stride(0) * qweight.element_size()
    wide, out = a.double().contiguous(), torch.zeros((a.shape[0], size_n), dtype=torch.float64)
    for start in range(0, size_k, rows_at_once):
        stop = min(start + rows_at_once, size_k)
        for row in range(start, stop, GPTQ_MARLIN_TILE):
            tile_row = source + row // GPTQ_MARLIN_TILE * source_stride
            target = piece.data_ptr() + (row - start) * size_n * 8
            decode(tile_row, target, address(tables[row * num_groups // size_k]), tiles)
        _add_product(out, wide[:, start:stop], piece[: stop - start])
    return out


def _add_product(out: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds ``tokens @ rows`` to ``out``: float64 [M, r] by [r, N] to [M, N]."""
    if len(tokens) > _FEW_TOKENS:
        out.addmm_(tokens, rows)
        return
    add = kernel("add_product")
    for token in range(len(tokens)):
        add(rows.data_ptr(), out[token].data_ptr(), tokens[token].data_ptr(), *rows.shape)


def _tables(scales: torch.Tensor, qzeros: torch.Tensor | None, num_bits: int) -> npt.NDArray[np.float64]:
    """Returns zero points and scales in plain order, float64 [G, 2, N]."""
    num_groups, size_n = scales.shape
    tables = np.empty((num_groups, 2, size_n))
    perm = SCALE_PERM if num_groups > 1 else SCALE_PERM_SINGLE
    permuted = scales.double().numpy().reshape(num_groups, -1, len(perm))
    tables[:, 1] = permuted[..., np.array(inverse_order(perm))].reshape(num_groups, size_n)
    if qzeros is None:
        tables[:, 0] = 1 << (num_bits - 1)
    else:
        shifts = np.arange(0, 32, num_bits, dtype=np.uint32)
        fields = (qzeros.numpy().view(np.uint32)[..., None] >> shifts) & np.uint32((1 << num_bits) - 1)
        blocks = fields.reshape(num_groups, -1, MARLIN_TILE_N)
        tables[:, 0] = blocks[..., _zero_point_positions(num_bits)].reshape(num_groups, size_n)
    return tables


@cache
def _zero_point_positions(num_bits: int) -> npt.NDArray[np.intp]:
    """Returns, for each column of a block of 64, the field of the block's words that holds its zero point."""
    order = MARLIN_INTERLEAVE[num_bits]
    field_of, position_of = inverse_order(order), inverse_order(SCALE_PERM)
    return np.array([p // len(order) * len(order) + field_of[p % len(order)] for p in position_of])
