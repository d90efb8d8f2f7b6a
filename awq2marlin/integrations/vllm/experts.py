"""How vLLM's mixture-of-experts layers hold quantized experts: loaded as they lie in the file, then finished."""

from __future__ import annotations

from functools import wraps
from typing import Any, NoReturn

import torch
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend, backend_to_kernel_cls
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static, kInt8Static
from vllm.model_executor.utils import set_weight_attrs

from awq2marlin.checkpoint.tensor_parallel import inexact_awq_reason, inexact_reason
from awq2marlin.errors import refuse
from awq2marlin.integrations.serving.contents import Contents, is_any_below
from awq2marlin.integrations.serving.finishing import pad_to, permute_bias, reorder_scales
from awq2marlin.integrations.serving.linear import finished_parameter
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.serving.recut import plain_part
from awq2marlin.integrations.vllm.kernels import RECUT_NOTE, TAKES_ACTIVATION_ORDER, weight_type
from awq2marlin.integrations.vllm.state import are_weights_processed, loads_by_weight_loaders, loads_sharded_state
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, is_aligned, is_single_group, num_groups
from awq2marlin.layout.modules import QUANTIZED_PARTS, part_shape
from awq2marlin.layout.torch_functions import replace_parameter
from awq2marlin.layout.torch_parts import marlin_part

#: Why vLLM cannot serve a kind of experts that Transformers can.
WITHOUT_KERNEL = (
    "8 bits with zero points: vLLM's Marlin experts know 8 bits only without them. Serve the checkpoint with "
    "Transformers, or look for a 4-bit one of this model"
)

#: Multiple to which the inner size of experts is padded where tiles do not divide it.
_PADDED_MULTIPLE = 128


class MarlinNativeMoEMethod(AutoAWQMoEMethod):  # type: ignore[misc]
    """Loads, finishes and applies the experts of one layer.

    Inherits from vLLM's AWQ method what comes after its repacking: choosing the expert kernel's arguments and calling
    it, which differ between versions of vLLM.
    """

    supports_pre_processed_weights = True

    def __init__(self, contents: Contents, layer: Any, prefix: str) -> None:
        """Serves the experts of the layer of that full name.

        Raises:
            CheckpointError: if vLLM's Marlin experts do not run in this configuration.
        """
        # The AWQ method's own constructor would choose between backends; these weights fit Marlin only.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.contents = contents
        has_zero_points = contents.has_zero_points([prefix])
        self.quant_config = _Facts(contents, has_zero_points)
        self.parts = [part for part in QUANTIZED_PARTS if part != "qzeros" or has_zero_points]
        self.prefix = prefix
        self.input_dtype = None
        self.is_k_full = True
        is_batched = self.moe.moe_parallel_config.use_batched_activation_format
        self.wna16_moe_backend = WNA16MoEBackend.BATCHED_MARLIN if is_batched else WNA16MoEBackend.MARLIN
        (self.experts_cls,) = backend_to_kernel_cls(self.wna16_moe_backend)
        self.record = LoadRecord(sees_everything=loads_by_weight_loaders())
        self._refuse_unserved(layer)

    def _refuse_unserved(self, layer: Any) -> None:
        if self.moe.moe_backend not in ("auto", "marlin"):
            self._refuse(
                f"the backend of experts is set to {self.moe.moe_backend!r}, but their weights are laid out for Marlin "
                "kernels. Leave the option out"
            )
        if weight_type(self.contents.bits, "qzeros" in self.parts) is None:
            self._refuse(WITHOUT_KERNEL)
        experts, key = self.experts_cls, kInt4Static if self.contents.bits == 4 else kInt8Static
        is_served, reason = experts.is_supported_config(experts, self.moe, key, None, experts.activation_format())
        if not is_served:
            self._refuse(f"vLLM's Marlin experts do not serve it: {reason}")
        if getattr(layer, "apply_router_weight_on_input", False):
            self._refuse("the model weighs the inputs of its experts, which vLLM's Marlin experts do not do")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters for all experts of this rank.

        With H the hidden and I the inner size on this rank, s = 2 parts (gate and up), or 1 without a gate, and t =
        `tile`: ``w13_qweight`` int32 [E, H/t, s*I*t/f], ``w2_qweight`` int32 [E, I/t, H*t/f], and ``scales`` and
        ``qzeros`` of both.

        Args:
            layer: vLLM's container of the experts.
            num_experts: E on this rank.
            hidden_size: H.
            intermediate_size_per_partition: I on this rank.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds vLLM's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source.
        """
        group_size = self.contents.group_size
        hidden, inner = hidden_size, intermediate_size_per_partition
        shards = 2 if self.moe.is_act_and_mul else 1
        whole_inner = inner * int(self.moe.moe_parallel_config.tp_size)
        #: K of an expert's modules in the file, without padding.
        self.whole_k = {"w1": hidden, "w3": hidden, "w2": whole_inner}
        self._choose_layout(hidden, inner)
        self.sizes = (hidden, inner, shards)
        if self.padded_inner() is None:
            self._refuse(f"hidden size {hidden} is not a multiple of 64, which vLLM's Marlin experts need")

        #: Whether scales stand in the file in the order of a single group, for w13 and w2.
        self.was_single = {
            "w13": is_single_group(hidden, group_size),
            "w2": is_single_group(whole_inner, group_size),
        }
        #: With one group over all of K, every rank has all of w2's scales.
        self.is_w2_group_whole = group_size == -1
        self.num_local_experts = num_experts
        attributes = {
            **extra_weight_attrs,
            "is_transposed": True,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            "weight_loader": self._watch(layer, extra_weight_attrs["weight_loader"]),
        }
        is_finished = loads_sharded_state()
        if is_finished:
            self.tile, inner = GPTQ_MARLIN_TILE, int(self.padded_inner() or inner)
        for group in ("w13", "w2"):
            for part in self.parts:
                parameter = finished_parameter(part, (num_experts, *self._shape(group, part, inner)), params_dtype)
                layer.register_parameter(f"{group}_{part}", parameter)
                if not is_finished:
                    set_weight_attrs(parameter, attributes)
        layer.input_dtype = self.input_dtype
        layer.num_groups_w13, layer.num_groups_w2 = num_groups(hidden, group_size), num_groups(inner, group_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what vLLM's Marlin experts take, once.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
        """
        if not are_weights_processed() and hasattr(layer.w13_qweight, "weight_loader"):
            self._require_complete(layer)
            self._finish(layer)
        # vLLM's experts look for these names.
        layer.w13_weight, layer.w2_weight = layer.w13_qweight, layer.w2_qweight
        if TAKES_ACTIVATION_ORDER:
            empty = torch.empty((self.num_local_experts, 0), dtype=torch.int32, device=layer.w13_qweight.device)
            layer.w13_g_idx_sort_indices = layer.w2_g_idx_sort_indices = empty
        self._setup_kernel(layer)

    def padded_inner(self) -> int | None:
        """Returns the inner size that vLLM's Marlin experts can take, at least the own; None if there is none."""
        bits, group_size = self.contents.bits, self.contents.group_size
        hidden, inner, shards = self.sizes
        for size in (inner, -(-inner // _PADDED_MULTIPLE) * _PADDED_MULTIPLE):
            if is_aligned(hidden, shards * size, bits, group_size) and is_aligned(size, hidden, bits, group_size):
                return size
        return None

    def _matrix(self, group: str, inner: int) -> tuple[int, int]:
        """Returns K and N of ``w13`` or ``w2``."""
        hidden, _, shards = self.sizes
        return (hidden, shards * inner) if group == "w13" else (inner, hidden)

    def _shape(self, group: str, part: str, inner: int) -> tuple[int, int]:
        """Returns the shape of one expert's tensor."""
        return part_shape(part, *self._matrix(group, inner), self.contents.scheme, tile=self.tile)

    def _choose_layout(self, hidden: int, inner: int) -> None:
        """Decides in which layout experts are loaded: as they lie in the file, or in AWQ's, to be repacked.

        Sets `tile`, the rows of K that a row of ``qweight`` then has.
        """
        contents, sizes = self.contents, ((hidden, inner), (inner, hidden))
        self.is_awq = contents.layout_of_experts(self.prefix) == "awq"
        reason = next(filter(None, (inexact_reason(k, [n], contents.group_size) for k, n in sizes)), None)
        if is_any_below(contents.quantization.padded_modules, self.prefix):
            reason = "they are padded"
        self.tile = 1 if self.is_awq or reason else GPTQ_MARLIN_TILE
        if self.tile != 1:
            return
        if not self.is_awq and not loads_sharded_state():
            RECUT_NOTE.say(self.prefix, str(reason))
        for k, n in sizes:
            reason = inexact_awq_reason(k, [n], contents.bits, contents.group_size)
            if reason:
                self._refuse(f"{reason}. {contents.tensor_parallel_advice()}")

    def _finish(self, layer: Any) -> None:
        """Pads what vLLM's kernels cannot take as it is, and brings it to their order."""
        inner = self.padded_inner()
        assert inner is not None, "create_weights has refused it"
        for group, blocks in (("w13", self.sizes[2]), ("w2", 1)):
            for part in self.parts:
                name = f"{group}_{part}"
                padded = pad_to(getattr(layer, name).data, *self._shape(group, part, inner), blocks)
                # By a plain parameter, which tells that this is done.
                replace_parameter(layer, name, self._for_kernel(group, part, padded, inner))
            bias = getattr(layer, f"{group}_bias", None)
            if bias is not None:
                padded = pad_to(bias.data.unsqueeze(-2), 1, self._matrix(group, inner)[1], blocks).squeeze(-2)
                replace_parameter(layer, f"{group}_bias", permute_bias(padded))

    def _for_kernel(self, group: str, part: str, tensor: torch.Tensor, inner: int) -> torch.Tensor:
        """Returns loaded and padded tensors of all experts as the kernel takes them."""
        matrix = self._matrix(group, inner)
        if self.tile == 1:
            return marlin_part(part, tensor, *matrix, self.contents.scheme)
        if part != "scales":
            return tensor
        is_single = is_single_group(matrix[0], self.contents.group_size)
        return reorder_scales(tensor, was_single=self.was_single[group], is_single=is_single)

    def _watch(self, layer: Any, loader: Any) -> Any:
        """Returns a weight loader that keeps account, and copies what no rank may cut.

        Where experts are to be repacked, it brings what lies in tiles to plain order.
        """

        @wraps(loader)
        def recording_loader(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            name = weight_name.rpartition(".")[2]
            if local != -1:
                self.record.note(name, (local, shard_id))
                if self.tile == 1 and not self.is_awq:
                    module = self._module(layer, expert_id, shard_id)
                    said, part = self.contents.quantization, name.partition("_")[2]
                    loaded_weight = plain_part(part, loaded_weight, module, self.whole_k[shard_id], said)
                if self.is_w2_group_whole and name in ("w2_scales", "w2_qzeros"):
                    param.data[local].copy_(loaded_weight)
                    return True if return_success else None
            result: bool | None = loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
            return result

        return recording_loader

    def _require_complete(self, layer: Any) -> None:
        """Refuses the layer if a tensor of a local expert was never loaded."""
        local_number = layer._map_global_expert_id_to_local_expert_id
        experts = [(expert, local_number(expert)) for expert in range(layer.global_num_experts)]
        self.record.require_parts(
            {
                f"{self._module(layer, expert, shard)}.{part}": (f"{group}_{part}", (local, shard))
                for group, shards in (("w13", ("w1", "w3")[: self.sizes[2]]), ("w2", ("w2",)))
                for part in self.parts
                for expert, local in experts
                for shard in shards
                if local != -1
            }
        )

    def _module(self, layer: Any, expert: int, shard: str) -> str:
        """Returns the name of an expert's module in the file."""
        names = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        return f"{self.prefix}.{expert}.{names[shard]}"

    def _refuse(self, message: str) -> NoReturn:
        raise refuse("unsupported-engine", message, tensor=self.prefix)


class _Facts:
    """What vLLM's AWQ method asks its config for, as it is true of one layer."""

    def __init__(self, contents: Contents, zero_point: bool) -> None:
        self.weight_bits = contents.bits
        self.group_size = contents.group_size
        self.pack_factor = contents.pack_factor
        self.zero_point = zero_point
