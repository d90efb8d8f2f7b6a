"""Ctrl-C: exit code 130, the message says that the same command resumes, and it does."""

import shutil
import signal

import pytest

from awq2marlin import convert

from .helpers import check_rerun, contents, finished_shards, make_source, run_process, start, stop_when


def check_interrupted(outcome):
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == "error: interrupted; run the same command again to continue"
    assert outcome.error == {
        "file": "",
        "tensor": "",
        "code": "interrupted",
        "message": "interrupted; run the same command again to continue",
    }


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A checkpoint that is still far from done when its first shard is, with its conversion."""
    folder = tmp_path_factory.mktemp("many")
    make_source(folder / "source", size_k=1024, size_n=4096, layers=16, shards=12)
    convert(folder / "source", folder / "marlin")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_conversion_says_that_it_resumes_and_does(many_shards, tmp_path, workers):
    large, out = many_shards, tmp_path / "out"
    command = ("convert", large / "source", out, "--json", "--workers", workers)
    check_interrupted(stop_when(start(*command), lambda: finished_shards(out), signal.SIGINT))
    assert not (out / "config.json").exists()
    finished = finished_shards(out)
    assert finished
    assert run_process(*command).report["details"]["resumed"] == finished
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
    at = stepped.trace.index("os.rename .awq2marlin/journal.json")
    shutil.rmtree(out)
    check_interrupted(stepped.run("convert", source, out, "--json", root=out, at=at, do="interrupt"))
    assert not out.exists()
