"""How much of a download is hidden behind the conversion, and of the conversion behind the download.

    python benchmarks/hub_overlap.py --folder /dev/shm --out benchmarks/results/hub_overlap.json

Makes a checkpoint of many shards, serves it from a hub on 127.0.0.1, in a process of its own, and measures whole
processes, start-up included:

* the conversion alone: `convert org/model`, everything in the client's cache;
* the link alone: the time that all shards take at a speed chosen so that it is as slow as the conversion, fetched one
  after the other by the client;
* both: `convert org/model` with an empty cache over that link, and the same with `--low-disk`.

The time of both should be that of the slower of the two, not their sum: at most 1.25 times. Runs alternate; prints
medians, writes them with machine, date and commit.
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
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from record import origin, save  # noqa: E402

from awq2marlin._version import __version__  # noqa: E402
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint  # noqa: E402

REPO = "org/model-awq"

_SERVE = """
import json, os, sys
from pathlib import Path
from tests.hub.client import environment
from tests.hub.server import LoopbackHub

folder = Path(sys.argv[1])
with LoopbackHub(folder / "hub") as hub:
    hub.add_repository("org/model-awq", folder / "source")
    print(json.dumps(environment(hub, folder / "home")), flush=True)
    for line in sys.stdin:
        hub.behave()
        if float(line):
            hub.misbehave("/cdn/*", method="GET", times=None, bytes_per_second=float(line))
        print("set", flush=True)
"""

_FETCH = """
import json, sys
from huggingface_hub import hf_hub_download
for name in json.loads(sys.argv[1]):
    hf_hub_download("org/model-awq", name)
"""


class Hub:
    """The hub in a process of its own, with a link of adjustable speed."""

    def __init__(self, folder: Path) -> None:
        """Starts it; it serves ``folder/source``."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **json.loads(self._process.stdout.readline())}

    def set_speed(self, bytes_per_second: float) -> None:
        """Makes the link so fast; 0 for as fast as it goes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{bytes_per_second}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def stop(self) -> None:
        """Ends it."""
        self._process.communicate()


def measure(command: list[str], environment: dict[str, str]) -> float:
    """Returns the wall seconds of a process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run(folder: Path, runs: int, options: list[str]) -> dict[str, Any]:
    """Measures all of it on the checkpoint in ``folder/source``."""
    hub, out, home = Hub(folder), folder / "out", folder / "home"
    shards = sorted(path.name for path in (folder / "source").glob("*.safetensors"))
    size = sum((folder / "source" / name).stat().st_size for name in shards)
    convert = [sys.executable, "-m", "awq2marlin", "convert", REPO, str(out), "--quiet", *options]
    fetch = [sys.executable, "-c", _FETCH, json.dumps(shards)]

    def timed(command: list[str], *, empty: bool) -> float:
        shutil.rmtree(out, ignore_errors=True)
        if empty:
            shutil.rmtree(home, ignore_errors=True)
        os.sync()
        return measure(command, hub.environment)

    times: dict[str, list[float]] = {"convert": [], "fetch": [], "both": [], "both_low_disk": []}
    try:
        timed(convert, empty=True)  # fills the cache, compiles
        speed = size / timed(convert, empty=False)
        for _ in range(runs):
            times["convert"].append(timed(convert, empty=False))
            hub.set_speed(speed)
            times["fetch"].append(timed(fetch, empty=True))
            times["both_low_disk"].append(timed([*convert, "--low-disk"], empty=True))
            times["both"].append(timed(convert, empty=True))
            hub.set_speed(0)
            print("  " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in times.items()), flush=True)
    finally:
        hub.stop()
    median = {name: statistics.median(each) for name, each in times.items()}
    slower = max(median["convert"], median["fetch"])
    return {
        "bytes": size,
        "shards": len(shards),
        "link_MB_per_s": round(speed / 1e6, 1),
        "seconds": {name: [round(value, 3) for value in each] for name, each in times.items()},
        "median_s": {name: round(value, 3) for name, value in median.items()},
        "ratio_to_the_slower": {name: round(median[name] / slower, 3) for name in ("both", "both_low_disk")},
        "sum_to_the_slower": round((median["convert"] + median["fetch"]) / slower, 3),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--layers", type=int, default=4, help="of Llama-3-8B's shapes, 0.13 GB each")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--verify", default="all", help="what convert compares; this makes it slower")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="hub_overlap-"))
    try:
        recipe = llama_recipe(4096, 14336, arguments.layers, 1024, 1024, group_size=128, shards=arguments.shards)
        write_checkpoint(folder / "source", recipe)
        result = run(folder, arguments.runs, ["--verify", arguments.verify])
    finally:
        shutil.rmtree(folder)
    result = {
        "what": "convert org/model over a link as slow as the conversion",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "version": __version__,
        **origin(),
        **result,
    }
    print(json.dumps(result, indent=1))
    save(arguments.out, result)


if __name__ == "__main__":
    main()
