"""Every engine's own classes on a CPU: what is tested here is the same for all."""

import pytest


@pytest.fixture(scope="session", params=["vllm", "sglang"])
def harness(request):
    """The module `harness` of an engine, which imports it."""
    return request.getfixturevalue(f"{request.param}_harness")


@pytest.fixture(scope="session")
def experts(request, harness):
    """The module of the same engine that has its experts."""
    return harness if harness.__name__.endswith("sglang.harness") else request.getfixturevalue("vllm_experts")
