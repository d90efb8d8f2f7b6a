"""The CUDA launch: from checked tensors to a kernel on the current stream of their device."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.checks import GemmTensors, LayerShape, check_gemm
from awq2marlin.gemm.families.base import MIN_CAPABILITY, Box, Dtype, GemmConfig, GemmProblem, sum_splits_source
from awq2marlin.gemm.select import sources_up_to
from awq2marlin.gemm.source import KernelSource, repack_source
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N

if TYPE_CHECKING:
    from cuda.core import Kernel, LaunchConfig, Stream, TensorMapDescriptor

DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "fp16", torch.bfloat16: "bf16"}

_int = ctypes.c_int


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


def describe(shape: LayerShape, size_m: int, dtype: torch.dtype, num_bits: int, device: Device) -> GemmProblem:
    """Returns the product of a layer with ``size_m`` tokens of type ``dtype``, on a device."""
    return GemmProblem(
        size_m,
        shape.size_n,
        shape.size_k,
        shape.group_size,
        num_bits,
        DTYPES[dtype],
        device.capability,
        device.multiprocessors,
    )


def problem_of(tensors: GemmTensors) -> GemmProblem:
    """Checks CUDA tensors and describes their product, for `select.pick_config` and `launch_gemm`.

    Raises:
        TypeError: as `checks.check_gemm` does.
        ValueError: as `checks.check_gemm` does.
    """
    a = tensors.a
    problem = describe(check_gemm(tensors), a.shape[0], a.dtype, tensors.num_bits, device_of(a.device.index))
    return replace(problem, rows_overlap=a.shape[0] > 1 and a.stride(0) < a.shape[1])


def launch_gemm(
    config: GemmConfig, problem: GemmProblem, tensors: GemmTensors, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs one config on checked CUDA tensors, on the current stream of their device.

    Args:
        config: any that serves the problem; `select.pick_config` gives the one for everyday use.
        problem: what the tensors' shapes say.
        tensors: the GEMM's arguments.
        out: where the result goes, contiguous [M, N]; by default a new tensor.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or loaded now.
    """
    a, device = tensors.a, device_of(tensors.a.device.index)
    if out is None:
        out = a.new_empty((problem.size_m, problem.size_n))
    workspace = None
    if config.num_splits > 1 and config.reduction == "workspace":
        workspace = a.new_empty((config.num_splits, problem.size_m, problem.size_n), dtype=torch.float32)
    arguments = _gemm_arguments(config.num_splits, problem, tensors, out, workspace)
    launch_kernel(
        config.source,
        device,
        config.grid(problem),
        config.threads,
        (*_maps(config, tensors), *arguments),
        cluster=config.cluster,
        shared_bytes=config.shared_bytes,
        overlaps=problem.has_clusters,
    )
    if workspace is not None:
        blocks = min(-(-problem.size_m * problem.size_n // 1024), 1 << 16)
        source = sum_splits_source(problem.dtype)
        launch_kernel(source, device, (blocks, 1, 1), 256, arguments, overlaps=problem.has_clusters)
    return out


def _gemm_arguments(
    num_splits: int, problem: GemmProblem, tensors: GemmTensors, out: torch.Tensor, workspace: torch.Tensor | None
) -> tuple[Any, ...]:
    """Returns ``MARLIN_GEMM_PARAMETERS`` of ``kernels/gemm_base.cuh``, in order."""
    a, qweight, scales, qzeros, bias, _ = tensors
    return (
        a.data_ptr(),
        qweight.data_ptr(),
        scales.data_ptr(),
        0 if qzeros is None else qzeros.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        _int(problem.size_m),
        _int(problem.size_n),
        _int(problem.size_k),
        _int(problem.group_size),
        _int(num_splits),
        a.stride(0),
        qweight.stride(0),
        scales.stride(0),
        0 if qzeros is None else qzeros.stride(0),
    )


def _maps(config: GemmConfig, tensors: GemmTensors) -> tuple[TensorMapDescriptor, ...]:
    """Returns what tells the hardware how to copy boxes of some tensors, on their device."""

    def map_of(box: Box) -> TensorMapDescriptor:
        matrix = cast(torch.Tensor, getattr(tensors, box.tensor))
        index = matrix.device.index
        return _tensor_map(matrix.data_ptr(), *matrix.shape, matrix.stride(0), matrix.itemsize, box, index)

    if not config.boxes or torch.cuda.current_device() == tensors.a.device.index:
        return tuple(map_of(box) for box in config.boxes)
    with torch.cuda.device(tensors.a.device.index):
        return tuple(map_of(box) for box in config.boxes)


@functools.lru_cache(maxsize=1 << 12)
def _tensor_map(
    address: int, rows: int, columns: int, stride: int, itemsize: int, box: Box, device_index: int
) -> TensorMapDescriptor:
    """Returns the map of a matrix on the current device: nothing but these numbers, whatever lies there."""
    from cuda.core import TensorMapDescriptorOptions
    from cuda.core.utils import StridedMemoryView

    _bind_thread(device_index)
    facts = {
        "version": 3,
        "data": (address, False),
        "typestr": {2: "<f2", 8: "<i8"}[box.number_bytes],
        "shape": (rows, columns * itemsize // box.number_bytes),
        "strides": (stride * itemsize, box.number_bytes),
    }
    swizzles = type(TensorMapDescriptorOptions((1,)).swizzle)  # cuda-core exports no name for them
    swizzle = swizzles.SWIZZLE_128B if box.is_swizzled else swizzles.NONE
    view = StridedMemoryView.from_any_interface(SimpleNamespace(__cuda_array_interface__=facts), stream_ptr=-1)
    return view.as_tensor_map((box.rows, box.numbers), swizzle=swizzle)


def launch_repack(qweight: torch.Tensor, out: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> None:
    """Repacks a checked CUDA tensor from AWQ to Marlin.

    Args:
        qweight: int32 [K, N/f], AWQ.
        out: int32 [K/16, N*16/f], contiguous.
        size_k: K.
        size_n: N.
        num_bits: 4 or 8.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or loaded now.
    """
    threads = size_k // GPTQ_MARLIN_TILE * (size_n // MARLIN_TILE_N) * 4
    arguments = (qweight.data_ptr(), out.data_ptr(), _int(size_k), _int(size_n), qweight.stride(0))
    launch_kernel(repack_source(num_bits), device_of(qweight.device.index), (-(-threads // 256), 1, 1), 256, arguments)


def load_up_to(largest: GemmProblem, device: Device) -> int:
    """Compiles and loads every kernel that a layer may need, and returns how many they are.

    Args:
        largest: the layer's product for the largest number of tokens to come.
        device: where.

    Raises:
        KernelUnavailableError: one cannot be compiled or loaded.
    """
    sources = sources_up_to(largest)
    load_kernels(sources, device)
    return len(sources)


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


def launch_kernel(
    source: KernelSource,
    device: Device,
    grid: tuple[int, int, int],
    threads: int,
    arguments: tuple[Any, ...],
    *,
    cluster: int = 1,
    shared_bytes: int = 0,
    overlaps: bool = False,
) -> None:
    """Launches a kernel on the current stream of a device.

    Args:
        source: which kernel.
        device: where.
        grid: how many blocks.
        threads: of a block.
        arguments: the kernel's: integers are 64-bit values or addresses, 32-bit ones come as ``ctypes``.
        cluster: blocks along the first dimension of the grid that form a cluster.
        shared_bytes: dynamic shared memory of a block.
        overlaps: whether it may be set up before the stream's last kernel is through.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or loaded now.
    """
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device.index):
            launch_kernel(
                source,
                device,
                grid,
                threads,
                arguments,
                cluster=cluster,
                shared_bytes=shared_bytes,
                overlaps=overlaps,
            )
        return
    kernel = jit.loaded(source, device.index) or _load(source, device, shared_bytes)
    _bind_thread(device.index)
    config = _launch_config(grid, cluster, threads, shared_bytes, overlaps)
    stream = torch.cuda.current_stream(device.index).cuda_stream
    _core_launch()(_stream(stream), config, kernel, *arguments)


def _load(source: KernelSource, device: Device, shared_bytes: int) -> Kernel:
    """Loads a kernel on the current device.

    Raises:
        KernelUnavailableError: it cannot be compiled or loaded, or a graph capture forbids it.
    """
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


@functools.cache
def _core_launch() -> Callable[..., None]:
    from cuda.core import launch

    return cast(Callable[..., None], launch)


@functools.lru_cache(maxsize=256)
def _stream(handle: int) -> Stream:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@functools.lru_cache(maxsize=4096)
def _launch_config(
    grid: tuple[int, int, int], cluster: int, threads: int, shared_bytes: int, overlaps: bool
) -> LaunchConfig:
    from cuda.core import LaunchConfig

    # cuda-core counts clusters, not blocks.
    shape: dict[str, Any] = {"grid": grid}
    if cluster > 1:
        shape = {"grid": (grid[0] // cluster, *grid[1:]), "cluster": (cluster, 1, 1)}
    return LaunchConfig(**shape, block=threads, shmem_size=shared_bytes, programmatic_stream_serialization=overlaps)
