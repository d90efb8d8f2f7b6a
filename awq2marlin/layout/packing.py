"""How values are packed into 32-bit words: the AWQ order, which Marlin's interleave repeats, and its inverse."""

from __future__ import annotations

#: Bits per packed value that the format knows.
AWQ_SUPPORTED_BITS = (4, 8)

#: Field i of a packed word (bits ``num_bits * i`` upward) holds this column of the word's columns.
AWQ_PACK_ORDER: dict[int, tuple[int, ...]] = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def pack_factor(num_bits: int) -> int:
    """Returns how many values one int32 holds: 8 for 4 bits, 4 for 8.

    Args:
        num_bits: 4 or 8.

    Raises:
        ValueError: for any other number of bits.
    """
    if num_bits not in AWQ_SUPPORTED_BITS:
        raise ValueError(f"num_bits must be one of {AWQ_SUPPORTED_BITS}, found {num_bits!r}")
    return 32 // num_bits


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the permutation that undoes ``order``: ``inverse[order[i]] == i``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
