"""How an engine's mixture-of-experts layer holds quantized experts: loaded as they lie in the file, then finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from awq2marlin.checkpoint.tensor_parallel import inexact_awq_reason, inexact_reason
from awq2marlin.errors import refuse
from awq2marlin.integrations.kernel_choice import reason_without_own
from awq2marlin.integrations.serving.contents import Contents, is_any_below
from awq2marlin.integrations.serving.finishing import pad_to, put_finished, reorder_scales
from awq2marlin.integrations.serving.kernels import ExpertsTask
from awq2marlin.integrations.serving.linear import finished_parameter
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.serving.recut import Note, plain_part
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, is_single_group
from awq2marlin.layout.modules import QUANTIZED_PARTS, part_shape
from awq2marlin.layout.torch_parts import marlin_part

#: The groups of matrices in a layer of experts: gate and up side by side, and down.
GROUPS = ("w13", "w2")


class MarlinExperts:
    """Loads and finishes the experts of one layer; an engine's plugin adds its loaders and what multiplies."""

    #: The engine, as people call it.
    engine = ""
    #: Says once that modules are cut within tiles.
    note: Note

    def hold(self, contents: Contents, prefix: str, record: LoadRecord) -> None:
        """Takes what is to be loaded.

        Args:
            contents: of the checkpoint.
            prefix: the experts' parent in the checkpoint.
            record: takes note of what is loaded.
        """
        self.contents = contents
        self.prefix = prefix
        self.record = record
        has_zero_points = contents.has_zero_points([prefix])
        self.parts = [part for part in QUANTIZED_PARTS if part != "qzeros" or has_zero_points]

    def loads_finished(self) -> bool:
        """Returns whether what the engine loads was finished before."""
        return False

    def padded_inner(self) -> int | None:
        """Returns the inner size that the engine's kernels can take, at least the own; None if there is none."""
        raise NotImplementedError

    def plan(self, num_experts: int, hidden: int, inner: int, shards: int, whole_inner: int) -> None:
        """Decides how the experts are loaded: as they lie in the file, or in AWQ layout, to be repacked.

        Sets `tile`, the rows of K that a row of ``qweight`` then has.

        Args:
            num_experts: E on this rank.
            hidden: H.
            inner: I on this rank.
            shards: 2 for gate and up, 1 without a gate.
            whole_inner: I of a whole expert.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source.
        """
        group_size = self.contents.group_size
        #: K of an expert's modules in the file, without padding.
        self.whole_k = {"w1": hidden, "w3": hidden, "w2": whole_inner}
        self.sizes = (hidden, inner, shards)
        self._choose_layout(hidden, inner)
        #: Whether scales stand in the file in the order of a single group, for w13 and w2.
        self.was_single = {"w13": is_single_group(hidden, group_size), "w2": is_single_group(whole_inner, group_size)}
        #: With one group over all of K, every rank has all of w2's scales.
        self.is_w2_group_whole = group_size == -1
        self.num_local_experts = num_experts

    def register_parameters(self, layer: Any, params_dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        """Gives the layer empty parameters for all experts of this rank.

        With H the hidden and I the inner size on this rank, s = 2 parts (gate and up), or 1 without a gate, and t =
        `tile`: ``w13_qweight`` int32 [E, H/t, s*I*t/f], ``w2_qweight`` int32 [E, I/t, H*t/f], and ``scales`` and
        ``qzeros`` of both.

        Args:
            layer: the engine's container of the experts.
            params_dtype: fp16 or bf16.
            attributes: what the engine's loaders look for on a parameter.
        """
        inner = self.sizes[1]
        is_finished = self.loads_finished()
        if is_finished:
            self.tile, inner = GPTQ_MARLIN_TILE, int(self.padded_inner() or inner)
        for group in GROUPS:
            for part in self.parts:
                shape = (self.num_local_experts, *self._shape(group, part, inner))
                parameter = finished_parameter(part, shape, params_dtype)
                layer.register_parameter(f"{group}_{part}", parameter)
                if not is_finished:
                    for name, value in attributes.items():
                        setattr(parameter, name, value)

    def is_loaded(self, layer: Any) -> bool:
        """Returns whether a layer holds what was loaded, not yet finished.

        Args:
            layer: the engine's container of the experts.
        """
        return hasattr(layer.w13_qweight, "weight_loader")

    def plain(self, name: str, tensor: torch.Tensor, module: str, shard: str) -> torch.Tensor:
        """Returns a tensor of the file as it is to be cut: in plain order, where the experts are to be repacked.

        Args:
            name: of the parameter, such as ``w13_qweight``.
            tensor: as it lies in the file.
            module: its module.
            shard: ``w1``, ``w2`` or ``w3``.
        """
        if self.tile != 1 or self.is_awq:
            return tensor
        part = name.partition("_")[2]
        return plain_part(part, tensor, module, self.whole_k[shard], self.contents.quantization)

    def take(
        self, param: torch.nn.Parameter, name: str, tensor: torch.Tensor, module: str, expert: int, shard: str
    ) -> torch.Tensor | None:
        """Keeps account of a tensor of the file, and returns it as the engine is to cut it.

        Args:
            param: of the layer.
            name: its name, such as ``w13_qweight``.
            tensor: as it lies in the file.
            module: its module.
            expert: by this rank's number.
            shard: ``w1``, ``w2`` or ``w3``.

        Returns:
            The tensor in plain order, where the experts are to be repacked; None if every rank has all of it, and the
            parameter has it now.
        """
        self.record.note(name, (expert, shard))
        tensor = self.plain(name, tensor, module, shard)
        if not (self.is_w2_group_whole and name in ("w2_scales", "w2_qzeros")):
            return tensor
        param.data[expert].copy_(tensor)
        return None

    def require_complete(self, layer: Any, num_experts: int, module_of: Callable[[int, str], str]) -> None:
        """Refuses the layer if a tensor of an expert of this rank was never loaded.

        Args:
            layer: the engine's container of the experts, which knows where those of the model are.
            num_experts: of the model.
            module_of: returns the name of a module in the file, by the model's number of its expert and its shard.

        Raises:
            CheckpointError: naming every tensor that is missing.
        """
        local_number = layer._map_global_expert_id_to_local_expert_id
        number_of = {local_number(expert): expert for expert in range(num_experts)}
        self.record.require_parts(
            {
                f"{module_of(number_of.get(local, local), shard)}.{part}": (f"{group}_{part}", (local, shard))
                for group, shards in (("w13", ("w1", "w3")[: self.sizes[2]]), ("w2", ("w2",)))
                for part in self.parts
                for local in range(self.num_local_experts)
                for shard in shards
            }
        )

    def finish(self, layer: Any) -> None:
        """Pads what the engine's kernels cannot take as it is, and brings it to their order.

        Args:
            layer: one whose weights were loaded.
        """
        inner = self.padded_inner()
        assert inner is not None, "create_weights has refused it"
        for group in GROUPS:
            for part in self.parts:
                name = f"{group}_{part}"
                padded = pad_to(getattr(layer, name).data, *self._shape(group, part, inner), self._blocks(group))
                put_finished(layer, name, self._for_kernel(group, part, padded, inner))

    def matrix(self, group: str, inner: int) -> tuple[int, int]:
        """Returns K and N of ``w13`` or ``w2``.

        Args:
            group: of the two.
            inner: I on this rank, with or without padding.
        """
        hidden, _, shards = self.sizes
        return (hidden, shards * inner) if group == "w13" else (inner, hidden)

    def refuse_without_own(self, task: ExpertsTask) -> None:
        """Refuses experts that only our kernels know, where these cannot serve them.

        Args:
            task: what the model asks of them.

        Raises:
            CheckpointError: if they cannot.
        """
        reason = reason_without_own(None) or task.reason_without_own()
        if reason:
            self.refuse(f"8 bits with zero points, which {self.engine}'s Marlin experts do not support: {reason}")

    def refuse(self, message: str) -> NoReturn:
        """Refuses the experts.

        Args:
            message: why, and what to do.

        Raises:
            CheckpointError: always.
        """
        raise refuse("unsupported-engine", message, tensor=self.prefix)

    def _blocks(self, group: str) -> int:
        return self.sizes[2] if group == "w13" else 1

    def _shape(self, group: str, part: str, inner: int) -> tuple[int, int]:
        """Returns the shape of one expert's tensor."""
        return part_shape(part, *self.matrix(group, inner), self.contents.scheme, tile=self.tile)

    def _choose_layout(self, hidden: int, inner: int) -> None:
        contents, sizes = self.contents, ((hidden, inner), (inner, hidden))
        self.is_awq = contents.layout_of_experts(self.prefix) == "awq"
        reason = next(filter(None, (inexact_reason(k, [n], contents.group_size) for k, n in sizes)), None)
        if is_any_below(contents.quantization.padded_modules, self.prefix):
            reason = "they are padded"
        self.tile = 1 if self.is_awq or reason else GPTQ_MARLIN_TILE
        if self.tile != 1:
            return
        if not self.is_awq and not self.loads_finished():
            self.note.say(self.prefix, str(reason))
        for k, n in sizes:
            reason = inexact_awq_reason(k, [n], contents.bits, contents.group_size)
            if reason:
                self.refuse(f"{reason}. {contents.tensor_parallel_advice()}")

    def _for_kernel(self, group: str, part: str, tensor: torch.Tensor, inner: int) -> torch.Tensor:
        """Returns loaded and padded tensors of all experts as the kernel takes them."""
        matrix = self.matrix(group, inner)
        if self.tile == 1:
            return marlin_part(part, tensor, *matrix, self.contents.scheme)
        if part != "scales":
            return tensor
        is_single = is_single_group(matrix[0], self.contents.group_size)
        return reorder_scales(tensor, was_single=self.was_single[group], is_single=is_single)
