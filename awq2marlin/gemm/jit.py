"""Compiles the CUDA kernels when they are first needed, keeps what it compiled, and loads it.

NVRTC, NVIDIA's compiler library, comes as a wheel: no CUDA toolkit is needed, and to compile (without
running) neither a GPU nor a driver. A compiled kernel goes to a folder that all processes share, under a
name that is a digest of everything that went into it, so that nothing in there is ever out of date.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, headers_digest, kernels_dir
from awq2marlin.installing import how_to_install
from awq2marlin.io.code_cache import CodeCache, cache_folder
from awq2marlin.io.workers import default_workers

if TYPE_CHECKING:
    from cuda.core import Kernel

#: What to type where the run-time compiler is missing.
INSTALL_COMMAND = how_to_install("cuda")

#: NVRTC's own cache (no_cache) would leave the assembler's report empty.
_COMPILE_OPTIONS: dict[str, Any] = {"std": "c++17", "ptxas_options": "-v", "no_cache": True}


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of a kernel, per thread.

    Attributes:
        registers: how many it uses.
        stack_bytes: its frame in (slow) local memory.
        spill_bytes: registers stored to and loaded from local memory.
        is_serialized: whether the assembler had to serialize matrix instructions.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    is_serialized: bool


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code for one architecture, and its price."""

    cubin: bytes
    resources: Resources


def arch_of(capability: tuple[int, int]) -> str:
    """Returns the compiler's name for a compute capability.

    For 9.0 that is ``sm_90a``: its ``wgmma`` exists under no other name.
    """
    major, minor = capability
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}"


@functools.cache
def compiler_version() -> str:
    """Returns NVRTC's version as ``"13.0"``.

    Raises:
        KernelUnavailableError: if NVRTC or its Python bindings cannot be loaded.
    """
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except Exception as exc:  # missing packages and missing libraries raise differently
        raise KernelUnavailableError(
            f"The run-time compiler NVRTC cannot be loaded ({type(exc).__name__}: {exc}). "
            f"To install it: {INSTALL_COMMAND}"
        ) from exc
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelUnavailableError(f"NVRTC does not answer: {error.name}. To reinstall it: {INSTALL_COMMAND}")
    return f"{major}.{minor}"


def check_compiler() -> None:
    """Checks that everything is there that compiling needs.

    Raises:
        KernelUnavailableError: naming what is missing, and the command that brings it.
    """
    compiler_version()
    try:
        import cuda.core  # noqa: F401 - whether it can be imported is the question
    except Exception as exc:  # missing packages and missing libraries raise differently
        message = f"The package cuda-core cannot be imported ({exc}). To install it: {INSTALL_COMMAND}"
        raise KernelUnavailableError(message) from exc


def compile_kernel(source: KernelSource, arch: str) -> CompiledKernel:
    """Compiles a kernel, past the cache. Needs neither a GPU nor a driver.

    Args:
        source: what to compile.
        arch: the architecture, such as ``"sm_90a"``.

    Raises:
        KernelUnavailableError: if the compiler is missing or refuses; the message has its words.
    """
    check_compiler()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(name=source.name, arch=arch, include_path=str(kernels_dir()), **_COMPILE_OPTIONS)
    log = io.StringIO()
    try:
        code = Program(source.text, "c++", options).compile("cubin", logs=log)
    except Exception as exc:  # the bindings have several classes for a refusal
        raise KernelUnavailableError(f"{source.name} does not compile for {arch}:\n{exc}\n{log.getvalue()}") from exc
    return CompiledKernel(bytes(code.code), _read_resources(log.getvalue()))


def _read_resources(log: str) -> Resources:
    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    return Resources(
        registers=total(r"Used (\d+) registers"),
        stack_bytes=total(r"(\d+) bytes stack frame"),
        spill_bytes=total(r"(\d+) bytes spill"),
        is_serialized="serialized" in log,
    )


def kernel_cache() -> CodeCache:
    """Returns the cache of compiled kernels."""
    return CodeCache(cache_folder() / "kernels", ".cubin")


def key_of(source: KernelSource, arch: str) -> str:
    """Returns the digest of everything that a kernel's machine code depends on."""
    digest = hashlib.sha256(headers_digest())
    for part in (source.text, arch, compiler_version(), repr(_COMPILE_OPTIONS)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _say_on_stderr(text: str) -> None:
    print(f"awq2marlin: {text}", file=sys.stderr)


_say: ContextVar[Callable[[str], None]] = ContextVar("say", default=_say_on_stderr)


@contextmanager
def on_compile(say: Callable[[str], None]) -> Iterator[None]:
    """Has `build` report to ``say`` what it compiles, for callers with a display of their own."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def build(source: KernelSource, arch: str) -> bytes:
    """Returns the machine code of a kernel, from the cache or else from the compiler.

    Of several processes that need it at once, one compiles it and the others wait. Says on stderr, or as `on_compile`
    decides, what it compiles: the first use of a kernel takes a second, and nobody should wonder why.

    Raises:
        KernelUnavailableError: if it has to be compiled and cannot be.
    """
    cache, key = kernel_cache(), key_of(source, arch)
    cubin = cache.get(key)
    if cubin is not None:
        return cubin
    with cache.one_at_a_time(key):
        return cache.get(key) or _compile_and_keep(source, arch, cache, key)


def build_all(sources: Iterable[KernelSource], arch: str) -> dict[KernelSource, bytes]:
    """Returns the machine code of kernels, as `build` does, compiling on as many threads as there are workers.

    Raises:
        KernelUnavailableError: if one has to be compiled and cannot be.
    """
    wanted = list(sources)
    if wanted:
        check_compiler()  # which imports it: two threads cannot import cuda-core at the same time
    with ThreadPoolExecutor(default_workers()) as threads:
        # Each in a context of its own, so that whoever listens with `on_compile` is told.
        built = [threads.submit(copy_context().run, build, source, arch) for source in wanted]
        return {source: each.result() for source, each in zip(wanted, built, strict=True)}


def _compile_and_keep(source: KernelSource, arch: str, cache: CodeCache, key: str) -> bytes:
    start = time.perf_counter()
    cubin = compile_kernel(source, arch).cubin
    kept = f"kept in {cache.folder}" if cache.put(key, cubin) else f"not kept: {cache.folder} cannot be written"
    _say.get()(f"compiled {source.name} for {arch} in {time.perf_counter() - start:.1f} s, {kept}")
    return cubin


_loaded: dict[tuple[KernelSource, int], Kernel] = {}
_load_lock = threading.Lock()


def loaded(source: KernelSource, device_index: int) -> Kernel | None:
    """Returns a kernel that `load` has loaded, or None."""
    return _loaded.get((source, device_index))


def load(
    source: KernelSource, device_index: int, capability: tuple[int, int], shared_bytes: int, code: bytes | None = None
) -> Kernel:
    """Returns a kernel ready to be launched on a device whose context is current.

    Args:
        source: which kernel.
        device_index: the device's ordinal in CUDA's own count.
        capability: the device's compute capability.
        shared_bytes: dynamic shared memory that its launches will ask for.
        code: what `build` gave for it; None to build it.

    Raises:
        KernelUnavailableError: if the kernel cannot be compiled or loaded.
    """
    kernel = _loaded.get((source, device_index))
    if kernel is None:
        with _load_lock:
            kernel = _loaded.get((source, device_index))
            if kernel is None:
                kernel = _load(source, device_index, code or build(source, arch_of(capability)), shared_bytes)
                _loaded[source, device_index] = kernel
    return kernel


def _load(source: KernelSource, device_index: int, cubin: bytes, shared_bytes: int) -> Kernel:
    try:
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        kernel = ObjectCode.from_cubin(cubin, name=source.name).get_kernel(ENTRY_POINT)
        handle = driver.CUkernel(int(kernel.handle))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check_driver(driver.cuKernelSetAttribute(limit, shared_bytes, handle, driver.CUdevice(device_index)))
        # The driver loads code when it is first launched, which a graph capture forbids: have it loaded now.
        check_driver(driver.cuKernelGetFunction(handle))
    except KernelUnavailableError:
        raise
    except Exception as exc:
        raise KernelUnavailableError(f"{source.name} cannot be loaded on device {device_index}: {exc}") from exc
    return kernel


def check_driver(result: tuple[object, ...]) -> None:
    """Checks what a call of the driver returned.

    Raises:
        KernelUnavailableError: if that begins with an error's code.
    """
    code = result[0]
    if code != 0:
        raise KernelUnavailableError(f"The CUDA driver answers {getattr(code, 'name', code)}.")
