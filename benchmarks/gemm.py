"""Times the Marlin GEMM against fp16 matmul, other W4A16 GEMMs, and what the GPU could do at best.

    python benchmarks/gemm.py --output benchmarks/results/gemm_h100.json
    python benchmarks/gemm_chart.py benchmarks/results/gemm_h100.json --output docs/gemm_h100.png

For every layer shape of Llama-3 8B and 70B and every number of tokens M: our time, that of ``torch.matmul`` in fp16,
that of every peer that is installed (``gemm_peers.py``), and the floor, which is the larger of bytes over the read
bandwidth and operations over the matrix rate, both measured here first. Weights are 4 bits, g = 128, with zero points,
and rotate through more memory than the L2 cache holds; each time is the median of CUDA-graph replays, all in turn, so
that clocks and heat hit all alike. Every result is checked once, against float64, before it is timed.

``us`` is what a launch takes among others of its kind. Ours overlap, which in a model they do not: ``after_us`` is what
a launch adds behind a kernel that writes its activations.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gemm_peers import PEERS, LayerNumbers, Peer, pack_words
from record import environment, save

from awq2marlin.gemm import ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.driver import Blocks, PreparedKernel, device_of
from awq2marlin.gemm.families.base import GemmProblem
from awq2marlin.gemm.families.portable import PortableConfig
from awq2marlin.gemm.launch import launch_gemm, problem_of
from awq2marlin.gemm.select import all_configs, pick_config
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.packing import AWQ_PACK_ORDER

SHAPES = {  # name: (K, N)
    "8B qkv": (4096, 6144),
    "8B o": (4096, 4096),
    "8B gate+up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B qkv": (8192, 10240),
    "70B o": (8192, 8192),
    "70B gate+up": (8192, 57344),
    "70B down": (28672, 8192),
}
SIZES_M = (1, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
GROUP_SIZE = 128
ROTATED_BYTES = 240 << 20  # several times the L2 of any GPU
# fp16 results of fp16 inputs come to 2e-4 to 4e-4; Machete rounds -s z to fp16, which costs more.
MAX_RELATIVE_ERROR = {"ours": 1e-3, "marlin": 1e-3, "humming": 3e-3, "machete": 3e-3}

READ_KERNEL = f"""\
using u32 = unsigned int;
extern "C" __global__ void __launch_bounds__(512) {ENTRY_POINT}(const uint4* from, u32* to, long long count) {{
  u32 sum = 0;
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {{
    uint4 v[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) v[part] = __ldcs(from + i + part * stride);
#pragma unroll
    for (int part = 0; part < 4; ++part) sum ^= v[part].x ^ v[part].y ^ v[part].z ^ v[part].w;
  }}
  if (sum == 0x12345678) *to = sum;  // keeps the reads
}}
"""


Launch = Callable[[int], object]  # takes the i-th input


def captured(launch: Launch, launches: int) -> torch.cuda.CUDAGraph:
    """Returns a graph of so many launches, replayed once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i)
    graph.replay()
    # The next launch's first run is on another stream. Beside this replay, Humming's kernels, which share locks in
    # memory from launch to launch, would wait for each other for ever.
    torch.cuda.synchronize()
    return graph


def medians_us(launches_by_name: dict[str, Launch], launches: int, replays: int = 15) -> dict[str, float]:
    """Returns microseconds per launch of each, the medians over replays of graphs, one after the other in turn."""
    graphs = {name: captured(launch, launches) for name, launch in launches_by_name.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(replays):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / launches)
    return {name: statistics.median(found) for name, found in times.items()}


def median_us(launch: Launch, launches: int, replays: int = 15) -> float:
    """Returns microseconds per launch of one."""
    return medians_us({"": launch}, launches, replays)[""]


def read_bandwidth() -> float:
    """Returns bytes per second of a kernel that only reads 4 GiB."""
    data = torch.randint(-(2**31), 2**31, (1 << 30,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    source = KernelSource("read", READ_KERNEL)
    blocks = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    kernel = PreparedKernel(source, device_of(0), Blocks((blocks, 1, 1), 512), 0, 2, (data.numel() // 4,))

    def launch(_: int) -> None:
        kernel(data.data_ptr(), out.data_ptr())

    return data.numel() * 4 / median_us(launch, 2) * 1e6


def matrix_rate() -> float:
    """Returns operations per second of an fp16 product of 8192 x 8192 random matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / median_us(lambda _: torch.matmul(a, b, out=out), 5) * 1e6


@dataclass
class Layer:
    """A random layer: in plain numbers, in Marlin's format, and its exact weight in some columns.

    Attributes:
        q: 0..15 [K, N].
        z: 6..9 [K/128, N].
        s: fp16 [K/128, N].
        marlin: qweight, scales, qzeros.
        columns: the first and last that `exact` has.
        exact: float64 [K, len(columns)].
    """

    q: torch.Tensor
    z: torch.Tensor
    s: torch.Tensor
    marlin: tuple[torch.Tensor, ...]
    columns: torch.Tensor
    exact: torch.Tensor

    @property
    def packed_bytes(self) -> int:
        """What must be read of it."""
        return sum(tensor.nbytes for tensor in self.marlin)

    def check(self, out: torch.Tensor, a: torch.Tensor, who: str) -> float:
        """Returns the relative error of a product; stops the benchmark if it is not rounding."""
        exact = a.double() @ self.exact
        error = ((out[:, self.columns].double() - exact).norm() / exact.norm()).item()
        if not error < MAX_RELATIVE_ERROR[who]:
            sys.exit(f"{who}: wrong result at {tuple(a.shape)} by {out.shape[1]}: relative error {error}")
        return error


def random_layer(size_k: int, size_n: int) -> Layer:
    groups = size_k // GROUP_SIZE
    q = torch.randint(0, 16, (size_k, size_n), dtype=torch.int32, device="cuda")
    z = torch.randint(6, 10, (groups, size_n), dtype=torch.int32, device="cuda")
    s = (torch.rand(groups, size_n, device="cuda") * 0.02 + 0.001).half()
    marlin = (
        ops.repack_awq(pack_words(q, 1, AWQ_PACK_ORDER[4])),
        layout.marlin_permute_scales(s, size_k, size_n, GROUP_SIZE),
        layout.awq_to_marlin_zero_points(pack_words(z, 1, AWQ_PACK_ORDER[4]), groups, size_n, 4),
    )
    half = min(1024, size_n // 2)
    columns = torch.cat([torch.arange(half), torch.arange(size_n - half, size_n)]).cuda()
    wide_z, wide_s = (each[:, columns].double().repeat_interleave(GROUP_SIZE, 0) for each in (z, s))
    return Layer(q, z, s, marlin, columns, (q[:, columns].double() - wide_z) * wide_s)


def rotated(tensors: tuple[torch.Tensor, ...], count: int) -> list[tuple[torch.Tensor, ...]]:
    return [tensors] + [tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1)]


def make_peers(layer: Layer, sizes_m: list[int], absent: dict[str, str]) -> dict[str, Peer]:
    """Returns the peers that can be had here; notes why the others cannot."""
    peers = {}
    for name in PEERS.keys() - absent.keys():
        try:
            peers[name] = PEERS[name](LayerNumbers(layer.q, layer.z, layer.s, layer.marlin, tuple(sizes_m)))
        except Exception as exc:  # a package that is not there, or has changed
            absent[name] = f"{type(exc).__name__}: {exc}"
    return peers


def time_shape(name: str, sizes_m: list[int], peaks: dict[str, float], absent: dict[str, str]) -> list[dict]:
    """Times one layer shape at every M."""
    size_k, size_n = SHAPES[name]
    layer = random_layer(size_k, size_n)
    peers = make_peers(layer, sizes_m, absent)
    count = max(2, -(-ROTATED_BYTES // layer.packed_bytes))
    ours = rotated(layer.marlin, count)
    copies = {peer: ours if peer == "marlin" else rotated(each.tensors, count) for peer, each in peers.items()}
    dense = [torch.randn(size_n, size_k, dtype=torch.float16, device="cuda") for _ in range(max(2, -(-count // 4)))]
    rows = []
    for size_m in sizes_m:
        written = torch.randn(size_m, size_k, dtype=torch.float16, device="cuda")
        a = written.clone()
        out = torch.empty(size_m, size_n, dtype=torch.float16, device="cuda")
        problem = problem_of(GemmTensors(a, *ours[0]))
        config = pick_config(problem)
        floor = 1e6 * max(
            (layer.packed_bytes + 2 * size_m * (size_k + size_n)) / peaks["read_bandwidth"],
            2 * size_m * size_k * size_n / peaks["matrix_rate"],
        )

        def launch(i: int, config=config, problem=problem, a=a, out=out) -> torch.Tensor:  # noqa: ANN001
            return launch_gemm(config, problem, GemmTensors(a, *ours[i % count]), out)

        launchers: dict[str, Any] = {"ours": launch}
        for peer, each in peers.items():
            launchers[peer] = each.launcher(copies[peer], a)
        errors = {who: layer.check(go(0), a, who) for who, go in launchers.items()}
        launchers["matmul"] = lambda i, a=a, out=out: torch.matmul(a, dense[i % len(dense)].t(), out=out)
        launches = max(count, 8) if size_m <= 512 else count
        us = medians_us(launchers, launches)
        after = _behind_another(launchers, launches, lambda written=written, a=a: torch.mul(written, 1.0, out=a))
        row = {
            "shape": name,
            "K": size_k,
            "N": size_n,
            "M": size_m,
            "us": us.pop("ours"),
            "matmul_us": us.pop("matmul"),
            "floor_us": floor,
            "after_us": after.pop("ours"),
            "matmul_after_us": after.pop("matmul"),
            "peers_us": us,
            "peers_after_us": after,
            "relative_error": errors["ours"],
            "kernel": config.source.name,
            "splits": config.num_splits,
            "reduction": config.reduction,
        }
        if size_m >= 1024:
            row["portable_us"] = _portable_us(problem, a, ours, out, layer)
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _behind_another(launchers: dict[str, Launch], launches: int, write: Callable[[], object]) -> dict[str, float]:
    """Returns what a launch of each adds behind a kernel that writes its activations."""

    def pair(launch: Launch) -> Launch:
        return lambda i: (write(), launch(i))[1]

    times = medians_us({name: pair(launch) for name, launch in launchers.items()}, launches)
    alone = median_us(lambda _: write(), launches)
    return {name: both - alone for name, both in times.items()}


def _portable_us(
    problem: GemmProblem, a: torch.Tensor, layers: list[tuple[torch.Tensor, ...]], out: torch.Tensor, layer: Layer
) -> float:
    """Times the kernel that has no Hopper instruction, whole, as a GPU of compute capability 8.0 would run it."""
    config = [each for each in all_configs(problem) if isinstance(each, PortableConfig)][-1]

    def launch(i: int) -> torch.Tensor:
        return launch_gemm(config, problem, GemmTensors(a, *layers[i % len(layers)]), out)

    layer.check(launch(0), a, "ours")
    return median_us(launch, len(layers), replays=5)


def _line(row: dict) -> str:
    ours, after, dense, floor = row["us"], row["after_us"], row["matmul_us"], row["floor_us"]
    peers = "".join(f" {name} {us:.1f}" for name, us in row["peers_us"].items())
    return (
        f"{row['shape']:12} {row['K']:6} {row['N']:6} {row['M']:5} {ours:9.1f} {after:9.1f} {dense:9.1f} {floor:9.1f} "
        f"{ours / floor:7.2f} {dense / ours:7.2f}  {row['kernel']} / {row['splits']} {row['reduction']}{peers}"
    )


def time_repack(num_bits: int) -> float:
    """Returns bytes read plus written per second by the AWQ-to-Marlin repack of 8192 x 57344 values or half of them."""
    packed = [random_words((8192, 7168)) for _ in range(2)]
    seconds = median_us(lambda i: ops.repack_awq(packed[i % 2], num_bits=num_bits), 4) * 1e-6
    return 2 * packed[0].nbytes / seconds


def random_words(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def summary(rows: list[dict]) -> list[dict[str, float]]:
    """Returns geometric means over the shapes for every M."""
    means = []
    for size_m in sorted({row["M"] for row in rows}):
        here = [row for row in rows if row["M"] == size_m]
        operations = [2 * size_m * row["K"] * row["N"] for row in here]
        mean = {
            "M": size_m,
            "times_floor": _geometric_mean([row["us"] / row["floor_us"] for row in here]),
            "matmul_times_floor": _geometric_mean([row["matmul_us"] / row["floor_us"] for row in here]),
            "after_times_floor": _geometric_mean([row["after_us"] / row["floor_us"] for row in here]),
            "speedup_over_matmul": _geometric_mean([row["matmul_us"] / row["us"] for row in here]),
            "tflops": _geometric_mean([ops_ / row["us"] / 1e6 for ops_, row in zip(operations, here, strict=True)]),
        }
        mean |= _peer_means(here, "us", "") | _peer_means(here, "after_us", "after_")
        if "portable_us" in here[0]:
            rates = [ops_ / row["portable_us"] / 1e6 for ops_, row in zip(operations, here, strict=True)]
            mean["portable_tflops"] = _geometric_mean(rates)
        means.append(mean)
    return means


def _peer_means(rows: list[dict], key: str, prefix: str) -> dict[str, float]:
    """Returns the peers' times as multiples of the floor, and ours as multiples of the best peer's."""
    if not rows[0][f"peers_{key}"]:
        return {}
    means = {
        f"{name}_{prefix}times_floor": _geometric_mean([row[f"peers_{key}"][name] / row["floor_us"] for row in rows])
        for name in rows[0][f"peers_{key}"]
    }
    ratios = [row[key] / min(row[f"peers_{key}"].values()) for row in rows]
    return means | {f"{prefix}of_best_peer": _geometric_mean(ratios), f"{prefix}of_best_peer_worst": max(ratios)}


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES_M), metavar="M")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--commit", help="the commit that is timed, where there is no git")
    options = parser.parse_args()

    peaks = {"read_bandwidth": read_bandwidth(), "matrix_rate": matrix_rate()}
    result = {
        **environment(options.commit),
        "weights": f"4 bits, g = {GROUP_SIZE}, zero points, fp16",
        **peaks,
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    print("shape             K      N     M   ours us  after us matmul us  floor us  /floor speedup  kernel, peers us")
    absent: dict[str, str] = {}
    rows = []
    for name in options.shapes:
        rows += time_shape(name, options.tokens, peaks, absent)
        torch.cuda.empty_cache()
    result["absent_peers"] = absent
    result["repack_bytes_per_second"] = {str(bits): time_repack(bits) for bits in (4, 8)}
    result["geometric_means"] = summary(rows)
    result["rows"] = rows
    for mean in result["geometric_means"]:
        print("geometric mean: " + ", ".join(f"{key} {value:.4g}" for key, value in mean.items()))
    print("repack, TB/s read plus written:", result["repack_bytes_per_second"])
    save(options.output, result)


if __name__ == "__main__":
    main()
