"""Colours where a terminal shows them, and nowhere else; the width of lines."""

from __future__ import annotations

import io
import os

import pytest

from awq2marlin.cli.app import main
from awq2marlin.cli.terminal import coloured, has_colours, width_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(
    ("environment", "on_terminal", "in_file"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_who_shows_colours(
    environment: dict[str, str], on_terminal: bool, in_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (has_colours(Terminal()), has_colours(io.StringIO())) == (on_terminal, in_file)


def test_a_word_in_a_colour() -> None:
    assert coloured("error:", "red", Terminal()) == "\x1b[31merror:\x1b[0m"
    assert coloured("error:", "red", io.StringIO()) == "error:"


def test_an_error_is_red_and_equal_is_green(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "shown", "--quiet"]) == 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("\x1b[31merror:\x1b[0m nowhere: ")
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err.startswith("\x1b[31musage error:\x1b[0m Missing argument")
    assert main(["verify", "shown/awq", "shown/marlin"]) == 0
    assert capsys.readouterr().out.startswith("\x1b[32mequal:\x1b[0m 12 of 12 ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["verify", "shown/awq", "shown/marlin"]) == 0
    assert capsys.readouterr().out.startswith("equal: 12 of 12 ")


def test_the_width_is_asked_of_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert width_of(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "72")
    assert width_of(io.StringIO()) == 72
    monkeypatch.setenv("COLUMNS", "many")
    assert width_of(io.StringIO()) is None
    monkeypatch.delenv("COLUMNS")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        assert width_of(terminal) in (None, 80)  # a new terminal has no size yet
    os.close(ours)
