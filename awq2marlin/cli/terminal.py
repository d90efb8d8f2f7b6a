"""What a stream can show: colours, and lines how wide."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

_CODES = {"red": 31, "green": 32, "yellow": 33}

#: The colours there are.
Colour = Literal["red", "green", "yellow"]


def has_colours(stream: TextIO) -> bool:
    """Returns whether a stream shows colours: a terminal does, unless the environment says otherwise.

    ``NO_COLOR`` switches them off (https://no-color.org), and so does ``TERM=dumb``; ``FORCE_COLOR`` switches them on.

    Args:
        stream: standard output or standard error.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def coloured(text: str, colour: Colour, stream: TextIO) -> str:
    """Returns text in a colour, if the stream shows any.

    Args:
        text: a word of ours.
        colour: its colour.
        stream: where it will be printed.
    """
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if has_colours(stream) else text


def width_of(stream: TextIO) -> int | None:
    """Returns how many columns a line has; None if it has no end, as in a file.

    Args:
        stream: standard output or standard error.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # no terminal, or, in a test, not even a file
        return None


def print_error(message: str, head: str = "error") -> None:
    """Prints on standard error what went wrong.

    Args:
        message: what went wrong, for people; escaped.
        head: what kind of an error it is.
    """
    print(f"{coloured(f'{head}:', 'red', sys.stderr)} {message}", file=sys.stderr, flush=True)
