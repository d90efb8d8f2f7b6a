"""The quantization config ``marlin_native``: which layer of a model is loaded in which way.

vLLM imports this module in every process, so the methods, with the large modules they need, are imported only when
a layer asks for one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import vllm
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from awq2marlin.awq import pack_factor
from awq2marlin.errors import printable, refuse
from awq2marlin.folder import CONFIG_FILENAME
from awq2marlin.integrations.vllm.inventory import Inventory, inventory_of, read_inventory
from awq2marlin.integrations.vllm.versions import minor_version
from awq2marlin.quantization import MARLIN_QUANT_METHOD, MarlinQuantization, read_marlin_quantization

logger = init_logger("vllm.awq2marlin")

Layout = Literal["marlin", "awq", "none"]

#: vLLM's Marlin kernels run on Turing and later.
_MIN_CAPABILITY = 75


@register_quantization_config(MARLIN_QUANT_METHOD)
class MarlinNativeConfig(QuantizationConfig):  # type: ignore[misc]
    """How a Marlin-native checkpoint is loaded.

    Attributes:
        quantization: what the checkpoint's config says, with the names that vLLM gives the modules.
        inventory: what its headers say; None while they could not be read.
        weight_bits: 4 or 8.
        group_size: rows of K that share scales, -1 for all.
        zero_point: as the config says.
        pack_factor: values per int32.
        version: vLLM's, (major, minor).
    """

    def __init__(self, quantization: MarlinQuantization) -> None:
        """Takes what the checkpoint's config says."""
        super().__init__()
        version = minor_version(vllm.__version__)
        assert version is not None, "registration has checked it"
        self.version = version
        self.quantization = quantization
        self.inventory: Inventory | None = None
        self.weight_bits = quantization.bits
        self.group_size = quantization.group_size
        self.zero_point = quantization.zero_point
        self.pack_factor = pack_factor(quantization.bits)

    def __repr__(self) -> str:
        """Returns a line for vLLM's log."""
        facts = f"bits={self.weight_bits}, group_size={self.group_size}, zero_point={self.zero_point}"
        return f"MarlinNativeConfig({facts}, awq_modules={len(self.quantization.awq_modules)})"

    @classmethod
    def get_name(cls) -> str:
        """Returns ``marlin_native``."""
        return MARLIN_QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the activation types that the kernels take: fp16 and bf16."""
        return [torch.half, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability, times ten."""
        return _MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no file names: the config is always in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MarlinNativeConfig:
        """Returns the config that a ``quantization_config`` describes.

        Raises:
            CheckpointError: if it is malformed, of a newer format, or of a kind that vLLM has no kernel for.
        """
        quantization = read_marlin_quantization(config, CONFIG_FILENAME)
        if quantization.bits == 8 and quantization.zero_point:
            raise refuse(
                "unsupported-engine",
                "the checkpoint has 8 bits with zero points: vLLM's Marlin kernels know 8 bits only without them. "
                "Serve it with Transformers, or look for a 4-bit checkpoint of this model",
                file=CONFIG_FILENAME,
            )
        return cls(quantization)

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
        if Path(model_name).is_dir():
            self.inventory = read_inventory(Path(model_name), self.quantization)
            return
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        tensors = get_safetensors_params_metadata(model_name, revision=revision)
        if not tensors:
            logger.warning(
                "awq2marlin could not read the headers of %s beforehand: what is missing is found while loading",
                printable(model_name),
            )
            return
        shapes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
        config = hf_config.to_dict() if hf_config is not None else {}
        self.inventory = inventory_of(shapes, self.quantization, config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives the modules the names that a model of vLLM has for them.

        Args:
            hf_to_vllm_mapper: vLLM's mapping from names in the file to its own.
        """

        def renamed(names: Collection[str]) -> frozenset[str]:
            return frozenset(hf_to_vllm_mapper.apply_list(sorted(names)))

        old = self.quantization
        self.quantization = replace(
            old,
            awq_modules=renamed(old.awq_modules),
            unquantized_modules=renamed(old.unquantized_modules),
            padded_modules={
                name: size for key, size in old.padded_modules.items() for name in hf_to_vllm_mapper.apply_list([key])
            },
        )
        if self.inventory is not None:
            self.inventory = replace(self.inventory, zero_point_modules=renamed(self.inventory.zero_point_modules))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns how a layer of vLLM loads and applies its weights; None for layers that are never quantized.

        Args:
            layer: of vLLM.
            prefix: its full name.

        Raises:
            CheckpointError: if a layer fuses modules that the checkpoint holds in different layouts.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        if isinstance(layer, ParallelLMHead) and prefix in self.quantization.awq_modules:
            return self._awq_method(layer, prefix)
        return None

    def parts(self, prefix: str) -> list[str]:
        """Returns the names of the checkpoint's modules that make up a layer, in vLLM's order.

        Args:
            prefix: the layer's full name, such as ``model.layers.0.self_attn.qkv_proj``.
        """
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]

    def has_zero_points(self, modules: Collection[str]) -> bool:
        """Returns whether modules have ``qzeros``.

        Args:
            modules: names of modules, or of the parents of experts.
        """
        if self.zero_point or self.inventory is None:
            return self.zero_point
        found = self.inventory.zero_point_modules
        return any(module in found for module in modules) or _any_below(found, modules)

    def tensor_parallel_advice(self) -> str:
        """Returns what to do about a layer that the number of ranks does not cut exactly, in a sentence."""
        if self.inventory is None:
            return "Serve it on fewer GPUs; 'awq2marlin inspect' tells the largest tensor-parallel size that works"
        size = self.inventory.largest_tensor_parallel_size
        return f"The largest tensor-parallel size that works is {size}: serve it with --tensor-parallel-size {size}"

    def _layout(self, modules: list[str]) -> Layout:
        """Returns the layout that all of the modules, which become one layer, share."""
        awq, none = self.quantization.awq_modules, self.quantization.unquantized_modules
        found: dict[Layout, str] = {}
        for module in modules:
            if module in awq:
                found["awq"] = module
            elif module in none:
                found["none"] = module
            else:
                found["marlin"] = module
        if len(found) > 1:
            names = {"awq": "in AWQ layout", "none": "not quantized", "marlin": "in Marlin layout"}
            said = ", ".join(f"{printable(module)} is {names[layout]}" for layout, module in sorted(found.items()))
            raise refuse(
                "unsupported-engine",
                f"vLLM puts these modules into one matrix, but {said}. Serve the AWQ checkpoint instead: "
                "'awq2marlin revert' gives it back",
                file=CONFIG_FILENAME,
            )
        return next(iter(found))

    def _linear_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from awq2marlin.integrations.vllm.linear import MarlinNativeLinearMethod

        layout = self._layout(self.parts(prefix))
        if layout == "none":
            return UnquantizedLinearMethod()
        if layout == "awq":
            return self._awq_method(layer, prefix)
        return MarlinNativeLinearMethod(self, prefix)

    def _awq_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        if self.weight_bits == 4 and self.has_zero_points(self.parts(prefix)):
            return self._vllm_awq_config().get_quant_method(layer, prefix)
        from awq2marlin.integrations.vllm.repacked import MarlinRepackedAwqLinearMethod

        return MarlinRepackedAwqLinearMethod(self, prefix)

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        from awq2marlin.integrations.vllm.experts import MarlinNativeMoEMethod

        if _any_below(self.quantization.unquantized_modules, [prefix]):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if _any_below(self.quantization.awq_modules, [prefix]):
            if self.weight_bits == 4 and self.has_zero_points([prefix]):
                return self._vllm_awq_config().get_quant_method(layer, prefix)
            raise refuse(
                "unsupported-engine",
                "its experts are kept in AWQ layout without zero points, which vLLM cannot load. Serve it with "
                "Transformers",
                file=CONFIG_FILENAME,
                tensor=prefix,
            )
        return MarlinNativeMoEMethod(self, layer, prefix)

    def _vllm_awq_config(self) -> QuantizationConfig:
        """Returns vLLM's own config of an AWQ checkpoint, for the modules that are kept in that layout."""
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

        document = {
            "quant_method": "awq",
            "bits": self.weight_bits,
            "group_size": self.group_size,
            "zero_point": True,
            "lm_head": True,
            "modules_to_not_convert": [],
        }
        config = AutoAWQConfig.from_config(document)
        config.packed_modules_mapping = self.packed_modules_mapping
        return config


def _any_below(names: Collection[str], parents: Collection[str]) -> bool:
    """Returns whether one of the names is a module inside one of the parents."""
    prefixes = tuple(f"{parent}." for parent in parents)
    return any(name.startswith(prefixes) for name in names)


def _check_engine() -> None:
    """Refuses settings of vLLM under which Marlin weights would be read wrongly or not at all."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise refuse("unsupported-engine", "vLLM's Marlin kernels need an NVIDIA GPU; this vLLM runs without one")
    if envs.VLLM_MARLIN_INPUT_DTYPE is not None:
        raise refuse(
            "unsupported-engine",
            "VLLM_MARLIN_INPUT_DTYPE is set: it asks for weights prepared for 8-bit activations, which a "
            "Marlin-native checkpoint does not hold. Unset it",
        )
    if envs.VLLM_BATCH_INVARIANT:
        raise refuse(
            "unsupported-engine",
            "VLLM_BATCH_INVARIANT is set, but vLLM's Marlin kernels are not batch invariant. Unset it, or serve the "
            "AWQ checkpoint: 'awq2marlin revert' gives it back",
        )
