"""Whether vLLM says the same with a converted checkpoint as with its source: greedy tokens and log-probabilities.

    python benchmarks/vllm_tokens.py --out benchmarks/results/vllm_tokens_h100.json
        [--compiled] [--tp 2 [--expert-parallel]] [--only NAME ...]

Makes random models (benchmarks/random_models.py), converts them, and runs each in two engines, a process for each, all
side by side. The source runs on vLLM's own code for its format, told to take Marlin, so that both use the same
kernels. Where vLLM's AWQ code cannot load a kind (no zero points; one group over all of K on several ranks), the
reference is the dequantized model in plain fp16, whose rounding differs: then log-probabilities are compared within a
bound, along the same tokens.

The converted checkpoint then runs once more on this package's kernels, whose sums have another order: where a token
differs, the two best must have been as close to each other as the two kernels' log-probabilities are. Of 8 bits with
zero points there is only this run.

Prompts go in together, and short ones also one by one. Where tokens share blocks in vLLM's expert kernels, two
starts on one and the same checkpoint do not give the same bits; so of mixtures of experts only the prompts that
go in alone and fit one block must, and a second start of the source shows how far the others may be apart.
Ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_models import FORMATS, Model, write_model
from record import earlier, kinds_of_layers, origin, save

DENSE = Model(hidden=1024, inner=2816, layers=4, heads=16, key_value_heads=4, vocabulary=4096)

#: Each name says what is particular about it.
MODELS = {
    "llama, g 128": DENSE,
    "qwen2 with biases, g 64": Model(1024, 2816, 4, 16, 4, 4096, biases=True, group_size=64),
    "llama, g -1": Model(1024, 2816, 4, 16, 4, 4096, group_size=-1),
    "llama with attention kept as AWQ, g 64": Model(576, 1536, 4, 9, 3, 4096, group_size=64),
    "mixtral, g 128": Model(1024, 1024, 4, 16, 4, 4096, experts=4),
    "llama without zero points": Model(1024, 2816, 4, 16, 4, 4096, zero_points=False),
    "llama, 8 bits without zero points": Model(1024, 2816, 4, 16, 4, 4096, bits=8, zero_points=False),
    "mixtral, 8 bits": Model(1024, 1024, 4, 16, 4, 4096, experts=4, bits=8),
    "llama, 8 bits": Model(1024, 2816, 4, 16, 4, 4096, bits=8),
    "llama with a quantized output embedding, g 128": replace(DENSE, quantized_head=True),
    "llama, bf16": Model(1024, 2816, 4, 16, 4, 4096, dtype=torch.bfloat16),
    "llama, cut within tiles by two, g 32": Model(512, 1344, 4, 8, 2, 4096, group_size=32),
    "compressed-tensors, g 128": replace(DENSE, format="compressed-tensors"),
    "compressed-tensors without zero points": replace(DENSE, format="compressed-tensors", zero_points=False),
    "compressed-tensors, 8 bits without zero points": replace(
        DENSE, format="compressed-tensors", bits=8, zero_points=False
    ),
    "gptq without zero points": replace(DENSE, format="gptq", zero_points=False),
    "gptq, 8 bits without zero points": replace(DENSE, format="gptq", bits=8, zero_points=False),
    "auto-round without zero points": replace(DENSE, format="auto-round", zero_points=False),
    # More than one group a rank: vLLM 0.33 reads its own AWQ experts wrongly if their inner size is one group.
    "qwen3-moe, g 128": Model(1024, 512, 4, 8, 4, 4096, experts=16, top_k=4, head_size=128),
}

PROMPT_LENGTHS = (8, 20, 33, 70, 129, 300)
#: Of the prompts that go in one by one: no more tokens than the smallest block of vLLM's experts.
SHORT_LENGTHS = (3, 4, 5, 6, 7, 8)
NEW_TOKENS = 24

#: Largest difference of log-probabilities from the dequantized model: fp16 rounding of its weights and products.
DENSE_BOUND = 0.1

#: The same of one kernel from another, where each rounds a product once.
KERNEL_BOUNDS = {torch.float16: 0.05, torch.bfloat16: 0.4}

#: What keeps vLLM away from what needs a network or NVLink multicast.
ENVIRONMENT = {
    "AWQ2MARLIN_KERNEL": "engine",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Way:
    """How engines run.

    Attributes:
        ranks: tensor-parallel size.
        eager: not compiled, without CUDA graphs.
        expert_parallel: every rank has whole experts.
    """

    ranks: int = 1
    eager: bool = True
    expert_parallel: bool = False

    def arguments(self) -> list[str]:
        """Returns the options of this script that say so."""
        flags = {"--compiled": not self.eager, "--expert-parallel": self.expert_parallel}
        return ["--tp", str(self.ranks), *(flag for flag, is_on in flags.items() if is_on)]


def make_engine(folder: Path, ranks: int, eager: bool, **options: Any) -> Any:
    """Returns vLLM's engine on a checkpoint, with what makes its arithmetic the same every time.

    vLLM's own code of quantized layers takes its Marlin kernels, which it does not prefer everywhere.
    """
    from vllm import LLM

    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        options["kernel_config"] = {"linear_backend": "marlin", "moe_backend": "marlin"}
    return LLM(
        model=str(folder),
        tensor_parallel_size=ranks,
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=16,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 29,
        disable_custom_all_reduce=True,
        attention_config={"backend": "TRITON_ATTN"},
        enable_prefix_caching=False,
        seed=0,
        **options,
    )


def draw_prompts(vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the prompts that go in together, and those that go in one by one; the same for every engine."""
    generator = torch.Generator().manual_seed(7)

    def draw(lengths: tuple[int, ...]) -> list[list[int]]:
        return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]

    return draw(PROMPT_LENGTHS), draw(SHORT_LENGTHS)


def answer(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Returns greedy tokens and their log-probabilities for prompts that go in together."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=2, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    rows = []
    for output in (each.outputs[0] for each in outputs):
        chosen = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = [entry[token].logprob for token, entry in chosen]
        best = [sorted((each.logprob for each in entry.values()), reverse=True)[:2] for entry in output.logprobs]
        gaps = [first - second for first, second in best]
        rows.append({"tokens": list(output.token_ids), "logprobs": logprobs, "gaps": gaps})
    return rows


def judge(engine: Any, prompts: list[list[int]], said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the log-probabilities of what another engine said, and those of the best tokens in their places."""
    from vllm import SamplingParams

    texts = [prompt + row["tokens"] for prompt, row in zip(prompts, said, strict=True)]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": each} for each in texts], sampling, use_tqdm=False)
    rows = []
    for prompt, row, output in zip(prompts, said, outputs, strict=True):
        entries = output.prompt_logprobs[len(prompt) :]
        logprobs = [entry[token].logprob for token, entry in zip(row["tokens"], entries, strict=True)]
        best = [max(entry.values(), key=lambda each: each.logprob).logprob for entry in entries]
        rows.append({"tokens": row["tokens"], "logprobs": logprobs, "best": best})
    return rows


def run_engine(folder: Path, way: Way, forced: Path | None, out: Path) -> None:
    """Generates in this process and writes what came out; ``forced`` holds tokens whose probabilities are asked for."""
    import vllm

    begin = time.perf_counter()
    engine = make_engine(folder, way.ranks, way.eager, enable_expert_parallel=way.expert_parallel)
    document: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 2)}
    prompts, short = draw_prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    if forced is None:
        document["rows"] = answer(engine, prompts)
        document["alone"] = [row for prompt in short for row in answer(engine, [prompt])]
    else:
        document["rows"] = judge(engine, prompts, json.loads(forced.read_text())["rows"])
    document |= {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    document["layers"] = engine.apply_model(kinds_of_layers)[0]
    out.write_text(json.dumps(document))


def serves_source(model: Model, ranks: int) -> bool:
    """Returns whether vLLM's own code can load a source."""
    if model.format != "awq":
        return True
    return model.bits == 4 and model.zero_points and not (model.group_size == -1 and ranks > 1)


def start_engine(
    folder: Path, way: Way, out: Path, forced: Path | None = None, kernel: str = "engine"
) -> dict[str, Any]:
    """Runs `run_engine` in a process of its own and returns what it wrote."""
    command = [sys.executable, __file__, "--engine", str(folder), *way.arguments(), "--out", str(out)]
    command += ["--forced", str(forced)] if forced else []
    environment = {**os.environ, **ENVIRONMENT, "AWQ2MARLIN_KERNEL": kernel}
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        tail = out.with_suffix(".log").read_text(errors="replace").splitlines()[-40:]
        raise RuntimeError(f"the engine failed on {folder}:\n" + "\n".join(tail))
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def prepare(model: Model, work: Path) -> tuple[int, int]:
    """Makes and converts a model; returns how many modules were converted and how many kept."""
    from awq2marlin import convert

    write_model(work / "source", model)
    result = convert(work / "source", work / "marlin", verify="all")
    return len(result.converted), len(result.kept)


def agreement(what: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns how many prompts gave the same tokens and the same bits, and how far apart log-probabilities are.

    The largest difference is taken up to and with the first token that differs: after it the texts are not the same.
    """
    apart = 0.0
    for one, other in zip(ours, theirs, strict=True):
        for token, other_token, a, b in zip(
            one["tokens"], other["tokens"], one["logprobs"], other["logprobs"], strict=True
        ):
            apart = max(apart, abs(a - b))
            if token != other_token:
                break
    pairs = list(zip(ours, theirs, strict=True))
    return {
        f"{what}_prompts": len(pairs),
        f"{what}_same_tokens": sum(one["tokens"] == other["tokens"] for one, other in pairs),
        f"{what}_same_logprobs": sum(
            one["tokens"] == other["tokens"] and one["logprobs"] == other["logprobs"] for one, other in pairs
        ),
        f"{what}_max_logprob_difference": apart,
    }


def gap_where_tokens_differ(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Returns the largest distance of the two best log-probabilities at the first token of a prompt that differs."""
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(one["tokens"], other["tokens"], strict=True))
        place = next((at for at, (token, other_token) in pairs if token != other_token), None)
        if place is not None:
            largest = max(largest, one["gaps"][place], other["gaps"][place])
    return largest


def compare_own(ours: dict[str, Any], own: dict[str, Any], dtype: torch.dtype, noise: float = 0.0) -> dict[str, Any]:
    """Returns how this package's kernels compare with vLLM's Marlin, on the same checkpoint.

    ``noise`` is how far two starts of vLLM's own kernels are apart: a router's near-tie may fall either way.
    """
    row: dict[str, Any] = {}
    for what in ("alone", "rows"):
        name = {"alone": "own_alone", "rows": "own_together"}[what]
        row |= agreement(name, own[what], ours[what])
        row[f"{name}_max_gap_where_tokens_differ"] = gap_where_tokens_differ(own[what], ours[what])
    row["own_layers"] = own["layers"]
    bound = KERNEL_BOUNDS[dtype] + 2 * noise
    row["own_ok"] = all(value < bound for key, value in row.items() if "_max_" in key)
    return row


def compare(name: str, model: Model, way: Way, work: Path) -> dict[str, Any]:
    """Returns how the two engines' words compare, for one model that is prepared."""
    from dense_models import dequantize

    row: dict[str, Any] = {"model": name, "tensor_parallel_size": way.ranks, "eager": way.eager}
    row |= {"expert_parallel": True} if way.expert_parallel else {}
    only_own = model.bits == 8 and model.zero_points
    runs = {"own": ("marlin", "own")} | ({} if only_own else {"marlin": ("marlin", "engine")})
    if serves_source(model, way.ranks):
        runs |= {"source": ("source", "engine")} | ({"again": ("source", "engine")} if model.experts else {})
    with ThreadPoolExecutor(len(runs)) as pool:
        started = {
            name: pool.submit(start_engine, work / folder, way, work / f"{name}.json", kernel=kernel)
            for name, (folder, kernel) in runs.items()
        }
    said = {name: each.result() for name, each in started.items()}
    own, ours = said["own"], said["own" if only_own else "marlin"]
    if "source" in said:
        theirs = said["source"]
        row["reference"] = f"{FORMATS[model.format]} source on vLLM's own {FORMATS[model.format]} code"
        row |= agreement("alone", ours["alone"], theirs["alone"]) | agreement("together", ours["rows"], theirs["rows"])
        row["ok"] = row["alone_same_logprobs"] == len(SHORT_LENGTHS)
        if model.experts:
            row |= agreement("source_again_alone", said["again"]["alone"], theirs["alone"])
            row |= agreement("source_again_together", said["again"]["rows"], theirs["rows"])
        else:
            row["ok"] &= row["together_same_logprobs"] == len(PROMPT_LENGTHS)
    else:
        dequantize(work / "source", work / "dense", model.dtype)
        forced = work / ("own.json" if only_own else "marlin.json")
        theirs = start_engine(work / "dense", way, work / "dense.json", forced)
        row["reference"] = "dequantized model, fp16"
        row |= agreement("together", ours["rows"], theirs["rows"])
        row["together_same_tokens"] = sum(each["best"] == each["logprobs"] for each in theirs["rows"])
        row["ok"] = row["together_max_logprob_difference"] < DENSE_BOUND
    if not only_own:
        noise = max(row.get(f"source_again_{what}_max_logprob_difference", 0.0) for what in ("alone", "together"))
        row |= compare_own(ours, own, model.dtype, noise)
        row["ok"] &= row["own_ok"]
    row |= {
        "layers": ours["layers"],
        "reference_layers": theirs["layers"],
        "vllm": ours["vllm"],
        "torch": ours["torch"],
        "gpu": ours["gpu"],
    }
    return row


def compare_all(
    models: dict[str, Model],
    names: list[str],
    ranks: int,
    at_once: int,
    compare_one: Callable[[str, Path], dict[str, Any]],
    out: Path,
    keep: Path | None = None,
) -> int:
    """Makes, converts and compares models, adds the rows to a file, and returns the exit code.

    Args:
        models: all there are.
        names: of those to compare; those whose heads the ranks cannot share are left out.
        ranks: of an engine.
        at_once: how many models are compared at the same time.
        compare_one: gets a model's name and its folder, as `prepare` made it, and returns its row.
        out: results, JSON; rows in it are kept, and each new one is written as soon as it is known.
        keep: the folder to be made for models and for what engines write; a temporary one if not given.
    """
    names = [name for name in names if models[name].heads % ranks == 0]
    document, rows = earlier(out), {}
    preparing, writing = threading.Lock(), threading.Lock()
    place = nullcontext(keep) if keep else tempfile.TemporaryDirectory()
    with place as folder, ThreadPoolExecutor(max(1, at_once)) as pool:

        def one(name: str) -> None:
            work = Path(folder, str(names.index(name)))
            begin = time.perf_counter()
            try:
                with preparing:
                    converted, kept = prepare(models[name], work)
                row = compare_one(name, work) | {"converted": converted, "kept": kept}
            except Exception as error:  # the other models' results shall not be lost
                row = {"model": name, "tensor_parallel_size": ranks, "ok": False, "error": str(error)}
            print(f"{name}, {ranks} rank(s), {time.perf_counter() - begin:.0f} s: {json.dumps(row)}", flush=True)
            with writing:
                rows[name] = row | origin()
                found = [*document["rows"], *(rows[each] for each in names if each in rows)]
                save(out, {**document, "rows": found})

        list(pool.map(one, names))
    wrong = [name for name in names if not rows[name]["ok"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} agree" + (f"; not: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other runs in it are kept")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--side-by-side", type=int, default=4, help="engines that run at the same time")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile and CUDA graphs, not eagerly")
    parser.add_argument("--expert-parallel", action="store_true", help="every rank has whole experts")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--forced", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    way = Way(options.tp, not options.compiled, options.expert_parallel)
    if options.engine:
        run_engine(options.engine, way, options.forced, options.out)
        return 0

    def compare_one(name: str, work: Path) -> dict[str, Any]:
        return compare(name, MODELS[name], way, work)

    return compare_all(MODELS, options.only, options.tp, options.side_by_side, compare_one, options.out)


if __name__ == "__main__":
    sys.exit(main())
