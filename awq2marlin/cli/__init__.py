"""The command line: reads arguments, calls a command, prints its result."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: without the program's name; by default the process's.
    """
    from awq2marlin.cli.app import main as run

    return run(arguments)
