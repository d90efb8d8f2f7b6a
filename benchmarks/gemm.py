"""Times the Marlin GEMM against fp16 matmul and against what the GPU could do at best.

    python benchmarks/gemm.py --output benchmarks/results/gemm_h200.json
    python benchmarks/gemm_chart.py benchmarks/results/gemm_h200.json --output docs/gemm_h200.png

For every layer shape of Llama-3 8B and 70B and every number of tokens M: our time, that of ``torch.matmul`` in
fp16, and the floor, which is the larger of bytes over the read bandwidth and operations over the matrix rate, both
measured here first. Weights are 4 bits, g = 128, with zero points, and rotate through more memory than the L2 cache
holds; each time is the median of CUDA-graph replays. Every result is checked once, against float64, before it is
timed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from awq2marlin.gemm import jit, ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families.base import GemmProblem
from awq2marlin.gemm.families.portable import PortableConfig
from awq2marlin.gemm.launch import device_of, launch_gemm, launch_kernel, problem_of
from awq2marlin.gemm.select import all_configs, pick_config
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource

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
SIZES_M = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP_SIZE = 128
ROTATED_BYTES = 240 << 20  # several times the L2 of any GPU
MAX_RELATIVE_ERROR = 1e-3  # fp16 results of fp16 inputs come to 2e-4 to 4e-4

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


def median_us(launch: Callable[[int], object], launches: int, replays: int = 15) -> float:
    """Returns microseconds per launch, the median over replays of a graph; ``launch(i)`` takes the i-th input."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Returns bytes per second of a kernel that only reads 4 GiB."""
    data = torch.randint(-(2**31), 2**31, (1 << 30,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    source = KernelSource("read", READ_KERNEL)
    blocks = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    arguments = (data.data_ptr(), out.data_ptr(), ctypes.c_longlong(data.numel() // 4))
    device = device_of(0)

    def launch(_: int) -> None:
        launch_kernel(source, device, (blocks, 1, 1), 512, arguments)

    return data.numel() * 4 / median_us(launch, 2) * 1e6


def matrix_rate() -> float:
    """Returns operations per second of an fp16 product of 8192 x 8192 random matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / median_us(lambda _: torch.matmul(a, b, out=out), 5) * 1e6


def random_layer(size_k: int, size_n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")

    scales = torch.rand(size_k // GROUP_SIZE, size_n, device="cuda").mul_(0.02).add_(0.001).half()
    return words(size_k // 16, size_n * 2), scales, words(size_k // GROUP_SIZE, size_n // 8)


def check(out: torch.Tensor, a: torch.Tensor, layer: tuple[torch.Tensor, ...]) -> float:
    """Returns the relative error of the first 2048 columns; stops the benchmark if it is not rounding."""
    columns = min(2048, out.shape[1])
    weight = ops.dequantize(layer[0][:, : columns * 2], layer[1][:, :columns], layer[2][:, : columns // 8])
    exact = a.double() @ weight
    error = ((out[:, :columns].double() - exact).norm() / exact.norm()).item()
    if not error < MAX_RELATIVE_ERROR:
        sys.exit(f"wrong result at {tuple(a.shape)} by {out.shape[1]}: relative error {error}")
    return error


def time_shape(name: str, sizes_m: list[int], peaks: dict[str, float]) -> list[dict[str, object]]:
    """Times one layer shape at every M."""
    size_k, size_n = SHAPES[name]
    packed_bytes = size_k * size_n // 2 + size_k // GROUP_SIZE * size_n * 5 // 2
    count = max(2, -(-ROTATED_BYTES // packed_bytes))
    layers = [random_layer(size_k, size_n) for _ in range(count)]
    dense = [torch.randn(size_n, size_k, dtype=torch.float16, device="cuda") for _ in range(max(2, -(-count // 4)))]
    rows = []
    for size_m in sizes_m:
        a = torch.randn(size_m, size_k, dtype=torch.float16, device="cuda")
        out = torch.empty(size_m, size_n, dtype=torch.float16, device="cuda")
        problem = problem_of(GemmTensors(a, *layers[0]))
        config = pick_config(problem)
        floor = 1e6 * max(
            (packed_bytes + 2 * size_m * (size_k + size_n)) / peaks["read_bandwidth"],
            2 * size_m * size_k * size_n / peaks["matrix_rate"],
        )

        def launch(i: int, config=config, problem=problem, a=a, out=out) -> torch.Tensor:  # noqa: ANN001
            return launch_gemm(config, problem, GemmTensors(a, *layers[i % count]), out)

        error = check(launch(0), a, layers[0])
        launches = max(count, 8) if size_m <= 512 else count
        row = {
            "shape": name,
            "K": size_k,
            "N": size_n,
            "M": size_m,
            "us": median_us(launch, launches),
            "matmul_us": median_us(
                lambda i, a=a, out=out: torch.matmul(a, dense[i % len(dense)].t(), out=out), launches
            ),
            "floor_us": floor,
            "relative_error": error,
            "kernel": config.source.name,
            "splits": config.num_splits,
        }
        if size_m >= 1024:
            row["portable_us"] = _portable_us(problem, a, layers, out)
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _portable_us(
    problem: GemmProblem, a: torch.Tensor, layers: list[tuple[torch.Tensor, ...]], out: torch.Tensor
) -> float:
    """Times the kernel that has no Hopper instruction, whole, as a GPU of compute capability 8.0 would run it."""
    config = [each for each in all_configs(problem) if isinstance(each, PortableConfig)][-1]

    def launch(i: int) -> torch.Tensor:
        return launch_gemm(config, problem, GemmTensors(a, *layers[i % len(layers)]), out)

    check(launch(0), a, layers[0])
    return median_us(launch, len(layers), replays=5)


def _line(row: dict) -> str:
    ours, dense, floor = row["us"], row["matmul_us"], row["floor_us"]
    return (
        f"{row['shape']:12} {row['K']:6} {row['N']:6} {row['M']:5} {ours:9.1f} {dense:9.1f} {floor:9.1f} "
        f"{ours / floor:7.2f} {dense / ours:7.2f}  {row['kernel']} / {row['splits']}"
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
            "speedup_over_matmul": _geometric_mean([row["matmul_us"] / row["us"] for row in here]),
            "tflops": _geometric_mean([ops_ / row["us"] / 1e6 for ops_, row in zip(operations, here, strict=True)]),
        }
        if "portable_us" in here[0]:
            rates = [ops_ / row["portable_us"] / 1e6 for ops_, row in zip(operations, here, strict=True)]
            mean["portable_tflops"] = _geometric_mean(rates)
        means.append(mean)
    return means


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


@functools.cache
def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES_M), metavar="M")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--commit", help="the commit that is timed, where there is no git")
    options = parser.parse_args()

    peaks = {"read_bandwidth": read_bandwidth(), "matrix_rate": matrix_rate()}
    result = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "nvrtc": jit.compiler_version(),
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or _commit(),
        "weights": f"4 bits, g = {GROUP_SIZE}, zero points, fp16",
        **peaks,
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    print("shape             K      N     M   ours us matmul us  floor us  /floor speedup  kernel / splits")
    rows = [row for name in options.shapes for row in time_shape(name, options.tokens, peaks)]
    result["repack_bytes_per_second"] = {str(bits): time_repack(bits) for bits in (4, 8)}
    result["geometric_means"] = summary(rows)
    result["rows"] = rows
    for mean in result["geometric_means"]:
        print("geometric mean: " + ", ".join(f"{key} {value:.4g}" for key, value in mean.items()))
    print("repack, TB/s read plus written:", result["repack_bytes_per_second"])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
