"""SGLang's own classes on a CPU."""

import pytest


@pytest.fixture(scope="session")
def harness(sglang_harness):
    """The module `harness`, which imports SGLang."""
    return sglang_harness


@pytest.fixture(scope="session")
def experts(sglang_harness):
    """The same module: it has SGLang's experts, too."""
    return sglang_harness
