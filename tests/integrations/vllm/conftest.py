"""vLLM's own classes on a CPU, as any rank of a tensor-parallel group.

They need the vLLM wheel, without what it depends on, and the packages that its linear layers import; .ci/run installs
them, and sets AWQ2MARLIN_REQUIRE_VLLM, with which their absence fails instead of skipping.
"""

import importlib
import os
import warnings

import pytest


@pytest.fixture(scope="session")
def harness():
    """The module `harness`, which imports vLLM."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours: what vLLM, and torch's rarer modules, warn of at import
            importlib.import_module("vllm.model_executor.layers.linear")
            return importlib.import_module("tests.integrations.vllm.harness")
    except ImportError as error:
        if os.environ.get("AWQ2MARLIN_REQUIRE_VLLM") == "1":
            pytest.fail(f"vLLM must be importable here, but: {error}")
    pytest.skip("vLLM is not installed here; CI installs it, and fails if these tests are skipped.")


@pytest.fixture(scope="session")
def experts(harness):  # noqa: ARG001 - it decides whether vLLM is there
    """The module `experts_harness`, which imports vLLM's experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("tests.integrations.vllm.experts_harness")
