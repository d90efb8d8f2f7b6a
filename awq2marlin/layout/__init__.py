"""The layouts as mathematics: how Marlin orders weights, scales and zero points, and the code that reorders them.

The functions for engines live in `torch_functions` and are names of this package too: it imports torch when one is
asked for.
"""

from __future__ import annotations

from typing import Any

#: Names of `torch_functions`, by what vLLM calls them.
_TORCH_FUNCTIONS = (
    "awq_marlin_repack",
    "awq_to_marlin_zero_points",
    "get_scale_perms",
    "marlin_awq_repack",
    "marlin_make_empty_g_idx",
    "marlin_make_workspace",
    "marlin_permute_scales",
    "marlin_to_awq_zero_points",
    "marlin_unpack_zero_points",
    "marlin_unpermute_scales",
    "marlin_zero_points",
    "pack_cols",
    "replace_parameter",
    "unpack_cols",
    "verify_marlin_supported",
    "verify_marlin_supports_shape",
)


def __getattr__(name: str) -> Any:
    """Returns a function of `torch_functions` (PEP 562)."""
    if name not in _TORCH_FUNCTIONS:
        raise AttributeError(f"module 'awq2marlin.layout' has no attribute {name!r}")
    from awq2marlin.layout import torch_functions

    return getattr(torch_functions, name)
