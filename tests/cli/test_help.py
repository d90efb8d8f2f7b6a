"""What ``--help`` shows at the widths that terminals have: every word whole, examples that work, pages that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import awq2marlin
from awq2marlin.cli.app import app, main
from awq2marlin.cli.help import DESCRIPTIONS, EXAMPLES, PAGES

ROOT = Path(awq2marlin.__file__).parents[1]
GROUP: Any = typer.main.get_command(app)
COMMANDS = [*GROUP.commands]
WIDTHS = [60, 80, 100, 160]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Returns what a command, or the program itself, prints with ``--help`` at a width."""

    def command(name: str, columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([*filter(None, [name]), "--help"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return command


def parameters(command: str) -> list[Any]:
    """The arguments and options of a command, as the parser has them."""
    return [each for each in (GROUP.commands[command] if command else GROUP).params if each.name != "help"]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_description_is_there_and_no_word_is_broken(command: str, columns: int, shown: Any) -> None:
    out = shown(command, columns)
    words = {*out.split()}
    assert " ".join(out.split()).count(" ".join(DESCRIPTIONS[command])) == 1
    for each in parameters(command):
        assert each.help
        assert {*each.help.split()} - words == set(), each.name
        assert {*each.opts} - {word.rstrip(",") for word in words} == set() or each.param_type_name == "argument"
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    joined = out.replace(" \\\n", " ")
    for _, line in EXAMPLES[command]:
        assert line in {" ".join(each.split()) for each in joined.splitlines()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_has_a_name_and_a_flag_has_none(command: str, shown: Any) -> None:
    lines = [f"{line} " for line in shown(command, 160).splitlines()]
    for each in parameters(command):
        is_flag = each.param_type_name == "option" and each.is_flag
        assert (each.metavar is None) == is_flag, each.name
        named = "  " + " ".join(filter(None, [", ".join(sorted(each.opts, key=len)), each.metavar]))
        head = f"  {each.metavar} " if each.param_type_name == "argument" else f"{named} "
        assert len([line for line in lines if line.startswith(head)]) == 1, each.name


@pytest.mark.parametrize("command", ["convert", "verify", "revert", "inspect"])
def test_a_revision_is_told_with_its_brackets(command: str, shown: Any) -> None:
    assert "org/name[@revision]" in shown(command, 80)


def test_the_usage_line_tells_what_may_be_left_out(shown: Any) -> None:
    assert shown("convert", 80).splitlines()[0] == "Usage: awq2marlin convert [OPTIONS] SOURCE [OUTPUT]"
    assert shown("doctor", 80).splitlines()[0] == "Usage: awq2marlin doctor [OPTIONS]"
    assert shown("", 80).splitlines()[0] == "Usage: awq2marlin [OPTIONS] COMMAND [ARGS]..."


def test_a_default_is_told_where_there_is_one(shown: Any) -> None:
    options = re.split(r"\n  (?=-)", shown("convert", 100))
    defaults = {text.split()[0]: text.split("[default: ")[1].split("]")[0] for text in options if "[default: " in text}
    assert defaults == {"--to": "marlin", "--unaligned": "keep", "--verify": "8"}


def test_the_program_names_every_command_and_exit_code(shown: Any) -> None:
    out = shown("", 80)
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert {*COMMANDS} <= {*lines}
    assert all(GROUP.commands[name].help.startswith(lines[name].split(maxsplit=1)[1][:-1]) for name in COMMANDS)
    assert lines["batch"] == "  batch    Convert many checkpoints."
    codes = (
        "Exit codes: 0 done, 1 failed or refused, 2 usage, 3 a difference was found, 130 interrupted, 143 terminated."
    )
    assert codes in " ".join(out.split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_way_to_the_documents(command: str, shown: Any) -> None:
    assert [page for page in PAGES[command] if not (ROOT / page).exists()] == []
    told = " ".join(shown(command, 80).split("\n\n")[-1].split())
    assert told.endswith(f"See also: {', '.join(PAGES[command])} (in a clone of awq2marlin).")
    assert {*DESCRIPTIONS} == {*EXAMPLES} == {*PAGES} == {"", *COMMANDS}


@pytest.mark.parametrize("command", ["", "convert"])
def test_the_help_is_the_same_without_docstrings(command: str, shown: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [sys.executable, "-OO", "-m", "awq2marlin", *filter(None, [command]), "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert (done.stderr, done.stdout) == ("", shown(command, 80))


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for _, line in lines])
def test_an_example_is_a_command_line_that_the_parser_takes(line: str) -> None:
    words = shlex.split(line.rpartition(" | ")[2])
    assert words.pop(0) == "awq2marlin"
    name = words.pop(0)
    context = GROUP.commands[name].make_context(name, words)
    assert context.args == []


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("awq2marlin re", {"revert"}),
        ("awq2marlin convert --unaligned ", {"keep", "pad", "error"}),
        ("awq2marlin convert x --to a", {"awq"}),
        ("awq2marlin verify a b --dev", {"--device"}),
    ],
)
def test_the_shell_completes_commands_options_and_values(words: str, offered: set[str]) -> None:
    asked = {"_AWQ2MARLIN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-c", "from awq2marlin.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **asked}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stderr, {*done.stdout.split()}) == ("", offered)


def test_the_script_for_the_shell_can_be_shown() -> None:
    command = ["bash", "-c", f"'{sys.executable}' -m awq2marlin --show-completion; true"]  # true: bash stays the parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "complete -o default -F _awq2marlin_completion awq2marlin" in done.stdout
