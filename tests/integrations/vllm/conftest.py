"""vLLM's own classes on a CPU, as any rank of a tensor-parallel group.

They need the vLLM wheel, without what it depends on, and the packages that its linear layers import; .ci/run installs
them, and sets AWQ2MARLIN_REQUIRE_VLLM, with which their absence fails instead of skipping.
"""

import importlib
import logging
import os
import sys
import warnings
from unittest import mock

import pytest

from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE, KernelChoice
from tests.skips import NO_VLLM


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Has every test choose its kernel anew, as a process does."""
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    kernels = sys.modules.get("awq2marlin.integrations.vllm.kernels")
    if kernels is not None:
        monkeypatch.setattr(kernels, "CHOICE", KernelChoice("vLLM's Marlin", logging.getLogger("test")))


@pytest.fixture(scope="session")
def harness():
    """The module `harness`, which imports vLLM."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours: what vLLM, and torch's rarer modules, warn of at import
            importlib.import_module("vllm.model_executor.layers.linear")
            made = importlib.import_module("tests.integrations.vllm.harness")
            platform = importlib.import_module("vllm.platforms").current_platform
    except ImportError as error:
        if os.environ.get("AWQ2MARLIN_REQUIRE_VLLM") == "1":
            pytest.fail(f"vLLM must be importable here, but: {error}")
        pytest.skip(NO_VLLM)
    # Before 0.33 vLLM's Marlin layers ask how large their workspace must be, which a CPU does not know.
    with mock.patch.object(type(platform), "num_compute_units", classmethod(lambda *_, **__: 108)):
        yield made


@pytest.fixture(scope="session")
def experts(harness):  # noqa: ARG001 - it decides whether vLLM is there
    """The module `experts_harness`, which imports vLLM's experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("tests.integrations.vllm.experts_harness")
