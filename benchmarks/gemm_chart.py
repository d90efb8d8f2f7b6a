"""Draws the results of ``benchmarks/gemm.py``.

python benchmarks/gemm_chart.py benchmarks/results/gemm_h100.json --output docs/gemm_h100.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, DENSE, FLOOR = "#0b6e4f", "#b0413e", "#555555"


def draw_times_floor(axes: Axes, rows: list[dict], means: list[dict]) -> None:
    """Time as a multiple of the floor: the mean as a line, the range over the shapes as a band."""
    sizes = [mean["M"] for mean in means]
    for key, mean_key, colour, label in (
        ("matmul_us", "matmul_times_floor", DENSE, "torch.matmul, fp16 weights"),
        ("us", "times_floor", OURS, "Marlin GEMM, 4-bit weights"),
    ):
        ratios = [[row[key] / row["floor_us"] for row in rows if row["M"] == size] for size in sizes]
        axes.fill_between(sizes, list(map(min, ratios)), list(map(max, ratios)), color=colour, alpha=0.12, linewidth=0)
        axes.plot(sizes, [mean[mean_key] for mean in means], color=colour, marker="o", markersize=4, label=label)
    axes.axhline(1, color=FLOOR, linewidth=1, linestyle="--")
    axes.annotate("what the GPU could do at best", (sizes[0], 1), (0, -13), textcoords="offset points", color=FLOOR)
    axes.set_ylabel("time, as a multiple of the floor")
    axes.set_ylim(0, None)
    axes.legend(frameon=False)


def draw_speedup(axes: Axes, rows: list[dict], means: list[dict]) -> None:
    """Speed-up over fp16 matmul: a thin line for each shape, a thick one for their mean."""
    sizes = [mean["M"] for mean in means]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        values = [row["matmul_us"] / row["us"] for row in rows if row["shape"] == shape]
        axes.plot(sizes, values, color=OURS, alpha=0.25, linewidth=1)
    axes.plot(sizes, [mean["speedup_over_matmul"] for mean in means], color=OURS, marker="o", markersize=4)
    axes.axhline(1, color=FLOOR, linewidth=1, linestyle="--")
    axes.set_ylabel("speed-up over torch.matmul in fp16")
    axes.set_ylim(0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG")
    options = parser.parse_args()
    result = json.loads(options.results.read_text())

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for draw, axes in zip((draw_times_floor, draw_speedup), panels, strict=True):
        draw(axes, result["rows"], result["geometric_means"])
        sizes = [mean["M"] for mean in result["geometric_means"]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.set_xlabel("tokens M")
        axes.grid(alpha=0.2)
    figure.suptitle(
        f"{result['gpu']}, {result['weights']}; the eight layer shapes of Llama-3 8B and 70B ({result['date']})",
        fontsize=10,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=160)


if __name__ == "__main__":
    main()
