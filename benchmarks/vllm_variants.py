"""Whether vLLM says the same with a converted checkpoint however it is loaded: load formats, offloading, sleep, LoRA.

    python benchmarks/vllm_variants.py --out benchmarks/results/vllm_variants_h100.json
        [--experts] [--tp 2] [--only NAME ...]

Makes a random model, converts it, and runs it in an engine for each variant, on the kernels that the plugin chooses.
All must say the same tokens with the same bits of their log-probabilities as the engine that loads the checkpoint
plainly; a mixture of experts only for prompts that go in alone. With LoRA, as the dequantized model in fp16 with the
same adapter says them, within a bound. For ``ipc_cache``, `vllm preload` runs first, in a process of its own.
``fastsafetensors`` and ``runai_streamer`` need the packages of these names. Ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_models import dequantize
from random_models import Model, write_model
from record import earlier, kinds_of_layers, origin, save
from vllm_tokens import DENSE_BOUND, ENVIRONMENT, agreement, answer, draw_prompts, judge, make_engine

MODELS = {
    False: Model(hidden=1024, inner=2816, layers=4, heads=16, key_value_heads=4, vocabulary=4096),
    True: Model(1024, 256, 4, 8, 4, 4096, experts=16, top_k=4, head_size=128),
}
WORDS = {key: value for key, value in ENVIRONMENT.items() if key != "AWQ2MARLIN_KERNEL"}
RANK = 8

#: What each variant asks vLLM for, besides what all get; the checkpoint is ``marlin`` unless said otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded_state": {"load_format": "sharded_state"},
    "ipc_cache": {"load_format": "ipc_cache"},
    "fastsafetensors": {"load_format": "fastsafetensors"},
    "runai_streamer": {"load_format": "runai_streamer"},
    "cpu offload": {"cpu_offload_gb": 0.02},
    "sleep and wake-up": {"enable_sleep_mode": True},
    "lora": {"enable_lora": True, "max_lora_rank": RANK},
    "lora, dequantized": {"enable_lora": True, "max_lora_rank": RANK},
}


def adapted(model: Model) -> Iterator[tuple[str, int, int]]:
    """Yields name, K and N of the projections of a layer that the adapter changes."""
    yield "self_attn.q_proj", model.hidden, model.head_columns * model.heads
    if not model.experts:
        yield "mlp.down_proj", model.inner, model.hidden
    for expert in range(model.experts):
        for name in ("gate_proj", "up_proj"):
            yield f"mlp.experts.{expert}.{name}", model.hidden, model.inner
        yield f"mlp.experts.{expert}.down_proj", model.inner, model.hidden


def write_adapter(folder: Path, model: Model) -> None:
    """Writes a LoRA adapter of random weights for some projections of every layer."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer in range(model.layers):
        for name, size_k, size_n in adapted(model):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            draw = lambda rows, columns: torch.randn(rows, columns, generator=generator).half()  # noqa: E731
            tensors[f"{prefix}.lora_A.weight"] = draw(RANK, size_k) * size_k**-0.5
            tensors[f"{prefix}.lora_B.weight"] = draw(size_n, RANK) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in adapted(model)}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))


def preload(folder: Path, ranks: int, sockets: Path) -> None:
    """Is `vllm preload` on a checkpoint: holds its weights on the GPUs until it is ended."""
    from vllm.entrypoints.cli.preload import PreloadSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    PreloadSubcommand.add_cli_args(parser)
    arguments = ["--model", str(folder), "--tensor-parallel-size", str(ranks), "--max-model-len", "512"]
    arguments += ["--skip-tokenizer-init", "--enforce-eager", "--disable-custom-all-reduce"]
    arguments += ["--weight-cache-socket-dir", str(sockets)]
    arguments += ["--kernel-config", json.dumps({"linear_backend": "marlin", "moe_backend": "marlin"})]
    arguments += ["--attention-config", json.dumps({"backend": "TRITON_ATTN"})]
    PreloadSubcommand.cmd(parser.parse_args(arguments))


@contextmanager
def preloaded(folder: Path, ranks: int, work: Path) -> Iterator[dict[str, Any]]:
    """Has `vllm preload` run meanwhile, and yields what an engine that takes its weights is given."""
    command = [sys.executable, __file__, "--preload", str(folder), "--tp", str(ranks), "--out"]
    with tempfile.TemporaryDirectory(dir="/tmp") as place, (work / "preload.log").open("w") as log:
        sockets = Path(place)  # a socket's path must be short
        command.append(place)
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while len(list(sockets.glob("*.sock"))) < ranks:
                if process.poll() is not None:
                    lines = (work / "preload.log").read_text(errors="replace").splitlines()
                    raise RuntimeError("vllm preload ended:\n" + "\n".join(lines[-30:]))
                time.sleep(0.5)
            yield {"model_loader_extra_config": {"socket_dir": str(sockets), "fallback": False}}
        finally:
            process.terminate()
            process.wait()


def run_variant(name: str, work: Path, ranks: int, out: Path) -> None:
    """Generates in this process and writes what came out."""
    folder = work / {"sharded_state": "sharded", "lora, dequantized": "dense"}.get(name, "marlin")
    options = dict(VARIANTS[name])
    if name == "ipc_cache":
        with preloaded(folder, ranks, work) as more:
            out.write_text(json.dumps(words_of(name, folder, work, ranks, options | more)))
    else:
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(words_of(name, folder, work, ranks, options)))
        partial.replace(out)


def words_of(name: str, folder: Path, work: Path, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Returns what an engine says, and on which layers."""
    import vllm

    engine = make_engine(folder, ranks, eager=False, **options)
    prompts, short = draw_prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    if name.startswith("lora"):
        from vllm.lora.request import LoRARequest

        generate, request = engine.generate, LoRARequest("adapter", 1, str(work / "adapter"))
        engine.generate = lambda *args, **options: generate(*args, lora_request=request, **options)
    if name == "sleep and wake-up":
        answer(engine, prompts)
        engine.sleep(level=1)
        engine.wake_up()
    document: dict[str, Any] = {"vllm": vllm.__version__, "torch": torch.__version__}
    if name == "lora, dequantized":
        said = work / "lora.json"
        while not said.exists():
            time.sleep(0.5)
        document["rows"] = judge(engine, prompts, json.loads(said.read_text())["rows"])
    else:
        document["rows"] = answer(engine, prompts)
        document["alone"] = [row for prompt in short for row in answer(engine, [prompt])]
    if name == "plain":
        (work / "sharded").mkdir()
        engine.llm_engine.engine_core.save_sharded_state(path=str(work / "sharded"))
        for path in folder.glob("*.json"):
            if "index" not in path.name:
                shutil.copy(path, work / "sharded")
    document |= {"gpu": torch.cuda.get_device_name(), "layers": engine.apply_model(kinds_of_layers)[0]}
    return document


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


def compare(
    name: str, found: dict[str, Any], plain: dict[str, Any], lora: dict[str, Any], experts: bool = False
) -> dict[str, Any]:
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
        near = [
            abs(a - b) < DENSE_BOUND
            for one, other in zip(lora["rows"], found["rows"], strict=True)
            for a, b in zip(one["logprobs"], other["logprobs"], strict=True)
        ]
        row["together_tokens_within_bound"] = sum(near) / len(near)
        needed = 0.98 if experts else 1.0  # where two experts are about equally good, rounding chooses
        return {**row, "ok": row["together_tokens_within_bound"] >= needed}
    row |= agreement("together", found["rows"], plain["rows"]) | agreement("alone", found["alone"], plain["alone"])
    if name == "lora":  # must say something else, or the adapter did nothing
        return {**row, "ok": row["together_same_tokens"] < row["together_prompts"]}
    is_same = row["alone_same_logprobs"] == row["alone_prompts"]
    return {**row, "ok": is_same and (experts or row["together_same_logprobs"] == row["together_prompts"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other runs in it are kept")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--preload", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.preload:
        preload(options.preload, options.tp, options.out)
        return 0
    if options.variant:
        run_variant(options.variant, options.work, options.tp, options.out)
        return 0

    from awq2marlin import convert

    model = MODELS[options.experts]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(VARIANTS)) as pool:
        work = Path(folder)
        write_model(work / "awq", model)
        convert(work / "awq", work / "marlin", verify="all")
        dequantize(work / "awq", work / "dense", model.dtype)
        write_adapter(work / "adapter", model)
        names = [name for name in options.only if name not in ("plain", "sharded_state")]
        running = {name: pool.submit(start_variant, name, work, options.tp) for name in names}
        found = {"plain": start_variant("plain", work, options.tp)}  # which saves what sharded_state loads
        if "sharded_state" in options.only:
            found["sharded_state"] = start_variant("sharded_state", work, options.tp)
        found |= {name: each.result() for name, each in running.items()}
    plain, lora = found["plain"], found.get("lora", {})
    rows = [compare(name, each, plain, lora, options.experts) for name, each in found.items()]
    for row in rows:
        row |= {"experts": model.experts, "tensor_parallel_size": options.tp}
        row |= origin()
        print(json.dumps(row), flush=True)
    document = earlier(options.out)
    document["rows"] += rows
    save(options.out, document)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
