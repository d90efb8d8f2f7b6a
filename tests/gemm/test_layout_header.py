"""The headers in kernels/: constants are those of the Python package, lines are short, what is missing is named."""

import re
from dataclasses import replace

import pytest

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.families.base import GemmProblem
from awq2marlin.gemm.families.hopper import HopperConfig
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, kernels_dir
from awq2marlin.layout import marlin
from awq2marlin.layout.packing import AWQ_PACK_ORDER
from tests.skips import NO_COMPILER


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
    pytest.importorskip("cuda.bindings", reason=NO_COMPILER)
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


def test_lines_of_the_headers_are_no_longer_than_those_of_python():
    long = [
        f"{path.name}:{number}"
        for path in sorted(kernels_dir().glob("*.cuh"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def test_a_number_of_tokens_without_its_instruction_is_refused_in_a_sentence():
    pytest.importorskip("cuda.bindings", reason=NO_COMPILER)
    problem = GemmProblem(64, 256, 256, 128, 4, "fp16")
    config = replace(next(iter(HopperConfig.candidates(problem))), tokens=40)
    with pytest.raises(KernelUnavailableError, match=r"wgmma\.cuh has no instruction of this width"):
        jit.compile_kernel(config.source, "sm_90a")
