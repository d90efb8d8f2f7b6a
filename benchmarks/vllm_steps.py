"""Where the time of a step of vLLM's decoding goes: to the host, to launching a CUDA graph, or to kernels.

    python benchmarks/vllm_steps.py --out benchmarks/results/vllm_steps_h100.json [--layers 4]

Makes a model of Llama-3-8B's shapes with few layers, whose steps wait for the host, and starts three engines side by
side as `benchmarks/serving.py` does: the AWQ source on vLLM's Marlin, the converted checkpoint on vLLM's Marlin, and on
this package's kernels. When all are ready, each measures alone, for batches of 1 and 8:

* seconds of a step by the clock, as a user sees it;
* for each replay of a CUDA graph in these steps: how long the call keeps the host, and how long the GPU takes from the
  launch to the end of it;
* the largest graph replayed over and over with nothing between, by the clock and on the host;
* with torch's profiler, GPU time of every kernel in a step, and what the driver's calls cost the host.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_models import write_model
from serving import (
    ENGINES,
    MODELS,
    Prompts,
    commit,
    compile_beforehand,
    driver,
    kernels_of_layers,
    run_all,
    start,
    timed,
    turn,
)

NAMES = ("source_marlin", "converted_engine", "converted")
BATCHES = (1, 8)
STEPS = 256
PROFILED_STEPS = 32


class Replays:
    """Watches every replay of a CUDA graph in this process, while it is asked to."""

    def __init__(self) -> None:
        """Watches nothing yet."""
        self.is_on = False
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.host: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        original, watch = torch.cuda.CUDAGraph.replay, self
        self.replay = original

        def replay(graph: torch.cuda.CUDAGraph) -> None:
            if not watch.is_on:
                return original(graph)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            begin = time.perf_counter()
            original(graph)
            watch.host.append(time.perf_counter() - begin)
            after.record()
            watch.events.append((before, after))
            watch.graphs.append(graph)
            return None

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]

    def summary(self, steps: int) -> dict[str, float]:
        """Returns what the replays of so many steps cost, in microseconds a step, and forgets them."""
        torch.cuda.synchronize()
        gpu = sum(before.elapsed_time(after) for before, after in self.events) * 1e3
        host = sum(self.host) * 1e6
        found = {"replays_a_step": len(self.host) / steps, "host_us": host / steps, "gpu_us": gpu / steps}
        self.host, self.events = [], []
        return {name: round(value, 2) for name, value in found.items()}

    def over_and_over(self, count: int = 400) -> dict[str, float]:
        """Returns the microseconds of a replay of the last graph, one after another: by the clock, and on the host."""
        graph = self.graphs[-1]
        for _ in range(20):
            self.replay(graph)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            self.replay(graph)
        called = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        single = []
        for _ in range(50):  # the host's part when the GPU has nothing to do
            torch.cuda.synchronize()
            one = time.perf_counter()
            self.replay(graph)
            single.append(time.perf_counter() - one)
        torch.cuda.synchronize()
        found = {"clock_us": ended - begin, "host_us": called - begin}
        rounded = {name: round(value / count * 1e6, 2) for name, value in found.items()}
        return {**rounded, "host_us_when_idle": round(statistics.median(single) * 1e6, 2)}


def measure(llm: Any, replays: Replays, prompts: Prompts, count: int) -> dict[str, Any]:
    """Returns where the time of decoding a batch goes, in microseconds a step."""
    batch = prompts.draw(count, 128)
    timed(llm, batch, 4)
    steps = [(timed(llm, batch, 1 + STEPS) - timed(llm, batch, 1)) / STEPS * 1e6 for _ in range(5)]
    found: dict[str, Any] = {"step_us": round(statistics.median(steps), 2), "step_us_all": [round(x, 2) for x in steps]}
    replays.is_on = True
    seconds = timed(llm, batch, 1 + STEPS)
    replays.is_on = False
    found["replays"] = {**replays.summary(STEPS), "step_us_meanwhile": round(seconds / STEPS * 1e6, 2)}
    found["profile"] = profile(llm, batch)
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


def run_engine(name: str, folder: Path, work: Path, out: Path) -> None:
    """Starts an engine in this process, waits for its turn, measures and writes what was found."""
    import vllm

    replays = Replays()
    llm = start(ENGINES[name], folder)
    found: dict[str, Any] = {"title": ENGINES[name].title, "vllm": vllm.__version__, "torch": torch.__version__}
    found |= {"gpu": torch.cuda.get_device_name(), "layers": llm.apply_model(kernels_of_layers)[0]}
    found["cudagraph_mode"] = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    prompts = Prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    with turn(name, work):
        found["batches"] = {str(count): measure(llm, replays, prompts, count) for count in BATCHES}
    out.write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--patience", type=float, default=900, help="seconds for engines to start (900)")
    parser.add_argument("--work", type=Path, help="folder for models, logs and caches; a temporary one if not given")
    parser.add_argument("--engine", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine, options.work / ENGINES[options.engine].checkpoint, options.work, options.out)
        return 0

    from awq2marlin import convert

    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        write_model(work / "source", replace(MODELS[False], layers=options.layers))
        config = work / "source" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
        convert(work / "source", work / "marlin")
        compile_beforehand(work / "marlin")
        found = run_all(list(NAMES), work, options.patience, __file__)
    document = {"layers": options.layers, "commit": commit(), "driver": driver()}
    document |= {"date": datetime.date.today().isoformat(), "engines": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any("error" in each for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
