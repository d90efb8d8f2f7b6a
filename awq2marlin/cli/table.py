"""Tables of plain text that keep to a width without breaking a word or a name's part."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from rich.cells import cell_len

#: Blanks between two columns.
_GAP = 2

#: Where a cell may go on in the next line: behind a blank that no unit follows, a slash, or a dot that is no decimal
#: point.
_BREAK = re.compile(r"(?<= )(?![kMGT]?B\b)|(?<=/)|(?<=\.)(?!\d)|(?<=\D\.)")


def table_lines(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[str] = (), width: int | None = None
) -> Iterator[str]:
    """Yields a table's lines: the headers, a rule, and the rows.

    Args:
        headers: a text for each column.
        rows: a text for each column, escaped.
        numbers: the headers of the columns that are flush right.
        width: columns of the terminal; None for lines without an end. A table that cannot be as narrow is wider.
    """
    cells = [list(headers), *map(list, rows)]
    right = {headers.index(name) for name in numbers if name in headers}
    room = _room([*zip(*cells, strict=True)], right, width)
    wrapped = [[_wrapped(text, room[at]) for at, text in enumerate(row)] for row in cells]
    widths = [max(cell_len(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
    for number, row in enumerate(wrapped):
        for texts in zip_longest(*row, fillvalue=""):
            yield _line(texts, widths, right)
        if not number:
            yield _line(["-" * each for each in widths], widths, right)


def _line(texts: Sequence[str], widths: Sequence[int], right: set[int]) -> str:
    padded = []
    for at, text in enumerate(texts):
        blanks = " " * (widths[at] - cell_len(text))
        padded.append(blanks + text if at in right else text + blanks)
    return (" " * _GAP).join(padded).rstrip()


def _room(columns: Sequence[Sequence[str]], right: set[int], width: int | None) -> list[int]:
    """Returns how wide each column may be: as its longest cell, but texts give way, and after them numbers."""
    widths = [max(map(cell_len, column)) for column in columns]
    least = [max(cell_len(piece.rstrip()) for cell in column for piece in _BREAK.split(cell)) for column in columns]
    excess = sum(widths) + _GAP * (len(widths) - 1) - (width or sys.maxsize)
    while excess > 0 and (spare := [at for at, each in enumerate(widths) if each > least[at]]):
        widths[max(spare, key=lambda at: (at not in right, widths[at]))] -= 1
        excess -= 1
    return widths


def _wrapped(text: str, width: int) -> list[str]:
    """Returns a cell's lines."""
    lines = [""]
    for piece in _BREAK.split(text):
        if lines[-1] and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
