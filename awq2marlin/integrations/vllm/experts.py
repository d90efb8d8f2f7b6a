"""How vLLM's mixture-of-experts layers hold converted experts: loaded as they lie in the file, not repacked."""

from __future__ import annotations

from functools import wraps
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend, backend_to_kernel_cls
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.utils import set_weight_attrs

from awq2marlin.errors import refuse
from awq2marlin.integrations.vllm.config import MarlinNativeConfig
from awq2marlin.integrations.vllm.finishing import pad_ends, permute_bias, reorder_scales
from awq2marlin.integrations.vllm.record import LoadRecord
from awq2marlin.integrations.vllm.state import are_weights_processed
from awq2marlin.integrations.vllm.versions import WITHOUT_ACTIVATION_ORDER
from awq2marlin.layout import replace_parameter
from awq2marlin.marlin import GPTQ_MARLIN_TILE, is_aligned, is_single_group, num_groups, qweight_shape
from awq2marlin.slicing import inexact_reason

#: Multiple to which the inner size of experts is padded where tiles do not divide it.
_PADDED_MULTIPLE = 128


class MarlinNativeMoEMethod(AutoAWQMoEMethod):  # type: ignore[misc]
    """Loads, finishes and applies the experts of one layer.

    Inherits from vLLM's AWQ method what comes after its repacking: choosing the expert kernel's arguments and calling
    it, which differ between versions of vLLM.
    """

    supports_pre_processed_weights = True

    def __init__(self, quant_config: MarlinNativeConfig, layer: Any, prefix: str) -> None:
        """Serves the experts of the layer of that full name.

        Raises:
            CheckpointError: if vLLM's Marlin experts do not run in this configuration, or experts are padded.
        """
        # The AWQ method's own constructor would choose between backends; these weights fit Marlin only.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.quant_config = _Facts(quant_config, quant_config.has_zero_points([prefix]))
        self.config = quant_config
        self.prefix = prefix
        self.input_dtype = None
        self.is_k_full = True
        is_batched = self.moe.moe_parallel_config.use_batched_activation_format
        self.wna16_moe_backend = WNA16MoEBackend.BATCHED_MARLIN if is_batched else WNA16MoEBackend.MARLIN
        (self.experts_cls,) = backend_to_kernel_cls(self.wna16_moe_backend)
        self.record = LoadRecord()
        if any(name.startswith(f"{prefix}.") for name in quant_config.quantization.padded_modules):
            self._refuse(
                "its experts are padded, and in vLLM they are fused, for which their padding stands in the wrong "
                "places. Convert with --unaligned keep: then vLLM loads them with its own AWQ code"
            )
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

        With H the hidden and I the inner size on this rank, and s = 2 parts (gate and up), or 1 without a gate:
        ``w13_qweight`` int32 [E, H/16, s*I*16/f], ``w2_qweight`` int32 [E, I/16, H*16/f], and ``scales`` and
        ``qzeros`` of both.

        Args:
            layer: vLLM's container of the experts.
            num_experts: E on this rank.
            hidden_size: H.
            intermediate_size_per_partition: I on this rank.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds vLLM's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part is not exactly a slice of the file's tensors.
        """
        bits, group_size = self.config.weight_bits, self.config.group_size
        hidden, inner = hidden_size, intermediate_size_per_partition
        shards = 2 if self.moe.is_act_and_mul else 1
        reason = inexact_reason(hidden, [inner], group_size) or inexact_reason(inner, [hidden], group_size)
        if reason:
            self._refuse(f"{reason}. {self.config.tensor_parallel_advice()}")
        if self.padded_inner(hidden, inner, shards) is None:
            self._refuse(f"hidden size {hidden} is not a multiple of 64, which vLLM's Marlin experts need")

        self.sizes = (hidden, inner, shards)
        whole_inner = self._whole_inner_size(inner)
        #: Whether scales stand in the file in the order of a single group, for w13 and w2.
        self.was_single = (is_single_group(hidden, group_size), is_single_group(whole_inner, group_size))
        #: With one group over all of K, every rank has all of w2's scales.
        self.is_w2_group_whole = group_size == -1
        self.num_local_experts = num_experts

        attributes = {
            **extra_weight_attrs,
            "is_transposed": True,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            "weight_loader": self._watch(layer, extra_weight_attrs["weight_loader"]),
        }
        wide = shards * inner
        groups = {"w13": num_groups(hidden, group_size), "w2": num_groups(inner, group_size)}
        columns = {"w13": wide, "w2": hidden}
        rows = {"w13": hidden, "w2": inner}
        for name in ("w13", "w2"):
            shape = qweight_shape(rows[name], columns[name], bits)
            self._register(layer, f"{name}_qweight", (num_experts, *shape), torch.int32, attributes)
            shape = (groups[name], columns[name])
            self._register(layer, f"{name}_scales", (num_experts, *shape), params_dtype, attributes)
            if self.quant_config.zero_point:
                shape = (groups[name], columns[name] // self.config.pack_factor)
                self._register(layer, f"{name}_qzeros", (num_experts, *shape), torch.int32, attributes)
        layer.input_dtype = self.input_dtype
        layer.num_groups_w13, layer.num_groups_w2 = groups["w13"], groups["w2"]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what vLLM's Marlin experts take; repacks nothing.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
        """
        if not are_weights_processed() and hasattr(layer.w13_qweight, "weight_loader"):
            self._require_complete(layer)
            for name, tensor in self._finished(layer).items():
                replace_parameter(layer, name, tensor)  # by a plain parameter, which tells that this is done
        # vLLM's experts look for these names.
        layer.w13_weight, layer.w2_weight = layer.w13_qweight, layer.w2_qweight
        if self.config.version < WITHOUT_ACTIVATION_ORDER:
            empty = torch.empty((self.num_local_experts, 0), dtype=torch.int32, device=layer.w13_qweight.device)
            layer.w13_g_idx_sort_indices = layer.w2_g_idx_sort_indices = empty
        self._setup_kernel(layer)

    def padded_inner(self, hidden: int, inner: int, shards: int) -> int | None:
        """Returns the inner size that vLLM's Marlin experts can take, at least ``inner``; None if there is none."""
        for size in (inner, -(-inner // _PADDED_MULTIPLE) * _PADDED_MULTIPLE):
            bits, group_size = self.config.weight_bits, self.config.group_size
            if is_aligned(hidden, shards * size, bits, group_size) and is_aligned(size, hidden, bits, group_size):
                return size
        return None

    def _finished(self, layer: Any) -> dict[str, torch.Tensor]:
        hidden, inner, shards = self.sizes
        padded = self.padded_inner(hidden, inner, shards)
        assert padded is not None, "create_weights has refused it"
        factor, group_size = self.config.pack_factor, self.config.group_size
        more = padded - inner
        more_groups = num_groups(padded, group_size) - num_groups(inner, group_size)

        def widen(tensor: torch.Tensor, columns: int) -> torch.Tensor:
            """Adds zero columns to each of gate and up, which lie side by side."""
            halves = tensor.reshape(*tensor.shape[:-1], shards, -1)
            return pad(halves, (0, columns)).flatten(-2) if columns else tensor

        w13, w2 = layer.w13_qweight.data, layer.w2_qweight.data
        w13_scales, w2_scales = layer.w13_scales.data, layer.w2_scales.data
        finished = {
            "w13_qweight": widen(w13, more * GPTQ_MARLIN_TILE // factor),
            "w2_qweight": pad_ends(w2, more // GPTQ_MARLIN_TILE, 0),
            "w13_scales": reorder_scales(
                widen(w13_scales, more),
                was_single=self.was_single[0],
                is_single=is_single_group(hidden, group_size),
            ),
            "w2_scales": reorder_scales(
                pad_ends(w2_scales, more_groups, 0),
                was_single=self.was_single[1],
                is_single=is_single_group(padded, group_size),
            ),
        }
        if self.quant_config.zero_point:
            finished["w13_qzeros"] = widen(layer.w13_qzeros.data, more // factor)
            finished["w2_qzeros"] = pad_ends(layer.w2_qzeros.data, more_groups, 0)
        for name, size in (("w13_bias", shards * padded), ("w2_bias", hidden)):
            bias = getattr(layer, name, None)
            if bias is not None:
                finished[name] = permute_bias(widen(bias.data, more) if name == "w13_bias" else bias.data, size)
        return finished

    def _watch(self, layer: Any, loader: Any) -> Any:
        """Returns a weight loader that also keeps account, and copies what no rank may cut."""

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
                if self.is_w2_group_whole and name in ("w2_scales", "w2_qzeros"):
                    param.data[local].copy_(loaded_weight)
                    return True if return_success else None
            result: bool | None = loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
            return result

        return recording_loader

    def _require_complete(self, layer: Any) -> None:
        """Refuses the layer if a tensor of a local expert was never loaded."""
        parts = ["qweight", "scales", *(["qzeros"] if self.quant_config.zero_point else [])]
        names = {
            "w1": layer.ckpt_gate_proj_name,
            "w3": layer.ckpt_up_proj_name,
            "w2": layer.ckpt_down_proj_name,
        }
        local_number = layer._map_global_expert_id_to_local_expert_id
        experts = [(expert, local_number(expert)) for expert in range(layer.global_num_experts)]
        self.record.require_parts(
            {
                f"{self.prefix}.{expert}.{names[shard]}.{part}": (f"{group}_{part}", (local, shard))
                for group, shards in (("w13", ("w1", "w3")[: self.sizes[2]]), ("w2", ("w2",)))
                for part in parts
                for expert, local in experts
                for shard in shards
                if local != -1
            }
        )

    def _whole_inner_size(self, inner: int) -> int:
        """Returns I of the whole layer."""
        return inner * int(self.moe.moe_parallel_config.tp_size)

    @staticmethod
    def _register(
        layer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, attributes)

    def _refuse(self, message: str) -> NoReturn:
        raise refuse("unsupported-engine", message, tensor=self.prefix)


class _Facts:
    """What vLLM's AWQ method asks its config for, as it is true of one layer."""

    def __init__(self, config: MarlinNativeConfig, zero_point: bool) -> None:
        self.weight_bits = config.weight_bits
        self.group_size = config.group_size
        self.pack_factor = config.pack_factor
        self.zero_point = zero_point
