"""How calls of our operators go through PyTorch's dispatcher: at once to their kernels where no gradient is needed.

For an operator with gradients the dispatcher calls a Python function that looks whether one is needed, and that goes
back to the dispatcher for the function that does the work. This took more time than a launch does. Here the first
function calls the second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.autograd import forward_ad

Call = TypeVar("Call", bound=Callable[..., Any])

_libraries: list[torch.library.Library] = []  # an operator's functions go with the library that brought them


def run_on(backend: str, operator: str, run: Callable[..., Any], public_name: str) -> None:
    """Registers what an operator does on a kind of device, at once where no gradient is needed.

    Calls that need one, and those under ``torch.compile``, ``torch.func`` or a mode, go the long way round. In PyTorch
    before 2.10 all calls do. A call with derivatives in forward mode, which would be lost, is refused, and so is one
    with gradients of ``torch.func``, which PyTorch takes of no such operator; before 2.10, under ``torch.func``, only a
    call of the public function is, see `refusing_transforms`.

    Args:
        backend: PyTorch's name for the kind of device: ``CPU`` or ``CUDA``.
        operator: its qualified name; its gradients are registered.
        run: what takes its arguments and does its work.
        public_name: what users call it by.
    """
    if not hasattr(torch.library, "get_kernel"):

        def run_or_refuse(*arguments: Any) -> Any:
            _refuse_transforms(arguments, public_name)
            return run(*arguments)

        _register(operator, run_or_refuse, backend)
        return
    _register(operator, run, backend)
    long_way = torch.library.get_kernel(operator, f"Autograd{backend}").call_boxed

    def refuse_or_go(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        _refuse_transforms(arguments, public_name)
        return long_way(keys, *arguments)

    at_once = _unless_gradients_are_needed(backend, run, refuse_or_go)
    _register(operator, at_once, f"Autograd{backend}", with_keyset=True)


def refusing_transforms(function: Call) -> Call:
    """Decorates the public call of an operator that `run_on` registers.

    PyTorch before 2.10 lets only such a call see the derivatives of ``torch.func``.
    """
    if hasattr(torch.library, "get_kernel"):
        return function

    @wraps(function)
    def refuse_or_call(*arguments: Any, **options: Any) -> Any:
        _refuse_transforms((*arguments, *options.values()), function.__name__)
        return function(*arguments, **options)

    return cast(Call, refuse_or_call)


def refuse_gradients(operator: str, public_name: str) -> None:
    """Registers that an operator has no gradients: a call that needs one says so, before anything is computed.

    `torch.library.register_autograd` would compute first, and takes no operator that writes into its arguments.

    Args:
        operator: its qualified name.
        public_name: what users call it by.
    """
    namespace, _, name = operator.partition("::")
    overload = getattr(getattr(torch.ops, namespace), name).default

    def refuse(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        _refuse_tangents(arguments, public_name)
        if _needs_gradient(arguments):
            raise NotImplementedError(
                f"{public_name} has no gradients, and an argument requires one: "
                "call it under torch.no_grad(), or detach it"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    _register(operator, refuse, "Autograd", with_keyset=True)


def _register(operator: str, function: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    namespace, _, name = operator.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.impl(name, function, key, with_keyset=with_keyset)  # type: ignore[no-untyped-call]
    _libraries.append(library)


def _unless_gradients_are_needed(
    backend: str, run: Callable[..., Any], long_way: Callable[..., Any]
) -> Callable[..., Any]:
    keys_of = torch._C.DispatchKey.__members__
    plain = torch._C.DispatchKeySet(keys_of[backend]) | torch._C.DispatchKeySet(keys_of[f"Autograd{backend}"])
    only = plain.raw_repr()

    def at_once(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # Whatever else wants to see the call, such as a mode, a compiler or a lazily negated tensor, has a key, too.
        if keys.raw_repr() == only and forward_ad._current_level < 0 and not _needs_gradient(arguments):
            return run(*arguments)
        return long_way(keys, *arguments)

    return at_once


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for each in arguments:  # any() takes twice the time
            if isinstance(each, torch.Tensor) and each.requires_grad:
                return True
    return False


def _refuse_transforms(arguments: tuple[Any, ...], public_name: str) -> None:
    """Refuses derivatives that an operator with gradients does not have: those in forward mode, and of ``torch.func``.

    PyTorch would say of the latter that an autograd.Function must override a static method.
    """
    _refuse_tangents(arguments, public_name)
    if torch._C._are_functorch_transforms_active() and _needs_gradient(arguments):
        raise NotImplementedError(
            f"{public_name} has no gradients under torch.func (grad, vjp, jacrev), and an argument requires one: use "
            "backward(), torch.autograd.grad or torch.autograd.functional, or detach it"
        )


def _refuse_tangents(arguments: tuple[Any, ...], public_name: str) -> None:
    """Refuses derivatives in forward mode, as ``torch.func.jvp`` asks for them.

    A tangent that an operator knows nothing of is lost without a word, as if the result did not depend on the argument.
    """
    if forward_ad._current_level < 0:  # nearly always
        return
    for each in arguments:
        if isinstance(each, torch.Tensor) and _has_tangent(each):
            raise NotImplementedError(
                f"{public_name} has no derivatives in forward mode (torch.func.jvp, jacfwd), and an argument has a "
                "tangent: detach it"
            )


def _has_tangent(tensor: torch.Tensor) -> bool:
    if torch._C._functorch.is_gradtrackingtensor(tensor):  # outside of operators: of torch.func.jvp
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
