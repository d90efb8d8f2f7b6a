"""Whether vLLM keeps a second copy of weights that it offloads to the CPU, on the GPU or on the host.

    python benchmarks/vllm_offload.py --out benchmarks/results/vllm_offload_h100.json [--gib 2] [--layers 32]

Makes a model of Llama-3-8B's shapes and converts it, and loads both with and without `cpu_offload_gb`, each in a
process of its own: the source on vLLM's Marlin, the converted one as the plugin serves it. Of each is kept, once the
weights are loaded and processed, and once more when the engine is gone: GPU memory allocated then and at most; bytes of
parameters that lie on the host; pinned memory of the host that torch uses and holds (rounded up to powers of two,
tensor by tensor); other memory of the process without files. Where memory of the GPU shrinks by as much as is
offloaded, there is no second copy on it; where torch holds no more pinned memory than the parameters take, there is
none on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record import origin, save
from serving import (
    ENGINES,
    ENVIRONMENT,
    MIB,
    MODELS,
    alone,
    link_models,
    make_models,
    start,
)

NAMES = ("source_marlin", "converted")


def anonymous_mib() -> int:
    """Returns how much memory without files this process has, as the kernel counts it: not what CUDA pins."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) // 1024


def offloaded(model: Any) -> dict[str, Any]:
    """Returns the bytes of a model's parameters that lie on the host, and of all, in MiB."""
    parameters = list(model.parameters())
    there = [each for each in parameters if each.device.type == "cpu" or getattr(each, "_vllm_is_uva_offloaded", False)]
    rounded = sum(1 << max(each.nbytes - 1, 0).bit_length() for each in there)
    sizes = {"offloaded_mib": sum(each.nbytes for each in there), "offloaded_rounded_up_mib": rounded}
    sizes["weights_mib"] = sum(each.nbytes for each in parameters)
    return {"offloaded_parameters": len(there), **{name: size // MIB for name, size in sizes.items()}}


def memory() -> dict[str, int]:
    """Returns what this process uses of the GPU and of the host, in MiB."""
    import torch

    pinned = torch.cuda.memory.host_memory_stats()
    found = {"gpu_allocated": torch.cuda.memory_allocated(), "gpu_allocated_peak": torch.cuda.max_memory_allocated()}
    found |= {"pinned_used": pinned.get("active_bytes.current", 0), "pinned": pinned.get("allocated_bytes.current", 0)}
    sizes = {f"{name}_mib": size // MIB for name, size in found.items()}
    return {**sizes, "anonymous_mib": anonymous_mib()}


def run_engine(name: str, gib: float, work: Path, out: Path) -> None:
    """Starts an engine in this process, and writes what its weights take once they are loaded."""
    import torch
    import vllm
    from vllm.model_executor.model_loader import base_loader

    found: dict[str, Any] = {"engine": ENGINES[name].title, "cpu_offload_gb": gib, "vllm": vllm.__version__}
    found |= {"torch": torch.__version__}
    load_model = base_loader.BaseModelLoader.load_model

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        with alone(work):
            before = memory()
            torch.cuda.reset_peak_memory_stats()
            model = load_model(*args, **kwargs)
            torch.cuda.synchronize()
            found["before"], found["loaded"] = before, memory() | offloaded(model)
        return model

    base_loader.BaseModelLoader.load_model = load_alone
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "cpu_offload_gb": gib}
    engine = start(ENGINES[name], work / ENGINES[name].checkpoint, **options)
    del engine
    save(out, {**found, "gpu": torch.cuda.get_device_name(), "engine_dropped": memory()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--gib", type=float, default=2, help="of weights to be offloaded (2)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--models", type=Path, help="folder whose models are loaded; made there if they are missing")
    parser.add_argument("--engine", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine, options.gib, options.work, options.out)
        return 0

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        work = Path(folder)
        models = options.models or work
        make_models(replace(MODELS[False], layers=options.layers), models)
        link_models(models, work)

        def one(name: str, gib: float) -> dict[str, Any]:
            out = work / f"{name}.{gib}.json"
            command = [sys.executable, __file__, "--engine", name, "--gib", str(gib), "--work", str(work)]
            with out.with_suffix(".log").open("w") as log:
                environment = {**os.environ, **ENVIRONMENT, **ENGINES[name].environment}
                command += ["--out", str(out)]
                done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
            if done.returncode:
                lines = out.with_suffix(".log").read_text(errors="replace").splitlines()
                print(f"{name}, {gib} GiB failed:", *lines[-30:], sep="\n", file=sys.stderr)
                return {"engine": ENGINES[name].title, "cpu_offload_gb": gib, "error": lines[-1] if lines else ""}
            found: dict[str, Any] = json.loads(out.read_text())
            return found

        rows = list(pool.map(one, *zip(*((name, gib) for name in NAMES for gib in (0.0, options.gib)), strict=True)))
    for row in rows:
        print(json.dumps(row), flush=True)
    save(options.out, {**origin(), "rows": rows})
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
