"""What people are told, and told once: options that do nothing, what was there already, other lists, the end."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from awq2marlin import convert, convert_many, revert, verify
from awq2marlin.batch import record as batch_record
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.cli.app import main
from awq2marlin.errors import size_text
from awq2marlin.io.folder import Folder
from awq2marlin.progress import Silence, Stage

from ..faults.helpers import contents, finished_shards, make_source, start, stop_when

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def made(tmp_path, monkeypatch):
    """``awq`` of four shards, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "awq", llama_recipe(192, 512, 2, 64, 256, group_size=64, shards=4))
    return tmp_path


@pytest.fixture
def say(made, capsys):  # noqa: ARG001 - in whose folder commands run
    """Runs a command and returns what it wrote: standard output, standard error."""

    def command(*arguments, code=0):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == code
        return capsys.readouterr()

    return command


# --- what was compared ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("none", "nothing (--verify none); 'awq2marlin verify' compares everything"),
        ("0", "nothing (--verify none); 'awq2marlin verify' compares everything"),
        ("2", "2 modules value for value; 'awq2marlin verify' compares everything"),
        ("all", "6 modules value for value"),
    ],
)
def test_what_was_compared_is_told_and_what_is_left_to_compare(say, asked, told):
    assert f"verified   {told}" in say("convert", "awq", "--verify", asked).out.splitlines()


# --- an option that does nothing ----------------------------------------------------------------------------


def test_low_disk_of_a_folder_is_told_to_do_nothing(say):
    told = "--low-disk (low_disk) does nothing for a folder: your own files are never removed"
    assert f"warning    {told}" in say("convert", "awq", "--low-disk", "--dry-run").out.splitlines()
    assert told in json.loads(say("convert", "awq", "--low-disk", "--json").out)["warnings"]
    assert convert("awq", "again").warnings == ()
    assert told in say("revert", "awq-marlin", "--low-disk").err.splitlines()
    assert contents(Path("awq-marlin-reverted")) == contents(Path("awq"))


# --- after a resume -----------------------------------------------------------------------------------------


@pytest.fixture
def half_done(made, monkeypatch):
    """A conversion that stopped after two of four shards; returns the bytes of the shards that are missing."""
    from awq2marlin.pipeline.output import OutputFolder

    true, names = OutputFolder.publish, []

    def publish(folder, name, partial=None):
        if len(names) == 2 and name.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        names.append(name)
        true(folder, name, partial)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "publish", publish)
        assert main(["convert", "awq", "--workers", "1", "--quiet"]) == 1
    assert len(finished_shards(made / "awq-marlin")) == 2
    planned = convert("awq", "elsewhere", dry_run=True)
    assert planned.written_bytes == planned.output_bytes == sum(planned.shards.values())
    return sum(size for name, size in planned.shards.items() if name not in names)


def test_after_a_resume_only_what_was_written_counts(half_done, say):
    shutil.copytree("awq-marlin", "copy")
    told = say("convert", "awq").out
    assert f"wrote      {size_text(half_done)} in " in told
    assert "; 2 of 4 shards were already there" in told
    details = json.loads(say("convert", "awq", "copy", "--json").out)["details"]
    assert details["written_bytes"] == half_done
    assert len(details["resumed"]) == 2


def test_a_batch_adds_up_what_it_wrote(half_done, say):
    convert("awq", "whole")
    Path("list.yaml").write_text("- awq\n- {source: awq, output: whole}\n")
    shutil.copytree("awq-marlin", "copy")
    report = json.loads(say("batch", "list.yaml", "--json").out)
    assert [item["written"] for item in report["details"]["items"]] == [half_done, 0]
    assert report["bytes"] == half_done
    shutil.rmtree("awq-marlin")
    Path("copy").rename("awq-marlin")
    Path("list.yaml.record.jsonl").unlink()
    told = say("batch", "list.yaml").out.splitlines()
    assert told[-2].startswith(f"wrote {size_text(half_done)} in ")
    assert json.loads(say("batch", "list.yaml", "--json").out)["bytes"] == 0


# --- how long a stage is ------------------------------------------------------------------------------------


class Told(Silence):
    """Remembers the length of every stage, and how far it came."""

    def __init__(self):
        self.stages = {}

    def start(self, what, total):
        self.what = what
        self.stages[what] = [total, 0]

    def advance(self, count):
        assert count >= 0
        self.stages[self.what][1] += count


def test_a_stage_is_as_long_as_its_bytes_are_many(made):
    names = [path.name for path in (made / "awq").glob("*.safetensors")]
    data = sum(header.data_size for header in Folder.at("awq").read_headers(names).values())
    told = Told()
    convert("awq", verify="all", progress=told)
    converted = told.stages["verify"][0]
    assert told.stages == {"convert": [data, data], "verify": [converted, converted]}
    assert converted < data
    told = Told()
    compared = verify("awq", "awq-marlin", progress=told)
    assert told.stages == {"verify": [compared.bytes, compared.bytes]}
    told = Told()
    revert("awq-marlin", progress=told)
    assert told.stages == {"revert": [data, data]}


def test_steps_count_as_parts_of_a_stage():
    told = Told()
    stage = Stage(told, "a and b", 100, {"a": 50, "b": 200, "c": 0})
    stage.step("a")(25)
    assert told.stages == {"a and b": [100, 25]}
    stage.step("b")(100)
    stage.step("c")(1000)
    stage.step("nothing")(1000)
    assert told.stages == {"a and b": [100, 50]}
    stage.step("a")(30)  # more than it announced
    stage.step("b")(100)
    assert told.stages == {"a and b": [100, 100]}


# --- batches ------------------------------------------------------------------------------------------------


def test_a_minus_is_standard_input(made, say, monkeypatch):
    text = io.TextIOWrapper(io.BytesIO(b"# a list\n\n  awq  \nnothing\n"))
    monkeypatch.setattr(sys, "stdin", text)
    told = say("batch", "-", "--out-dir", "out", code=1)
    assert "2 items: 1 done, 1 failed\nrun the same command again to retry what failed\n" in told.out
    assert "no record is kept for a list from standard input; pass --record FILE to keep one" in told.err
    assert sorted(path.name for path in made.iterdir()) == ["awq", "out"]
    assert (made / "out/awq-marlin/config.json").is_file()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input: the list is empty" in say("batch", "-", code=1).err


def test_a_failure_is_told_once(say):
    Path("list").write_text("nothing\nawq\n")
    first = say("batch", "list", code=1)
    assert (first.out + first.err).count("cannot open it as a checkpoint") == 1
    again = say("batch", "list", code=1)
    assert (again.out + again.err).count("cannot open it as a checkpoint") == 1
    quiet = say("batch", "list", "--retry-failed", "--quiet", code=1)
    assert (quiet.out, quiet.err.count("cannot open it as a checkpoint")) == ("", 1)


def test_a_dry_run_adds_up_the_disk_that_is_needed(made, say):
    shutil.copytree("awq", "other")
    Path("list").write_text("awq\nother\nnothing\n")
    result = convert_many("list", dry_run=True)
    (disk,) = result.disks
    plan = convert("awq", "x", dry_run=True)
    index = Path("awq/model.safetensors.index.json").stat().st_size
    assert disk.needed == 2 * (plan.output_bytes + sum(plan.files.values()) + index)
    assert disk.free > 0
    told = say("batch", "list", "--dry-run", code=1).out.splitlines()
    assert told[-1].startswith(f"would need {size_text(disk.needed)} on the disk of {made / 'awq-marlin'}, which has ")
    details = json.loads(say("batch", "list", "--dry-run", "--json", code=1).out)["details"]
    assert [each["needed"] for each in details["disks"]] == [disk.needed]
    assert [sum(need["bytes"] for need in item["needs"]) for item in details["items"]] == [disk.needed // 2] * 2 + [0]


@pytest.mark.parametrize("number", [13, 30], ids=["no permission", "read-only"])
def test_a_list_where_no_record_can_be_written_is_told_of_the_option(say, monkeypatch, number):
    Path("list").write_text("awq\n")

    def denied(*_, **__):
        raise OSError(number, os.strerror(number), "list.record.jsonl.lock")

    with monkeypatch.context() as patch:
        patch.setattr(batch_record.Lock, "acquire", denied)
        told = say("batch", "list", code=1).err
    assert "list.record.jsonl: the batch record cannot be written there: " in told
    assert "pass another file with --record FILE" in told
    assert say("batch", "list", "--record", "elsewhere").out


# --- the end --------------------------------------------------------------------------------------------------


def test_a_termination_is_told_like_an_interruption(tmp_path):
    make_source(tmp_path / "source", size_k=1024, size_n=2048, layers=12, shards=12)
    out = tmp_path / "out"
    outcome = stop_when(
        start("convert", tmp_path / "source", out, "--json", "--workers", 1),
        lambda: finished_shards(out),
        signal.SIGTERM,
    )
    assert outcome.code == 143
    told = "terminated (SIGTERM); run the same command again to continue"
    assert outcome.err.splitlines()[-1] == f"error: {told}"
    assert (outcome.report["status"], outcome.error["message"]) == ("interrupted", told)
    assert not (out / "config.json").exists()
    assert len(convert(tmp_path / "source", out).resumed) >= 1


def test_the_fuzzer_runs_as_contributing_gives_it():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "tests/fuzz.py", "--seconds", "0", "config"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("config: 0 files")
