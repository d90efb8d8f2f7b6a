"""A linear layer on the Marlin GEMM, with the methods that serving engines call: AWQ tensors in, Marlin inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional

from awq2marlin.gemm.checks import ACTIVATION_TYPES, check_type
from awq2marlin.gemm.ops import marlin_gemm, repack_awq
from awq2marlin.layout.marlin import num_groups, qweight_shape, unaligned_reason
from awq2marlin.layout.torch_functions import awq_to_marlin_zero_points, marlin_permute_scales, replace_parameter

#: What `torch.nn.Module` does to each of its tensors in ``to``, ``float``, ``cuda`` and the like.
_TensorFunction = Callable[[torch.Tensor], torch.Tensor]


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

    The engine calls `create_weights`, loads an AWQ checkpoint's tensors into the parameters, calls
    `process_weights_after_loading` once, and `apply` for every forward pass.
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
        ``packed_factor``, by which engines cut and fuse them. From here on the layer refuses, with a `TypeError`, to
        be cast to a type that the kernels do not take.

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
            raise ValueError(f"params_dtype must be torch.float16 or torch.bfloat16, found {params_dtype}")

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
        facts._apply = partial(_apply_if_taken, layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turns the loaded AWQ tensors into Marlin ones, on the device where they are.

        Args:
            layer: one that `create_weights` prepared.

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
            layer: one that `process_weights_after_loading` has been through.
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
            _rows_of(x),
            _tensor(layer, "qweight"),
            _tensor(layer, "scales"),
            _tensor(layer, "qzeros") if self.quant_config.zero_point else None,
            bias,
            num_bits=self.quant_config.weight_bits,
        )
        return _shaped_like(x, out)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """Returns activations [..., K] as [M, K]; a view that is none costs the host 2 us."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped_like(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Returns a result [M, N] as [..., N] for activations [..., K]."""
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


def _check_cast(layer: torch.nn.Module, function: _TensorFunction) -> None:
    """Refuses to let a packed layer become what the kernels do not take: the product would be refused, or wrong.

    Args:
        layer: with ``scales`` and ``qweight``.
        function: what is to be applied to its tensors; it is tried on empty ones of their types.

    Raises:
        TypeError: naming the tensor, its type afterwards and the types that are taken.
    """
    for name, types in (("scales", ACTIVATION_TYPES), ("qweight", (torch.int32,))):
        tensor = _tensor(layer, name)
        after = function(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        if after.dtype != tensor.dtype:
            check_type(f"{name} of a packed layer", after, *types)


def _apply_if_taken(layer: torch.nn.Module, function: _TensorFunction, recurse: bool = True) -> torch.nn.Module:
    """Stands in for the ``_apply`` of an engine's layer."""
    _check_cast(layer, function)
    applied: torch.nn.Module = type(layer)._apply(layer, function, recurse)  # type: ignore[no-untyped-call]
    return applied


def _tensor(layer: torch.nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, torch.Tensor), "create_weights registered it"
    return tensor


class MarlinLinear(torch.nn.Module):
    """A linear layer whose weight stays packed: ``y = x @ w + b`` through `marlin_gemm`.

    Inference only. Parameters, without gradients: ``qweight`` int32 [K/16, N*16/f], ``scales`` [G, N], ``qzeros``
    int32 [G, N/f] or None, ``bias`` [N] in plain order or None; K, N and G padded, except in the bias.

    It moves to other devices and may be cast to fp16 or bf16; a cast to another type, by ``float`` or ``to``, of the
    layer or of a model around it, is refused with a `TypeError`. Layers before it in that model may be cast by then.
    """

    qweight: torch.nn.Parameter
    scales: torch.nn.Parameter
    qzeros: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_bits: int,
        group_size: int,
        zero_points: bool = True,
        bias: bool = False,
        padded: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a layer with empty parameters.

        Args:
            in_features: the true K.
            out_features: the true N.
            num_bits: 4 or 8.
            group_size: rows of K that share scales, -1 for all.
            zero_points: whether there are ``qzeros``; without, every zero point is 2^(num_bits-1).
            bias: whether there is a bias.
            padded: K and N of the packed tensors, where they are larger.
            dtype: of scales, bias and activations: fp16 or bf16.
            device: of the parameters; by default the current one.

        Raises:
            ValueError: if the kernels do not take the shape.
        """
        super().__init__()
        size_k, size_n = padded or (in_features, out_features)
        reason = unaligned_reason(size_k, size_n, num_bits, group_size)
        if reason:
            raise ValueError(f"a layer of K = {size_k}, N = {size_n} cannot run on Marlin kernels: {reason}")
        self.in_features, self.out_features = in_features, out_features
        self.padded_k, self.padded_n = size_k, size_n
        self.num_bits, self.group_size = num_bits, group_size
        groups = num_groups(size_k, group_size)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.qweight = empty(*qweight_shape(size_k, size_n, num_bits))
        self.scales = empty(groups, size_n, dtype=dtype)
        self.register_parameter("qzeros", empty(groups, size_n * num_bits // 32) if zero_points else None)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [..., N] for activations [..., K] of the scales' dtype; a new tensor.

        Raises:
            TypeError: as `marlin_gemm` does.
            ValueError: as `marlin_gemm` does.
        """
        rows = _rows_of(x).contiguous()  # the kernels take dense rows only
        bias: torch.Tensor | None = self.bias
        if self.padded_k != self.in_features:
            rows = functional.pad(rows, (0, self.padded_k - self.in_features))
        if bias is not None and self.padded_n != self.out_features:
            bias = functional.pad(bias, (0, self.padded_n - self.out_features))
        out = marlin_gemm(rows, self.qweight, self.scales, self.qzeros, bias, num_bits=self.num_bits)
        if self.padded_n != self.out_features:
            out = out[:, : self.out_features]
        return _shaped_like(x, out)

    def _apply(self, fn: _TensorFunction, recurse: bool = True) -> MarlinLinear:
        """Applies what ``to``, ``float``, ``cuda`` and the like do to each tensor, if the kernels take the result."""
        _check_cast(self, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Returns what tells one layer from another."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, num_bits={self.num_bits}, group_size={self.group_size}"
