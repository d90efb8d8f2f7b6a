"""Calls of our operators that need no gradient go to their CUDA kernels at once.

For an operator with gradients PyTorch's dispatcher calls a Python function that looks whether one is needed, and that
goes back to the dispatcher for the function that does the work. This took more time than a launch does. Here the first
function calls the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_libraries: list[torch.library.Library] = []  # an operator's functions go with the library that brought them


def run_on_cuda(operator: str, run: Callable[..., Any]) -> None:
    """Registers what an operator does on a CUDA device, at once where no gradient is needed.

    Calls that need one, and those under ``torch.compile``, ``torch.func`` or a mode, go the long way round. In PyTorch
    before 2.10 all calls do.

    Args:
        operator: its qualified name; its gradients are registered.
        run: what takes its arguments and does its work.
    """
    namespace, _, name = operator.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    library.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]
    if hasattr(torch.library, "get_kernel"):
        long_way = torch.library.get_kernel(operator, "AutogradCUDA")
        at_once = _unless_gradients_are_needed(run, long_way.call_boxed)
        library.impl(name, at_once, "AutogradCUDA", with_keyset=True)  # type: ignore[no-untyped-call]


def _unless_gradients_are_needed(run: Callable[..., Any], long_way: Callable[..., Any]) -> Callable[..., Any]:
    key = torch._C.DispatchKey
    only = (torch._C.DispatchKeySet(key.AutogradCUDA) | torch._C.DispatchKeySet(key.CUDA)).raw_repr()

    def at_once(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # Whatever else wants to see the call, such as a mode, a compiler or a lazily negated tensor, has a key, too.
        if keys.raw_repr() == only and not (torch.is_grad_enabled() and _is_differentiable(arguments)):
            return run(*arguments)
        return long_way(keys, *arguments)

    return at_once


def _is_differentiable(arguments: tuple[Any, ...]) -> bool:
    for each in arguments:  # noqa: SIM110 - any() takes twice the time
        if isinstance(each, torch.Tensor) and each.requires_grad:
            return True
    return False
