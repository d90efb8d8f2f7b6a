"""The GEMM of ours that serves a linear layer of any engine, and the choice between it and the engine's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from awq2marlin.gemm.ops import marlin_gemm, warm_up
from awq2marlin.integrations.kernel_choice import KernelChoice
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE


class LinearKernel(Protocol):
    """Multiplies activations with a layer's Marlin weight: ``qweight``, ``scales`` and perhaps ``qzeros``."""

    def ordered_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Returns a bias [padded N] in the order in which the kernel adds it."""

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x @ w + bias``.

        Args:
            layer: holds the weight.
            x: [..., K].
            bias: [padded N] in the kernel's order, or None.

        Returns:
            [..., N].
        """


def chosen_kernel(
    choice: KernelChoice,
    layer: Any,
    num_bits: int,
    sizes: tuple[int, int],
    engine_s: Callable[[], LinearKernel] | None,
) -> LinearKernel:
    """Returns the kernel that serves a finished layer. If it is ours, it is ready for a capture in CUDA graphs.

    Args:
        choice: of this process.
        layer: holds the weight.
        num_bits: 4 or 8.
        sizes: K and N on this rank, without padding.
        engine_s: makes the engine's own kernel for the layer; None if it does not know such weights.

    Raises:
        KernelUnavailableError: if ours must serve it and cannot.
    """
    qzeros, device = getattr(layer, "qzeros", None), layer.qweight.device

    def get_ready() -> None:
        if device.type == "cuda":  # on a CPU there is nothing to compile
            warm_up(layer.qweight, layer.scales, qzeros, num_bits=num_bits)

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if choice.kernel_for(capability, get_ready, only_own=engine_s is None) == "own":
        return OwnKernel(num_bits, qzeros is not None, *sizes)
    assert engine_s is not None, "without one of the engine's only ours serves it"
    return engine_s()


def padded_rows(layer: Any, x: torch.Tensor, size_k: int) -> torch.Tensor:
    """Returns activations as rows that are as long as a weight's columns.

    Args:
        layer: holds ``qweight`` int32 [padded K/16, N*16/f].
        x: [..., K].
        size_k: K without padding.

    Returns:
        [M, padded K], contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = layer.qweight.shape[0] * GPTQ_MARLIN_TILE - size_k
    return pad(rows, (0, missing)) if missing else rows.contiguous()


def without_padding(out: torch.Tensor, x: torch.Tensor, size_n: int) -> torch.Tensor:
    """Returns a product without the columns of padding, in the shape of its activations.

    Args:
        out: [M, padded N].
        x: the activations [..., K].
        size_n: N without padding.

    Returns:
        [..., N], contiguous.
    """
    if out.shape[-1] != size_n:
        out = out[:, :size_n].contiguous()  # what follows may want a view of it
    return out.view(*x.shape[:-1], size_n)


class OwnKernel:
    """``awq2marlin::marlin_gemm``: one operator to torch.compile."""

    def __init__(self, num_bits: int, zero_points: bool, size_k: int, size_n: int) -> None:
        """Serves a layer.

        Args:
            num_bits: 4 or 8.
            zero_points: whether the layer has ``qzeros``.
            size_k: K on this rank, without padding.
            size_n: N on this rank, without padding.
        """
        self._num_bits, self._zero_points = num_bits, zero_points
        self._size_k, self._size_n = size_k, size_n

    def ordered_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Returns the bias: plain order."""
        return bias

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x @ w + bias``; see `LinearKernel`."""
        rows = padded_rows(layer, x, self._size_k)
        qzeros = layer.qzeros if self._zero_points else None
        out = marlin_gemm(rows, layer.qweight, layer.scales, qzeros, bias, num_bits=self._num_bits)
        return without_padding(out, x, self._size_n)
