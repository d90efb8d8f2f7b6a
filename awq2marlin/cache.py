"""Where compiled code is kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

#: The environment variable that names the folder.
CACHE_VARIABLE = "AWQ2MARLIN_CACHE"


def cache_folder() -> Path:
    """Returns the folder for compiled code: ``AWQ2MARLIN_CACHE``, or ``awq2marlin`` in the user's cache folder.

    It need not exist yet.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path.home() / ".cache") / "awq2marlin"
