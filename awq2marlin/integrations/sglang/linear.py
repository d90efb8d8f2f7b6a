"""SGLang's linear layers of Marlin weights: what is SGLang's about them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.layers import parameter
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from awq2marlin.errors import refuse
from awq2marlin.integrations.serving.kernels import LinearKernel
from awq2marlin.integrations.serving.linear import MarlinLinear
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.serving.vocabulary import PaddedVocabulary
from awq2marlin.integrations.sglang.kernels import RECUT_NOTE, kernel_of

#: Last name component of a module whose weight SGLang's models multiply themselves: they read it between loading and
#: processing, as AWQ tensors.
_READ_AS_AWQ = "kv_b_proj"


class MarlinNativeLinearMethod(MarlinLinear, LinearMethodBase):  # type: ignore[misc]
    """Loads, finishes and applies one layer of Marlin weights."""

    engine = "SGLang"
    parameters = parameter
    note = RECUT_NOTE

    def __init__(self, config: Any, prefix: str, modules: list[str]) -> None:
        """Serves a layer; see `MarlinLinear`.

        Args:
            config: the checkpoint's `MarlinNativeConfig`; SGLang's models look for it here.
            prefix: the layer's full name.
            modules: the checkpoint's modules that make it up.
        """
        super().__init__(config.contents, prefix, modules, LoadRecord(sees_everything=config.by_weight_loaders))
        self.quant_config = config

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
        """Gives the layer empty parameters of one rank's shapes; see `MarlinLinear.create_weights`.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source, or SGLang itself would
                read or join the tensors of the file wrongly.
        """
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip
        if self._is_read_as_awq and (self.contents.bits != 4 or "qzeros" not in self.parts):
            self._refuse("SGLang takes this module's weight apart itself, which needs 4 bits and zero points")
        is_joined_before = len(self.modules) > self.width_count
        if is_joined_before and (self._padded or len(self._layouts) > 1):
            self._refuse(
                f"SGLang joins {', '.join(self.modules)} while it reads them, which works only if all are in the same "
                "layout and none is padded"
            )

    def reason_to_recut(self, size_k: int, widths: list[int], is_cut: bool) -> str | None:
        """Returns why the layer cannot be loaded as it lies in the file; see `MarlinLinear.reason_to_recut`."""
        reason = super().reason_to_recut(size_k, widths, is_cut)
        return reason or ("SGLang itself reads it in AWQ layout" if self._is_read_as_awq else None)

    def kernel_of(self, layer: Any) -> LinearKernel:
        """Returns what multiplies with a finished layer; see `MarlinLinear`."""
        return kernel_of(layer, self.contents.bits, *self.sizes)

    def restore_weights_before_loading(self, layer: Any) -> None:  # noqa: ARG002 - SGLang's interface
        """Refuses to load other weights into a running engine.

        Raises:
            CheckpointError: always.
        """
        self._refuse("weights in Marlin layout cannot be replaced while SGLang runs; start it with the new checkpoint")

    @property
    def _is_read_as_awq(self) -> bool:
        return self.prefix.rpartition(".")[2] == _READ_AS_AWQ

    def _refuse(self, message: str) -> NoReturn:
        raise refuse("unsupported-engine", message, tensor=self.prefix)


class OutputEmbeddingMethod(PaddedVocabulary, MarlinNativeLinearMethod):
    """The same of a quantized output embedding."""


# Its parameters cut and join themselves.
if MarlinNativeLinearMethod.__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
    WEIGHT_LOADER_V2_SUPPORTED.append(MarlinNativeLinearMethod.__name__)
