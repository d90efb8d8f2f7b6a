"""Where compiled code is kept between processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

#: The environment variable that names the folder.
CACHE_VARIABLE = "AWQ2MARLIN_CACHE"


def cache_folder() -> Path:
    """Returns the folder for compiled code: ``AWQ2MARLIN_CACHE``, or ``awq2marlin`` in the user's cache folder.

    It need not exist yet. A user without a home, as in some containers, has it among the temporary folders.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "awq2marlin"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"awq2marlin-{os.getuid()}"


def is_private(path: Path) -> bool:
    """Returns whether a file or folder belongs to the user and nobody else can write it, where the system knows that.

    Compiled code is code that will run, so it is taken only from a private file in a private folder.

    Raises:
        OSError: if it is not there.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
