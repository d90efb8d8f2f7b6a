"""The experts of one layer, each a packed linear layer under the name that the checkpoint gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

from awq2marlin.gemm.experts.checks import MAX_EXPERTS, MAX_TOP_K
from awq2marlin.gemm.experts.ops import marlin_experts
from awq2marlin.gemm.linear import MarlinLinear

_PARTS = ("qweight", "scales", "qzeros")


class _Stack(NamedTuple):
    """What `marlin_experts` takes of all experts; the parameters of the single ones are views of it."""

    w13_qweight: torch.Tensor
    w13_scales: torch.Tensor
    w13_qzeros: torch.Tensor | None
    w2_qweight: torch.Tensor
    w2_scales: torch.Tensor
    w2_qzeros: torch.Tensor | None


class MarlinExperts(torch.nn.Module):
    """Stands in for a module of Transformers' fused experts and keeps every expert packed.

    Its children are called ``0``, ``1``, ... and theirs as in the checkpoint (``w1``, ``gate_proj``), so that names
    of files and of the model agree, and saving needs no conversion. The children's tensors lie one expert after the
    other in one tensor, where `marlin_experts` computes them all at once; where it does not apply, expert after expert
    does: for gradients, padded experts, biases, other activations, and experts that are not where the tokens are.
    """

    _stack: _Stack | None

    def __init__(
        self,
        experts: Mapping[int, Mapping[str, MarlinLinear]],
        roles: Mapping[str, str],
        activate: Callable[[torch.Tensor], torch.Tensor],
        activation: str | None = None,
    ) -> None:
        """Takes the layers.

        Args:
            experts: each expert's layers by name, by the expert's number from 0.
            roles: which name is ``up`` and ``down``, and ``gate`` if there is one.
            activate: makes [M, I] of the first projections: of gate and up side by side [M, 2 I], or of up [M, I].
            activation: what `marlin_experts` calls that; None for another one.
        """
        super().__init__()
        self.num_experts = len(experts)
        self.roles = dict(roles)
        self._activate, self._activation = activate, activation
        self._stack = None
        for number in sorted(experts):
            self.add_module(str(number), torch.nn.ModuleDict(dict(experts[number])))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns the experts' weighted sum for every token; the same bits in every run.

        Args:
            hidden_states: [T, H].
            top_k_index: the experts of each token, integers [T, k].
            top_k_weights: their weights [T, k].

        Returns:
            A new tensor [T, H] of the type of ``hidden_states``.
        """
        if not torch.compiler.is_compiling() and not self._is_stacked():
            self.stack()
        needs_gradient = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        stack = self._stack
        if (
            needs_gradient
            or stack is None
            or stack.w2_qweight.device != hidden_states.device
            or top_k_index.shape[-1] > MAX_TOP_K
        ):
            out: torch.Tensor = self._one_by_one(hidden_states, top_k_index, top_k_weights)
            return out
        if top_k_weights.dtype != hidden_states.dtype:
            top_k_weights = top_k_weights.float()
        if top_k_index.dtype != torch.int32:
            top_k_index = top_k_index.long()
        assert self._activation is not None, "only then is there a stack"
        return marlin_experts(
            hidden_states.contiguous(),
            *stack,
            top_k_index.contiguous(),
            top_k_weights.contiguous(),
            activation=self._activation,
            num_bits=self._layer(0, "down").num_bits,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many tokens an expert gets is data
    def _one_by_one(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)  # slots, expert by expert
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        tokens = order // top_k_index.shape[-1]
        slots = hidden_states.new_zeros((chosen.numel(), hidden_states.shape[-1]))
        begin = 0
        for number, count in enumerate(counts):
            if count:
                rows = slice(begin, begin + count)
                slots[order[rows]] = self._expert(number, hidden_states[tokens[rows]])
                begin += count
        weighted = slots.reshape(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=-2).to(hidden_states.dtype)  # an order that does not depend on the experts'

    def _expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        first = [self._layer(number, role)(x) for role in ("gate", "up") if role in self.roles]
        out: torch.Tensor = self._layer(number, "down")(self._activate(torch.cat(first, dim=-1)))
        return out

    def _layer(self, number: int, role: str) -> MarlinLinear:
        layers = cast(torch.nn.ModuleDict, self._modules[str(number)])
        return cast(MarlinLinear, layers[self.roles[role]])

    # --- all experts in one tensor ---

    def stack(self) -> None:
        """Moves the experts' tensors one after the other, if `marlin_experts` takes them; takes one layer's memory."""
        self._stack = None
        if self.reason_apart():
            return
        numbers = range(self.num_experts)
        gates, ups, downs = ([self._layer(number, role) for number in numbers] for role in ("gate", "up", "down"))
        parts = [_joined([gates, ups], part) for part in _PARTS] + [_joined([downs], part) for part in _PARTS]
        self._stack = _Stack(*parts)  # type: ignore[arg-type]  # qweight and scales are there

    def unstack(self) -> None:
        """Gives every expert tensors of its own again."""
        if self._stack is not None:
            self._stack = None
            for parameter in self.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def _is_stacked(self) -> bool:
        """Returns whether the stack is what the parameters show, which may have been replaced."""
        stack, shown = self._stack, self._layer(0, "down").qweight
        return (
            stack is not None
            and shown.device == stack.w2_qweight.device
            and (shown.data_ptr() == stack.w2_qweight.data_ptr())
        )

    def reason_apart(self) -> str:
        """Returns why the experts are computed one after the other, in words; empty if all are at once."""
        if "gate" not in self.roles:
            return "they have no gate"
        if self._activation is None:
            return "their activation is neither SiLU nor GELU"
        if self.num_experts > MAX_EXPERTS:
            return f"there are more than {MAX_EXPERTS}"
        for role in ("gate", "up", "down"):
            layers = [self._layer(number, role) for number in range(self.num_experts)]
            if any(_kind_of(layer) != _kind_of(layers[0]) for layer in layers):
                return "their tensors are not alike"
        first, up, down = (self._layer(0, role) for role in ("gate", "up", "down"))
        if any((each.padded_k, each.padded_n) != (each.in_features, each.out_features) for each in (first, down)):
            return "they are padded"
        if first.bias is not None or down.bias is not None:
            return "they have biases"
        if _kind_of(first) != _kind_of(up) or _place_of(first) != _place_of(down):
            return "their tensors are not alike"
        return "" if first.qweight.device.type in ("cpu", "cuda") else "they are on neither a GPU nor the CPU"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MarlinExperts:
        """Applies what ``to``, ``half`` and the like do to the single tensors, and moves them together again."""
        was_stacked, self._stack = self._stack is not None, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_stacked:
            self.stack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the stack out of copies: their parameters are no views of it."""
        return {**self.__dict__, "_stack": None}


def _joined(projections: list[list[MarlinLinear]], part: str) -> torch.Tensor | None:
    """Returns a part of all experts [E, R, C]: of projections side by side; the layers' tensors become views of it."""
    tensors = [[getattr(layer, part) for layer in layers] for layers in projections]
    first = tensors[0][0]
    if first is None:
        return None
    widths = [each[0].shape[-1] for each in tensors]
    shape = (len(tensors[0]), first.shape[0], sum(widths))
    stack = torch.empty(shape, dtype=first.dtype, device=first.device)
    for columns, parameters in zip(stack.split(widths, dim=-1), tensors, strict=True):  # type: ignore[no-untyped-call]
        for view, parameter in zip(columns, parameters, strict=True):
            view.copy_(parameter.data)
            parameter.data = view
    return stack


def _place_of(layer: MarlinLinear) -> tuple[object, ...]:
    return layer.qweight.device, layer.scales.device, layer.scales.dtype, layer.num_bits, layer.qzeros is None


def _kind_of(layer: MarlinLinear) -> tuple[object, ...]:
    """Returns what the experts of a stack have in common."""
    return (*_place_of(layer), layer.qweight.shape, layer.scales.shape, layer.bias is None)


@contextmanager
def separate_experts(model: torch.nn.Module) -> Iterator[None]:
    """Gives all experts of a model tensors of their own meanwhile: safetensors refuses to save what shares memory.

    Args:
        model: any; its experts are stacked again afterwards.
    """
    stacked = [each for each in model.modules() if isinstance(each, MarlinExperts) and each._stack is not None]
    for experts in stacked:
        experts.unstack()
    try:
        yield
    finally:
        for experts in stacked:
            experts.stack()


def activation_of(experts: Any) -> str | None:
    """Returns what `marlin_experts` calls the activation of a module of Transformers' experts, or None for another.

    Args:
        experts: with ``has_gate``, ``act_fn`` and ``_apply_gate``, as Transformers made it.
    """
    gate = getattr(type(experts), "_apply_gate", None)
    if not experts.has_gate or getattr(gate, "__module__", "") != "transformers.integrations.moe":
        return None  # the model's code gates in a way of its own
    activation = getattr(experts, "act_fn", None)
    kind = type(activation)
    if kind is torch.nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)  # type: ignore[union-attr]
    if kind.__module__ not in (torch.nn.SiLU.__module__, "transformers.activations"):
        return None  # another one's of that name may be another function
    names = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}
    return names.get(kind.__name__)
