"""What people see of a batch: a live table on a terminal, plain lines elsewhere."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from awq2marlin import ItemResult, Problem
from awq2marlin.batch.run import BatchResult
from awq2marlin.cli import progress as shown_progress
from awq2marlin.cli.progress import BatchLines, LiveTable, batch_progress
from awq2marlin.cli.text import outcome_text, print_failures, show
from awq2marlin.pipeline.preflight import Disk

DONE = ItemResult(
    "/m/a", "/o/a", "done", 0, bytes=2_000_000, seconds=1.5, converted=7, kept=2, verified=7, written=2_000_000
)
PROBLEMS = (Problem("config.json", "", "bad-config", "bits are \x1b[31mred"), Problem("", "", "bad-header", "second"))
FAILED = ItemResult("/m/\x1b[2Jb", "/o/b", "failed", 1, errors=PROBLEMS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def play(progress):
    """Two items side by side: one is done, the other fails."""
    progress.start(3, [replace(DONE, earlier=True)])
    first, second = progress.item("m/a", "/o/a"), progress.item("m/\x1b[2Jb", "/o/b")
    first.start("convert", 1000)
    first.advance(400)
    second.note("hello \x1b[2J")
    if isinstance(progress, LiveTable):
        progress._live.refresh()
    first.advance(600)
    first.finish()
    progress.done(DONE)
    progress.done(FAILED)
    progress.finish()


def test_plain_lines_tell_beginning_and_end_of_every_item():
    stream = io.StringIO()
    progress = batch_progress(stream)
    assert isinstance(progress, BatchLines)
    play(progress)
    assert stream.getvalue().splitlines() == [
        "[1 of 3 (1 done)] finished by earlier runs",
        "begin m/a -> /o/a",
        "begin m/\\x1b[2Jb -> /o/b",
        "m/\\x1b[2Jb: hello \\x1b[2J",
        "[2 of 3 (2 done)] done /m/a -> /o/a: 7 converted, 2 kept, 7 verified, 2.0 MB in 1.5 s",
        "[3 of 3 (2 done, 1 failed)] failed /m/\\x1b[2Jb -> /o/b: config.json: bits are \\x1b[31mred (and 1 more)",
    ]


def test_plain_lines_tell_how_far_a_long_item_is(monkeypatch):
    monkeypatch.setattr(shown_progress, "PLAIN_INTERVAL", 0.0)
    stream = io.StringIO()
    progress = batch_progress(stream)
    progress.start(1, [])
    item = progress.item("m/a", "/o/a")
    item.start("convert", 1000)
    item.advance(400)
    assert stream.getvalue().splitlines()[-1].startswith("m/a: convert: 40 %, 400 B of 1.0 kB, ")


def test_a_terminal_shows_a_table_of_what_is_under_way(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = batch_progress(stream)
    assert isinstance(progress, LiveTable)
    play(progress)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"m/a +convert .* 400 B of 1\.0 kB", shown)
    assert "m/\\x1b[2Jb: hello" in shown, "what came from a file is escaped"
    assert "\x1b[2J" not in stream.getvalue()
    assert "1 of 3 (1 done)" in shown
    assert shown.count(outcome_text(FAILED)) == 1
    assert stream.getvalue().rstrip().splitlines()[-1].endswith("3 of 3 (2 done, 1 failed)")
    assert shown.rstrip().endswith("3 of 3 (2 done, 1 failed)")
    assert outcome_text(DONE) in shown


def test_the_summary_tells_what_was_left_alone(capsys):
    result = BatchResult((replace(DONE, earlier=True), DONE, FAILED), Path("list"), False, Path("list.record.jsonl"), 2)
    show(result)
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "3 items: 2 done (1 of them by earlier runs), 1 failed"
    assert "run the same command with --retry-failed to retry what failed" in told
    assert outcome_text(FAILED) not in told, "it was told when it ended"
    assert told.splitlines()[-2:] == ["wrote 2.0 MB in 2.0 s", "record     list.record.jsonl"]
    show(replace(result, items=(replace(FAILED, earlier=True),)))
    told = capsys.readouterr().out
    assert "not retried: 1 item that failed in an earlier run; use --retry-failed" in told
    assert outcome_text(FAILED) in told
    disks = (Disk(Path("/m"), 3_000_000, 2_000_000), Disk(Path("/o"), 3, 2_000_000))
    show(replace(result, items=(DONE,), dry_run=True, disks=disks))
    assert capsys.readouterr().out.splitlines() == [
        "1 item: 1 could be done, 0 failed",
        "would write 2.0 MB",
        "would need 3.0 MB on the disk of /m, which has 2.0 MB free: not enough",
        "would need 3 B on the disk of /o, which has 2.0 MB free",
    ]
    print_failures(result)
    assert capsys.readouterr().err.startswith("error: failed /m/\\x1b[2Jb -> /o/b: config.json")


def test_the_whole_batch_has_a_bar_and_a_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    clock = [0.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    table = LiveTable(Terminal())
    table._overall.start(5, [replace(DONE, earlier=True)])
    row = table.item("/models/of/somebody/with/many/folders/Llama-3-8B-AWQ", "/o/a")
    row.start("convert", 1000)
    row.advance(400)
    with table._console.capture() as shown:
        table._console.print(table._table())
    *_, overall, counts = [line.rstrip() for line in shown.get().splitlines()]
    assert re.match(r"all items +27 % .*━", overall), "one of five, and 0.9 * 400 / 1000 of the next"
    assert "1 of 5 (1 done)  " in counts, "no guess in the first second"
    clock[0] = 90.0
    with table._console.capture() as shown:
        table._console.print(table._table())
    assert "1 of 5 (1 done), about 15 min left" in shown.get(), "0.36 items took 90 s; 3.64 are left"
    assert "…/Llama-3-8B-AWQ " in shown.get()


def test_a_narrow_terminal_shows_no_bars_and_the_end_of_a_path(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    table = LiveTable(Terminal())
    table._overall.start(2, [])
    table.item("/models/of/somebody/with/many/folders/Llama-3-8B-AWQ", "/o/a").start("fetch and convert", 3_900_000_000)
    with table._console.capture() as shown:
        table._console.print(table._table())
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.get())
    assert re.search(r"^…/Llama-3-8B-AWQ  ?fetch and convert +0 B of 3\.9 GB$", text, re.MULTILINE)
    assert "━" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 60


def test_lines_tell_the_time_left_of_the_whole_batch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = BatchLines(stream)
    lines.start(3, [])
    lines.item("m/a", DONE.output)
    clock[0] = 4000.0
    lines.done(DONE)
    assert stream.getvalue().splitlines()[-1].startswith("[1 of 3 (1 done), about 2 h 13 min left] done /m/a -> /o/a: ")
    lines.done(DONE)
    lines.done(FAILED)
    assert "[3 of 3 (2 done, 1 failed)] failed" in stream.getvalue(), "nothing is left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "1 h 30 min")])
def test_a_guess_is_told_roughly(seconds, text):
    assert shown_progress._time_text(seconds) == text


def test_the_share_of_an_item_never_goes_back():
    share, seen = shown_progress._Share(), [0.0]
    for what, total in [("convert", 1000), ("verify", 10), ("upload", 0), ("check", 7)]:
        share.start(what, total)
        for _ in range(3):
            share.done += total // 2
            seen.append(share.value)
    assert seen == sorted(seen)
    assert seen[3] == pytest.approx(0.9)
    assert seen[-1] < 1
