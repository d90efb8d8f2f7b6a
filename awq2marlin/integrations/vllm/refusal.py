"""What is registered on a vLLM of another version: a method that says so when a checkpoint asks for it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from awq2marlin.errors import refuse
from awq2marlin.formats.marlin_native import MARLIN_QUANT_METHOD


def register_refusal(reason: str) -> None:
    """Registers a ``marlin_native`` that refuses every checkpoint.

    Args:
        reason: the sentence to refuse it with.
    """

    class UnsupportedVersionConfig(QuantizationConfig):  # type: ignore[misc]
        """Refuses every checkpoint."""

        def get_name(self) -> str:
            return MARLIN_QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.half, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:  # noqa: ARG003 - vLLM's signature
            raise refuse("unsupported-engine", reason, file="config.json")

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:  # noqa: ARG002
            raise refuse("unsupported-engine", reason, file="config.json")

    register_quantization_config(MARLIN_QUANT_METHOD)(UnsupportedVersionConfig)
