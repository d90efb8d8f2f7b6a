"""What people see on standard error while the work is done: bars and a live table on a terminal, plain lines elsewhere.

Everything that came from a file is escaped, and nothing is read as markup.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from awq2marlin.cli.text import outcome_text, size_text
from awq2marlin.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from awq2marlin.batch.record import ItemResult
    from awq2marlin.batch.run import BatchProgress
    from awq2marlin.progress import Progress

#: Seconds between two plain progress lines, where there is no terminal.
PLAIN_INTERVAL = 5.0

#: How often the table is drawn, a second.
_REFRESH = 4


class ConsoleProgress:
    """Shows progress on standard error: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Draws on ``stream``, by default standard error."""
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._bar: Any = None
        self._plain: PlainLines | None = None

    def start(self, what: str, total: int) -> None:
        """A stage begins."""
        with self._lock:
            if self._stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total,
                    desc=what,
                    unit="B",
                    unit_scale=True,
                    file=self._stream,
                    leave=False,
                    dynamic_ncols=True,
                )
            else:
                self._plain = PlainLines(self._say, what, total)

    def advance(self, count: int) -> None:
        """So many bytes are done."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)
            if self._plain is not None:
                self._plain.update(count)

    def finish(self) -> None:
        """The stage is done."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._plain = None

    def note(self, text: str) -> None:
        """Something worth a line."""
        with self._lock:
            self._say(printable(text))

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class PlainLines:
    """A line every few seconds: share, bytes, rate, time left."""

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        """Prints with ``say`` on a stage: its name, and its length in bytes."""
        self._say, self._what, self._total = say, what, total
        self._done = 0
        self._started = self._told = time.monotonic()

    def update(self, count: int) -> None:
        """So many bytes are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told < PLAIN_INTERVAL:
            return
        self._told = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate if rate else 0
        self._say(
            f"{self._what}: {self._done * 100 // max(self._total, 1)} %, {size_text(self._done)} of "
            f"{size_text(self._total)}, {size_text(rate)}/s, {left:.0f} s left"
        )


def batch_progress(stream: TextIO | None = None) -> BatchProgress:
    """Returns what shows a batch on ``stream``, by default standard error: a table if that is a terminal."""
    stream = stream or sys.stderr
    return LiveTable(stream) if stream.isatty() else BatchLines(stream)


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
        self._live = Live(
            get_renderable=self._table, console=self._console, refresh_per_second=_REFRESH, transient=True
        )

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
        """The batch has ended; the table goes, and the counts stay."""
        with self._lock:
            self._rows.clear()
        self._live.stop()
        self._say(str(self._counts))

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
