"""Where this package and its documents are: in a clone, as long as there is no release. Nothing else says so."""

from __future__ import annotations

#: Where the command is run, and the documents are.
PLACE = "in a clone of awq2marlin"


def install_command(*extras: str) -> str:
    """Returns the command that installs this package; it is run in `PLACE`.

    Args:
        extras: names of optional dependencies, such as ``cuda``.
    """
    return f"pip install '.[{','.join(extras)}]'" if extras else "pip install ."


def how_to_install(*extras: str) -> str:
    """Returns the command and where it is run, for the end of a sentence; arguments as for `install_command`."""
    return f"{install_command(*extras)} ({PLACE})"


def where_to_read(*pages: str) -> str:
    """Returns documents by name and where they are, for the end of a sentence.

    Args:
        pages: their paths in the repository.
    """
    return f"{', '.join(pages)} ({PLACE})"
