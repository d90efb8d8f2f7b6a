"""The Marlin layout as functions on torch tensors, with the names and signatures that the field uses.

They take tensors on any device and never alias their input. The converter does not use them: it repacks
files with compiled kernels (`repack`); the tests hold both, and the NumPy `reference`, to the same bits.
The layout is explained in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

from awq2marlin.layout.marlin import (
    GPTQ_MARLIN_MIN_THREAD_K,
    GPTQ_MARLIN_MIN_THREAD_N,
    GPTQ_MARLIN_TILE,
    MARLIN_INTERLEAVE,
    MARLIN_SUPPORTED_GROUP_SIZES,
    MARLIN_TILE_N,
    SCALAR_TYPES,
    SCALE_PERM,
    SCALE_PERM_SINGLE,
    ScalarType,
    is_single_group,
    num_groups,
    qweight_shape,
)
from awq2marlin.layout.packing import AWQ_PACK_ORDER, inverse_order, pack_factor

#: Positions of a lane's eight values in a tile, relative to (2 (lane % 4), 16 block + lane // 4): four rows
#: of one column, then the same rows of the column eight to the right.
_LANE_VALUES = tuple((row, column) for column in (0, 8) for row in (0, 1, 8, 9))


def verify_marlin_supported(quant_type: ScalarType, group_size: int, has_zp: bool = True) -> None:
    """Checks that Marlin has kernels for a type and group size. Probes no device.

    Args:
        quant_type: `SCALAR_TYPE_UINT4` or `SCALAR_TYPE_UINT8`.
        group_size: one of `MARLIN_SUPPORTED_GROUP_SIZES`.
        has_zp: whether there are zero points; both are supported.

    Raises:
        ValueError: if the type or the group size is another.
    """
    del has_zp  # a part of the field's signature; Marlin takes both
    if quant_type not in SCALAR_TYPES.values():
        known = "SCALAR_TYPE_UINT4 (uint4), SCALAR_TYPE_UINT8 (uint8)"
        raise ValueError(f"quant_type must be one of {known}, found {quant_type!r}")
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise ValueError(f"group_size must be one of {MARLIN_SUPPORTED_GROUP_SIZES}, found {group_size}")


def verify_marlin_supports_shape(
    output_size_per_partition: int, input_size_per_partition: int, input_size: int, group_size: int
) -> None:
    """Checks a (partition of a) linear layer against the strict rule of the field's engines.

    Conversion asks `is_aligned` instead, which is wider.

    Args:
        output_size_per_partition: N of the partition; a multiple of 64.
        input_size_per_partition: K of the partition; a multiple of 128.
        input_size: K of the whole layer.
        group_size: rows of K that share scales, -1 for all; divides the partition's K unless one group spans
            the whole layer.

    Raises:
        ValueError: naming the size that does not fit and what it must be.
    """
    if output_size_per_partition <= 0 or output_size_per_partition % GPTQ_MARLIN_MIN_THREAD_N:
        raise ValueError(
            f"output_size_per_partition must be a positive multiple of {GPTQ_MARLIN_MIN_THREAD_N} "
            f"(GPTQ_MARLIN_MIN_THREAD_N), found {output_size_per_partition}"
        )
    if input_size_per_partition <= 0 or input_size_per_partition % GPTQ_MARLIN_MIN_THREAD_K:
        raise ValueError(
            f"input_size_per_partition must be a positive multiple of {GPTQ_MARLIN_MIN_THREAD_K} "
            f"(GPTQ_MARLIN_MIN_THREAD_K), found {input_size_per_partition}"
        )
    if group_size != -1 and group_size < input_size and (group_size <= 0 or input_size_per_partition % group_size):
        raise ValueError(
            f"group_size must be -1 or divide input_size_per_partition = {input_size_per_partition}, found {group_size}"
        )


def marlin_make_workspace(device: torch.device | str) -> torch.Tensor:
    """Returns the zeroed lock workspace of a Marlin kernel: int32, one per multiprocessor, one on a CPU.

    Args:
        device: where it shall lie; a GPU's multiprocessors are counted now, not at import.
    """
    device = torch.device(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.zeros(count, dtype=torch.int32, device=device)


def marlin_make_empty_g_idx(device: torch.device | str) -> torch.Tensor:
    """Returns the empty ``g_idx`` that Marlin kernels take where there is no activation order: int32 [0].

    Args:
        device: where it shall lie.
    """
    return torch.nn.Parameter(torch.empty(0, dtype=torch.int32, device=device), requires_grad=False)


def get_scale_perms() -> tuple[list[int], list[int]]:
    """Returns the column orders of scales: 64 for groups, 32 for a single group over all of K.

    Position p of a block of permuted columns takes source column ``perm[p]`` of the same block.
    """
    return list(SCALE_PERM), list(SCALE_PERM_SINGLE)


def marlin_permute_scales(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
    """Returns scales in Marlin's column order.

    Args:
        s: [G, N], any type.
        size_k: K.
        size_n: N.
        group_size: rows of K that share scales; with -1, or K and more, one group spans K and the order is
            that of blocks of 32.

    Returns:
        [G, N], contiguous, a new tensor.

    Raises:
        ValueError: if the shape is not [G, N] or empty, N not a multiple of the block, or the group size neither
            -1 nor positive.
    """
    return _permute_scales(s, size_k, size_n, group_size, inverse=False)


def marlin_unpermute_scales(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
    """Undoes `marlin_permute_scales`; same arguments, shapes and errors."""
    return _permute_scales(s, size_k, size_n, group_size, inverse=True)


def _permute_scales(s: torch.Tensor, size_k: int, size_n: int, group_size: int, *, inverse: bool) -> torch.Tensor:
    if group_size != -1 and group_size <= 0:
        raise ValueError(f"group_size must be -1 or positive, found {group_size}")
    _check_multiple("size_k", size_k, 1)
    _check_tensor("s", s, (num_groups(size_k, group_size), size_n))
    perm = SCALE_PERM_SINGLE if is_single_group(size_k, group_size) else SCALE_PERM
    _check_multiple("size_n", size_n, len(perm))
    return _gather_columns(s, inverse_order(perm) if inverse else perm)


def pack_cols(q_w: torch.Tensor, num_bits: int, size_k: int, size_n: int) -> torch.Tensor:
    """Packs values along columns in plain order: field i of a word holds column i of the word's columns.

    Args:
        q_w: integers [K, N], each below 2^num_bits.
        num_bits: 4 or 8.
        size_k: K.
        size_n: N, a multiple of 32 / num_bits.

    Returns:
        int32 [K, N / f].

    Raises:
        ValueError: if the shape is not [K, N] or empty, the values are no integers or do not fit their bits, or N is
            not a multiple of f.
    """
    factor = pack_factor(num_bits)
    _check_integers("q_w", q_w, size_k, size_n, num_bits)
    _check_multiple("size_n", size_n, factor)
    return _pack(q_w, num_bits)


def _also_called(old_name: str, name: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Lets an argument be given by another name too, as engines' own versions of a function call it."""

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if old_name in kwargs and name not in kwargs:
                kwargs[name] = kwargs.pop(old_name)
            return function(*args, **kwargs)

        return call

    return decorate


@_also_called("packed_q_w", "packed")
def unpack_cols(packed: torch.Tensor, num_bits: int, size_k: int, size_n: int) -> torch.Tensor:
    """Undoes `pack_cols`.

    Args:
        packed: int32 [K, N / f]; by keyword also as ``packed_q_w``, vLLM's name.
        num_bits: 4 or 8.
        size_k: K.
        size_n: N, a multiple of 32 / num_bits.

    Returns:
        int32 [K, N], values below 2^num_bits.

    Raises:
        ValueError: if the shape is not [K, N / f] or empty, the type not int32, or N not a multiple of f.
    """
    return _unpack("packed", packed, num_bits, size_k, size_n)


def marlin_zero_points(zp: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Returns unpacked zero points permuted as grouped scales, interleaved and packed.

    Args:
        zp: integers [G, N].
        size_k: the number of groups G. (The field names this argument so; it is not K.)
        size_n: N, a multiple of 64.
        num_bits: 4 or 8.

    Returns:
        int32 [G, N / f].

    Raises:
        ValueError: if the shape is not [G, N] or empty, the values are no integers or do not fit their bits, N is not
            a multiple of 64, or the bits are others.
    """
    pack_factor(num_bits)  # refuses other bits
    _check_integers("zp", zp, size_k, size_n, num_bits)
    _check_multiple("size_n", size_n, MARLIN_TILE_N)
    return _pack_zero_points(zp, num_bits)


def marlin_unpack_zero_points(q_zp: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Undoes `marlin_zero_points`: int32 [G, N / f] to int32 [G, N]; ``size_k`` is G here too."""
    _check_multiple("size_n", size_n, MARLIN_TILE_N)
    fields = _unpack("q_zp", q_zp, num_bits, size_k, size_n)
    permuted = _gather_columns(fields, inverse_order(MARLIN_INTERLEAVE[num_bits]))
    return _gather_columns(permuted, inverse_order(SCALE_PERM))


def awq_to_marlin_zero_points(q_zp_packed: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Repacks AWQ ``qzeros`` to Marlin's.

    Args:
        q_zp_packed: int32 [G, N / f], AWQ.
        size_k: the number of groups G. (The field names this argument so; it is not K.)
        size_n: N, a multiple of 64.
        num_bits: 4 or 8.

    Returns:
        int32 [G, N / f], Marlin.

    Raises:
        ValueError: if shape or type are others, or N is not a multiple of 64.
    """
    plain = _unpack_awq("q_zp_packed", q_zp_packed, num_bits, size_k, size_n)
    _check_multiple("size_n", size_n, MARLIN_TILE_N)
    return _pack_zero_points(plain, num_bits)


def marlin_to_awq_zero_points(q_zp: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Undoes `awq_to_marlin_zero_points`; ``size_k`` is the number of groups here too."""
    return _pack_awq(marlin_unpack_zero_points(q_zp, size_k, size_n, num_bits), num_bits)


def awq_marlin_repack(q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Repacks an AWQ ``qweight`` to Marlin's tiles.

    Args:
        q_weight: int32 [K, N / f], AWQ.
        size_k: K, a multiple of 16.
        size_n: N, a multiple of 64.
        num_bits: 4 or 8.

    Returns:
        int32 [K / 16, N * 16 / f], a new tensor.

    Raises:
        ValueError: if shape or type are others, or K or N not such multiples.
    """
    _check_multiple("size_k", size_k, GPTQ_MARLIN_TILE)
    _check_multiple("size_n", size_n, MARLIN_TILE_N)
    values = _unpack_awq("q_weight", q_weight, num_bits, size_k, size_n)
    tiles = values.reshape(-1, GPTQ_MARLIN_TILE, size_n // MARLIN_TILE_N, MARLIN_TILE_N)  # [K/16, 16, N/64, 64]
    tiles = tiles.transpose(1, 2).reshape(-1, GPTQ_MARLIN_TILE * MARLIN_TILE_N)  # [tiles, 1024]
    fields = _gather_columns(tiles, _tile_fields(num_bits))
    return _pack(fields, num_bits).reshape(qweight_shape(size_k, size_n, num_bits))


def marlin_awq_repack(q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Undoes `awq_marlin_repack`: int32 [K / 16, N * 16 / f], Marlin, to int32 [K, N / f], AWQ.

    Args:
        q_weight: int32 [K / 16, N * 16 / f], Marlin.
        size_k: K, a multiple of 16.
        size_n: N, a multiple of 64.
        num_bits: 4 or 8.

    Raises:
        ValueError: if shape or type are others, or K or N not such multiples.
    """
    _check_multiple("size_k", size_k, GPTQ_MARLIN_TILE)
    _check_multiple("size_n", size_n, MARLIN_TILE_N)
    _check_tensor("q_weight", q_weight, qweight_shape(size_k, size_n, num_bits), torch.int32)
    tile = GPTQ_MARLIN_TILE * MARLIN_TILE_N
    fields = _unpack_words(q_weight, num_bits).reshape(-1, tile)  # [tiles, 1024]
    tiles = _gather_columns(fields, inverse_order(_tile_fields(num_bits)))
    values = tiles.reshape(-1, size_n // MARLIN_TILE_N, GPTQ_MARLIN_TILE, MARLIN_TILE_N).transpose(1, 2)
    return _pack_awq(values.reshape(size_k, size_n), num_bits)


def replace_parameter(layer: torch.nn.Module, name: str, new_data: torch.Tensor) -> None:
    """Replaces a layer's parameter, or adds it, without gradients.

    Args:
        layer: the module.
        name: of the parameter; an attribute or buffer of that name gives way.
        new_data: its data, used without a copy.
    """
    if hasattr(layer, name):
        delattr(layer, name)
    layer.register_parameter(name, torch.nn.Parameter(new_data.detach(), requires_grad=False))


@cache
def _tile_fields(num_bits: int) -> tuple[int, ...]:
    """Returns, for each field of a tile's words in order, the tile element 64 row + column it holds."""
    order = MARLIN_INTERLEAVE[num_bits]
    fields = []
    for lane in range(32):
        for block in range(MARLIN_TILE_N // 16):
            row, column = 2 * (lane % 4), 16 * block + lane // 4
            elements = [MARLIN_TILE_N * (row + r) + column + c for r, c in _LANE_VALUES]
            for word in range(0, len(elements), len(order)):
                fields += [elements[word + value] for value in order]
    return tuple(fields)


def _pack(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Packs values [R, N] that are known to fit their bits, in plain order: int32 [R, N / f]."""
    fields = values.to(torch.int32).reshape(values.shape[0], -1, pack_factor(num_bits))
    packed = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=values.device)
    for field in range(fields.shape[-1]):
        packed |= fields[..., field] << (num_bits * field)
    return packed


def _pack_zero_points(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    permuted = _gather_columns(values, SCALE_PERM)  # always blocks of 64, even for a single group
    return _pack(_gather_columns(permuted, MARLIN_INTERLEAVE[num_bits]), num_bits)


def _pack_awq(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    return _pack(_gather_columns(values, AWQ_PACK_ORDER[num_bits]), num_bits)


def _unpack(name: str, words: torch.Tensor, num_bits: int, size_k: int, size_n: int) -> torch.Tensor:
    """Checks what the caller knows by ``name``, and returns its fields in plain order: int32 [K, N]."""
    factor = pack_factor(num_bits)
    _check_multiple("size_k", size_k, 1)
    _check_multiple("size_n", size_n, factor)
    _check_tensor(name, words, (size_k, size_n // factor), torch.int32)
    return _unpack_words(words, num_bits)


def _unpack_words(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32, device=words.device)
    fields: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return fields.reshape(words.shape[0], -1)


def _unpack_awq(name: str, words: torch.Tensor, num_bits: int, size_k: int, size_n: int) -> torch.Tensor:
    fields = _unpack(name, words, num_bits, size_k, size_n)
    return _gather_columns(fields, inverse_order(AWQ_PACK_ORDER[num_bits]))


def _gather_columns(values: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
    """Returns [R, N] with, in every block of columns, position p taken from column ``columns[p]``."""
    index = torch.tensor(columns, device=values.device)
    return values.reshape(values.shape[0], -1, len(columns))[..., index].reshape(values.shape)


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, found {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be of type {dtype}, found {tensor.dtype}")


def _check_integers(name: str, tensor: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> None:
    """Checks values that are to be packed: a bit too many would end up in the field beside."""
    _check_multiple("size_k", size_k, 1)
    _check_tensor(name, tensor, (size_k, size_n))
    if tensor.is_floating_point():
        raise ValueError(f"{name} must hold integers, found {tensor.dtype}")
    if tensor.device.type == "meta":
        return  # it has no values
    largest = 2**num_bits - 1
    values = tensor if tensor.dtype.is_signed else tensor.to(torch.int64)  # torch compares no wide unsigned ones
    wrong = (values < 0) | (values > largest)
    if bool(wrong.any()):
        raise ValueError(f"{name} must hold values from 0 to {largest}, found {int(values[wrong][0])}")


def _check_multiple(name: str, value: int, multiple: int) -> None:
    if value <= 0 or value % multiple:
        kind = f"a positive multiple of {multiple}" if multiple > 1 else "positive"
        raise ValueError(f"{name} must be {kind}, found {value}")
