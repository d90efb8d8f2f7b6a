"""What this machine has for running the Marlin GEMM, what is missing, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from awq2marlin.jit import Lack, MachineFacts, machine_facts


@dataclass(frozen=True)
class DoctorResult:
    """What `doctor` found.

    Attributes:
        torch_version: of PyTorch.
        torch_cuda: the CUDA version PyTorch was built for; None for a CPU build.
        machine: driver, devices, run-time compiler, cache, and what is missing.
    """

    torch_version: str
    torch_cuda: str | None
    machine: MachineFacts

    @property
    def ready(self) -> bool:
        """Whether the GEMM runs on a GPU here."""
        return not self.machine.lacks


def doctor() -> DoctorResult:
    """Looks at this machine. Converting, verifying values and reverting need nothing of what it looks for."""
    machine = machine_facts()
    if torch.version.cuda is None:
        lack = Lack(
            f"PyTorch {torch.__version__} is a CPU build.",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        )
        machine = replace(machine, lacks=(*machine.lacks, lack))
    return DoctorResult(torch.__version__, torch.version.cuda, machine)
