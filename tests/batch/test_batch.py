"""Twenty models in a batch: failures stop nothing, and run again it does only what is left."""

import json
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from awq2marlin import BatchError, ExecutorError, ItemResult, OutputError, Problem, convert_many
from awq2marlin.batch import item as batch_item
from awq2marlin.batch import record as batch_record
from awq2marlin.batch.record import open_record, read_record
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.cli.app import main
from awq2marlin.pipeline import run as pipeline
from awq2marlin.pipeline.shard import rewrite_shard

from ..faults.helpers import WORK, contents, finish, run_here, run_process, start, stop_when
from .conftest import BROKEN, MODELS

RECORD = "models.txt.record.jsonl"


@pytest.fixture
def run(capsys):
    """Runs the command line in this process, with ``--json``."""
    return lambda *arguments: run_here(capsys, *arguments, "--json")


def lines(record):
    return [json.loads(line) for line in Path(record).read_text().splitlines()]


def check_outputs(models, out):
    """Every sound model is converted as alone, and of the broken ones nothing is there."""
    found = {path.name.removesuffix("-marlin"): contents(path) for path in out.iterdir()}
    assert found == models.expected


def test_what_is_left_behind_is_told_once_by_a_plan_too(tmp_path, capsys):
    write_checkpoint(tmp_path / "a", Recipe({"m.up_proj": (128, 64)}, group_size=64))
    (tmp_path / "a/pytorch_model.bin").write_bytes(b"12345")
    (tmp_path / "list").write_text(f"{tmp_path / 'a'}\n")
    for options in (["--dry-run"], []):
        assert main(["batch", str(tmp_path / "list"), "--out-dir", str(tmp_path), *options]) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "pytorch_model.bin" in line)
        assert line.startswith(
            f"{tmp_path / 'a'}: left behind, so 'revert' cannot restore it: pytorch_model.bin (5 B, pickled weights)"
        )


@pytest.mark.parametrize("name", ["nothing", "./nothing", "awq/../nothing"])
def test_a_source_that_is_not_there_is_named_by_its_path_once(name, tmp_path, monkeypatch, run):
    (tmp_path / "awq").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("list").write_text(f"{name}\nawq\n")
    report = run("batch", "list").report
    files = [error["file"] for error in report["errors"]]
    assert files == [str(tmp_path / "nothing"), str(tmp_path / "awq/config.json")]


# --- one after the other, and again -----------------------------------------------------------------------


def test_twenty_models_three_of_them_broken_in_different_ways(models, listed, run, tmp_path):
    outcome = run("batch", listed, "--out-dir", "out", "--jobs", 3, "--workers", 4)
    assert outcome.code == 1
    details = outcome.report["details"]
    assert (details["done"], details["failed"], details["earlier"]) == (MODELS - len(BROKEN), len(BROKEN), 0)
    assert [Path(item["source"]) for item in details["items"]] == models.sources, "in the list's order"
    failed = {Path(item["source"]).name: item["errors"][0]["code"] for item in details["items"] if item["exit_code"]}
    assert failed == BROKEN
    check_outputs(models, tmp_path / "out")

    recorded = lines(RECORD)
    assert sorted(line["source"] for line in recorded) == sorted(map(str, models.sources))
    assert {line["status"] for line in recorded} == {"done", "failed"}
    first = next(line for line in recorded if line["source"].endswith("model-00"))
    assert (first["exit_code"], first["converted"], first["kept"], first["verified"]) == (0, 3, 0, 3)
    assert first["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out/model-00-marlin").glob("*.safetensors")
    )
    asked = {"unaligned": "keep", "verify": 8, "device": None, "overwrite": False, "low_disk": False}
    nowhere = {"push_to": None, "private": False, "revision": None, "create_pr": False}
    assert (first["options"], first["pushed"]) == (asked | nowhere, None)
    assert first["manifest"].startswith("xxh3_128:")


def test_a_rerun_touches_nothing_and_failures_are_tried_only_when_asked(models, listed, run, tmp_path, monkeypatch):
    assert run("batch", listed, "--out-dir", "out").code == 1
    recorded = Path(RECORD).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(batch_item, "convert", None)  # nothing may be converted, nor compared
        patch.setattr(batch_item, "verify", None)
        outcome = run("batch", listed, "--out-dir", "out")
        people = run_process("batch", listed, "--out-dir", "out")
    assert outcome.code == 1, "the batch has items that failed"
    assert outcome.report["details"]["earlier"] == MODELS
    assert "20 items: 17 done (17 of them by earlier runs), 3 failed" in people.out
    assert "not retried: 3 items that failed in an earlier run; use --retry-failed" in people.out
    assert Path(RECORD).read_bytes() == recorded

    mended = models.folder / "model-15"
    shutil.copytree(models.folder / "model-00", mended)
    try:
        outcome = run("batch", listed, "--out-dir", "out", "--retry-failed")
    finally:
        shutil.rmtree(mended)
    assert outcome.code == 1
    details = outcome.report["details"]
    assert (details["done"], details["failed"], details["earlier"]) == (MODELS - 2, 2, MODELS - 3)
    assert contents(tmp_path / "out" / "model-15-marlin") == models.expected["model-00"]
    assert len(lines(RECORD)) == MODELS + 3


def test_a_batch_without_failures_exits_0(models, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(
        f"- {models.sources[0]}\n- source: {models.sources[1]}\n  output: other\n  verify: all\n  workers: 1\n"
    )
    outcome = run("batch", "two.yaml", "--verify", 2)
    assert (outcome.code, outcome.report["errors"]) == (0, [])
    assert [item["verified"] for item in outcome.report["details"]["items"]] == [2, 3]
    fewer, whole = contents(Path("model-00-marlin")), models.expected["model-00"]
    assert {name for name in whole if fewer[name] != whole[name]} <= {"README.md", "marlin_manifest.json"}
    assert contents(Path("other")) == models.expected["model-01"]
    assert Path("two.yaml.record.jsonl").is_file()
    assert not Path("two.yaml.record.jsonl.lock").exists()


def test_a_dry_run_says_what_would_stop_an_item(models, listed, run, tmp_path):
    source = models.sources[0]
    listed.write_text(f"{source}\n")
    folder = tmp_path / "out" / f"{source.name}-marlin"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    outcome = run("batch", "models.txt", "--out-dir", "out", "--dry-run")
    assert outcome.code == 0
    assert f"{source}: a run would stop: " in outcome.err
    assert "the folder is not empty (notes.txt)" in outcome.err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    assert run("batch", "models.txt", "--out-dir", "out").code == 0
    assert "would stop" not in run("batch", "models.txt", "--out-dir", "out", "--dry-run", "--record", "new.jsonl").err


def test_a_dry_run_plans_every_item_and_writes_nothing(listed, run, tmp_path):
    outcome = run("batch", listed, "--out-dir", "out", "--dry-run", "--jobs", 2)
    assert outcome.code == 1
    details = outcome.report["details"]
    assert (details["dry_run"], details["done"], details["failed"]) == (True, 17, 3)
    assert {item["status"] for item in details["items"]} == {"planned", "failed"}
    assert sorted(tmp_path.iterdir()) == [listed]


def test_quiet_prints_only_what_failed(listed):
    done = run_process("batch", listed, "--out-dir", "out", "--quiet")
    assert (done.code, done.out) == (1, "")
    errors = done.err.splitlines()
    assert [line.startswith("error: failed ") for line in errors] == [True] * 3
    assert all(name in line for name, line in zip(BROKEN, errors, strict=True))


def test_parts_share_a_list_and_keep_records_of_their_own(models, listed, run, tmp_path):
    for number in (1, 2, 3):
        assert run("batch", listed, "--out-dir", "out", "--part", f"{number}/3").code in (0, 1)
    check_outputs(models, tmp_path / "out")
    counts = [len(lines(f"models.txt.{number}-of-3.record.jsonl")) for number in (1, 2, 3)]
    assert counts == [7, 7, 6]
    outcome = run("batch", listed, "--part", "4/3")
    assert (outcome.code, outcome.error["code"]) == (2, "usage")


# --- what counts as done ----------------------------------------------------------------------------------


@pytest.fixture
def two(models, tmp_path, monkeypatch):
    """Two models converted, with their record; returns what runs them again."""
    monkeypatch.chdir(tmp_path)
    sources = models.sources[:2]

    def again(**options):
        return convert_many(sources, record="record.jsonl", **options)

    assert [item.earlier for item in again().items] == [False, False]
    return again


def test_what_is_done_stands_by_record_and_disk(two):
    result = two()
    assert [(item.status, item.earlier, item.verified) for item in result.items] == [("done", True, 3)] * 2
    assert two(workers=1, jobs=2, verify="none").items[0].earlier, "nothing more is asked"
    assert two(to="marlin").items[0].earlier, "the format that is written anyway"


def test_a_lost_record_is_made_up_for_by_comparing_with_the_source(two, monkeypatch):
    Path("record.jsonl").unlink()
    monkeypatch.setattr(batch_item, "convert", None)
    result = two()
    assert [(item.status, item.earlier, item.verified) for item in result.items] == [("done", False, 3)] * 2
    assert len(lines("record.jsonl")) == 2
    assert two().items[0].earlier


def test_more_verification_is_made_up_for_without_converting_again(two):
    before = {path: path.stat().st_ino for path in Path().rglob("*.safetensors")}
    result = two(verify="all")
    assert [(item.status, item.earlier, item.verified) for item in result.items] == [("done", False, 3)] * 2
    assert {path: path.stat().st_ino for path in Path().rglob("*.safetensors")} == before
    assert two(verify="all").items[1].earlier
    assert [item.earlier for item in two(verify=5).items] == [True, True]


@pytest.mark.parametrize("damage", ["removed folder", "removed shard", "cut side file", "other manifest"])
def test_a_damaged_output_is_not_taken_for_done(two, models, damage):
    out = Path("model-01-marlin")
    if damage == "removed folder":
        shutil.rmtree(out)
        result = two()
    else:
        shard = next(out.glob("*.safetensors"))
        if damage == "removed shard":
            shard.unlink()
        elif damage == "cut side file":
            (out / "generation_config.json").write_text("{}")
        else:
            manifest = out / "marlin_manifest.json"
            text = manifest.read_text()
            digest = text.partition("xxh3_128:")[2][:32]
            manifest.write_text(text.replace(digest, digest[::-1]))
        (_, failed) = two().items
        assert (failed.status, failed.errors[0].code) == ("failed", "not-empty")
        assert "use --overwrite to replace it" in failed.errors[0].message
        result = two(overwrite=True)
    assert [(item.status, item.earlier) for item in result.items] == [("done", True), ("done", False)]
    assert contents(out) == models.expected["model-01"]


def test_other_options_ask_for_another_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("model"), Recipe({"model.layers.0.mlp.down_proj": (192, 96)}, group_size=64))
    assert convert_many(["model"], record="r").items[0].kept == 1
    (failed,) = convert_many(["model"], record="r", unaligned="pad").items
    assert (failed.status, failed.errors[0].code) == ("failed", "not-empty")
    assert "its config differs" in failed.errors[0].message
    (done,) = convert_many(["model"], record="r", unaligned="pad", overwrite=True).items
    assert (done.status, done.converted, done.earlier) == ("done", 1, False), "other options: tried again"
    assert convert_many(["model"], record="r", unaligned="pad").items[0].earlier


@pytest.mark.usefixtures("two")
def test_another_source_of_the_same_headers_is_not_taken_for_done(models):
    (other,) = convert_many([{"source": models.sources[2], "output": "model-00-marlin"}], record="record.jsonl").items
    assert (other.status, other.errors[0].code) == ("failed", "not-empty")
    assert contents(Path("model-00-marlin")) == models.expected["model-00"]


def test_without_a_record_the_outputs_alone_tell_what_is_done(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert_many(models.sources[:4]).record is None
    monkeypatch.setattr(batch_item, "convert", None)
    result = convert_many(models.sources[:3])
    assert [item.status for item in result.items] == ["done"] * 3


# --- killed, interrupted, torn ----------------------------------------------------------------------------


def test_killed_again_and_again_it_ends_with_the_same_bytes(models, listed, tmp_path):
    command = ("batch", listed, "--out-dir", "out", "--jobs", 2)
    for count in (2, 7, 12):
        stop_when(start(*command), lambda count=count: len(list((tmp_path / "out").glob("*"))) > count)
    done = finish(start(*command, "--json"))
    assert done.code == 1
    check_outputs(models, tmp_path / "out")
    details = json.loads(done.out)["details"]
    assert (details["done"], details["failed"]) == (17, 3)
    assert not list(tmp_path.rglob(WORK))
    last = read_record(Path(RECORD))
    assert len(last) == MODELS


@pytest.mark.parametrize("left", [["lock"], []])
def test_what_an_item_left_that_was_killed_while_it_tidied_up_is_removed(models, tmp_path, monkeypatch, left):
    """Its output was whole, and the record did not tell of it yet."""
    monkeypatch.chdir(tmp_path)
    convert_many(models.sources[:1])
    Path("model-00-marlin", WORK).mkdir()
    for name in left:
        Path("model-00-marlin", WORK, name).touch()
    assert [item.status for item in convert_many(models.sources[:1], record="record.jsonl").items] == ["done"]
    assert contents(Path("model-00-marlin")) == models.expected["model-00"]
    assert not Path("model-00-marlin", WORK).exists()


def test_a_killed_item_resumes(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = {f"model.layers.{layer}.mlp.down_proj": (2048, 4096) for layer in range(3)}
    write_checkpoint(Path("large"), Recipe(modules, shards=3))
    Path("list").write_text(f"{models.sources[0]}\nlarge\n")
    journal = Path("large-marlin") / WORK / "journal.json"
    stop_when(start("batch", "list", "--workers", 1), lambda: journal.exists() and "xxh3" in journal.read_text())
    assert not (Path("large-marlin") / "config.json").exists()
    done = json.loads(run_process("batch", "list", "--json").out)
    small, large = done["details"]["items"]
    assert (small["earlier"], large["earlier"], large["status"]) == (True, False, "done")
    assert large["resumed"] > 0


@pytest.mark.parametrize("jobs", [1, 3])
def test_interrupted_it_exits_130_and_leaves_everything_resumable(models, listed, tmp_path, jobs):
    process = start("batch", listed, "--out-dir", "out", "--jobs", jobs)
    outcome = stop_when(process, lambda: len(list((tmp_path / "out").glob("*"))) > 4, signal.SIGINT)
    assert outcome.code == 130, outcome.err
    assert "error: interrupted; run the same command again to continue" in outcome.err
    assert "Traceback" not in outcome.err
    assert run_process("batch", listed, "--out-dir", "out").code == 1
    check_outputs(models, tmp_path / "out")


def test_a_torn_last_line_is_removed_and_its_item_done_again(two):
    record = Path("record.jsonl")
    whole = record.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 200, len(whole) - 1):
        record.write_bytes(whole[:end])
        result = two()
        assert [item.earlier for item in result.items] == [True, False]
        assert len(lines(record)) == 2
        assert record.read_bytes().startswith(whole[:first])


def test_a_file_that_is_no_record_is_refused_and_left_alone(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Path("record.jsonl")
    good = json.dumps({"version": 1, **ItemResult("a", "b", "done", 0).document()})
    coded = good.replace("[]", '[{"file": "", "tensor": "", "code": "of-a-newer-version", "message": ""}]')
    newer = good.replace('"version": 1', '"version": 2')
    for bad in ("not mine", "[]", "{}", newer, coded, good.replace("[]", '["x"]')):
        record.write_text(f"{bad}\n")
        with pytest.raises(BatchError, match=r"line 1 is not a batch record") as caught:
            convert_many(models.sources[:1], record=record)
        assert caught.value.problems[0].code == "bad-record"
        assert record.read_text() == f"{bad}\n"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "record.jsonl"]


def test_a_record_of_the_code_that_batch_used_to_write_is_read(tmp_path):
    document = ItemResult("a", "b", "failed", 1, (Problem("", "", "unexpected-error", "a defect"),)).document()
    del document["earlier"]
    (tmp_path / "record.jsonl").write_text(json.dumps({"version": 1, **document}) + "\n")
    assert read_record(tmp_path / "record.jsonl")["b"].errors[0].code == "unexpected-error"


def test_the_same_batch_twice_at_once_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_record(Path("record.jsonl")), pytest.raises(OutputError, match="another process is running this batch"):
        convert_many(models.sources[:1], record="record.jsonl")
    assert convert_many(models.sources[:1], record="record.jsonl").exit_code == 0


def test_a_full_disk_under_the_record_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "record.jsonl"
    with open_record(path) as record:
        record.append(ItemResult("a", "b", "done", 0))
        with monkeypatch.context() as patch:
            patch.setattr(batch_record.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(OSError, match="full"):
                record.append(ItemResult("a", "c", "done", 0))
        record.append(ItemResult("a", "d", "done", 0))
    assert sorted(read_record(path)) == ["b", "d"]


# --- executors --------------------------------------------------------------------------------------------


def _die_once(marker, task):
    """Converts a shard; the first time a certain one comes, kills the process in mid-file."""

    def die(_count):
        if task.source.parent.name == "model-02" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return rewrite_shard(task, die)


def test_processes_do_the_shards_and_a_killed_one_stops_the_batch_which_then_resumes(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_die_once, tmp_path / "died"))
    sources = [*models.sources[:3], *models.sources[4:6]]
    go = partial(convert_many, sources, out_dir="out", record="record.jsonl")
    context = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool, pytest.raises(ExecutorError) as caught:
        go(executor=pool)
    assert caught.value.problems[0].code == "broken-executor"
    assert "run the same command again to continue" in str(caught.value)
    assert [line["status"] for line in lines("record.jsonl")] == ["done", "done"], "no item counts as failed"
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        result = go(executor=pool, jobs=2)
    assert [item.earlier for item in result.items] == [True, True, False, False, False]
    names = [source.name for source in sources]
    check = {name: models.expected[name] for name in names}
    assert {path.name.removesuffix("-marlin"): contents(path) for path in Path("out").iterdir()} == check


def test_threads_are_shared_among_the_jobs(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    convert = batch_item.convert

    def watched(*arguments, **options):
        seen.append(options["workers"])
        return convert(*arguments, **options)

    monkeypatch.setattr(batch_item, "convert", watched)
    convert_many([{"source": models.sources[0], "workers": 2}, *models.sources[1:3]], jobs=3, workers=8)
    assert sorted(seen) == [2, 2, 2]
    seen.clear()
    convert_many(models.sources[4:6], jobs=16, workers=9)
    assert seen == [4, 4]
    seen.clear()
    convert_many(models.sources[6:7], jobs=2, workers=5)
    assert seen == [5]


def test_a_defect_in_one_item_stops_no_other_and_is_told(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert = batch_item.convert

    def broken(source, *arguments, **options):
        if source.endswith("model-01"):
            raise ZeroDivisionError("a defect")
        return convert(source, *arguments, **options)

    monkeypatch.setattr(batch_item, "convert", broken)
    result = convert_many(models.sources[:3], jobs=2)
    assert [item.status for item in result.items] == ["done", "failed", "done"]
    (problem,) = result.items[1].errors
    assert problem.code == "unexpected-error"  # as in records of version 0.1
    assert "ZeroDivisionError: a defect" in problem.message


def test_progress_is_told_of_every_item(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    lock = threading.Lock()

    class Item:
        def __init__(self, source):
            self.source = Path(source).name
            self.stages = {}

        def start(self, what, total):
            self.what = what
            self.stages[what] = [0, total]

        def advance(self, count):
            with lock:
                self.stages[self.what][0] += count

        def finish(self):
            done, total = self.stages[self.what]
            assert done == total

        def note(self, text):
            raise AssertionError(text)

    class Told:
        def start(self, total, earlier):
            told.append(("start", total, len(earlier)))

        def item(self, source, output):
            assert output.endswith("-marlin")
            return Item(source)

        def done(self, result):
            told.append((Path(result.source).name, result.status))

        def finish(self):
            told.append("finish")

    convert_many([models.sources[0], models.sources[3]], jobs=2, progress=Told())
    assert told[0] == ("start", 2, 0)
    assert sorted(told[1:-1]) == [("model-00", "done"), ("model-03", "failed")]
    assert told[-1] == "finish"
