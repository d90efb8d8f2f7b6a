"""The little that is done to loaded tensors before kernels take them: padding and changes of order.

Functions on tensors, with any number of leading dimensions (experts), and what puts their results into a layer.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from awq2marlin.layout.marlin import SCALE_PERM, SCALE_PERM_SINGLE
from awq2marlin.layout.packing import inverse_order
from awq2marlin.layout.torch_functions import replace_parameter

#: What vLLM notes on a parameter whose memory it has moved to the host.
_PLACE_NOTE = "_vllm_is_uva_offloaded"


def put_finished(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a finished tensor in the place of a loaded parameter: a plain one, which tells that this is done.

    Where it is the loaded one's memory, an engine that has moved that elsewhere keeps its note, and does not move it
    again, which would take a second copy.

    Args:
        layer: of the engine.
        name: of the parameter.
        tensor: for the kernels.
    """
    loaded = getattr(layer, name)
    replace_parameter(layer, name, tensor)
    is_same = tensor.untyped_storage().data_ptr() == loaded.untyped_storage().data_ptr()
    if is_same and hasattr(loaded, _PLACE_NOTE):
        setattr(getattr(layer, name), _PLACE_NOTE, getattr(loaded, _PLACE_NOTE))


def pad_to(tensor: torch.Tensor, rows: int, columns: int, blocks: int = 1) -> torch.Tensor:
    """Returns a tensor with zeros added at the end of its rows, and at the end of each of its blocks of columns.

    Whole tiles, words and groups of zeros, in either layout, stand for weights that are zero.

    Args:
        tensor: [..., R, C].
        rows: R of the result.
        columns: C of the result.
        blocks: how many matrices of equal width lie side by side (gate and up, say).

    Returns:
        [..., rows, columns]; the argument itself if there is nothing to add.
    """
    more_rows, more_columns = rows - tensor.shape[-2], columns - tensor.shape[-1]
    if not more_rows and not more_columns:
        return tensor
    apart = tensor.reshape(*tensor.shape[:-1], blocks, -1)  # [..., R, blocks, C / blocks]
    return pad(apart, (0, more_columns // blocks, 0, 0, 0, more_rows)).flatten(-2)


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


def permute_bias(bias: torch.Tensor) -> torch.Tensor:
    """Returns a bias [..., N], N a multiple of 32, as vLLM's Marlin adds it: columns in the 32-wide order."""
    return _gather(bias, SCALE_PERM_SINGLE)


def _gather(tensor: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
    index = torch.tensor(columns, device=tensor.device)
    return tensor.reshape(*tensor.shape[:-1], -1, len(columns))[..., index].flatten(-2)
