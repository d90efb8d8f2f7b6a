"""How a linear layer of an engine holds quantized modules: loaded in slices as they lie in the file, then finished.

What cannot be sliced so, and what lies in AWQ layout, is loaded in AWQ layout and repacked.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch.nn.functional import pad

from awq2marlin.checkpoint.tensor_parallel import inexact_awq_reason, inexact_reason
from awq2marlin.errors import refuse
from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.finishing import pad_to, put_finished, reorder_scales
from awq2marlin.integrations.serving.kernels import LinearKernel
from awq2marlin.integrations.serving.record import LoadRecord, part_number, shard_of
from awq2marlin.integrations.serving.recut import Note, plain_part
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, is_single_group, padded_shapes
from awq2marlin.layout.modules import QUANTIZED_PARTS, part_shape
from awq2marlin.layout.torch_parts import marlin_part


class MarlinLinear:
    """Loads, finishes and applies one layer of Marlin weights.

    Other engines have these of vLLM: the interface of a linear layer's method, and the classes of parameters that
    know how they are cut and joined.
    """

    #: The engine, as people call it.
    engine = ""
    #: The engine's module of parameter classes.
    parameters: Any = None
    #: Says once that modules are cut within tiles.
    note: Note

    def __init__(self, contents: Contents, prefix: str, modules: list[str], record: LoadRecord) -> None:
        """Serves a layer.

        Args:
            contents: of the checkpoint.
            prefix: the layer's full name.
            modules: the checkpoint's modules that make it up, in the engine's order, as far as the model tells.
            record: takes note of what is loaded into the layer.
        """
        self.contents = contents
        self.prefix = prefix
        self.modules = modules
        has_zero_points = contents.has_zero_points(modules)
        self.parts = [part for part in QUANTIZED_PARTS if part != "qzeros" or has_zero_points]
        self.record = record
        #: What multiplies; chosen when the weights are there.
        self.kernel: LinearKernel | None = None
        self._ordered_bias: torch.Tensor | None = None

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
            layer: of the engine.
            input_size_per_partition: K on this rank.
            output_partition_sizes: the widths that are fused into N on this rank.
            input_size: K of the whole layer.
            output_size: N of the whole layer.
            params_dtype: fp16 or bf16.
            extra_weight_attrs: holds the engine's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source.
        """
        size_k, widths = input_size_per_partition, output_partition_sizes
        size_n = sum(widths)
        #: K and N on this rank, without padding.
        self.sizes = (size_k, size_n)
        #: K of the whole layer.
        self.whole_k = input_size
        self.width_count = len(widths)
        is_cut = (size_k, size_n) != (input_size, output_size)
        self._choose_layout(size_k, widths, is_cut)

        if self.loads_finished():
            for part in self.parts:
                shape = part_shape(part, *self.padded_sizes, self.contents.scheme, tile=GPTQ_MARLIN_TILE)
                layer.register_parameter(part, finished_parameter(part, shape, params_dtype))
            return

        contents = self.contents
        #: Whether the scales stand in the file in the order of a single group.
        self.was_single = is_single_group(max(input_size, self.loaded[0]), contents.group_size)
        #: One group over all of K cannot be cut by rows: every rank has all of it.
        is_group_whole = contents.group_size == -1 and size_k != input_size
        for part in self.parts:
            shape = self._shape(part, *self.loaded)
            loader = self.record.watch(part, self._reading(part, extra_weight_attrs["weight_loader"]))
            parameter = self._parameter(part, shape, params_dtype, loader, is_group_whole)
            layer.register_parameter(part, parameter)

    def loads_finished(self) -> bool:
        """Returns whether what the engine loads was finished before."""
        return False

    def comes_finished(self) -> bool:
        """Returns whether what a layer holds was finished by another process."""
        return False

    def kernel_of(self, layer: Any) -> LinearKernel:
        """Returns what multiplies with a finished layer.

        Raises:
            KernelUnavailableError: if only ours can serve the layer, and it cannot be compiled or run here.
        """
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what the kernels take, once, and chooses one.

        A slice that the kernels' tiles do not divide is padded with zeros. The bias stays as it was loaded; a copy in
        the kernel's order lies beside it, and is not saved with the layer.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
            KernelUnavailableError: if only ours can serve the layer, and it cannot be compiled or run here.
        """
        if not self.comes_finished() and isinstance(layer.qweight, self.parameters.BasevLLMParameter):
            self._finish(layer)
        if self.kernel is None:
            self.kernel = self.kernel_of(layer)
        self._keep_ordered_bias(layer, self.kernel)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x @ w + bias``.

        Args:
            layer: one whose weights are processed.
            x: activations [..., K].
            bias: the layer's own, or None.

        Returns:
            [..., N].
        """
        assert self.kernel is not None, "process_weights_after_loading has chosen it"
        return self.kernel(layer, x, None if bias is None else layer.ordered_bias)

    def _finish(self, layer: Any) -> None:
        padded_k, padded_n = self.padded_sizes
        self.record.require(module_names(self.prefix, self.modules, self.width_count), self.parts)
        for part in self.parts:
            padded = pad_to(getattr(layer, part).data, *self._shape(part, padded_k, padded_n))
            put_finished(layer, part, self._for_kernel(part, padded, padded_k, padded_n))

    def _keep_ordered_bias(self, layer: Any, kernel: LinearKernel) -> None:
        """Keeps a copy of the bias as the kernel adds it, in a buffer, unless the model adds the bias by itself.

        The copy stays where it lies, which captured graphs know, also where the engine takes the buffer from the layer
        to load other weights, or puts that of another process there.
        """
        bias = getattr(layer, "bias", None)
        if bias is None or getattr(layer, "skip_bias_add", False):
            return
        ordered = kernel.ordered_bias(pad(bias.data, (0, self.padded_sizes[1] - len(bias))))
        if self._ordered_bias is None:
            self._ordered_bias = ordered.clone()
        else:
            self._ordered_bias.copy_(ordered)
        layer.register_buffer("ordered_bias", self._ordered_bias, persistent=False)

    @property
    def padded_sizes(self) -> tuple[int, int]:
        """K and N of the finished tensors."""
        return padded_shapes([self.loaded], self.contents.group_size)[0]

    def _choose_layout(self, size_k: int, widths: list[int], is_cut: bool) -> None:
        """Decides in which layout the layer is loaded, and in which sizes.

        Sets `tile`, the rows of K that a row of ``qweight`` then has, and `loaded`, K and N. As it lies in the file, if
        that is Marlin's layout and the slice is one of whole tiles; else in AWQ's, to be repacked.
        """
        reason = self.reason_to_recut(size_k, widths, is_cut)
        self.tile, self.loaded = GPTQ_MARLIN_TILE, (size_k, sum(widths))
        if not reason:
            if self._padded:
                self.loaded = padded_shapes([self.loaded], self.contents.group_size)[0]
            return
        self.tile = 1
        if self._layouts != {"awq"} and not self.loads_finished():
            self.note.say(self.prefix, reason)
        reason = inexact_awq_reason(size_k, widths, self.contents.bits, self.contents.group_size)
        if reason:
            served = f"{self.engine} does not serve its source either"
            advice = self.contents.tensor_parallel_advice() if is_cut else served
            raise refuse("unsupported-engine", f"{reason}. {advice}", tensor=self.prefix)

    def reason_to_recut(self, size_k: int, widths: list[int], is_cut: bool) -> str | None:
        """Returns why the layer cannot be loaded as it lies in the file, in words; None if it can.

        Args:
            size_k: K on this rank.
            widths: the widths that are fused into N on this rank.
            is_cut: whether that is not the whole layer.
        """
        if self._layouts != {"marlin"}:
            return "not all of it is in Marlin layout"
        if not self._padded:
            return inexact_reason(size_k, widths, self.contents.group_size)
        if is_cut:
            return "it is padded, and cut"
        return "it is padded, and joined with others" if len(widths) > 1 or len(self.modules) > 1 else None

    @property
    def _layouts(self) -> set[str]:
        return {self.contents.layout([module]) for module in self.modules}

    @property
    def _padded(self) -> list[str]:
        return [module for module in self.modules if module in self.contents.quantization.padded_modules]

    def _reading(self, part: str, loader: Any) -> Any:
        """Returns a weight loader that brings what lies in tiles to plain order, where the layer is to be repacked."""
        if self.tile != 1 or self._layouts == {"awq"}:
            return loader

        @wraps(loader)
        def plain_loader(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            module = self._module_of(shard_of(args, kwargs))
            if self.contents.layout([module]) == "marlin":
                said = self.contents.quantization
                loaded_weight = plain_part(part, loaded_weight, module, self.whole_k, said)
            return loader(param, loaded_weight, *args, **kwargs)

        return plain_loader

    def _module_of(self, shard: Any) -> str:
        """Returns the checkpoint's module that the engine loads as a part of this layer.

        Where two modules make up more widths, as query, key, value and a gate do, the last one is the second's.
        """
        number = part_number(shard)
        if not isinstance(number, int):
            return self.modules[0]
        if len(self.modules) == self.width_count:
            return self.modules[number]
        return self.modules[-1 if number == self.width_count - 1 else 0]

    def _shape(self, part: str, size_k: int, size_n: int) -> tuple[int, int]:
        return part_shape(part, size_k, size_n, self.contents.scheme, tile=self.tile)

    def _parameter(
        self, part: str, shape: tuple[int, int], scale_dtype: torch.dtype, loader: Any, is_group_whole: bool
    ) -> Any:
        """Returns an empty parameter whose class and attributes tell the engine's loaders how to cut and join it."""
        classes = self.parameters
        if part == "scales":
            data = torch.empty(shape, dtype=scale_dtype)
            if is_group_whole:
                return classes.ChannelQuantScaleParameter(data=data, output_dim=1, weight_loader=loader)
            return classes.GroupQuantScaleParameter(data=data, input_dim=0, output_dim=1, weight_loader=loader)
        packed = {
            "data": torch.empty(shape, dtype=torch.int32),
            "output_dim": 1,
            "packed_dim": 1,
            "packed_factor": self.contents.pack_factor,
            "weight_loader": loader,
        }
        if part == "qzeros" and is_group_whole:
            return classes.PackedColumnParameter(**packed)
        tile = self.tile if part == "qweight" else None
        return classes.PackedvLLMParameter(input_dim=0, marlin_tile_size=tile, **packed)

    def _for_kernel(self, part: str, tensor: torch.Tensor, size_k: int, size_n: int) -> torch.Tensor:
        """Returns a loaded and padded tensor as the kernels take it."""
        if self.tile == 1:
            return marlin_part(part, tensor, size_k, size_n, self.contents.scheme)
        if part != "scales":
            return tensor
        is_single = is_single_group(size_k, self.contents.group_size)
        return reorder_scales(tensor, was_single=self.was_single, is_single=is_single)


def module_names(prefix: str, modules: list[str], width_count: int) -> list[str]:
    """Returns a name for each width that is fused into a layer: the file's, where that is known.

    Args:
        prefix: the layer's full name.
        modules: the names of the checkpoint's modules that make it up, as far as the model tells.
        width_count: how many widths there are.
    """
    return modules if len(modules) == width_count else [f"{prefix} (part {part})" for part in range(width_count)]


def finished_parameter(part: str, shape: tuple[int, ...], scale_dtype: torch.dtype) -> torch.nn.Parameter:
    """Returns an empty parameter for a tensor that is processed already: a plain one, which tells that.

    Args:
        part: ``qweight``, ``qzeros`` or ``scales``.
        shape: as processing leaves it.
        scale_dtype: fp16 or bf16.
    """
    empty = torch.empty(shape, dtype=scale_dtype if part == "scales" else torch.int32)
    return torch.nn.Parameter(empty, requires_grad=False)
