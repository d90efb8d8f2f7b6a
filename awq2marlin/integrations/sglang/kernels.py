"""SGLang's own Marlin for linear layers, and the choice between it and our kernels."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.quantization.marlin_utils import apply_gptq_marlin_linear, marlin_make_workspace
from sglang.srt.layers.quantization.utils import get_scalar_types

from awq2marlin.integrations.kernel_choice import KernelChoice
from awq2marlin.integrations.serving import kernels
from awq2marlin.integrations.serving.kernels import (
    EngineKernel,
    LinearKernel,
    chosen_kernel,
    padded_rows,
    without_padding,
)
from awq2marlin.integrations.serving.recut import Note
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE

_logger = logging.getLogger("sglang.awq2marlin")

#: What this process chose, and what it says once.
CHOICE = KernelChoice("SGLang's Marlin", _logger)
EXPERTS_CHOICE = KernelChoice.of_experts("SGLang's Marlin", _logger)
RECUT_NOTE = Note(_logger)


def weight_type(num_bits: int, zero_points: bool) -> Any:
    """Returns SGLang's name for the type of the weights; None if its Marlin kernels do not know it.

    Args:
        num_bits: 4 or 8.
        zero_points: whether the layer has ``qzeros``.
    """
    return kernels.weight_type(get_scalar_types()[1], num_bits, zero_points)


def kernel_of(layer: Any, num_bits: int, size_k: int, size_n: int) -> LinearKernel:
    """Returns the kernel that serves a finished layer. If it is ours, it is ready for a capture in CUDA graphs.

    Args:
        layer: holds the weight.
        num_bits: 4 or 8.
        size_k: K on this rank, without padding.
        size_n: N on this rank, without padding.

    Raises:
        KernelUnavailableError: if ours must serve it and cannot.
    """
    wtype = weight_type(num_bits, hasattr(layer, "qzeros"))
    return chosen_kernel(CHOICE, layer, num_bits, (size_k, size_n), wtype, SglangMarlinKernel)


class SglangMarlinKernel(EngineKernel):
    """SGLang's ``gptq_marlin_gemm``, behind the call that fits its CUDA graphs; it adds a bias in plain order."""

    def __init__(self, wtype: Any, zero_points: bool, size_k: int, size_n: int, device: torch.device) -> None:
        """Serves a layer; see `EngineKernel`."""
        super().__init__(wtype, zero_points, size_k, size_n, device)
        self._facts |= {"workspace": marlin_make_workspace(device), "is_k_full": True}
        self._facts |= {"g_idx": self._empty, "g_idx_sort_indices": self._empty}

    def ordered_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Returns the bias: plain order."""
        return bias

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x @ w + bias``; see `LinearKernel`."""
        out: torch.Tensor = apply_gptq_marlin_linear(
            input=padded_rows(layer, x, self._size_k),
            bias=bias,
            input_size_per_partition=layer.qweight.shape[0] * GPTQ_MARLIN_TILE,
            output_size_per_partition=layer.scales.shape[1],
            **self._operands(layer),
            **self._facts,
        )
        return without_padding(out, x, self._size_n)
