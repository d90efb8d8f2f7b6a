"""The Marlin GEMM as a torch operator: checks, the exact CPU implementation, the CUDA launch.

``torch.ops.awq2marlin.marlin_gemm`` and ``torch.ops.awq2marlin.awq_marlin_repack`` work under
``torch.compile`` and ``torch.export``. On a CUDA device they run the kernels of ``kernels/``, on the current
stream; on a CPU, `gemm.cpu` and `layout`. ``kernels/README.md`` explains the layout.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import cpu, jit
from awq2marlin.gemm.families.base import MIN_CAPABILITY, Dtype, GemmConfig, GemmProblem, sum_splits_source
from awq2marlin.gemm.select import pick_config, sources_up_to
from awq2marlin.gemm.source import KernelSource, repack_source
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.marlin import ALIGNMENTS, GPTQ_MARLIN_TILE, MARLIN_SUPPORTED_GROUP_SIZES, MARLIN_TILE_N
from awq2marlin.layout.packing import AWQ_PACK_ORDER, inverse_order

if TYPE_CHECKING:
    from cuda.core import LaunchConfig, Stream

_GROUP_SIZES = tuple(size for size in MARLIN_SUPPORTED_GROUP_SIZES if size > 0)
_DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "fp16", torch.bfloat16: "bf16"}

#: Kernels count the distance between the tokens of a block in 32 bits.
_MAX_TOKEN_STRIDE = 1 << 23


# ---- the public calls -------------------------------------------------------------------------------------


def marlin_gemm(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
) -> torch.Tensor:
    """Returns ``a @ w + bias`` with ``w = (q - z) * s``, straight from Marlin tensors.

    Sums are formed in fp32 (float64 on a CPU) and rounded once; two runs give the same bits. N, K and the
    group size follow from the shapes; with G = 1 ``scales`` is in the 32-wide order of a single group.
    ``a`` and ``bias`` have gradients, for which the whole weight is decoded; ``scales`` has none.

    Args:
        a: activations, fp16 or bf16 [M, K], any M from 0; rows may have a stride (a multiple of 8, at most 2^23).
        qweight: int32 [K/16, N*16/f], f = 32/num_bits; rows may have a stride, as column slices do.
        scales: of a's type, [G, N], in Marlin order; rows may have a stride.
        qzeros: int32 [G, N/f], in Marlin order; None means 2^(num_bits-1) everywhere. Rows may have a stride.
        bias: of a's type, [N], in plain order.
        num_bits: 4 or 8.

    Returns:
        A new contiguous tensor [M, N] of a's type.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: shapes that do not fit, a layout that would have to be copied, tensors on several devices.
        KernelUnavailableError: the kernel cannot be compiled or run here, or a CUDA graph capture met a
            kernel that is not loaded yet (call :func:`warm_up` before the capture).
    """
    return torch.ops.awq2marlin.marlin_gemm(a, qweight, scales, qzeros, bias, num_bits)  # type: ignore[no-any-return]


def repack_awq(qweight: torch.Tensor, *, num_bits: int = 4) -> torch.Tensor:
    """Returns AWQ weights in the Marlin layout, the same bytes on every device; on a GPU at memory speed.

    Args:
        qweight: int32 [K, N/f], f = 32/num_bits, K % 16 = 0 and N % 64 = 0; rows may have a stride.
        num_bits: 4 or 8.

    Returns:
        A new contiguous int32 tensor [K/16, N*16/f].

    Raises:
        TypeError: ``qweight`` is not int32.
        ValueError: a shape or layout that does not fit.
        KernelUnavailableError: as for :func:`marlin_gemm`.
    """
    return torch.ops.awq2marlin.awq_marlin_repack(qweight, num_bits)  # type: ignore[no-any-return]


def warm_up(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
    max_tokens: int = 1 << 16,
) -> int:
    """Compiles and loads every kernel that :func:`marlin_gemm` may use for a layer, up to ``max_tokens``.

    Call it once per kind of layer before a CUDA graph capture, which forbids loading.

    Args:
        qweight: as for :func:`marlin_gemm`, on a CUDA device.
        scales: as for :func:`marlin_gemm`; their dtype is that of the activations to come.
        qzeros: as for :func:`marlin_gemm`.
        num_bits: 4 or 8.
        max_tokens: the largest M to come.

    Returns:
        How many kernels are ready.

    Raises:
        TypeError: a tensor's dtype is not the one needed.
        ValueError: the tensors do not fit, or are not on a CUDA device.
        KernelUnavailableError: a kernel cannot be compiled or loaded.
    """
    _check_dtype("scales", scales, *_DTYPES)
    _check_dims("qweight", qweight, "[K/16, N*16/f]")
    size_k = qweight.shape[0] * GPTQ_MARLIN_TILE
    shape = check_gemm(scales.new_empty((1, size_k)), qweight, scales, qzeros, None, num_bits)
    if qweight.device.type != "cuda":
        raise ValueError(f"qweight is on {qweight.device}; needed: a CUDA device, the only one that needs a warm-up.")
    device = _device(qweight.device.index)
    sources = sources_up_to(_problem(max_tokens, shape, scales.dtype, num_bits, device))
    with torch.cuda.device(device.index):
        _bind_thread(device.index)
        for source, shared_bytes in sources.items():
            jit.load(source, device.index, device.capability, shared_bytes)
    return len(sources)


# ---- checks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """What the shapes of a layer's tensors say."""

    size_n: int
    size_k: int
    group_size: int


def check_gemm(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
) -> LayerShape:
    """Checks the arguments of :func:`marlin_gemm` and returns what they say.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    pack_factor = _pack_factor(num_bits)
    _check_dtype("a", a, *_DTYPES)
    _check_dtype("qweight", qweight, torch.int32)
    _check_dtype("scales", scales, a.dtype)
    _check_dims("a", a, "[M, K]")
    _check_dims("qweight", qweight, "[K/16, N*16/f]")
    _check_dims("scales", scales, "[G, N]")

    size_k = a.shape[1]
    if qweight.shape[0] * GPTQ_MARLIN_TILE != size_k:
        raise _shape_error("qweight", qweight, f"[{size_k}/16, N*16/{pack_factor}], as a is {_shape_of(a)}")
    size_n = qweight.shape[1] * pack_factor // GPTQ_MARLIN_TILE
    _check_aligned(qweight, size_n, size_k)
    if scales.shape[1] != size_n:
        raise _shape_error("scales", scales, f"[G, {size_n}], as qweight is {_shape_of(qweight)}")
    group_size = _group_size(scales, size_k)

    _check_rows("a", a, 8)
    if a.stride(0) > _MAX_TOKEN_STRIDE and a.shape[0] > 1:
        raise ValueError(f"a has row stride {a.stride(0)}; needed: at most {_MAX_TOKEN_STRIDE}.")
    _check_rows("qweight", qweight, 4)
    _check_rows("scales", scales, 8)
    if qzeros is not None:
        _check_dtype("qzeros", qzeros, torch.int32)
        if tuple(qzeros.shape) != (scales.shape[0], size_n // pack_factor):
            raise _shape_error("qzeros", qzeros, f"[{scales.shape[0]}, {size_n // pack_factor}]")
        _check_rows("qzeros", qzeros, 1)
    if bias is not None:
        _check_dtype("bias", bias, a.dtype)
        if tuple(bias.shape) != (size_n,):
            raise _shape_error("bias", bias, f"[{size_n}]")
        _check_rows("bias", bias, 4)
    for name, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros), ("bias", bias)):
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name} is on {tensor.device} and a on {a.device}; needed: one device for all.")
    return LayerShape(size_n, size_k, group_size)


def _pack_factor(num_bits: int) -> int:
    if num_bits not in (4, 8):
        raise ValueError(f"num_bits is {num_bits}; needed: 4 or 8.")
    return 32 // num_bits


def _shape_of(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _shape_error(name: str, tensor: torch.Tensor, needed: str) -> ValueError:
    return ValueError(f"{name} has shape {_shape_of(tensor)}; needed: {needed}.")


def _check_dtype(name: str, tensor: torch.Tensor, *needed: torch.dtype) -> None:
    if tensor.dtype not in needed:
        raise TypeError(f"{name} is {tensor.dtype}; needed: {' or '.join(map(str, needed))}.")


def _check_dims(name: str, tensor: torch.Tensor, needed: str) -> None:
    if tensor.dim() != 2:
        raise _shape_error(name, tensor, needed)


def _check_aligned(qweight: torch.Tensor, size_n: int, size_k: int) -> None:
    is_aligned = any(size_k % multiple_k == size_n % multiple_n == 0 for multiple_k, multiple_n in ALIGNMENTS)
    if not is_aligned or not size_n or not size_k:
        raise ValueError(
            f"qweight has shape {_shape_of(qweight)}, which is K = {size_k}, N = {size_n}; "
            "needed: N a multiple of 64 and K of 128, or N of 128 and K of 64."
        )


def _group_size(scales: torch.Tensor, size_k: int) -> int:
    num_groups = scales.shape[0]
    if num_groups == 1:
        return size_k
    if num_groups == 0 or size_k % num_groups or size_k // num_groups not in _GROUP_SIZES:
        rows = ", ".join(str(size_k // g) for g in _GROUP_SIZES if size_k % g == 0)
        raise _shape_error("scales", scales, f"1 row, or {rows} (groups of 32, 64 or 128 in K = {size_k})")
    return size_k // num_groups


def _check_rows(name: str, tensor: torch.Tensor, row_multiple: int) -> None:
    """Checks that rows are dense, and that they start where the widest load of a kernel may."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; needed: a last stride of 1. Nothing is copied silently."
        )
    stride = tensor.stride(0) if tensor.dim() == 2 and tensor.shape[0] > 1 else 0
    offset = tensor.storage_offset()
    if stride % row_multiple or offset % row_multiple:
        raise ValueError(
            f"{name} has row stride {stride} and offset {offset}; needed: multiples of {row_multiple}, "
            "as slices at multiples of 64 columns have."
        )


def _check_addresses(**tensors: tuple[torch.Tensor | None, int]) -> None:
    """Checks of real CUDA tensors what an offset cannot tell: memory from elsewhere may begin at any address."""
    for name, (tensor, alignment) in tensors.items():
        if tensor is not None and tensor.data_ptr() % alignment:
            raise ValueError(
                f"{name} begins at address {tensor.data_ptr():#x}; needed: a multiple of {alignment} bytes, "
                "as memory of PyTorch's own has."
            )


# ---- the operators ----------------------------------------------------------------------------------------

torch.library.define(
    "awq2marlin::marlin_gemm",
    "(Tensor a, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? bias, int num_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "awq2marlin::awq_marlin_repack",
    "(Tensor qweight, int num_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("awq2marlin::marlin_gemm")  # type: ignore[untyped-decorator]
def _marlin_gemm_fake(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
) -> torch.Tensor:
    shape = check_gemm(a, qweight, scales, qzeros, bias, num_bits)
    return a.new_empty((a.shape[0], shape.size_n))


@torch.library.impl("awq2marlin::marlin_gemm", "cpu")
def _marlin_gemm_cpu(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
) -> torch.Tensor:
    check_gemm(a, qweight, scales, qzeros, bias, num_bits)
    product = cpu.multiply(a, qweight, scales, qzeros, num_bits)
    return (product if bias is None else product + bias.double()).to(a.dtype)


@torch.library.impl("awq2marlin::marlin_gemm", "cuda")
def _marlin_gemm_cuda(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
) -> torch.Tensor:
    shape = check_gemm(a, qweight, scales, qzeros, bias, num_bits)
    _check_addresses(a=(a, 16), qweight=(qweight, 16), scales=(scales, 16), qzeros=(qzeros, 4), bias=(bias, 8))
    if a.shape[0] == 0:
        return a.new_empty((0, shape.size_n))
    problem = _problem(a.shape[0], shape, a.dtype, num_bits, _device(a.device.index))
    return launch_gemm(pick_config(problem), problem, a, qweight, scales, qzeros, bias)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch's call
    _, qweight, scales, qzeros, _, ctx.num_bits = inputs
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("marlin_gemm has no gradient of scales; needed: scales.requires_grad_(False).")
    ctx.save_for_backward(qweight, scales, qzeros)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of ``a`` [M, K] and ``bias`` [N] from that of the product, [M, N]."""
    qweight, scales, qzeros = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(qweight, scales, qzeros, num_bits=ctx.num_bits).to(grad.dtype)  # [K, N]
        grad_a = grad @ weight.t()  # [M, N] @ [N, K] -> [M, K]
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_a, None, None, None, grad_bias, None


torch.library.register_autograd("awq2marlin::marlin_gemm", _gradient, setup_context=_keep_for_gradient)


def _check_repack(qweight: torch.Tensor, num_bits: int) -> tuple[int, int]:
    """Returns K and N."""
    pack_factor = _pack_factor(num_bits)
    _check_dtype("qweight", qweight, torch.int32)
    _check_dims("qweight", qweight, "[K, N/f]")
    size_k, size_n = qweight.shape[0], qweight.shape[1] * pack_factor
    if size_k % GPTQ_MARLIN_TILE or size_n % MARLIN_TILE_N or not size_k or not size_n:
        raise _shape_error("qweight", qweight, f"[K, N/{pack_factor}] with K a multiple of 16 and N of 64")
    _check_rows("qweight", qweight, 4)
    return size_k, size_n


def _new_marlin_weight(qweight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    return qweight.new_empty((size_k // GPTQ_MARLIN_TILE, size_n * GPTQ_MARLIN_TILE // _pack_factor(num_bits)))


@torch.library.register_fake("awq2marlin::awq_marlin_repack")  # type: ignore[untyped-decorator]
def _repack_fake(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    return _new_marlin_weight(qweight, *_check_repack(qweight, num_bits), num_bits)


@torch.library.impl("awq2marlin::awq_marlin_repack", "cpu")
def _repack_cpu(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    size_k, size_n = _check_repack(qweight, num_bits)
    return layout.awq_marlin_repack(qweight, size_k, size_n, num_bits)


@torch.library.impl("awq2marlin::awq_marlin_repack", "cuda")
def _repack_cuda(qweight: torch.Tensor, num_bits: int) -> torch.Tensor:
    size_k, size_n = _check_repack(qweight, num_bits)
    _check_addresses(qweight=(qweight, 16))
    out = _new_marlin_weight(qweight, size_k, size_n, num_bits)
    threads = size_k // GPTQ_MARLIN_TILE * (size_n // MARLIN_TILE_N) * 4
    args = (qweight.data_ptr(), out.data_ptr(), _int(size_k), _int(size_n), qweight.stride(0))
    _launch(repack_source(num_bits), _device(qweight.device.index), (-(-threads // 256), 1, 1), 1, 256, 0, args)
    return out


# ---- decoding, slow and plain -------------------------------------------------------------------------------


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None = None, *, num_bits: int = 4
) -> torch.Tensor:
    """Returns the weight that Marlin tensors hold, exactly, as float64 [K, N].

    Args:
        qweight: int32 [K/16, N*16/f].
        scales: fp16 or bf16 [G, N].
        qzeros: int32 [G, N/f], or None.
        num_bits: 4 or 8.
    """
    size_k, (num_groups, size_n) = qweight.shape[0] * GPTQ_MARLIN_TILE, scales.shape
    group_size = size_k // num_groups
    awq = layout.marlin_awq_repack(qweight, size_k, size_n, num_bits)
    order = list(inverse_order(AWQ_PACK_ORDER[num_bits]))
    quantized = layout.unpack_cols(awq, num_bits, size_k, size_n).reshape(size_k, -1, len(order))[..., order]
    weight = quantized.reshape(size_k, size_n).double()
    if qzeros is None:
        weight -= 1 << (num_bits - 1)
    else:
        zeros = layout.marlin_unpack_zero_points(qzeros, num_groups, size_n, num_bits)
        weight -= zeros.double().repeat_interleave(group_size, 0)
    plain_scales = layout.marlin_unpermute_scales(scales, size_k, size_n, group_size)
    return weight * plain_scales.double().repeat_interleave(group_size, 0)


# ---- the launch -----------------------------------------------------------------------------------------------

_int = ctypes.c_int


@dataclass(frozen=True)
class _Device:
    index: int
    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def _device(index: int) -> _Device:
    """Returns what kernels need to know of a device.

    Raises:
        KernelUnavailableError: its compute capability is below 8.0.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < MIN_CAPABILITY:
        raise KernelUnavailableError(
            f"cuda:{index} ({properties.name}) has compute capability {capability[0]}.{capability[1]}; "
            "needed: 8.0 or newer."
        )
    return _Device(index, capability, properties.multi_processor_count)


def problem_of(
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    num_bits: int = 4,
) -> GemmProblem:
    """Checks CUDA tensors and describes their product, for :func:`pick_config` and :func:`launch_gemm`.

    Args:
        a: see :func:`marlin_gemm`, and so for the rest.
        qweight: as there.
        scales: as there.
        qzeros: as there.
        num_bits: as there.

    Raises:
        TypeError: as :func:`marlin_gemm` does.
        ValueError: as :func:`marlin_gemm` does.
    """
    shape = check_gemm(a, qweight, scales, qzeros, None, num_bits)
    return _problem(a.shape[0], shape, a.dtype, num_bits, _device(a.device.index))


def _problem(size_m: int, shape: LayerShape, dtype: torch.dtype, num_bits: int, device: _Device) -> GemmProblem:
    return GemmProblem(
        size_m,
        shape.size_n,
        shape.size_k,
        shape.group_size,
        num_bits,
        _DTYPES[dtype],
        device.capability,
        device.multiprocessors,
    )


def launch_gemm(
    config: GemmConfig,
    problem: GemmProblem,
    a: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs one config on checked CUDA tensors, on the current stream of their device.

    Args:
        config: any that serves the problem; :func:`pick_config` gives the one for everyday use.
        problem: what the tensors' shapes say.
        a: see :func:`marlin_gemm`, and so for the rest.
        qweight: as there.
        scales: as there.
        qzeros: as there.
        bias: as there.
        out: where the result goes, contiguous [M, N]; by default a new tensor.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or loaded now.
    """
    device = _device(a.device.index)
    if out is None:
        out = a.new_empty((problem.size_m, problem.size_n))
    needs_workspace = config.num_splits > 1 and config.reduction == "workspace"
    workspace = None
    if needs_workspace:
        workspace = a.new_empty((config.num_splits, problem.size_m, problem.size_n), dtype=torch.float32)
    args = (
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
        _int(config.num_splits),
        a.stride(0),
        qweight.stride(0),
        scales.stride(0),
        0 if qzeros is None else qzeros.stride(0),
    )
    grid = config.grid(problem)
    cluster = config.num_splits if config.num_splits > 1 and not needs_workspace else 1
    overlaps = problem.has_clusters
    _launch(config.source, device, grid, cluster, config.threads, config.shared_bytes, args, overlaps=overlaps)
    if needs_workspace:
        blocks = min(-(-problem.size_m * problem.size_n // 1024), 1 << 16)
        _launch(sum_splits_source(problem.dtype), device, (blocks, 1, 1), 1, 256, 0, args)
    return out


def _launch(
    source: KernelSource,
    device: _Device,
    grid: tuple[int, int, int],
    cluster: int,
    threads: int,
    shared_bytes: int,
    args: tuple[Any, ...],
    *,
    overlaps: bool = False,
) -> None:
    """Launches a kernel; one that ``overlaps`` may be set up before the stream's last kernel is through."""
    with torch.cuda.device(device.index):
        if not jit.is_loaded(source, device.index) and torch.cuda.is_current_stream_capturing():
            raise KernelUnavailableError(
                f"{source.name} is not loaded yet, and a CUDA graph capture forbids loading. "
                "Before the capture, call awq2marlin.warm_up(qweight, scales, qzeros) for the layer."
            )
        _bind_thread(device.index)
        kernel = jit.load(source, device.index, device.capability, shared_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        config = _launch_config(grid, cluster, threads, shared_bytes, overlaps)
        _core_launch()(_stream(stream), config, kernel, *args)


_thread = threading.local()


def _bind_thread(device_index: int) -> None:
    """Gives a thread that is new to CUDA a context: torch puts that off until its own first call needs one."""
    if not getattr(_thread, "is_bound", False):
        from cuda.core import Device

        Device(device_index).set_current()
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
