"""What this machine has for running the Marlin GEMM, what is missing, and the command that mends it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from awq2marlin.gemm.machine import Lack, MachineFacts, machine_facts


@dataclass(frozen=True)
class DoctorResult:
    """What `doctor` found.

    Attributes:
        torch_version: of PyTorch.
        torch_cuda: the CUDA version PyTorch was built for; None if for none.
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
    lacks = (*machine.lacks, *_torch_lacks(machine))
    return DoctorResult(torch.__version__, torch.version.cuda, replace(machine, lacks=lacks))


def _torch_lacks(machine: MachineFacts) -> list[Lack]:
    if torch.version.cuda is None:
        return [
            Lack(
                f"PyTorch {torch.__version__} is not built for CUDA.",
                "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
            )
        ]
    with warnings.catch_warnings(record=True) as said:  # why not, in PyTorch's words
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable or not machine.devices:  # without a device the driver's own lack says enough
        return []
    why = f" ({str(said[-1].message).splitlines()[0]})" if said else ""
    return [
        Lack(
            f"PyTorch {torch.__version__} cannot use the GPU{why}.",
            f"Install PyTorch for CUDA {machine.driver_version} or older (https://pytorch.org), or a newer driver.",
        )
    ]
