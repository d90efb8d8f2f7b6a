"""Says what keeps the kernels busy, according to Nsight Compute: of dense products, and of whole blocks of experts.

    python benchmarks/kernel_profile.py measure --output benchmarks/results/profile_h100.json
    python benchmarks/kernel_profile.py show benchmarks/results/profile_h100.json

Each launch runs once, after one that is not looked at, with cold caches, as Nsight Compute empties them; clocks are
left as they are. Weights have 4 bits, groups of 128 rows and zero points, in fp16. "Busy" is the share of what a unit
could do in that time, in percent. A stall is why a warp waits, with its part of the time that warps live.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from record import environment, save

DENSE = ("8B qkv:1", "8B qkv:8", "8B qkv:64", "70B gate+up:1", "70B gate+up:8", "70B gate+up:64", "70B gate+up:1024")
EXPERTS = ("Qwen3-30B-A3B:16", "Qwen3-30B-A3B:256", "Qwen3-30B-A3B:1024")
SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "LaunchStats",
)
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}

#: Of the whole launch and all multiprocessors, also those that have nothing to do. (Shared memory: while they work.)
FIGURES = {
    "tensor_cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "alu": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "shared_memory_and_l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "active_warps": "smsp__warps_active.avg.per_cycle_active",
    "eligible_warps": "smsp__warps_eligible.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


# ---- under Nsight Compute -----------------------------------------------------------------------------------


def launch_all(dense: list[str], experts: list[str]) -> list[tuple[str, str]]:
    """Runs everything once where the profiler looks, and returns case and kernel of each launch, in order."""
    import torch

    from awq2marlin.gemm.driver import PreparedKernel

    launched: list[tuple[str, str]] = []
    call = PreparedKernel.__call__
    for name, run in (*dense_calls(dense), *expert_calls(experts)):
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # Nsight Compute keeps a copy of all memory

        def noted(kernel: PreparedKernel, *values: Any, name: str = name) -> None:
            launched.append((name, kernel.source.name))
            call(kernel, *values)

        with patch.object(PreparedKernel, "__call__", noted):
            torch.cuda.cudart().cudaProfilerStart()
            run()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        print(name, flush=True)
    return launched


def dense_calls(cases: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields a name and a product."""
    import torch
    from gemm import SHAPES
    from gemm_variants import USUAL, random_weights

    from awq2marlin.gemm import ops

    for case in cases:
        shape, _, tokens = case.rpartition(":")
        marlin = random_weights(USUAL, *SHAPES[shape])
        a = torch.randn(int(tokens), SHAPES[shape][0], dtype=torch.float16, device="cuda")
        yield f"{shape}, M = {tokens}", lambda a=a, marlin=marlin: ops.marlin_gemm(a, *marlin)


def expert_calls(cases: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields a name and a block."""
    from experts import MODELS, Experts, Point

    from awq2marlin.gemm.experts.ops import marlin_experts

    for case in cases:
        model, _, tokens = case.rpartition(":")
        layer = Experts(MODELS[model], "zp128").marlin()
        point = Point(MODELS[model], int(tokens), "uniform", 1)
        yield (
            f"{model}, M = {tokens}",
            lambda point=point, layer=layer: marlin_experts(point.x, *layer, point.ids[0], point.shares[0]),
        )


# ---- what it found ------------------------------------------------------------------------------------------


def figures_of(metrics: dict[str, float]) -> dict[str, Any]:
    """Returns what is said of a launch."""
    found: dict[str, Any] = {name: metrics[metric] for name, metric in FIGURES.items() if metric in metrics}
    waits = {match[1]: value for metric, value in metrics.items() if (match := STALL.fullmatch(metric))}
    total = sum(waits.values())
    longest = sorted(waits, key=lambda name: -waits[name])[:4]
    found["stalls"] = {name: round(100 * waits[name] / total, 1) for name in longest if name != "selected"}
    return found


def rows_of(table: Path, launched: list[tuple[str, str]]) -> list[dict]:
    """Returns a row for every launch, from what Nsight Compute wrote.

    Raises:
        SystemExit: it has not seen the launches that there were.
    """
    lines = [line for line in table.read_text("utf-8").splitlines() if line.startswith('"')]
    names, units, *values = csv.reader(lines)
    if len(values) != len(launched):
        sys.exit(f"Nsight Compute has {len(values)} launches, and there were {len(launched)}: see {table}")
    rows = []
    for (case, kernel), line in zip(launched, values, strict=True):
        cells = dict(zip(names, line, strict=True))
        metrics = {name: number for name, cell in cells.items() if (number := as_number(cell)) is not None}
        unit = units[names.index("gpu__time_duration.sum")]
        us = metrics["gpu__time_duration.sum"] * MICROSECONDS[unit.replace("econd", "")]
        rows.append({"case": case, "kernel": kernel, "us": round(us, 2), **figures_of(metrics)})
    return rows


def as_number(cell: str) -> float | None:
    """Returns a cell's number, or None if it has another content."""
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def measure(options: argparse.Namespace) -> None:
    """Starts this script under Nsight Compute, and keeps what the launches' figures say."""
    with tempfile.TemporaryDirectory() as folder:
        table = options.table or Path(folder) / "table.csv"
        names = table.with_suffix(".names.json")
        command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "-k", "awq2marlin_kernel"]
        command += [part for section in SECTIONS for part in ("--section", section)]
        command += ["--csv", "--page", "raw", "--log-file", str(table)]
        command += [sys.executable, __file__, "launch", "--names", str(names)]
        command += ["--dense", *options.dense, "--experts", *options.experts]
        subprocess.run(command, check=True)
        rows = rows_of(table, [(case, kernel) for case, kernel in json.loads(names.read_text("utf-8"))])
    result = {**environment(options.commit), "weights": "4 bits, g = 128, zero points, fp16", "rows": rows}
    save(options.output, result)
    show(result)


def show(result: dict[str, Any]) -> None:
    """Prints a Markdown table."""
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    columns = ("us", "tensor_cores", "issue_slots", "alu", "fma", "dram", "l2", "shared_memory_and_l1")
    print("| case | kernel | " + " | ".join(column.replace("_", " ") for column in columns) + " | stalls |")
    print("| --- " * (len(columns) + 3) + "|")
    for row in result["rows"]:
        stalls = ", ".join(f"{name} {share:.0f}" for name, share in row["stalls"].items())
        cells = [f"{row[column]:.3g}" if column in row else "-" for column in columns]
        print("| " + " | ".join([row["case"], row["kernel"], *cells, stalls]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="run the kernels under Nsight Compute on this machine's GPU")
    add_cases(command)
    command.add_argument("--output", type=Path, help="a JSON file for the results")
    command.add_argument("--table", type=Path, help="a CSV file for all that Nsight Compute has measured")
    command.add_argument("--commit", help="the commit that is profiled, where there is no git")
    command = commands.add_parser("launch", help="what is run under Nsight Compute")
    add_cases(command)
    command.add_argument("--names", type=Path, required=True, help="a JSON file for what was launched")
    command = commands.add_parser("show", help="print the table of an earlier result")
    command.add_argument("result", type=Path)
    options = parser.parse_args()
    if options.command == "measure":
        measure(options)
    elif options.command == "launch":
        options.names.write_text(json.dumps(launch_all(options.dense, options.experts)), "utf-8")
    else:
        show(json.loads(options.result.read_text("utf-8")))


def add_cases(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dense", nargs="*", default=list(DENSE), metavar="SHAPE:M", help="of benchmarks/gemm.py")
    command.add_argument("--experts", nargs="*", default=list(EXPERTS), metavar="MODEL:M", help="of .../experts.py")


if __name__ == "__main__":
    main()
