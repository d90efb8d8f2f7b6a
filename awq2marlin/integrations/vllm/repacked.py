"""AWQ modules that vLLM's own AWQ code cannot load, because they have no zero points: repacked while loading."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from awq2marlin.errors import refuse
from awq2marlin.integrations.vllm.config import MarlinNativeConfig
from awq2marlin.integrations.vllm.finishing import pad_ends
from awq2marlin.integrations.vllm.kernels import LinearKernel, VllmMarlinKernel
from awq2marlin.integrations.vllm.linear import finish_bias, module_names
from awq2marlin.integrations.vllm.record import LoadRecord
from awq2marlin.integrations.vllm.state import are_weights_processed
from awq2marlin.layout import awq_marlin_repack, marlin_permute_scales, replace_parameter
from awq2marlin.marlin import num_groups, padded_shapes


@register_weight_loader_v2_supported_method
class MarlinRepackedAwqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads AWQ tensors without zero points, repacks them, padded where needed, and applies them."""

    supports_pre_processed_weights = True

    def __init__(self, quant_config: MarlinNativeConfig, prefix: str) -> None:
        """Serves the layer of that full name."""
        self.quant_config = quant_config
        self.prefix = prefix
        self.parts = quant_config.parts(prefix)
        self.record = LoadRecord()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002 - a part of vLLM's signature
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters of one rank's shapes: ``qweight`` int32 [K, N/f], ``scales`` [G, N].

        Args:
            layer: of vLLM.
            input_size_per_partition: K on this rank.
            output_partition_sizes: the widths that are fused into N on this rank.
            input_size: K of the whole layer.
            output_size: N of the whole layer.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds vLLM's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part does not consist of whole words and groups.
        """
        config = self.quant_config
        size_k, size_n = input_size_per_partition, sum(output_partition_sizes)
        is_whole_group = config.group_size == -1
        if not is_whole_group and size_k % config.group_size:
            reason = f"{size_k} rows on one rank are not a multiple of the group size {config.group_size}"
            raise refuse("unsupported-engine", f"{reason}. {config.tensor_parallel_advice()}", tensor=self.prefix)
        if any(width % config.pack_factor for width in output_partition_sizes):
            reason = f"columns on one rank {output_partition_sizes} are not multiples of {config.pack_factor}"
            raise refuse("unsupported-engine", f"{reason}. {config.tensor_parallel_advice()}", tensor=self.prefix)

        self.size_k, self.size_n = size_k, size_n
        self.width_count = len(output_partition_sizes)
        self.kernel: LinearKernel = VllmMarlinKernel(config.version, config.weight_bits, False, size_k, size_n)
        loader = extra_weight_attrs["weight_loader"]
        qweight = PackedvLLMParameter(
            data=torch.empty(size_k, size_n // config.pack_factor, dtype=torch.int32),
            input_dim=0,
            output_dim=1,
            packed_dim=1,
            packed_factor=config.pack_factor,
            weight_loader=self.record.watch("qweight", loader),
        )
        layer.register_parameter("qweight", qweight)
        is_replicated = is_whole_group and size_k != input_size
        scales_class = ChannelQuantScaleParameter if is_replicated else GroupQuantScaleParameter
        scales = scales_class(
            data=torch.empty(num_groups(size_k, config.group_size), size_n, dtype=params_dtype),
            output_dim=1,
            weight_loader=self.record.watch("scales", loader),
            **({} if is_replicated else {"input_dim": 0}),
        )
        layer.register_parameter("scales", scales)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repacks the loaded AWQ tensors, once.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
        """
        self.kernel.prepare(layer.qweight.device)
        if are_weights_processed() or not isinstance(layer.qweight, BasevLLMParameter):
            return
        self.record.require(module_names(self.prefix, self.parts, self.width_count), ["qweight", "scales"])

        config = self.quant_config
        size_k, size_n = self.size_k, self.size_n
        padded_k, padded_n = padded_shapes([(size_k, size_n)], config.group_size)[0]
        awq = pad_ends(layer.qweight.data, padded_k - size_k, (padded_n - size_n) // config.pack_factor)
        rows = num_groups(padded_k, config.group_size) - num_groups(size_k, config.group_size)
        scales = pad_ends(layer.scales.data, rows, padded_n - size_n)
        finished = {
            "qweight": awq_marlin_repack(awq, padded_k, padded_n, config.weight_bits),
            "scales": marlin_permute_scales(scales, padded_k, padded_n, config.group_size),
        }
        for name, tensor in finished.items():
            replace_parameter(layer, name, tensor)  # by a plain parameter, which tells that this is done
        finish_bias(layer, padded_n)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x @ w + bias``: x [..., K], bias [padded N] or None, result [..., N]."""
        return self.kernel(x, layer.qweight, layer.scales, None, bias)
