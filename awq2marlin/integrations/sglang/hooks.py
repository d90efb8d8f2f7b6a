"""Where SGLang learns of the method: its table of quantization methods, and two hooks of its plugin framework."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from awq2marlin.formats.marlin_native import MARLIN_QUANT_METHOD
from awq2marlin.integrations.sglang.config import PACKED_LIKE, MarlinNativeConfig

QUANTIZATION_METHODS[MARLIN_QUANT_METHOD] = MarlinNativeConfig
if MARLIN_QUANT_METHOD not in QUANTIZATION_CHOICES:  # what --quantization may be
    QUANTIZATION_CHOICES.append(MARLIN_QUANT_METHOD)


def check(quant_config: Any, model_config: Any, load_config: Any, *_: Any, **__: Any) -> None:
    """Has a checkpoint of ours checked as soon as SGLang has parsed its config, and before it builds the model.

    Args:
        quant_config: what SGLang made of the config.
        model_config: says where the checkpoint is.
        load_config: says in which way it is loaded.

    Raises:
        CheckpointError: naming what is missing or cannot be served, and what to do.
    """
    if isinstance(quant_config, MarlinNativeConfig):
        quant_config.check(model_config, load_config)


def model_architecture(original: Any, model_config: Any) -> Any:
    """Has SGLang choose the model that it takes for its own Marlin methods.

    Mixtral has another one for methods that SGLang does not know, which has no experts' kernels.

    Args:
        original: SGLang's function.
        model_config: whose ``quantization`` it goes by.
    """
    if model_config.quantization != MARLIN_QUANT_METHOD:
        return original(model_config)
    model_config.quantization = PACKED_LIKE
    try:
        return original(model_config)
    finally:
        model_config.quantization = MARLIN_QUANT_METHOD


HookRegistry.register("sglang.srt.model_loader.weight_utils.get_quant_config", check, HookType.AFTER)
HookRegistry.register("sglang.srt.model_loader.utils.get_model_architecture", model_architecture, HookType.AROUND)
