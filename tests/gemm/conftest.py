"""GPU tests are skipped, with a sentence, where no GPU can run them."""

import pytest

from tests.skips import why_no_gpu

pytest.register_assert_rewrite("gemm_cases")


def pytest_collection_modifyitems(items):
    reason = why_no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
