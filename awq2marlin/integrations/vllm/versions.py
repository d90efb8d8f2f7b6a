"""Which versions of vLLM are supported. What the plugin uses of vLLM is internal there and changes between versions."""

from __future__ import annotations

import re

from awq2marlin.errors import printable

#: Versions whose interfaces were read. docs/vllm.md says on which of them the plugin ran on a GPU.
SUPPORTED_VERSIONS = ((0, 25), (0, 33))

#: From here on vLLM's Marlin calls take no activation order and no workspace.
_WITHOUT_ACTIVATION_ORDER = (0, 33)


def minor_version(version: str) -> tuple[int, int] | None:
    """Returns (0, 25) for ``0.25.0``, ``0.25.1+cu130`` or ``0.25.0rc1``; None for what is no version."""
    found = re.match(r"(\d+)\.(\d+)(?:[.+a-z]|$)", version)
    return (int(found[1]), int(found[2])) if found else None


def takes_activation_order(version: str) -> bool:
    """Returns whether Marlin calls of a supported version of vLLM take an index of rows and a workspace.

    Args:
        version: as ``vllm.__version__`` says.
    """
    return (minor_version(version) or _WITHOUT_ACTIVATION_ORDER) < _WITHOUT_ACTIVATION_ORDER


def unsupported_reason(version: str) -> str | None:
    """Returns why the plugin does not run on a version of vLLM, in words, or None if it does.

    Args:
        version: as ``vllm.__version__`` says.
    """
    if minor_version(version) in SUPPORTED_VERSIONS:
        return None
    known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VERSIONS)
    return (
        f"this awq2marlin reads Marlin-native checkpoints in vLLM {known}, but vLLM {printable(version)} is installed; "
        "install one of those, or a newer awq2marlin, or take the AWQ checkpoint back with 'awq2marlin revert'"
    )
