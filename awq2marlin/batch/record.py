"""What became of a batch's items: one JSON object a line, appended, and read again by the next run.

A line is written whole and synced before the next item's. A process killed in mid-line leaves a torn last
line, which the next run removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from awq2marlin._version import __version__
from awq2marlin.error_codes import ERROR_CODES
from awq2marlin.errors import BatchError, CheckpointError, OutputError, Problem, naming, problem_from_os_error
from awq2marlin.io.digest import is_digest
from awq2marlin.io.durable import sync_file
from awq2marlin.io.lock import HeldError, Lock
from awq2marlin.io.strict_json import parse_json
from awq2marlin.pipeline.preflight import DiskNeed

RECORD_VERSION = 1
_LOCK_SUFFIX = ".lock"


@dataclass(frozen=True)
class ItemResult:
    """What became of one item of a batch: a line of its record.

    Attributes:
        source: what was converted: an absolute path, or a repository.
        output: the folder written, an absolute path.
        status: ``done``, ``failed`` or ``difference``; ``planned`` in a dry run, which records nothing.
        exit_code: what ``awq2marlin convert`` would have ended with.
        errors: what went wrong.
        options: those of the item that decide what is done.
        bytes: of the output's shards.
        seconds: wall time.
        converted: modules that became Marlin.
        kept: quantized modules that stayed in AWQ layout.
        verified: modules compared value for value.
        resumed: shards that an earlier, interrupted run had finished.
        manifest: digest of the output's manifest; None unless done.
        pushed: address of what was sent to the Hub; None if nothing was.
        tool_version: the version that did it.
        finished_at: when, UTC, ISO 8601.
        earlier: whether an earlier run did it, and this one nothing; not recorded.
        written: bytes of the output's shards that this run wrote; not recorded.
        needs: in a dry run, what it needs on disks; not recorded.
    """

    source: str
    output: str
    status: str
    exit_code: int
    errors: tuple[Problem, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    converted: int = 0
    kept: int = 0
    verified: int = 0
    resumed: int = 0
    manifest: str | None = None
    pushed: str | None = None
    tool_version: str = __version__
    finished_at: str = ""
    earlier: bool = False
    written: int = 0
    needs: tuple[DiskNeed, ...] = ()

    def document(self) -> dict[str, Any]:
        """Returns the result as an object for JSON."""
        needs = [{"folder": str(each.folder), "bytes": each.bytes, "stays": each.stays} for each in self.needs]
        return {**asdict(self), "seconds": round(self.seconds, 3), "needs": needs}


class BatchRecord:
    """A record, open for one run. Made by `open_record`."""

    def __init__(self, path: Path | None, lines: Mapping[str, ItemResult]) -> None:
        """Takes a record that `open_record` has locked and read; None writes nothing."""
        self._path = path
        self._lines = lines

    def last(self, output: str) -> ItemResult | None:
        """Returns the last line of an output folder, or None."""
        return self._lines.get(output)

    def append(self, result: ItemResult) -> None:
        """Adds a line, whole and durable."""
        if self._path is None:
            return
        document = {"version": RECORD_VERSION, **result.document()}
        for name in ("earlier", "written", "needs"):
            del document[name]
        data = (json.dumps(document, ensure_ascii=True) + "\n").encode("ascii")
        with naming(self._path), self._path.open("ab") as stream:
            begin = stream.seek(0, os.SEEK_END)
            try:
                stream.write(data)
                stream.flush()
                sync_file(stream.fileno())
            except OSError:  # a full disk: the next line must not stand behind half of this one
                os.truncate(self._path, begin)
                raise


@contextmanager
def open_record(path: Path) -> Iterator[BatchRecord]:
    """Opens a record for one run, and keeps other runs out until the context ends.

    Args:
        path: created with the first line.

    Raises:
        OutputError: if another run has it open.
        BatchError: if the file is no record.
        OSError: if it cannot be read or written.
    """
    lock = Lock(path.with_name(path.name + _LOCK_SUFFIX))
    try:
        lock.acquire()
    except HeldError as error:
        message = "another process is running this batch; wait for it, or pass another --record FILE"
        message += f" ({error})" if str(error) else ""
        raise OutputError(Problem(str(path), "", "in-use", message)) from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield BatchRecord(path, read_record(path, mend=True))
    finally:
        lock.release(remove=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    problem = problem_from_os_error(error)
    message = f"the batch record cannot be written there: {problem.message}; pass another file with --record FILE"
    return OutputError(Problem(str(path), "", problem.code, message))


def read_record(path: Path, *, mend: bool = False) -> dict[str, ItemResult]:
    """Returns the last line of every output folder.

    Args:
        path: may be missing.
        mend: whether to cut off a last line that was never finished.

    Raises:
        BatchError: if a finished line is none of a record's.
        OSError: if it cannot be read, or mended.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    whole = data.rfind(b"\n") + 1
    lines = [_parse(text, number, path) for number, text in enumerate(data[:whole].split(b"\n"), 1) if text]
    if mend and whole < len(data):
        os.truncate(path, whole)
    return {line.output: line for line in lines}


def _parse(text: bytes, number: int, path: Path) -> ItemResult:
    try:
        return _result(parse_json(text, path.name))
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError):
        message = f"line {number} is not a batch record; pass another file with --record, or remove this one"
        raise BatchError(Problem(str(path), "", "bad-record", message)) from None


def _result(document: dict[str, Any]) -> ItemResult:
    """Returns the result in a line; what it raises says that the line is none, or not sound."""
    if document.pop("version") != RECORD_VERSION:
        raise ValueError
    if any(error["code"] not in ERROR_CODES for error in document["errors"]):
        raise ValueError  # a newer version's: its line is not ours to understand
    result = ItemResult(**{**document, "errors": tuple(Problem(**error) for error in document["errors"])})
    texts = [result.source, result.output, result.status, result.tool_version, result.finished_at]
    texts += [text for error in result.errors for text in (error.file, error.tensor, error.code, error.message)]
    counts = (
        result.exit_code,
        result.bytes,
        result.converted,
        result.kept,
        result.verified,
        result.resumed,
    )
    sound = (
        all(type(each) is str for each in texts)
        and all(type(each) is int for each in counts)
        and type(result.seconds) in (int, float)
        and type(result.options) is dict
        and (result.pushed is None or type(result.pushed) is str)
        and (result.manifest is None or is_digest(result.manifest))
    )
    if not sound:
        raise ValueError
    return result
