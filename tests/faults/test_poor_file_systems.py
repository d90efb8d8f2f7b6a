"""Folders that cannot be synced, and no locks: the run goes on, says so once, and leaves nothing behind."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from awq2marlin import convert_many
from awq2marlin.batch.record import open_record
from awq2marlin.errors import OutputError
from awq2marlin.io import lock as lock_module
from awq2marlin.io.lock import HeldError, Lock

from . import poor_disk
from .helpers import (
    WORK,
    Stepped,
    check_not_loadable_unless_whole,
    check_rerun,
    contents,
    finish,
    refused,
    start,
)

NO_SYNC = "the output's file system cannot sync folders"
NO_LOCK = "the output's file system has no locks, so a lock file is used"
NO_LOCKS = ("ENOLCK", "EOPNOTSUPP", "ENOSYS")


@pytest.fixture
def poor(monkeypatch):
    """Makes the file system a poor one for the rest of a test."""
    return lambda **calls: poor_disk.make(**calls, set_attribute=monkeypatch.setattr)


@pytest.fixture
def impatient(monkeypatch):
    """Waits less long for a file that stands for a lock."""
    monkeypatch.setattr(lock_module, "_PATIENCE", 0.3)


@pytest.mark.parametrize("command", ["convert", "revert"])
@pytest.mark.parametrize(
    ("flock", "folder_sync", "told"),
    [
        (None, "EINVAL", [NO_SYNC]),
        (None, "ENOTSUP", [NO_SYNC]),
        *((each, None, [NO_LOCK]) for each in NO_LOCKS),
        ("ENOLCK", "EINVAL", [NO_SYNC, NO_LOCK]),
    ],
)
def test_the_run_goes_on_says_so_once_and_leaves_nothing_behind(
    made, poor, run, tmp_path, command, flock, folder_sync, told
):
    given, wanted = (made / "source", made / "marlin") if command == "convert" else (made / "marlin", made / "source")
    poor(flock=flock, folder_sync=folder_sync)
    outcome = run(command, given, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "out") == contents(wanted)
    assert not (tmp_path / "out" / WORK).exists()
    warnings = outcome.report["warnings"]
    assert [each for each in warnings if "file system" in each] == warnings[-len(told) :]
    for warning, sentence in zip(warnings[-len(told) :], told, strict=True):
        assert warning.startswith(sentence)
        assert outcome.err.count(sentence) == 1


def test_a_sound_file_system_is_not_spoken_of(source, run, tmp_path):
    outcome = run("convert", source, tmp_path / "out")
    assert "file system" not in outcome.err + outcome.out


def test_a_sync_that_fails_for_another_reason_still_fails(source, poor, run, tmp_path):
    poor(folder_sync="EIO")
    assert refused(run("convert", source, tmp_path / "new" / "out"))["code"] == "io-error"
    assert not (tmp_path / "new").exists()


def test_a_lock_that_fails_for_another_reason_still_fails(source, poor, run, tmp_path):
    poor(flock="EIO")
    assert refused(run("convert", source, tmp_path / "out"))["code"] == "io-error"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("offset", range(3))
def test_killed_without_locks_it_is_completed_by_the_same_command(
    source, expected, poor_stepped, poor, run, tmp_path, offset
):
    out, command = tmp_path / "out", ("convert", source, tmp_path / "out", "--workers", 1)
    assert poor_stepped.run(*command, root=out).code == 0
    steps = poor_stepped.trace
    locking = [at for at, step in enumerate(steps) if "lock" in step]
    assert any("lock.owner" in steps[at] for at in locking)
    poor(flock="ENOLCK", folder_sync="EINVAL")
    for at in sorted({*locking, *range(0, len(steps), 5), len(steps) - 1})[offset::3]:
        shutil.rmtree(out, ignore_errors=True)
        assert poor_stepped.run(*command, root=out, at=at).code == -9
        check_not_loadable_unless_whole(out, expected)
        check_rerun(run(*command), out, expected)


@pytest.fixture(scope="module")
def poor_stepped(tmp_path_factory):
    """As `stepped`, on a file system without locks, on which folders cannot be synced."""
    runner = Stepped(tmp_path_factory.mktemp("poor"), AWQ2MARLIN_TEST_POOR="ENOLCK EINVAL")
    yield runner
    runner.close()


@pytest.mark.usefixtures("impatient")
def test_without_locks_a_second_run_is_refused_and_told_who_has_it(poor, tmp_path):
    poor(flock="ENOLCK")
    path = tmp_path / "lock"
    first, second = Lock(path), Lock(path)
    first.acquire()
    with pytest.raises(HeldError, match=rf"process {os.getpid()} on .*if that process is gone, remove the file"):
        second.acquire()
    first.release(remove=True)
    second.acquire()
    second.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def owned_by(path, process, host, *more):
    """Writes the file of an owner as the library does."""
    Path(f"{path}.owner").write_text("\n".join(map(str, [process, host, *more])) + "\n")


@pytest.mark.usefixtures("impatient")
def test_a_machine_with_locks_minds_the_file_of_one_without(monkeypatch, tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    with monkeypatch.context() as patch:
        poor_disk.make(flock="ENOLCK", set_attribute=patch.setattr)
        first.acquire()
    with pytest.raises(HeldError, match="remove the file"):
        second.acquire()
    first.release(remove=True)
    second.acquire()
    second.release(remove=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flock", ["ENOLCK", None])
@pytest.mark.parametrize("owner", ["dead", "reused"])
def test_the_file_of_a_process_that_is_gone_stops_nobody(poor, monkeypatch, tmp_path, owner, flock):
    with monkeypatch.context() as patch:
        poor_disk.make(flock="ENOLCK", set_attribute=patch.setattr)
        here = host_here(tmp_path)
    path, lock = tmp_path / "lock", Lock(tmp_path / "lock")
    if owner == "dead":
        gone = start("--version")
        finish(gone)
        owned_by(path, gone.pid, here)
    else:  # another process has its number now
        owned_by(path, os.getpid(), here, 12345)
    poor(flock=flock)
    lock.acquire()
    lock.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def host_here(tmp_path):
    """Returns the host's name as the library writes it, which tells containers apart."""
    lock = Lock(tmp_path / "asked")
    lock.acquire()
    name = Path(f"{tmp_path / 'asked'}.owner").read_text().split("\n")[1]
    lock.release(remove=True)
    return name


@pytest.mark.usefixtures("impatient")
def test_a_file_that_names_nobody_may_be_a_live_process_s(poor, tmp_path):
    """The process was killed between making the file and writing into it, or is about to write."""
    poor(flock="ENOLCK")
    (tmp_path / "lock.owner").touch()
    with pytest.raises(HeldError, match="an unknown process; if that process is gone, remove the file"):
        Lock(tmp_path / "lock").acquire()


@pytest.mark.usefixtures("impatient")
def test_a_process_of_another_machine_is_taken_for_alive_and_the_message_says_what_to_do(
    source, expected, poor, run, tmp_path
):
    poor(flock="EOPNOTSUPP")
    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    owned_by(out / WORK / "lock", 4711, f"not-{socket.gethostname()}")
    error = refused(run("convert", source, out))
    assert error["code"] == "in-use"
    assert f"process 4711 on not-{socket.gethostname()}; if that process is gone, remove the file" in error["message"]
    assert str(out / WORK / "lock.owner") in error["message"]
    (out / WORK / "lock.owner").unlink()
    assert run("convert", source, out).code == 0
    assert contents(out) == expected


@pytest.mark.usefixtures("impatient")
def test_a_batch_has_its_record_to_itself_without_locks_too(source, poor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poor(flock="ENOLCK", folder_sync="EINVAL")
    record = tmp_path / "record.jsonl"
    with open_record(record), pytest.raises(OutputError, match="another process is running this batch") as caught:
        convert_many([source], record=record)
    assert caught.value.problems[0].code == "in-use"
    assert [item.status for item in convert_many([source], record=record).items] == ["done"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.jsonl", "source-marlin"]
