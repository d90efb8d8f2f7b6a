"""How a linear layer of vLLM holds a converted module: loaded as it lies in the file, in plain slices."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from awq2marlin.errors import refuse
from awq2marlin.integrations.vllm.config import MarlinNativeConfig
from awq2marlin.integrations.vllm.finishing import pad_ends, pad_qweight, permute_bias, reorder_scales
from awq2marlin.integrations.vllm.kernels import LinearKernel, VllmMarlinKernel
from awq2marlin.integrations.vllm.record import LoadRecord
from awq2marlin.integrations.vllm.state import are_weights_processed
from awq2marlin.layout import replace_parameter
from awq2marlin.marlin import GPTQ_MARLIN_TILE, is_single_group, num_groups, padded_shapes, qweight_shape
from awq2marlin.slicing import inexact_reason


@register_weight_loader_v2_supported_method
class MarlinNativeLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads, finishes and applies one layer of Marlin weights."""

    #: vLLM 0.33: the tensors of a processed layer can be handed to another process as they are.
    supports_pre_processed_weights = True

    def __init__(self, quant_config: MarlinNativeConfig, prefix: str) -> None:
        """Serves the layer of that full name."""
        self.quant_config = quant_config
        self.prefix = prefix
        self.parts = quant_config.parts(prefix)
        self.has_zero_points = quant_config.has_zero_points(self.parts)
        self.record = LoadRecord()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters of one rank's shapes.

        ``qweight`` int32 [K/16, N*16/f], ``scales`` [G, N], and ``qzeros`` int32 [G, N/f] where there are zero points.

        Args:
            layer: of vLLM.
            input_size_per_partition: K on this rank.
            output_partition_sizes: the widths that are fused into N on this rank.
            input_size: K of the whole layer.
            output_size: N of the whole layer.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds vLLM's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part is not exactly a slice of the file's tensors, or the module is
                padded and would have to be fused or cut.
        """
        size_k, size_n = input_size_per_partition, sum(output_partition_sizes)
        is_cut = (size_k, size_n) != (input_size, output_size)
        file_k, file_n = self._file_sizes(size_k, size_n, len(output_partition_sizes), is_cut)
        self._refuse_inexact(file_k, output_partition_sizes if file_n == size_n else [file_n], is_cut)

        config = self.quant_config
        group_size = config.group_size
        self.size_k, self.size_n = size_k, size_n
        self.file_k, self.file_n = file_k, file_n
        #: Whether the scales stand in the file in the order of a single group.
        self.was_single = is_single_group(input_size if file_k == size_k else file_k, group_size)
        self.kernel: LinearKernel = VllmMarlinKernel(
            config.version, config.weight_bits, self.has_zero_points, size_k, size_n
        )
        self.width_count = len(output_partition_sizes)

        loader = extra_weight_attrs["weight_loader"]
        columns = {"output_dim": 1}
        both = {"input_dim": 0, **columns}
        packed = {"packed_dim": 1, "packed_factor": config.pack_factor}
        #: One group over all of K cannot be cut: every rank has all of it.
        is_whole_group = group_size == -1 and size_k != input_size
        groups = num_groups(file_k, group_size)

        qweight = PackedvLLMParameter(
            data=torch.empty(qweight_shape(file_k, file_n, config.weight_bits), dtype=torch.int32),
            marlin_tile_size=GPTQ_MARLIN_TILE,
            weight_loader=self.record.watch("qweight", loader),
            **both,
            **packed,
        )
        layer.register_parameter("qweight", qweight)
        scales_class = ChannelQuantScaleParameter if is_whole_group else GroupQuantScaleParameter
        scales = scales_class(
            data=torch.empty(groups, file_n, dtype=params_dtype),
            weight_loader=self.record.watch("scales", loader),
            **(columns if is_whole_group else both),
        )
        layer.register_parameter("scales", scales)
        if self.has_zero_points:
            qzeros_class = PackedColumnParameter if is_whole_group else PackedvLLMParameter
            qzeros = qzeros_class(
                data=torch.empty(groups, file_n // config.pack_factor, dtype=torch.int32),
                weight_loader=self.record.watch("qzeros", loader),
                **(columns if is_whole_group else both),
                **packed,
            )
            layer.register_parameter("qzeros", qzeros)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what the kernel takes; repacks nothing, and does nothing a second time.

        A slice that the kernel's tiles do not divide is padded with zero tiles and zero groups; scales that are left
        with one group take that order; a bias takes the kernel's.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
        """
        qweight = layer.qweight
        self.kernel.prepare(qweight.device)
        if are_weights_processed() or not isinstance(qweight, BasevLLMParameter):
            return
        names = ["qweight", "scales", *(["qzeros"] if self.has_zero_points else [])]
        self.record.require(module_names(self.prefix, self.parts, self.width_count), names)

        group_size, bits = self.quant_config.group_size, self.quant_config.weight_bits
        size_k, size_n = self.file_k, self.file_n
        padded_k, padded_n = padded_shapes([(size_k, size_n)], group_size)[0]
        rows = num_groups(padded_k, group_size) - num_groups(size_k, group_size)
        columns = padded_n - size_n
        scales = pad_ends(layer.scales.data, rows, columns)
        finished = {
            "qweight": pad_qweight(qweight.data, size_k, size_n, padded_k, padded_n, bits),
            "scales": reorder_scales(
                scales, was_single=self.was_single, is_single=is_single_group(padded_k, group_size)
            ),
        }
        if self.has_zero_points:
            finished["qzeros"] = pad_ends(layer.qzeros.data, rows, columns // self.quant_config.pack_factor)
        for name, tensor in finished.items():
            replace_parameter(layer, name, tensor)  # by a plain parameter, which tells that this is done
        finish_bias(layer, padded_n)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x @ w + bias``.

        Args:
            layer: one whose weights are processed.
            x: activations [..., K].
            bias: [padded N], the layer's own, or None.

        Returns:
            [..., N].
        """
        qzeros = layer.qzeros if self.has_zero_points else None
        return self.kernel(x, layer.qweight, layer.scales, qzeros, bias)

    def _file_sizes(self, size_k: int, size_n: int, widths: int, is_cut: bool) -> tuple[int, int]:
        """Returns K and N of the tensors to be loaded: larger than the layer's if the module is padded."""
        padded = [part for part in self.parts if part in self.quant_config.quantization.padded_modules]
        if not padded:
            return size_k, size_n
        if is_cut or widths > 1 or len(self.parts) > 1:
            why = "is cut for tensor parallelism" if is_cut else "is fused with others"
            self._refuse(
                f"it is padded, and in vLLM it {why}, for which its padding stands in the wrong places. Convert with "
                "--unaligned keep: then vLLM loads it with its own AWQ code"
            )
        return padded_shapes([(size_k, size_n)], self.quant_config.group_size)[0]

    def _refuse_inexact(self, size_k: int, widths: list[int], is_cut: bool) -> None:
        reason = inexact_reason(size_k, widths, self.quant_config.group_size)
        if reason is None:
            return
        if not is_cut:
            self._refuse(f"{reason}, as Marlin weights must be. The checkpoint is damaged; convert again")
        self._refuse(f"{reason}. {self.quant_config.tensor_parallel_advice()}")

    def _refuse(self, message: str) -> NoReturn:
        raise refuse("unsupported-engine", message, tensor=self.prefix)


def module_names(prefix: str, parts: list[str], width_count: int) -> list[str]:
    """Returns a name for each width that is fused into a layer: the file's, where that is known.

    Args:
        prefix: the layer's full name.
        parts: the names of the checkpoint's modules that make it up, as far as the model tells.
        width_count: how many widths there are.
    """
    return parts if len(parts) == width_count else [f"{prefix} (part {part})" for part in range(width_count)]


def finish_bias(layer: Any, padded_n: int) -> None:
    """Gives a layer's bias the order of vLLM's kernel, unless the model adds it by itself.

    Args:
        layer: of vLLM, with or without ``bias`` [N].
        padded_n: N with padding.
    """
    bias = getattr(layer, "bias", None)
    if bias is None or getattr(layer, "skip_bias_add", False):
        return
    permuted = permute_bias(bias.data, padded_n)
    if permuted.shape == bias.shape:
        bias.data.copy_(permuted)  # in place: captured graphs know where it lies
    else:
        bias.data = permuted
