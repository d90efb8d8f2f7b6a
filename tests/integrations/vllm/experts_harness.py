"""vLLM's container of experts, built as one rank of several; only its own kernel is not, which needs a GPU."""

from unittest import mock

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExpertsBase
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod

from tests.integrations.serving.harness import SHARDS, expert_values
from tests.integrations.vllm.harness import as_rank

__all__ = [
    "MarlinExpertsBase",
    "RoutedExperts",
    "expert_values",
    "experts_kernel",
    "experts_layer",
    "finish_experts",
    "load_experts",
    "run_experts",
]


def experts_layer(
    model, prefix, experts, hidden, inner, rank=0, ranks=1, local=None, apart=1, dtype=torch.half, moe=(), **options
):
    """Returns an empty `RoutedExperts` of one rank, which holds the experts ``local``, by default all.

    With ``apart`` above 1 they are this rank's of as many that share out whole experts.

    ``dtype`` is the model's; ``moe`` are further attributes of vLLM's `FusedMoEConfig`.
    """
    if apart > 1:
        local, rank = list(range(experts))[rank * experts // apart : (rank + 1) * experts // apart], 0
    local = range(experts) if local is None else local
    parallel = FusedMoEParallelConfig(
        tp_size=ranks, pcp_size=1, dp_size=1, ep_size=1, tp_rank=rank, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
        use_ep=False, all2all_backend="naive", enable_eplb=False,
    )  # fmt: skip
    config = FusedMoEConfig(
        num_experts=experts, experts_per_token=2, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=len(local), num_logical_experts=experts, activation=MoEActivation.SILU, device="cpu",
        routing_method=RoutingMethodType.Default, moe_parallel_config=parallel, in_dtype=dtype, **dict(moe),
    )  # fmt: skip
    manager = mock.Mock(spec=ExpertMapManager)
    manager.local_num_experts, manager.placement_strategy = len(local), "linear"
    manager.expert_map = manager.expert_mask = manager.routing_tables = None
    manager.map_global_to_local = lambda expert: local.index(expert) if expert in local else -1
    if len(local) < experts:
        manager.expert_map = torch.tensor([manager.map_global_to_local(each) for each in range(experts)]).int()
    device = mock.patch.object(MarlinExpertsBase, "_supports_current_device", return_value=True)
    with as_rank(rank, ranks), device:
        return RoutedExperts(
            layer_name=prefix, params_dtype=dtype, moe_config=config, quant_config=model.config,
            expert_map_manager=manager, **options,
        )  # fmt: skip


def load_experts(layer, model, prefix, leave_out=()):
    """Hands the layer every tensor of its experts as `RoutedExperts.load_weights` does."""
    parameters = dict(layer.named_parameters())
    for expert in range(layer.global_num_experts):
        for shard, projection in SHARDS.items():
            group = "w2" if shard == "w2" else "w13"
            for part in ("qweight", "qzeros", "scales"):
                name = f"{prefix}.{expert}.{projection}.{part}"
                if name in model.marlin and name not in leave_out:
                    target = f"{group}_{part}"
                    parameter = parameters[target]
                    done = parameter.weight_loader(
                        parameter, model.marlin[name], f"{prefix}.{target}", shard_id=shard, expert_id=expert,
                        return_success=True,
                    )  # fmt: skip
                    assert done == (layer._map_global_expert_id_to_local_expert_id(expert) != -1)


def finish_experts(layer):
    """Runs what follows loading, but for building vLLM's own kernel; returns how often that was asked for."""
    with mock.patch.object(AutoAWQMoEMethod, "_setup_kernel") as setup:
        layer.quant_method.process_weights_after_loading(layer)
    return setup.call_count


def experts_kernel(layer):
    """Returns which kernel serves a finished layer: ``own`` or ``engine``."""
    return layer.quant_method.kernel


def run_experts(layer, hidden, topk_ids, topk_weights):
    """Returns what a finished layer makes of tokens; the experts are numbers of the model's."""
    workspaces = mock.Mock(get_simultaneous=lambda *each: [torch.empty(shape, dtype=dtype) for shape, dtype in each])
    place = "vllm.model_executor.layers.fused_moe.modular_kernel.current_workspace_manager"
    with mock.patch(place, return_value=workspaces):
        return layer.quant_method.apply(layer, hidden, topk_weights, topk_ids, None, None)
