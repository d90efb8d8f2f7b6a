"""Two processes on one folder, at the moments that are hardest to get right."""

import threading
from pathlib import Path

import pytest

from awq2marlin.errors import OutputError
from awq2marlin.pipeline.output import claim

from .helpers import WORK


def begin(root, plan="plan", names=("config.json",)):
    """Claims a folder and returns the claim, entered."""
    held = claim(root, plan, names)
    held.__enter__()
    return held


def finish(held):
    held.__exit__(None, None, None)


def check_in_use(root):
    with pytest.raises(OutputError) as caught:
        begin(root)
    assert [problem.code for problem in caught.value.problems] == ["in-use"]


def in_a_thread(function, *arguments):
    """Runs something as another process would: with locks of its own."""
    result = []

    def body():
        try:
            result.append(function(*arguments))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(timeout=20)
    return result[0]


@pytest.mark.parametrize("moment", ["unlink", "rmdir"])
def test_a_run_that_begins_while_another_tidies_up_keeps_its_lock_and_journal(tmp_path, monkeypatch, moment):
    """Whoever comes between two steps of the tidying is refused, or has the folder to himself."""
    root = tmp_path / "out"
    act = getattr(Path, moment)
    entered, seen = [], []

    def intruding(self, *arguments, **options):
        if WORK in self.parts and threading.current_thread() is threading.main_thread():
            outcome = in_a_thread(begin, root)
            seen.append(self.name)
            if not isinstance(outcome, OutputError):
                assert hasattr(outcome, "__exit__"), outcome
                entered.append(outcome)
        return act(self, *arguments, **options)

    first = begin(root)
    with monkeypatch.context() as patch:
        patch.setattr(Path, moment, intruding)
        finish(first)
    assert seen
    assert len(entered) <= 1
    for second in entered:
        assert (root / WORK / "journal.json").is_file()
        check_in_use(root)
        finish(second)
    assert list(root.iterdir()) == []


def test_a_folder_that_another_process_makes_at_the_same_time_is_no_error(tmp_path, monkeypatch):
    root = tmp_path / "out"
    mkdir = Path.mkdir

    def late_mkdir(self, *arguments, **options):
        if self == root and not root.exists():
            mkdir(root)
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late_mkdir)
    finish(begin(root))
    assert list(root.iterdir()) == []


def test_a_failed_run_does_not_take_the_folder_from_under_another(tmp_path, monkeypatch):
    """The first made the folder and fails; before it removes it again, a second has begun."""
    root = tmp_path / "out"
    rmdir = Path.rmdir
    entered = []

    def intruding(self):
        if self == root and threading.current_thread() is threading.main_thread():
            entered.append(in_a_thread(begin, root))
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", intruding)
    with pytest.raises(ZeroDivisionError), claim(root, "plan", ["config.json"]):
        raise ZeroDivisionError
    (second,) = entered
    assert (root / WORK / "journal.json").is_file()
    check_in_use(root)
    finish(second)


def test_a_conversion_that_another_process_finished_meanwhile_is_not_touched(tmp_path, monkeypatch):
    """Looked at before the lock was free, the folder was unfinished; under the lock it is another's."""
    root = tmp_path / "out"
    first = begin(root)
    mkdir = Path.mkdir

    def finish_first(self, *arguments, **options):
        if self == root / WORK:
            monkeypatch.setattr(Path, "mkdir", mkdir)
            (root / "config.json").write_text("whole")
            finish(first)
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", finish_first)
    with pytest.raises(OutputError) as caught:
        begin(root)
    assert [problem.code for problem in caught.value.problems] == ["not-empty"]
    assert [path.name for path in root.iterdir()] == ["config.json"]
    assert (root / "config.json").read_text() == "whole"
