"""Whether vLLM loads weights that are processed already: from another process, or from files of one rank's state."""

from __future__ import annotations

from pathlib import Path

from vllm.config import get_current_vllm_config_or_none

#: Load formats whose files hold what a rank had after processing.
_SHARDED = frozenset({"sharded_state", "runai_streamer_sharded"})

#: Load formats that fill parameters behind the back of their weight loaders.
_WITHOUT_LOADERS = frozenset({"dummy", "tensorizer", "bitsandbytes"}) | _SHARDED

#: What vLLM calls the files of a rank.
_RANK_FILES = ("model-rank-*-part-*.safetensors", "model-pp-*-tp-*-part-*.safetensors")


def are_weights_processed() -> bool:
    """Returns whether tensors come from a process that has finished them (vLLM's weight cache, from 0.33 on)."""
    try:
        from vllm.model_executor.utils import is_weights_pre_processed
    except ImportError:  # before 0.33 there is no such thing
        return False
    return bool(is_weights_pre_processed())


def load_format() -> str:
    """Returns vLLM's name for the way in which the model under construction is loaded; empty if none is."""
    config = get_current_vllm_config_or_none()
    return str(getattr(config.load_config, "load_format", "")) if config is not None else ""


def loads_by_weight_loaders() -> bool:
    """Returns whether the model under construction is filled through the weight loaders of its parameters only."""
    return load_format() not in _WITHOUT_LOADERS


def loads_sharded_state() -> bool:
    """Returns whether the model under construction gets what `save_sharded_state` has written."""
    return load_format() in _SHARDED


def is_sharded_state(root: Path) -> bool:
    """Returns whether a folder holds what `save_sharded_state` has written.

    Args:
        root: the folder.
    """
    return any(True for pattern in _RANK_FILES for _ in root.glob(pattern))
