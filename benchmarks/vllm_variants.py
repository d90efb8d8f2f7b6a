"""Whether vLLM says the same with a converted checkpoint however it is loaded: load formats, offloading, sleep, LoRA.

    python benchmarks/vllm_variants.py --out benchmarks/results/vllm_variants_h100.json [--tp 2] [--only NAME ...]

Makes a random model, converts it, and runs it in an engine for each variant, with the linear layers on the kernel that
the plugin chooses. All must say the same tokens with the same bits of their log-probabilities as the engine that loads
the checkpoint plainly; with LoRA, as the dequantized model in fp16 with the same adapter says them, within a bound.
Ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_models import dequantize
from random_models import Model, write_model
from vllm_tokens import DENSE_BOUND, ENVIRONMENT, agreement, answer, draw_prompts, judge, kinds_of_layers, make_engine

MODEL = Model(hidden=1024, inner=2816, layers=4, heads=16, key_value_heads=4, vocabulary=4096)
WORDS = {key: value for key, value in ENVIRONMENT.items() if key != "AWQ2MARLIN_KERNEL"}
RANK = 8

#: What each variant asks vLLM for, besides what all get; the checkpoint is ``marlin`` unless said otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded_state": {"load_format": "sharded_state"},
    "cpu offload": {"cpu_offload_gb": 0.02},
    "sleep and wake-up": {"enable_sleep_mode": True},
    "lora": {"enable_lora": True, "max_lora_rank": RANK},
    "lora, dequantized": {"enable_lora": True, "max_lora_rank": RANK},
}


def write_adapter(folder: Path) -> None:
    """Writes a LoRA adapter of random weights for two projections of every layer."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer in range(MODEL.layers):
        for name, size_k, size_n in (("self_attn.q_proj", 1024, 1024), ("mlp.down_proj", 2816, 1024)):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            draw = lambda rows, columns: torch.randn(rows, columns, generator=generator).half()  # noqa: E731
            tensors[f"{prefix}.lora_A.weight"] = draw(RANK, size_k) * size_k**-0.5
            tensors[f"{prefix}.lora_B.weight"] = draw(size_n, RANK) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))


def run_variant(name: str, work: Path, ranks: int, out: Path) -> None:
    """Generates in this process and writes what came out."""
    import vllm

    folder = work / {"sharded_state": "sharded", "lora, dequantized": "dense"}.get(name, "marlin")
    engine = make_engine(folder, ranks, eager=False, **VARIANTS[name])
    prompts, _ = draw_prompts(MODEL.vocabulary)
    if name.startswith("lora"):
        from vllm.lora.request import LoRARequest

        generate, request = engine.generate, LoRARequest("adapter", 1, str(work / "adapter"))
        engine.generate = lambda *args, **options: generate(*args, lora_request=request, **options)
    if name == "sleep and wake-up":
        answer(engine, prompts)
        engine.sleep(level=1)
        engine.wake_up()
    said = work / "lora.json"
    if name == "lora, dequantized":
        while not said.exists():
            time.sleep(0.5)
        rows = judge(engine, prompts, json.loads(said.read_text())["rows"])
    else:
        rows = answer(engine, prompts)
    if name == "plain":
        (work / "sharded").mkdir()
        engine.llm_engine.engine_core.save_sharded_state(path=str(work / "sharded"))
        for path in folder.glob("*.json"):
            if "index" not in path.name:
                shutil.copy(path, work / "sharded")
    document = {"rows": rows, "vllm": vllm.__version__, "torch": torch.__version__}
    document |= {"gpu": torch.cuda.get_device_name(), "layers": engine.apply_model(kinds_of_layers)[0]}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(document))
    partial.replace(out)


def start_variant(name: str, work: Path, ranks: int) -> dict[str, Any]:
    """Runs a variant in a process of its own; returns what it wrote, or why it failed."""
    out = work / f"{name.replace(', ', '_').replace(' ', '_')}.json"
    command = [sys.executable, __file__, "--variant", name, "--work", str(work), "--tp", str(ranks), "--out", str(out)]
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, env={**os.environ, **WORDS}, stdout=log, stderr=log, check=False)
    if done.returncode:
        lines = [line for line in out.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
        print(f"{name} failed:", *lines[-30:], sep="\n", file=sys.stderr)
        return {"error": next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")[-300:]}
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def compare(name: str, found: dict[str, Any], plain: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
    """Returns how a variant's words compare with what they must be."""
    row: dict[str, Any] = {"variant": name}
    if "error" in found or "error" in plain:
        return {**row, "ok": False, "error": found.get("error", "the plain engine failed")}
    row |= {key: found[key] for key in ("vllm", "torch", "gpu", "layers")}
    if name == "lora, dequantized":
        if "error" in lora:
            return {**row, "ok": False, "error": "the engine with the adapter failed"}
        row |= agreement("together", lora["rows"], found["rows"])
        row["together_same_tokens"] = sum(each["best"] == each["logprobs"] for each in found["rows"])
        return {**row, "ok": row["together_max_logprob_difference"] < DENSE_BOUND}
    row |= agreement("together", found["rows"], plain["rows"])
    if name == "lora":  # must say something else, or the adapter did nothing
        return {**row, "ok": row["together_same_tokens"] < row["together_prompts"]}
    return {**row, "ok": row["together_same_logprobs"] == row["together_prompts"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other runs in it are kept")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_variant(options.variant, options.work, options.tp, options.out)
        return 0

    from awq2marlin import convert

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(VARIANTS)) as pool:
        work = Path(folder)
        write_model(work / "awq", MODEL)
        convert(work / "awq", work / "marlin", verify="all")
        dequantize(work / "awq", work / "dense", MODEL.dtype)
        write_adapter(work / "adapter")
        names = [name for name in options.only if name not in ("plain", "sharded_state")]
        running = {name: pool.submit(start_variant, name, work, options.tp) for name in names}
        found = {"plain": start_variant("plain", work, options.tp)}  # which saves what sharded_state loads
        if "sharded_state" in options.only:
            found["sharded_state"] = start_variant("sharded_state", work, options.tp)
        found |= {name: each.result() for name, each in running.items()}
    rows = [compare(name, each, found["plain"], found.get("lora", {})) for name, each in found.items()]
    for row in rows:
        row |= {"tensor_parallel_size": options.tp, "date": datetime.date.today().isoformat()}
        print(json.dumps(row), flush=True)
    document = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    document["rows"] += rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
