"""How users name a repository of the Hub, and how it is told from a folder. Asks nobody."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from awq2marlin.errors import refuse

#: How a repository is named where a folder might be meant too.
HUB_PREFIX = "hf://"

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub, as a user names it.

    Attributes:
        repo_id: ``org/name``.
        revision: branch, tag, commit or ``refs/pr/N``; None for the default branch.
    """

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        """Returns ``org/name`` or ``org/name@revision``."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def parse_source(source: str | os.PathLike[str]) -> Path | HubName:
    """Returns what a user means by a source: a folder here, or a repository on the Hub.

    Args:
        source: a path; ``hf://org/name[@revision]``; or ``org/name[@revision]``, where there is no file or folder of
            that name. A path object is always a path.

    Raises:
        CheckpointError: if it begins with ``hf://`` and does not go on like that.
    """
    if not isinstance(source, str):
        return Path(source)
    if source.startswith(HUB_PREFIX):
        name = _hub_name(source.removeprefix(HUB_PREFIX))
        if name is None:
            raise refuse(
                "hub-bad-name", f"a repository of the Hub is named {HUB_PREFIX}org/name[@revision]", file=source
            )
        return name
    name = None if os.path.lexists(source) else _hub_name(source)
    return name or Path(source)


def is_ambiguous(source: str | os.PathLike[str]) -> bool:
    """Returns whether a folder here and a repository of the Hub could both be meant; the folder is taken."""
    return isinstance(source, str) and os.path.lexists(source) and _hub_name(source) is not None


def _hub_name(text: str) -> HubName | None:
    repo_id, at, revision = text.partition("@")
    sound = not at or (revision and revision.isprintable() and not re.search(r"\s|\.\.|//|^[/.-]", revision))
    return HubName(repo_id, revision or None) if sound and _REPO_ID.fullmatch(repo_id) else None
