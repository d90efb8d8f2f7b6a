"""How users name a repository of the Hub, and how it is told from a folder. Asks nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from awq2marlin.errors import CheckpointError, printable, refuse
from awq2marlin.io.folder import Folder

#: How a repository is named where a folder might be meant too.
HUB_PREFIX = "hf://"

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_LINK = re.compile(r"https?://", re.IGNORECASE)

#: The Hub's own names; what ``HF_ENDPOINT`` names counts too.
_SITES = ("huggingface.co", "www.huggingface.co", "hf.co")

#: What addresses of the Hub begin with that are not those of a model, and what they are of.
_OTHERS = {
    "datasets": "a data set",
    "spaces": "a space",
    "collections": "a collection",
    "papers": "a paper",
    "docs": "a document",
    "blog": "a blog post",
    "api": "the Hub's interface for programs",
}
#: What follows the repository's name in the address of a page, with a revision behind it.
_PAGES = ("tree", "blob", "resolve", "raw", "blame", "commits", "commit")
_HOW = f"write org/name or {HUB_PREFIX}org/name, or its address, https://huggingface.co/org/name"


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub, as a user names it.

    Attributes:
        repo_id: ``org/name``.
        revision: branch, tag, commit or ``refs/pr/N``; None for the default branch.
        is_bare: whether it was named ``org/name`` alone, so that a folder may have been meant.
    """

    repo_id: str
    revision: str | None = None
    is_bare: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        """Returns ``org/name`` or ``org/name@revision``."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def parse_source(source: str | os.PathLike[str]) -> Path | HubName:
    """Returns what a user means by a source: a folder here, or a repository on the Hub.

    Args:
        source: a path; ``hf://org/name[@revision]``; the address of a repository, or of one of its pages, at
            huggingface.co, hf.co or ``HF_ENDPOINT``; or ``org/name[@revision]``, where there is neither such a path
            nor a folder ``org``. A path object is always a path.

    Raises:
        CheckpointError: if it is empty, or an address that is not one of a model.
    """
    if not isinstance(source, str):
        return Path(source)
    if not source:
        raise refuse("not-found", "the checkpoint's name is empty; pass a folder or a Hub repository")
    if source.startswith(HUB_PREFIX):
        return _prefixed(source)
    if _LINK.match(source):
        return name_in_link(source)
    if os.path.lexists(source):
        return Path(source)
    if source.partition("/")[0].lower() in _SITES:
        return name_in_link(f"https://{source}")
    name = _hub_name(source)
    if name is None or os.path.isdir(name.repo_id.partition("/")[0]):  # noqa: PTH112 - then it is a path with a typo
        return Path(source)
    return replace(name, is_bare=True)


def is_ambiguous(source: str | os.PathLike[str]) -> bool:
    """Returns whether a folder here and a repository of the Hub could both be meant; the folder is taken."""
    return isinstance(source, str) and Path(source).is_dir() and _hub_name(source) is not None


def links_text(folder: Folder) -> Iterator[str]:
    """Yields a line on each link that is followed on the user's word, with its end."""
    for name, end in folder.followed_links():
        yield f"following {printable(name)} to {printable(str(end))}"


def folder_at(source: str | os.PathLike[str], *, follow_links: bool = False) -> Folder:
    """Opens a folder; where there is none, says how a repository of that name would be named.

    Args:
        source: as the user named it; `parse_source` took it for a path.
        follow_links: whether links that lead out of it are followed.

    Raises:
        CheckpointError: if there is no such folder.
    """
    try:
        return Folder.at(source, follow_links=follow_links)
    except CheckpointError as error:
        (problem,) = error.problems
        if problem.code != "not-found" or not isinstance(source, str):
            raise
        hint = ""
        if _hub_name(source):
            parent = printable(source.partition("/")[0])
            hint = (
                f"; it is read as a path because {parent} is a folder here; for the Hub repository, pass "
                f"{HUB_PREFIX}{printable(source)}"
            )
        elif "/" not in source:
            hint = "; a repository of the Hub is written org/name"
        raise CheckpointError(replace(problem, message=problem.message + hint)) from None


def _prefixed(source: str) -> HubName:
    """Returns what stands behind the prefix, which always means the Hub."""
    told = source.removeprefix(HUB_PREFIX).removesuffix("/")
    if told.partition("/")[0] in _OTHERS:
        raise _no_model(source, told.partition("/")[0])
    name = _hub_name(told)
    if name is None:
        raise refuse("hub-bad-name", f"write a Hub repository as {HUB_PREFIX}org/name[@revision]", file=source)
    return name


def name_in_link(link: str) -> HubName:
    """Returns the repository whose address, or the address of one of whose pages, a link is.

    Args:
        link: begins with ``http://`` or ``https://``; what it holds of names and passwords is not repeated.

    Raises:
        CheckpointError: if it is of another site, or not of a model.
    """
    try:
        parts = urlsplit(link)
        host, path = _host(parts), parts.path
    except ValueError:
        raise refuse("hub-bad-name", f"this is not a valid address; {_HOW}", file=link.rpartition("@")[2]) from None
    shown = f"{parts.scheme}://{host}{path}"
    if host not in _SITES:
        from huggingface_hub import constants

        endpoint = urlsplit(constants.ENDPOINT)
        above = endpoint.path.rstrip("/") + "/"
        if host != _host(endpoint) or not path.startswith(above):
            message = "this address is not on the Hub; download the checkpoint and pass its folder"
            raise refuse("hub-bad-name", message, file=shown)
        path = path.removeprefix(above)
    words = [unquote(word) for word in path.split("/") if word]
    if words and words[0] in _OTHERS:
        raise _no_model(shown, words[0])
    words[1:2] = [word.removesuffix(".git") for word in words[1:2]]  # as one clones it
    revision, inside = _revision_of(words[2:])
    name = _hub_name("/".join(words[:2]) + (f"@{revision}" if revision else "")) if len(words) > 1 else None
    if name is None:
        raise refuse("hub-bad-name", f"this is not the address of a model; {_HOW}", file=shown)
    if inside:
        message = (
            f"this is the address of the folder {printable(inside)} in {name}; only whole repositories are "
            "read, so download that folder and pass it"
        )
        raise refuse("hub-bad-name", message, file=shown)
    return name


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "").lower() + (f":{parts.port}" if parts.port else "")


def _revision_of(words: list[str]) -> tuple[str, str]:
    """Returns the revision in what follows a repository's name in an address, and the folder that it shows."""
    if len(words) < 2 or words[0] not in _PAGES:
        return "", ""
    length = 3 if words[1] == "refs" else 1  # refs/pr/N
    revision, rest = "/".join(words[1 : 1 + length]), words[1 + length :]
    return revision, "/".join(rest) if words[0] == "tree" else ""


def _no_model(source: str, kind: str) -> CheckpointError:
    return refuse("hub-bad-name", f"this is the address of {_OTHERS[kind]}, not of a model; {_HOW}", file=source)


def _hub_name(text: str) -> HubName | None:
    repo_id, at, revision = text.partition("@")
    sound = not at or (revision and revision.isprintable() and not re.search(r"\s|\.\.|//|^[/.-]", revision))
    return HubName(repo_id, revision or None) if sound and _REPO_ID.fullmatch(repo_id) else None
