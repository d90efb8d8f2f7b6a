"""What `doctor` says of PyTorch, beside what the machine has."""

import warnings
from pathlib import Path

import pytest
import torch

from awq2marlin import doctor
from awq2marlin.commands import doctor as diagnosis
from awq2marlin.gemm.machine import DeviceFacts, MachineFacts

GPU = DeviceFacts(0, "NVIDIA H200", (9, 0), 1 << 37, 132, is_supported=True)


@pytest.fixture
def machine(monkeypatch):
    """A machine that lacks nothing, with a PyTorch that is built for CUDA and uses the GPU."""
    facts = MachineFacts("13.0", (GPU,), "1.2.2", "13.0", Path("kernels"), Path("cache"), 0, 0, ())
    monkeypatch.setattr(diagnosis, "machine_facts", lambda: facts)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("machine")
def test_a_machine_that_lacks_nothing_is_ready():
    result = doctor()
    assert result.ready
    assert result.machine.lacks == ()


@pytest.mark.usefixtures("machine")
def test_pytorch_without_cuda_is_a_lack(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (lack,) = doctor().machine.lacks
    assert "is not built for CUDA" in lack.what
    assert lack.remedy.startswith("pip install ")


@pytest.mark.usefixtures("machine")
def test_pytorch_that_cannot_use_the_gpu_is_a_lack_in_its_own_words(monkeypatch):
    def unavailable():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    result = doctor()
    assert not result.ready
    (lack,) = result.machine.lacks
    assert "cannot use the GPU (The NVIDIA driver on your system is too old)" in lack.what
