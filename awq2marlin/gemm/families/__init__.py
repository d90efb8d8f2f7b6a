"""The families of GEMM kernels: ``<name>.py`` here is the host's side of ``kernels/gemm_<name>.cuh``.

A module in this package with a class of configs is a family, without an entry anywhere else.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

from awq2marlin.gemm.families.base import GemmConfig


def _found() -> list[type[GemmConfig]]:
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    classes = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    return [each for each in classes if issubclass(each, GemmConfig) and not inspect.isabstract(each)]


#: Every family, specialists first: those for fewer tokens, then those for fewer GPUs.
FAMILIES: tuple[type[GemmConfig], ...] = tuple(
    sorted(_found(), key=lambda family: (family.token_ranges[-1].stop, family.capabilities[1], family.header))
)
