"""What the kernels ask of CUDA's driver: a device's facts, loaded kernels, and launches that cost the host little.

Torch and cuda-bindings are the only ways to the driver here; cuda-core has compiled and loaded the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.families.base import MIN_CAPABILITY, Box
from awq2marlin.gemm.source import KernelSource

if TYPE_CHECKING:
    from cuda.core import Kernel


# ---- devices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What kernels need to know of a GPU.

    Attributes:
        index: its ordinal.
        capability: its compute capability.
        multiprocessors: how many it has.
    """

    index: int
    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def device_of(index: int) -> Device:
    """Returns what kernels need to know of a device.

    Raises:
        KernelUnavailableError: its compute capability is below 8.0.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (MIN_CAPABILITY, capability))
        raise KernelUnavailableError(
            f"cuda:{index} ({properties.name}) must have compute capability {needed} or newer, found {found}"
        )
    return Device(index, capability, properties.multi_processor_count)


# ---- loaded kernels -----------------------------------------------------------------------------------------


def load_kernels(sources: Mapping[KernelSource, int], device: Device) -> None:
    """Compiles and loads kernels, each with the shared memory in bytes that its launches ask for.

    Raises:
        KernelUnavailableError: one cannot be compiled or loaded.
    """
    missing = [source for source in sources if jit.loaded(source, device.index) is None]
    codes = jit.build_all(missing, jit.arch_of(device.capability))
    with torch.cuda.device(device.index):
        _bind_thread(device.index)
        for source, code in codes.items():
            jit.load(source, device.index, device.capability, sources[source], code)


def _loaded(source: KernelSource, device: Device, shared_bytes: int) -> Kernel:
    """Returns a kernel on a device, and loads it there if need be.

    Raises:
        KernelUnavailableError: it cannot be compiled or loaded, or a graph capture forbids it.
    """
    kernel = jit.loaded(source, device.index)
    if kernel is not None:
        return kernel
    with torch.cuda.device(device.index):
        if torch.cuda.is_current_stream_capturing():
            raise KernelUnavailableError(
                f"{source.name} is not loaded yet, and a CUDA graph capture forbids loading. "
                "Before the capture, call awq2marlin.warm_up for the layer, or warm_up_experts for one of experts."
            )
        _bind_thread(device.index)
        return jit.load(source, device.index, device.capability, shared_bytes)


_thread = threading.local()


def _bind_thread(device_index: int) -> None:
    """Gives a thread that is new to CUDA a context: torch puts that off until its own first call needs one."""
    if not getattr(_thread, "is_bound", False):
        from cuda.core import Device as CoreDevice

        CoreDevice(device_index).set_current()
        _thread.is_bound = True


# ---- launches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """How a kernel's blocks are started.

    Attributes:
        grid: how many.
        threads: of a block.
        cluster: blocks along the first dimension of the grid that form a cluster.
        shared_bytes: dynamic shared memory of a block.
        overlaps: whether they may be set up before the stream's last kernel is through.
    """

    grid: tuple[int, int, int]
    threads: int
    cluster: int = 1
    shared_bytes: int = 0
    overlaps: bool = False


class PreparedKernel:
    """A kernel on a device with all that is the same in each of its launches; a launch brings the addresses.

    The driver reads a launch from memory that is laid out once. Each of the threads that launch at the same time has
    such memory of its own.

    Attributes:
        source: which kernel.
    """

    def __init__(
        self,
        source: KernelSource,
        device: Device,
        blocks: Blocks,
        maps: int,
        addresses: int,
        numbers: tuple[int, ...],
    ) -> None:
        """Compiles and loads the kernel, if that has not been done.

        Args:
            source: which kernel.
            device: where.
            blocks: how it is started.
            maps: how many of its parameters are tensor maps; they come first.
            addresses: how many are addresses; they come next.
            numbers: the rest, of 32 or 64 bits.

        Raises:
            KernelUnavailableError: the kernel cannot be compiled or loaded now.
        """
        self.source = source
        self._device_index = device.index
        self._blocks = blocks
        self._driver = _driver()
        self._launch = self._driver.cuLaunchKernelEx
        self._kernel = self._driver.CUfunction(int(_loaded(source, device, blocks.shared_bytes).handle))
        self._sizes = (_MAP_BYTES,) * maps + (8,) * (addresses + len(numbers))
        self._numbers = struct.pack(f"{len(numbers)}q", *numbers)  # of a number of 32 bits, the lower half is read
        self._write = struct.Struct(f"{_MAP_BYTES}s" * maps + f"{addresses}Q").pack_into
        self._idle: list[_Memory] = []

    def __call__(self, *values: int | bytes) -> None:
        """Launches it on the current stream of its device.

        Args:
            values: the maps, then the addresses.

        Raises:
            KernelUnavailableError: the driver refuses.
        """
        index = self._device_index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                self(*values)
            return
        _bind_thread(index)
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = _Memory(self._driver, self._blocks, self._sizes, self._numbers)
        self._write(memory.parameters, 0, *values)
        memory.config.hStream = _stream_of(index)
        result = self._launch(memory.config, self._kernel, memory.pointers, 0)
        self._idle.append(memory)
        jit.check_driver(result)


class _Memory:
    """What the driver reads of a launch.

    Attributes:
        parameters: one after the other.
        pointers: the address of their addresses.
        config: the launch without them.
    """

    def __init__(self, driver: Any, blocks: Blocks, sizes: tuple[int, ...], numbers: bytes) -> None:
        self.parameters = (ctypes.c_char * sum(sizes))()
        start = ctypes.addressof(self.parameters)
        ctypes.memmove(start + sum(sizes) - len(numbers), numbers, len(numbers))
        starts = accumulate(sizes[:-1], initial=start)
        self._addresses = (ctypes.c_void_p * len(sizes))(*starts)
        self.pointers = ctypes.addressof(self._addresses)
        self.config = _launch_config(driver, blocks)


def _launch_config(driver: Any, blocks: Blocks) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = blocks.threads, 1, 1
    config.sharedMemBytes = blocks.shared_bytes
    names, attributes = driver.CUlaunchAttributeID, []
    if blocks.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = blocks.cluster, 1, 1
        attributes.append(cluster)
    if blocks.overlaps:
        overlap = driver.CUlaunchAttribute()
        overlap.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        attributes.append(overlap)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@functools.cache
def _driver() -> ModuleType:
    from cuda.bindings import driver

    return cast(ModuleType, driver)


def _public_stream_of(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


#: Returns the handle of a device's current stream. Torch's public way makes an object for it, which takes 1 us.
_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream_of)


# ---- tensor maps --------------------------------------------------------------------------------------------

_MAP_BYTES = 128


@functools.lru_cache(maxsize=1 << 12)
def tensor_map(shape: tuple[int, ...], stride: int, itemsize: int, box: Box, device_index: int, address: int) -> bytes:
    """Returns what tells the hardware how to copy boxes of a matrix: nothing but these numbers, whatever lies there.

    Args:
        shape: rows and columns.
        stride: from row to row, in elements.
        itemsize: of an element, in bytes.
        box: what is copied at a time.
        device_index: where it is.
        address: of its first element.

    Raises:
        KernelUnavailableError: the driver refuses.
    """
    if torch.cuda.current_device() != device_index:
        with torch.cuda.device(device_index):
            return tensor_map(shape, stride, itemsize, box, device_index, address)
    _bind_thread(device_index)
    driver = _driver()
    rows, columns = shape
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    kind = {2: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 8: types.CU_TENSOR_MAP_DATA_TYPE_INT64}[box.number_bytes]
    swizzle = swizzles.CU_TENSOR_MAP_SWIZZLE_128B if box.is_swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE

    long, short = driver.cuuint64_t, driver.cuuint32_t
    code, found = driver.cuTensorMapEncodeTiled(
        kind,
        2,
        address,
        [long(columns * itemsize // box.number_bytes), long(rows)],
        [long(stride * itemsize)],
        [short(box.numbers), short(box.rows)],
        [short(1), short(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    jit.check_driver((code,))
    return ctypes.string_at(found.getPtr(), _MAP_BYTES)
