"""How fast vLLM serves a checkpoint and the converted one, on every kernel that it may take for them.

    python benchmarks/serving.py --out benchmarks/results/serving_h100.json
        [--without-zero-points] [--format auto-round] [--experts [--layers 48]] [--rounds 4] [--batches 1 64]
        [--own-process]

Makes a model of Llama-3-8B's shapes from random weights, or with --experts a mixture of experts of Qwen3-30B-A3B's
shapes (128 experts, 8 of them for a token; half of its layers, so that all engines fit). Converts it, and starts four
engines side by side on one GPU, with torch.compile and CUDA graphs: the source on vLLM's default, the source on vLLM's
Marlin, the converted checkpoint on vLLM's Marlin, and the converted one as the plugin serves it by itself. Without
zero points vLLM's own AWQ code cannot load the source, so only the last two run. GPTQ and AutoRound are made without
zero points, compressed-tensors and AWQ with them unless asked otherwise. This package's kernels are compiled
beforehand. Weights are loaded by one engine at a time; its seconds and its memory are measured then. When all are
ready, they measure alone, in turn, in as many rounds as asked for: in a round every engine decodes once, and then
prefills once, three times over.

Decoding: tokens a second of a batch of prompts of 128 tokens, from 128 further tokens each, the prefill left out;
three times in a turn, the median of all. Of every batch also the time that the GPU takes for the CUDA graph of a
step, replayed over and over: what is left of a step is sampling, and waiting for the host. Prefill: milliseconds of one
prompt of 2,048 tokens; five times in a turn, the median of all. The first tokens of a few prompts are kept with the
probabilities of the two best, so that a difference between engines can be judged.

vLLM's engine runs in the process that asks, so that its memory and its graphs can be seen. With --own-process it has
one of its own, as `vllm serve` and vLLM's default have it, and only the rates are measured.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_models import FORMATS, Model, write_model
from record import earlier, kinds_of_layers, origin, save

#: Prompts that go in together, as vLLM takes them.
Batch = list[dict[str, list[int]]]

MIB = 1 << 20
BATCHES = (1, 8, 32, 64)
PREFILL_TOKENS = 2048
REPEATS = 3

#: What the turns of a round measure.
ROUND = ("decoding", "prefill", "prefill", "prefill")

MODELS = {
    False: Model(4096, 14336, 32, 32, 8, 128256),
    True: Model(2048, 768, 24, 32, 4, 151936, experts=128, top_k=8, head_size=128),
}


@dataclass(frozen=True)
class Engine:
    """One way to serve a checkpoint.

    Attributes:
        title: what it is called in the table, after the format.
        checkpoint: ``source`` or ``marlin``.
        backend: of linear layers and experts that vLLM is asked for; None leaves the choice to it.
        environment: further variables.
    """

    title: str
    checkpoint: str
    backend: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


ENGINES = {
    "source": Engine("source, vLLM's default", "source"),
    "source_marlin": Engine("source, vLLM's Marlin", "source", "marlin"),
    "converted_engine": Engine("converted, vLLM's Marlin", "marlin", environment={"AWQ2MARLIN_KERNEL": "engine"}),
    "converted": Engine("converted, as the plugin chooses", "marlin"),
}

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's memory is this process's, unless it is to have its own
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
}

#: What says that vLLM's engine has a process of its own.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

#: Variables that engines do not get. With the first, vLLM leaves PyTorch that many threads for its steps, which wait
#: for each other on the processors that a step needs; without it, it takes one.
NOT_FOR_ENGINES = ("OMP_NUM_THREADS",)


# --- one engine, in a process of its own ------------------------------------------------------------------


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Has the engines come in one after the other."""
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def turns(name: str, work: Path, rounds: int) -> Iterator[int]:
    """Says that an engine is ready, and yields the number of a round whenever it is its turn to measure alone."""
    (work / f"{name}.ready").touch()
    for number in range(rounds):
        while not (work / f"{name}.{number}.begins").exists():
            time.sleep(0.05)
        yield number
        (work / f"{name}.{number}.ended").touch()


def measured_load(work: Path, found: dict[str, Any]) -> None:
    """Has vLLM load weights alone, and note seconds and memory of it."""
    import torch
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            found[f"{name}_seconds"] = round(time.perf_counter() - begin, 3)
            return result

        return wrapper

    load_model = base_loader.BaseModelLoader.load_model

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        with alone(work):
            torch.cuda.reset_peak_memory_stats()
            result = measured("load", load_model)(*args, **kwargs)
            found["load_allocated_peak_mib"] = torch.cuda.max_memory_allocated() // MIB
            found["load_reserved_peak_mib"] = torch.cuda.max_memory_reserved() // MIB
            found["loaded_allocated_mib"] = torch.cuda.memory_allocated() // MIB
            found["loaded_reserved_mib"] = torch.cuda.memory_reserved() // MIB
        return result

    base_loader.BaseModelLoader.load_model = load_alone
    DefaultModelLoader.load_weights = measured("read", DefaultModelLoader.load_weights)
    base_loader.process_weights_after_loading = measured("process", base_loader.process_weights_after_loading)


def start(engine: Engine, folder: Path, **more: Any) -> Any:
    """Returns vLLM's engine on a checkpoint; ``more`` are options of vLLM that take the place of these."""
    from vllm import LLM

    backend = engine.backend
    options: dict[str, Any] = {"kernel_config": {"linear_backend": backend, "moe_backend": backend}} if backend else {}
    options |= {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "max_num_seqs": max(BATCHES),
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 3 << 30,
        "attention_config": {"backend": "TRITON_ATTN"},
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": list(BATCHES)},
        "seed": 0,
    }
    return LLM(**options | more)


class Prompts:
    """Random prompts, the same for every engine."""

    def __init__(self, vocabulary: int) -> None:
        """Begins with the first, of tokens of a vocabulary."""
        import torch

        self._vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(3)

    def draw(self, count: int, length: int) -> Batch:
        """Returns some prompts of a length."""
        import torch

        shape = (count, length)
        drawn = torch.randint(3, self._vocabulary - 8, shape, generator=self._generator).tolist()
        return [{"prompt_token_ids": each} for each in drawn]


def timed(llm: Any, batch: Batch, new_tokens: int) -> float:
    """Returns the seconds in which every prompt of a batch gets so many tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    llm.generate(batch, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def said(llm: Any, batch: Batch) -> list[list[list[float]]]:
    """Returns, for each prompt and new token: the token, its log-probability, and the second best's two."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=2, ignore_eos=True, detokenize=False)
    rows = []
    for output in llm.generate(batch, sampling, use_tqdm=False):
        entries = [sorted(each.items(), key=lambda item: -item[1].logprob)[:2] for each in output.outputs[0].logprobs]
        rows.append([[part for token, entry in best for part in (token, entry.logprob)] for best in entries])
    return rows


def measure(
    turn: int,
    timed: Callable[[Batch, int], float],
    said: Callable[[Batch], list[list[list[float]]]],
    vocabulary: int,
    found: dict[str, Any],
    replays: Any = None,
    batches: Iterable[int] = BATCHES,
) -> None:
    """Notes what an engine that has the GPU for itself can do, beside what it noted in earlier turns.

    Args:
        turn: its number; `ROUND` says what is measured then.
        timed: gets a batch and a number of tokens; returns the seconds in which every prompt gets so many.
        said: gets a batch; returns the tokens that every prompt gets, with log-probabilities.
        vocabulary: of the model.
        found: gets the figures.
        replays: watches this process's CUDA graphs; None if the engine runs in another.
        batches: how many prompts are decoded at once.
    """
    prompts = Prompts(vocabulary)
    if ROUND[turn % len(ROUND)] == "prefill":
        times = [timed(prompts.draw(1, PREFILL_TOKENS), 1) * 1e3 for _ in range(6)][1:]
        note(found, "prefill_ms", times, 2)
        return
    first, decoding = prompts.draw(8, 64), found.setdefault("decode_tokens_per_s", {})
    if "said" not in found:
        found["said"] = said(first)
    for count in batches:
        batch, new = prompts.draw(count, 128), 128
        with nullcontext() if replays is None else replays.watched():
            timed(batch, 4)
        if replays is not None:
            # Not after a prefill: the graph reads what the last step has left, and must find that of decoding.
            note(found.setdefault("graph_us", {}), str(count), [replays.over_and_over(50)["clock_us"]], 1)
        rates = [count * new / (timed(batch, 1 + new) - timed(batch, 1)) for _ in range(REPEATS)]
        note(decoding, str(count), rates, 1)


def note(found: dict[str, Any], key: str, values: list[float], digits: int) -> None:
    """Adds what a turn measured to all that was measured, whose median it updates."""
    every = [*found.get(key, {}).get("all", []), *values]
    found[key] = {"median": round(statistics.median(every), digits), "all": every}


def run_engine(name: str, work: Path, rounds: int, out: Path, batches: Iterable[int] = BATCHES) -> None:
    """Starts an engine, measures whenever it is its turn, and writes what was found so far."""
    begin = time.perf_counter()
    import torch
    import vllm
    from cuda_graphs import Replays

    engine = ENGINES[name]
    folder = work / engine.checkpoint
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    title = f"{FORMATS[method]} {engine.title}" if engine.checkpoint == "source" else engine.title
    found: dict[str, Any] = {"title": title, "vllm": vllm.__version__, "torch": torch.__version__}
    found |= {"gpu": torch.cuda.get_device_name(), "import_seconds": round(time.perf_counter() - begin, 2)}
    is_here, replays = os.environ.items().isdisjoint(OWN_PROCESS.items()), None
    if is_here:
        measured_load(work, found)
        replays = Replays()
    llm = start(engine, folder)
    found["ready_seconds"] = round(time.perf_counter() - begin, 2)
    found |= {"threads": torch.get_num_threads()} if is_here else {}
    found["layers"] = llm.apply_model(kinds_of_layers)[0]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    for turn in turns(name, work, rounds):
        measure(turn, partial(timed, llm), partial(said, llm), vocabulary, found, replays, batches)
        save(out, found)


def compile_beforehand(folder: Path) -> float:
    """Compiles this package's kernels for a converted checkpoint, as its first start does; returns the seconds."""
    import torch
    from safetensors import safe_open

    from awq2marlin import warm_up, warm_up_experts

    config = json.loads((folder / "config.json").read_text())
    begin = time.perf_counter()
    with safe_open(folder / "model-00001.safetensors", "pt", device="cuda") as file:
        names = set(file.keys())

        def parts(module: str) -> list[Any]:
            found = (f"model.layers.0.{module}.{part}" for part in ("qweight", "scales", "qzeros"))
            return [file.get_tensor(name) if name in names else None for name in found]

        warm_up(*parts("self_attn.q_proj"))
        if "num_experts" in config:  # one stands for all: kernels go by shapes
            gate, up, down = (parts(f"mlp.experts.0.{name}_proj") for name in ("gate", "up", "down"))
            w13 = [None if one is None else torch.cat([one, two], 1) for one, two in zip(gate, up, strict=True)]
            stacks = [x if x is None else x.expand(config["num_experts"], *x.shape) for x in (*w13, *down)]
            warm_up_experts(*stacks, top_k=config["num_experts_per_tok"])
    return round(time.perf_counter() - begin, 1)


# --- all of them ------------------------------------------------------------------------------------------


def run_all(
    names: list[str],
    work: Path,
    patience: float,
    rounds: int = 1,
    script: str = __file__,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,  # noqa: ARG005
    engines: dict[str, Engine] = ENGINES,
    arguments: Iterable[str] = (),
) -> dict[str, Any]:
    """Runs every engine in a process of its own, by a script; returns what each found, or how it ended.

    Args:
        names: of the engines.
        work: a folder for what they write.
        patience: seconds after which engines that are not ready are ended; the others measure without them.
        rounds: how often each measures, in turn.
        script: what the processes run.
        keep: gets what all have found after every round.
        engines: what the names stand for.
        arguments: further ones for the script.
    """
    processes = {}
    for name in names:
        environment = {**os.environ, **ENVIRONMENT, **engines[name].environment}
        for variable in NOT_FOR_ENGINES:
            environment.pop(variable, None)
        for variable in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):  # nobody finds what another compiled
            environment[variable] = str(work / f"{name}.{variable.lower()}")
        command = [sys.executable, script, "--engine", name, "--work", str(work), "--out", str(work / f"{name}.json")]
        command += ["--rounds", str(rounds), *arguments]
        with (work / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait_for(name: str, step: str, end: float = float("inf")) -> None:
        while processes[name].poll() is None and not (work / f"{name}.{step}").exists() and time.monotonic() < end:
            time.sleep(0.05)

    end = time.monotonic() + patience
    for name in names:
        wait_for(name, "ready", end)
    for name, process in processes.items():
        if not (work / f"{name}.ready").exists():
            process.terminate()
    print("all engines are ready or have failed", flush=True)
    for number in range(rounds):
        for name in names:
            (work / f"{name}.{number}.begins").touch()
            wait_for(name, f"{number}.ended")
        keep({name: what_one_found(engines[name].title, name, work, processes[name].poll()) for name in names})
    ended = {name: process.wait() for name, process in processes.items()}
    found = {name: what_one_found(engines[name].title, name, work, code) for name, code in ended.items()}
    for name in (name for name, each in found.items() if "error" in each):
        lines = (work / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"{name} failed:", *lines[-30:], sep="\n", file=sys.stderr)
    return found


def what_one_found(title: str, name: str, work: Path, ended: int | None) -> dict[str, Any]:
    """Returns what an engine has written so far, or how it ended."""
    out, log = work / f"{name}.json", work / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines()
    if not ended and out.exists():
        found: dict[str, Any] = json.loads(out.read_text())
        return {**found, "log": [line for line in lines if "kernel_choice.py" in line]}
    last = next((line for line in reversed(lines) if line.strip()), "")
    return {"title": title, "error": "not ready in time" if ended == -signal.SIGTERM else last}


def differences(found: dict[str, Any]) -> dict[str, Any]:
    """Returns how the engines' words differ from those of the first: where, and how close the two best tokens were."""
    ran = {name: each["said"] for name, each in found.items() if "said" in each}
    first = next(iter(ran), None)
    rows: dict[str, Any] = {}
    for name, texts in ran.items():
        same, apart, gaps = 0, 0.0, []
        for one, other in zip(ran[str(first)], texts, strict=True):
            place = next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a[0] != b[0]), len(one))
            same += place == len(one)
            apart = max([apart, *(abs(a[1] - b[1]) for a, b in zip(one[:place], other[:place], strict=True))])
            gaps += [max(each[place][1] - each[place][3] for each in (one, other))] if place < len(one) else []
        rows[name] = {
            "prompts": len(texts),
            "same_tokens": same,
            "max_logprob_difference": round(apart, 4),
            "max_gap_where_tokens_differ": round(max(gaps, default=0.0), 4),
        }
    return {"compared_with": first, "engines": rows}


def table(found: dict[str, Any], batches: Iterable[int] = BATCHES) -> str:
    """Returns the figures of some batches as a Markdown table, an engine a column."""
    ran = {name: each for name, each in found.items() if "error" not in each}
    rows = [["", *(each["title"] for each in ran.values())], ["---"] * (len(ran) + 1)]
    for count in batches:
        medians = (each["decode_tokens_per_s"][str(count)]["median"] for each in ran.values())
        rows.append([f"decoding, batch {count}, tokens/s", *(f"{median:.0f}" for median in medians)])
    for count in batches if all("graph_us" in each for each in ran.values()) else ():
        medians = (each["graph_us"][str(count)]["median"] for each in ran.values())
        rows.append([f"GPU time of a step's CUDA graph, batch {count}, us", *(f"{median:.0f}" for median in medians)])
    rows.append(
        [f"prefill of {PREFILL_TOKENS} tokens, ms", *(f"{e['prefill_ms']['median']:.1f}" for e in ran.values())]
    )
    for label, key, unit in (
        ("loading: reading, s", "read_seconds", ".2f"),
        ("loading: processing, s", "process_seconds", ".2f"),
        ("loading: GPU memory allocated, peak, MiB", "load_allocated_peak_mib", "d"),
        ("loading: GPU memory reserved, peak, MiB", "load_reserved_peak_mib", "d"),
        ("loaded: GPU memory allocated, MiB", "loaded_allocated_mib", "d"),
    ):
        if all(key in each for each in ran.values()):
            rows.append([label, *(format(each[key], unit) for each in ran.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def link_models(models: Path, work: Path) -> None:
    """Makes models known in the folder where engines look for them."""
    if models != work:
        for name in ("source", "marlin"):
            (work / name).symlink_to(models.resolve() / name)


def make_models(model: Model, folder: Path) -> int:
    """Makes a model and its conversion, unless they are there; returns the bytes of the source's tensors."""
    from awq2marlin import convert

    config = folder / "source" / "config.json"
    if not (folder / "source").exists():
        write_model(folder / "source", model)  # whose models say 2048
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    elif json.loads(config.read_text())["num_hidden_layers"] != model.layers:
        raise SystemExit(f"{folder} holds another model: give --models another folder")
    if not (folder / "marlin").exists():
        convert(folder / "source", folder / "marlin")
    index = json.loads((folder / "source" / "model.safetensors.index.json").read_text())
    size: int = index["metadata"]["total_size"]
    return size


# --- the command ------------------------------------------------------------------------------------------


def make_parser(description: str | None, engines: dict[str, Engine]) -> argparse.ArgumentParser:
    """Returns a parser of the options that `measure_all` goes by, those of one engine's process among them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows of other models in it are kept")
    parser.add_argument("--only", nargs="+", choices=engines, metavar="ENGINE", help=f"of {', '.join(engines)}")
    parser.add_argument("--rounds", type=int, default=1, help="how often each engine measures, in turn (1)")
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES), help="prompts decoded at once (all)"
    )
    parser.add_argument("--patience", type=float, default=900, help="seconds for engines to start (900)")
    parser.add_argument("--work", type=Path, help="folder for models, logs and caches; a temporary one if not given")
    parser.add_argument("--models", type=Path, help="folder whose models are served; made there if they are missing")
    parser.add_argument("--only-models", action="store_true", help="make them, compile the kernels, and stop")
    parser.add_argument("--engine", choices=engines, help=argparse.SUPPRESS)
    return parser


def measure_all(
    model: Model,
    row: dict[str, Any],
    options: Any,
    names: list[str],
    engines: dict[str, Engine] = ENGINES,
    script: str = __file__,
) -> int:
    """Makes a model, measures engines that serve it, keeps what they found after every turn, and prints it.

    Args:
        model: the source.
        row: what the result says of the model.
        options: of `make_parser`.
        names: of the engines.
        engines: what the names stand for.
        script: what an engine's process runs.

    Returns:
        The exit status: 1 if an engine failed.
    """
    row = {**row, "layers": model.layers, "rounds": options.rounds, **origin()}
    document = earlier(options.out)

    def keep(found: dict[str, Any]) -> None:
        rows = [*document["rows"], {**row, "engines": found, "words": differences(found)}]
        save(options.out, {**document, "rows": rows})

    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        models = options.models or work
        row["bytes"] = make_models(model, models)
        row["compile_seconds"] = compile_beforehand(models / "marlin")
        if options.only_models:
            print(json.dumps(row))
            return 0
        link_models(models, work)
        count = options.rounds * len(ROUND)  # an engine's process takes every turn for a round
        batches = ["--batches", *map(str, options.batches)]
        found = run_all(names, work, options.patience, count, script, keep, engines, batches)
    keep(found)
    print(table(found, options.batches), json.dumps(differences(found)), sep="\n")
    return 1 if any("error" in each for each in found.values()) else 0


def main() -> int:
    parser = make_parser(__doc__, ENGINES)
    parser.add_argument("--format", choices=FORMATS, default="awq", help="of the source (awq)")
    parser.add_argument("--without-zero-points", action="store_true", help="a symmetric checkpoint")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts of Qwen3-30B-A3B's shapes")
    parser.add_argument("--layers", type=int, help="of Llama-3-8B's 32 (all), or of Qwen3-30B-A3B's 48 (24)")
    parser.add_argument("--own-process", action="store_true", help="vLLM's engine in a process of its own")
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine, options.work, options.rounds, options.out, options.batches)
        return 0

    model = MODELS[options.experts]
    zero_points = not options.without_zero_points and options.format not in ("gptq", "auto-round")
    layers = options.layers or model.layers
    model = replace(model, layers=layers, format=options.format, zero_points=zero_points)
    row = {"format": model.format, "zero_points": model.zero_points, "experts": model.experts}
    engines = ENGINES
    if options.own_process:
        row["own_process"] = True
        engines = {name: replace(e, environment=e.environment | OWN_PROCESS) for name, e in ENGINES.items()}
    is_served = model.zero_points or model.format != "awq"
    names = options.only or [name for name, each in ENGINES.items() if is_served or each.checkpoint == "marlin"]
    return measure_all(model, row, options, names, engines)


if __name__ == "__main__":
    sys.exit(main())
