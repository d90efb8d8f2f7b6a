"""A quantized output embedding, whose vocabulary engines pad to a multiple of 64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from awq2marlin.errors import refuse


class PaddedVocabulary:
    """Loads the output embedding for a `MarlinLinear` that has this class before it among its bases.

    Other engines have vLLM's loader of output embeddings. It pads rows, which are the vocabulary only where an output
    embedding is not quantized.
    """

    #: The layer's full name.
    prefix: str

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        """Gives the layer empty parameters of one rank's shapes, padded; see `MarlinLinear.create_weights`."""
        loader = partial(self._load, layer)
        super().create_weights(layer, *args, **{**options, "weight_loader": loader})  # type: ignore[misc]

    def _load(self, layer: Any, parameter: Any, loaded: torch.Tensor) -> None:
        """Fills a parameter with a rank's part of the vocabulary, and zeros behind it.

        Args:
            layer: of the engine, which knows its part.
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
