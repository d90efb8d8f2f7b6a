"""Functions with an implementation for each class of result, which import none of these classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class ByType(Generic[_Out]):
    """A function whose implementation is chosen by its argument's class, as with `functools.singledispatch`.

    Each implementation names its class only in the annotation of its argument. So a command imports the class of its
    own result and no other, nor what that needs.
    """

    def __init__(self) -> None:
        self._implementations: dict[str, Callable[[Any], _Out]] = {}

    def register(self, function: Callable[[_In], _Out]) -> Callable[[_In], _Out]:
        """Makes a function the implementation for the class that its argument is annotated with; a decorator."""
        name = next(iter(function.__annotations__.values()))
        assert isinstance(name, str), "the module must say: from __future__ import annotations"
        self._implementations[name] = function
        return function

    @property
    def names(self) -> set[str]:
        """The names of the classes that have an implementation."""
        return {*self._implementations}

    def __call__(self, value: object) -> _Out:
        """Calls the implementation for the class of ``value``, or for the nearest of its bases."""
        kinds = [kind.__name__ for kind in type(value).__mro__ if kind.__name__ in self._implementations]
        assert kinds, f"there is no implementation for {type(value).__name__}"
        return self._implementations[kinds[0]](value)
