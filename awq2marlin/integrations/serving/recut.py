"""Modules that an engine cuts elsewhere than at Marlin's tiles: brought back to plain order, where any cut is one.

An engine cuts and fuses modules as its number of GPUs and its models want. Where that is not at whole tiles of a
Marlin tensor, a loader turns the module's tensors back into AWQ's plain rows, without padding, lets the engine cut
them as it cuts a source, and repacks what is left of them. So whatever the source can be cut into, its converted form
can, too; only not without work at load.
"""

from __future__ import annotations

from logging import Logger

import numpy as np
import torch

from awq2marlin.formats.base import Quantization
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE
from awq2marlin.layout.modules import part_shape


def plain_part(part: str, tensor: torch.Tensor, module: str, size_k: int, quantization: Quantization) -> torch.Tensor:
    """Returns a tensor of a whole Marlin module in AWQ layout, without the module's padding.

    Args:
        part: ``qweight``, ``qzeros`` or ``scales``.
        tensor: as it lies in the file, on any device.
        module: its name, by which it is known whether it is padded.
        size_k: K of the module, without padding.
        quantization: what the checkpoint's config says.

    Returns:
        A new tensor on the CPU: int32 [K, N/f], int32 [G, N/f], or [G, N].
    """
    scheme = quantization.scheme
    rows, columns = tensor.shape
    if part == "qweight":
        rows, columns = rows * GPTQ_MARLIN_TILE, columns // GPTQ_MARLIN_TILE
    size_n = columns if part == "scales" else columns * scheme.pack_factor
    padded_k = rows if part == "qweight" else size_k if scheme.group_size == -1 else rows * scheme.group_size
    layout = MARLIN_NATIVE.layout(part, padded_k, size_n, scheme)
    data = tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy()
    plain = np.empty(layout.size, np.uint8)
    layout.unpack(data, plain)
    whole = torch.from_numpy(plain).view(tensor.dtype).reshape(part_shape(part, padded_k, size_n, scheme))
    true_k, true_n = quantization.padded_modules.get(module, (size_k, size_n))
    true_rows, true_columns = part_shape(part, true_k, true_n, scheme)
    return whole[:true_rows, :true_columns]


class Note:
    """A line in a process's log that says once that modules are cut within tiles."""

    def __init__(self, log: Logger) -> None:
        """Has said nothing yet.

        Args:
            log: the engine's.
        """
        self._log, self._is_said = log, False

    def say(self, module: str, reason: str) -> None:
        """Says it, with the first module as an example.

        Args:
            module: its name.
            reason: why it cannot be loaded as it lies in the file, in words.
        """
        if not self._is_said:
            self._is_said = True
            self._log.info(
                "modules are brought back to plain order, cut or joined, and repacked, which makes loading slower; "
                "the first is %s: %s",
                module,
                reason,
            )
