"""What people see of a batch while it runs: a live table on a terminal, plain lines elsewhere.

Everything that came from a file is escaped, and nothing is read as markup.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from awq2marlin.cli.text import PlainLines, size_text
from awq2marlin.errors import EXIT_DONE, printable

if TYPE_CHECKING:
    from rich.table import Table

    from awq2marlin.batch.record import ItemResult
    from awq2marlin.batch.run import BatchProgress, BatchResult
    from awq2marlin.progress import Progress

#: How often the table is drawn, a second.
_REFRESH = 4


def batch_progress(stream: TextIO | None = None) -> BatchProgress:
    """Returns what shows a batch on ``stream``, by default standard error: a table if that is a terminal."""
    stream = stream or sys.stderr
    return LiveTable(stream) if stream.isatty() else BatchLines(stream)


def outcome_text(result: ItemResult) -> str:
    """Returns one line on what became of an item; of its problems only the first."""
    place = f"{printable(result.source)} -> {printable(result.output)}"
    if result.exit_code != EXIT_DONE:
        more = f" (and {len(result.errors) - 1} more)" if len(result.errors) > 1 else ""
        why = f": {result.errors[0]}{more}" if result.errors else ""
        return f"{result.status} {place}{why}"
    verified = f", {result.verified} verified" if result.verified else ""
    return (
        f"{result.status} {place}: {result.converted} converted, {result.kept} kept{verified}, "
        f"{size_text(result.bytes)} in {result.seconds:.1f} s"
    )


def print_batch(result: BatchResult) -> None:
    """Prints the summary of a batch on standard output."""
    earlier = [item for item in result.items if item.earlier]
    done, failed = len(result.done), result.failed
    verb = "could be done" if result.dry_run else "done"
    before = sum(item.exit_code == EXIT_DONE for item in earlier)
    by_earlier = f" ({before} of them by earlier runs)" if before else ""
    total = len(result.items)
    print(f"{total} item{'' if total == 1 else 's'}: {done} {verb}{by_earlier}, {len(failed)} failed")
    for item in failed:
        print(outcome_text(item))
    untried = sum(item.exit_code != EXIT_DONE for item in earlier)
    if untried:
        print(f"{untried} failed in an earlier run and were not tried again; --retry-failed tries them")
    elif failed and not result.dry_run:
        print("run the same command with --retry-failed to try what failed again")
    wrote = sum(item.bytes for item in result.items if not item.earlier)
    print(f"{'would write' if result.dry_run else 'wrote'} {size_text(wrote)} in {result.seconds:.1f} s")
    if result.record is not None and not result.dry_run:
        print(f"record     {printable(str(result.record))}")


def print_failures(result: BatchResult) -> None:
    """Prints on standard error what failed."""
    for item in result.failed:
        print(f"error: {outcome_text(item)}", file=sys.stderr, flush=True)


class _Counts:
    """How many items there are, and how many of each outcome."""

    def __init__(self) -> None:
        self.total = 0
        self.by_status: Counter[str] = Counter()

    def __str__(self) -> str:
        ended = sum(self.by_status.values())
        told = ", ".join(f"{count} {status}" for status, count in sorted(self.by_status.items()))
        return f"{ended} of {self.total}" + (f" ({told})" if told else "")


class BatchLines:
    """A line when an item begins, one when it has ended, and one every few seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        """Prints on ``stream``."""
        self._stream = stream
        self._lock = threading.Lock()
        self._counts = _Counts()

    def say(self, text: str) -> None:
        """Prints a line."""
        with self._lock:
            print(text, file=self._stream, flush=True)

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        """The batch begins."""
        self._counts.total = total
        self._counts.by_status.update(result.status for result in earlier)
        if earlier:
            self.say(f"[{self._counts}] of earlier runs")

    def item(self, source: str, output: str) -> Progress:
        """An item begins."""
        self.say(f"begin {printable(source)} -> {printable(output)}")
        return _ItemLines(self, printable(source))

    def done(self, result: ItemResult) -> None:
        """An item has ended."""
        self._counts.by_status[result.status] += 1
        self.say(f"[{self._counts}] {outcome_text(result)}")

    def finish(self) -> None:
        """The batch has ended."""


class _ItemLines:
    """Plain lines of one item."""

    def __init__(self, lines: BatchLines, name: str) -> None:
        self._lines, self._name = lines, name
        self._lock = threading.Lock()
        self._stage: PlainLines | None = None

    def start(self, what: str, total: int) -> None:
        self._stage = PlainLines(self._lines.say, f"{self._name}: {what}", total)

    def advance(self, count: int) -> None:
        with self._lock:
            if self._stage is not None:
                self._stage.update(count)

    def finish(self) -> None:
        self._stage = None

    def note(self, text: str) -> None:
        self._lines.say(f"{self._name}: {printable(text)}")


class LiveTable:
    """A table of the items under way; those that have ended stand above it, for good."""

    def __init__(self, stream: TextIO) -> None:
        """Draws on ``stream``, a terminal."""
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, markup=False, highlight=False, emoji=False)
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._rows: dict[str, _Row] = {}
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=_REFRESH)

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        """The batch begins."""
        self._counts.total = total
        self._counts.by_status.update(result.status for result in earlier)
        self._live.start()

    def item(self, source: str, output: str) -> Progress:
        """An item begins."""
        row = _Row(self._say, printable(source))
        with self._lock:
            self._rows[output] = row
        return row

    def done(self, result: ItemResult) -> None:
        """An item has ended."""
        with self._lock:
            self._rows.pop(result.output, None)
            self._counts.by_status[result.status] += 1
        self._say(outcome_text(result))

    def finish(self) -> None:
        """The batch has ended."""
        with self._lock:
            self._rows.clear()
        self._live.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        with self._lock:
            rows = list(self._rows.values())
        table = Table(box=None, pad_edge=False, expand=True, caption=str(self._counts), caption_justify="left")
        table.add_column("source", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("stage", no_wrap=True)
        table.add_column("", ratio=1)
        table.add_column("done", justify="right", no_wrap=True)
        for row in rows:
            done, total = row.done, row.total
            bar: Any = ProgressBar(total=max(total, 1), completed=done)
            table.add_row(row.name, row.what, bar, f"{size_text(done)} of {size_text(total)}" if total else "")
        return table


class _Row:
    """One item of the table."""

    def __init__(self, say: Any, name: str) -> None:
        self._say, self.name = say, name
        self._lock = threading.Lock()
        self.what, self.done, self.total = "plan", 0, 0

    def start(self, what: str, total: int) -> None:
        with self._lock:
            self.what, self.done, self.total = what, 0, total

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        self._say(f"{self.name}: {printable(text)}")
