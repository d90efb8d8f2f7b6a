"""What a machine has for running the kernels, and what mends what is missing: for ``awq2marlin doctor``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm.families.base import MIN_CAPABILITY
from awq2marlin.gemm.jit import INSTALL_COMMAND, check_driver, compiler_version, kernel_cache
from awq2marlin.gemm.source import kernels_dir
from awq2marlin.installing import how_to_install
from awq2marlin.io.code_cache import CACHE_VARIABLE, is_private


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


#: What is said where nothing that could be installed would help.
NO_GPU = Lack(
    "There is no NVIDIA GPU here, or no driver for it.",
    "Nothing needs to be installed to convert, verify and revert. On a machine with a GPU, run this command again.",
)


@dataclass(frozen=True)
class MachineFacts:
    """What ``awq2marlin doctor`` prints.

    Attributes:
        driver_version: the CUDA version that the driver serves, such as ``"13.0"``; None without a driver.
        devices: the GPUs that it shows.
        cuda_core_version: of the package that compiles and loads kernels; None if absent.
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
    packages: list[Lack] = []
    core = _version_of("cuda-core")
    if core is None:
        packages.append(Lack("The package cuda-core is not installed.", INSTALL_COMMAND))
    nvrtc = sources = None
    try:
        nvrtc = compiler_version()
    except KernelUnavailableError as exc:
        packages.append(Lack(str(exc), INSTALL_COMMAND))
    driver_version, devices, lack = _driver_facts()
    may_have_gpu = has_driver() and (bool(devices) or lack is None or lack.remedy == INSTALL_COMMAND)
    lacks = packages if may_have_gpu else []  # without a GPU they would only fill the disk
    try:
        sources = kernels_dir()
    except KernelUnavailableError as exc:
        lacks.append(Lack(str(exc), how_to_install()))
    if not has_driver():
        lacks.append(NO_GPU)
    elif lack:
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


def has_driver() -> bool:
    """Returns whether this machine has NVIDIA's driver, without which no GPU can be used."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


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
        check_driver((started,))
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
        is_supported=capability >= MIN_CAPABILITY,
    )


def _version_lacks(nvrtc: str | None, driver: str | None) -> list[Lack]:
    """Code of a newer major version of CUDA does not load on an older driver; minor versions go together."""
    if nvrtc is None or driver is None or int(nvrtc.partition(".")[0]) <= int(driver.partition(".")[0]):
        return []
    major = nvrtc.partition(".")[0]
    return [
        Lack(
            f"NVRTC {nvrtc} compiles for CUDA {major}; the driver supports {driver}.",
            f"Install a driver that supports CUDA {major}.",
        )
    ]


def _cache_lacks(folder: Path) -> list[Lack]:
    other = f"export {CACHE_VARIABLE}=/a/folder/of/your/own"
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [Lack(f"Compiled kernels cannot be kept in {folder}.", other)]
    if folder.is_dir() and not is_private(folder):
        return [
            Lack(
                f"Other users can write to {folder}, so kernels in it are not used: each process compiles its own.",
                other,
            )
        ]
    return []
