"""What the plugin uses of vLLM, and on which versions it was tried."""

from __future__ import annotations

from awq2marlin.integrations.serving.needs import Engine, Need, needed_parameters

#: Versions on which the plugin's tests ran; docs/vllm.md says on which of them it ran on a GPU, and when.
TRIED = ((0, 25), (0, 29), (0, 33))

VLLM = Engine("vLLM", "vllm", TRIED)

_LAYERS = "model_executor.layers"

#: What every checkpoint needs.
ALWAYS = (
    Need("envs", "environment_variables"),
    Need("envs", "VLLM_BATCH_INVARIANT"),
    Need("envs", "VLLM_MARLIN_INPUT_DTYPE"),
    Need("platforms", "current_platform", (), ("is_cuda", "get_device_capability")),
    Need("config", "get_current_vllm_config_or_none"),
    Need("transformers_utils.config", "get_safetensors_params_metadata", ("model", "revision")),
    Need("scalar_type", "scalar_types", (), ("uint4", "uint4b8", "uint8b128")),
    Need(f"{_LAYERS}.linear", "LinearMethodBase", (), ("create_weights", "process_weights_after_loading", "apply")),
    Need(f"{_LAYERS}.linear", "LinearMethodBase.apply", accepts=("self", "layer", "x", "bias")),
    Need(f"{_LAYERS}.linear", "LinearMethodBase.process_weights_after_loading", accepts=("self", "layer")),
    Need(f"{_LAYERS}.linear", "LinearBase"),
    Need(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    Need(f"{_LAYERS}.linear", "register_weight_loader_v2_supported_method"),
    Need(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.get_quant_method",
         accepts=("self", "layer", "prefix")),
    Need(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.maybe_update_config",
         accepts=("self", "model_name", "hf_config", "revision")),
    Need(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.apply_vllm_mapper",
         accepts=("self", "hf_to_vllm_mapper")),
    Need(f"{_LAYERS}.fused_moe", "RoutedExperts"),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", (), ("org_vocab_size", "shard_indices")),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", (),
         ("org_vocab_start_index", "org_vocab_end_index")),
    Need("model_executor", "parameter"),
    *needed_parameters("model_executor.parameter"),
    Need(
        f"{_LAYERS}.quantization.utils.marlin_utils",
        "apply_gptq_marlin_linear",
        (
            "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
            "input_size_per_partition", "bias",
        ),
        optional=("g_idx", "g_idx_sort_indices", "is_k_full"),  # before 0.33
    ),
)  # fmt: skip

#: What mixtures of experts need besides.
EXPERTS = (
    Need(f"{_LAYERS}.fused_moe", "RoutedExperts", (),
         ("_map_global_expert_id_to_local_expert_id", "_expert_routing_tables", "apply_router_weight_on_input",
          "ckpt_down_proj_name", "ckpt_gate_proj_name", "ckpt_up_proj_name", "global_num_experts", "moe_config")),
    Need(f"{_LAYERS}.fused_moe.config", "FusedMoEConfig", (),
         ("activation", "experts_per_token", "has_bias", "is_act_and_mul", "is_lora_enabled", "moe_backend",
          "moe_parallel_config", "num_local_experts")),
    Need(f"{_LAYERS}.fused_moe.config", "FusedMoEParallelConfig", (),
         ("tp_size", "use_all2all_kernels", "use_batched_activation_format")),
    Need(f"{_LAYERS}.fused_moe.config", "FusedMoEQuantConfig", (), ("use_int4_w4a16",)),
    Need(f"{_LAYERS}.fused_moe", "UnquantizedFusedMoEMethod", ("moe",)),
    Need(f"{_LAYERS}.fused_moe", "FusedMoeWeightScaleSupported.GROUP"),
    Need(f"{_LAYERS}.fused_moe.fused_moe_method_base", "FusedMoEMethodBase", ("moe",), ("moe",)),
    Need(f"{_LAYERS}.fused_moe.oracle.int_wna16", "WNA16MoEBackend", (), ("MARLIN", "BATCHED_MARLIN")),
    Need(f"{_LAYERS}.fused_moe.oracle.int_wna16", "backend_to_kernel_cls", ("backend",)),
    Need(f"{_LAYERS}.quantization.auto_awq", "AutoAWQMoEMethod", (),
         ("apply", "get_fused_moe_quant_config")),
    Need(f"{_LAYERS}.quantization.auto_awq", "AutoAWQMoEMethod._setup_kernel", accepts=("self", "layer")),
    Need(f"{_LAYERS}.quantization.auto_awq", "AutoAWQMoEMethod.process_weights_after_loading",
         accepts=("self", "layer")),
    Need(f"{_LAYERS}.quantization.utils.quant_utils", "kInt4Static"),
    Need(f"{_LAYERS}.quantization.utils.quant_utils", "kInt8Static"),
    Need("model_executor.utils", "set_weight_attrs", ("weight", "weight_attrs")),
    Need(f"{_LAYERS}.fused_moe.all2all_utils", "maybe_make_prepare_finalize",
         ("moe", "quant_config", "routing_tables", "allow_new_interface", "use_monolithic")),
    Need(f"{_LAYERS}.fused_moe.modular_kernel", "FusedMoEKernel", ("prepare_finalize", "fused_experts")),
    Need(f"{_LAYERS}.fused_moe.experts.marlin_moe", "MarlinExperts", ("moe_config", "quant_config"),
         ("workspace_shapes", "activation_format", "finalize_weight_and_reduce_impl", "moe_problem_size",
          "quant_config", "w1_scale", "w1_zp", "w2_scale", "w2_zp")),
    Need(f"{_LAYERS}.fused_moe.experts.marlin_moe", "MarlinExperts.is_supported_config",
         ("cls", "moe_config", "weight_key", "activation_key", "activation_format")),
    Need(f"{_LAYERS}.fused_moe.experts.marlin_moe", "MarlinExperts.apply",
         ("self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation",
          "global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2",
          "expert_tokens_meta", "apply_router_weight_on_input")),
)  # fmt: skip
