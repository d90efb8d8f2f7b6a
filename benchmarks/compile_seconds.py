"""How long this package's kernels for a model take to compile, on one thread: what a first start on a machine costs.

    python benchmarks/compile_seconds.py --out benchmarks/results/compile_seconds.json

Kernels of a model in fp16 with 4 bits and groups of 128, for compute capability 9.0, of Llama-3-8B's shapes and of
Qwen3-30B-A3B's. Needs neither a GPU nor a model, and does not look into the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record import origin, processor, save

from awq2marlin.gemm import jit
from awq2marlin.gemm.experts.kernels import sum_source
from awq2marlin.gemm.experts.problem import ExpertProblem
from awq2marlin.gemm.experts.select import align_sources, all_configs
from awq2marlin.gemm.families.base import HOPPER, GemmProblem
from awq2marlin.gemm.select import sources_up_to
from awq2marlin.gemm.source import KernelSource

MOST_TOKENS = 1 << 16
MULTIPROCESSORS = 132

#: K and N of the linear layers as engines join them.
LLAMA = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
QWEN3 = ((2048, 5120), (4096, 2048))


def linear_kernels(shapes: tuple[tuple[int, int], ...]) -> set[KernelSource]:
    """Returns the kernels of linear layers [K, N]."""
    return {
        source
        for size_k, size_n in shapes
        for source in sources_up_to(GemmProblem(MOST_TOKENS, size_n, size_k, 128, 4, "fp16", HOPPER, MULTIPROCESSORS))
    }


def expert_kernels(hidden: int, inner: int, experts: int, top_k: int) -> set[KernelSource]:
    """Returns the kernels of a layer of gated experts."""
    facts: dict[str, Any] = {"num_pairs": MOST_TOKENS * top_k, "top_k": top_k, "num_experts": experts, "num_bits": 4}
    facts |= {"group_size": 128, "dtype": "fp16", "capability": HOPPER, "multiprocessors": MULTIPROCESSORS}
    up = ExpertProblem(size_n=2 * inner, size_k=hidden, activation="silu", sums_tokens=False, **facts)
    down = ExpertProblem(size_n=hidden, size_k=inner, activation="none", sums_tokens=True, **facts)
    products = {config.source for config in all_configs(up, down)}
    return products | {sum_source("fp16"), *align_sources(HOPPER)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result, JSON")
    options = parser.parse_args()
    models = {
        "Llama-3-8B's shapes": linear_kernels(LLAMA),
        "Qwen3-30B-A3B's shapes": linear_kernels(QWEN3) | expert_kernels(2048, 768, 128, 8),
    }
    rows = []
    for model, kernels in models.items():
        begin, used = time.perf_counter(), time.process_time()
        for kernel in kernels:
            jit.compile_kernel(kernel, jit.arch_of(HOPPER))
        seconds, busy = time.perf_counter() - begin, time.process_time() - used
        times = {"seconds": round(seconds, 1), "processor_seconds": round(busy, 1)}
        rows.append({"model": model, "kernels": len(kernels), **times})
        print(f"{model}: {len(kernels)} kernels, {seconds:.1f} s, {busy:.1f} s of processor time")
    save(options.out, {"host": processor(), "nvrtc": jit.compiler_version(), **origin(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
