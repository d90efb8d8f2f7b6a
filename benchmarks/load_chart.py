"""Draws the results of ``benchmarks/load.py``, and prints them as a table of Markdown.

python benchmarks/load_chart.py benchmarks/results/load_h200.json --output docs/load_h200.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"awq": "#b0413e", "marlin": "#0b6e4f"}
NAMES = {"awq": "AWQ source", "marlin": "converted"}
ENGINES = {"vllm": "vLLM", "transformers": "Transformers"}

#: Title of each panel, the figures that are stacked in it with their names, and the divisor of their unit.
PANELS = (
    ("seconds to load", (("read_seconds", "reading"), ("process_seconds", "processing afterwards")), 1.0),
    ("GPU memory, GiB", (("gpu_after_mib", "stays"), ("gpu_reserved_peak_mib", "largest while loading")), 1024.0),
    ("host memory without mapped files, GiB", (("host_anonymous_peak_mib", "largest"),), 1024.0),
)

#: Heading and figure of each column of the table.
COLUMNS = (
    ("start to ready, s", "ready_seconds", 1.0),
    ("reading, s", "read_seconds", 1.0),
    ("processing, s", "process_seconds", 1.0),
    ("GPU peak, GiB", "gpu_peak_mib", 1024.0),
    ("GPU peak reserved, GiB", "gpu_reserved_peak_mib", 1024.0),
    ("GPU after, GiB", "gpu_after_mib", 1024.0),
    ("host peak, GiB", "host_anonymous_peak_mib", 1024.0),
    ("host after, GiB", "host_anonymous_after_mib", 1024.0),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a table of Markdown; what could not be run says why."""
    lines = ["| engine | checkpoint | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |"]
    lines.append("| " + " | ".join("---" for _ in range(len(COLUMNS) + 2)) + " |")
    for row in rows:
        for kind, name in NAMES.items():
            if "error" in row[kind]:
                cells = [f"not run: {row[kind]['error']}", *[""] * (len(COLUMNS) - 1)]
            else:
                cells = [
                    f"{row[kind][figure] / unit:.2f}" if figure in row[kind] else "—" for _, figure, unit in COLUMNS
                ]
            lines.append(f"| {ENGINES[row['engine']]} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_panel(axes: Axes, rows: list[dict[str, Any]], title: str, parts: Any, unit: float, stacked: bool) -> None:
    """One panel: a bar for each engine and checkpoint, its parts on top of each other or, of memory, behind."""
    labels, position = [], 0
    for row in rows:
        for kind in NAMES:
            if "error" in row[kind]:
                continue
            bottom = 0.0
            for number, (figure, _) in reversed(list(enumerate(parts))) if not stacked else enumerate(parts):
                value = row[kind].get(figure, 0.0) / unit
                alpha = 1.0 if number == 0 else 0.45
                axes.bar(position, value, 0.7, bottom=bottom, color=COLOURS[kind], alpha=alpha)
                bottom += value if stacked else 0.0
            top = bottom if stacked else max(row[kind].get(figure, 0.0) / unit for figure, _ in parts)
            axes.annotate(f"{top:.2f}", (position, top), (0, 2), textcoords="offset points", ha="center", fontsize=9)
            labels.append(f"{ENGINES[row['engine']]}\n{NAMES[kind]}")
            position += 1
    axes.set_xticks(range(position), labels, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    if len(parts) > 1:
        said = ", ".join(
            f"{'full' if number == 0 else 'light'} colour: {name}" for number, (_, name) in enumerate(parts)
        )
        axes.set_xlabel(said, fontsize=8)


def draw(document: dict[str, Any]) -> Figure:
    """Returns the chart."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for number, (axes, (title, parts, unit)) in enumerate(zip(figure.subplots(1, len(PANELS)), PANELS, strict=True)):
        draw_panel(axes, document["rows"], title, parts, unit, stacked=number == 0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG")
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    draw(document).savefig(options.output, dpi=150)
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
