"""Which module of a checkpoint a layer of SGLang is.

SGLang names the layers of many models otherwise than their files do, and turns one into the other in each model's code
while it loads. So a layer is looked for by its own name first, then by as much of the end of it as is found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property


class Names:
    """The names of a checkpoint's modules, found by the names of layers."""

    def __init__(self, modules: Collection[str], *, is_complete: bool) -> None:
        """Knows modules.

        Args:
            modules: their names.
            is_complete: whether these are all that the checkpoint has; else only whole names are found, as another
                of the same end may be missing.
        """
        self._modules = frozenset(modules)
        self._is_complete = is_complete

    def find(self, layer: str) -> str | None:
        """Returns the module that a layer is; None if there is none, or it may be several.

        Args:
            layer: the full name that SGLang has for it.
        """
        return self._find(layer, self._modules, self._by_end)

    def find_parent(self, layer: str) -> str | None:
        """Returns the parent of modules that a layer is; None if there is none, or it may be several.

        Args:
            layer: the full name that SGLang has for it, such as that of experts.
        """
        return self._find(layer, self._parents, self._parents_by_end)

    def near(self, layer: str) -> list[str]:
        """Returns the modules beside a layer that has no name in the checkpoint; empty if there are none.

        Args:
            layer: the full name that SGLang has for it.
        """
        parent = self.find_parent(layer.rpartition(".")[0])
        return [] if parent is None else sorted(name for name in self._modules if name.startswith(f"{parent}."))

    def _find(self, layer: str, names: Collection[str], by_end: dict[str, list[str]]) -> str | None:
        if layer in names or not self._is_complete:
            return layer if layer in names else None
        for end in _ends(layer):
            if end in by_end:
                return by_end[end][0] if len(by_end[end]) == 1 else None
        return None

    @cached_property
    def _parents(self) -> frozenset[str]:
        return frozenset(parent for name in self._modules for parent in _parents(name))

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        return _grouped(self._modules)

    @cached_property
    def _parents_by_end(self) -> dict[str, list[str]]:
        return _grouped(self._parents)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _ends(name: str) -> Iterator[str]:
    """Yields the ends of a name of two parts or more, the longest first; of a name of one part, that."""
    parts = name.split(".")
    for first in range(max(len(parts) - 1, 1)):
        yield ".".join(parts[first:])


def _grouped(names: Collection[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            found[".".join(parts[first:])].append(name)
    return found
