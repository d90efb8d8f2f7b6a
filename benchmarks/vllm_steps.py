"""Where the time of a step of vLLM's decoding goes: to the host, to launching a CUDA graph, or to kernels.

    python benchmarks/vllm_steps.py --out benchmarks/results/vllm_steps_h100.json [--layers 4]

Makes a model of Llama-3-8B's shapes with few layers, whose steps wait for the host, and starts three engines side by
side as `benchmarks/serving.py` does: the AWQ source on vLLM's Marlin, the converted checkpoint on vLLM's Marlin, and on
this package's kernels. When all are ready, they measure alone, in turn and in several rounds, for batches of 1 and 8:

* seconds of a step by the clock, as a user sees it;
* for each replay of a CUDA graph in these steps: how long the call keeps the host, and how long the GPU takes from the
  launch to the end of it;
* from the end of such a graph to the start of the next, on the host and on the GPU: what waits for whom;
* the last graph replayed over and over with nothing between, by the clock and on the host;
* with torch's profiler, GPU time of every kernel in a step, and what the driver's calls cost the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_graphs import Replays
from record import kinds_of_layers, origin, save
from serving import (
    ENGINES,
    MODELS,
    Prompts,
    compile_beforehand,
    make_models,
    run_all,
    start,
    timed,
    turns,
)

NAMES = ("source_marlin", "converted_engine", "converted")
BATCHES = (1, 8)
STEPS = 256
PROFILED_STEPS = 32


def measure(llm: Any, replays: Replays, prompts: Prompts, count: int) -> dict[str, Any]:
    """Returns where the time of decoding a batch goes, in microseconds a step."""
    batch = prompts.draw(count, 128)
    timed(llm, batch, 4)
    steps = [(timed(llm, batch, 1 + STEPS) - timed(llm, batch, 1)) / STEPS * 1e6 for _ in range(3)]
    found: dict[str, Any] = {"step_us": round(statistics.median(steps), 2), "step_us_all": [round(x, 2) for x in steps]}
    with replays.watched():
        seconds = timed(llm, batch, 1 + STEPS)
    found["replays"] = {**replays.summary(STEPS), "step_us_meanwhile": round(seconds / STEPS * 1e6, 2)}
    found["over_and_over"] = replays.over_and_over()
    return found


def profile(llm: Any, batch: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Returns what torch's profiler says of some steps; the prefill is in it once."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        timed(llm, batch, 1 + PROFILED_STEPS)
        torch.cuda.synchronize()
    kernels, calls = {}, {}
    for each in recorded.key_averages():
        if each.device_type == torch.autograd.DeviceType.CUDA:
            if each.count >= PROFILED_STEPS:  # those of the prefill alone left out
                kernels[each.key[:100]] = [each.count, round(each.self_device_time_total / PROFILED_STEPS, 2)]
        elif each.key.startswith("cu") or each.self_cpu_time_total > 20 * PROFILED_STEPS:
            calls[each.key[:60]] = [each.count, round(each.self_cpu_time_total / PROFILED_STEPS, 2)]
    total = round(sum(us for _, us in kernels.values()), 2)
    return {
        "gpu_us_a_step": total,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])[:30]),
        "host_calls": dict(sorted(calls.items(), key=lambda item: -item[1][1])[:30]),
    }


def run_engine(name: str, work: Path, rounds: int, out: Path) -> None:
    """Starts an engine in this process, measures whenever it is its turn, and writes what was found so far."""
    import vllm

    replays = Replays()
    folder = work / ENGINES[name].checkpoint
    llm = start(ENGINES[name], folder)
    found: dict[str, Any] = {"title": ENGINES[name].title, "vllm": vllm.__version__, "torch": torch.__version__}
    found |= {"gpu": torch.cuda.get_device_name(), "layers": llm.apply_model(kinds_of_layers)[0]}
    found["cudagraph_mode"] = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    prompts = Prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    found["rounds"] = []
    for number in turns(name, work, rounds):
        found["rounds"].append({str(count): measure(llm, replays, prompts, count) for count in BATCHES})
        if number == rounds - 1:
            found["profile"] = {str(count): profile(llm, prompts.draw(count, 128)) for count in BATCHES}
        save(out, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="how often each engine measures, in turn (4)")
    parser.add_argument("--patience", type=float, default=900, help="seconds for engines to start (900)")
    parser.add_argument("--work", type=Path, help="folder for models, logs and caches; a temporary one if not given")
    parser.add_argument("--engine", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine, options.work, options.rounds, options.out)
        return 0

    document = {"layers": options.layers, **origin()}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        make_models(replace(MODELS[False], layers=options.layers), work)
        compile_beforehand(work / "marlin")
        found = run_all(list(NAMES), work, options.patience, options.rounds, __file__)
    save(options.out, {**document, "engines": found})
    return 1 if any("error" in each for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
