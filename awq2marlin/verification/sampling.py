"""Which modules a comparison looks at, and where it runs them: choices that are checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from awq2marlin.layout.modules import ModulePlan

#: How many modules to look at: a number, or all of them.
Layers = int | Literal["all"]

#: Where to run modules through the GEMM.
Device = Literal["auto", "cpu", "cuda"]


def check_device(device: str | None) -> None:
    """Refuses a device that is none of the choices, or not there, before any work is done.

    Args:
        device: as the caller gave it.

    Raises:
        ValueError: if it is none of `Device`.
        UnavailableError: if it is ``"cuda"`` and there is no GPU that PyTorch can use.
    """
    if device is None:
        return
    if device not in get_args(Device):
        raise ValueError(f"device must be one of {get_args(Device)}, found {device!r}")
    from awq2marlin.gemm.check import pick_device  # brings torch along

    pick_device(device)


def check_count(name: str, value: object, words: tuple[str, ...]) -> None:
    """Refuses anything but a number from 0 and certain words.

    Args:
        name: the argument's.
        value: what the caller gave.
        words: the words it may be.

    Raises:
        ValueError: naming the argument, what was found and what is needed.
    """
    if value not in words and (type(value) is not int or value < 0):
        raise ValueError(f"{name} must be a number from 0 or {' or '.join(map(repr, words))}, found {value!r}")


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
