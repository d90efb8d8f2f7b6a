"""vLLM's linear layers of Marlin weights: what is vLLM's about them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from awq2marlin.errors import refuse
from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.kernels import LinearKernel
from awq2marlin.integrations.serving.linear import MarlinLinear
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.vllm.kernels import RECUT_NOTE, kernel_of
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

    def loads_finished(self) -> bool:
        """Returns whether vLLM loads what `save_sharded_state` has written."""
        return loads_sharded_state()

    def comes_finished(self) -> bool:
        """Returns whether vLLM's weight cache has handed the layer over."""
        return are_weights_processed()

    def kernel_of(self, layer: Any) -> LinearKernel:
        """Returns what multiplies with a finished layer; see `MarlinLinear`."""
        return kernel_of(layer, self.contents.bits, *self.sizes)


class OutputEmbeddingMethod(MarlinNativeLinearMethod):
    """The same of a quantized output embedding, whose vocabulary vLLM pads to a multiple of 64."""

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        """Gives the layer empty parameters of one rank's shapes, padded; see `MarlinLinear.create_weights`."""
        super().create_weights(layer, *args, **{**options, "weight_loader": partial(self._load, layer)})

    def _load(self, layer: Any, parameter: Any, loaded: torch.Tensor) -> None:
        """Fills a parameter with a rank's part of the vocabulary, and zeros behind it.

        vLLM's own loader pads rows, which are the vocabulary only where an output embedding is not quantized.

        Args:
            layer: of vLLM, which knows its part.
            parameter: in AWQ layout: its columns are the vocabulary, in words or one by one.
            loaded: the tensor of the whole vocabulary.

        Raises:
            CheckpointError: if that is not the vocabulary of the model.
        """
        part, entries = layer.shard_indices, getattr(parameter, "packed_factor", 1)
        if loaded.shape[1] * entries != layer.org_vocab_size:
            found = loaded.shape[1] * entries
            message = f"it has {found} columns, but the vocabulary of the model has {layer.org_vocab_size} entries"
            raise refuse("wrong-shape", message, tensor=self.prefix)
        first, last = part.org_vocab_start_index // entries, part.org_vocab_end_index // entries
        parameter.data[:, : last - first].copy_(loaded[:, first:last])
        parameter.data[:, last - first :].zero_()
