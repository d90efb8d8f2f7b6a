"""Every kind of launch of the experts' kernels on ragged edges, small enough for compute-sanitizer.

compute-sanitizer --tool racecheck python tests/gemm/sanitizer_sweep_experts.py

With ``memcheck`` add ``--report-api-errors no``: the CUDA bindings look up functions that older drivers do not have.
"""

from __future__ import annotations

import torch

from awq2marlin.gemm.experts import select
from tests.gemm.expert_cases import random_block, random_routing, random_rows


def main() -> None:
    calls = 0
    select._MANY_ROWS = 0  # layers so small have kernels with fewer heights of tiles
    counts = ((1, 2), (1, 8), (3, 3), (9, 2), (33, 2), (60, 2), (70, 3), (130, 4), (300, 2))
    for num_bits, dtype, hidden, groups in (
        (4, torch.float16, 192, (64, 32)),
        (8, torch.bfloat16, 256, (-1, 64)),
        (4, torch.float16, 256, (128, 128)),
        (4, torch.float16, 1024, (128, -1)),  # goes round every ring twice
    ):
        options = {"num_bits": num_bits, "dtype": dtype, "has_bias": True, "has_zeros": num_bits == 4}
        block = random_block(5, hidden, 128, groups, **options, device="cuda")
        for tokens, top_k in counts if hidden < 1024 else ((1, 2), (9, 2), (70, 3)):
            for kind in ("uniform", "foreign", "one", "zipf")[: None if tokens > 33 else 3]:
                ids, shares = random_routing(tokens, top_k, 5, kind, device="cuda")
                rows = random_rows(tokens, block.w13)
                block(rows, ids, shares)
                block.w13(rows, ids)
                block.w2(random_rows(tokens * top_k, block.w2), ids.long(), shares)
                calls += 3
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
