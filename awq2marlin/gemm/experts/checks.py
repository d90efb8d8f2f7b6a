"""What the operators of experts refuse: types, shapes, layouts in memory and devices that the kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from awq2marlin.gemm.checks import (
    Weights,
    check_activations,
    check_addresses,
    check_device,
    check_dimensions,
    check_type,
    check_weights,
    shape_error,
)
from awq2marlin.layout.packing import pack_factor

#: What may be between the two products of a block: ``act(gate) * up``.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

MAX_EXPERTS = 1024
MAX_TOP_K = 32

#: Numbers from a tensor's first to its last: kernels count the way to a row in 32 bits, in units of eight.
_MAX_REACH = 1 << 35


class ExpertTensors(NamedTuple):
    """The arguments of the grouped GEMM, in the operator's order; see `experts.ops.marlin_moe_gemm`."""

    a: torch.Tensor
    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    num_bits: int = 4


class BlockTensors(NamedTuple):
    """The arguments of a block of experts, in the operator's order; see `experts.ops.marlin_experts`."""

    hidden: torch.Tensor
    w13_qweight: torch.Tensor
    w13_scales: torch.Tensor
    w13_qzeros: torch.Tensor | None
    w2_qweight: torch.Tensor
    w2_scales: torch.Tensor
    w2_qzeros: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    activation: str = "silu"
    num_bits: int = 4


@dataclass(frozen=True)
class ExpertShape:
    """What the shapes of a grouped GEMM's tensors say.

    Attributes:
        num_experts: E.
        size_n: N.
        size_k: K.
        group_size: rows of K that share scales.
        num_tokens: M.
        top_k: how many experts a token has.
        shared_rows: whether a token's experts share its row of ``a``; otherwise each has a row of its own.
    """

    num_experts: int
    size_n: int
    size_k: int
    group_size: int
    num_tokens: int
    top_k: int
    shared_rows: bool


@dataclass(frozen=True)
class BlockShape:
    """What the shapes of a block's tensors say.

    Attributes:
        num_experts: E.
        hidden: H, the width of a token.
        inner: I, the width between the two products.
        w13_group_size: rows of H that share scales.
        w2_group_size: rows of I that share scales.
        num_tokens: M.
        top_k: how many experts a token has.
    """

    num_experts: int
    hidden: int
    inner: int
    w13_group_size: int
    w2_group_size: int
    num_tokens: int
    top_k: int


def check_gemm(tensors: ExpertTensors) -> ExpertShape:
    """Checks the arguments of the grouped GEMM and returns what they say.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    a, qweight, scales, qzeros, topk_ids, topk_weights, bias, num_bits = tensors
    pack_factor(num_bits)
    check_activations("a", a)
    activations = ("a", a)
    num_tokens, top_k = _check_routing(topk_ids, topk_weights, activations)
    if a.shape[0] not in (num_tokens, num_tokens * top_k):
        needed = f"[{num_tokens}, K] or [{num_tokens * top_k}, K], as topk_ids has {list(topk_ids.shape)}"
        raise shape_error("a", a, needed)
    weights = Weights(qweight, scales, qzeros, bias)
    layer = check_weights(weights, a.shape[1], activations, num_bits, of_experts=True)
    num_experts = _check_number("qweight", qweight)
    shared_rows = a.shape[0] == num_tokens
    return ExpertShape(num_experts, layer.size_n, layer.size_k, layer.group_size, num_tokens, top_k, shared_rows)


def check_block(tensors: BlockTensors) -> BlockShape:
    """Checks the arguments of a block of experts and returns what they say.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    hidden, topk_ids, num_bits = tensors.hidden, tensors.topk_ids, tensors.num_bits
    pack_factor(num_bits)
    if tensors.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, found {tensors.activation!r}")
    check_activations("hidden", hidden)
    activations, width = ("hidden", hidden), hidden.shape[1]
    num_tokens, top_k = _check_routing(topk_ids, tensors.topk_weights, activations)
    if hidden.shape[0] != num_tokens:
        raise shape_error("hidden", hidden, f"[{num_tokens}, H], as topk_ids has {list(topk_ids.shape)}")
    first, second = weights_of(tensors)
    w13 = check_weights(first, width, activations, num_bits, prefix="w13_", of_experts=True)
    num_experts = _check_number("w13_qweight", first.qweight)
    inner = w13.size_n // 2
    if w13.size_n % 128:
        needed = "[E, H/16, 2*I*16/f] with I a multiple of 64"
        raise ValueError(
            f"w13_qweight must have the shape {needed}, found {list(first.qweight.shape)}: 2*I = {w13.size_n}"
        )
    size_k_of = ("w13_qweight", first.qweight)
    w2 = check_weights(second, inner, activations, num_bits, prefix="w2_", of_experts=True, size_k_of=size_k_of)
    if (second.qweight.shape[0], w2.size_n) != (num_experts, width):
        wanted = f"[{num_experts}, {inner}/16, {width}*16/{pack_factor(num_bits)}]"
        raise shape_error("w2_qweight", second.qweight, f"{wanted}, as w13_qweight has {list(first.qweight.shape)}")
    return BlockShape(num_experts, width, inner, w13.group_size, w2.group_size, num_tokens, top_k)


def check_out(out: torch.Tensor, hidden: torch.Tensor) -> None:
    """Checks the tensor that is to hold a block's result.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    check_type("out", out, hidden.dtype)
    if out.shape != hidden.shape:
        raise shape_error("out", out, f"{list(hidden.shape)}, as hidden has")
    _check_dense("out", out, ("hidden", hidden))


def check_reach(name: str, rows: int, stride: int, size_k: int) -> None:
    """Checks that a kernel can reach all rows of activations, whichever it gathers.

    Args:
        name: what messages call them.
        rows: how many they are.
        stride: from one to the next, in elements.
        size_k: elements of a row.

    Raises:
        ValueError: the last one is too far off.
    """
    reach = (rows - 1) * stride + size_k
    if reach > _MAX_REACH:
        raise ValueError(f"{name} must span at most {_MAX_REACH} numbers, found {reach}: split the tokens")


def check_gemm_addresses(tensors: ExpertTensors) -> None:
    """Checks where real CUDA tensors of the grouped GEMM begin, as `checks.check_addresses` does.

    Raises:
        ValueError: one begins where the widest load of a kernel may not.
    """
    check_addresses(
        a=(tensors.a, 16),
        qweight=(tensors.qweight, 16),
        scales=(tensors.scales, 16),
        qzeros=(tensors.qzeros, 16),
        bias=(tensors.bias, 8),
    )
    _check_routing_addresses(tensors.topk_ids, tensors.topk_weights)


def check_block_addresses(tensors: BlockTensors) -> None:
    """Checks where real CUDA tensors of a block of experts begin, as `checks.check_addresses` does.

    Raises:
        ValueError: one begins where the widest load of a kernel may not.
    """
    check_addresses(
        hidden=(tensors.hidden, 16),
        w13_qweight=(tensors.w13_qweight, 16),
        w13_scales=(tensors.w13_scales, 16),
        w13_qzeros=(tensors.w13_qzeros, 16),
        w13_bias=(tensors.w13_bias, 8),
        w2_qweight=(tensors.w2_qweight, 16),
        w2_scales=(tensors.w2_scales, 16),
        w2_qzeros=(tensors.w2_qzeros, 16),
        w2_bias=(tensors.w2_bias, 8),
    )
    _check_routing_addresses(tensors.topk_ids, tensors.topk_weights)


def _check_routing_addresses(topk_ids: torch.Tensor, topk_weights: torch.Tensor | None) -> None:
    weight_bytes = 1 if topk_weights is None else topk_weights.element_size()
    check_addresses(topk_ids=(topk_ids, topk_ids.element_size()), topk_weights=(topk_weights, weight_bytes))


def weights_of(tensors: BlockTensors) -> tuple[Weights, Weights]:
    """Returns the tensors of the first and of the second product of a block."""
    return (
        Weights(tensors.w13_qweight, tensors.w13_scales, tensors.w13_qzeros, tensors.w13_bias),
        Weights(tensors.w2_qweight, tensors.w2_scales, tensors.w2_qzeros, tensors.w2_bias),
    )


def _check_routing(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, activations: tuple[str, torch.Tensor]
) -> tuple[int, int]:
    """Checks the chosen experts and their weights, and returns M and k."""
    check_type("topk_ids", topk_ids, torch.int32, torch.int64)
    check_dimensions("topk_ids", topk_ids, 2, "[M, k]")
    num_tokens, top_k = topk_ids.shape
    if not 1 <= top_k <= MAX_TOP_K:
        raise shape_error("topk_ids", topk_ids, f"[M, k] with k from 1 to {MAX_TOP_K}")
    _check_dense("topk_ids", topk_ids, activations)
    if topk_weights is not None:
        check_type("topk_weights", topk_weights, *dict.fromkeys((torch.float32, activations[1].dtype)))
        if topk_weights.shape != topk_ids.shape:
            raise shape_error("topk_weights", topk_weights, f"[{num_tokens}, {top_k}], as topk_ids has")
        _check_dense("topk_weights", topk_weights, activations)
    return num_tokens, top_k


def _check_dense(name: str, tensor: torch.Tensor, activations: tuple[str, torch.Tensor]) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, found strides {tensor.stride()}; call {name}.contiguous()")
    check_device(name, tensor, activations)


def _check_number(name: str, qweight: torch.Tensor) -> int:
    num_experts = qweight.shape[0]
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise shape_error(name, qweight, f"[E, K/16, N*16/f] with E from 1 to {MAX_EXPERTS}")
    return num_experts
