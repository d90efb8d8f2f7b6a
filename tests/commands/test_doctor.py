"""What `doctor` says of PyTorch, beside what the machine has, and what it and the compile matrix say without them."""

import subprocess
import sys
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


WITHOUT = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None
{code}
"""

#: A machine that has a driver, for all that `doctor` looks at without the packages that could ask it.
DRIVER = "from awq2marlin.gemm import machine\nmachine.has_driver = lambda: {}\n"
DOCTOR = "from awq2marlin.cli import main\nsys.exit(main(['doctor']))"
COMPILE_MATRIX = "from awq2marlin.gemm.compile_matrix import main\nsys.exit(main(['--workers', '1']))"


def run_without(blocked, code):
    """Runs code in a process that cannot import some packages."""
    script = WITHOUT.format(blocked=blocked, code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_without_pytorch_the_doctor_says_so_in_a_sentence():
    done = run_without(["torch"], DOCTOR)
    assert done.returncode == 1
    assert "PyTorch cannot be imported" in done.stderr
    assert "pip install torch" in done.stderr


def test_without_the_compiler_the_doctor_names_what_brings_it():
    done = run_without(["cuda.bindings", "cuda.bindings.nvrtc"], DRIVER.format(True) + DOCTOR)
    assert done.returncode == 0, "a machine that lacks something is what it is asked about"
    assert "NVRTC      none" in done.stdout
    assert "pip install '.[cuda]'" in done.stdout


@pytest.mark.parametrize("blocked", [["cuda.bindings"], ["cuda"], []], ids=str)
def test_without_a_gpu_nothing_is_offered_to_be_installed(blocked):
    done = run_without(blocked, DRIVER.format(False) + DOCTOR)
    assert done.returncode == 0
    assert "missing    There is no NVIDIA GPU here, or no driver for it." in done.stdout
    assert "pip install" not in done.stdout
    assert "the Marlin GEMM does not run on a GPU here" in done.stdout


@pytest.mark.parametrize("blocked", [["cuda.bindings"], ["cuda.core"], ["cuda"]], ids=lambda blocked: blocked[0])
def test_without_the_compiler_the_compile_matrix_says_so_in_a_sentence(blocked):
    done = run_without(blocked, COMPILE_MATRIX)
    assert done.returncode == 1
    assert "pip install '.[cuda]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_compile_matrix_says_what_it_does_without_docstrings():
    command = [sys.executable, "-OO", "-m", "awq2marlin.gemm.compile_matrix", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "Compiles every kernel for every kind of GPU, without one." in told
    assert "matrix instructions that the assembler had to serialize are failures" in " ".join(told.split())


def test_the_compile_matrix_needs_no_pytorch():
    listed = "from awq2marlin.gemm.compile_matrix import matrix\nprint(len(matrix()) > 0, sys.modules['torch'])"
    assert run_without(["torch"], listed).stdout.split() == ["True", "None"]
