"""vLLM's linear layers of Marlin weights: what is vLLM's about them."""

from __future__ import annotations

from typing import Any

from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.kernels import LinearKernel
from awq2marlin.integrations.serving.linear import MarlinLinear
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.serving.vocabulary import PaddedVocabulary
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


class OutputEmbeddingMethod(PaddedVocabulary, MarlinNativeLinearMethod):
    """The same of a quantized output embedding."""
