"""The journal of an unfinished output folder: what a later run has to know of this one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from awq2marlin.errors import CheckpointError, OutputError, Problem, refuse
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.io.digest import FileDigest, is_digest
from awq2marlin.io.durable import sync_file, sync_folder
from awq2marlin.io.folder import check_name
from awq2marlin.io.source import Source
from awq2marlin.io.strict_json import parse_json

#: The folder inside of an unfinished output where all that is not finished lies.
WORK_DIRECTORY = ".awq2marlin"
JOURNAL_FILENAME = "journal.json"
NEW_SUFFIX = ".new"
_JOURNAL_VERSION = 1


@dataclass(frozen=True)
class FinishedFile:
    """A shard that is complete, as the journal remembers it.

    Attributes:
        source: what the source that it was made from is known by.
        target: what the output is known by.
        verified: which modules were compared with the source before this was written; empty if that comes later.
        sent: SHA-256 of the output, once the Hub has it and it is here no more; empty before.
    """

    source: FileDigest
    target: FileDigest
    verified: str = ""
    sent: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the journal's entry."""
        return {
            "source_size": self.source.size,
            "source_digest": self.source.xxh3,
            "target_size": self.target.size,
            "target_digest": self.target.xxh3,
            "verified": self.verified,
            "sent": self.sent,
        }

    @classmethod
    def parse(cls, entry: Any) -> FinishedFile:
        """Reads an entry; raises any of the errors that `read_journal` translates if it is malformed."""
        keys = ("source_size", "source_digest", "target_size", "target_digest")
        source_size, source_digest, target_size, target_digest = (entry[key] for key in keys)
        verified, sent = entry.get("verified", ""), entry.get("sent", "")
        sound = is_digest(source_digest) and is_digest(target_digest)
        if not sound or {type(source_size), type(target_size)} != {int} or {type(verified), type(sent)} != {str}:
            raise refuse("bad-journal", "an entry is malformed")
        if entry.keys() - {*keys, "verified", "sent"}:
            raise refuse("bad-journal", "an entry has a key that is not known")
        return cls(FileDigest(source_size, source_digest), FileDigest(target_size, target_digest), verified, sent)


class Pinned(NamedTuple):
    """A source on the Hub, as it was when a run began.

    Attributes:
        name: as the user named it.
        commit: the commit that the name stood for.
    """

    name: str
    commit: str


class PullRequest(NamedTuple):
    """A pull request that a run opened.

    Attributes:
        revision: where commits to it go, ``refs/pr/N``.
        url: its address.
    """

    revision: str
    url: str


@dataclass
class Journal:
    """What an unfinished output folder remembers of itself.

    Attributes:
        plan: digest of the plan it follows.
        names: every file that the run writes, and those of an earlier conversion that it replaces: all that it may
            remove. A file that was there before and is not ours is never among them.
        finished: the shards that are complete.
        pinned: the source, if it is one of the Hub.
        pull_request: the pull request that the run opened, if it did.
    """

    plan: str
    names: list[str]
    finished: dict[str, FinishedFile] = field(default_factory=dict)
    pinned: Pinned | None = None
    pull_request: PullRequest | None = None


def read_journal(root: Path) -> Journal | None:
    """Returns the journal of an unfinished output folder, or None if it has none.

    Raises:
        OutputError: if it is damaged.
    """
    path = root / WORK_DIRECTORY / JOURNAL_FILENAME
    if not path.is_file():
        return None
    try:
        return _parse_journal(parse_json(path.read_bytes(), JOURNAL_FILENAME))
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        message = "the journal of the unfinished run is damaged; remove this output folder and run the command again"
        raise OutputError(Problem(str(path), "", "bad-journal", message)) from None


def refuse_unfinished(folder: Source) -> None:
    """Refuses a folder that a run has begun to write and not finished, as a checkpoint.

    Args:
        folder: what is going to be read.

    Raises:
        OutputError: if it has a journal, and no ``config.json`` yet.
    """
    if folder.origin is not None or folder.exists(CONFIG_FILENAME):
        return
    journal = read_journal(folder.root)
    if journal is not None:
        shards = sum(name.endswith(".safetensors") for name in journal.names)
        verb = "convert" if MANIFEST_FILENAME in journal.names else "revert"
        message = f"unfinished: {len(journal.finished)} of {shards} shards; run the same {verb} again"
        raise OutputError(Problem(str(folder.root), "", "unfinished", message))


def _parse_journal(document: Any) -> Journal:
    if type(document["names"]) is not list:
        raise refuse("bad-journal", "names must be a list")
    names = [check_name(name, JOURNAL_FILENAME, plain=False) for name in document["names"]]
    finished = {name: FinishedFile.parse(entry) for name, entry in document["finished"].items()}
    if not finished.keys() <= {*names}:
        raise refuse("bad-journal", "it remembers a shard that it does not name")
    if document["version"] != _JOURNAL_VERSION or not isinstance(document["plan"], str):
        raise refuse("bad-journal", "the version is another")
    pinned, pull_request = (_two_texts(document.get(key)) for key in ("pinned", "pull_request"))
    return Journal(
        document["plan"],
        names,
        finished,
        pinned and Pinned(*pinned),
        pull_request and PullRequest(*pull_request),
    )


def _two_texts(value: Any) -> tuple[str, str] | None:
    if value is None:
        return None
    first, second = value
    if {type(first), type(second)} != {str}:
        raise refuse("bad-journal", "a pair is malformed")
    return first, second


def write_journal(work: Path, journal: Journal) -> None:
    """Writes a journal, durably, in the place of the one that is there.

    Args:
        work: ``.awq2marlin`` of an unfinished output folder.
        journal: what to remember.
    """
    finished = {name: entry.document() for name, entry in sorted(journal.finished.items())}
    document = {
        "version": _JOURNAL_VERSION,
        "plan": journal.plan,
        "names": journal.names,
        "finished": finished,
        "pinned": journal.pinned,
        "pull_request": journal.pull_request,
    }
    new = work / (JOURNAL_FILENAME + NEW_SUFFIX)
    new.unlink(missing_ok=True)
    with new.open("x", encoding="utf-8") as stream:  # never through a link
        json.dump(document, stream, indent=1)
        stream.flush()
        sync_file(stream.fileno())
    new.replace(work / JOURNAL_FILENAME)
    sync_folder(work)
