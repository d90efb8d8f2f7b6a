"""A picture of a verification through the GEMM: error against depth, one colour for each kind of module."""

from __future__ import annotations

import re
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin.arguments import one_of
from awq2marlin.errors import Problem, UnavailableError, refuse
from awq2marlin.gemm.check import GemmCheck, GemmRun
from awq2marlin.installing import how_to_install
from awq2marlin.io.durable import replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Distinct also for readers who do not see all colours alike (Okabe and Ito, Color Universal Design, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")


def depth_of(module: str) -> int:
    """Returns the first number in a module's name, its layer; -1 if there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found[1]) if found else -1


def check_matplotlib(option: str) -> None:
    """Refuses an option that draws where nothing can, before the work that it would show.

    Args:
        option: as the user wrote it.

    Raises:
        UnavailableError: if Matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        message = f"{option} needs Matplotlib: {how_to_install('plot')}"
        raise UnavailableError(Problem("", "", "no-matplotlib", message)) from None


def check_picture(file: Path) -> None:
    """Refuses a picture that could not be drawn, before the work that it would show.

    Args:
        file: where the picture shall go.

    Raises:
        UnavailableError: if Matplotlib is not installed.
        CheckpointError: if the file's ending names no format that it draws.
        OSError: if there is no folder for the file.
    """
    check_matplotlib("--plot")
    from matplotlib.figure import Figure

    endings = {f".{ending}" for ending in Figure().canvas.get_supported_filetypes()}
    if file.suffix.lower() not in endings:
        message = f"a picture's name must end in .png, or in {one_of(sorted(endings - {'.png'}))}"
        raise refuse("unknown-picture", message, file=str(file))
    file.parent.stat()


def plot_errors(run: GemmRun, file: Path) -> None:
    """Draws the largest error of every module, each as a part of the bound that holds for its element.

    Args:
        run: what the GEMM said.
        file: where the picture goes, complete or not at all; its ending chooses the format, ``.png`` for example.

    Raises:
        UnavailableError: as `check_picture`.
        CheckpointError: as `check_picture`.
        OSError: if the file cannot be written.
    """
    check_picture(file)
    with replacement(file) as partial:
        _figure(run).savefig(partial, dpi=160)


def errors_as_svg(run: GemmRun) -> bytes:
    """Returns the same picture as an SVG file; equal runs give equal bytes.

    Args:
        run: what the GEMM said.

    Raises:
        UnavailableError: if Matplotlib is not installed.
    """
    check_matplotlib("--report with --device")
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "awq2marlin"}):  # otherwise its names are random
        _figure(run).savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def _figure(run: GemmRun) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[GemmCheck]] = defaultdict(list)
    for check in run.checks:
        kinds[check.name.rpartition(".")[2]].append(check)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (kind, checks) in enumerate(sorted(kinds.items())):
        checks.sort(key=lambda check: depth_of(check.name))
        depths, colour = [depth_of(check.name) for check in checks], _COLOURS[index % len(_COLOURS)]
        axes.plot(depths, [check.max_relative for check in checks], "o-", color=colour, label=kind, markersize=4)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.annotate("the bound", (0, 1), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points")
    axes.set_ylim(bottom=0)
    layers = [depth_of(check.name) for check in run.checks] or [0]
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    # With the usual two ticks at least, a single layer would have fractions beside it.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")
    axes.set_ylabel("largest |output - float64 reference| / bound")
    axes.set_title(f"Marlin GEMM against float64, {run.device_name}", loc="left")
    if kinds:
        figure.legend(frameon=False, loc="outside right center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure
