"""Compiles the CUDA kernels when they are first needed, and keeps what it compiled.

NVRTC, NVIDIA's compiler library, comes as a wheel: no CUDA toolkit is needed, and to compile (without
running) neither a GPU nor a driver. A compiled kernel goes to a folder that all processes share, under a
name that is a digest of everything that went into it, so that nothing in there is ever out of date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.io.code_cache import CACHE_VARIABLE, CodeCache, cache_folder, is_private

if TYPE_CHECKING:
    from cuda.core import Kernel

#: The name of the one entry point of every source that is compiled here.
ENTRY_POINT = "awq2marlin_kernel"

#: What to type where the run-time compiler is missing.
INSTALL_COMMAND = "pip install 'awq2marlin[cuda]'"

#: NVRTC's own cache (no_cache) would leave the assembler's report empty.
_COMPILE_OPTIONS: dict[str, Any] = {"std": "c++17", "ptxas_options": "-v", "no_cache": True}


@dataclass(frozen=True)
class KernelSource:
    """A complete CUDA C++ source with one entry point.

    Attributes:
        name: what messages call it.
        text: the source; its entry point is ``extern "C"`` and bears the name ``ENTRY_POINT``.
    """

    name: str
    text: str


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
def kernels_dir() -> Path:
    """Returns the folder of the CUDA sources: inside an installed package, or beside it in the repository.

    Raises:
        KernelUnavailableError: if it is in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "marlin_layout.cuh").is_file():
            return folder
    raise KernelUnavailableError(
        f"The CUDA sources are missing: no marlin_layout.cuh in {package / 'kernels'}. Reinstall awq2marlin."
    )


@functools.cache
def headers_digest() -> bytes:
    """Returns a SHA-256 over every CUDA header's name and content."""
    digest = hashlib.sha256()
    for path in sorted(kernels_dir().glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


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


def compile_kernel(source: KernelSource, arch: str) -> CompiledKernel:
    """Compiles a kernel, past the cache. Needs neither a GPU nor a driver.

    Args:
        source: what to compile.
        arch: the architecture, such as ``"sm_90a"``.

    Raises:
        KernelUnavailableError: if the compiler is missing or refuses; the message has its words.
    """
    compiler_version()
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
def telling(say: Callable[[str], None]) -> Iterator[None]:
    """Lets :func:`build` tell ``say`` what it compiles, for callers with a display of their own."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def build(source: KernelSource, arch: str) -> bytes:
    """Returns the machine code of a kernel, from the cache or else from the compiler.

    Says on stderr, or as :func:`telling` decides, what it compiles: the first use of a kernel takes a second, and
    nobody should wonder why.

    Raises:
        KernelUnavailableError: if it has to be compiled and cannot be.
    """
    cache, key = kernel_cache(), key_of(source, arch)
    cubin = cache.get(key)
    if cubin is None:
        start = time.perf_counter()
        cubin = compile_kernel(source, arch).cubin
        kept = f"kept in {cache.folder}" if cache.put(key, cubin) else f"not kept: {cache.folder} cannot be written"
        seconds = time.perf_counter() - start
        _say.get()(f"compiled {source.name} for {arch} in {seconds:.1f} s, {kept}")
    return cubin


_loaded: dict[tuple[KernelSource, int], Kernel] = {}
_load_lock = threading.Lock()


def is_loaded(source: KernelSource, device_index: int) -> bool:
    """Tells whether :func:`load` would answer at once."""
    return (source, device_index) in _loaded


def load(source: KernelSource, device_index: int, capability: tuple[int, int], shared_bytes: int) -> Kernel:
    """Returns a kernel ready to be launched on a device whose context is current.

    Args:
        source: which kernel.
        device_index: the device's ordinal in CUDA's own count.
        capability: the device's compute capability.
        shared_bytes: dynamic shared memory that its launches will ask for.

    Raises:
        KernelUnavailableError: if the kernel cannot be compiled or loaded.
    """
    kernel = _loaded.get((source, device_index))
    if kernel is None:
        with _load_lock:
            kernel = _loaded.get((source, device_index))
            if kernel is None:
                kernel = _load(source, device_index, capability, shared_bytes)
                _loaded[source, device_index] = kernel
    return kernel


def _load(source: KernelSource, device_index: int, capability: tuple[int, int], shared_bytes: int) -> Kernel:
    cubin = build(source, arch_of(capability))
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    try:
        kernel = ObjectCode.from_cubin(cubin, name=source.name).get_kernel(ENTRY_POINT)
        handle = driver.CUkernel(int(kernel.handle))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(limit, shared_bytes, handle, driver.CUdevice(device_index)))
        # The driver loads code when it is first launched, which a graph capture forbids: have it loaded now.
        _check(driver.cuKernelGetFunction(handle))
    except KernelUnavailableError:
        raise
    except Exception as exc:
        raise KernelUnavailableError(f"{source.name} cannot be loaded on device {device_index}: {exc}") from exc
    return kernel


def _check(result: tuple[object, ...]) -> None:
    code = result[0]
    if code != 0:
        raise KernelUnavailableError(f"The CUDA driver answers {getattr(code, 'name', code)}.")


# ---- what a machine has ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU, as far as the kernels care.

    Attributes:
        index: its ordinal.
        name: its maker's name for it.
        capability: its compute capability, such as (9, 0).
        memory_bytes: its memory.
        multiprocessors: how many it has.
        is_supported: whether the kernels run on it (8.0 and newer).
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    is_supported: bool


@dataclass(frozen=True)
class Lack:
    """Something that is missing, and what mends it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class MachineFacts:
    """What ``awq2marlin doctor`` prints.

    Attributes:
        driver_version: the CUDA version that the driver serves, such as ``"13.0"``; None without a driver.
        devices: the GPUs that it shows.
        cuda_core_version: of the package that compiles and launches; None if absent.
        nvrtc_version: of the run-time compiler; None if it cannot be loaded.
        kernels_dir: the CUDA sources; None if absent.
        cache_dir: where compiled kernels are kept.
        cached_kernels: how many are there.
        cached_bytes: what they take.
        lacks: what is missing to run the GEMM on a GPU. Empty: all is well.
    """

    driver_version: str | None
    devices: tuple[DeviceFacts, ...]
    cuda_core_version: str | None
    nvrtc_version: str | None
    kernels_dir: Path | None
    cache_dir: Path
    cached_kernels: int
    cached_bytes: int
    lacks: tuple[Lack, ...]


def machine_facts() -> MachineFacts:
    """Looks at this machine. Raises nothing: what cannot be had is among the lacks."""
    lacks: list[Lack] = []
    core = _version_of("cuda-core")
    if core is None:
        lacks.append(Lack("The package cuda-core is not installed.", INSTALL_COMMAND))
    nvrtc = sources = None
    try:
        nvrtc = compiler_version()
    except KernelUnavailableError as exc:
        lacks.append(Lack(str(exc), INSTALL_COMMAND))
    try:
        sources = kernels_dir()
    except KernelUnavailableError as exc:
        lacks.append(Lack(str(exc), "pip install --force-reinstall awq2marlin"))

    driver_version, devices, lack = _driver_facts()
    if lack:
        lacks.append(lack)
    elif not any(device.is_supported for device in devices):
        lacks.append(
            Lack("No GPU of compute capability 8.0 or newer.", "Use a machine with one (A100, RTX 30xx or newer).")
        )

    lacks += _version_lacks(nvrtc, driver_version)
    cache = kernel_cache()
    sizes = [path.stat().st_size for path in cache.files()]
    lacks += _cache_lacks(cache.folder)
    return MachineFacts(
        driver_version, devices, core, nvrtc, sources, cache.folder, len(sizes), sum(sizes), tuple(lacks)
    )


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_facts() -> tuple[str | None, tuple[DeviceFacts, ...], Lack | None]:
    """Asks the driver, if there is one, without creating a context on any device."""
    remedy = "Install NVIDIA's driver; then nvidia-smi lists the GPUs."
    try:
        from cuda.bindings import driver

        (started,) = driver.cuInit(0)
        if started == driver.CUresult.CUDA_ERROR_NO_DEVICE:
            hidden = "See what nvidia-smi lists, and what CUDA_VISIBLE_DEVICES allows."
            return None, (), Lack("The NVIDIA driver shows no GPU.", hidden)
        _check((started,))
        _, version = driver.cuDriverGetVersion()
        _, count = driver.cuDeviceGetCount()
        devices = tuple(_device_facts(driver, index) for index in range(count))
    except ImportError as exc:
        return None, (), Lack(f"The package cuda-bindings cannot be imported ({exc}).", INSTALL_COMMAND)
    except Exception as exc:  # no libcuda, no device, no permission: all the same to us
        return None, (), Lack(f"The NVIDIA driver does not answer ({exc}).", remedy)
    return f"{version // 1000}.{version % 1000 // 10}", devices, None


def _device_facts(api: Any, index: int) -> DeviceFacts:
    names = api.CUdevice_attribute

    def attribute(which: object) -> int:
        return int(api.cuDeviceGetAttribute(which, index)[1])

    capability = (
        attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )
    return DeviceFacts(
        index=index,
        name=api.cuDeviceGetName(128, index)[1].partition(b"\0")[0].decode(),
        capability=capability,
        memory_bytes=int(api.cuDeviceTotalMem(index)[1]),
        multiprocessors=attribute(names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        is_supported=capability >= (8, 0),
    )


def _version_lacks(nvrtc: str | None, driver: str | None) -> list[Lack]:
    """Code of a newer major version of CUDA does not load on an older driver; minor versions go together."""
    if nvrtc is None or driver is None or int(nvrtc.partition(".")[0]) <= int(driver.partition(".")[0]):
        return []
    major = nvrtc.partition(".")[0]
    return [
        Lack(
            f"NVRTC {nvrtc} compiles for CUDA {major}; the driver serves {driver}.",
            f"Install a driver that serves CUDA {major}.",
        )
    ]


def _cache_lacks(folder: Path) -> list[Lack]:
    other = f"export {CACHE_VARIABLE}=/a/folder/of/your/own"
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [Lack(f"Compiled kernels cannot be kept in {folder}.", other)]
    if folder.is_dir() and not is_private(folder):
        return [Lack(f"Others may write {folder}, so kernels in it are not used: each process compiles.", other)]
    return []
