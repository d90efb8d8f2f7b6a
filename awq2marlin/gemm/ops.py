"""The Marlin GEMM and the AWQ-to-Marlin repack as torch operators.

``torch.ops.awq2marlin.marlin_gemm`` and ``torch.ops.awq2marlin.awq_marlin_repack`` work under
``torch.compile`` and ``torch.export``. On a CUDA device they run the kernels of ``kernels/``, on the current
stream; on a CPU, `gemm.cpu` and `layout`. ``kernels/README.md`` explains the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from awq2marlin.gemm import cpu
from awq2marlin.gemm.checks import (
    ACTIVATION_TYPES,
    GemmTensors,
    check_addresses,
    check_dimensions,
    check_gemm,
    check_repack,
    check_type,
    remembered,
)
from awq2marlin.gemm.dispatch import refusing_transforms, run_on
from awq2marlin.gemm.driver import device_of
from awq2marlin.gemm.launch import GemmCall, describe, launch_repack, load_up_to, problem_of
from awq2marlin.gemm.select import pick_config
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, qweight_shape
from awq2marlin.layout.packing import AWQ_PACK_ORDER, inverse_order

_GEMM = "awq2marlin::marlin_gemm"
_REPACK = "awq2marlin::awq_marlin_repack"


# ---- the public calls -------------------------------------------------------------------------------------


@refusing_transforms
def marlin_gemm(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
) -> torch.Tensor:
    """Returns ``a @ w + bias`` with ``w = (q - z) * s``, straight from Marlin tensors.

    Sums are formed in fp32 (float64 on a CPU) and rounded once; two runs give the same bits. N, K and the
    group size follow from the shapes; with G = 1 ``scales`` is in the 32-wide order of a single group.
    ``a`` and ``bias`` have gradients, for which the whole weight is decoded; ``scales`` has none. Derivatives in
    forward mode and of ``torch.func`` (``jvp``, ``grad``) are refused.

    Args:
        a: activations, fp16 or bf16 [M, K], any M from 0; rows may have a stride (a multiple of 8, at most 2^23).
        qweight: int32 [K/16, N*16/f], f = 32/num_bits; rows may have a stride, as column slices do.
        scales: of a's type, [G, N], in Marlin order; rows may have a stride.
        qzeros: int32 [G, N/f], in Marlin order; None means 2^(num_bits-1) everywhere. Rows may have a stride.
        bias: of a's type, [N], in plain order.
        num_bits: 4 or 8.

    Returns:
        A new contiguous tensor [M, N] of a's type.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: shapes that do not fit, a layout that would have to be copied, tensors on several devices.
        NotImplementedError: ``scales`` requires a gradient, or an argument has a tangent of forward mode or a gradient
            of ``torch.func``.
        KernelUnavailableError: the kernel cannot be compiled or run here, or a CUDA graph capture met a
            kernel that is not loaded yet (call `warm_up` before the capture).
    """
    return torch.ops.awq2marlin.marlin_gemm.default(a, qweight, scales, qzeros, bias, num_bits)  # type: ignore[no-any-return]


def repack_awq(qweight: torch.Tensor, *, num_bits: int = 4) -> torch.Tensor:
    """Returns AWQ weights in the Marlin layout, the same bytes on every device; on a GPU at memory speed.

    Args:
        qweight: int32 [K, N/f], f = 32/num_bits, K % 16 = 0 and N % 64 = 0; rows may have a stride.
        num_bits: 4 or 8.

    Returns:
        A new contiguous int32 tensor [K/16, N*16/f].

    Raises:
        TypeError: ``qweight`` is not int32.
        ValueError: a shape or layout that does not fit.
        KernelUnavailableError: as for `marlin_gemm`.
    """
    return torch.ops.awq2marlin.awq_marlin_repack(qweight, num_bits)  # type: ignore[no-any-return]


def warm_up(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
    max_tokens: int = 1 << 16,
) -> int:
    """Compiles and loads every kernel that `marlin_gemm` may use for a layer, up to ``max_tokens``.

    Call it once per kind of layer before a CUDA graph capture, which forbids loading.

    Args:
        qweight: as for `marlin_gemm`, on a CUDA device.
        scales: as for `marlin_gemm`; their dtype is that of the activations to come.
        qzeros: as for `marlin_gemm`.
        num_bits: 4 or 8.
        max_tokens: the largest M to come.

    Returns:
        How many kernels are ready.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: the tensors do not fit, or are not on a CUDA device.
        KernelUnavailableError: a kernel cannot be compiled or loaded.
    """
    check_type("scales", scales, *ACTIVATION_TYPES)
    check_dimensions("qweight", qweight, 2, "[K/16, N*16/f]")
    one_token = scales.new_empty((1, qweight.shape[0] * GPTQ_MARLIN_TILE))
    shape = check_gemm(GemmTensors(one_token, qweight, scales, qzeros, None, num_bits))
    if qweight.device.type != "cuda":
        raise ValueError(
            f"qweight must be on a CUDA device, the only kind that needs a warm-up, found {qweight.device}"
        )
    device = device_of(qweight.device.index)
    return load_up_to(describe(shape, max_tokens, scales.dtype, num_bits, device), device)


# ---- the GEMM as an operator --------------------------------------------------------------------------------

torch.library.define(
    _GEMM,
    "(Tensor a, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? bias, int num_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(_GEMM)  # type: ignore[untyped-decorator]
def _gemm_fake(*arguments: Any) -> torch.Tensor:
    tensors = GemmTensors(*arguments)
    return tensors.a.new_empty((tensors.a.shape[0], check_gemm(tensors).size_n))


def _gemm_cpu(*arguments: Any) -> torch.Tensor:
    tensors = GemmTensors(*arguments)
    check_gemm(tensors)
    a, qweight, scales, qzeros, bias, num_bits = tensors
    product = cpu.multiply(a, qweight, scales, qzeros, num_bits)
    return (product if bias is None else product + bias.double()).to(a.dtype)


def _gemm_cuda(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
) -> torch.Tensor:
    return _prepared(a, qweight, scales, qzeros, bias, num_bits)(a, qweight, scales, qzeros, bias)


@remembered
def _prepared(*arguments: Any) -> Callable[..., torch.Tensor]:
    """Checks CUDA tensors and returns what multiplies any that are like them."""
    tensors = GemmTensors(*arguments)
    problem = problem_of(tensors)
    if problem.size_m == 0:
        return lambda a, *_: a.new_empty((0, problem.size_n))
    return GemmCall(pick_config(problem), problem, tensors)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch's call
    tensors = GemmTensors(*inputs)
    if ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "scales must need no gradient, as marlin_gemm has none for them: call scales.requires_grad_(False)"
        )
    ctx.num_bits = tensors.num_bits
    ctx.save_for_backward(tensors.qweight, tensors.scales, tensors.qzeros)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of ``a`` [M, K] and ``bias`` [N] from that of the product, [M, N]."""
    qweight, scales, qzeros = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(qweight, scales, qzeros, num_bits=ctx.num_bits).to(grad.dtype)  # [K, N]
        grad_a = grad @ weight.t()  # [M, N] @ [N, K] -> [M, K]
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_a, None, None, None, grad_bias, None


torch.library.register_autograd(_GEMM, _gradient, setup_context=_keep_for_gradient)
run_on("CPU", _GEMM, _gemm_cpu, marlin_gemm.__name__)
run_on("CUDA", _GEMM, _gemm_cuda, marlin_gemm.__name__)


# ---- the repack as an operator ------------------------------------------------------------------------------

torch.library.define(_REPACK, "(Tensor qweight, int num_bits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(_REPACK)  # type: ignore[untyped-decorator]
def _repack_fake(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    return qweight.new_empty(qweight_shape(*check_repack(qweight, num_bits), num_bits))


@torch.library.impl(_REPACK, "cpu")
def _repack_cpu(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    size_k, size_n = check_repack(qweight, num_bits)
    return layout.awq_marlin_repack(qweight, size_k, size_n, num_bits)


def _repack_cuda(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    size_k, size_n = check_repack(qweight, num_bits)
    check_addresses(qweight=(qweight, 16))
    out = qweight.new_empty(qweight_shape(size_k, size_n, num_bits))
    launch_repack(qweight, out, size_k, size_n, num_bits)
    return out


torch.library.impl(_REPACK, "cuda", _repack_cuda)


# ---- decoding, slow and plain -------------------------------------------------------------------------------


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None = None, *, num_bits: int = 4
) -> torch.Tensor:
    """Returns the weight that Marlin tensors hold, exactly, as float64 [K, N].

    Args:
        qweight: int32 [K/16, N*16/f].
        scales: fp16 or bf16 [G, N].
        qzeros: int32 [G, N/f], or None.
        num_bits: 4 or 8.
    """
    size_k, (num_groups, size_n) = qweight.shape[0] * GPTQ_MARLIN_TILE, scales.shape
    group_size = size_k // num_groups
    awq = layout.marlin_awq_repack(qweight, size_k, size_n, num_bits)
    order = list(inverse_order(AWQ_PACK_ORDER[num_bits]))
    quantized = layout.unpack_cols(awq, num_bits, size_k, size_n).reshape(size_k, -1, len(order))[..., order]
    weight = quantized.reshape(size_k, size_n).double()
    if qzeros is None:
        weight -= 1 << (num_bits - 1)
    else:
        zeros = layout.marlin_unpack_zero_points(qzeros, num_groups, size_n, num_bits)
        weight -= zeros.double().repeat_interleave(group_size, 0)
    plain_scales = layout.marlin_unpermute_scales(scales, size_k, size_n, group_size)
    return weight * plain_scales.double().repeat_interleave(group_size, 0)
