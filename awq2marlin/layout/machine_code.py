"""The compiled repack kernels: compiled by Numba once on a machine, afterwards loaded without it.

Importing Numba costs half a second and eighty megabytes, more than converting a small model. So its compiler
runs only where there is no machine code yet: `cpu_kernels` becomes LLVM code through `numba.cfunc`, an
object file through llvmlite, and lies in the user's cache under a key that holds everything it depends on.
Later processes hand it to llvmlite's linker, which takes milliseconds. A damaged file counts as missing; where
no cache can be written, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import platform
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from awq2marlin.io.code_cache import cache_folder, is_private

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


def _cached_file() -> Path:
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
    return cache_folder() / f"repack-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.o"


def _load() -> _Linked | None:
    """Returns the machine code from the cache, or None if it is missing, damaged or not private."""
    try:
        path = _cached_file()
        if not (is_private(path) and is_private(path.parent)):
            return None
        head, _, code = path.read_bytes().partition(b"\n")
        document = json.loads(head)
        if hashlib.sha256(code).hexdigest() != document["sha256"]:
            return None
        return _Linked(document["names"], code)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _compile() -> _Linked:
    """Compiles with Numba and stores the result, if it can be stored."""
    from awq2marlin.layout.cpu_kernels import compile_kernels

    names, code = compile_kernels()
    document = {"names": names, "sha256": hashlib.sha256(code).hexdigest()}
    with contextlib.suppress(OSError):  # no room, read-only: the next process compiles again
        _store(_cached_file(), json.dumps(document).encode() + b"\n" + code)
    return _Linked(names, code)


def _store(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:  # noqa: PTH123 - a descriptor, not a path
            stream.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def address(array: Any) -> int:
    """Returns where a NumPy array's data begins."""
    return int(array.ctypes.data)
