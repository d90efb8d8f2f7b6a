"""The kernels of ours that serve layers of any engine, and the choice between them and the engine's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import pad

from awq2marlin.gemm.experts.checks import ACTIVATIONS, MAX_EXPERTS, MAX_TOP_K
from awq2marlin.gemm.experts.ops import marlin_experts, warm_up_experts
from awq2marlin.gemm.ops import marlin_gemm, warm_up
from awq2marlin.integrations.kernel_choice import Kernel, KernelChoice
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


#: What engines call the weights that their Marlin kernels know, by bits and whether there are zero points.
_WEIGHT_TYPES = {(4, True): "uint4", (4, False): "uint4b8", (8, False): "uint8b128"}


def weight_type(types: Any, num_bits: int, zero_points: bool) -> Any:
    """Returns an engine's type of weights; None if its Marlin kernels do not know it.

    Args:
        types: where the engine keeps them, by name.
        num_bits: 4 or 8.
        zero_points: whether there are ``qzeros``.
    """
    name = _WEIGHT_TYPES.get((num_bits, zero_points))
    return None if name is None else getattr(types, name)


class EngineKernel:
    """An engine's own Marlin for linear layers; the engine's plugin adds how it is called, and the order of a bias."""

    def __init__(self, wtype: Any, zero_points: bool, size_k: int, size_n: int, device: torch.device) -> None:
        """Serves a layer.

        Args:
            wtype: the engine's type of the weights.
            zero_points: whether the layer has ``qzeros``.
            size_k: K on this rank, without padding.
            size_n: N on this rank, without padding.
            device: of the weights.
        """
        self._zero_points = zero_points
        self._size_k, self._size_n = size_k, size_n
        self._empty = torch.empty(0, dtype=torch.int32, device=device)
        #: What every call gets.
        self._facts: dict[str, Any] = {"wtype": wtype}

    def _operands(self, layer: Any) -> dict[str, torch.Tensor]:
        """Returns a layer's weight, as engines call its tensors; zero points that are not there are empty."""
        qzeros = layer.qzeros if self._zero_points else self._empty
        return {"weight": layer.qweight, "weight_scale": layer.scales, "weight_zp": qzeros}


def chosen_kernel(
    choice: KernelChoice,
    layer: Any,
    num_bits: int,
    sizes: tuple[int, int],
    wtype: Any,
    engine_s: Callable[[Any, bool, int, int, torch.device], LinearKernel],
) -> LinearKernel:
    """Returns the kernel that serves a finished layer. If it is ours, it is ready for a capture in CUDA graphs.

    Args:
        choice: of this process.
        layer: holds the weight.
        num_bits: 4 or 8.
        sizes: K and N on this rank, without padding.
        wtype: the engine's type of the weights; None if its own kernel does not know it.
        engine_s: makes the engine's own kernel; see `EngineKernel`.

    Raises:
        KernelUnavailableError: if ours must serve it and cannot.
    """
    qzeros, device = getattr(layer, "qzeros", None), layer.qweight.device

    def get_ready() -> None:
        if device.type == "cuda":  # on a CPU there is nothing to compile
            warm_up(layer.qweight, layer.scales, qzeros, num_bits=num_bits)

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if choice.kernel_for(capability, get_ready, only_own=wtype is None) == "own":
        return OwnKernel(num_bits, qzeros is not None, *sizes)
    return engine_s(wtype, qzeros is not None, *sizes, device)


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


# ---- experts --------------------------------------------------------------------------------------------------

#: Of ``w13`` and then of ``w2``: qweight, scales, and qzeros or None.
ExpertWeights = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None
]  # fmt: skip


class ExpertsTask(NamedTuple):
    """What a model asks of a layer of experts.

    Attributes:
        activation: what the gate goes through, as the engine calls it.
        is_gated: whether there is a gate.
        has_limits: whether the activation has limits or factors besides.
        top_k: how many experts a token chooses.
        num_experts: E on this rank.
        has_lora: whether adapters may be put on the experts.
        is_sent: whether tokens are sent to the experts of other GPUs.
        is_summed: whether the products of a token's experts are summed.
    """

    activation: str
    is_gated: bool
    has_limits: bool
    top_k: int
    num_experts: int
    has_lora: bool = False
    is_sent: bool = False
    is_summed: bool = True

    def reason_without_own(self) -> str | None:
        """Returns why our experts cannot do it, in words; None if they can."""
        ours = "awq2marlin's grouped GEMM"
        if not self.is_gated:
            return f"{ours} computes experts with a gate only"
        if self.activation not in ACTIVATIONS:
            return f"{ours} does not compute the activation {self.activation!r}"
        if self.has_limits:
            return f"{ours} does not compute an activation with limits or factors"
        if self.has_lora:
            return f"{ours} does not support LoRA adapters on experts"
        if self.is_sent:
            return f"{ours} does not serve tokens that are sent between GPUs"
        if not self.is_summed:
            return f"{ours} sums the products of a token's experts, which this model needs separately"
        if self.top_k > MAX_TOP_K:
            return f"{ours} supports at most {MAX_TOP_K} experts per token, this model has {self.top_k}"
        if self.num_experts > MAX_EXPERTS:
            return f"{ours} supports at most {MAX_EXPERTS} experts, this rank has {self.num_experts}"
        return None


def chosen_experts_kernel(
    choice: KernelChoice, layer: Any, num_bits: int, task: ExpertsTask, *, only_own: bool
) -> Kernel:
    """Returns which kernel serves finished experts. If it is ours, it is ready for a capture in CUDA graphs.

    Args:
        choice: of this process.
        layer: holds ``w13_qweight`` and the other tensors of the experts.
        num_bits: 4 or 8.
        task: what the model asks of them.
        only_own: whether the engine's experts do not know such weights.

    Raises:
        KernelUnavailableError: if ours must serve them and cannot.
    """
    reason = task.reason_without_own()
    if reason is not None:
        return choice.leave(reason)
    device = layer.w13_qweight.device

    def get_ready() -> None:
        if device.type == "cuda":  # on a CPU there is nothing to compile
            weights = expert_weights(layer)
            warm_up_experts(*weights, top_k=task.top_k, activation=task.activation, num_bits=num_bits)

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choice.kernel_for(capability, get_ready, only_own=only_own)


def expert_weights(layer: Any) -> ExpertWeights:
    """Returns a layer's tensors of experts; None for zero points that are not there.

    Args:
        layer: of the engine.
    """
    w13_qzeros, w2_qzeros = getattr(layer, "w13_qzeros", None), getattr(layer, "w2_qzeros", None)
    return layer.w13_qweight, layer.w13_scales, w13_qzeros, layer.w2_qweight, layer.w2_scales, w2_qzeros


def run_experts(
    weights: ExpertWeights,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Returns what this rank's experts make of tokens; see `marlin_experts`.

    Args:
        weights: of this rank's experts.
        hidden: [M, H].
        topk_ids: integers [M, k], the chosen experts of the model, or this rank's numbers of them; what is below 0
            counts for nothing.
        topk_weights: of any floating type, [M, k].
        expert_map: int32, this rank's number of every expert of the model, -1 for those of other ranks; None if
            ``topk_ids`` are this rank's numbers.
        options: further ones of `marlin_experts`.

    Returns:
        [M, H].
    """
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.int()
    if expert_map is not None:  # an index below 0 counts from the end, so it is left out
        topk_ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids])
    if topk_weights.dtype != hidden.dtype:
        topk_weights = topk_weights.float()
    return marlin_experts(hidden.contiguous(), *weights, topk_ids.contiguous(), topk_weights.contiguous(), **options)
