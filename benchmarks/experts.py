"""Times a layer of experts of ours against the floor, and against other W4A16 experts if a harness brings them.

    python benchmarks/experts.py measure --output experts.json --harness moe_peers.py
    python benchmarks/experts.py show experts.json

For the experts of five models and every number of tokens M: the whole block (from hidden states, chosen experts and
their weights to the weighted sum) and each of its two grouped products by itself, in microseconds a call. Weights are
``zp128``, groups of 128 rows with zero points, ``sym128``, without, ``zp64``, ``zp32``, or ``single``, one group: fp16
and 4 bits. ``bf16`` and ``8bits`` are ``zp128`` in another type or width.

Every launch of a CUDA graph has a routing of its own (``uniform``: all experts equally likely; ``zipf``: an expert's
chance falls with its rank) and, as far as 9 GiB go, its own copy of the layer, so that between two uses of the same
weights more is touched than the L2 cache holds. A time is the median of replays, all graphs in turn, so that clocks and
heat hit all alike. Ours is compared with float64 on a few tokens before it is timed, and with the first peer on all.

The floor of a product is the larger of bytes over the read bandwidth (weights of the touched experts once, activations
in and out once) and operations over the matrix rate, both measured first; that of a block is the sum for its products
with everything else fused: what lies between them is half as wide, and one row a token leaves. Padding is not in it.

The harness is a Python file with ``make_peers(names, experts, weights, copies, absent)``, which reads of the experts
``model``, ``group``, ``has_zeros``, ``q``, ``s`` and ``z``; it is asked for groups of 4 bits and fp16 only. Its peers
have ``parts(point)``: ``block``, ``w13`` and ``w2``, each a function of a launch's number; ``load()`` and
``compile_humming(options)`` prepare them. What a peer cannot do is noted in the result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from gemm import (
    ROTATED_BYTES,
    _geometric_mean,
    captured,
    matrix_rate,
    medians_us,
    read_bandwidth,
)
from gemm_peers import pack_words
from record import environment, save

from awq2marlin.gemm import ops
from awq2marlin.gemm.experts.ops import marlin_experts, marlin_moe_gemm
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.packing import AWQ_PACK_ORDER


@dataclass(frozen=True)
class Model:
    """The experts of a layer: how many, how many a token chooses, and their sizes."""

    experts: int
    topk: int
    hidden: int
    inter: int

    def shape(self, name: str) -> tuple[int, int]:
        """Returns K and N of a product."""
        return (self.hidden, 2 * self.inter) if name == "w13" else (self.inter, self.hidden)


MODELS = {
    "Qwen3-30B-A3B": Model(128, 8, 2048, 768),
    "GLM-4.5-Air": Model(128, 8, 4096, 1408),
    "Mixtral-8x7B": Model(8, 2, 4096, 14336),
    "DeepSeek-V3 TP8": Model(256, 8, 7168, 256),
    "Qwen3-235B-A22B": Model(128, 8, 4096, 1536),
}


@dataclass(frozen=True)
class Weights:
    """A kind of weights."""

    group: int = 128  # 0: one for all of K
    has_zeros: bool = True
    bits: int = 4
    dtype: torch.dtype = torch.float16


WEIGHTS = {
    "zp128": Weights(),
    "sym128": Weights(has_zeros=False),
    "zp64": Weights(group=64),
    "zp32": Weights(group=32),
    "single": Weights(group=0),
    "bf16": Weights(dtype=torch.bfloat16),
    "8bits": Weights(bits=8),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
PEERS = ("marlin", "humming", "humming_grouped", "triton")
PRODUCTS = ("w13", "w2")
PARTS = ("block", *PRODUCTS)
MOST_COPIES_BYTES = 9 << 30
# fp16 comes to 3e-4 for a product and 7e-4 for a block, bf16 to eight times as much
MAX_RELATIVE_ERROR = {"block": 2e-3, "w13": 1e-3, "w2": 1e-3}
BF16_ERROR = 8
MAX_DIFFERENCE = 3e-3

DEVICE = "cuda"  # but for the tests of this file

Tensors = tuple[torch.Tensor | None, ...]
Launch = Callable[[int], Any]


class Experts:
    """Random experts in plain numbers.

    Attributes:
        model: their sizes.
        kind: of their weights.
        q: by product, codes [E, K/f, N], f rows a word.
        s: scales [E, G, N].
        z: zero points about the middle [E, G, N], or None for the middle.
    """

    def __init__(self, model: Model, weights: str) -> None:
        """Draws them; results come to about 1."""
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": DEVICE}
        self.model, self.kind = model, WEIGHTS[weights]
        self.q, self.s, self.z = {}, {}, {}
        bits = self.kind.bits
        middle, deviation = 1 << (bits - 1), 4.6 * 2 ** (bits - 4)
        away = middle // 4
        for name in PRODUCTS:
            size_k, size_n = model.shape(name)
            groups = (model.experts, size_k // self.group_of(name), size_n)
            words = (model.experts, size_k * bits // 32, size_n)
            self.q[name] = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, **options)
            self.s[name] = ((torch.rand(groups, **options) + 0.5) / (deviation * size_k**0.5)).to(self.kind.dtype)
            zeros = torch.randint(middle - away, middle + away, groups, dtype=torch.int32, **options)
            self.z[name] = zeros if self.kind.has_zeros else None

    @property
    def group(self) -> int:
        """Rows that share a scale; 0: all of K."""
        return self.kind.group

    @property
    def has_zeros(self) -> bool:
        """Whether there are zero points."""
        return self.kind.has_zeros

    def group_of(self, name: str) -> int:
        """Returns how many rows of a product share a scale."""
        return self.kind.group or self.model.shape(name)[0]

    def bytes_of(self, name: str) -> int:
        """Returns what must be read of one expert."""
        size_k, size_n = self.model.shape(name)
        bits_of_group = 16 + (self.kind.bits if self.kind.has_zeros else 0)
        return size_n * (size_k * self.kind.bits + size_k // self.group_of(name) * bits_of_group) // 8

    def codes(self, name: str, expert: int) -> torch.Tensor:
        """Returns the codes [K, N]."""
        bits = self.kind.bits
        shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=DEVICE).view(1, -1, 1)
        return ((self.q[name][expert].unsqueeze(1) >> shifts) & ((1 << bits) - 1)).view(self.model.shape(name))

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """Returns the weight, float64 [K, N]."""
        size_k, size_n = self.model.shape(name)
        codes = self.codes(name, expert).view(-1, self.group_of(name), size_n)
        z = self.z[name]
        zeros = 1 << (self.kind.bits - 1) if z is None else z[expert].unsqueeze(1)
        return ((codes - zeros).double() * self.s[name][expert].unsqueeze(1).double()).view(size_k, size_n)

    def marlin(self) -> Tensors:
        """Returns qweight, scales and qzeros of both products, as the operators take them."""
        tensors: list[torch.Tensor | None] = []
        bits = self.kind.bits
        order = AWQ_PACK_ORDER[bits]
        for name in PRODUCTS:
            size_k, size_n = self.model.shape(name)
            each = range(self.model.experts)
            packed = [ops.repack_awq(pack_words(self.codes(name, expert), 1, order), num_bits=bits) for expert in each]
            scales = [layout.marlin_permute_scales(s, size_k, size_n, self.group_of(name)) for s in self.s[name]]
            tensors += [torch.stack(packed), torch.stack(scales)]
            z = self.z[name]
            tensors.append(None if z is None else torch.stack([_marlin_zeros(each, bits) for each in z]))
        return tuple(tensors)

    def exact(self, point: Point, tokens: list[int]) -> dict[str, torch.Tensor]:
        """Returns float64 results of some tokens in the first launch: w13 and w2 [T, k, N], block [T, H]."""
        found: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
        for token in tokens:
            chosen, shares = point.ids[0][token].tolist(), point.shares[0][token].double()
            own = point.inner[token * self.model.topk : (token + 1) * self.model.topk].double()
            first, second, total = [], [], 0.0
            for j, expert in enumerate(chosen):
                first.append(point.x[token].double() @ self.dense("w13", expert))
                gate, up = first[-1].chunk(2)
                weight = self.dense("w2", expert)
                second.append(shares[j] * (own[j] @ weight))
                total = total + shares[j] * ((torch.nn.functional.silu(gate) * up) @ weight)
            for part, result in (("w13", torch.stack(first)), ("w2", torch.stack(second)), ("block", total)):
                found[part].append(result)
        return {part: torch.stack(results) for part, results in found.items()}


def _marlin_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return layout.awq_to_marlin_zero_points(pack_words(zeros, 1, AWQ_PACK_ORDER[bits]), *zeros.shape, bits)


class Point:
    """A number of tokens: what both products take, and a routing for every launch.

    Attributes:
        x: hidden states [M, H].
        inner: what a second product by itself takes, [M*k, I].
        ids: by launch, the chosen experts, int32 [M, k].
        shares: by launch, their weights, fp32 [M, k].
        touched: by launch, how many experts are chosen at all.
        fullest: by launch, the rows of the expert with the most.
    """

    def __init__(
        self, model: Model, tokens: int, routing: str, launches: int, dtype: torch.dtype = torch.float16
    ) -> None:
        """Draws them."""
        options: dict[str, Any] = {"generator": torch.Generator(device=DEVICE).manual_seed(tokens), "device": DEVICE}
        self.model, self.tokens, self.rows, self.launches = model, tokens, tokens * model.topk, launches
        self.x = torch.randn(tokens, model.hidden, dtype=dtype, **options)
        self.inner = torch.randn(self.rows, model.inter, dtype=dtype, **options) * 0.5
        favour = torch.zeros(model.experts, device=DEVICE)
        if routing == "zipf":
            ranks = torch.arange(1, model.experts + 1, device=DEVICE).float()
            favour[torch.rand(model.experts, **options).argsort()] = -ranks.log()
        self.ids, self.shares, self.touched, self.fullest = [], [], [], []
        for _ in range(launches):
            noise = -(-torch.rand(tokens, model.experts, **options).clamp(1e-9, 1 - 1e-7).log()).log()
            ids = (favour + noise).topk(model.topk, 1).indices.int().contiguous()
            shares = torch.rand(tokens, model.topk, **options) + 0.1
            counts = ids.view(-1).bincount(minlength=model.experts)
            self.ids.append(ids)
            self.shares.append(shares / shares.sum(1, keepdim=True))
            self.touched.append(int((counts > 0).sum()))
            self.fullest.append(int(counts.max()))

    def floors(self, experts: Experts, peaks: dict[str, float]) -> dict[str, float]:
        """Returns microseconds of each product and of the block at best."""
        model, touched = self.model, statistics.fmean(self.touched)
        rows_13, rows_2 = self.rows * 2 * model.inter, self.rows * model.hidden
        alone = {"w13": self.tokens * model.hidden + rows_13, "w2": self.rows * model.inter + rows_2}
        fused = {
            "w13": self.tokens * model.hidden + self.rows * model.inter,
            "w2": self.rows * model.inter + self.tokens * model.hidden,
        }

        def floor(name: str, values: int) -> float:
            size_k, size_n = model.shape(name)
            bytes_ = touched * experts.bytes_of(name) + 2 * values
            operations = 2 * self.rows * size_k * size_n
            return 1e6 * max(bytes_ / peaks["read_bandwidth"], operations / peaks["matrix_rate"])

        found = {name: floor(name, alone[name]) for name in PRODUCTS}
        return {**found, "block": sum(floor(name, fused[name]) for name in PRODUCTS)}


def parts_of_ours(point: Point, layers: list[Tensors], bits: int = 4) -> dict[str, Launch]:
    """Returns what runs the i-th launch of the block and of each product of ours."""

    def of(i: int) -> tuple[Tensors, Tensors]:
        layer = layers[i % len(layers)]
        return layer[:3], layer[3:]

    return {
        "block": lambda i: marlin_experts(point.x, *of(i)[0], *of(i)[1], point.ids[i], point.shares[i], num_bits=bits),
        "w13": lambda i: marlin_moe_gemm(point.x, *of(i)[0], point.ids[i], num_bits=bits),
        "w2": lambda i: marlin_moe_gemm(point.inner, *of(i)[1], point.ids[i], point.shares[i], num_bits=bits),
    }


def kernels_of(launch: Launch) -> list[str]:
    """Returns the names of the kernels that a call of ours launches."""
    from awq2marlin.gemm.driver import PreparedKernel

    names: list[str] = []
    call = PreparedKernel.__call__

    def noted(kernel: PreparedKernel, *values: Any) -> None:
        names.append(kernel.source.name)
        call(kernel, *values)

    with patch.object(PreparedKernel, "__call__", noted):
        launch(0)
    return names


def away(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the error relative to the whole."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def check_ours(parts: dict[str, Launch], point: Point, exact: dict[str, torch.Tensor], tokens: list[int]) -> dict:
    """Returns the relative errors against float64; stops the benchmark if they are not rounding."""
    errors = {part: away(launch(0)[tokens], exact[part]) for part, launch in parts.items()}
    factor = BF16_ERROR if point.x.dtype == torch.bfloat16 else 1
    if not all(errors[part] < factor * MAX_RELATIVE_ERROR[part] for part in errors):
        sys.exit(f"ours: wrong result at {point.tokens} tokens of {point.model}: relative errors {errors}")
    return errors


def _refuse_other_results(name: str, difference: float, point: Point) -> None:
    """Stops the benchmark if ours is not what Marlin gives; a peer that gives something else is left out."""
    if name == "marlin" and not difference < MAX_DIFFERENCE:
        sys.exit(f"ours: {difference} away from Marlin at {point.tokens} tokens of {point.model}")
    if not difference < 10 * MAX_DIFFERENCE:
        raise ValueError(f"differs from ours by {difference} of the whole")


def measure_point(
    point: Point, experts: Experts, layers: list[Tensors], peers: dict, options: Any, result: dict
) -> dict:
    """Returns the times of ours and of the peers at a number of tokens."""
    ours = parts_of_ours(point, layers, experts.kind.bits)
    row: dict[str, Any] = {
        "touched": statistics.fmean(point.touched),
        "fullest": statistics.fmean(point.fullest),
        "launches": point.launches,
        "floor_us": point.floors(experts, result),
        "error": {},
        "kernels": {part: kernels_of(ours[part]) for part in PARTS},
    }
    tokens = sorted({0, point.tokens // 3, point.tokens - 1})
    exact = {} if options.no_check else experts.exact(point, tokens)
    if exact:
        row["error"]["ours"] = check_ours(ours, point, exact, tokens)
    launches: dict[tuple[str, str], Launch] = {("ours", part): ours[part] for part in PARTS}
    for name, peer in peers.items():
        try:
            parts = peer.parts(point)
            out = parts["block"](0)
            if exact:
                row["error"][name] = {"block": away(out[tokens], exact["block"])}
            difference = away(ours["block"](0), out.double())
            _refuse_other_results(name, difference, point)
            launches |= {(name, part): parts[part] for part in PARTS}
        except Exception as error:  # whatever a peer meets
            traceback.print_exc()
            result["absent"].setdefault(f"{name} at work", f"M = {point.tokens}: {error!r}"[:400])
    torch.cuda.synchronize()
    row["us"] = {}
    for (name, part), us in medians_us(launches, point.launches, replays=options.replays).items():
        row["us"].setdefault(name, {})[part] = us
    if options.profile:
        blocks = {name: launch for (name, part), launch in launches.items() if part == "block"}
        row["profile"] = {name: profiled(launch, point.launches) for name, launch in blocks.items()}
    return row


def profiled(launch: Launch, launches: int) -> dict[str, float]:
    """Returns GPU microseconds a launch by kernel, from CUPTI, and of the whole with its gaps as ``span``."""
    from torch.profiler import ProfilerActivity, profile

    graph = captured(launch, launches)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    events = [event for event in found.profiler.kineto_results.events() if "CUDA" in str(event.device_type())]
    if not events:
        return {}
    ends = [event.start_ns() + event.duration_ns() for event in events]
    times = {"span": (max(ends) - min(event.start_ns() for event in events)) / 1e3 / launches}
    for event in events:
        name = event.name()[:70]
        times[name] = times.get(name, 0.0) + event.duration_ns() / 1e3 / launches
    return times


def peers_of(
    harness: ModuleType | None, names: list[str], experts: Experts, weights: str, copies: int, absent: dict[str, str]
) -> dict:
    """Returns the harness's peers by name; none for weights that a harness does not know."""
    kind = experts.kind
    if harness is None or kind != Weights(kind.group, kind.has_zeros) or not kind.group:
        return {}
    return harness.make_peers(names, experts, weights, copies, absent)


def measure_model(name: str, weights: str, options: Any, result: dict, harness: ModuleType | None) -> None:
    """Times the experts of a model at every number of tokens, and adds the rows to the result."""
    model = MODELS[name]
    experts = Experts(model, weights)
    each = sum(map(experts.bytes_of, PRODUCTS))
    smallest = model.topk * each * max(1, min(options.tokens) // 2)
    count = max(2, min(-(-ROTATED_BYTES // smallest), MOST_COPIES_BYTES // (model.experts * each)))
    absent: dict[str, str] = {}
    peers = peers_of(harness, options.peers, experts, weights, count, absent)
    result["absent"] |= {f"{peer}, {name} {weights}": why for peer, why in absent.items()}
    layer = experts.marlin()
    if "marlin" in peers:  # the very tensors
        layers = peers["marlin"].layers
        for mine, theirs in zip(layer, layers[0], strict=True):
            if mine is not None and not torch.equal(mine, theirs):
                sys.exit(f"{name}: our layout of the experts is not vLLM's")
        del layer
    else:
        layers = [layer] + [tuple(t if t is None else t.clone() for t in layer) for _ in range(count - 1)]
    for routing in options.routing:
        for tokens in options.tokens:
            few = model.topk * tokens < model.experts
            touched = min(model.experts, model.topk * tokens) * each * (1 if few else 0.9)
            launches = max(4 if tokens <= 256 else 2, min(16, -(-ROTATED_BYTES // int(touched))))
            point = Point(model, tokens, routing, launches, experts.kind.dtype)
            row = measure_point(point, experts, layers, peers, options, result)
            result["rows"].append({"model": name, "weights": weights, "routing": routing, "M": tokens, **row})
            print(line(result["rows"][-1]), flush=True)
            save(options.output, result)  # a run that is cut short has told something
            torch.cuda.empty_cache()


def line(row: dict) -> str:
    """Returns a row in words."""
    floor, us = row["floor_us"], row["us"]
    times = "; ".join(
        f"{name} {found['block']:.1f} = {found['block'] / floor['block']:.2f} (w13 {found['w13'] / floor['w13']:.2f} "
        f"w2 {found['w2'] / floor['w2']:.2f})"
        for name, found in us.items()
    )
    error = row["error"].get("ours", {}).get("block", float("nan"))
    label = f"{row['model']} {row['weights']} {row['routing']} M {row['M']:5}"
    return f"{label} floor {floor['block']:.1f}: {times}; error {error:.0e}; {' + '.join(row['kernels']['block'])}"


def load_harness(path: Path | None, options: Any, result: dict) -> ModuleType | None:
    """Imports the peers' file and lets it prepare; notes what is not there."""
    if path is None or not options.peers:
        return None
    spec = importlib.util.spec_from_file_location("peers_harness", path)
    assert spec is not None
    assert spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = harness  # its data classes look there
    spec.loader.exec_module(harness)
    harness.load()
    for module in ("vllm", "humming"):
        try:
            result[module] = importlib.import_module(module).__version__
        except Exception as error:  # a package that is not there, or has changed
            result["absent"][module] = repr(error)[:400]
    if any(name.startswith("humming") for name in options.peers):
        try:
            harness.compile_humming(options)
        except Exception as error:
            traceback.print_exc()
            result["absent"]["humming compile"] = repr(error)[:400]
    return harness


def measure(options: Any) -> None:
    result: dict[str, Any] = {
        **environment(options.commit),
        "absent": {},
        "rows": [],
    }
    harness = load_harness(options.harness, options, result)
    result |= {"read_bandwidth": read_bandwidth(), "matrix_rate": matrix_rate()}
    torch.cuda.empty_cache()
    print({key: value for key, value in result.items() if key != "rows"}, flush=True)
    for weights in options.weights:
        for name in options.models:
            measure_model(name, weights, options, result, harness)
            torch.cuda.empty_cache()
    result["matrix_rate_after"] = matrix_rate()
    save(options.output, result)
    print_tables(result["rows"])
    if result["absent"]:
        print("absent:", result["absent"])


# ---- tables -----------------------------------------------------------------------------------------------


def show(options: Any) -> None:
    results = [json.loads(path.read_text("utf-8")) for path in options.files]
    for result in results:
        print({key: value for key, value in result.items() if key != "rows"})
    rows = [row for result in results for row in result["rows"]]
    if options.output:
        save(options.output, results[0] | {"rows": rows})
    print_tables(joined(rows))


def joined(rows: list[dict]) -> list[dict]:
    """Returns one row a cell (model, weights, routing, M) of runs that had different peers, or had none.

    Every run times ours, too, because clocks differ from run to run. Of ours the mean counts, and of a peer's time its
    ratio to ours in the same run.
    """
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["weights"], row["routing"], row["M"]), []).append(row)
    return [_join(runs) for runs in cells.values()]


def _join(runs: list[dict]) -> dict:
    def means(times: Callable[[dict], dict[str, float]]) -> dict[str, float]:
        return {part: _geometric_mean([times(run)[part] for run in runs]) for part in times(runs[0])}

    ours = means(lambda run: run["us"]["ours"])
    us = {"ours": ours}
    for run in runs:
        for peer, times in run["us"].items():
            if peer != "ours":
                us[peer] = {part: time * ours[part] / run["us"]["ours"][part] for part, time in times.items()}
    return runs[0] | {"us": us, "floor_us": means(lambda run: run["floor_us"])}


def print_tables(rows: list[dict]) -> None:
    """Prints the means of every kind of weight and routing, and each model's cells."""
    kinds = dict.fromkeys((row["weights"], row["routing"]) for row in rows)
    for weights, routing in kinds:
        mine = [row for row in rows if (row["weights"], row["routing"]) == (weights, routing)]
        for part, value in (("block", block_us), ("both products alone", products_us)):
            print(f"\n## {weights}, {routing}: {part}, geometric means over the models as multiples of the floor")
            print_means(mine, value)
        print(f"\n## {weights}, {routing}: ours of the floor, of the best peer, of Marlin, the whole block")
        print_cells(mine)
    for weights in dict.fromkeys(weights for weights, routing in kinds if routing == "zipf"):
        print(f"\n## {weights}: skewed routing / even routing, and microseconds of ours, the whole block")
        print_skew([row for row in rows if row["weights"] == weights])


def block_us(us: dict[str, float]) -> float:
    """Returns the time of the block."""
    return us["block"]


def products_us(us: dict[str, float]) -> float:
    """Returns the time of both products."""
    return us["w13"] + us["w2"]


def print_means(rows: list[dict], value: Callable[[dict[str, float]], float]) -> None:
    peers = [name for name in PEERS if any(name in row["us"] for row in rows)]
    heads = ["M", "ours", *peers, "best peer", "ours / best (worst)", "ours / Marlin (worst)"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for size_m in sorted({row["M"] for row in rows}):
        here = [row for row in rows if row["M"] == size_m]
        cells = [mean([value(row["us"]["ours"]) / value(row["floor_us"]) for row in here])]
        for name in peers:
            cells.append(mean([value(row["us"][name]) / value(row["floor_us"]) for row in here if name in row["us"]]))
        best = [(row, best_us(row, value)) for row in here]
        cells.append(mean([us / value(row["floor_us"]) for row, us in best if us]))
        of_best = [value(row["us"]["ours"]) / us for row, us in best if us]
        of_marlin = [value(row["us"]["ours"]) / value(row["us"]["marlin"]) for row in here if "marlin" in row["us"]]
        cells += [f"{mean(ratios)} ({max(ratios):.2f})" if ratios else "-" for ratios in (of_best, of_marlin)]
        print(f"| {size_m} | {' | '.join(cells)} |")


def print_cells(rows: list[dict]) -> None:
    """Prints each model's cells; marks what is slower than Marlin, and to 64 tokens than the best peer."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    print(f"| M | {' | '.join(models)} |\n|{' --- |' * (len(models) + 1)}")
    found = {(row["model"], row["M"]): row for row in rows}
    for size_m in sorted({row["M"] for row in rows}):
        cells = [cell(found[model, size_m]) if (model, size_m) in found else "-" for model in models]
        print(f"| {size_m} | {' | '.join(cells)} |")


def print_skew(rows: list[dict]) -> None:
    """Prints what skewed routing costs the block: each model's in our time, and the mean of ours and of every peer."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["routing"], row["M"]): row["us"] for row in rows}
    skewed = [key for key in found if key[1] == "zipf"]
    names = ["ours", *(name for name in PEERS if any(name in found[key] for key in skewed))]
    heads = ["M", *models, *(f"mean of {name}" for name in names)]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for size_m in sorted({size_m for _, _, size_m in skewed}):
        pairs = [
            (found.get((model, "uniform", size_m), {}), found.get((model, "zipf", size_m), {})) for model in models
        ]
        cells = [_skewed(even["ours"], zipf["ours"]) if even and zipf else "-" for even, zipf in pairs]
        for name in names:
            both = [(even[name], zipf[name]) for even, zipf in pairs if name in even and name in zipf]
            cells.append(mean([zipf["block"] / even["block"] for even, zipf in both]))
        print(f"| {size_m} | {' | '.join(cells)} |")


def _skewed(even: dict[str, float], zipf: dict[str, float]) -> str:
    return f"{zipf['block'] / even['block']:.2f} ({even['block']:.0f}, {zipf['block']:.0f})"


def cell(row: dict) -> str:
    ours, best = row["us"]["ours"]["block"], best_us(row, block_us)
    text = f"{ours:.1f} us: {ours / row['floor_us']['block']:.2f}"
    if best:
        text += f", {ours / best:.2f}{' !' if ours > best and row['M'] <= 64 else ''}"
    if "marlin" in row["us"]:
        of_marlin = ours / row["us"]["marlin"]["block"]
        text += f", {of_marlin:.2f}{' !!' if of_marlin > 1 else ''}"
    return text


def best_us(row: dict, value: Callable[[dict[str, float]], float]) -> float | None:
    """Returns the least time of a peer."""
    return min((value(row["us"][name]) for name in PEERS if name in row["us"]), default=None)


def mean(values: list[float]) -> str:
    return f"{_geometric_mean(values):.2f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="time on this machine's GPU")
    several = partial(command.add_argument, nargs="+")
    command.add_argument("--output", type=Path, help="a JSON file for the results")
    command.add_argument("--harness", type=Path, help="a Python file that brings peers; without, only ours is timed")
    several("--models", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    several("--tokens", type=int, default=list(TOKENS), metavar="M")
    several("--weights", default=["zp128"], choices=list(WEIGHTS))
    several("--routing", default=["uniform"], choices=["uniform", "zipf"])
    several("--peers", default=["marlin", "humming", "humming_grouped"], choices=PEERS)
    command.add_argument("--no-check", action="store_true", help="compare nothing with float64")
    command.add_argument("--profile", action="store_true", help="also the kernels inside a block, from CUPTI")
    command.add_argument("--replays", type=int, default=11, help="of every graph; the median counts (default: 11)")
    command.add_argument("--commit", help="the commit that is timed, where there is no git")
    command.set_defaults(run=measure)
    command = commands.add_parser("show", help="print tables of earlier results, of runs with different peers too")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--output", type=Path, help="a JSON file for the rows of all of them, under the first's head")
    command.set_defaults(run=show)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
