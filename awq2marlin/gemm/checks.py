"""What the operators refuse: types, shapes, layouts in memory and devices that the kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from awq2marlin.layout.marlin import ALIGNMENTS, GPTQ_MARLIN_TILE, MARLIN_SUPPORTED_GROUP_SIZES, MARLIN_TILE_N
from awq2marlin.layout.packing import pack_factor

#: Types of activations, scales, bias and output.
ACTIVATION_TYPES = (torch.float16, torch.bfloat16)

_GROUP_SIZES = tuple(size for size in MARLIN_SUPPORTED_GROUP_SIZES if size > 0)

#: Kernels count the distance between the tokens of a block in 32 bits.
_MAX_TOKEN_STRIDE = 1 << 23


class GemmTensors(NamedTuple):
    """The arguments of the GEMM, in the operator's order; see `ops.marlin_gemm`."""

    a: torch.Tensor
    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    num_bits: int = 4


@dataclass(frozen=True)
class LayerShape:
    """What the shapes of a layer's tensors say."""

    size_n: int
    size_k: int
    group_size: int


def check_gemm(tensors: GemmTensors) -> LayerShape:
    """Checks the arguments of the GEMM and returns what they say.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    factor = pack_factor(tensors.num_bits)
    _check_types(tensors)
    shape = _check_shapes(tensors, factor)
    _check_layouts(tensors)
    _check_devices(tensors)
    return shape


def check_repack(qweight: torch.Tensor, num_bits: int) -> tuple[int, int]:
    """Checks an AWQ ``qweight`` and returns K and N.

    Raises:
        TypeError: ``qweight`` is not int32.
        ValueError: a shape or layout that does not fit.
    """
    factor = pack_factor(num_bits)
    check_type("qweight", qweight, torch.int32)
    check_two_dimensions("qweight", qweight, "[K, N/f]")
    size_k, size_n = qweight.shape[0], qweight.shape[1] * factor
    if size_k % GPTQ_MARLIN_TILE or size_n % MARLIN_TILE_N or not size_k or not size_n:
        raise _shape_error("qweight", qweight, f"[K, N/{factor}] with K a multiple of 16 and N of 64")
    _check_rows("qweight", qweight, 4)
    return size_k, size_n


def check_type(name: str, tensor: torch.Tensor, *types: torch.dtype) -> None:
    """Checks that a tensor has one of some types.

    Raises:
        TypeError: it has another.
    """
    if tensor.dtype not in types:
        raise TypeError(f"{name} must be {' or '.join(map(str, types))}, found {tensor.dtype}")


def check_two_dimensions(name: str, tensor: torch.Tensor, shape: str) -> None:
    """Checks that a tensor has rows and columns; ``shape`` is what the message calls them.

    Raises:
        ValueError: it has not.
    """
    if tensor.dim() != 2:
        raise _shape_error(name, tensor, shape)


def check_addresses(**tensors: tuple[torch.Tensor | None, int]) -> None:
    """Checks of real CUDA tensors what an offset cannot say: memory from elsewhere may begin at any address.

    Args:
        tensors: by the argument's name, each with the bytes that its address must be a multiple of.

    Raises:
        ValueError: one begins somewhere else.
    """
    for name, (tensor, alignment) in tensors.items():
        if tensor is not None and tensor.data_ptr() % alignment:
            raise ValueError(
                f"{name} must begin at a multiple of {alignment} bytes, as memory of PyTorch's own does, "
                f"found address {tensor.data_ptr():#x}"
            )


def _check_types(tensors: GemmTensors) -> None:
    a, qweight, scales, qzeros, bias, _ = tensors
    check_type("a", a, *ACTIVATION_TYPES)
    check_type("qweight", qweight, torch.int32)
    check_type("scales", scales, a.dtype)
    if qzeros is not None:
        check_type("qzeros", qzeros, torch.int32)
    if bias is not None:
        check_type("bias", bias, a.dtype)


def _check_shapes(tensors: GemmTensors, factor: int) -> LayerShape:
    a, qweight, scales, qzeros, bias, _ = tensors
    check_two_dimensions("a", a, "[M, K]")
    check_two_dimensions("qweight", qweight, "[K/16, N*16/f]")
    check_two_dimensions("scales", scales, "[G, N]")
    size_k = a.shape[1]
    if qweight.shape[0] * GPTQ_MARLIN_TILE != size_k:
        raise _shape_error("qweight", qweight, f"[{size_k}/16, N*16/{factor}], as a has {list(a.shape)}")
    size_n = qweight.shape[1] * factor // GPTQ_MARLIN_TILE
    _check_aligned(qweight, size_n, size_k)
    num_groups, columns = scales.shape
    if columns != size_n:
        raise _shape_error("scales", scales, f"[G, {size_n}], as qweight has {list(qweight.shape)}")
    shape = LayerShape(size_n, size_k, _group_size(scales, size_k))
    if qzeros is not None and tuple(qzeros.shape) != (num_groups, size_n // factor):
        raise _shape_error("qzeros", qzeros, f"[{num_groups}, {size_n // factor}]")
    if bias is not None and tuple(bias.shape) != (size_n,):
        raise _shape_error("bias", bias, f"[{size_n}]")
    return shape


def _check_aligned(qweight: torch.Tensor, size_n: int, size_k: int) -> None:
    is_aligned = any(size_k % multiple_k == size_n % multiple_n == 0 for multiple_k, multiple_n in ALIGNMENTS)
    if not is_aligned or not size_n or not size_k:
        needed = "[K/16, N*16/f] with N a multiple of 64 and K of 128, or N of 128 and K of 64"
        raise ValueError(
            f"qweight must have the shape {needed}, found {list(qweight.shape)}: K = {size_k}, N = {size_n}"
        )


def _group_size(scales: torch.Tensor, size_k: int) -> int:
    num_groups = scales.shape[0]
    if num_groups == 1:
        return size_k
    if num_groups == 0 or size_k % num_groups or size_k // num_groups not in _GROUP_SIZES:
        rows = ", ".join(str(size_k // size) for size in _GROUP_SIZES if size_k % size == 0)
        needed = f"[G, N] with G = 1, or one of {rows} (groups of 32, 64 or 128 in K = {size_k})"
        raise _shape_error("scales", scales, needed)
    return size_k // num_groups


def _check_layouts(tensors: GemmTensors) -> None:
    """Checks what the widest loads of the kernels need."""
    a, qweight, scales, qzeros, bias, _ = tensors
    _check_rows("a", a, 8)
    if a.stride(0) > _MAX_TOKEN_STRIDE and a.shape[0] > 1:
        raise ValueError(f"a must have a row stride of at most {_MAX_TOKEN_STRIDE}, found {a.stride(0)}")
    _check_rows("qweight", qweight, 4)
    _check_rows("scales", scales, 8)
    if qzeros is not None:
        _check_rows("qzeros", qzeros, 1)
    if bias is not None:
        _check_rows("bias", bias, 4)


def _check_rows(name: str, tensor: torch.Tensor, multiple: int) -> None:
    """Checks that rows are dense, and that they start where the widest load of a kernel may."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a last stride of 1, found strides {tensor.stride()}; nothing is copied silently"
        )
    stride = tensor.stride(0) if tensor.dim() == 2 and tensor.shape[0] > 1 else 0
    offset = tensor.storage_offset()
    if stride % multiple or offset % multiple:
        raise ValueError(
            f"{name} must have a row stride and an offset that are multiples of {multiple}, as slices at multiples "
            f"of 64 columns have, found {stride} and {offset}"
        )


def _check_devices(tensors: GemmTensors) -> None:
    a, qweight, scales, qzeros, bias, _ = tensors
    for name, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros), ("bias", bias)):
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name} must be on the device of a, {a.device}, found {tensor.device}")


def _shape_error(name: str, tensor: torch.Tensor, shape: str) -> ValueError:
    return ValueError(f"{name} must have the shape {shape}, found {list(tensor.shape)}")
