"""Every kernel once on ragged edges, small enough for compute-sanitizer; then on a K that goes round every ring twice.

compute-sanitizer --tool racecheck python tests/gemm/sanitizer_sweep.py [short] [long] [--share 1/5]

A share is every fifth launch, from the first: racecheck takes minutes, and shares can run side by side. With
``memcheck`` add ``--report-api-errors no``: the CUDA bindings look up functions that older drivers do not have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from awq2marlin.gemm import ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families.wide import WideConfig
from awq2marlin.gemm.launch import launch_gemm, problem_of
from awq2marlin.gemm.select import all_configs
from tests.gemm.gemm_cases import random_layer, random_tokens

Launch = Callable[[], object]


def edges() -> Iterator[Launch]:
    """Yields every kernel on every ragged edge, with few steps."""
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
                        yield partial(launch_gemm, launch, problem, tensors)
                        if isinstance(config, WideConfig):  # few blocks, which walk over tiles and split the last ones
                            few = replace(problem, multiprocessors=2 if num_bits == 4 else 4)
                            yield partial(launch_gemm, launch, few, tensors)
            packed = torch.zeros(64, size_n * num_bits // 32, dtype=torch.int32, device="cuda")
            yield partial(ops.repack_awq, packed, num_bits=num_bits)


def rings() -> Iterator[Launch]:
    """Yields each kernel once so that every place of its ring is used again, and equal runs over two tiles."""
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
                    yield partial(launch_gemm, launch, problem, tensors)


SWEEPS = {"short": edges, "long": rings}


def share_of(text: str) -> slice:
    """Returns which launches "2/5" means."""
    which, shares = map(int, text.split("/"))
    if not 1 <= which <= shares:
        raise ValueError(text)
    return slice(which - 1, None, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="short or long; both if none is named")
    parser.add_argument("--share", type=share_of, default=slice(None), metavar="N/ALL", help="some of the launches")
    options = parser.parse_args()
    if unknown := set(options.sweeps) - SWEEPS.keys():
        parser.error(f"no sweep of that name: {', '.join(sorted(unknown))}")

    launches = 0
    for name in options.sweeps or SWEEPS:
        for launch in islice(SWEEPS[name](), options.share.start, None, options.share.step):
            launch()
            launches += 1
    torch.cuda.synchronize()
    print(f"{launches} launches")


if __name__ == "__main__":
    main()
