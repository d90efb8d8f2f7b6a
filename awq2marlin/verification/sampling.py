"""Which modules a comparison looks at, and where it runs them: choices that are checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from awq2marlin.arguments import Count, kind_of

if TYPE_CHECKING:
    from awq2marlin.layout.modules import ModulePlan

#: How many modules to look at: a number, or all of them.
Modules = Count | Literal["all"]

#: The same, by the name that it used to have.
Layers = Modules

#: Where to run modules through the GEMM.
Device = Literal["auto", "cpu", "cuda"]


def check_device(device: Device | None) -> None:
    """Refuses a device that is none of the choices, or not there, before any work is done.

    Args:
        device: as the caller gave it.

    Raises:
        ValueError: if it is none of `Device`.
        UnavailableError: if it is ``"cuda"`` and there is no GPU that PyTorch can use.
    """
    kind_of(Device | None).check("device", device)
    if device is not None:
        from awq2marlin.gemm.check import pick_device  # brings torch along

        pick_device(device)


def sample_modules(modules: Sequence[ModulePlan], layers: Layers) -> list[ModulePlan]:
    """Returns some modules, one of each shape first, then spread evenly over the model; always the same ones.

    Args:
        modules: all of them, in order.
        layers: how many, or ``"all"``.
    """
    if layers == "all" or layers >= len(modules):
        return list(modules)
    by_shape: dict[tuple[int, ...], int] = {}
    for index, each in enumerate(modules):
        by_shape.setdefault((each.size_k, each.size_n), index)
    spread = [index * len(modules) // layers for index in range(layers)]
    wanted = list(dict.fromkeys([*by_shape.values(), *spread]))[:layers]
    return [modules[index] for index in sorted(wanted)]
