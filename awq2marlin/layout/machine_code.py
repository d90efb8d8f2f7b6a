"""The compiled CPU kernels: compiled by Numba once on a machine, afterwards loaded without it.

Importing Numba costs half a second and eighty megabytes, more than converting a small model. So its compiler runs
only where there is no machine code yet: a kernel of `cpu_kernels` becomes LLVM code through `numba.cfunc`, an object
file through llvmlite, and lies in the user's `CodeCache` under a key that holds everything it depends on. Where no
cache can be written, each process compiles what it needs for itself.

On Linux and x86-64 the object file is kept as an image that runs wherever it lies (`elf`), so that later processes do
without llvmlite too, whose import alone takes 20 ms and more. Elsewhere its linker takes the object file.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq2marlin.io.code_cache import CodeCache, cache_folder

if TYPE_CHECKING:
    from awq2marlin.layout.cpu_kernels import CompiledKernel

#: A kernel: (source, target, table or scratch, sizes). Pointers as addresses; the GIL is released.
Kernel = Callable[..., None]

#: What decides the machine code and how it is kept.
_FILES = ("cpu_kernels.py", "elf.py", "machine_code.py")

_HAS_IMAGES = sys.platform == "linux" and platform.machine() == "x86_64"

_lock = threading.Lock()
_functions: dict[str, Kernel] = {}

#: What holds the machine code in this process; it must live as long as the functions.
_running: list[Any] = []


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
    with _cache().one_at_a_time():
        if done := _load(name):  # another process's work
            return done
        from awq2marlin.layout.cpu_kernels import compile_kernel

        content = _content(compile_kernel(name, position_independent=_HAS_IMAGES))
        with contextlib.suppress(OSError):  # the kernels' own file cannot be read: there is no key
            _cache().put(_key(name), content)
        return _run(content)


def _cache() -> CodeCache:
    return CodeCache(cache_folder(), ".o")


def _key(name: str) -> str:
    return f"cpu-{_identity()}-{name}"


@cache
def _identity() -> str:
    """Returns a digest of everything on which machine code depends."""
    identity = [
        *(hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _FILES),
        _version("numba"),
        _version("llvmlite"),
        sys.version_info[:2],
        platform.machine(),
        *_processor(),
    ]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _version(package: str) -> bytes:
    """Returns what tells versions of a package apart: its own file about it, which is found sooner than metadata."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).with_name("_version.py").read_bytes()


def _processor() -> list[str]:
    """Returns what the processor is and can."""
    if _HAS_IMAGES:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            facts = (line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags")))
            return [next(facts) for _ in range(5)]  # of the first processor; its model is two lines
    from llvmlite import binding

    return [binding.get_default_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]


def _content(compiled: CompiledKernel) -> bytes:
    """Returns what is kept of a kernel: a line of JSON and machine code, which is an image if it can be one."""
    from awq2marlin.layout.elf import NotAnImageError, image_of

    head: dict[str, str | int] = {"sizes": compiled.sizes}
    try:
        code, head["entry"] = image_of(compiled.code, compiled.symbol)
    except NotAnImageError:
        code, head["symbol"] = compiled.code, compiled.symbol
    return json.dumps(head).encode() + b"\n" + code


def _run(content: bytes) -> Kernel:
    """Returns a kernel, ready to be called."""
    line, _, code = content.partition(b"\n")
    head = json.loads(line)
    place = _mapped(code) + head["entry"] if "entry" in head else _linked(code, head["symbol"])
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * head["sizes"])(place)


def _mapped(image: bytes) -> int:
    """Returns where an image now lies."""
    memory = mmap.mmap(-1, len(image))
    memory.write(image)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if protect(begin, len(image), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), f"memory cannot be made executable: {os.strerror(ctypes.get_errno())}")
    _running.append(memory)
    return begin


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
    _running.append(engine)
    return place
