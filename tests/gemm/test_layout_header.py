"""The constants of kernels/marlin_layout.cuh are those of the Python package."""

import re

import pytest

from awq2marlin.gemm import jit
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, kernels_dir
from awq2marlin.layout import marlin
from awq2marlin.layout.packing import AWQ_PACK_ORDER


def header_constants():
    text = (kernels_dir() / "marlin_layout.cuh").read_text()
    arrays = re.findall(r"constexpr int (\w+)\[\d+\] = \{([\d, ]+)\};", text)
    numbers = re.findall(r"constexpr int (\w+) = (\d+);", text)
    return {name: tuple(map(int, values.split(","))) for name, values in arrays} | {n: int(v) for n, v in numbers}


def test_header_has_the_constants_of_the_python_package():
    constants = header_constants()
    assert constants["kTileRows"] == marlin.GPTQ_MARLIN_TILE
    assert constants["kTileColumns"] == marlin.MARLIN_TILE_N
    for bits in (4, 8):
        assert constants[f"kInterleave{bits}"] == marlin.MARLIN_INTERLEAVE[bits]
        assert constants[f"kAwqOrder{bits}"] == AWQ_PACK_ORDER[bits]


def test_scale_positions_invert_the_permutations():
    """The compiler itself evaluates the header's functions, for every lane and column."""
    pytest.importorskip(
        "cuda.bindings", reason="The run-time compiler is not installed: pip install 'awq2marlin[cuda]'"
    )
    lines = ['#include "marlin_layout.cuh"', "using namespace marlin;"]
    for lane in range(32):
        for m in range(8):
            column = lane // 4 + 8 * m
            grouped = marlin.SCALE_PERM.index(column)
            single = 32 * (column // 32) + marlin.SCALE_PERM_SINGLE.index(column % 32)
            lines.append(f'static_assert(grouped_scale_position({lane}, {m}) == {grouped}, "");')
            lines.append(f'static_assert(single_scale_position({lane}, {m}) == {single}, "");')
    lines.append(f'extern "C" __global__ void {ENTRY_POINT}() {{}}')
    assert jit.compile_kernel(KernelSource("layout", "\n".join(lines)), "sm_80").cubin
