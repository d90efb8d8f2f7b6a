"""The grouped GEMM of a mixture of experts, and a whole block of experts, as torch operators.

``torch.ops.awq2marlin.marlin_moe_gemm``, ``torch.ops.awq2marlin.marlin_experts`` and ``marlin_experts_into``, which
writes into a tensor that is there, work under ``torch.compile`` and ``torch.export``. On a CUDA device they run the
kernels of ``kernels/``, on the current stream; on a CPU, `experts.cpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from awq2marlin.gemm.checks import ACTIVATION_TYPES, check_dimensions, check_type, remembered
from awq2marlin.gemm.dispatch import refuse_gradients, run_on
from awq2marlin.gemm.experts import cpu
from awq2marlin.gemm.experts.checks import (
    BlockTensors,
    ExpertTensors,
    check_block,
    check_gemm,
    check_out,
)
from awq2marlin.gemm.experts.launch import BlockCall, GemmCall, load_up_to
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE

_GEMM = "awq2marlin::marlin_moe_gemm"
_BLOCK = "awq2marlin::marlin_experts"
_BLOCK_INTO = "awq2marlin::marlin_experts_into"


# ---- the public calls -------------------------------------------------------------------------------------


def marlin_moe_gemm(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
) -> torch.Tensor:
    """Returns ``(a @ w[e] + bias[e]) * weight`` for every expert e that a token chose.

    The experts' tensors are those of `marlin_gemm`, one expert after the other along a first dimension of E, at most
    1024. Sums are formed in fp32 (float64 on a CPU) and rounded once; two runs give the same bits. N, K and the group
    size follow from the shapes; with G = 1 ``scales`` is in the 32-wide order of a single group. It has no gradients.

    Args:
        a: activations, fp16 or bf16: [M, K], where a token's experts share its row, or [M*k, K], where row m*k + j is
            that of token m's choice j. Any M from 0; rows may have a stride (a multiple of 8, at most 2^23).
        qweight: int32 [E, K/16, N*16/f], f = 32/num_bits; experts and rows may have a stride, and so for the rest.
        scales: of a's type, [E, G, N], in Marlin order.
        qzeros: int32 [E, G, N/f], in Marlin order; None means 2^(num_bits-1) everywhere.
        topk_ids: the chosen experts, int32 or int64 [M, k], contiguous, k from 1 to 32. An expert may be chosen
            twice. A number outside 0..E-1, such as -1 for an expert of another rank, gives zeros.
        topk_weights: fp32 or of a's type, [M, k], contiguous; None means 1 everywhere.
        bias: of a's type, [E, N], in plain order.
        num_bits: 4 or 8.

    Returns:
        A new contiguous tensor [M, k, N] of a's type.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: shapes that do not fit, a layout that would have to be copied, tensors on several devices.
        NotImplementedError: an argument requires a gradient, or has a tangent of forward mode.
        KernelUnavailableError: the kernel cannot be compiled or run here, or a CUDA graph capture met a
            kernel that is not loaded yet (call this once before the capture).
    """
    return torch.ops.awq2marlin.marlin_moe_gemm(  # type: ignore[no-any-return]
        a, qweight, scales, qzeros, topk_ids, topk_weights, bias, num_bits
    )


def marlin_experts(
    hidden: torch.Tensor,
    w13_qweight: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_qzeros: torch.Tensor | None,
    w2_qweight: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_qzeros: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: str = "silu",
    num_bits: int = 4,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the weighted sum of the experts that each token chose: a whole block of experts.

    That is ``sum of topk_weights[m, j] * ((act(gate) * up) @ w2[e] + w2_bias[e])`` over a token's choices e, with gate
    and up the two halves of ``hidden[m] @ w13[e] + w13_bias[e]``. On a GPU ``act(gate) * up`` and each expert's result
    may be rounded to the type of ``hidden``; on a CPU nothing is before the sum. Two runs give the same bits. It has no
    gradients.

    Args:
        hidden: fp16 or bf16 [M, H], any M from 0; rows may have a stride (a multiple of 8, at most 2^23).
        w13_qweight: int32 [E, H/16, 2*I*16/f], f = 32/num_bits: gate's I columns, then up's; I is a multiple of 64.
        w13_scales: of hidden's type, [E, G, 2*I], in Marlin order: with G = 1 the 32-wide one of a single group.
        w13_qzeros: int32 [E, G, 2*I/f], in Marlin order; None means 2^(num_bits-1) everywhere.
        w2_qweight: int32 [E, I/16, H*16/f].
        w2_scales: of hidden's type, [E, G, H]; its group size may be another than that of ``w13_scales``.
        w2_qzeros: int32 [E, G, H/f], or None.
        topk_ids: as for `marlin_moe_gemm`, [M, k]; a number outside 0..E-1 adds nothing.
        topk_weights: fp32 or of hidden's type, [M, k], contiguous.
        w13_bias: of hidden's type, [E, 2*I], in plain order.
        w2_bias: of hidden's type, [E, H], in plain order.
        activation: ``silu``, ``gelu`` (by the error function) or ``gelu_tanh``.
        num_bits: 4 or 8.
        out: where the result goes: contiguous, [M, H] of hidden's type; it may be ``hidden`` itself.

    Returns:
        ``out``, or a new contiguous tensor [M, H] of hidden's type.

    Raises:
        TypeError: as for `marlin_moe_gemm`.
        ValueError: as for `marlin_moe_gemm`, or an activation that is not known.
        NotImplementedError: as for `marlin_moe_gemm`.
        KernelUnavailableError: as for `marlin_moe_gemm`; `warm_up_experts` loads all that a layer needs.
    """
    arguments = (
        *(hidden, w13_qweight, w13_scales, w13_qzeros, w2_qweight, w2_scales, w2_qzeros, topk_ids, topk_weights),
        *(w13_bias, w2_bias, activation, num_bits),
    )
    if out is None:
        return torch.ops.awq2marlin.marlin_experts(*arguments)  # type: ignore[no-any-return]
    torch.ops.awq2marlin.marlin_experts_into(*arguments, out)
    return out


def warm_up_experts(
    w13_qweight: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_qzeros: torch.Tensor | None,
    w2_qweight: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_qzeros: torch.Tensor | None,
    *,
    top_k: int,
    activation: str = "silu",
    num_bits: int = 4,
    max_tokens: int = 1 << 16,
) -> int:
    """Compiles and loads every kernel that `marlin_experts` may use for a layer, up to ``max_tokens``.

    Call it once per kind of layer before a CUDA graph capture, which forbids loading. `marlin_moe_gemm` has kernels of
    its own: call it once for every number of tokens that is to be captured.

    Args:
        w13_qweight: as for `marlin_experts`, on a CUDA device.
        w13_scales: as for `marlin_experts`; their dtype is that of the activations to come.
        w13_qzeros: as for `marlin_experts`.
        w2_qweight: as for `marlin_experts`.
        w2_scales: as for `marlin_experts`.
        w2_qzeros: as for `marlin_experts`.
        top_k: how many experts a token chooses.
        activation: as for `marlin_experts`.
        num_bits: 4 or 8.
        max_tokens: the largest M to come.

    Returns:
        How many kernels are ready.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: the tensors do not fit, or are not on a CUDA device; ``max_tokens`` is less than 1.
        KernelUnavailableError: a kernel cannot be compiled or loaded.
    """
    check_type("w13_scales", w13_scales, *ACTIVATION_TYPES)
    check_dimensions("w13_qweight", w13_qweight, 3, "[E, H/16, 2*I*16/f]")
    one_token = w13_scales.new_empty((1, w13_qweight.shape[1] * GPTQ_MARLIN_TILE))
    topk_ids = w13_qweight.new_empty((1, top_k))
    weights = (w13_qweight, w13_scales, w13_qzeros, w2_qweight, w2_scales, w2_qzeros)
    block = BlockTensors(one_token, *weights, topk_ids, topk_ids.float(), activation=activation, num_bits=num_bits)
    check_block(block)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
    if w13_qweight.device.type != "cuda":
        raise ValueError(
            f"w13_qweight must be on a CUDA device, the only kind that needs a warm-up, found {w13_qweight.device}"
        )
    return load_up_to(block, max_tokens)


# ---- the grouped GEMM as an operator ------------------------------------------------------------------------

torch.library.define(
    _GEMM,
    "(Tensor a, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor topk_ids, Tensor? topk_weights, Tensor? bias, "
    "int num_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(_GEMM)  # type: ignore[untyped-decorator]
def _gemm_fake(*arguments: Any) -> torch.Tensor:
    tensors = ExpertTensors(*arguments)
    size_n = check_gemm(tensors).size_n
    return tensors.a.new_empty((*tensors.topk_ids.shape, size_n))


@torch.library.impl(_GEMM, "cpu")
def _gemm_cpu(*arguments: Any) -> torch.Tensor:
    tensors = ExpertTensors(*arguments)
    return cpu.multiply(tensors, check_gemm(tensors)).to(tensors.a.dtype)


def _gemm_cuda(*arguments: Any) -> torch.Tensor:
    return _prepared_gemm(*arguments)(ExpertTensors(*arguments))


@remembered
def _prepared_gemm(*arguments: Any) -> Callable[[ExpertTensors], torch.Tensor]:
    """Checks CUDA tensors and returns what multiplies any that are like them."""
    tensors = ExpertTensors(*arguments)
    if tensors.a.shape[0]:
        return GemmCall(tensors)
    size_n = check_gemm(tensors).size_n
    return lambda tensors: tensors.a.new_empty((*tensors.topk_ids.shape, size_n))


# ---- a block of experts as an operator ----------------------------------------------------------------------

_BLOCK_ARGUMENTS = (
    "Tensor hidden, Tensor w13_qweight, Tensor w13_scales, Tensor? w13_qzeros, Tensor w2_qweight, Tensor w2_scales, "
    "Tensor? w2_qzeros, Tensor topk_ids, Tensor topk_weights, Tensor? w13_bias, Tensor? w2_bias, str activation, "
    "int num_bits"
)

torch.library.define(_BLOCK, f"({_BLOCK_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(_BLOCK_INTO, f"({_BLOCK_ARGUMENTS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _check_into(*arguments: Any) -> tuple[BlockTensors, torch.Tensor]:
    tensors, out = BlockTensors(*arguments[:-1]), arguments[-1]
    check_block(tensors)
    check_out(out, tensors.hidden)
    return tensors, out


@torch.library.register_fake(_BLOCK)  # type: ignore[untyped-decorator]
def _block_fake(*arguments: Any) -> torch.Tensor:
    tensors = BlockTensors(*arguments)
    check_block(tensors)
    return tensors.hidden.new_empty(tensors.hidden.shape)


@torch.library.register_fake(_BLOCK_INTO)  # type: ignore[untyped-decorator]
def _block_into_fake(*arguments: Any) -> None:
    _check_into(*arguments)


@torch.library.impl(_BLOCK, "cpu")
def _block_cpu(*arguments: Any) -> torch.Tensor:
    tensors = BlockTensors(*arguments)
    return cpu.run_block(tensors, check_block(tensors)).to(tensors.hidden.dtype)


@torch.library.impl(_BLOCK_INTO, "cpu")
def _block_into_cpu(*arguments: Any) -> None:
    tensors, out = _check_into(*arguments)
    out.copy_(cpu.run_block(tensors, check_block(tensors)))


def _block_cuda(*arguments: Any) -> torch.Tensor:
    run, tensors = _prepared_block(None, *arguments), BlockTensors(*arguments)
    out = tensors.hidden.new_empty(tensors.hidden.shape)
    run(tensors, out)
    return out


def _block_into_cuda(*arguments: Any) -> None:
    *tensors, out = arguments
    _prepared_block(out, *tensors)(BlockTensors(*tensors), out)
    torch.autograd.graph.increment_version(out)  # autograd does not see what a kernel writes


@remembered
def _prepared_block(out: torch.Tensor | None, *arguments: Any) -> Callable[[BlockTensors, torch.Tensor], None]:
    """Checks CUDA tensors and returns what runs a block of any that are like them."""
    tensors = BlockTensors(*arguments)
    if out is not None:
        check_out(out, tensors.hidden)
    if tensors.hidden.shape[0]:
        return BlockCall(tensors)
    check_block(tensors)
    return lambda _, __: None


# ---- no gradients, and what runs on a GPU -----------------------------------------------------------------

for _operator, _public, _run in (
    (_GEMM, marlin_moe_gemm, _gemm_cuda),
    (_BLOCK, marlin_experts, _block_cuda),
    (_BLOCK_INTO, marlin_experts, _block_into_cuda),
):
    refuse_gradients(_operator, _public.__name__)
    run_on("CUDA", _operator, _run, _public.__name__)
