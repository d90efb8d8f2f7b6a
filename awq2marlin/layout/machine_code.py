"""The compiled CPU kernels: compiled by Numba once on a machine, afterwards loaded without it.

Importing Numba costs half a second and eighty megabytes, more than converting a small model. So its compiler runs
only where there is no machine code yet: a kernel of `cpu_kernels` becomes LLVM code through `numba.cfunc`, an object
file through llvmlite, and lies in the user's `CodeCache` under a key that holds everything it depends on. Later
processes hand the kernels that they call to llvmlite's linker, which takes a millisecond each. Where no cache can be
written, each process compiles what it needs for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import platform
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq2marlin.io.code_cache import CodeCache, cache_folder

if TYPE_CHECKING:
    from awq2marlin.layout.cpu_kernels import CompiledKernel

#: A kernel: (source, target, table or scratch, sizes). Pointers as addresses; the GIL is released.
Kernel = Callable[..., None]

_KERNELS_FILE = Path(__file__).with_name("cpu_kernels.py")

_lock = threading.Lock()
_functions: dict[str, Kernel] = {}

#: What holds the machine code in this process; it must live as long as the functions.
_engines: list[Any] = []


def kernel(name: str) -> Kernel:
    """Returns a kernel of `cpu_kernels`, compiled.

    Args:
        name: its name there.
    """
    with _lock:
        if name not in _functions:
            _functions[name] = _load(name) or _compile(name)
        return _functions[name]


def address(array: Any) -> int:
    """Returns where a NumPy array's data begins."""
    return int(array.ctypes.data)


def _load(name: str) -> Kernel | None:
    """Returns a kernel from the cache, or None if there is none that can be run."""
    try:
        content = _cache().get(_key(name))
        return None if content is None else _run(content)
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _compile(name: str) -> Kernel:
    """Compiles with Numba and keeps the result, if it can be kept: the next process compiles again otherwise."""
    with _cache().one_at_a_time(_key(name)):
        if done := _load(name):  # another process's work
            return done
        from awq2marlin.layout.cpu_kernels import compile_kernel

        content = _content(compile_kernel(name))
        with contextlib.suppress(OSError):  # the kernels' own file cannot be read: there is no key
            _cache().put(_key(name), content)
        return _run(content)


def _cache() -> CodeCache:
    return CodeCache(cache_folder(), ".o")


def _key(name: str) -> str:
    return f"cpu-{_identity()}-{name}"


@cache
def _identity() -> str:
    """Returns a digest of everything on which machine code depends.

    A version of Numba wants one of llvmlite, so that one stands for both: looking Numba's up takes 10 ms.
    """
    from llvmlite import __version__, binding

    identity = [
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in (_KERNELS_FILE, Path(__file__))),
        __version__,
        sys.version_info[:2],
        platform.machine(),
        binding.get_default_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    ]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _content(compiled: CompiledKernel) -> bytes:
    """Returns what is kept of a kernel: a line of JSON and an object file."""
    head = {"symbol": compiled.symbol, "sizes": compiled.sizes}
    return json.dumps(head).encode() + b"\n" + compiled.code


def _run(content: bytes) -> Kernel:
    """Returns a kernel, linked and ready to be called."""
    line, _, code = content.partition(b"\n")
    head = json.loads(line)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * head["sizes"])
    return prototype(_linked(code, head["symbol"]))


def _linked(code: bytes, symbol: str) -> int:
    """Returns where llvmlite's linker has put a function of an object file."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    place = int(engine.get_function_address(symbol))
    if not place:
        raise ValueError(f"the machine code has no {symbol}")
    _engines.append(engine)
    return place
