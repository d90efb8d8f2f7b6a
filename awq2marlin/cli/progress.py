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

from awq2marlin.cli.text import outcome_text
from awq2marlin.errors import printable, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from awq2marlin.batch.record import ItemResult
    from awq2marlin.batch.run import BatchProgress
    from awq2marlin.progress import Progress

#: Seconds between two plain progress lines, where there is no terminal.
PLAIN_INTERVAL = 5.0

#: Seconds of a batch, and items or parts of one, from which on the time left can be guessed.
_LEAST_ELAPSED = 1.0
_LEAST_DONE = 0.01

#: Columns of a terminal from which on there is room for bars.
_ROOM_FOR_BARS = 80

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
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)
            if self._plain is not None:
                self._plain.update(count)

    def finish(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._plain = None

    def note(self, text: str) -> None:
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


def _time_text(seconds: float) -> str:
    """Returns a time that is only roughly known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class _Share:
    """How much of an item is done. Nobody knows how many stages it will have, nor how long each takes.

    The first is by far the longest as a rule: it counts as nine tenths of the item, each later one as nine tenths of
    what is left. So the share never goes back.
    """

    def __init__(self) -> None:
        self.what, self.done, self.total = "plan", 0, 0
        self._before, self._stage = 0.0, 0.0

    def start(self, what: str, total: int) -> None:
        self._before += self._stage
        self._stage = 0.9 * (1 - self._before)
        self.what, self.done, self.total = what, 0, total

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self._before + self._stage * min(1.0, self.done / max(self.total, 1))


class _Overall:
    """How far a batch is: how many items of each outcome, what is under way, and how long the rest will take."""

    def __init__(self) -> None:
        self.total = 0
        self.by_status: Counter[str] = Counter()
        self._earlier = 0
        self._shares: dict[str, _Share] = {}
        self._started = time.monotonic()

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        self.total, self._earlier = total, len(earlier)
        self.by_status.update(result.status for result in earlier)

    def item(self, output: str) -> _Share:
        share = self._shares[output] = _Share()
        return share

    def done(self, result: ItemResult) -> None:
        self._shares.pop(result.output, None)
        self.by_status[result.status] += 1

    @property
    def share(self) -> float:
        """How much of all items is done, from 0 to 1."""
        return min(1.0, (self._ended + self._under_way) / max(self.total, 1))

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take, at the pace of this run; None as long as nobody can tell."""
        done = self._ended - self._earlier + self._under_way
        elapsed = time.monotonic() - self._started
        if elapsed < _LEAST_ELAPSED or done < _LEAST_DONE:
            return None
        return elapsed / done * max(0.0, self.total - self._earlier - done)

    @property
    def _ended(self) -> int:
        return sum(self.by_status.values())

    @property
    def _under_way(self) -> float:
        return sum(share.value for share in self._shares.values())

    def __str__(self) -> str:
        told = ", ".join(f"{count} {status}" for status, count in sorted(self.by_status.items()))
        counts = f"{self._ended} of {self.total}" + (f" ({told})" if told else "")
        left = self.seconds_left if self._ended < self.total else None
        return counts if left is None else f"{counts}, about {_time_text(left)} left"


class BatchLines:
    """A line when an item begins, one when it has ended, and one every few seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._overall = _Overall()

    def say(self, text: str) -> None:
        with self._lock:
            print(text, file=self._stream, flush=True)

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        self._overall.start(total, earlier)
        if earlier:
            self.say(f"[{self._overall}] finished by earlier runs")

    def item(self, source: str, output: str) -> Progress:
        self.say(f"begin {printable(source)} -> {printable(output)}")
        with self._lock:
            share = self._overall.item(output)
        return _ItemLines(self, printable(source), share)

    def done(self, result: ItemResult) -> None:
        with self._lock:
            self._overall.done(result)
        self.say(f"[{self._overall}] {outcome_text(result)}")

    def finish(self) -> None:
        pass


class _ItemLines:
    """Plain lines of one item."""

    def __init__(self, lines: BatchLines, name: str, share: _Share) -> None:
        self._lines, self._name, self._share = lines, name, share
        self._lock = threading.Lock()
        self._stage: PlainLines | None = None

    def start(self, what: str, total: int) -> None:
        with self._lock:
            self._share.start(what, total)
            self._stage = PlainLines(self._lines.say, f"{self._name}: {what}", total)

    def advance(self, count: int) -> None:
        with self._lock:
            self._share.done += count
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
        self._overall = _Overall()
        self._rows: dict[str, _Row] = {}
        self._live = Live(
            get_renderable=self._table, console=self._console, refresh_per_second=_REFRESH, transient=True
        )

    def start(self, total: int, earlier: Sequence[ItemResult]) -> None:
        self._overall.start(total, earlier)
        self._live.start()

    def item(self, source: str, output: str) -> Progress:
        with self._lock:
            row = self._rows[output] = _Row(self._say, printable(source), self._overall.item(output))
        return row

    def done(self, result: ItemResult) -> None:
        with self._lock:
            self._rows.pop(result.output, None)
            self._overall.done(result)
        self._say(outcome_text(result))

    def finish(self) -> None:
        """The batch has ended: the table goes, and the counts stay."""
        with self._lock:
            self._rows.clear()
        self._live.stop()
        self._say(str(self._overall))

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _table(self) -> Table:
        """Returns a row for each item under way, with one for all of them below."""
        from rich.table import Table

        with self._lock:
            rows = list(self._rows.values())
            caption, share = str(self._overall), self._overall.share
        bars = self._console.width >= _ROOM_FOR_BARS
        table = Table(box=None, pad_edge=False, expand=bars, caption=caption, caption_justify="left")
        table.add_column("source", ratio=2 if bars else None, no_wrap=True, overflow="ellipsis")
        table.add_column("stage", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
        if bars:
            table.add_column("", ratio=1)
        for row in rows:
            what, done, total = row.share.what, row.share.done, row.share.total
            amount = f"{size_text(done)} of {size_text(total)}" if total else ""
            table.add_row(
                _end_of(row.name, self._console.width // 3), what, amount, *([_bar(done, total)] if bars else [])
            )
        table.add_row("all items", "", f"{int(share * 100)} %", *([_bar(share, 1)] if bars else []))
        return table


def _bar(done: float, total: float) -> Any:
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=max(total, 1), completed=done)


def _end_of(name: str, length: int) -> str:
    """Returns a path, or only its last component if it is long."""
    return name if len(name) <= length else f"…/{name.rstrip('/').rpartition('/')[2]}"


class _Row:
    """One item of the table."""

    def __init__(self, say: Callable[[str], None], name: str, share: _Share) -> None:
        self._say, self.name, self.share = say, name, share
        self._lock = threading.Lock()

    def start(self, what: str, total: int) -> None:
        with self._lock:
            self.share.start(what, total)

    def advance(self, count: int) -> None:
        with self._lock:
            self.share.done += count

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        self._say(f"{self.name}: {printable(text)}")
