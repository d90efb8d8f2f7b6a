"""Draws a result of ``benchmarks/serving.py`` as an SVG, with nothing but the standard library.

python benchmarks/serving_chart.py benchmarks/results/serving_h200.json --output docs/serving_h200.svg

The same result gives the same bytes, so a test can tell whether the picture in README.md is that of the stored result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

#: Engines of a result, with the words of the legend and their colours.
ENGINES = {
    "source": ("AWQ source, vLLM's default kernels", "#c9b8a8"),
    "source_marlin": ("AWQ source, vLLM's Marlin", "#8a7f76"),
    "converted": ("converted, this package's kernels", "#0b6e4f"),
}
WIDTH, HEIGHT = 890, 300
TOP, BOTTOM = 84, 250  # of the bars
BAR = 32


@dataclass(frozen=True)
class Panel:
    """Groups of bars side by side under one title; each group has a scale of its own.

    Attributes:
        title: what the bars show, in which unit, and which way is better.
        groups: by the label below it, a value for each of `ENGINES`.
        digits: decimals of a value.
    """

    title: str
    groups: dict[str, list[float]]
    digits: int = 0

    @property
    def width(self) -> int:
        return len(self.groups) * (len(ENGINES) * BAR + 22)

    def draw(self, left: float) -> Iterator[str]:
        """Yields the elements of the panel, whose left edge is at ``left``."""
        yield _text(left, TOP - 24, self.title, "start", weight="bold")
        for label, values in self.groups.items():
            scale = (BOTTOM - TOP) / max(values)
            for number, (value, (_, colour)) in enumerate(zip(values, ENGINES.values(), strict=True)):
                x, height = left + number * BAR, value * scale
                yield (
                    f'<rect x="{x:.1f}" y="{BOTTOM - height:.1f}" width="{BAR - 3}" height="{height:.1f}" '
                    f'fill="{colour}"/>'
                )
                yield _text(x + (BAR - 3) / 2, BOTTOM - height - 4, f"{value:.{self.digits}f}", size=9)
            yield _text(left + (len(ENGINES) * BAR - 3) / 2, BOTTOM + 16, label)
            left += len(ENGINES) * BAR + 22


def panels(row: dict[str, Any]) -> list[Panel]:
    """Returns what is drawn of one model that was served."""
    engines = [row["engines"][name] for name in ENGINES]
    decoding = {
        f"batch {batch}": [each["decode_tokens_per_s"][batch]["median"] for each in engines]
        for batch in engines[0]["decode_tokens_per_s"]
    }
    prefill = [each["prefill_ms"]["median"] for each in engines]
    memory = [each["load_allocated_peak_mib"] / 1024 for each in engines]
    return [
        Panel("Decoding: tokens per second (higher is better)", decoding),
        Panel("Prefill: ms (lower)", {"2048 tokens": prefill}),
        Panel("Loading: GiB (lower)", {"peak GPU memory": memory}, digits=2),
    ]


def draw(row: dict[str, Any]) -> str:
    """Returns the picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" fill="#222222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
    ]
    left = 24.0
    for title, colour in ENGINES.values():
        parts.append(f'<rect x="{left:.1f}" y="16" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(left + 18, 26, title, "start", size=12))
        left += 260
    left = 24.0
    for panel in panels(row):
        parts.extend(panel.draw(left))
        left += panel.width + 52
    parts.append(f'<path d="M24 {BOTTOM}H{WIDTH - 24}" stroke="#999999"/>')
    engine = row["engines"]["converted"]
    about = f"{engine['gpu']}, vLLM {engine['vllm']}, a model of Llama-3-8B's shapes, 4 bits"
    about += "; every group of bars has its own scale"
    parts.append(_text(24, HEIGHT - 12, about, "start", size=10))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 11, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.write_text(draw(json.loads(options.results.read_text())["rows"][0]), "utf-8")


if __name__ == "__main__":
    main()
