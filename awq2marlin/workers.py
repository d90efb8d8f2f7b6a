"""How many threads to use."""

from __future__ import annotations

import os

#: Beyond this many, memory bandwidth and the disk are the limit, not the processors.
MAX_DEFAULT_WORKERS = 8


def default_workers() -> int:
    """Returns the number of processors this process may use, at most `MAX_DEFAULT_WORKERS`."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_DEFAULT_WORKERS)
