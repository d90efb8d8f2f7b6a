"""What the operators refuse: types, shapes, layouts in memory and devices that the kernels do not take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

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


_Found = TypeVar("_Found")

#: Layers, and numbers of tokens, that are remembered; a model has fewer.
_MOST_REMEMBERED = 1 << 11


def remembered(check: Callable[..., _Found]) -> Callable[..., _Found]:
    """Returns a check that is made once for tensors of the same types, shapes, strides, offsets and devices.

    A model calls the same layers over and over, and to look everything up in a table takes a third of the time. What is
    refused is not remembered. Not for tensors whose sizes are symbols, as a compiler's are.

    Args:
        check: what takes tensors and what can be a key, and depends on nothing else of the tensors.
    """
    known: dict[tuple[Any, ...], _Found] = {}

    @wraps(check)
    def look_up(*arguments: Any) -> _Found:
        facts = tuple(
            [
                (each.shape, each.stride(), each.storage_offset() % 8, each.dtype, each.device)
                if isinstance(each, torch.Tensor)
                else each
                for each in arguments
            ]
        )
        found = known.get(facts)
        if found is None:
            found = check(*arguments)
            if len(known) >= _MOST_REMEMBERED:
                known.clear()
            known[facts] = found
        return found

    return look_up


def check_gemm(tensors: GemmTensors) -> LayerShape:
    """Checks the arguments of the GEMM and returns what they say.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    a, qweight, scales, qzeros, bias, num_bits = tensors
    pack_factor(num_bits)
    check_activations("a", a)
    return check_weights(Weights(qweight, scales, qzeros, bias), a.shape[1], ("a", a), num_bits)


def check_repack(qweight: torch.Tensor, num_bits: int) -> tuple[int, int]:
    """Checks an AWQ ``qweight`` and returns K and N.

    Raises:
        TypeError: ``qweight`` is not int32.
        ValueError: a shape or layout that does not fit.
    """
    factor = pack_factor(num_bits)
    check_type("qweight", qweight, torch.int32)
    check_dimensions("qweight", qweight, 2, "[K, N/f]")
    size_k, size_n = qweight.shape[0], qweight.shape[1] * factor
    if size_k % GPTQ_MARLIN_TILE or size_n % MARLIN_TILE_N or not size_k or not size_n:
        raise shape_error("qweight", qweight, f"[K, N/{factor}] with K a multiple of 16 and N of 64")
    check_rows("qweight", qweight, 4)
    return size_k, size_n


def check_type(name: str, tensor: torch.Tensor, *types: torch.dtype) -> None:
    """Checks that a tensor has one of some types.

    Raises:
        TypeError: it has another.
    """
    if tensor.dtype not in types:
        raise TypeError(f"{name} must be {' or '.join(map(str, types))}, found {tensor.dtype}")


def check_dimensions(name: str, tensor: torch.Tensor, count: int, shape: str) -> None:
    """Checks how many dimensions a tensor has; ``shape`` is what the message calls them.

    Raises:
        ValueError: it has more or fewer.
    """
    if tensor.dim() != count:
        raise shape_error(name, tensor, shape)


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
                f"found address {tensor.data_ptr():#x}; {name}.clone() begins at one"
            )


class Weights(NamedTuple):
    """The tensors of one layer [K, N], or of all experts of a layer with E before every shape."""

    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    bias: torch.Tensor | None


#: Of each of `Weights` its name, and the elements at multiples of which rows begin.
_PLACES = tuple(zip(Weights._fields, (4, 8, 4, 4), strict=True))


def check_weights(
    weights: Weights,
    size_k: int,
    activations: tuple[str, torch.Tensor],
    num_bits: int,
    *,
    prefix: str = "",
    of_experts: bool = False,
    size_k_of: tuple[str, torch.Tensor] | None = None,
) -> LayerShape:
    """Checks the tensors of a layer, or of all its experts, and returns what they say.

    Args:
        weights: the tensors; E is that of ``qweight``.
        size_k: K.
        activations: what messages call them, and they: of the type and on the device that is needed.
        num_bits: 4 or 8.
        prefix: what the arguments' names begin with.
        of_experts: whether every shape begins with E.
        size_k_of: the argument that K follows from, where the activations do not have it.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else does not.
    """
    _check_weight_types(weights, activations[1].dtype, prefix)
    shape = _check_weight_shapes(weights, size_k, size_k_of or activations, pack_factor(num_bits), prefix, of_experts)
    for tensor, (name, multiple) in zip(weights, _PLACES, strict=True):
        if tensor is not None:
            check_rows(prefix + name, tensor, multiple)
            check_device(prefix + name, tensor, activations)
    return shape


def _check_weight_types(weights: Weights, dtype: torch.dtype, prefix: str) -> None:
    check_type(f"{prefix}qweight", weights.qweight, torch.int32)
    check_type(f"{prefix}scales", weights.scales, dtype)
    if weights.qzeros is not None:
        check_type(f"{prefix}qzeros", weights.qzeros, torch.int32)
    if weights.bias is not None:
        check_type(f"{prefix}bias", weights.bias, dtype)


def _check_weight_shapes(
    weights: Weights,
    size_k: int,
    size_k_of: tuple[str, torch.Tensor],
    factor: int,
    prefix: str,
    of_experts: bool,
) -> LayerShape:
    qweight, scales, qzeros, bias = weights
    dimensions, e = (3, "E, ") if of_experts else (2, "")
    check_dimensions(f"{prefix}qweight", qweight, dimensions, f"[{e}K/16, N*16/f]")
    check_dimensions(f"{prefix}scales", scales, dimensions, f"[{e}G, N]")
    lead = tuple(qweight.shape[:-2])
    e = f"{lead[0]}, " if lead else ""
    if qweight.shape[-2] * GPTQ_MARLIN_TILE != size_k:
        name, tensor = size_k_of
        needed = f"[{e}{size_k}/16, N*16/{factor}], as {name} has {list(tensor.shape)}"
        raise shape_error(f"{prefix}qweight", qweight, needed)
    size_n = qweight.shape[-1] * factor // GPTQ_MARLIN_TILE
    _check_aligned(f"{prefix}qweight", qweight, size_n, size_k)
    num_groups = scales.shape[-2]
    if (*scales.shape[:-2], scales.shape[-1]) != (*lead, size_n):
        needed = f"[{e}G, {size_n}], as {prefix}qweight has {list(qweight.shape)}"
        raise shape_error(f"{prefix}scales", scales, needed)
    shape = LayerShape(size_n, size_k, _group_size(f"{prefix}scales", scales, size_k))
    if qzeros is not None and tuple(qzeros.shape) != (*lead, num_groups, size_n // factor):
        raise shape_error(f"{prefix}qzeros", qzeros, f"[{e}{num_groups}, {size_n // factor}]")
    if bias is not None and tuple(bias.shape) != (*lead, size_n):
        raise shape_error(f"{prefix}bias", bias, f"[{e}{size_n}]")
    return shape


def _check_aligned(name: str, qweight: torch.Tensor, size_n: int, size_k: int) -> None:
    is_aligned = any(size_k % multiple_k == size_n % multiple_n == 0 for multiple_k, multiple_n in ALIGNMENTS)
    if not is_aligned or not size_n or not size_k:
        e = "E, " if qweight.dim() == 3 else ""
        needed = f"[{e}K/16, N*16/f] with N a multiple of 64 and K of 128, or N of 128 and K of 64"
        raise ValueError(
            f"{name} must have the shape {needed}, found {list(qweight.shape)}: K = {size_k}, N = {size_n}"
        )


def _group_size(name: str, scales: torch.Tensor, size_k: int) -> int:
    num_groups = scales.shape[-2]
    if num_groups == 1:
        return size_k
    if num_groups == 0 or size_k % num_groups or size_k // num_groups not in _GROUP_SIZES:
        rows = ", ".join(str(size_k // size) for size in _GROUP_SIZES if size_k % size == 0)
        e = "E, " if scales.dim() == 3 else ""
        needed = f"[{e}G, N] with G = 1, or one of {rows} (groups of 32, 64 or 128 in K = {size_k})"
        raise shape_error(name, scales, needed)
    return size_k // num_groups


def check_activations(name: str, a: torch.Tensor) -> None:
    """Checks that activations [M, K] have the type and lie in memory as the widest loads of the kernels need.

    Raises:
        TypeError: they have another type.
        ValueError: anything else does not fit.
    """
    check_type(name, a, *ACTIVATION_TYPES)
    check_dimensions(name, a, 2, "[M, K]")
    check_rows(name, a, 8)
    if a.stride(0) > _MAX_TOKEN_STRIDE and a.shape[0] > 1:
        raise ValueError(f"{name} must have a row stride of at most {_MAX_TOKEN_STRIDE}, found {a.stride(0)}")


def check_rows(name: str, tensor: torch.Tensor, multiple: int) -> None:
    """Checks that rows are dense, and that they start where the widest load of a kernel may.

    Args:
        name: the argument's.
        tensor: with rows along its last dimension.
        multiple: of the other strides and of the offset, in elements.

    Raises:
        ValueError: they are not.
    """
    strides, sizes, offset = tensor.stride(), tensor.shape, tensor.storage_offset()
    if strides[-1] != 1 and sizes[-1] > 1:
        raise ValueError(f"{name} must have a last stride of 1, found strides {strides}; call {name}.contiguous()")
    is_placed = offset % multiple == 0
    for dimension in range(len(strides) - 1):
        if strides[dimension] % multiple and sizes[dimension] > 1:
            is_placed = False
    if not is_placed:
        kind = "row strides" if len(strides) > 2 else "a row stride"
        outer = zip(strides[:-1], sizes, strict=False)
        found = ", ".join(str(stride if size > 1 else 0) for stride, size in outer) or "0"
        raise ValueError(
            f"{name} must have {kind} and an offset that are multiples of {multiple}, as slices at multiples "
            f"of 64 columns have, found {found} and {offset}; call {name}.clone()"
        )


def check_device(name: str, tensor: torch.Tensor, activations: tuple[str, torch.Tensor]) -> None:
    """Checks that a tensor is where the activations are, of which messages know the name.

    Raises:
        ValueError: it is elsewhere.
    """
    first_name, first = activations
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, found {tensor.device}")


def shape_error(name: str, tensor: torch.Tensor, shape: str) -> ValueError:
    """Returns what to raise for a tensor that has another shape than is needed."""
    return ValueError(f"{name} must have the shape {shape}, found {list(tensor.shape)}")
