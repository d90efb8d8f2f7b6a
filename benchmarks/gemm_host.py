"""Times what a call costs the host: the operators and the layer beside vLLM's Marlin, ``torch.mm`` and a bare launch.

    python benchmarks/gemm_host.py --output benchmarks/results/gemm_host_h100.json

Each call runs on a layer so small that the GPU is through before the host has launched the next one: a loop of 2,000
calls, without a wait between them, takes as long as the host does. Loops take turns, in inference mode and without it;
a figure is the median of several. What the GPU takes is measured, too, in a CUDA graph of the same calls: where that is
more, the line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gemm import captured
from record import environment, save

import awq2marlin
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.launch import problem_of
from awq2marlin.gemm.linear import MarlinLinear
from awq2marlin.gemm.select import pick_config

Call = Callable[[], object]

SIZE_K, SIZE_N, EXPERTS, TOP_K = 256, 256, 8, 2
#: Numbers of tokens for which the small, the Hopper and the wide kernel are picked on compute capability 9.0.
TOKENS = (1, 64, 256)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda").half() * 0.02


def dense_calls() -> dict[str, Call]:
    """Returns calls of the operator, of the layer and of ``torch.mm``."""
    layer = MarlinLinear(SIZE_K, SIZE_N, num_bits=4, group_size=128, device="cuda")
    layer.qweight.data, layer.scales.data = words(*layer.qweight.shape), scales(*layer.scales.shape)
    layer.qzeros.data = words(*layer.qzeros.shape)
    tensors = layer.qweight.data, layer.scales.data, layer.qzeros.data
    weight = torch.randn(SIZE_K, SIZE_N, device="cuda").half()
    operator = torch.ops.awq2marlin.marlin_gemm
    calls: dict[str, Call] = {}
    for size_m in TOKENS:
        a = torch.randn(size_m, SIZE_K, device="cuda").half()
        config = pick_config(problem_of(GemmTensors(a, *tensors)))
        name = f"marlin_gemm, M = {size_m} ({config.template})"
        calls[name] = lambda a=a: awq2marlin.marlin_gemm(a, *tensors)
        if size_m == 1:
            calls["torch.ops.awq2marlin.marlin_gemm"] = lambda a=a: operator(a, *tensors, None, 4)
            calls["MarlinLinear"] = lambda a=a: layer(a)
            calls["torch.mm"] = lambda a=a: torch.mm(a, weight)
    return calls


def expert_calls() -> dict[str, Call]:
    """Returns calls of the operators of experts, for one token and for several."""
    groups = SIZE_K // 128
    weights = (words(EXPERTS, SIZE_K // 16, SIZE_N * 2), scales(EXPERTS, groups, SIZE_N), words(EXPERTS, groups, 32))
    half = SIZE_K // 2
    w2 = (words(EXPERTS, half // 16, SIZE_N * 2), scales(EXPERTS, half // 128, SIZE_N), words(EXPERTS, half // 128, 32))
    calls: dict[str, Call] = {}
    for size_m in (1, 64):
        a = torch.randn(size_m, SIZE_K, device="cuda").half()
        ids = torch.randint(0, EXPERTS, (size_m, TOP_K), dtype=torch.int32, device="cuda")
        shares = torch.rand(size_m, TOP_K, device="cuda")
        calls[f"marlin_moe_gemm, M = {size_m}"] = lambda a=a, ids=ids: awq2marlin.marlin_moe_gemm(a, *weights, ids)
        calls[f"marlin_experts, M = {size_m}"] = lambda a=a, ids=ids, shares=shares: awq2marlin.marlin_experts(
            a, *weights, *w2, ids, shares
        )
    return calls


def vllm_calls() -> dict[str, Call]:
    """Returns a call of vLLM's Marlin, or none where vLLM is missing."""
    try:
        from gemm_peers import LayerNumbers, Marlin
    except ImportError:
        return {}
    qweight, qzeros = words(SIZE_K // 16, SIZE_N * 2), words(SIZE_K // 128, SIZE_N // 8)
    marlin = qweight, scales(SIZE_K // 128, SIZE_N), qzeros
    a = torch.randn(1, SIZE_K, device="cuda").half()
    try:
        peer = Marlin(LayerNumbers(torch.empty(SIZE_K, SIZE_N, device="cuda"), None, None, marlin, (1,)))
        launch = peer.launcher([marlin], a)
        launch(0)
    except Exception as exc:  # a package that is not there, or has changed
        print(f"vLLM's Marlin is not timed: {type(exc).__name__}: {exc}", file=sys.stderr)
        return {}
    return {"vLLM's Marlin": lambda: launch(0)}


def bare_launch() -> dict[str, Call]:
    """Returns a launch by cuda-bindings of a kernel that does nothing, prepared as ours are."""
    from awq2marlin.gemm.driver import Blocks, PreparedKernel, device_of
    from awq2marlin.gemm.source import ENTRY_POINT, KernelSource

    text = f'extern "C" __global__ void {ENTRY_POINT}(long long*) {{}}\n'
    kernel = PreparedKernel(KernelSource("nothing", text), device_of(0), Blocks((1, 1, 1), 32), 0, 1, ())
    kernel(0)
    memory = kernel._idle[0]
    launch, config, handle, pointers = kernel._launch, memory.config, kernel._kernel, memory.pointers
    return {"a prepared launch": lambda: kernel(0), "cuLaunchKernelEx": lambda: launch(config, handle, pointers, 0)}


def medians_us(calls: dict[str, Call], count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the host's microseconds a call, by mode and by call: loops take turns, so that noise hits all alike."""
    modes = {"inference": torch.inference_mode, "usual": contextlib.nullcontext}
    times: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in calls} for mode in modes}
    for _ in range(repeats):
        for mode, context in modes.items():
            for name, call in calls.items():
                with context():
                    times[mode][name].append(_loop_us(call, count))
    return {mode: {name: statistics.median(found) for name, found in each.items()} for mode, each in times.items()}


def _loop_us(call: Call, count: int) -> float:
    for _ in range(count // 10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def gpu_us(call: Call, count: int) -> float:
    """Returns the GPU's microseconds a call."""
    graph = captured(lambda _: call(), count)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--calls", type=int, default=2000, help="of a loop")
    parser.add_argument("--repeats", type=int, default=7, help="loops of each call")
    parser.add_argument("--commit", help="the commit that is timed, where there is no git")
    options = parser.parse_args()

    calls = dense_calls() | expert_calls() | vllm_calls() | bare_launch()
    result = {
        **environment(options.commit),
        "python": sys.version.split()[0],
        "calls": options.calls,
        "repeats": options.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    times = medians_us(calls, options.calls, options.repeats)
    rows = []
    print(f"{'us a call':44} {'inference mode':>16} {'without it':>12} {'the GPU':>10}")
    for name, call in calls.items():
        inference, usual = times["inference"][name], times["usual"][name]
        gpu = gpu_us(call, 200)
        rows.append({"call": name, "inference_mode_us": inference, "us": usual, "gpu_us": gpu})
        note = "" if gpu < min(inference, usual) else "  bound by the GPU"
        print(f"{name:44} {inference:16.1f} {usual:12.1f} {gpu:10.1f}{note}", flush=True)
    result["rows"] = rows
    save(options.output, result)


if __name__ == "__main__":
    main()
