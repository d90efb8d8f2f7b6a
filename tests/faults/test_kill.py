"""``kill -9`` at every step and at any time: the same command again ends with the same bytes."""

import random
import shutil
import signal

import pytest

from awq2marlin import revert

from .helpers import (
    MANIFEST,
    WORK,
    check_not_loadable_unless_whole,
    check_rerun,
    contents,
    finish,
    finished_shards,
    run_process,
    start,
    stop_when,
)


def kill_at_every_step(stepped, run, command, out, expected, earlier=None):
    """Kills a run before each of its changes in turn, and runs it again each time.

    Where there is an ``earlier`` conversion, it is replaced.
    """
    wholes = [expected, *([contents(earlier)] if earlier else [])]

    def prepare():
        if earlier:
            shutil.copytree(earlier, out)

    prepare()
    assert stepped.run(*command, root=out).code == 0
    assert contents(out) == expected
    steps = stepped.trace
    for at in range(len(steps)):
        shutil.rmtree(out)
        prepare()
        assert stepped.run(*command, root=out, at=at).code == -9
        step = stepped.trace[at]  # the journal and the next shard are written side by side, in any order
        check_not_loadable_unless_whole(out, *wholes)
        try:
            check_rerun(run(*command), out, expected, command[0])
        except AssertionError as error:
            raise AssertionError(f"killed before step {at}, {step!r}") from error
    return steps


@pytest.mark.usefixtures("without_syncs")
def test_convert_killed_before_any_of_its_steps_is_completed_by_the_same_command(
    source, expected, stepped, run, tmp_path
):
    out = tmp_path / "out"
    command = ("convert", source, out, "--workers", 1)
    steps = kill_at_every_step(stepped, run, command, out, expected)
    assert len(steps) > 50
    names = [step.split()[1] for step in steps if step.startswith("os.rename") and WORK not in step]
    assert names[-1] == "config.json"
    assert sorted(names) == sorted(expected)


@pytest.mark.usefixtures("without_syncs")
def test_revert_killed_before_any_of_its_steps_is_completed_by_the_same_command(made, stepped, run, tmp_path):
    out = tmp_path / "out"
    expected = contents(made / "source")
    command = ("revert", made / "marlin", out, "--workers", 1)
    steps = kill_at_every_step(stepped, run, command, out, expected)
    assert [step for step in steps if step.startswith("os.rename") and WORK not in step][-1] == "os.rename config.json"


@pytest.mark.parametrize("moment", ["model-00001-of-00003.safetensors", MANIFEST])
def test_convert_killed_when_a_file_appears_is_completed_by_the_same_command(large, moment, tmp_path):
    out = tmp_path / "out"
    expected = contents(large / "marlin")
    assert stop_when(start("convert", large / "source", out), (out / moment).exists).code == -9
    check_not_loadable_unless_whole(out, expected)
    assert sorted(path.name for path in out.glob("*.safetensors"))[-1] >= moment or moment == MANIFEST
    check_rerun(run_process("convert", large / "source", out, "--json"), out, expected)


def test_convert_killed_again_and_again_at_random_times_ends_with_the_same_bytes(large, stepped, run, tmp_path):
    out = tmp_path / "out"
    expected = contents(large / "marlin")
    dice = random.Random(20261)
    stepped.run("convert", large / "source", out, "--workers", 2, root=out)
    count = len(stepped.trace)
    for _ in range(6):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(dice.randrange(1, 4)):
            stepped.run("convert", large / "source", out, "--workers", 2, root=out, at=dice.randrange(count))
            check_not_loadable_unless_whole(out, expected)
        check_rerun(run("convert", large / "source", out), out, expected)


def test_processes_killed_after_random_delays_never_leave_a_half_written_folder_loadable(large, tmp_path):
    out = tmp_path / "out"
    expected = contents(large / "marlin")
    dice = random.Random(7)
    for _ in range(3):
        process = start("convert", large / "source", out)
        stop_when(process, lambda: (out / WORK).exists() and dice.random() < 0.05)
        check_not_loadable_unless_whole(out, expected)
    check_rerun(run_process("convert", large / "source", out, "--json"), out, expected)


def test_revert_killed_when_a_shard_is_finished_keeps_it_and_is_completed_by_the_same_command(large, tmp_path):
    out = tmp_path / "out"
    expected = contents(large / "source")
    assert stop_when(start("revert", large / "marlin", out), lambda: finished_shards(out)).code == -9
    check_not_loadable_unless_whole(out, expected)
    before = {name: (out / name).stat().st_ino for name in finished_shards(out)}
    revert(large / "marlin", out)
    assert contents(out) == expected
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert not (out / WORK).exists()


@pytest.mark.usefixtures("without_syncs")
def test_overwrite_killed_before_any_of_its_steps_is_completed_by_the_same_command(
    source, expected, stepped, run, tmp_path
):
    """An earlier conversion is being replaced: no crash may leave files that nothing accounts for."""
    out, earlier = tmp_path / "out", tmp_path / "earlier"
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "vocab.txt").write_text("only the earlier conversion has this file\n")
    (other / "code" / "old.py").write_text("# and this one\n")
    assert run("convert", other, earlier).code == 0
    command = ("convert", source, out, "--workers", 1, "--overwrite")
    kill_at_every_step(stepped, run, command, out, expected, earlier)


def test_a_second_process_is_refused_and_the_first_finishes(large, tmp_path):
    out = tmp_path / "out"
    first = start("convert", large / "source", out)
    while not (out / WORK / "journal.json").exists():
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as we like
    second = run_process("convert", large / "source", out, "--json")
    third = run_process("convert", large / "source", out, "--json", "--overwrite")
    first.send_signal(signal.SIGCONT)
    for refused in (second, third):
        assert refused.code == 1
        assert refused.error["code"] == "in-use"
        assert refused.error["file"] == str(out)
        assert "another process is writing to this folder" in refused.err
    assert finish(first).code == 0
    assert contents(out) == contents(large / "marlin")
