"""Whether SGLang says the same with a converted checkpoint as with its source: greedy tokens and log-probabilities.

    python benchmarks/sglang_tokens.py --out benchmarks/results/sglang_tokens_h100.json [--graphs]
        [--tp 2 [--expert-parallel]] [--only NAME ...] [--keep FOLDER]

The models and the comparison are those of benchmarks/vllm_tokens.py. Each engine has a process of its own. The source
runs on SGLang's own code for its format, which takes Marlin. Once both are loaded, every tensor of every layer must
have the same bits in both, on every rank: what SGLang repacked at its start, and what `awq2marlin convert` wrote. Every
log-probability of prompts that go in alone must have the same bits, too. Prompts that go in together may differ by
rounding, since SGLang batches them by when they arrive.

SGLang's Marlin adds up by atomic operations where N is below 2048 and K is not, and its Marlin experts always do: then
two starts on one and the same checkpoint do not give the same bits. Dense models are therefore made with a smaller K
here. Mixtures of experts run twice, source and converted, and differences are judged by how far two starts are apart.

Where SGLang's AWQ code cannot load a kind (no zero points, 8 bits, a quantized output embedding), the reference is the
dequantized model in plain fp16. The converted checkpoint runs once more on this package's kernels. Ends with exit code
1 if anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import vllm_tokens
from random_models import FORMATS, Model
from record import kinds_of_layers, save
from vllm_tokens import (
    DENSE_BOUND,
    KERNEL_BOUNDS,
    NEW_TOKENS,
    Way,
    agreement,
    compare_all,
    compare_own,
    draw_prompts,
)

#: The largest K whose products SGLang's Marlin adds up in the same order every time, whatever N is, and of which two
#: ranks get whole groups of 128.
ORDERED_K = 1792

MODELS = {
    name: dataclasses.replace(model, inner=min(model.inner, ORDERED_K)) for name, model in vllm_tokens.MODELS.items()
}

#: What SGLang's code for compressed-tensors calls the tensors of a layer, and what its other code and ours call them.
OTHER_NAMES = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}

#: A tensor of compressed-tensors that says what the others are.
SHAPE = "weight_shape"

#: What keeps SGLang away from what needs a network or NVLink multicast.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "SGLANG_PLUGINS": "awq2marlin",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # engines side by side start when they like
}

#: Seconds after which an engine that has not said all is ended.
PATIENCE = 600

#: Tokens of a prefill for which there are CUDA graphs: enough for every prompt here. SGLang would capture 58 sizes.
PREFILL_GRAPHS = [8, 32, 72, 136, 304, 576]

#: Where SGLang's process of a rank writes what it has loaded; the rank's number is put behind it.
LOADED_VARIABLE = "SGLANG_TOKENS_LOADED"


def digests(model: Any) -> dict[str, str]:
    """Returns a digest of each tensor that the model holds, by its name."""
    words = {name: tensor.flatten().view(torch.uint8) for name, tensor in model.state_dict().items() if tensor.numel()}
    return {name: hashlib.sha256(word.cpu().numpy().tobytes()).hexdigest() for name, word in words.items()}


def run_scheduler(*arguments: Any, **options: Any) -> None:
    """SGLang's process of a rank, which also writes what it has loaded."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_executor.model_runner import ModelRunner

    rank = inspect.signature(run_scheduler_process).bind(*arguments, **options).arguments["tp_rank"]
    load = ModelRunner.load_model

    def load_and_tell(runner: Any) -> None:
        load(runner)
        loaded = {"layers": kinds_of_layers(runner.model), "tensors": digests(runner.model)}
        save(Path(f"{os.environ[LOADED_VARIABLE]}{rank}"), loaded)

    ModelRunner.load_model = load_and_tell
    run_scheduler_process(*arguments, **options)


def tell_what_is_loaded(out: Path, ranks: int = 1) -> list[Path]:
    """Has the engine of this process write what it has loaded beside ``out``; returns the files, one for each rank."""
    loaded = out.with_suffix(".loaded")
    os.environ[LOADED_VARIABLE] = str(loaded)
    return [Path(f"{loaded}{rank}") for rank in range(ranks)]


def what_is_loaded(files: list[Path]) -> dict[str, Any]:
    """Returns the first rank's layers, and the tensors of all ranks; a name says of which unless it is the first."""
    found = [json.loads(file.read_text()) for file in files]
    tensors = {
        f"rank {rank}: {name}" if rank else name: digest
        for rank, each in enumerate(found)
        for name, digest in each["tensors"].items()
    }
    return {"layers": found[0]["layers"], "tensors": tensors}


def make_engine(folder: Path, way: Way, **options: Any) -> Any:
    """Returns SGLang's engine on a checkpoint, with what makes its arithmetic the same every time."""
    from sglang.srt.entrypoints.engine import Engine

    class TellingEngine(Engine):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(run_scheduler)

        @classmethod
        def _launch_detokenizer_subprocesses(cls, **_: Any) -> tuple[list[Any], list[str]]:
            return [], []  # without a tokenizer nothing goes through it, and its start takes as long as an engine's

    settings = {
        "cuda_graph_max_bs_decode": 8,
        "context_length": 512,
        "max_running_requests": 16,
        "max_total_tokens": 1 << 14,
        "mem_fraction_static": 0.8,  # of what is free when it starts; others take theirs meanwhile
        "log_level": "info",
    }
    return TellingEngine(
        model_path=str(folder),
        tp_size=way.ranks,
        ep_size=way.ranks if way.expert_parallel else 1,
        disable_cuda_graph=way.eager,
        skip_tokenizer_init=True,
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_custom_all_reduce=True,
        disable_radix_cache=True,
        random_seed=0,
        **(settings | options),
    )


def answer(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Returns greedy tokens and their log-probabilities for prompts that go in together."""
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, top_logprobs_num=2)
    rows = []
    for said in (output["meta_info"] for output in outputs):
        chosen = said["output_token_logprobs"]
        best = [sorted((entry[0] for entry in entries), reverse=True) for entries in said["output_top_logprobs"]]
        rows.append(
            {
                "tokens": [entry[1] for entry in chosen],
                "logprobs": [entry[0] for entry in chosen],
                "gaps": [first - second for first, second in best],
            }
        )
    return rows


def judge(engine: Any, prompts: list[list[int]], said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the log-probabilities of what another engine said, and those of the best tokens in their places."""
    texts = [prompt + row["tokens"] for prompt, row in zip(prompts, said, strict=True)]
    sampling = {"temperature": 0.0, "max_new_tokens": 1}
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    outputs = engine.generate(input_ids=texts, sampling_params=sampling, **options)
    rows = []
    for prompt, row, output in zip(prompts, said, outputs, strict=True):
        entries = output["meta_info"]["input_token_logprobs"][len(prompt) :]
        best = output["meta_info"]["input_top_logprobs"][len(prompt) :]
        # SGLang says 0 for the last token of the vocabulary; it does not tell it from those that stand for images.
        if any(entry[1] not in (token, 0) for entry, token in zip(entries, row["tokens"], strict=True)):
            raise RuntimeError("SGLang gave the log-probabilities of other tokens than those that were asked for")
        rows.append(
            {
                "tokens": row["tokens"],
                "logprobs": [entry[0] for entry in entries],
                "best": [entry[0][0] for entry in best],
            }
        )
    return rows


def run_engine(folder: Path, way: Way, forced: Path | None, out: Path) -> None:
    """Generates in this process and writes what came out; ``forced`` holds tokens whose probabilities are asked for."""
    import sglang

    loaded = tell_what_is_loaded(out, way.ranks)
    begin = time.perf_counter()
    engine = make_engine(folder, way, cuda_graph_bs_prefill=PREFILL_GRAPHS)
    document: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 2)}
    prompts, short = draw_prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    if forced is None:
        document["rows"] = answer(engine, prompts)
        document["alone"] = [row for prompt in short + prompts for row in answer(engine, [prompt])]
    else:
        while not forced.exists():  # another engine is still at it
            time.sleep(0.1)
        document["rows"] = judge(engine, prompts, json.loads(forced.read_text())["rows"])
    document |= {"sglang": sglang.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    document |= what_is_loaded(loaded)
    save(out, document)
    engine.shutdown()


def start_engine(
    folder: Path, way: Way, out: Path, forced: Path | None = None, kernel: str = "engine"
) -> dict[str, Any]:
    """Runs `run_engine` in a process of its own and returns what it wrote."""
    command = [sys.executable, __file__, "--engine", str(folder), "--tp", str(way.ranks), "--out", str(out)]
    command += ["--forced", str(forced)] if forced else []
    command += [] if way.eager else ["--graphs"]
    command += ["--expert-parallel"] if way.expert_parallel else []
    environment = {**os.environ, **ENVIRONMENT, "AWQ2MARLIN_KERNEL": kernel}
    with out.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=PATIENCE, check=True)
            failure = ""
        except subprocess.CalledProcessError as error:
            failure = f"ended with exit code {error.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"has not said all in {PATIENCE} seconds"
    if failure or not out.exists():
        save(out, {"failure": failure})  # whoever waits for it shall not wait longer
        tail = out.with_suffix(".log").read_text(errors="replace").splitlines()[-60:]
        raise RuntimeError(f"the engine on {folder} {failure or 'said nothing'}:\n" + "\n".join(tail))
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def compare_tensors(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, Any]:
    """Returns how many loaded tensors have the same bits, and the names of those that have not or are in one only."""
    theirs = {name_here(name): digest for name, digest in theirs.items() if not name.endswith(f".{SHAPE}")}
    names = ours.keys() | theirs.keys()
    apart = sorted(name for name in names if ours.get(name) != theirs.get(name))
    return {"tensors": len(names), "tensors_same": len(names) - len(apart), "tensors_apart": apart[:20]}


def name_here(name: str) -> str:
    """Returns what a tensor of SGLang's own code is called in this package's layers."""
    module, dot, part = name.rpartition(".")
    return f"{module}{dot}{OTHER_NAMES.get(part, part)}"


def compare_with_source(
    model: Model, ours: dict[str, Any], theirs: dict[str, Any], noise: float | None
) -> dict[str, Any]:
    """Returns how the converted checkpoint on SGLang's Marlin compares with the source on SGLang's own code.

    Args:
        model: what both are.
        ours: what the converted checkpoint's engine wrote.
        theirs: what the source's engine wrote.
        noise: how far two starts are apart, or None if bits must be the same.
    """
    row: dict[str, Any] = {"reference": f"{FORMATS[model.format]} source on SGLang's own code"}
    row |= compare_tensors(ours["tensors"], theirs["tensors"])
    row |= agreement("alone", ours["alone"], theirs["alone"]) | agreement("together", ours["rows"], theirs["rows"])
    if not all_on_marlin(model):  # SGLang dequantizes those modules of the source
        row["ok"] = row["alone_max_logprob_difference"] < KERNEL_BOUNDS[model.dtype]
    elif noise is not None:
        apart = max(row[f"{what}_max_logprob_difference"] for what in ("alone", "together"))
        row["ok"] = not row["tensors_apart"] and apart <= 2 * noise
    else:
        row["ok"] = not row["tensors_apart"] and row["alone_same_logprobs"] == row["alone_prompts"]
        row["ok"] &= row["together_max_logprob_difference"] < KERNEL_BOUNDS[model.dtype]
    return row


def serves_source(model: Model, ranks: int) -> bool:
    """Returns whether SGLang's own code can load a source. It fails at a quantized output embedding, too."""
    return vllm_tokens.serves_source(model, ranks) and not model.quantized_head


def all_on_marlin(model: Model) -> bool:
    """Returns whether SGLang's Marlin takes the shapes of every module of a source."""
    return model.hidden % 128 == 0 and model.inner % 128 == 0


def compare(name: str, model: Model, way: Way, work: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Returns how the engines' words compare, for one model that is prepared; engines start in ``pool``."""
    from dense_models import dequantize

    def start(checkpoint: str, out: str, kernel: str = "engine", forced: Path | None = None) -> Future[dict[str, Any]]:
        return pool.submit(start_engine, work / checkpoint, way, work / f"{out}.json", forced, kernel)

    row: dict[str, Any] = {"model": name, "tensor_parallel_size": way.ranks, "cuda_graphs": not way.eager}
    row |= {"expert_parallel": True} if way.expert_parallel else {}
    only_own = model.bits == 8 and model.zero_points
    has_source = serves_source(model, way.ranks)
    runs = {"own": start("marlin", "own", "own")}
    if not only_own:
        runs["ours"] = start("marlin", "ours")
    if has_source:
        runs["theirs"] = start("source", "theirs")
    else:
        dequantize(work / "source", work / "dense", model.dtype)
        runs["dense"] = start("dense", "dense", forced=work / ("own.json" if only_own else "ours.json"))
    if model.experts:
        runs |= {f"{key}_again": start(*_AGAIN[key]) for key in ("ours", "theirs") if key in runs}
    done = {key: run.result() for key, run in runs.items()}
    own = done["own"]
    ours, theirs = done.get("ours", own), done["theirs" if has_source else "dense"]
    noise = 0.0
    for again in ("ours", "theirs"):
        if f"{again}_again" in done:
            for what, part in (("alone", "alone"), ("together", "rows")):
                found = agreement(f"{again}_again_{what}", done[f"{again}_again"][part], done[again][part])
                noise = max(noise, found[f"{again}_again_{what}_max_logprob_difference"])
                row |= found
    if has_source:
        row |= compare_with_source(model, ours, theirs, noise if model.experts else None)
    else:
        row["reference"] = "dequantized model, fp16"
        row |= agreement("together", ours["rows"], theirs["rows"])
        row["together_same_tokens"] = sum(each["best"] == each["logprobs"] for each in theirs["rows"])
        row["ok"] = row["together_max_logprob_difference"] < DENSE_BOUND
    if not only_own:
        row |= compare_own(ours, own, model.dtype, noise)
        row["ok"] &= row["own_ok"]
    row |= {"layers": ours["layers"], "reference_layers": theirs["layers"]}
    row["seconds_to_start"] = {key: each["seconds"] for key, each in done.items()}
    return row | {key: ours[key] for key in ("sglang", "torch", "gpu")}


#: Checkpoint and file of the second start, by the first's name.
_AGAIN = {"ours": ("marlin", "ours_again"), "theirs": ("source", "theirs_again")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other runs in it are kept")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--expert-parallel", action="store_true", help="every rank has whole experts")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--side-by-side", type=int, default=4, help="engines that run at the same time")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, not eagerly")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="made for models and for what engines write")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--forced", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    way = Way(options.tp, not options.graphs, options.expert_parallel)
    if options.engine:
        run_engine(options.engine, way, options.forced, options.out)
        return 0

    with ThreadPoolExecutor(options.side_by_side) as engines:

        def compare_one(name: str, work: Path) -> dict[str, Any]:
            return compare(name, MODELS[name], way, work, engines)

        at_once = len(options.only)
        return compare_all(MODELS, options.only, options.tp, at_once, compare_one, options.out, options.keep)


if __name__ == "__main__":
    sys.exit(main())
