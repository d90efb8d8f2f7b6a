"""Nothing in the output depends on the number of workers, the path, or the time."""

import os
import shutil

import pytest

from .helpers import contents, run_process


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_no_byte(large, run, tmp_path, workers):
    out = tmp_path / "out"
    assert run("convert", large / "source", out, "--workers", workers).code == 0
    assert contents(out) == contents(large / "marlin")
    assert run("revert", out, tmp_path / "back", "--workers", workers).code == 0
    assert contents(tmp_path / "back") == contents(large / "source")


def test_path_and_time_change_no_byte(source, expected, tmp_path):
    elsewhere = shutil.copytree(source, tmp_path / "a folder with a longer name" / "model")
    for number, path in enumerate(sorted(elsewhere.rglob("*"), reverse=True)):
        os.utime(path, (1_000_000_000 + number, 1_000_000_000 + number))
    outcome = run_process("convert", "model", "-q", "--json", cwd=elsewhere.parent)
    assert outcome.report["output"] == "model-marlin"
    assert contents(elsewhere.parent / "model-marlin") == expected
