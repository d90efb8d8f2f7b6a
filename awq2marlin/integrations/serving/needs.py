"""What a plugin uses of its engine, which is internal there: looked up by name before a checkpoint is read.

So an engine is judged by what it has, not by its number. What is missing is named; a version that nobody has tried
gives one warning.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from logging import Logger
from typing import Any

from awq2marlin.errors import printable, refuse
from awq2marlin.formats.names import CONFIG_FILENAME


@dataclass(frozen=True)
class Need:
    """A name that a plugin uses.

    Attributes:
        module: where it is, below the engine's package.
        name: what it is called there, with dots for what is inside.
        arguments: what it is called with, by name.
        attributes: what must be in it, or declared there as that of its instances, or be a name in its constructor.
        optional: further arguments, which it gets where it takes them.
        accepts: what a plugin's own method in its place takes, by name: the engine may call it with nothing else.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()

    def lacks(self, package: str) -> list[str]:
        """Returns what of it is not there, as a reader of the engine's source would write it.

        Args:
            package: the engine's.
        """
        place = f"{package}.{self.module}.{self.name}"
        try:
            found: Any = import_module(f"{package}.{self.module}")
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return [place]
        declared = {*getattr(found, "__annotations__", {}), *_names_in_constructors(found)}
        lost = [f"{place}.{each}" for each in self.attributes if not hasattr(found, each) and each not in declared]
        return lost + [f"{place}({each})" for each in (*self._misfits(found), *self._surprises(found))]

    def _misfits(self, found: Any) -> Iterator[str]:
        """Yields the arguments that it does not take, and those that it needs and does not get."""
        if not self.arguments:
            return
        takes = inspect.signature(found).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in takes):
            yield from (f"{name}=" for name in self.arguments if name not in {each.name for each in takes})
        given = {*self.arguments, *self.optional}
        for each in takes:
            is_needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            if is_needed and each.name not in given:
                yield f"without {each.name}="

    def _surprises(self, found: Any) -> Iterator[str]:
        """Yields the arguments with which it may be called, and a plugin's own method in its place may not."""
        for each in inspect.signature(found).parameters.values() if self.accepts else ():
            if each.name not in self.accepts and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
                yield f"without {each.name}="


def _names_in_constructors(found: Any) -> Iterator[str]:
    """Yields the names in the constructors of a class and its bases, among them what these give to an instance."""
    for each in getattr(found, "__mro__", ()):
        constructor = vars(each).get("__init__")
        yield from getattr(getattr(constructor, "__code__", None), "co_names", ())


def needed_parameters(module: str) -> tuple[Need, ...]:
    """Returns what linear layers use of an engine's classes of parameters, which all engines have from vLLM.

    Args:
        module: where they are, below the engine's package.
    """
    packed = ("data", "output_dim", "packed_dim", "packed_factor", "weight_loader")
    return (
        Need(module, "BasevLLMParameter"),
        Need(module, "ChannelQuantScaleParameter", ("data", "output_dim", "weight_loader")),
        Need(module, "GroupQuantScaleParameter", ("data", "input_dim", "output_dim", "weight_loader")),
        Need(module, "PackedColumnParameter", packed),
        Need(module, "PackedvLLMParameter", (*packed, "input_dim", "marlin_tile_size")),
    )


@dataclass(frozen=True)
class Engine:
    """An engine, and the versions of it that a plugin's tests ran on.

    Attributes:
        name: as people call it.
        package: as Python does.
        tried: the versions, each by as many numbers as tell them apart; at least two.
    """

    name: str
    package: str
    tried: tuple[tuple[int, ...], ...]

    @cache  # noqa: B019 - there is one of each engine
    def missing_reason(self, needs: tuple[Need, ...], version: str) -> str | None:
        """Returns why a plugin does not run on this version, in words, or None if all that it needs is there.

        Args:
            needs: what is looked up.
            version: as the engine says it.
        """
        lost = [each for need in needs for each in need.lacks(self.package)]
        if not lost:
            return None
        return (
            f"{self.name} {printable(version)} lacks what this awq2marlin uses of it: {', '.join(lost)}. It was tried "
            f"with {self._tried()}; install {'one of those' if len(self.tried) > 1 else 'that'}, or a newer "
            "awq2marlin, or get the AWQ checkpoint back with 'awq2marlin revert'"
        )

    def require(self, needs: tuple[Need, ...], version: str) -> None:
        """Refuses a version that lacks something.

        Args:
            needs: what is looked up.
            version: as the engine says it.

        Raises:
            CheckpointError: naming what is missing.
        """
        reason = self.missing_reason(needs, version)
        if reason:
            raise refuse("unsupported-engine", reason, file=CONFIG_FILENAME)

    def untried_warning(self, version: str) -> str | None:
        """Returns what to say of a version that nobody has tried; None for the others.

        Args:
            version: as the engine says it.
        """
        if numbers(version, len(self.tried[0])) in self.tried:
            return None
        return (
            f"{self.name} {printable(version)} was never tried with this awq2marlin; {self._tried()} "
            f"{'were' if len(self.tried) > 1 else 'was'}. All that it uses of {self.name} is there; compare some "
            "answers with those of the AWQ checkpoint"
        )

    @cache  # noqa: B019 - there is one of each engine
    def warn_if_untried(self, version: str, log: Logger) -> None:
        """Says once in a process that nobody has tried a version.

        Args:
            version: as the engine says it.
            log: the engine's.
        """
        warning = self.untried_warning(version)
        if warning:
            log.warning(warning)

    def _tried(self) -> str:
        *others, last = (".".join(map(str, each)) for each in self.tried)
        return f"{', '.join(others)} and {last}" if others else last


def numbers(version: str, count: int) -> tuple[int, ...] | None:
    """Returns the first numbers of a version: (0, 25) for two of ``0.25.1+cu130`` or ``0.25.0rc1``.

    Args:
        version: as an engine says it.
        count: how many.

    Returns:
        None for what is no version, or has fewer numbers.
    """
    found = re.match(r"(\d+(?:\.\d+)*)(?:[.+a-z]|$)", version)
    parts = tuple(map(int, found[1].split("."))) if found else ()
    return parts[:count] if len(parts) >= count else None
