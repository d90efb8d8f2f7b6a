"""A linear layer on the Marlin GEMM, with the methods that serving engines call: AWQ tensors in, Marlin inside."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from awq2marlin.layout import awq_to_marlin_zero_points, marlin_permute_scales, replace_parameter
from awq2marlin.marlin import num_groups, unaligned_reason
from awq2marlin.ops import marlin_gemm, repack_awq


class QuantConfig(Protocol):
    """What a layer needs to know of how it is quantized; `AWQMarlinConfig` is one."""

    weight_bits: int
    group_size: int
    zero_point: bool
    pack_factor: int

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the activation types that the kernels take."""


class AWQMarlinLinearMethod:
    """How one linear layer keeps and applies its weights.

    The engine calls :meth:`create_weights`, loads an AWQ checkpoint's tensors into the parameters, calls
    :meth:`process_weights_after_loading` once, and :meth:`apply` for every forward pass.
    """

    def __init__(self, quant_config: QuantConfig) -> None:
        """Serves layers that are quantized as ``quant_config`` says."""
        self.quant_config = quant_config

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,  # noqa: ARG002 - a part of the field's signature
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters of an AWQ checkpoint's shapes.

        ``qweight`` int32 [K, N/f], ``scales`` [G, N] of ``params_dtype``, and ``qzeros`` int32 [G, N/f] if the
        config has zero points. They carry ``input_dim``, ``output_dim``, and the packed ones ``packed_dim`` and
        ``packed_factor``, by which engines cut and fuse them.

        Args:
            layer: the module; it also remembers its sizes.
            input_size_per_partition: K on this rank.
            output_partition_sizes: the widths that are fused into N on this rank.
            input_size: K of the whole layer.
            output_size: N of the whole layer.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: attributes for every parameter, such as ``weight_loader``.

        Raises:
            ValueError: if the kernels do not take the shape or the type.
        """
        config = self.quant_config
        size_k, size_n = input_size_per_partition, sum(output_partition_sizes)
        reason = unaligned_reason(size_k, size_n, config.weight_bits, config.group_size)
        if reason:
            raise ValueError(f"a layer of K = {size_k}, N = {size_n} cannot run on Marlin kernels: {reason}")
        if params_dtype not in config.get_supported_act_dtypes():
            raise ValueError(f"params_dtype is {params_dtype}; needed: torch.float16 or torch.bfloat16")

        groups = num_groups(size_k, config.group_size)
        packed_n = size_n // config.pack_factor
        shapes = {"qweight": (size_k, packed_n), "scales": (groups, size_n)}
        if config.zero_point:
            shapes["qzeros"] = (groups, packed_n)
        for name, shape in shapes.items():
            is_packed = name != "scales"
            data = torch.empty(shape, dtype=torch.int32 if is_packed else params_dtype)
            parameter = torch.nn.Parameter(data, requires_grad=False)
            attributes = {"input_dim": 0, "output_dim": 1, **extra_weight_attrs}
            if is_packed:
                attributes |= {"packed_dim": 1, "packed_factor": config.pack_factor}
            for attribute, value in attributes.items():
                setattr(parameter, attribute, value)
            layer.register_parameter(name, parameter)

        facts: Any = layer  # modules take any attribute
        facts.input_size_per_partition = size_k
        facts.output_size_per_partition = size_n
        facts.num_groups = groups
        facts.is_marlin = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turns the loaded AWQ tensors into Marlin ones, on the device where they are.

        Args:
            layer: one that :meth:`create_weights` prepared.

        Raises:
            RuntimeError: if the layer has been processed before; doing it twice would scramble the weights.
        """
        if layer.is_marlin:
            raise RuntimeError("the layer's weights are in Marlin layout already; process them once after loading")
        bits, group_size = self.quant_config.weight_bits, self.quant_config.group_size
        facts: Any = layer
        size_k, size_n = facts.input_size_per_partition, facts.output_size_per_partition
        qweight, scales = _tensor(layer, "qweight"), _tensor(layer, "scales")
        replace_parameter(layer, "qweight", repack_awq(qweight, num_bits=bits))  # [K, N/f] -> [K/16, N*16/f]
        replace_parameter(layer, "scales", marlin_permute_scales(scales, size_k, size_n, group_size))  # [G, N]
        if self.quant_config.zero_point:
            qzeros = awq_to_marlin_zero_points(_tensor(layer, "qzeros"), facts.num_groups, size_n, bits)
            replace_parameter(layer, "qzeros", qzeros)  # [G, N/f]
        facts.is_marlin = True

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x @ w + bias``.

        Args:
            layer: one that :meth:`process_weights_after_loading` has been through.
            x: activations [..., K], of the scales' type.
            bias: [N], or None.

        Returns:
            A new tensor [..., N].

        Raises:
            RuntimeError: if the layer still holds AWQ tensors.
            TypeError: as `marlin_gemm` does.
            ValueError: as `marlin_gemm` does.
        """
        if not layer.is_marlin:
            raise RuntimeError("the layer still holds AWQ tensors; call process_weights_after_loading(layer) first")
        out = marlin_gemm(
            x.reshape(-1, x.shape[-1]),
            _tensor(layer, "qweight"),
            _tensor(layer, "scales"),
            _tensor(layer, "qzeros") if self.quant_config.zero_point else None,
            bias,
            num_bits=self.quant_config.weight_bits,
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _tensor(layer: torch.nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, torch.Tensor), "create_weights registered it"
    return tensor
