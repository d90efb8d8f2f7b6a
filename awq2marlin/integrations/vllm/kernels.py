"""vLLM's own Marlin for linear layers, and the choice between it and our kernels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
from vllm.scalar_type import ScalarType, scalar_types

from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE, KernelChoice
from awq2marlin.integrations.serving import kernels
from awq2marlin.integrations.serving.finishing import permute_bias
from awq2marlin.integrations.serving.kernels import EngineKernel, LinearKernel, chosen_kernel
from awq2marlin.integrations.serving.recut import Note

logger = init_logger("vllm.awq2marlin")

#: What this process chose, and what it says once.
CHOICE = KernelChoice("vLLM's Marlin", logger)
EXPERTS_CHOICE = KernelChoice.of_experts("vLLM's Marlin", logger)
RECUT_NOTE = Note(logger)

#: Whether vLLM's Marlin calls take an index of rows and a workspace, as before 0.33.
TAKES_ACTIVATION_ORDER = "g_idx" in inspect.signature(apply_gptq_marlin_linear).parameters


def weight_type(num_bits: int, zero_points: bool) -> ScalarType | None:
    """Returns vLLM's name for the type of the weights; None if its Marlin kernel does not know it.

    Args:
        num_bits: 4 or 8.
        zero_points: whether the layer has ``qzeros``.
    """
    found: ScalarType | None = kernels.weight_type(scalar_types, num_bits, zero_points)
    return found


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
    # A graph that vLLM has compiled holds calls of the kernel, so its cache must know which.
    envs.environment_variables.setdefault(KERNEL_VARIABLE, lambda: CHOICE.taken)
    wtype = weight_type(num_bits, hasattr(layer, "qzeros"))
    return chosen_kernel(CHOICE, layer, num_bits, (size_k, size_n), wtype, VllmMarlinKernel)


class VllmMarlinKernel(EngineKernel):
    """vLLM's ``marlin_gemm``, behind the call that pads activations and strips padding from the result."""

    def __init__(self, wtype: ScalarType, zero_points: bool, size_k: int, size_n: int, device: torch.device) -> None:
        """Serves a layer; see `EngineKernel`."""
        super().__init__(wtype, zero_points, size_k, size_n, device)
        self._facts |= {"input_size_per_partition": size_k, "output_size_per_partition": size_n, "workspace": None}
        if TAKES_ACTIVATION_ORDER:
            from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

            self._facts |= {
                "workspace": marlin_make_workspace_new(device),
                "g_idx": self._empty,
                "g_idx_sort_indices": self._empty,
                "is_k_full": True,
            }

    def ordered_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Returns the bias with its columns in the 32-wide order."""
        return permute_bias(bias)

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x @ w + bias``; see `LinearKernel`."""
        out: torch.Tensor = apply_gptq_marlin_linear(input=x, bias=bias, **self._operands(layer), **self._facts)
        return out
