"""The quantization config ``marlin_native``: which layer of a model is loaded in which way.

vLLM imports this module in every process, so the methods, with the large modules they need, are imported only when
a layer asks for one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.marlin_native import MARLIN_QUANT_METHOD
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.integrations.kernel_choice import setting
from awq2marlin.integrations.serving.config import ServingConfig
from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.inventory import Inventory, inventory_of, read_inventory, tensors_of
from awq2marlin.integrations.vllm.needs import ALWAYS, EXPERTS, VLLM
from awq2marlin.integrations.vllm.state import is_sharded_state

logger = init_logger("vllm.awq2marlin")

#: vLLM's Marlin kernels run on Turing and later.
_MIN_CAPABILITY = 75


@register_quantization_config(MARLIN_QUANT_METHOD)
class MarlinNativeConfig(ServingConfig, QuantizationConfig):  # type: ignore[misc]
    """How a Marlin-native checkpoint is loaded.

    Attributes:
        contents: what the checkpoint holds, with the names that vLLM gives the modules.
    """

    def __init__(self, quantization: Quantization) -> None:
        """Takes what the checkpoint's config says."""
        super().__init__()
        self.contents = Contents(quantization)

    @classmethod
    def get_name(cls) -> str:
        """Returns ``marlin_native``."""
        return MARLIN_QUANT_METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability, times ten."""
        return _MIN_CAPABILITY

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MarlinNativeConfig:
        """Returns the config that a ``quantization_config`` describes.

        Raises:
            CheckpointError: if it is malformed, of a newer format, or this vLLM lacks something that serving it takes.
        """
        VLLM.require(ALWAYS, vllm.__version__)
        VLLM.warn_if_untried(vllm.__version__, logger)
        return cls(MARLIN_NATIVE.read_config(config, CONFIG_FILENAME))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks, before the model is built, that vLLM can serve the checkpoint and that it is complete.

        Args:
            model_name: folder or Hub repository.
            hf_config: the model's config.
            revision: of the Hub repository.

        Raises:
            CheckpointError: naming what is missing or cannot be served, and what to do.
        """
        _check_engine()
        if hf_config is not None:
            self.untie(logger, hf_config, hf_config.get_text_config())
        inventory = self._read_inventory(model_name, hf_config, revision)
        self.contents = replace(self.contents, inventory=inventory)
        self.refuse_unserved(_capability())

    def _read_inventory(self, model_name: str, hf_config: Any, revision: str | None) -> Inventory | None:
        if is_sharded_state(Path(model_name)):
            return None  # the files hold vLLM's names and one rank's shapes; vLLM itself misses what is not there
        if Path(model_name).is_dir():
            return read_inventory(Path(model_name), self.contents.quantization)
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        metadata = get_safetensors_params_metadata(model_name, revision=revision)
        if not metadata:
            logger.warning(
                "awq2marlin could not read the headers of %s beforehand; missing tensors are found while loading",
                printable(model_name),
            )
            return None
        config = hf_config.to_dict() if hf_config is not None else {}
        return inventory_of(tensors_of(metadata), self.contents.quantization, config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives the modules the names that a model of vLLM has for them.

        Args:
            hf_to_vllm_mapper: vLLM's mapping from names in the file to its own.
        """
        self.contents = self.contents.renamed(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns how a layer of vLLM loads and applies its weights; None for layers that are never quantized.

        Args:
            layer: of vLLM.
            prefix: its full name.

        Raises:
            CheckpointError: if a layer joins modules of which some are quantized and some are not.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, ParallelLMHead) and self.contents.layout([prefix]) == "awq":
            from awq2marlin.integrations.vllm.linear import OutputEmbeddingMethod

            return OutputEmbeddingMethod(self.contents, prefix, [prefix])
        return None

    def parts(self, prefix: str) -> list[str]:
        """Returns the names of the checkpoint's modules that make up a layer, in vLLM's order.

        Args:
            prefix: the layer's full name, such as ``model.layers.0.self_attn.qkv_proj``.
        """
        if self.contents.is_listed(prefix):  # fused in the file already
            return [prefix]
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from awq2marlin.integrations.vllm.linear import MarlinNativeLinearMethod

        parts = self.parts(prefix)
        if self.contents.layout(parts) == "none":
            return UnquantizedLinearMethod()
        return MarlinNativeLinearMethod(self.contents, prefix, parts)

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        VLLM.require(EXPERTS, vllm.__version__)
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        from awq2marlin.integrations.vllm.experts import MarlinNativeMoEMethod

        if self.contents.layout_of_experts(prefix) == "none":
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return MarlinNativeMoEMethod(self.contents, layer, prefix)


def _check_engine() -> None:
    """Refuses settings of vLLM under which Marlin weights would be read wrongly or not at all."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise refuse("unsupported-engine", "vLLM's Marlin kernels need an NVIDIA GPU; this vLLM runs without one")
    setting()
    if envs.VLLM_MARLIN_INPUT_DTYPE is not None:
        raise refuse(
            "unsupported-engine",
            "VLLM_MARLIN_INPUT_DTYPE is set: it asks for weights prepared for 8-bit activations, which a "
            "Marlin-native checkpoint does not hold. Unset it",
        )
    if envs.VLLM_BATCH_INVARIANT:
        raise refuse(
            "unsupported-engine",
            "VLLM_BATCH_INVARIANT is set, but Marlin kernels are not batch invariant. Unset it, or serve the "
            "AWQ checkpoint: 'awq2marlin revert' gives it back",
        )


def _capability() -> tuple[int, int] | None:
    """Returns the compute capability of the GPUs, without a context on any of them; None if it is not known."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)
