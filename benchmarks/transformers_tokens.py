"""Tokens and cost of a converted checkpoint in Transformers, beside the dense model that its AWQ tensors mean.

    python benchmarks/transformers_tokens.py AWQ_FOLDER --out benchmarks/results/transformers_h200.json [--device cuda]

Converts the checkpoint, dequantizes it with the slow NumPy reference, which shares no code with the loader, and loads
both, each in a fresh process: greedy tokens, seconds from the start of the process, seconds and largest memory of
``from_pretrained``. The AWQ original itself is loaded too where GPTQModel, which Transformers needs for AWQ, can be
imported; where not, the result says so. Tokens are compared with the dense model's in fp32: its weights are exact.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record import origin, save

MIB = 1 << 20
PROMPT = list(range(5, 25))


def load(folder: Path, device: str, tokens: int) -> dict[str, Any]:
    """Loads a checkpoint in this process and returns what that cost, and greedy tokens."""
    import torch
    import transformers

    import awq2marlin.integrations.transformers  # noqa: F401 - registers the format

    on_gpu = device == "cuda"
    found: dict[str, Any] = {"import_seconds": time.time() - float(os.environ["STARTED"])}
    begin = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    if on_gpu:
        torch.cuda.synchronize()
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        found["gpu_after_mib"] = torch.cuda.memory_allocated() / MIB
    found["load_seconds"] = time.perf_counter() - begin
    found["host_peak_mib"] = host_peak_mib()
    prompt = torch.tensor([PROMPT], device=device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=1, **options)
    found["first_token_seconds"] = time.time() - float(os.environ["STARTED"])
    begin = time.perf_counter()
    found["tokens"] = model.generate(prompt, max_new_tokens=tokens, **options)[0, len(PROMPT) :].tolist()
    found["tokens_per_second"] = tokens / (time.perf_counter() - begin)
    return {**found, "dtype": str(model.dtype), "transformers": transformers.__version__, "torch": torch.__version__}


def host_peak_mib() -> float:
    """Returns the largest resident memory of this process; getrusage would count that of its parent in."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs `load` in a process of its own; returns what it found, or why it failed."""
    command = [sys.executable, __file__, str(folder), "--load", "--device", options.device]
    environment = {**os.environ, "STARTED": str(time.time()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--tokens", str(options.tokens)], env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or ["{}"]
    if done.returncode:
        return {"error": (done.stderr.splitlines() or ["no message"])[-1]}
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="AWQ checkpoint")
    parser.add_argument("--out", type=Path, help="results, JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.folder, options.device, options.tokens)))
        return 0

    import torch
    from dense_models import dequantize

    from awq2marlin import convert

    with tempfile.TemporaryDirectory() as work:
        folders = {"marlin": Path(work, "marlin"), "dense": Path(work, "dense"), "awq": options.folder}
        convert(options.folder, folders["marlin"])
        dequantize(options.folder, folders["dense"], torch.float32)
        results = {kind: run(folders[kind], options) for kind in ("marlin", "dense")}
        if importlib.util.find_spec("gptqmodel"):
            results["awq"] = run(folders["awq"], options)
        else:
            results["awq"] = {"error": "not run: GPTQModel, which Transformers needs to load AWQ, is not installed"}
    same = "tokens" in results["dense"] and results["marlin"].get("tokens") == results["dense"]["tokens"]
    document = {
        **origin(),
        "checkpoint": options.folder.name,
        "device": options.device,
        "same_tokens_as_dense": same,
        **results,
    }
    for kind, result in results.items():
        print(f"{kind}: {json.dumps({name: value for name, value in result.items() if name != 'tokens'})}")
    print(f"the converted checkpoint gives the dense model's {options.tokens} tokens: {same}")
    save(options.out, document)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
