"""How vLLM's linear layers hold quantized modules: loaded in plain slices as they lie in the file, then finished."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.functional import pad
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from awq2marlin.checkpoint.tensor_parallel import inexact_awq_reason, inexact_reason
from awq2marlin.errors import refuse
from awq2marlin.integrations.vllm.contents import Contents
from awq2marlin.integrations.vllm.finishing import (
    pad_to,
    permute_bias,
    reorder_scales,
)
from awq2marlin.integrations.vllm.kernels import LinearKernel, VllmMarlinKernel
from awq2marlin.integrations.vllm.record import LoadRecord
from awq2marlin.integrations.vllm.state import are_weights_processed
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, is_single_group, padded_shapes
from awq2marlin.layout.modules import QUANTIZED_PARTS, part_shape
from awq2marlin.layout.torch_functions import replace_parameter
from awq2marlin.layout.torch_parts import marlin_part


@register_weight_loader_v2_supported_method
class MarlinNativeLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads, finishes and applies one layer of Marlin weights."""

    #: vLLM 0.33: the tensors of a processed layer can be handed to another process as they are.
    supports_pre_processed_weights = True

    #: Rows of K that one row of ``qweight`` holds in the file.
    tile = GPTQ_MARLIN_TILE

    def __init__(self, contents: Contents, prefix: str, modules: list[str]) -> None:
        """Serves a layer.

        Args:
            contents: of the checkpoint.
            prefix: the layer's full name.
            modules: the checkpoint's modules that make it up, in vLLM's order, as far as the model tells.
        """
        self.contents = contents
        self.prefix = prefix
        self.modules = modules
        has_zero_points = contents.has_zero_points(modules)
        self.parts = [part for part in QUANTIZED_PARTS if part != "qzeros" or has_zero_points]
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

        ``qweight`` int32 [K/t, N*t/f] with t = `tile`, ``scales`` [G, N], and ``qzeros`` int32 [G, N/f] where there
        are zero points.

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
        size_k, widths = input_size_per_partition, output_partition_sizes
        size_n = sum(widths)
        is_cut = (size_k, size_n) != (input_size, output_size)
        self.file_k, self.file_n = self._file_sizes(size_k, size_n, len(widths), is_cut)
        self._refuse_inexact(self.file_k, widths if self.file_n == size_n else [self.file_n], is_cut)

        contents = self.contents
        #: Whether the scales stand in the file in the order of a single group.
        self.was_single = is_single_group(max(input_size, self.file_k), contents.group_size)
        self.width_count = len(widths)
        self.kernel: LinearKernel = VllmMarlinKernel(contents.bits, "qzeros" in self.parts, size_k, size_n)
        #: One group over all of K cannot be cut by rows: every rank has all of it.
        is_group_whole = contents.group_size == -1 and size_k != input_size
        for part in self.parts:
            shape = self._shape(part, self.file_k, self.file_n)
            loader = self.record.watch(part, extra_weight_attrs["weight_loader"])
            parameter = self._parameter(part, shape, params_dtype, loader, is_group_whole)
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what the kernel takes, once.

        A slice that the kernel's tiles do not divide is padded with zeros; a bias takes the kernel's order.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
        """
        self.kernel.prepare(layer.qweight.device)
        if are_weights_processed() or not isinstance(layer.qweight, BasevLLMParameter):
            return
        self.record.require(module_names(self.prefix, self.modules, self.width_count), self.parts)

        padded_k, padded_n = padded_shapes([(self.file_k, self.file_n)], self.contents.group_size)[0]
        for part in self.parts:
            padded = pad_to(getattr(layer, part).data, *self._shape(part, padded_k, padded_n))
            # By a plain parameter, which tells that this is done.
            replace_parameter(layer, part, self._for_kernel(part, padded, padded_k, padded_n))
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
        qzeros = layer.qzeros if "qzeros" in self.parts else None
        return self.kernel(x, layer.qweight, layer.scales, qzeros, bias)

    def _file_sizes(self, size_k: int, size_n: int, widths: int, is_cut: bool) -> tuple[int, int]:
        """Returns K and N of the tensors to be loaded: larger than the layer's if the module is padded."""
        padded = [module for module in self.modules if module in self.contents.quantization.padded_modules]
        if not padded:
            return size_k, size_n
        if is_cut or widths > 1 or len(self.modules) > 1:
            why = "is cut for tensor parallelism" if is_cut else "is fused with others"
            self._refuse(
                f"it is padded, and in vLLM it {why}, for which its padding stands in the wrong places. Convert with "
                "--unaligned keep: then vLLM loads it with its own AWQ code"
            )
        return padded_shapes([(size_k, size_n)], self.contents.group_size)[0]

    def _refuse_inexact(self, size_k: int, widths: list[int], is_cut: bool) -> None:
        reason = self._inexact_reason(size_k, widths)
        if reason and is_cut:
            self._refuse(f"{reason}. {self.contents.tensor_parallel_advice()}")
        if reason:
            self._refuse(f"{reason}, as its layout needs. The checkpoint is damaged; convert again")

    def _inexact_reason(self, size_k: int, widths: list[int]) -> str | None:
        return inexact_reason(size_k, widths, self.contents.group_size)

    def _shape(self, part: str, size_k: int, size_n: int) -> tuple[int, int]:
        return part_shape(part, size_k, size_n, self.contents.scheme, tile=self.tile)

    def _parameter(
        self, part: str, shape: tuple[int, int], scale_dtype: torch.dtype, loader: Any, is_group_whole: bool
    ) -> Any:
        """Returns an empty parameter whose class and attributes tell vLLM's loaders how to cut and join it."""
        if part == "scales":
            data = torch.empty(shape, dtype=scale_dtype)
            if is_group_whole:
                return ChannelQuantScaleParameter(data=data, output_dim=1, weight_loader=loader)
            return GroupQuantScaleParameter(data=data, input_dim=0, output_dim=1, weight_loader=loader)
        packed = {
            "data": torch.empty(shape, dtype=torch.int32),
            "output_dim": 1,
            "packed_dim": 1,
            "packed_factor": self.contents.pack_factor,
            "weight_loader": loader,
        }
        if part == "qzeros" and is_group_whole:
            return PackedColumnParameter(**packed)
        return PackedvLLMParameter(input_dim=0, marlin_tile_size=self.tile if part == "qweight" else None, **packed)

    def _for_kernel(self, part: str, tensor: torch.Tensor, size_k: int, size_n: int) -> torch.Tensor:  # noqa: ARG002
        """Returns a loaded and padded tensor in the order that the kernel takes; repacks nothing."""
        if part != "scales":
            return tensor
        is_single = is_single_group(size_k, self.contents.group_size)
        return reorder_scales(tensor, was_single=self.was_single, is_single=is_single)

    def _refuse(self, message: str) -> NoReturn:
        raise refuse("unsupported-engine", message, tensor=self.prefix)


@register_weight_loader_v2_supported_method
class MarlinRepackedLinearMethod(MarlinNativeLinearMethod):
    """The same for a module kept in AWQ layout that vLLM's own AWQ code cannot load: repacked after loading."""

    tile = 1

    def _inexact_reason(self, size_k: int, widths: list[int]) -> str | None:
        return inexact_awq_reason(size_k, widths, self.contents.bits, self.contents.group_size)

    def _for_kernel(self, part: str, tensor: torch.Tensor, size_k: int, size_n: int) -> torch.Tensor:
        return marlin_part(part, tensor, size_k, size_n, self.contents.scheme)


def module_names(prefix: str, modules: list[str], width_count: int) -> list[str]:
    """Returns a name for each width that is fused into a layer: the file's, where that is known.

    Args:
        prefix: the layer's full name.
        modules: the names of the checkpoint's modules that make it up, as far as the model tells.
        width_count: how many widths there are.
    """
    return modules if len(modules) == width_count else [f"{prefix} (part {part})" for part in range(width_count)]


def finish_bias(layer: Any, padded_n: int) -> None:
    """Gives a layer's bias the order of vLLM's kernel, unless the model adds it by itself.

    Args:
        layer: of vLLM, with or without ``bias`` [N].
        padded_n: N with padding.
    """
    bias = getattr(layer, "bias", None)
    if bias is None or getattr(layer, "skip_bias_add", False):
        return
    permuted = permute_bias(pad(bias.data, (0, padded_n - len(bias))))
    if permuted.shape == bias.shape:
        bias.data.copy_(permuted)  # in place: captured graphs know where it lies
    else:
        bias.data = permuted
