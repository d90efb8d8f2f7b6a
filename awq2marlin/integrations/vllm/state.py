"""Whether vLLM has handed over weights that are processed already, which it does from 0.33 on."""

from __future__ import annotations


def are_weights_processed() -> bool:
    """Returns whether tensors come from a process that has finished them (vLLM's weight cache)."""
    try:
        from vllm.model_executor.utils import is_weights_pre_processed
    except ImportError:  # before 0.33 there is no such thing
        return False
    return bool(is_weights_pre_processed())
