"""vLLM's linear layers of Marlin weights: what is vLLM's about them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.linear import MarlinLinear
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.vllm.kernels import RECUT_NOTE, LinearKernel, kernel_of
from awq2marlin.integrations.vllm.state import are_weights_processed, loads_by_weight_loaders, loads_sharded_state


@register_weight_loader_v2_supported_method
class MarlinNativeLinearMethod(MarlinLinear, LinearMethodBase):  # type: ignore[misc]
    """Loads, finishes and applies one layer of Marlin weights."""

    #: vLLM 0.33: the tensors of a processed layer can be handed to another process as they are.
    supports_pre_processed_weights = True

    engine = "vLLM"
    parameters = parameter
    note = RECUT_NOTE

    def __init__(self, contents: Contents, prefix: str, modules: list[str]) -> None:
        """Serves a layer; see `MarlinLinear`."""
        super().__init__(contents, prefix, modules, LoadRecord(sees_everything=loads_by_weight_loaders()))
        #: What multiplies; chosen when the weights are there.
        self.kernel: LinearKernel | None = None

    def loads_finished(self) -> bool:
        """Returns whether vLLM loads what `save_sharded_state` has written."""
        return loads_sharded_state()

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
        if not are_weights_processed() and self.is_loaded(layer):
            self.finish(layer)
        if self.kernel is None:
            self.kernel = kernel_of(layer, self.contents.bits, *self.sizes)
        keep_ordered_bias(layer, self.padded_sizes[1], self.kernel)

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


def keep_ordered_bias(layer: Any, padded_n: int, kernel: LinearKernel) -> None:
    """Keeps a copy of a layer's bias as a kernel adds it, in a buffer, unless the model adds the bias by itself.

    Args:
        layer: of vLLM, with or without ``bias`` [N].
        padded_n: N with padding.
        kernel: whose order the copy takes.
    """
    bias = getattr(layer, "bias", None)
    if bias is None or getattr(layer, "skip_bias_add", False):
        return
    ordered = kernel.ordered_bias(pad(bias.data, (0, padded_n - len(bias))))
    kept = getattr(layer, "ordered_bias", None)
    if kept is None or are_weights_processed():  # then what is there may be another process's
        layer.register_buffer("ordered_bias", ordered.clone(), persistent=False)
    else:
        kept.copy_(ordered)  # in place: captured graphs know where it lies
