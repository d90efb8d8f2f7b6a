"""The target format: Marlin's constants, shapes, eligibility and fusing rules, as facts without data.

The layout itself is explained once, with a picture, in kernels/README.md; the checkpoint in
docs/marlin-native.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from awq2marlin.layout.packing import AWQ_PACK_ORDER, AWQ_SUPPORTED_BITS, pack_factor

#: Group sizes that Marlin kernels take; -1 is one group over all of K.
MARLIN_SUPPORTED_GROUP_SIZES = [-1, 32, 64, 128]

#: A tile is 16 rows (K) by 64 columns (N).
GPTQ_MARLIN_TILE = 16
MARLIN_TILE_N = 64

#: The field's strict alignment: N a multiple of 64 and K of 128.
GPTQ_MARLIN_MIN_THREAD_N = 64
GPTQ_MARLIN_MIN_THREAD_K = 128

#: Field i of a Marlin word holds value ``MARLIN_INTERLEAVE[num_bits][i]`` of the word's values. The numbers
#: are AWQ's packing order; there they name columns, here the values of a lane or of a run of zero points.
MARLIN_INTERLEAVE = AWQ_PACK_ORDER

#: Columns of a block of scales (or zero points): position 8 i + m takes source column i + 8 m.
SCALE_PERM: tuple[int, ...] = tuple(i + 8 * m for i in range(8) for m in range(8))

#: The order when one group spans all of K: blocks of 32.
SCALE_PERM_SINGLE: tuple[int, ...] = tuple(2 * i + offset for i in range(4) for offset in (0, 1, 8, 9, 16, 17, 24, 25))

#: Multiples of (K, N), one of which a module must have to be Marlin; padding chooses between them.
ALIGNMENTS = ((128, 64), (64, 128))

#: Widest module that is converted. A row of tiles is the unit of streaming; this bounds its memory.
MAX_SIZE_N = 1 << 20


@dataclass(frozen=True)
class ScalarType:
    """An unsigned integer type of quantized values.

    Attributes:
        name: e.g. ``uint4``.
        size_bits: bits per value.
    """

    name: str
    size_bits: int

    def __str__(self) -> str:
        """Returns the type's name."""
        return self.name


SCALAR_TYPE_UINT4 = ScalarType("uint4", 4)
SCALAR_TYPE_UINT8 = ScalarType("uint8", 8)
SCALAR_TYPES = {scalar.size_bits: scalar for scalar in (SCALAR_TYPE_UINT4, SCALAR_TYPE_UINT8)}


def qweight_shape(size_k: int, size_n: int, num_bits: int) -> tuple[int, int]:
    """Returns the shape of a Marlin ``qweight``: [K / 16, N * 16 / f]."""
    return size_k // GPTQ_MARLIN_TILE, size_n * GPTQ_MARLIN_TILE // pack_factor(num_bits)


def num_groups(size_k: int, group_size: int) -> int:
    """Returns how many groups of scales K rows have: 1 for -1, else K / g rounded up."""
    return 1 if group_size == -1 else -(-size_k // group_size)


def is_single_group(size_k: int, group_size: int) -> bool:
    """Returns whether one group spans all of K, so that scales take the 32-wide order."""
    return group_size == -1 or group_size >= size_k


def unaligned_reason(size_k: int, size_n: int, num_bits: int, group_size: int) -> str | None:
    """Returns why a module cannot be Marlin, in words, or None if it can.

    Args:
        size_k: in features K.
        size_n: out features N.
        num_bits: 4 or 8.
        group_size: rows of K that share scales, -1 for all.
    """
    if num_bits not in AWQ_SUPPORTED_BITS:
        return f"{num_bits} bits are not among {AWQ_SUPPORTED_BITS}"
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        return f"group size {group_size} is not among {MARLIN_SUPPORTED_GROUP_SIZES}"
    if size_k <= 0 or size_n <= 0:
        return f"K={size_k}, N={size_n} is empty"
    if group_size != -1 and size_k % group_size:
        return f"K={size_k} is not a multiple of the group size {group_size}"
    if all(size_k % multiple_k or size_n % multiple_n for multiple_k, multiple_n in ALIGNMENTS):
        return f"K={size_k}, N={size_n} is neither a multiple of (128, 64) nor of (64, 128)"
    return None


def is_aligned(size_k: int, size_n: int, num_bits: int, group_size: int) -> bool:
    """Returns whether a module can be Marlin: the test of the specification, which decides conversion.

    N % 64 = 0 and K % 128 = 0, or N % 128 = 0 and K % 64 = 0; bits 4 or 8; group size -1, 32, 64 or 128
    dividing K. Wider than `verify_marlin_supports_shape`, the strict rule of some engines.

    Args:
        size_k: in features K.
        size_n: out features N.
        num_bits: bits per value.
        group_size: rows of K that share scales, -1 for all.
    """
    return unaligned_reason(size_k, size_n, num_bits, group_size) is None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def paddings(size_k: int, size_n: int) -> list[tuple[int, int]]:
    """Returns the shapes to which a module may be padded: K to 128 and N to 64, or K to 64 and N to 128."""
    return [(_round_up(size_k, multiple_k), _round_up(size_n, multiple_n)) for multiple_k, multiple_n in ALIGNMENTS]


def padded_shapes(sizes: Iterable[tuple[int, int]], group_size: int) -> list[tuple[int, int]]:
    """Returns the aligned shapes to which modules fused together are padded.

    Modules with the same K share one padded K: of (K to 128, N to 64) and (K to 64, N to 128) the choice
    with the smaller total product, then the smaller total sum, then the first. A padded K that the group
    size does not divide is no choice.

    Args:
        sizes: (K, N) of each module.
        group_size: rows of K that share scales, -1 for all.

    Returns:
        One padded (K, N) for each module, in the order given.
    """
    sizes = list(sizes)
    chosen: dict[int, tuple[int, int]] = {}
    for size_k in {size_k for size_k, _ in sizes}:
        widths = [size_n for k, size_n in sizes if k == size_k]
        options = []
        for multiples in ALIGNMENTS:
            padded_k = _round_up(size_k, multiples[0])
            if group_size == -1 or padded_k % group_size == 0:
                padded_n = [_round_up(size_n, multiples[1]) for size_n in widths]
                options.append((padded_k * sum(padded_n), padded_k * len(widths) + sum(padded_n), multiples))
        chosen[size_k] = min(options, key=lambda option: option[:2])[2]
    return [(_round_up(size_k, chosen[size_k][0]), _round_up(size_n, chosen[size_k][1])) for size_k, size_n in sizes]


#: Modules that runtimes fuse into one matrix when they stand under one parent: converted together or not
#: at all. The one table of them.
FUSED_SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

_FAMILY = {name: family for family in FUSED_SIBLINGS for name in family}
_EXPERT = re.compile(r"^((?:.*\.)?[^.]*experts)\.[0-9]+(?:\.|$)")


def is_expert(module: str) -> bool:
    """Returns whether a module belongs to an expert of a mixture-of-experts layer.

    Args:
        module: the module's full name.
    """
    return _EXPERT.match(module) is not None


def fusion_group(module: str) -> str:
    """Returns a key that is equal for exactly the modules that runtimes fuse with this one.

    All experts of one mixture-of-experts layer, with all their projections, are one group.

    Args:
        module: the module's full name.
    """
    expert = _EXPERT.match(module)
    if expert:
        return f"{expert[1]}.*"
    parent, _, name = module.rpartition(".")
    family = _FAMILY.get(name)
    return f"{parent}.{family[0]}+" if family else module


def fused_siblings(module: str) -> list[str]:
    """Returns the names under which a module and those that runtimes fuse with it stand, whether they exist or not.

    Args:
        module: the module's full name. Of an expert's only its own is returned.
    """
    if is_expert(module):
        return [module]
    parent, dot, name = module.rpartition(".")
    return [f"{parent}{dot}{each}" for each in _FAMILY.get(name, (name,))]
