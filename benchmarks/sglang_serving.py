"""How fast SGLang serves a checkpoint and the converted one, on each kernel that it may take for them.

    python benchmarks/sglang_serving.py --out benchmarks/results/sglang_serving_h100.json [--layers 16] [--rounds 3]

As benchmarks/serving.py does for vLLM: a model of Llama-3-8B's shapes from random weights, three engines side by side
on one GPU with CUDA graphs, and each measures alone when all are ready: the AWQ source on SGLang's Marlin, the
converted checkpoint on SGLang's Marlin, and the converted one as the plugin serves it by itself. The attention is
Triton's in all three, and there is no prefix cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import serving
import sglang_tokens
from serving import (
    Batch,
    Engine,
    commit,
    compile_beforehand,
    differences,
    driver,
    link_models,
    make_models,
    measure,
    run_all,
    turns,
    write_whole,
)

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


def run_engine(name: str, folder: Path, work: Path, rounds: int, out: Path) -> None:
    """Starts an engine in this process, measures whenever it is its turn, and writes what was found so far."""
    begin = time.perf_counter()
    import sglang
    import torch

    loaded = sglang_tokens.tell_what_is_loaded(out)
    most = max(serving.BATCHES)
    engine = sglang_tokens.make_engine(
        folder, 1, eager=False, context_length=4096, max_running_requests=most, cuda_graph_max_bs_decode=most,
        max_total_tokens=1 << 15,
    )  # fmt: skip
    found: dict[str, Any] = {"title": ENGINES[name].title, "sglang": sglang.__version__, "torch": torch.__version__}
    found |= {"gpu": torch.cuda.get_device_name(), "ready_seconds": round(time.perf_counter() - begin, 2)}
    found["layers"] = json.loads(loaded.read_text())["layers"]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    for _ in turns(name, work, rounds):
        measure(partial(timed, engine), partial(said, engine), vocabulary, found)
        write_whole(out, found)
    engine.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other models in it are kept")
    parser.add_argument("--layers", type=int, default=32, help="of Llama-3-8B's 32 (all)")
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=1, help="how often each engine measures, in turn (1)")
    parser.add_argument("--patience", type=float, default=900, help="seconds for engines to start (900)")
    parser.add_argument("--work", type=Path, help="folder for models, logs and caches; a temporary one if not given")
    parser.add_argument("--models", type=Path, help="folder whose models are served; made there if they are missing")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        folder = options.work / ENGINES[options.engine].checkpoint
        run_engine(options.engine, folder, options.work, options.rounds, options.out)
        return 0

    model = replace(serving.MODELS[False], layers=options.layers)
    row = {"format": model.format, "layers": model.layers, "rounds": options.rounds, "commit": commit()}
    row |= {"driver": driver(), "date": datetime.date.today().isoformat()}
    document = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}

    def keep(found: dict[str, Any]) -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [*document["rows"], {**row, "engines": found, "words": differences(found)}]
        write_whole(options.out, {**document, "rows": rows})

    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        models = options.models or work
        row["bytes"] = make_models(model, models)
        row["compile_seconds"] = compile_beforehand(models / "marlin")
        link_models(models, work)
        found = run_all(options.only, work, options.patience, options.rounds, __file__, keep, ENGINES)
    keep(found)
    print(serving.table(found), json.dumps(differences(found)), sep="\n")
    return 1 if any("error" in each for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
