"""GPU tests are skipped, with a sentence, where no GPU can run them."""

import pytest
import torch

pytest.register_assert_rewrite("gemm_cases")


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "There is no CUDA device here, or torch was built without CUDA."
    if torch.cuda.get_device_capability() < (8, 0):
        return "The kernels need compute capability 8.0; this GPU is older."
    return None


def pytest_collection_modifyitems(items):
    reason = _why_not()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
