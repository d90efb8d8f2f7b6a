"""The compiled CPU kernels: compiled by Numba once on a machine, afterwards loaded without it.

Importing Numba costs half a second and eighty megabytes, more than converting a small model. So its compiler
runs only where there is no machine code yet: `cpu_kernels` becomes LLVM code through `numba.cfunc`, an
object file through llvmlite, and lies in the user's `CodeCache` under a key that holds everything it depends on.
Later processes hand it to llvmlite's linker, which takes milliseconds. Where no cache can be written, each process
compiles for itself.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from awq2marlin.io.code_cache import CodeCache, cache_folder

#: A kernel: (source, target, table or scratch, two sizes). Pointers as addresses; the GIL is released.
Kernel = Callable[[int, int, int, int, int], None]

_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_KERNELS_FILE = Path(__file__).with_name("cpu_kernels.py")


class _Linked:
    """Machine code in this process; the engine must live as long as the functions."""

    def __init__(self, names: dict[str, str], code: bytes) -> None:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        prototype = ctypes.CFUNCTYPE(None, *_SIGNATURE)
        self.functions: dict[str, Kernel] = {}
        for name, symbol in names.items():
            address = self._engine.get_function_address(symbol)
            if not address:
                raise ValueError(f"the machine code has no {symbol}")
            self.functions[name] = prototype(address)


_lock = threading.Lock()
_linked: _Linked | None = None


def kernel(name: str) -> Kernel:
    """Returns a kernel of `cpu_kernels`, compiled.

    Args:
        name: the function's name there.
    """
    global _linked
    with _lock:
        if _linked is None:
            _linked = _load() or _compile()
    return _linked.functions[name]


def _cache() -> CodeCache:
    return CodeCache(cache_folder(), ".o")


def _key() -> str:
    from llvmlite import binding

    identity = [
        hashlib.sha256(_KERNELS_FILE.read_bytes()).hexdigest(),
        version("numba"),
        version("llvmlite"),
        sys.version_info[:2],
        platform.machine(),
        binding.get_default_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    ]
    return f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}"


def _load() -> _Linked | None:
    """Returns the machine code from the cache, or None if there is none that can be linked."""
    try:
        content = _cache().get(_key())
        if content is None:
            return None
        names, _, code = content.partition(b"\n")
        return _Linked(json.loads(names), code)
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError):
        return None


def _compile() -> _Linked:
    """Compiles with Numba and keeps the result, if it can be kept: the next process compiles again otherwise."""
    from awq2marlin.layout.cpu_kernels import compile_kernels

    names, code = compile_kernels()
    with contextlib.suppress(OSError):  # the kernels' own file cannot be read: there is no key
        _cache().put(_key(), json.dumps(names).encode() + b"\n" + code)
    return _Linked(names, code)


def address(array: Any) -> int:
    """Returns where a NumPy array's data begins."""
    return int(array.ctypes.data)
