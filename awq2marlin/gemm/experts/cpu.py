"""The grouped GEMM and a block of experts on a CPU: expert by expert with `gemm.cpu`, in float64.

The weights are exact, the sums are those of float64, and nothing is rounded before the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from awq2marlin.gemm import cpu
from awq2marlin.gemm.checks import Weights
from awq2marlin.gemm.experts.checks import BlockShape, BlockTensors, ExpertShape, ExpertTensors, weights_of

_ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def multiply(tensors: ExpertTensors, shape: ExpertShape) -> torch.Tensor:
    """Returns the grouped product as float64 [M, k, N], for CPU tensors that `checks.check_gemm` has accepted.

    Args:
        tensors: the arguments.
        shape: what their shapes say.
    """
    out = torch.zeros((shape.num_tokens * shape.top_k, shape.size_n), dtype=torch.float64)
    weights = Weights(tensors.qweight, tensors.scales, tensors.qzeros, tensors.bias)
    shares = None if tensors.topk_weights is None else tensors.topk_weights.double().reshape(-1, 1)
    for expert, pairs in _pairs_by_expert(tensors.topk_ids, shape.num_experts):
        rows = pairs // shape.top_k if shape.shared_rows else pairs
        product = _product(tensors.a[rows], weights, expert, tensors.num_bits)
        out[pairs] = product if shares is None else shares[pairs] * product
    return out.reshape(shape.num_tokens, shape.top_k, shape.size_n)


def run_block(tensors: BlockTensors, shape: BlockShape) -> torch.Tensor:
    """Returns a block's result as float64 [M, H], for CPU tensors that `checks.check_block` has accepted.

    Args:
        tensors: the arguments.
        shape: what their shapes say.
    """
    out = torch.zeros((shape.num_tokens, shape.hidden), dtype=torch.float64)
    w13, w2 = weights_of(tensors)
    activate, shares = _ACTIVATE[tensors.activation], tensors.topk_weights.double().reshape(-1, 1)
    for expert, pairs in _pairs_by_expert(tensors.topk_ids, shape.num_experts):
        tokens = pairs // shape.top_k
        gate, up = _product(tensors.hidden[tokens], w13, expert, tensors.num_bits).chunk(2, dim=1)
        out.index_add_(0, tokens, shares[pairs] * _product(activate(gate) * up, w2, expert, tensors.num_bits))
    return out


def _pairs_by_expert(topk_ids: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields every expert that a token chose, with its pairs of token and choice, m*k + j, in order."""
    chosen = topk_ids.reshape(-1).long()
    known = ((chosen >= 0) & (chosen < num_experts)).nonzero().reshape(-1)
    pairs = known[torch.argsort(chosen[known], stable=True)]
    counts = torch.bincount(chosen[known], minlength=num_experts).tolist()
    for expert, mine in enumerate(torch.split(pairs, counts)):
        if len(mine):
            yield expert, mine


def _product(rows: torch.Tensor, weights: Weights, expert: int, num_bits: int) -> torch.Tensor:
    """Returns rows [r, K] times an expert's weight plus its bias, float64 [r, N]."""
    qweight, scales, qzeros, bias = (None if tensor is None else tensor[expert] for tensor in weights)
    assert qweight is not None
    assert scales is not None
    product = cpu.multiply(rows, qweight, scales, qzeros, num_bits)
    return product if bias is None else product + bias.double()
