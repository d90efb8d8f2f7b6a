"""What the plugin uses of SGLang, and on which versions it was tried."""

from __future__ import annotations

from awq2marlin.integrations.serving.needs import Engine, Need, needed_parameters

#: Versions on which the plugin's tests ran; docs/sglang.md says on which of them it ran on a GPU.
TRIED = ((0, 5, 23),)

SGLANG = Engine("SGLang", "sglang", TRIED)

_LAYERS = "srt.layers"

#: What every checkpoint needs.
ALWAYS = (
    Need("srt.utils", "is_cuda"),
    Need("srt.utils", "get_device_capability"),
    Need("srt.runtime_context", "get_exec"),
    Need("srt.model_loader.weight_utils", "get_quant_config", ("model_config", "load_config", "packed_modules_mapping"),
         optional=("remap_prefix",)),
    Need("srt.model_loader.utils", "get_model_architecture", ("model_config",)),
    Need(f"{_LAYERS}.linear", "LinearBase"),
    Need(f"{_LAYERS}.linear", "WEIGHT_LOADER_V2_SUPPORTED", (), ("append",)),
    Need(f"{_LAYERS}.quantization.base_config", "LinearMethodBase", (),
         ("create_weights", "process_weights_after_loading", "restore_weights_before_loading", "apply")),
    Need(f"{_LAYERS}.quantization.unquant", "UnquantizedLinearMethod"),
    Need(f"{_LAYERS}.quantization.utils", "get_scalar_types"),
    Need(f"{_LAYERS}.moe.fused_moe_triton", "FusedMoE"),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", (), ("org_vocab_size", "shard_indices")),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", (),
         ("org_vocab_start_index", "org_vocab_end_index")),
    Need(_LAYERS, "parameter"),
    *needed_parameters(f"{_LAYERS}.parameter"),
    Need(f"{_LAYERS}.quantization.marlin_utils", "marlin_make_workspace", ("device",)),
    Need(
        f"{_LAYERS}.quantization.marlin_utils",
        "apply_gptq_marlin_linear",
        (
            "input", "weight", "weight_scale", "weight_zp", "g_idx", "g_idx_sort_indices", "workspace", "wtype",
            "output_size_per_partition", "input_size_per_partition", "is_k_full", "bias",
        ),
    ),
)  # fmt: skip

#: What mixtures of experts need besides.
EXPERTS = (
    Need(f"{_LAYERS}.moe.fused_moe_triton", "FusedMoE", (),
         ("_map_global_expert_id_to_local_expert_id", "_weight_loader_impl")),
    Need(f"{_LAYERS}.moe.fused_moe_triton", "FusedMoE._weight_loader_impl",
         ("self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id")),
    Need(f"{_LAYERS}.moe.fused_moe_triton", "FusedMoeWeightScaleSupported.GROUP"),
    Need(f"{_LAYERS}.quantization.base_config", "FusedMoEMethodBase", (), ("create_moe_runner", "apply")),
    Need(f"{_LAYERS}.moe.moe_runner", "MoeRunner", ("runner_backend", "config")),
    Need(f"{_LAYERS}.moe.moe_runner.marlin", "MarlinMoeQuantInfo",
         ("w13_qweight", "w2_qweight", "w13_scales", "w2_scales", "w13_g_idx_sort_indices", "w2_g_idx_sort_indices",
          "weight_bits", "w13_qzeros", "w2_qzeros", "expert_map", "global_num_experts")),
    Need(f"{_LAYERS}.moe.moe_runner", "MoeRunnerConfig", (),
         ("activation", "is_gated", "top_k", "routed_scaling_factor", "no_combine", "swiglu_limit", "gemm1_alpha",
          "gemm1_beta", "gemm1_clamp_limit")),
    Need(f"{_LAYERS}.moe.token_dispatcher.standard", "StandardCombineInput", ("hidden_states",)),
    Need(f"{_LAYERS}.moe.utils", "MoeRunnerBackend", (), ("MARLIN",)),
    Need(f"{_LAYERS}.moe.utils", "get_moe_runner_backend"),
    Need(f"{_LAYERS}.moe.utils", "get_moe_a2a_backend"),
)  # fmt: skip
