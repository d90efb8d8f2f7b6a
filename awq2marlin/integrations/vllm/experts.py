"""vLLM's layers of experts: what is vLLM's about them."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts as VllmMarlinExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend, backend_to_kernel_cls
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static, kInt8Static

from awq2marlin.integrations.kernel_choice import Kernel
from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.experts import MarlinExperts
from awq2marlin.integrations.serving.kernels import ExpertsTask, chosen_experts_kernel, run_experts
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.vllm import kernels
from awq2marlin.integrations.vllm.kernels import RECUT_NOTE, TAKES_ACTIVATION_ORDER, weight_type
from awq2marlin.integrations.vllm.state import are_weights_processed, loads_by_weight_loaders, loads_sharded_state
from awq2marlin.layout.marlin import is_aligned, num_groups

#: Multiple to which the inner size of experts is padded where tiles do not divide it.
_PADDED_MULTIPLE = 128


class MarlinNativeMoEMethod(MarlinExperts, AutoAWQMoEMethod):  # type: ignore[misc]
    """Loads, finishes and applies the experts of one layer.

    Inherits from vLLM's AWQ method what comes after its repacking: choosing the expert kernel's arguments and calling
    it, which differ between versions of vLLM.
    """

    supports_pre_processed_weights = True

    engine = "vLLM"
    note = RECUT_NOTE

    def __init__(self, contents: Contents, layer: Any, prefix: str) -> None:
        """Serves the experts of the layer of that full name.

        Raises:
            CheckpointError: if vLLM's Marlin experts do not run in this configuration.
        """
        # The AWQ method's own constructor would choose between backends; these weights fit Marlin only.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.hold(contents, prefix, LoadRecord(sees_everything=loads_by_weight_loaders()))
        self.quant_config = _Facts(contents, "qzeros" in self.parts)
        self.input_dtype = None
        self.is_k_full = True
        #: What multiplies; chosen when the weights are there.
        self.kernel: Kernel | None = None
        self.task = _task_of(layer)
        is_batched = self.moe.moe_parallel_config.use_batched_activation_format
        self.wna16_moe_backend = WNA16MoEBackend.BATCHED_MARLIN if is_batched else WNA16MoEBackend.MARLIN
        (self.experts_cls,) = backend_to_kernel_cls(self.wna16_moe_backend)
        self._refuse_unserved(layer)

    def _refuse_unserved(self, layer: Any) -> None:
        if self.moe.moe_backend not in ("auto", "marlin"):
            self.refuse(
                f"the backend of experts is set to {self.moe.moe_backend!r}, but their weights are laid out for Marlin "
                "kernels. Leave the option out"
            )
        if self._is_only_ours:
            self.refuse_without_own(self.task)
        experts, key = self.experts_cls, kInt4Static if self.contents.bits == 4 else kInt8Static
        is_served, reason = experts.is_supported_config(experts, self.moe, key, None, experts.activation_format())
        if not is_served:
            self.refuse(f"vLLM's Marlin experts do not serve it: {reason}")
        if layer.apply_router_weight_on_input:
            self.refuse("the model applies router weights to expert inputs, which vLLM's Marlin experts would do again")
        if self.moe.has_bias:
            self.refuse("its experts have biases, which this plugin does not load")

    @property
    def _is_only_ours(self) -> bool:
        """Whether vLLM's Marlin experts do not know the weights."""
        return weight_type(self.contents.bits, "qzeros" in self.parts) is None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters for all experts of this rank; see `MarlinExperts.register_parameters`.

        Args:
            layer: vLLM's container of the experts.
            num_experts: E on this rank.
            hidden_size: H.
            intermediate_size_per_partition: I on this rank.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds vLLM's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source, or vLLM's Marlin experts
                do not take the shapes.
        """
        in_file = extra_weight_attrs.get("unpadded_hidden_size") or hidden_size
        if hidden_size != in_file:
            self.refuse(
                f"vLLM rounds the hidden size {in_file} up to {hidden_size} to send tokens between GPUs, and this "
                "plugin does not pad experts so. Choose another --all2all-backend"
            )
        inner, shards = intermediate_size_per_partition, 2 if self.moe.is_act_and_mul else 1
        self.plan(num_experts, hidden_size, inner, shards, inner * int(self.moe.moe_parallel_config.tp_size))
        if self.padded_inner() is None:
            self.refuse(f"hidden size {hidden_size} is not a multiple of 64, which vLLM's Marlin experts need")
        attributes = {
            **extra_weight_attrs,
            "is_transposed": True,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            "weight_loader": self._watch(layer, extra_weight_attrs["weight_loader"]),
        }
        self.register_parameters(layer, params_dtype, attributes)
        layer.input_dtype = self.input_dtype
        group_size = self.contents.group_size
        layer.num_groups_w13, layer.num_groups_w2 = num_groups(hidden_size, group_size), num_groups(inner, group_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what Marlin experts take, once, and chooses whose.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
            KernelUnavailableError: if only ours can serve the experts, and it cannot be compiled or run here.
        """
        if not are_weights_processed() and self.is_loaded(layer):
            self.require_complete(layer, layer.global_num_experts, partial(self._module, layer))
            self.finish(layer)
        if self.kernel is None:
            choice = kernels.EXPERTS_CHOICE
            self.kernel = chosen_experts_kernel(
                choice, layer, self.contents.bits, self.task, only_own=self._is_only_ours
            )
        # vLLM's experts look for these names.
        layer.w13_weight, layer.w2_weight = layer.w13_qweight, layer.w2_qweight
        if TAKES_ACTIVATION_ORDER:
            empty = torch.empty((self.num_local_experts, 0), dtype=torch.int32, device=layer.w13_qweight.device)
            layer.w13_g_idx_sort_indices = layer.w2_g_idx_sort_indices = empty
        self._setup_kernel(layer)

    def _setup_kernel(self, layer: Any) -> None:
        """Builds what vLLM calls for the experts: its own kernel, or the same around ours."""
        if self.kernel == "engine":
            super()._setup_kernel(layer)
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        between_gpus = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        self.moe_kernel = FusedMoEKernel(between_gpus, OwnExperts(self.moe, self.moe_quant_config))

    def loads_finished(self) -> bool:
        """Returns whether vLLM loads what `save_sharded_state` has written."""
        return loads_sharded_state()

    def padded_inner(self) -> int | None:
        """Returns the inner size that vLLM's Marlin experts can take, at least the own; None if there is none."""
        bits, group_size = self.contents.bits, self.contents.group_size
        hidden, inner, shards = self.sizes
        for size in (inner, -(-inner // _PADDED_MULTIPLE) * _PADDED_MULTIPLE):
            if is_aligned(hidden, shards * size, bits, group_size) and is_aligned(size, hidden, bits, group_size):
                return size
        return None

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
            left: torch.Tensor | None = loaded_weight
            if local != -1:
                module = self._module(layer, expert_id, shard_id)
                left = self.take(param, name, loaded_weight, module, local, shard_id)
            if left is None:
                return True if return_success else None
            result: bool | None = loader(param, left, weight_name, shard_id, expert_id, return_success)
            return result

        return recording_loader

    def _module(self, layer: Any, expert: int, shard: str) -> str:
        """Returns the name of an expert's module in the file."""
        names = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        return f"{self.prefix}.{expert}.{names[shard]}"


class OwnExperts(VllmMarlinExperts):  # type: ignore[misc]
    """``awq2marlin::marlin_experts_into`` where vLLM calls its Marlin experts, with the same weights."""

    @staticmethod
    def supports_lora() -> bool:
        """Returns that adapters on experts are not served."""
        return False

    def workspace_shapes(
        self,
        M: int,  # noqa: N803 - vLLM's interface, which calls it by name
        N: int,  # noqa: ARG002, N803
        K: int,  # noqa: N803
        *_: Any,
        **__: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Returns that no workspace of vLLM's is needed, only a result [M, K]."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,  # noqa: ARG002 - vLLM's interface
        expert_map: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Writes what this rank's experts make of tokens into a tensor.

        Args:
            output: [M, H].
            hidden_states: [M, H].
            w1: the packed gate and up.
            w2: the packed down.
            topk_weights: [M, k].
            topk_ids: the chosen experts of the model, [M, k].
            activation: vLLM's name of what the gate goes through.
            global_num_experts: of the model.
            expert_map: this rank's number of every expert of the model, -1 for others'; None if it has all.

        Raises:
            NotImplementedError: if the model wants the experts' products apart, which only vLLM's experts give.
        """
        if getattr(self, "post_gemm2_hook", None) is not None:
            raise NotImplementedError(
                "this model sums its experts' products itself, which awq2marlin's kernels do not support: set "
                "AWQ2MARLIN_KERNEL=engine"
            )
        run_experts(
            (w1, self.w1_scale, self.w1_zp, w2, self.w2_scale, self.w2_zp),
            hidden_states,
            topk_ids,
            topk_weights,
            expert_map=expert_map,
            activation=activation.value,
            num_bits=4 if self.quant_config.use_int4_w4a16 else 8,
            out=output,
        )


def _task_of(layer: Any) -> ExpertsTask:
    """Returns what a model of vLLM asks of its experts."""
    moe, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    names = ("limit", "alpha", "beta")  # vLLM's own experts go by the config, its layers say the same
    factors = (getattr(place, f"swiglu_{name}", None) for place in (layer, moe) for name in names)
    return ExpertsTask(
        activation=moe.activation.value,
        is_gated=moe.is_act_and_mul,
        has_limits=any(factor is not None for factor in factors),
        top_k=moe.experts_per_token,
        num_experts=moe.num_local_experts,
        has_lora=moe.is_lora_enabled,
        is_sent=parallel.use_all2all_kernels or getattr(parallel, "use_passthrough_all2all", False),
    )


class _Facts:
    """What vLLM's AWQ method asks its config for, as it is true of one layer."""

    def __init__(self, contents: Contents, zero_point: bool) -> None:
        self.weight_bits = contents.bits
        self.group_size = contents.group_size
        self.pack_factor = contents.pack_factor
        self.zero_point = zero_point
