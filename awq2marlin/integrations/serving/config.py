"""What every engine asks a quantization config, answered the same for all of them."""

from __future__ import annotations

import logging
from typing import Any

import torch

from awq2marlin.errors import refuse
from awq2marlin.gemm.families.base import Capability
from awq2marlin.integrations.kernel_choice import reason_without_own
from awq2marlin.integrations.serving.contents import Contents


class ServingConfig:
    """How a Marlin-native checkpoint is loaded; an engine's plugin adds which layer is loaded in which way.

    Attributes:
        contents: what the checkpoint holds, with the names that the engine's model gives the modules.
    """

    contents: Contents

    def __repr__(self) -> str:
        """Returns a line for the engine's log."""
        said = self.contents.quantization
        facts = f"bits={said.bits}, group_size={said.group_size}, zero_point={said.zero_point}"
        return f"{type(self).__name__}({facts}, awq_modules={len(said.awq_modules)})"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the activation types that the kernels take: fp16 and bf16."""
        return [torch.half, torch.bfloat16]

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no file names: the config is always in ``config.json``."""
        return []

    def untie(self, logger: logging.Logger, *configs: Any) -> None:
        """Has a model load the quantized output embedding of its checkpoint, where its config denies that there is one.

        Engines go by ``tie_word_embeddings`` and would leave the tensors out. Where a checkpoint holds an output
        embedding that is not quantized, vLLM and Transformers do the same.

        Args:
            logger: says so.
            configs: of the model, of which those of the text may be parts; before it is built.
        """
        if not self.contents.has_quantized_head:
            return
        tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
        for config in tied:
            config.tie_word_embeddings = False
        if tied:
            logger.warning(
                "config.json says tie_word_embeddings, but the checkpoint has a quantized output embedding, "
                "which is served"
            )

    def refuse_unserved(self, capability: Capability | None) -> None:
        """Refuses weights that only our kernels know, where these cannot serve them.

        Args:
            capability: the GPUs' compute capability; None if it is not known.

        Raises:
            CheckpointError: naming the first such module, and what to do.
        """
        contents = self.contents
        if contents.inventory is not None:
            found = contents.inventory.zero_point_modules
        else:  # no headers were read: the config says it, of no module by name
            found = frozenset({""} if contents.quantization.zero_point else ())
        reason = reason_without_own(capability) if found and contents.bits == 8 else None
        if reason:
            message = f"8 bits with zero points: {reason}"
            raise refuse("unsupported-engine", message, tensor=min(found))
