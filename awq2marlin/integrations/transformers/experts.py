"""The experts of one layer, each a packed linear layer under the name that the checkpoint gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from awq2marlin.gemm.linear import MarlinLinear


class MarlinExperts(torch.nn.Module):
    """Stands in for a module of Transformers' fused experts and keeps every expert packed.

    Its children are called ``0``, ``1``, ... and theirs as in the checkpoint (``w1``, ``gate_proj``), so that names
    of files and of the model agree, and saving needs no conversion.
    """

    def __init__(
        self,
        experts: Mapping[int, Mapping[str, MarlinLinear]],
        roles: Mapping[str, str],
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Takes the layers.

        Args:
            experts: each expert's layers by name, by the expert's number from 0.
            roles: which name is ``up`` and ``down``, and ``gate`` if there is one.
            activate: makes [M, I] of the first projections: of gate and up side by side [M, 2 I], or of up [M, I].
        """
        super().__init__()
        self.num_experts = len(experts)
        self.roles = dict(roles)
        self._activate = activate
        for number in sorted(experts):
            self.add_module(str(number), torch.nn.ModuleDict(dict(experts[number])))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many tokens an expert gets is data
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
        layers = cast(torch.nn.ModuleDict, self.get_submodule(str(number)))
        first = [layers[self.roles[role]](x) for role in ("gate", "up") if role in self.roles]
        out: torch.Tensor = layers[self.roles["down"]](self._activate(torch.cat(first, dim=-1)))
        return out
