"""What tests of several formats share: a conversion and its reversion that are killed before each of their steps."""

import os

import pytest

from awq2marlin import convert
from tests.faults.helpers import Stepped, contents, run_here
from tests.faults.test_kill import kill_at_every_step


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A process in which commands are stopped."""
    runner = Stepped(tmp_path_factory.mktemp("stepped"))
    yield runner
    runner.close()


@pytest.fixture
def killed_there_and_back(stepped, tmp_path, capsys, monkeypatch):
    """Kills a conversion of a source, and the way back, before any step in turn: the same command completes each."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # many runs in a row need no disk

    def run(*arguments):
        return run_here(capsys, *arguments, "--json")

    def check(source, to="marlin"):
        convert(source, tmp_path / "whole", to=to)
        for command, expected in (
            (("convert", source, tmp_path / "out", "--to", to), tmp_path / "whole"),
            (("revert", tmp_path / "whole", tmp_path / "back"), source),
        ):
            steps = kill_at_every_step(stepped, run, (*command, "--workers", 1), command[2], contents(expected))
            assert len(steps) > 20

    return check
