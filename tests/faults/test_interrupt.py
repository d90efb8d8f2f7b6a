"""Ctrl-C: exit code 130, the message says that the same command resumes, and it does."""

import shutil
import signal

import pytest

from .helpers import WORK, check_rerun, contents, run_process, start, stop_when


def check_interrupted(outcome):
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == "error: interrupted; the same command resumes where it stopped"
    assert outcome.error == {
        "file": "",
        "tensor": "",
        "code": "interrupted",
        "message": "interrupted; the same command resumes where it stopped",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_conversion_says_that_it_resumes_and_does(large, tmp_path, workers):
    out = tmp_path / "out"
    command = ("convert", large / "source", out, "--json", "--workers", workers)
    moment = out / "model-00002-of-00003.safetensors"
    check_interrupted(stop_when(start(*command), moment.exists, signal.SIGINT))
    assert not (out / "config.json").exists()
    assert (out / WORK / "journal.json").exists()
    rerun = run_process(*command)
    assert "model-00001-of-00003.safetensors" in rerun.report["details"]["resumed"]
    assert contents(out) == contents(large / "marlin")


@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("command", ["convert", "revert"])
def test_an_interrupt_at_any_step_is_told_and_leaves_what_the_same_command_completes(
    made, stepped, run, tmp_path, command
):
    given, wanted = (made / "source", made / "marlin") if command == "convert" else (made / "marlin", made / "source")
    out, expected = tmp_path / "out", contents(wanted)
    arguments = (command, given, out, "--workers", 1, "--json")
    assert stepped.run(*arguments, root=out).code == 0
    steps = stepped.trace
    last = steps.index("os.rename config.json")
    for at in range(0, len(steps), 4):
        shutil.rmtree(out, ignore_errors=True)
        outcome = stepped.run(*arguments, root=out, at=at, do="interrupt")
        check_interrupted(outcome)
        assert at > last or not (out / "config.json").exists(), steps[at]
        check_rerun(run(*arguments[:-1]), out, expected, command)


def test_an_interrupt_before_anything_was_written_leaves_no_folder(source, stepped, tmp_path):
    out = tmp_path / "out"
    stepped.run("convert", source, out, "--json", root=out)
    at = next(at for at, step in enumerate(stepped.trace) if step.endswith(".partial"))
    shutil.rmtree(out)
    check_interrupted(stepped.run("convert", source, out, "--json", root=out, at=at, do="interrupt"))
    assert not out.exists()
