"""Keeping account of what was loaded: engines do not notice when a quantized checkpoint lacks a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import wraps
from typing import Any

from awq2marlin.errors import CheckpointError, Problem

#: Engines' names of the parts of a fused layer, where it does not number them.
_PART_NUMBERS = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}

_WHOLE = "whole"


def shard_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns which part of a fused layer a weight loader is called for: None is all of it, a tuple several.

    Args:
        args: of the call, after the parameter and the tensor.
        kwargs: of the call.
    """
    return kwargs.get("loaded_shard_id", args[0] if args else None)


def part_number(part: Hashable) -> Hashable:
    """Returns the number of a part by the engine's name of it, or the name itself if it has none."""
    return _PART_NUMBERS.get(str(part), part)


class LoadRecord:
    """Which parts of which parameters a layer's weight loader has been called for."""

    def __init__(self, *, sees_everything: bool = True) -> None:
        """Knows of nothing loaded yet.

        Args:
            sees_everything: whether the engine fills parameters through their weight loaders only. If not, nothing is
                required where no loader was called at all.
        """
        self._loaded: dict[str, set[Hashable]] = defaultdict(set)
        self._sees_everything = sees_everything

    def watch(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a weight loader that does what ``loader`` does and remembers that it did.

        Args:
            name: of the parameter, such as ``qweight``.
            loader: the engine's, taking the parameter, the tensor and perhaps the part of a fused layer.
        """

        @wraps(loader)
        def recording_loader(param: Any, loaded_weight: Any, *args: Any, **kwargs: Any) -> Any:
            result = loader(param, loaded_weight, *args, **kwargs)
            shard = shard_of(args, kwargs)
            self.note(name, *(shard if isinstance(shard, (tuple, list)) else (shard,)))
            return result

        return recording_loader

    def note(self, name: str, *parts: Hashable) -> None:
        """Remembers that parts of a parameter were loaded; None is all of it."""
        self._loaded[name].update(_WHOLE if part is None else part_number(part) for part in parts)

    def require(self, modules: list[str], parameters: list[str]) -> None:
        """Refuses a linear layer if a part of a parameter was never loaded.

        Args:
            modules: the names of the checkpoint's modules that make up the layer, in the engine's order.
            parameters: names of its parameters.

        Raises:
            CheckpointError: naming every tensor that is missing.
        """
        self.require_parts(
            {
                f"{module}.{parameter}": (parameter, part)
                for parameter in parameters
                for part, module in enumerate(modules)
            }
        )

    def require_parts(self, wanted: Mapping[str, tuple[str, Hashable]]) -> None:
        """Refuses a layer if something was never loaded, and forgets what was: other weights must be whole, too.

        Args:
            wanted: by the name of each tensor, the parameter that it belongs to and what loaders call its part.

        Raises:
            CheckpointError: naming every tensor that is missing.
        """
        if not self._sees_everything and not self._loaded:
            return
        missing = [
            tensor for tensor, (parameter, part) in wanted.items() if not self._loaded[parameter] & {part, _WHOLE}
        ]
        self._loaded.clear()
        if missing:
            message = "it is missing from the checkpoint, or under another name; download it again, or convert again"
            raise CheckpointError(Problem("", tensor, "missing-tensor", message) for tensor in missing)
