"""The engines' own classes on a CPU, as any rank of a group.

They need an engine's wheel, without what it depends on, and the packages that its linear layers import
(requirements.txt in the folders). .ci/run installs them, and sets AWQ2MARLIN_REQUIRE_VLLM and
AWQ2MARLIN_REQUIRE_SGLANG, with which their absence fails instead of skipping.
"""

import importlib
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from unittest import mock

import pytest

from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE, KernelChoice
from tests.skips import NO_SGLANG, NO_VLLM

#: What SGLang's plugins and configs import of packages that are built for GPUs, and no test uses.
NOT_NEEDED = ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional")


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Has every test choose its kernel anew, as a process does."""
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    for engine, its in (("vllm", "vLLM's Marlin"), ("sglang", "SGLang's Marlin")):
        kernels = sys.modules.get(f"awq2marlin.integrations.{engine}.kernels")
        if kernels is not None:
            log = logging.getLogger("test")
            monkeypatch.setattr(kernels, "CHOICE", KernelChoice(its, log))
            monkeypatch.setattr(kernels, "EXPERTS_CHOICE", KernelChoice.of_experts(its, log))


@contextmanager
def importing(engine):
    """Skips, or fails where it is required, if an engine cannot be imported inside the block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours: what engines, and torch's rarer modules, warn of at import
            yield
    except ImportError as error:
        if os.environ.get(f"AWQ2MARLIN_REQUIRE_{engine.upper()}") == "1":
            pytest.fail(f"{engine} must be importable here, but: {error}")
        pytest.skip({"vllm": NO_VLLM, "sglang": NO_SGLANG}[engine])


@pytest.fixture(scope="session")
def vllm_harness():
    """The module `vllm.harness`, which imports vLLM."""
    with importing("vllm"):
        importlib.import_module("vllm.model_executor.layers.linear")
        made = importlib.import_module("tests.integrations.vllm.harness")
        platform = importlib.import_module("vllm.platforms").current_platform
    # Before 0.33 vLLM's Marlin layers ask how large their workspace must be, which a CPU does not know.
    with mock.patch.object(type(platform), "num_compute_units", classmethod(lambda *_, **__: 108)):
        yield made


@pytest.fixture(scope="session")
def sglang_harness():
    """The module `sglang.harness`, which imports SGLang."""
    with importing("sglang"):
        importlib.import_module("transformers").AutoProcessor  # noqa: B018 - looks which packages there are
        stand_in_for(NOT_NEEDED)
        importlib.import_module("sglang.srt.models.registry")
        made = importlib.import_module("tests.integrations.sglang.harness")
    with made.running():
        yield made


def stand_in_for(packages):
    """Lets packages be imported that are not there."""
    for name in packages:
        if name not in sys.modules:
            sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None), __path__=[])


@pytest.fixture(scope="session")
def vllm_experts(vllm_harness):  # noqa: ARG001 - it decides whether vLLM is there
    """The module `vllm.experts_harness`, which imports vLLM's experts."""
    with importing("vllm"):
        return importlib.import_module("tests.integrations.vllm.experts_harness")
