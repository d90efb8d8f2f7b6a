"""The GEMM that serves a layer. Today it is vLLM's own; the one place where another could be chosen."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import vllm
from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
from vllm.scalar_type import ScalarType, scalar_types

from awq2marlin.integrations.vllm.versions import takes_activation_order

_WITH_ZERO_POINTS = {4: scalar_types.uint4}
_WITHOUT_ZERO_POINTS = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}


def weight_type(num_bits: int, zero_points: bool) -> ScalarType:
    """Returns vLLM's name for the type of the weights.

    Args:
        num_bits: 4 or 8.
        zero_points: whether the layer has ``qzeros``; with 8 bits it must not.
    """
    return (_WITH_ZERO_POINTS if zero_points else _WITHOUT_ZERO_POINTS)[num_bits]


class LinearKernel(Protocol):
    """Multiplies activations with a layer's Marlin weight."""

    def prepare(self, device: torch.device) -> None:
        """Allocates what every call needs, on the device of the weights."""

    def __call__(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        qzeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns ``x @ w + bias``.

        Args:
            x: [..., K].
            qweight: int32 [padded K / 16, padded N * 16 / f].
            scales: [G, padded N].
            qzeros: int32 [G, padded N / f], or None.
            bias: [padded N] in the kernel's order, or None.

        Returns:
            [..., N].
        """


class VllmMarlinKernel:
    """vLLM's ``marlin_gemm``, behind the call that pads activations and strips padding from the result."""

    def __init__(self, num_bits: int, zero_points: bool, size_k: int, size_n: int) -> None:
        """Serves a layer.

        Args:
            num_bits: 4 or 8.
            zero_points: whether the layer has ``qzeros``.
            size_k: K on this rank, without padding.
            size_n: N on this rank, without padding.
        """
        self._has_activation_order = takes_activation_order(vllm.__version__)
        self._facts: dict[str, Any] = {
            "wtype": weight_type(num_bits, zero_points),
            "input_size_per_partition": size_k,
            "output_size_per_partition": size_n,
        }

    def prepare(self, device: torch.device) -> None:
        """Allocates the empty index and the locks that the call takes in older versions."""
        self._empty = torch.empty(0, dtype=torch.int32, device=device)
        self._facts["workspace"] = None
        if self._has_activation_order:
            from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

            self._facts |= {
                "workspace": marlin_make_workspace_new(device),
                "g_idx": self._empty,
                "g_idx_sort_indices": self._empty,
                "is_k_full": True,
            }

    def __call__(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        qzeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns ``x @ w + bias``; see `LinearKernel`."""
        out: torch.Tensor = apply_gptq_marlin_linear(
            input=x,
            weight=qweight,
            weight_scale=scales,
            weight_zp=self._empty if qzeros is None else qzeros,
            bias=bias,
            **self._facts,
        )
        return out
