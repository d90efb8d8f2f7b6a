"""Times the Marlin GEMM on every kind of weights: types, bits, group sizes, with and without zero points.

    python benchmarks/gemm_variants.py --output benchmarks/results/gemm_variants_h100.json

Every kind is compared with fp16, 4 bits, g = 128 and zero points, on the same shape and number of tokens M. Up to
64 tokens, where reading takes longer than multiplying, the comparison is at the same bytes: time over the bytes that
must be moved (packed weights, scales, zero points, activations, result); 8 bits then have half of the columns. With
more tokens it is the time for the same product. Weights rotate through more memory than the L2 cache holds, and all
kinds of a number of tokens are timed in turn, as in ``gemm.py``. Every result is checked once, against float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from gemm import ROTATED_BYTES, Launch, _geometric_mean, medians_us, random_words
from record import environment, save

from awq2marlin.gemm import ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families.base import GemmConfig, GemmProblem
from awq2marlin.gemm.launch import DTYPES, launch_gemm, problem_of
from awq2marlin.gemm.select import pick_config

SHAPES = ((8192, 8192), (4096, 28672), (14336, 4096))  # (K, N)
SIZES_M = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
MOST_READING_M = 64  # from here on multiplying takes longer, on an H100 with 4 bits
CHECKED_COLUMNS = 256
MAX_RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Kind:
    """A kind of weights; a group size of -1 is a single group."""

    dtype: torch.dtype
    bits: int
    group_size: int
    has_zeros: bool

    def __str__(self) -> str:
        """Returns how tables name it."""
        group = "one group" if self.group_size == -1 else f"g = {self.group_size}"
        zeros = "" if self.has_zeros else ", no zero points"
        return f"{DTYPES[self.dtype]}, {self.bits} bits, {group}{zeros}"

    def columns(self, size_n: int, size_m: int) -> int:
        """Returns how many of a shape's columns are multiplied."""
        return size_n * 4 // self.bits if size_m <= MOST_READING_M else size_n


USUAL = Kind(torch.float16, 4, 128, has_zeros=True)


def random_weights(kind: Kind, size_k: int, size_n: int) -> tuple[torch.Tensor | None, ...]:
    """Returns qweight, scales and qzeros. Every bit pattern is a valid weight."""
    groups, factor = 1 if kind.group_size == -1 else size_k // kind.group_size, 32 // kind.bits
    scales = torch.rand(groups, size_n, device="cuda") * 0.02 + 0.001
    return (
        random_words((size_k // 16, size_n * 16 // factor)),
        scales.to(kind.dtype),
        random_words((groups, size_n // factor)) if kind.has_zeros else None,
    )


@dataclass
class Case:
    """What is timed: a kind's weights, and tokens."""

    kind: Kind
    a: torch.Tensor
    copies: list[tuple[torch.Tensor | None, ...]]

    @property
    def moved_bytes(self) -> int:
        """What must be read and written."""
        weights = sum(each.nbytes for each in self.copies[0] if each is not None)
        return weights + self.a.nbytes + 2 * self.a.shape[0] * self.copies[0][1].shape[1]

    def tensors(self, i: int) -> GemmTensors:
        """Returns the GEMM's arguments with the i-th copy of the weights."""
        qweight, scales, qzeros = self.copies[i % len(self.copies)]
        return GemmTensors(self.a, qweight, scales, qzeros, None, self.kind.bits)

    def plan(self) -> tuple[GemmProblem, GemmConfig]:
        """Returns the problem, and the kernel that is picked for it."""
        problem = problem_of(self.tensors(0))
        return problem, pick_config(problem)

    def launcher(self) -> Launch:
        """Returns what multiplies by the i-th copy, checked once."""
        problem, config = self.plan()
        out = self.a.new_empty((problem.size_m, problem.size_n))

        def launch(i: int) -> torch.Tensor:
            return launch_gemm(config, problem, self.tensors(i), out)

        self.check(launch(0))
        return launch

    def check(self, out: torch.Tensor) -> None:
        """Stops the benchmark if a product is wrong by more than rounding, in its last columns."""
        qweight, scales, qzeros = self.copies[0]
        words = CHECKED_COLUMNS * self.kind.bits // 32
        zeros = None if qzeros is None else qzeros[:, -words:]
        weight = ops.dequantize(qweight[:, -16 * words :], scales[:, -CHECKED_COLUMNS:], zeros, num_bits=self.kind.bits)
        exact = self.a.double() @ weight
        error = ((out[:, -CHECKED_COLUMNS:].double() - exact).norm() / exact.norm()).item()
        if not error < MAX_RELATIVE_ERROR[self.kind.dtype]:
            sys.exit(f"{self.kind}: wrong result at {tuple(self.a.shape)}: relative error {error}")


def cases(kinds: list[Kind], size_k: int, size_n: int, size_m: int) -> Iterator[Case]:
    """Yields what is timed of a shape and a number of tokens."""
    for kind in kinds:
        weights = random_weights(kind, size_k, kind.columns(size_n, size_m))
        count = max(2, -(-ROTATED_BYTES // sum(each.nbytes for each in weights if each is not None)))
        copies = [tuple(each if each is None else each.clone() for each in weights) for _ in range(count)]
        yield Case(kind, torch.randn(size_m, size_k, device="cuda").to(kind.dtype), copies)


def ratio(case: Case, us: float, usual: Case, usual_us: float) -> float:
    """Returns how a time compares with that of the usual weights: at the same bytes where reading takes longest."""
    bytes_ratio = case.moved_bytes / usual.moved_bytes if case.a.shape[0] <= MOST_READING_M else 1.0
    return us / usual_us / bytes_ratio


def time_shape(kinds: list[Kind], size_k: int, size_n: int, size_m: int, replays: int) -> list[dict]:
    """Times every kind of weights with one shape and number of tokens."""
    found = list(cases(kinds, size_k, size_n, size_m))
    launches = max(len(case.copies) for case in found)
    us = medians_us({str(case.kind): case.launcher() for case in found}, launches, replays)
    usual = next(case for case in found if case.kind == USUAL)
    rows = []
    for case in found:
        problem, config = case.plan()
        rows.append(
            {
                "kind": str(case.kind),
                "K": size_k,
                "N": problem.size_n,
                "M": size_m,
                "us": us[str(case.kind)],
                "bytes": case.moved_bytes,
                "ratio": ratio(case, us[str(case.kind)], usual, us[str(USUAL)]),
                "kernel": config.source.name,
                "splits": config.num_splits,
                "reduction": config.reduction,
            }
        )
    return rows


def table(rows: list[dict], kinds: list[str]) -> list[str]:
    """Returns a Markdown table: for every kind and M the mean over the shapes, and the largest."""
    sizes = sorted({row["M"] for row in rows})
    lines = ["| weights | " + " | ".join(f"M = {size}" for size in sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
    for kind in kinds:
        cells = []
        for size in sizes:
            here = [row["ratio"] for row in rows if row["M"] == size and row["kind"] == kind]
            cells.append(f"{_geometric_mean(here):.2f} ({max(here):.2f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES_M), metavar="M")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2], help="which of the three, from 0")
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16"], choices=["fp16", "bf16"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=[4, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 64, 32, -1], choices=[128, 64, 32, -1])
    parser.add_argument("--zeros", nargs="+", default=["yes", "no"], choices=["yes", "no"])
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--commit", help="the commit that is timed, where there is no git")
    options = parser.parse_args()

    types = [dtype for dtype, name in DTYPES.items() if name in options.dtypes]
    zeros = [each == "yes" for each in options.zeros]
    kinds = [USUAL] + [
        kind for kind in (Kind(*each) for each in product(types, options.bits, options.groups, zeros)) if kind != USUAL
    ]
    result = {
        **environment(options.commit),
        "compared_with": str(USUAL),
        "rows": [],
    }
    for size_m, which in product(options.tokens, options.shapes):
        result["rows"] += time_shape(kinds, *SHAPES[which], size_m, options.replays)
        torch.cuda.empty_cache()
        save(options.output, result)
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    print("\n".join(table(result["rows"], list(map(str, kinds)))))


if __name__ == "__main__":
    main()
