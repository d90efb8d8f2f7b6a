"""What a person sees where two checkpoints were compared to the end: what they are, and what differs, summed up."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from awq2marlin.cli.table import table_lines
from awq2marlin.cli.terminal import width_of
from awq2marlin.errors import MAX_PROBLEMS_SHOWN, Problem, printable

if TYPE_CHECKING:
    from awq2marlin.commands.verify import ComparedFormat, VerifyResult
    from awq2marlin.verification.differences import Count, Differences

_HEADERS = ("module", "values q", "zero points z", "scales s", "padding", "largest of q, z, s")


def sides_text(result: VerifyResult) -> Iterator[str]:
    """Yields a line on each of two checkpoints."""
    for label, where, format in zip("AB", (result.source, result.output), result.formats, strict=True):
        yield f"{label}  {printable(str(where))}: {format_text(format)}"


def not_compared_text(result: VerifyResult) -> str:
    """Returns what belongs to the formats of two checkpoints; tensors by their last name components, counted."""
    told = [f"{label} {_names_text(each.not_compared)}" for label, each in zip("AB", result.formats, strict=True)]
    return f"specific to the format, not compared: {'; '.join(told)}"


def differences_text(result: VerifyResult, differences: Differences) -> str:
    """Returns the summary of what differs between two checkpoints, and the first place of each.

    Args:
        result: what was compared.
        differences: what was found.
    """
    lines = ["the two checkpoints differ", *sides_text(result), ""]
    differing, compared = len(differences.modules), len(result.modules)
    others = len(differences.others)
    beside = f"; {others} other difference{'' if others == 1 else 's'}" if others else ""
    lines.append(f"{differing} of {compared} compared modules differ{beside}")
    if differing:
        lines += ["", *_module_lines(differences)]
    lines += _place_lines("other differences", differences.others)
    lines += _place_lines("first place in each module", [each.first for each in differences.modules])
    lines += ["", not_compared_text(result), *(f"note: {note}" for note in result.notes)]
    return "\n".join(lines)


def _module_lines(differences: Differences) -> Iterator[str]:
    """Yields a table of how much differs in each module, and in all that were compared."""
    rows: list[tuple[str, ...]] = []
    for each in differences.modules[:MAX_PROBLEMS_SHOWN]:
        counts = each.values, each.zero_points, each.scales
        rows.append((printable(each.name), *map(_count_text, counts), f"{each.padding:,}", _largest_text(*counts)))
    hidden = len(differences.modules) - MAX_PROBLEMS_SHOWN
    if hidden > 0:
        rows.append((f"... and {hidden} more", "", "", "", "", ""))
    counts = differences.values, differences.zero_points, differences.scales
    padding = sum(each.padding for each in differences.modules)
    rows.append(("all compared modules", *map(_count_text, counts), f"{padding:,}", _largest_text(*counts)))
    yield from table_lines(_HEADERS, rows, numbers=_HEADERS[1:5], width=width_of(sys.stderr))


def _count_text(count: Count) -> str:
    if not count.compared:
        return "-"
    return f"{count.differing:,} of {count.compared:,} ({_percent(count.differing / count.compared)})"


def _largest_text(values: Count, zero_points: Count, scales: Count) -> str:
    texts = f"{values.largest:g}", f"{zero_points.largest:g}", _percent(scales.largest)
    return ", ".join(
        text if count.compared else "-" for text, count in zip(texts, (values, zero_points, scales), strict=True)
    )


def _percent(part: float) -> str:
    """Returns a part in percent; neither nothing nor everything unless it is."""
    if part in (0, 1):
        return f"{part:.0%}"
    return f"{part:.1%}" if 0.001 <= part < 0.9995 else "<0.1%" if part < 0.5 else ">99.9%"


def _place_lines(title: str, problems: Sequence[Problem]) -> Iterator[str]:
    if problems:
        yield from ("", f"{title}:")
        yield from (f"  {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN])
        if len(problems) > MAX_PROBLEMS_SHOWN:
            yield f"  ... and {len(problems) - MAX_PROBLEMS_SHOWN} more"


def format_text(format: ComparedFormat) -> str:
    """Returns what a checkpoint is: format, bits, groups and zero points."""
    groups = "channels" if format.group_size == -1 else f"groups of {format.group_size}"
    return f"{format.title}, {format.bits} bits, {groups}, {'with' if format.zero_point else 'without'} zero points"


def _names_text(names: Sequence[str]) -> str:
    """Returns files by name, and tensors by what they are."""
    files = [name for name in names if name.rpartition(".")[2] in ("json", "md")]
    tensors = Counter(name.rpartition(".")[2] for name in names if name not in files)
    return ", ".join(map(printable, [*files, *(f"{count} x {suffix}" for suffix, count in tensors.items())]))
