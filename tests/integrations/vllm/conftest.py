"""vLLM's own classes on a CPU."""

import pytest


@pytest.fixture(scope="session")
def harness(vllm_harness):
    """The module `harness`, which imports vLLM."""
    return vllm_harness


@pytest.fixture(scope="session")
def experts(vllm_experts):
    """The module `experts_harness`, which imports vLLM's experts."""
    return vllm_experts
