"""How fast SGLang serves a checkpoint and the converted one, on each kernel that it may take for them.

    python benchmarks/sglang_serving.py --out benchmarks/results/sglang_serving_h100.json [--layers 16] [--rounds 3]

As benchmarks/serving.py does for vLLM: a model of Llama-3-8B's shapes from random weights, three engines side by side
on one GPU with CUDA graphs, and each measures alone when all are ready: the AWQ source on SGLang's Marlin, the
converted checkpoint on SGLang's Marlin, and the converted one as the plugin serves it by itself. The attention is
Triton's in all three, and there is no prefix cache.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import serving
import sglang_tokens
from record import save
from serving import (
    Batch,
    Engine,
    make_parser,
    measure,
    measure_all,
    turns,
)
from vllm_tokens import Way

_ON_SGLANG = sglang_tokens.ENVIRONMENT

ENGINES = {
    "source": Engine("AWQ source, SGLang's Marlin", "source", environment=_ON_SGLANG),
    "converted_engine": Engine(
        "converted, SGLang's Marlin", "marlin", environment=_ON_SGLANG | {"AWQ2MARLIN_KERNEL": "engine"}
    ),
    "converted": Engine("converted, as the plugin chooses", "marlin", environment=_ON_SGLANG),
}


def token_ids(batch: Batch) -> list[list[int]]:
    """Returns prompts as SGLang takes them."""
    return [each["prompt_token_ids"] for each in batch]


def timed(engine: Any, batch: Batch, new_tokens: int) -> float:
    """Returns the seconds in which every prompt of a batch gets so many tokens."""
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    begin = time.perf_counter()
    engine.generate(input_ids=token_ids(batch), sampling_params=sampling)
    return time.perf_counter() - begin


def said(engine: Any, batch: Batch) -> list[list[list[float]]]:
    """Returns, for each prompt and new token: the token, its log-probability, and the second best's two."""
    sampling = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    outputs = engine.generate(
        input_ids=token_ids(batch), sampling_params=sampling, return_logprob=True, top_logprobs_num=2
    )
    rows = []
    for output in outputs:
        best = (sorted(each, key=lambda entry: -entry[0]) for each in output["meta_info"]["output_top_logprobs"])
        rows.append([[one[1], one[0], two[1], two[0]] for one, two in best])
    return rows


def run_engine(name: str, work: Path, rounds: int, out: Path, batches: list[int]) -> None:
    """Starts an engine in this process, measures whenever it is its turn, and writes what was found so far."""
    begin = time.perf_counter()
    import sglang
    import torch

    folder = work / ENGINES[name].checkpoint
    loaded = sglang_tokens.tell_what_is_loaded(out)
    most = max(serving.BATCHES)
    engine = sglang_tokens.make_engine(
        folder, Way(eager=False), context_length=4096, max_running_requests=most, cuda_graph_max_bs_decode=most,
        max_total_tokens=1 << 15,
    )  # fmt: skip
    found: dict[str, Any] = {"title": ENGINES[name].title, "sglang": sglang.__version__, "torch": torch.__version__}
    found |= {"gpu": torch.cuda.get_device_name(), "ready_seconds": round(time.perf_counter() - begin, 2)}
    found["layers"] = sglang_tokens.what_is_loaded(loaded)["layers"]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    for turn in turns(name, work, rounds):
        measure(turn, partial(timed, engine), partial(said, engine), vocabulary, found, batches=batches)
        save(out, found)
    engine.shutdown()


def main() -> int:
    parser = make_parser(__doc__, ENGINES)
    parser.add_argument("--layers", type=int, default=32, help="of Llama-3-8B's 32 (all)")
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine, options.work, options.rounds, options.out, options.batches)
        return 0

    model = replace(serving.MODELS[False], layers=options.layers)
    names = options.only or list(ENGINES)
    return measure_all(model, {"format": model.format}, options, names, ENGINES, __file__)


if __name__ == "__main__":
    sys.exit(main())
