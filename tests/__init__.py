"""Tests, in folders named after what they test."""

import os

# Of several processes side by side, each computes with one thread: idle ones of PyTorch and NumPy take turns at
# waiting for work, which takes a core from another process. Has to be said before these are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
