"""An equality assertion that says where two arrays differ, and how."""

import numpy as np


def assert_identical(found, expected, what=""):
    """Asserts equal shapes, types and bits; names the first element that differs."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    assert found.dtype == expected.dtype, f"{what}: type {found.dtype}, expected {expected.dtype}"
    bits = np.dtype(f"u{found.dtype.itemsize}")
    found_bits = np.ascontiguousarray(found).view(bits)
    expected_bits = np.ascontiguousarray(expected).view(bits)
    different = np.argwhere(found_bits != expected_bits)
    if different.size:
        first = tuple(int(index) for index in different[0])
        digits = 2 * found.dtype.itemsize
        raise AssertionError(
            f"{what}: {len(different)} of {found.size} elements differ, the first at {list(first)}: "
            f"found 0x{int(found_bits[first]):0{digits}x}, expected 0x{int(expected_bits[first]):0{digits}x}"
        )
