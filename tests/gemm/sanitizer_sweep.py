"""Every kernel once on ragged edges, small enough for compute-sanitizer; then on a K that goes round every ring twice.

compute-sanitizer --tool racecheck python tests/gemm/sanitizer_sweep.py [short] [long]

With ``memcheck`` add ``--report-api-errors no``: the CUDA bindings look up functions that older drivers do not have.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from awq2marlin.gemm import ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families.wide import WideConfig
from awq2marlin.gemm.launch import launch_gemm, problem_of
from awq2marlin.gemm.select import all_configs
from tests.gemm.gemm_cases import random_layer, random_tokens


def sweep_edges() -> int:
    """Every kernel on every ragged edge, with few steps."""
    launches = 0
    for num_bits, dtype in ((4, torch.float16), (8, torch.bfloat16)):
        # The second half of K = 384 begins within a group of 128 rows.
        for size_k, size_n, group_size in ((320, 128, 32), (384, 192, 128), (128, 320, -1)):
            layer = random_layer(
                size_k, size_n, group_size, num_bits=num_bits, dtype=dtype, has_bias=True, device="cuda"
            )
            for size_m in (1, 9, 17, 25, 33, 130, 300):
                a = random_tokens(size_m, layer)
                tensors = GemmTensors(a, layer.qweight, layer.scales, layer.qzeros, layer.bias, num_bits)
                problem = problem_of(tensors)
                reductions = [(1, "workspace"), (2, "workspace")] + [(2, "cluster")] * problem.has_clusters
                for config in all_configs(problem):
                    runs = [launch for launch in config.launches(problem) if launch.reduction == "runs"]
                    for launch in [*(config.with_splits(*each) for each in reductions), *runs]:
                        launch_gemm(launch, problem, tensors)
                        launches += 1
                        if isinstance(config, WideConfig):  # few blocks, which walk over tiles and split the last ones
                            few = replace(problem, multiprocessors=2 if num_bits == 4 else 4)
                            launch_gemm(launch, few, tensors)
                            launches += 1
            ops.repack_awq(
                torch.zeros(64, size_n * num_bits // 32, dtype=torch.int32, device="cuda"), num_bits=num_bits
            )
    return launches


def sweep_rings() -> int:
    """One launch of each kernel in which every place of its ring is used again, and equal runs over two tiles."""
    launches = 0
    for num_bits, dtype, group_size in ((4, torch.float16, 128), (4, torch.bfloat16, 32), (8, torch.float16, -1)):
        layer = random_layer(1024, 320, group_size, num_bits=num_bits, dtype=dtype, device="cuda")
        for size_m in (9, 33, 130):
            tensors = GemmTensors(
                random_tokens(size_m, layer), layer.qweight, layer.scales, layer.qzeros, None, num_bits
            )
            problem = replace(problem_of(tensors), multiprocessors=2)  # few blocks, which have many steps each
            for config in all_configs(problem):
                runs = [launch for launch in config.launches(problem) if launch.reduction == "runs"]
                for launch in (config.with_splits(1, "workspace"), *runs):
                    launch_gemm(launch, problem, tensors)
                    launches += 1
    return launches


def main(parts: list[str]) -> None:
    launches = sum(sweep() for part, sweep in (("short", sweep_edges), ("long", sweep_rings)) if part in parts)
    torch.cuda.synchronize()
    print(f"{launches} launches")


if __name__ == "__main__":
    main(sys.argv[1:] or ["short", "long"])
