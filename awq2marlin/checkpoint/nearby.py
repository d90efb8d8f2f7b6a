"""What a folder holds that is no checkpoint itself: the checkpoints, or the weights, one folder further down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from awq2marlin.errors import printable, some_of
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.io.source import Source

#: A folder with more entries than this is not looked through.
_MAX_ENTRIES = 10_000


def checkpoints_below(folder: Source) -> str:
    """Returns which checkpoints lie one folder further down, as a part of a sentence; empty if none do.

    Args:
        folder: has no ``config.json``.
    """
    names = sorted(name for name, files in _folders(folder) if CONFIG_FILENAME in files or "snapshots" in files)
    if not names:
        return ""
    shown = some_of(_named(folder, name) for name in names)
    if len(names) == 1:
        return f"the checkpoint is one folder deeper; {_advice(folder)} {shown}"
    return f"the checkpoints are one folder deeper; {_advice(folder)} one of {shown}"


def weights_below(folder: Source) -> str:
    """Returns in which folders further down weights lie, as a part of a sentence; empty if in none.

    Args:
        folder: has a ``config.json``, but no weights.
    """
    found = sorted(_folders(folder))
    whole = [name for name, files in found if CONFIG_FILENAME in files and _has_weights(files)]
    if whole:
        return f"there is a checkpoint with weights one folder deeper; {_advice(folder)} {_named(folder, whole[0])}"
    names = [printable(name) for name, files in found if _has_weights(files)]
    if not names:
        return ""
    return f"there are some one folder deeper, in {some_of(names)}; move them beside config.json"


def _has_weights(files: set[str]) -> bool:
    return any(name.endswith(".safetensors") for name in files)


def _advice(folder: Source) -> str:
    return "pass" if folder.origin is None else "only whole repositories are read, so download it and pass"


def _named(folder: Source, name: str) -> str:
    """Returns how a user names a folder further down."""
    return printable(name if folder.origin else str(folder.root / name))


def _folders(folder: Source) -> Iterator[tuple[str, set[str]]]:
    """Yields the folders in a folder, hidden ones left out, with the names of what they hold."""
    if folder.origin is not None:
        inside: dict[str, set[str]] = defaultdict(set)
        for name in folder.names():
            above, _, rest = name.partition("/")
            inside[above].add(rest.partition("/")[0])
        yield from ((above, files - {""}) for above, files in inside.items() if not above.startswith("."))
        return
    for path in islice(folder.root.iterdir(), _MAX_ENTRIES):
        with suppress(OSError):
            if path.is_dir() and not path.name.startswith("."):
                yield path.name, {each.name for each in path.iterdir()}
