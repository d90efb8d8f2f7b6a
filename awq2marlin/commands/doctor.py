"""What this machine has for running the Marlin GEMM, what is missing, and the command that mends it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from awq2marlin.errors import Problem, UnavailableError
from awq2marlin.gemm.machine import Lack, MachineFacts, has_driver, machine_facts

if TYPE_CHECKING:
    from types import ModuleType


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
    """Returns what this machine has for running the Marlin GEMM; convert, verify and revert need none of it.

    Raises:
        UnavailableError: if PyTorch, which this package installs, cannot be imported: there is nothing to look with.
    """
    try:
        import torch
    except (ImportError, OSError) as exc:  # OSError: a library of its own that cannot be loaded
        message = f"PyTorch cannot be imported ({exc}). To install it: pip install torch"
        raise UnavailableError(Problem("", "", "no-torch", message)) from exc
    machine = machine_facts()
    lacks = (*machine.lacks, *_torch_lacks(torch, machine))
    return DoctorResult(torch.__version__, torch.version.cuda, replace(machine, lacks=lacks))


def _torch_lacks(torch: ModuleType, machine: MachineFacts) -> list[Lack]:
    if not machine.devices and not has_driver():
        return []  # it has nothing to run on, whatever it is built for
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
