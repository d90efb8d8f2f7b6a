"""The command line: reads arguments, calls a command, prints its result."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence

#: Objects that may be made before Python looks for cycles among them. A command imports and plans, which makes many
#: objects and no cycles to speak of; by default Python looks after 700: 7 % of the CPU time of a tiny conversion.
_OBJECTS_BEFORE_COLLECTION = 250_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: without the program's name; by default the process's.
    """
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)  # or Python looks once more at its end, for a fifth of that time
    from awq2marlin.cli.app import main as run

    return run(arguments)
