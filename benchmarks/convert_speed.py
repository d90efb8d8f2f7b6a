"""How fast `awq2marlin convert` is beside `cp -r` of the same folder, in one run, alternating.

    python benchmarks/convert_speed.py --ram /dev/shm --disk /var/tmp --out benchmarks/results/convert_speed.json

Makes a checkpoint of Llama-3-8B's shapes, of AWQ or (``--kind``) another format, and compares whole processes,
start-up included:

* on a RAM disk: `convert --verify none` against `cp -r`; before each, as much memory is written and freed there,
  because a virtual machine's memory costs several times as much to write when its host has taken it back meanwhile;
* on a disk, the source hot in the page cache: `convert --verify none` (which syncs what it writes) against
  `cp -r` and a `sync` of the copied files, and beside it the disk's limit: the time to write and sync as many bytes
  straight from memory, four files at once;
* peak resident memory, also of a checkpoint four times as large.

Python may keep the bytecode that it compiles, as `pip` does, whatever PYTHONDONTWRITEBYTECODE says. Prints medians and
the ratios pair by pair; writes them with machine, date and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from record import origin, processor, save

from awq2marlin._version import __version__
from awq2marlin.checkpoint.synthetic import (
    AwqGemvFastRecipe,
    AwqGemvRecipe,
    AwqMarlinRecipe,
    CompressedTensorsRecipe,
    GptqRecipe,
    Recipe,
    llama_recipe,
    write_checkpoint,
)

#: Hidden, intermediate, key/value and vocabulary sizes of Llama-3-8B.
LLAMA3_8B = {"hidden": 4096, "intermediate": 14336, "kv_size": 1024, "vocab": 128256}


@dataclass(frozen=True)
class AutoRoundRecipe(GptqRecipe):
    """A checkpoint of AutoRound: GPTQ's second version without ``g_idx``."""

    title: ClassVar[str] = "AutoRound"

    def module_tensors(self, size_k: int, size_n: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = super().module_tensors(size_k, size_n)
        return {name: tensor for name, tensor in tensors.items() if name != "g_idx"}

    def fixed(self, name: str) -> bytes | None:
        stored = super().fixed(name)
        return bytes(byte + (0x11 if self.bits == 4 else 1) for byte in stored) if stored else None

    def quantization(self) -> dict[str, Any]:
        said = {"bits": self.bits, "group_size": self.group_size, "sym": not self.has_qzeros, "data_type": "int"}
        return {"quant_method": "auto-round", "packing_format": "auto_round", **said}


#: Formats of the source.
KINDS = {
    "auto-round": AutoRoundRecipe,
    "awq": Recipe,
    "awq-gemv": AwqGemvRecipe,
    "awq-gemv_fast": AwqGemvFastRecipe,
    "awq-marlin": AwqMarlinRecipe,
    "compressed-tensors": CompressedTensorsRecipe,
    "gptq": GptqRecipe,
}

_MEASURE = """
import os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, code)
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Returns wall seconds and peak resident megabytes of the largest process of a command."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], check=True, capture_output=True, text=True, env=environment
    )
    seconds, kilobytes, code = run.stdout.split()
    if code != "0":
        raise RuntimeError(f"{command} failed with {code}: {run.stderr}")
    return float(seconds), int(kilobytes) / 1000


def alternate(
    ours: list[str], theirs: list[str], target: Path, runs: int, prepare: Callable[[], None]
) -> dict[str, object]:
    """Runs both commands in turn, each into a fresh target; returns medians and the ratios pair by pair."""
    pairs = []
    for run in range(runs + 1):
        pair = []
        for command in (ours, theirs):
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            prepare()
            pair.append(measure(command))
        if run:  # the first pair warms up: page allocation, caches of compiled code
            pairs.append(pair)
            print(
                f"  convert {pair[0][0]:.2f} s, copy {pair[1][0]:.2f} s, ratio {pair[0][0] / pair[1][0]:.2f}",
                flush=True,
            )
    shutil.rmtree(target, ignore_errors=True)
    ratios = [mine[0] / other[0] for mine, other in pairs]
    return {
        "convert_s": [round(mine[0], 3) for mine, _ in pairs],
        "copy_s": [round(other[0], 3) for _, other in pairs],
        "convert_median_s": round(statistics.median(mine[0] for mine, _ in pairs), 3),
        "copy_median_s": round(statistics.median(other[0] for _, other in pairs), 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "convert_peak_MB": round(max(mine[1] for mine, _ in pairs), 1),
    }


def touch_memory(place: Path, size: int) -> None:
    """Writes and frees so many bytes of a RAM disk, so that the next command finds memory that is at hand."""
    path, block = place / "awq2marlin-bench-memory", bytes(16 << 20)
    with path.open("wb", buffering=0) as stream:
        for _ in range(size // len(block) + 1):
            stream.write(block)
    path.unlink()


def compare(place: Path, source: Path, runs: int, workers: int, sync: bool) -> dict[str, object]:
    """Compares converting with copying in one place."""
    target = place / "awq2marlin-bench-target"
    ours = [
        sys.executable,
        "-m",
        "awq2marlin",
        "convert",
        str(source),
        str(target),
        "--verify",
        "none",
        "--quiet",
        "--workers",
        str(workers),
    ]
    theirs = ["cp", "-r", str(source), str(target)]
    if sync:
        theirs = ["sh", "-c", f"cp -r {source} {target} && find {target} -type f -exec sync {{}} + && sync {target}"]
    print(f"{place}: {'cp -r and sync' if sync else 'cp -r'}, {workers} workers", flush=True)
    size = sum(path.stat().st_size for path in source.iterdir())
    return alternate(ours, theirs, target, runs, lambda: None if sync else touch_memory(place, size))


def write_limit(place: Path, size: int, runs: int, files: int = 4) -> list[float]:
    """Returns the seconds it takes to write ``size`` bytes that are at hand to ``files`` files, and to sync them."""
    block = os.urandom(16 << 20)

    def write(index: int) -> Path:
        path = place / f"awq2marlin-bench-limit-{index}"
        with path.open("wb", buffering=0) as stream:
            for _ in range(size // files // len(block)):
                stream.write(block)
            os.fsync(stream.fileno())
        return path

    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        with ThreadPoolExecutor(files) as pool:
            written = list(pool.map(write, range(files)))
        seconds.append(round(time.perf_counter() - started, 3))
        for path in written:
            path.unlink()
    print(f"{place}: {size / 1e9:.1f} GB from memory in {min(seconds):.2f} to {max(seconds):.2f} s", flush=True)
    return seconds


def make(folder: Path, layers: int, options: argparse.Namespace, **sizes: int) -> Path:
    """Makes the checkpoint, in four shards."""
    kind, zeros = KINDS[options.kind], not options.symmetric
    write_checkpoint(
        folder, llama_recipe(layers=layers, shards=4, kind=kind, has_qzeros=zeros, **{**LLAMA3_8B, **sizes})
    )
    return folder


def machine() -> dict[str, object]:
    """Returns what the figures belong to."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "version": __version__,
        **origin(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ram", type=Path, help="a folder on a RAM disk with twice the checkpoint's room")
    parser.add_argument("--disk", type=Path, help="a folder on a disk with twice the checkpoint's room")
    parser.add_argument("--kind", choices=KINDS, default="awq", help="format of the source")
    parser.add_argument("--symmetric", action="store_true", help="a source without zero points")
    parser.add_argument("--layers", type=int, default=16, help="layers on the RAM disk")
    parser.add_argument("--disk-layers", type=int, default=16, help="layers on the disk")
    parser.add_argument("--runs", type=int, default=5, help="counted pairs")
    parser.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory, small and four times as large, on disk"
    )
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    source_kind = f"{options.kind}, {'symmetric' if options.symmetric else 'with zero points'}"
    results: dict[str, object] = {"machine": machine(), "source": source_kind}
    for name, place, layers in (("ram", options.ram, options.layers), ("disk", options.disk, options.disk_layers)):
        if place is None:
            continue
        source = make(place / "awq2marlin-bench-source", layers, options)
        try:
            size = sum(path.stat().st_size for path in source.iterdir())
            if name == "disk":
                results["disk, limit"] = {"bytes": size, "write_s": write_limit(place, size, options.runs)}
            for workers in options.workers:
                figures = compare(place, source, options.runs, workers, sync=name == "disk")
                results[f"{name}, {workers} workers"] = {"layers": layers, "bytes": size, **figures}
        finally:
            shutil.rmtree(source)
    if options.memory:
        results["memory"] = [peak_memory(options, layers) for layers in (4, 20)]
    print(json.dumps(results, indent=1))
    save(options.out, results)


def peak_memory(options: argparse.Namespace, layers: int) -> dict[str, object]:
    """Returns the peak resident memory of converting a checkpoint of so many layers."""
    source = options.disk / "awq2marlin-bench-source"
    make(source, layers, options, vocab=8192)  # with the embeddings small, layers are size
    target = options.disk / "awq2marlin-bench-target"
    try:
        size = sum(path.stat().st_size for path in source.iterdir())
        _, peak = measure([sys.executable, "-m", "awq2marlin", "convert", str(source), str(target), "--quiet"])
        return {"layers": layers, "bytes": size, "peak_MB": round(peak, 1)}
    finally:
        shutil.rmtree(source)
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
