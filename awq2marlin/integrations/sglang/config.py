"""The quantization config ``marlin_native``: which layer of a model is loaded in which way.

SGLang imports this module in every process, so the methods, with the large modules they need, are imported only when
a layer asks for one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sglang
import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import get_device_capability, is_cuda

from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.integrations.kernel_choice import setting
from awq2marlin.integrations.serving.config import ServingConfig
from awq2marlin.integrations.serving.contents import Contents, Layout
from awq2marlin.integrations.serving.inventory import (
    Inventory,
    cached_folder,
    hub_metadata,
    inventory_of,
    read_inventory,
    tensors_of,
)
from awq2marlin.integrations.sglang.names import Names
from awq2marlin.integrations.sglang.needs import ALWAYS, EXPERTS, SGLANG

logger = logging.getLogger("sglang.awq2marlin")

#: The method of SGLang whose tensors lie as ours do: columns last, packed. Its models ask for the name where they join
#: tensors themselves.
PACKED_LIKE = "awq_marlin"

#: SGLang's Marlin kernels run on Ampere and later.
_MIN_CAPABILITY = 80

#: Ways of loading that fill parameters through their weight loaders only, so that what is missing is noticed.
_BY_WEIGHT_LOADERS = frozenset({"auto", "safetensors", "mistral", "npcache", "fastsafetensors", "instanttensor",
                                "runai_streamer"})  # fmt: skip

#: What SGLang's models join, where they do not say it themselves.
_JOINED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}

#: What SGLang calls the experts that every token goes through.
SHARED_EXPERTS = ("shared_experts", "shared_expert")


class MarlinNativeConfig(ServingConfig, QuantizationConfig):  # type: ignore[misc]
    """How a Marlin-native checkpoint is loaded.

    Attributes:
        contents: what the checkpoint holds, with the names that SGLang's model gives the modules, where it says so.
        by_weight_loaders: whether SGLang fills parameters through their weight loaders only.
    """

    def __init__(self, quantization: Quantization) -> None:
        """Takes what the checkpoint's config says."""
        super().__init__()
        self.contents = Contents(quantization)
        self.by_weight_loaders = True

    @classmethod
    def get_name(cls) -> str:
        """Returns ``awq_marlin``, by which SGLang's models know how tensors lie that they join themselves."""
        return PACKED_LIKE

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability, times ten."""
        return _MIN_CAPABILITY

    @staticmethod
    def get_scaled_act_names() -> list[str]:
        """Returns no names: the weights need no activation to be scaled."""
        return []

    @staticmethod
    def get_cache_scale(name: str) -> str | None:  # noqa: ARG004 - SGLang's interface
        """Returns None: no tensor is a scale of the cache. Some of SGLang's models ask for it without a check."""
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MarlinNativeConfig:
        """Returns the config that a ``quantization_config`` describes.

        Args:
            config: the checkpoint's, and what SGLang adds: ``packed_modules_mapping``, what the model joins.

        Raises:
            CheckpointError: if it is malformed, of a newer format, or this SGLang lacks something that serving takes.
        """
        SGLANG.require(ALWAYS, sglang.__version__)
        SGLANG.warn_if_untried(sglang.__version__, logger)
        made = cls(MARLIN_NATIVE.read_config(config, CONFIG_FILENAME))
        made.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return made

    def check(self, model_config: Any, load_config: Any) -> None:
        """Checks, before the model is built, that SGLang can serve the checkpoint and that it is complete.

        Args:
            model_config: SGLang's; says where the checkpoint is.
            load_config: SGLang's; says in which way it is loaded.

        Raises:
            CheckpointError: naming what is missing or cannot be served, and what to do.
        """
        _check_engine()
        way = load_config.load_format
        self.by_weight_loaders = str(getattr(way, "value", way)) in _BY_WEIGHT_LOADERS
        if self.by_weight_loaders:  # otherwise the files may hold other names, one rank's shapes, or nothing
            self.untie(logger, model_config.hf_config, model_config.hf_text_config)
            inventory = self._read_inventory(model_config, load_config)
            self._take(replace(self.contents, inventory=inventory))
        self.refuse_unserved(_capability())

    def _read_inventory(self, model_config: Any, load_config: Any) -> Inventory | None:
        place, revision = str(model_config.model_path), model_config.revision
        folder = Path(place) if Path(place).is_dir() else cached_folder(place, revision, load_config.download_dir)
        if folder is not None:
            return read_inventory(folder, self.contents.quantization)
        metadata = hub_metadata(place, revision)
        if metadata is None:
            logger.warning(
                "awq2marlin could not read the headers of %s beforehand; missing tensors are found while loading",
                printable(place),
            )
            return None
        return inventory_of(tensors_of(metadata), self.contents.quantization, model_config.hf_config.to_dict())

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Gives the modules the names that a model of SGLang has for them.

        Args:
            hf_to_sglang_mapper: SGLang's mapping from names in the file to its own.
        """
        self._take(self.contents.renamed(hf_to_sglang_mapper.apply_list))

    def _take(self, contents: Contents) -> None:
        self.contents = contents
        self.__dict__.pop("names", None)  # those of other contents

    def can_fuse_shared_expert(self) -> bool:
        """Returns whether SGLang may put the shared experts among the others, where it can do that for the model."""
        said = self.contents.quantization
        lists = (said.awq_modules, said.unquantized_modules, said.padded_modules)
        return not any(f".{shared}." in name for names in lists for name in names for shared in SHARED_EXPERTS)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns how a layer of SGLang loads and applies its weights; None for layers that are never quantized.

        Args:
            layer: of SGLang.
            prefix: its full name.

        Raises:
            CheckpointError: if a layer joins modules of which some are quantized and some are not.
        """
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
        from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, FusedMoE):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        return None

    @cached_property
    def names(self) -> Names:
        """The names of the checkpoint's modules."""
        said, inventory = self.contents.quantization, self.contents.inventory
        known = said.awq_modules | said.unquantized_modules | said.padded_modules.keys()
        return Names(known | inventory.modules if inventory else known, is_complete=inventory is not None)

    def parts(self, prefix: str) -> list[str]:
        """Returns the names of the checkpoint's modules that make up a layer, in SGLang's order.

        Args:
            prefix: the layer's full name, such as ``model.layers.0.self_attn.qkv_proj``.
        """
        whole = self.names.find(prefix)
        if whole is not None:  # also what is joined in the file already
            return [whole]
        parent, dot, name = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(name)
        parts = joined if isinstance(joined, list) else _JOINED.get(name, [name])
        wanted = [f"{parent}{dot}{part}" for part in parts]
        found = [name for name in map(self.names.find, wanted) if name is not None]
        return found or wanted

    def layout(self, prefix: str) -> Layout:
        """Returns the layout of a layer; where the checkpoint has no such name, that of what is beside it.

        Args:
            prefix: the layer's full name.

        Raises:
            CheckpointError: if some of its modules are quantized and some are not.
        """
        parts = self.parts(prefix)
        if not any(map(self.names.find, parts)):
            beside = {self.contents.layout([name]) for name in self.names.near(prefix)}
            if beside == {"none"}:  # an encoder of images, say, whose layers have other names in SGLang
                return "none"
        return self.contents.layout(parts)

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        from awq2marlin.integrations.sglang.linear import MarlinNativeLinearMethod

        if self.layout(prefix) == "none":
            return UnquantizedLinearMethod()
        return MarlinNativeLinearMethod(self, prefix, self.parts(prefix))

    def _head_method(self, prefix: str) -> QuantizeMethodBase | None:
        from awq2marlin.integrations.sglang.linear import OutputEmbeddingMethod

        if self.names.find(prefix) is None or self.layout(prefix) != "awq":
            return None
        return OutputEmbeddingMethod(self, prefix, self.parts(prefix))

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        SGLANG.require(EXPERTS, sglang.__version__)
        from awq2marlin.integrations.sglang.experts import MarlinNativeMoEMethod

        parent = self.names.find_parent(prefix) or prefix
        if self.contents.layout_of_experts(parent) == "none":
            return None  # SGLang then takes its own for experts that are not quantized
        return MarlinNativeMoEMethod(self, layer, parent)


def _check_engine() -> None:
    """Refuses settings of SGLang under which Marlin weights would be read wrongly or not at all."""
    if not is_cuda():
        raise refuse("unsupported-engine", "SGLang's Marlin kernels need an NVIDIA GPU; this SGLang runs without one")
    setting()
    if get_exec().deterministic.enable_deterministic_inference:
        raise refuse(
            "unsupported-engine",
            "--enable-deterministic-inference is set, but Marlin kernels are not batch invariant. Leave it out, or "
            "serve the AWQ checkpoint: 'awq2marlin revert' gives it back",
        )


def _capability() -> tuple[int, int] | None:
    """Returns the compute capability of the GPUs; None if it is not known."""
    major, minor = get_device_capability()
    return None if major is None or minor is None else (major, minor)
