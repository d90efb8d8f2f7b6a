"""What loading costs: an AWQ checkpoint and the converted one, from the start of a process to the first token.

    python benchmarks/load.py --out benchmarks/results/load_h200.json [--layers 32] [--repeats 3] [--engine vllm]
        [--cpu-offload-gb 2]

Makes a model of Llama-3-8B's shapes from random weights, converts it, and starts an engine on each in turn, a fresh
process each time; the first start of all, in which the machine compiles for itself, is left out. Measured in the
process: the seconds in which weights are read and in which they are processed afterwards, the largest GPU memory in
both, and what stays; the largest host memory, all of it and without mapped files. The files were just written, so
they are read from the page cache: reading from a disk takes longer, and the same for both. With --cpu-offload-gb vLLM
keeps that much of the weights in the host's pinned memory, which is measured then, too.
`benchmarks/load_chart.py` draws the result and prints it as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_models import Model, write_model
from record import earlier, origin, save

MIB = 1 << 20
KINDS = ("awq", "marlin")

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


class HostMemory(threading.Thread):
    """Samples this process's memory: the largest resident size, and the largest without mapped files, in MiB."""

    def __init__(self) -> None:
        """Has sampled nothing yet."""
        super().__init__(daemon=True)
        self.peak = {"VmRSS": 0.0, "RssAnon": 0.0}
        self.now = dict(self.peak)

    def run(self) -> None:
        """Samples until the process ends."""
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.now[name] = int(value.split()[0]) / 1024
                    self.peak[name] = max(self.peak[name], self.now[name])
            time.sleep(0.02)


class Phases:
    """Seconds and GPU memory of the parts of a start."""

    def __init__(self) -> None:
        """Has measured nothing yet."""
        self.found: dict[str, float] = {}

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function``, timed to the end of its work on the GPU, with the largest memory meanwhile."""
        import torch

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            self.found[f"{name}_seconds"] = time.perf_counter() - begin
            self.found[f"{name}_gpu_peak_mib"] = torch.cuda.max_memory_allocated() / MIB
            self.found[f"{name}_gpu_reserved_peak_mib"] = torch.cuda.max_memory_reserved() / MIB
            self.found["gpu_after_mib"] = torch.cuda.memory_allocated() / MIB
            self.found["gpu_reserved_after_mib"] = torch.cuda.memory_reserved() / MIB
            return result

        return wrapper


def start_vllm(folder: Path, phases: Phases, cpu_offload_gb: float) -> list[int]:
    """Starts vLLM on a checkpoint and returns some tokens."""
    import torch
    import vllm
    import vllm.model_executor.model_loader.base_loader as base_loader
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    phases.found["import_seconds"] = time.time() - float(os.environ["LOAD_STARTED"])
    DefaultModelLoader.load_weights = phases.measured("read", DefaultModelLoader.load_weights)
    base_loader.process_weights_after_loading = phases.measured("process", base_loader.process_weights_after_loading)
    engine = LLM(
        model=str(folder),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=16,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=1 << 30,
        cpu_offload_gb=cpu_offload_gb,
        attention_config={"backend": "TRITON_ATTN"},
        kernel_config={"linear_backend": "marlin", "moe_backend": "marlin"},  # the source, too
    )
    phases.found["ready_seconds"] = time.time() - float(os.environ["LOAD_STARTED"])
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    output = engine.generate([{"prompt_token_ids": list(range(5, 25))}], sampling, use_tqdm=False)[0]
    if cpu_offload_gb:
        pinned = torch.cuda.host_memory_stats()
        phases.found["host_pinned_after_mib"] = pinned.get("allocated_bytes.current", 0) / MIB
        phases.found["host_pinned_peak_mib"] = pinned.get("allocated_bytes.peak", 0) / MIB
    del vllm
    return list(output.outputs[0].token_ids)


def start_transformers(folder: Path, phases: Phases, cpu_offload_gb: float) -> list[int]:  # noqa: ARG001 - vLLM's
    """Starts Transformers on a checkpoint and returns some tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    import awq2marlin.integrations.transformers  # noqa: F401 - importing it registers the format

    phases.found["import_seconds"] = time.time() - float(os.environ["LOAD_STARTED"])
    load = phases.measured("read", AutoModelForCausalLM.from_pretrained)  # processes each module as it comes
    model = load(folder, dtype=torch.float16, device_map="cuda")
    phases.found["ready_seconds"] = time.time() - float(os.environ["LOAD_STARTED"])
    prompt = torch.arange(5, 25, device="cuda").unsqueeze(0)
    output = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in output[0, 20:]]


def run_engine(engine: str, folder: Path, cpu_offload_gb: float, out: Path) -> None:
    """Starts an engine in this process, once, and writes what it cost."""
    memory = HostMemory()
    memory.start()
    phases = Phases()
    tokens = {"vllm": start_vllm, "transformers": start_transformers}[engine](folder, phases, cpu_offload_gb)
    found = phases.found
    found["first_token_seconds"] = time.time() - float(os.environ["LOAD_STARTED"])
    found["gpu_peak_mib"] = max(value for name, value in found.items() if name.endswith("_gpu_peak_mib"))
    found["gpu_reserved_peak_mib"] = max(v for name, v in found.items() if name.endswith("_gpu_reserved_peak_mib"))
    found["host_peak_mib"], found["host_anonymous_peak_mib"] = memory.peak["VmRSS"], memory.peak["RssAnon"]
    found["host_anonymous_after_mib"] = memory.now["RssAnon"]
    rounded = {name: round(value, 3) for name, value in found.items()}
    out.write_text(json.dumps({**rounded, "tokens": tokens, **versions()}))


def versions() -> dict[str, str]:
    """Returns what ran, and on what."""
    import torch

    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    for name in ("vllm", "transformers"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    return found


def start_engine(engine: str, folder: Path, cpu_offload_gb: float, out: Path) -> dict[str, Any]:
    """Runs `run_engine` in a process of its own and returns what it wrote, or why it failed."""
    command = [sys.executable, __file__, "--engine", engine, "--checkpoint", str(folder), "--out", str(out)]
    command += ["--cpu-offload-gb", str(cpu_offload_gb)]
    environment = {**os.environ, **ENVIRONMENT, "LOAD_STARTED": str(time.time())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        print("\n".join(lines[-40:]), file=sys.stderr)
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median of every figure."""
    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in names}


def measure(engine: str, layers: int, repeats: int, cpu_offload_gb: float, work: Path) -> dict[str, Any]:
    """Makes and converts a model, starts an engine on both in turn, and returns every run and the medians."""
    from awq2marlin import convert

    folders = {kind: work / kind for kind in KINDS}
    begin = time.perf_counter()
    size = write_model(folders["awq"], Model(4096, 14336, layers, 32, 8, 128256))
    made = time.perf_counter()
    convert(folders["awq"], folders["marlin"])
    print(f"made {size / 1e9:.2f} GB in {made - begin:.0f} s, converted in {time.perf_counter() - made:.1f} s")
    out = work / "run.json"
    print(f"warm-up: {json.dumps(start_engine(engine, folders['marlin'], cpu_offload_gb, out))}", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            run = start_engine(engine, folders[kind], cpu_offload_gb, out)
            print(f"{kind}: {json.dumps(run)}", flush=True)
            runs[kind].append(run)
    row = {"engine": engine, "layers": layers, "bytes": size}
    row |= {"cpu_offload_gb": cpu_offload_gb} if cpu_offload_gb else {}
    return {**row, "runs": runs, **summary(runs)}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the medians of each kind of checkpoint, what ran, and whether all runs gave the same tokens."""
    found: dict[str, Any] = {}
    for kind, done in runs.items():
        failed = [run["error"] for run in done if "error" in run]
        found[kind] = {"error": failed[0]} if failed else medians(done)
    found |= {name: value for name, value in runs["marlin"][0].items() if isinstance(value, str) and name != "error"}
    tokens = {json.dumps(run["tokens"]) for done in runs.values() for run in done if "error" not in run}
    return {**found, "same_tokens": len(tokens) == 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; other engines' rows in it are kept")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--layers", type=int, default=32, help="of Llama-3-8B's 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-offload-gb", type=float, default=0.0, help="weights that vLLM keeps on the host (0)")
    parser.add_argument("--work", type=Path, help="folder for the models; a temporary one if not given")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.checkpoint:
        run_engine(options.engine, options.checkpoint, options.cpu_offload_gb, options.out)
        return 0

    with tempfile.TemporaryDirectory(dir=options.work) as work:
        row = measure(options.engine, options.layers, options.repeats, options.cpu_offload_gb, Path(work))
    document = earlier(options.out)
    document["rows"] = [each for each in document["rows"] if each["engine"] != options.engine]
    document["rows"].append({**row, **origin()})
    save(options.out, document)
    return 1 if "error" in row["marlin"] or not row["same_tokens"] else 0


if __name__ == "__main__":
    sys.exit(main())
