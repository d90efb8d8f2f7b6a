"""What version 0.1 wrote is verified, reverted, resumed, and written again byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import awq2marlin
from awq2marlin import CheckpointError, convert, convert_many, inspect, revert, verify
from awq2marlin.io.strict_json import encode_json

from .helpers import (
    COMMIT,
    DATA,
    FIRST,
    MANIFEST,
    REPOSITORY,
    SECOND,
    VERSION,
    WORK,
    add_repository,
    contents,
    copy_fixture,
    hashes,
    spoil,
    stage_batch,
    tensors,
)

LAYER = "model.layers.0"
ALIGNED = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")
ATTENTION = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "koqv")

#: Checkpoint, its conversion, the options that gave it, and the modules that it has in the Marlin layout.
CONVERSIONS = [
    ("llama", "marlin", {}, (*ALIGNED, ATTENTION[1])),
    ("llama", "padded", {"unaligned": "pad"}, (f"{LAYER}.mlp.down_proj", *ALIGNED, *ATTENTION)),
    ("eight_bits", "marlin", {}, ALIGNED),
    ("no_zero_points", "marlin", {}, ALIGNED),
]
CARD = "README.md"
LEFT_BEHIND = {"llama": {"pytorch_model.bin": "pickled weights"}}

each_conversion = pytest.mark.parametrize(
    ("name", "conversion", "options", "modules"), CONVERSIONS, ids=[f"{name}_{kind}" for name, kind, *_ in CONVERSIONS]
)


def written(name):
    """The files of a stored conversion without its card; what names the version of the program names today's."""
    files = contents(DATA / name)
    stored, today = (f'"version": "{version}"'.encode() for version in (VERSION, awq2marlin.__version__))
    assert files[MANIFEST].count(stored) == 1
    return {file: data.replace(stored, today) for file, data in files.items() if file != CARD}


def converted(folder, name):
    """The files of a conversion of today without its card, which is for people: its front matter, and the source's own
    text in it, are those of then, and it names what was left behind; and without what stops Transformers in its config.
    """
    files = contents(folder)
    config = json.loads(files["config.json"])
    assert config.pop("transformers_weights").startswith("marlin_native: ")
    files["config.json"] = encode_json(config)
    now, then = (card.decode() for card in (files.pop(CARD), (DATA / name / CARD).read_bytes()))
    assert now.split("---\n")[1] == then.split("---\n")[1]
    own = " checkpoint.*\n\n"  # ends the sentence that heads the source's card
    assert now.partition(own)[1:] == then.partition(own)[1:]
    left = json.loads(files[MANIFEST])["left_behind"]
    assert [name for name in left if f"* `{name}`: " not in now] == []
    return files


def restored(name):
    """The files of a stored checkpoint that its conversion carries over or keeps."""
    return {
        file: data for file, data in contents(DATA / name / "source").items() if file not in LEFT_BEHIND.get(name, {})
    }


def identity(path):
    """What changes when a file is written anew."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def run(*arguments):
    """Runs the command line; returns its exit code and its JSON object."""
    environment = {**os.environ, "PYTHONPATH": str(Path(awq2marlin.__file__).parents[1])}
    line = [sys.executable, "-m", "awq2marlin", *map(str, arguments), "--quiet", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout)


# --- finished conversions ------------------------------------------------------------------------------------------


@each_conversion
def test_converting_again_gives_the_same_bytes(name, conversion, options, modules, tmp_path):
    result = convert(DATA / name / "source", tmp_path / "out", **options)
    assert tuple(module.name for module in result.converted) == modules
    assert converted(tmp_path / "out", f"{name}/{conversion}") == written(f"{name}/{conversion}")


@each_conversion
def test_a_conversion_of_then_equals_its_source(name, conversion, options, modules):  # noqa: ARG001
    result = verify(DATA / name / "source", DATA / name / conversion)
    assert tuple(module.name for module in result.modules) == modules
    assert result.modules_total == len(modules)


@each_conversion
def test_a_conversion_of_then_gives_its_source_back_byte_for_byte(name, conversion, options, modules, tmp_path):  # noqa: ARG001
    result = revert(DATA / name / conversion, tmp_path / "back")
    assert contents(tmp_path / "back") == restored(name)
    assert {file.name: file.sha256 for file in result.files} == hashes(tmp_path / "back")
    assert (result.restores, result.left_behind) == ("files", LEFT_BEHIND.get(name, {}))


@each_conversion
def test_inspection_reads_a_conversion_of_then(name, conversion, options, modules):  # noqa: ARG001
    found, source = inspect(DATA / name / conversion), inspect(DATA / name / "source")
    assert (source.format, found.format) == ("awq", "marlin_native")
    quantizations = {"llama": (4, 64, True), "eight_bits": (8, 128, True), "no_zero_points": (4, -1, False)}
    assert (found.bits, found.group_size, found.zero_point) == quantizations[name]
    assert (source.bits, source.group_size, source.zero_point) == quantizations[name]
    assert tuple(module.name for module in found.modules if module.layout == "marlin") == modules
    sizes = [(module.name, module.size_k, module.size_n) for module in found.modules]
    assert sizes == [(module.name, module.size_k, module.size_n) for module in source.modules]


def test_inspection_tells_which_modules_were_padded_then():
    padded = {module.name: module.padded for module in inspect(DATA / "llama" / "padded").modules if module.padded}
    assert padded == {f"{LAYER}.mlp.down_proj": (128, 64), f"{LAYER}.self_attn.v_proj": (128, 64)}


@pytest.mark.parametrize("file", [FIRST, SECOND, "tokenizer.json"])
def test_a_byte_that_changed_since_then_is_found(file, tmp_path):
    changed = copy_fixture("llama/marlin", tmp_path / "changed")
    spoil(changed / file)
    with pytest.raises(awq2marlin.DifferenceError) as found:
        verify(DATA / "llama" / "source", changed)
    assert {problem.file for problem in found.value.problems} == {file}
    with pytest.raises(awq2marlin.DifferenceError) as refused:
        revert(changed, tmp_path / "back")
    assert [(problem.file, problem.code) for problem in refused.value.problems] == [(file, "wrong-digest")]
    assert not (tmp_path / "back" / "config.json").exists()


def test_overwrite_replaces_a_conversion_of_then_and_nothing_else(tmp_path):
    out = copy_fixture("llama/padded", tmp_path / "out")
    (out / "mine.txt").write_bytes(b"not the converter's")
    with pytest.raises(awq2marlin.OutputError, match="the folder holds a finished conversion"):
        convert(DATA / "eight_bits" / "source", out)
    convert(DATA / "eight_bits" / "source", out, overwrite=True)
    assert converted(out, "eight_bits/marlin") == written("eight_bits/marlin") | {"mine.txt": b"not the converter's"}


def test_what_transformers_saved_then_gives_the_tensors_back(tmp_path):
    source, saved, back = DATA / "llama" / "source", DATA / "llama" / "saved", tmp_path / "back"
    assert inspect(saved).format == "marlin_native"
    assert verify(source, saved).modules_total == 3
    result = revert(saved, back)
    assert result.restores == "tensors"
    assert tensors(back) == tensors(source)
    assert hashes(back) == json.loads((DATA / "llama" / "saved_reverted.json").read_text("utf-8"))
    assert inspect(back).modules == inspect(source).modules


def test_zero_points_that_the_config_denies_stay_parts_of_a_conversion_of_then(tmp_path):
    source, marlin = (DATA / "denied_zero_points" / name for name in ("source", "marlin"))
    assert verify(source, marlin).modules_total == 1
    assert {module.parts for module in inspect(marlin).modules} == {("qweight", "qzeros", "scales")}
    revert(marlin, tmp_path / "back")
    assert contents(tmp_path / "back") == restored("denied_zero_points")
    with pytest.raises(CheckpointError, match="the config says that there are no zero points"):
        convert(marlin, tmp_path / "ct", to="compressed-tensors")  # its readers would go by the config
    assert not (tmp_path / "ct").exists()
    convert(marlin, tmp_path / "awq", to="awq")
    revert(tmp_path / "awq", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(marlin)
    with pytest.raises(CheckpointError, match="these are not all in the middle"):
        convert(source, tmp_path / "out")  # today they have to be what the config says
    assert not (tmp_path / "out" / "config.json").exists()


# --- unfinished work -----------------------------------------------------------------------------------------------


def test_a_conversion_killed_then_is_resumed_and_ends_with_the_same_bytes(tmp_path):
    out = copy_fixture("llama/killed_convert", tmp_path / "out")
    before = identity(out / FIRST)
    result = convert(DATA / "llama" / "source", out)
    assert result.resumed == (FIRST,)
    assert identity(out / FIRST) == before
    assert converted(out, "llama/marlin") == written("llama/marlin")
    assert not (out / WORK).exists()


def test_a_shard_of_then_that_was_damaged_is_made_again(tmp_path):
    out = copy_fixture("llama/killed_convert", tmp_path / "out")
    spoil(out / FIRST)
    assert convert(DATA / "llama" / "source", out).resumed == ()
    assert converted(out, "llama/marlin") == written("llama/marlin")


def test_a_conversion_killed_then_is_not_resumed_with_other_options(tmp_path):
    out = copy_fixture("llama/killed_convert", tmp_path / "out")
    with pytest.raises(awq2marlin.OutputError) as refused:
        convert(DATA / "llama" / "source", out, unaligned="pad")
    assert [problem.code for problem in refused.value.problems] == ["other-plan"]
    convert(DATA / "llama" / "source", out, unaligned="pad", overwrite=True)
    assert converted(out, "llama/padded") == written("llama/padded")


def test_a_reversion_killed_then_is_resumed_and_ends_with_the_same_bytes(tmp_path):
    out = copy_fixture("llama/killed_revert", tmp_path / "out")
    before = identity(out / FIRST)
    result = revert(DATA / "llama" / "marlin", out)
    assert identity(out / FIRST) == before
    assert contents(out) == restored("llama")
    assert {file.name: file.sha256 for file in result.files} == hashes(out)
    assert not (out / WORK).exists()


# --- the Hub -------------------------------------------------------------------------------------------------------


def test_converting_the_same_commit_again_gives_the_same_bytes(hub, tmp_path):
    add_repository(hub)
    convert(REPOSITORY, tmp_path / "out")
    assert converted(tmp_path / "out", "hub/marlin") == written("hub/marlin")
    assert verify(f"{REPOSITORY}@{COMMIT}", DATA / "hub" / "marlin").modules_total == 2


def test_a_conversion_of_a_repository_gives_its_files_back(tmp_path):
    result = revert(DATA / "hub" / "marlin", tmp_path / "back")
    assert (result.restores, contents(tmp_path / "back")) == ("files", restored("no_zero_points"))


def test_a_conversion_with_little_disk_killed_then_goes_on_with_the_commit_it_began_with(hub, tmp_path):
    add_repository(hub).add({"config.json": b"{}"})
    out = copy_fixture("hub/killed_low_disk", tmp_path / "out")
    before = identity(out / FIRST)
    result = convert(REPOSITORY, out, low_disk=True)
    assert (result.source, result.resumed) == (f"{REPOSITORY}@{COMMIT}", (FIRST,))
    assert identity(out / FIRST) == before
    assert not [each for each in hub.requests("GET", f"/cdn/*{FIRST}") if not each.range]
    assert converted(out, "hub/marlin") == written("hub/marlin")


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_of_then_leaves_alone_what_is_done_and_what_failed(tmp_path):
    listed = stage_batch(tmp_path)
    before = contents(tmp_path)
    result = convert_many(listed, out_dir=tmp_path / "out")
    done, failed = result.items
    assert (result.record, result.exit_code) == (tmp_path / "list.jsonl.record.jsonl", 1)
    assert [item.earlier for item in result.items] == [True, True]
    assert (done.source, done.output) == (
        str(tmp_path / "sources/eight_bits"),
        str(tmp_path / "out" / "eight_bits-marlin"),
    )
    assert (done.status, done.bytes, done.converted, done.verified) == ("done", 17728, 2, 2)
    assert (done.tool_version, done.finished_at, done.seconds) == (VERSION, "2026-01-01T00:00:00+00:00", 0.125)
    assert (failed.status, [error.code for error in failed.errors]) == ("failed", ["not-found"])
    assert contents(tmp_path) == before


def test_a_batch_of_then_tries_again_what_failed_if_it_is_told_to(tmp_path):
    listed = stage_batch(tmp_path)
    record = tmp_path / "list.jsonl.record.jsonl"
    before = record.read_bytes()
    kept = identity(tmp_path / "out" / "eight_bits-marlin" / "config.json")
    shutil.copytree(DATA / "no_zero_points" / "source", tmp_path / "sources" / "late")
    result = convert_many(listed, out_dir=tmp_path / "out", retry_failed=True)
    assert [(item.status, item.earlier) for item in result.items] == [("done", True), ("done", False)]
    assert converted(tmp_path / "out" / "late-marlin", "no_zero_points/marlin") == written("no_zero_points/marlin")
    assert identity(tmp_path / "out" / "eight_bits-marlin" / "config.json") == kept
    assert record.read_bytes().startswith(before)
    (line,) = record.read_bytes()[len(before) :].splitlines()
    recorded = json.loads(line)
    assert (recorded["status"], recorded["errors"], recorded["version"]) == ("done", [], 1)
    assert recorded.keys() == json.loads(before.splitlines()[0]).keys()


def test_a_batch_whose_record_is_gone_takes_what_was_converted_then(tmp_path):
    listed = stage_batch(tmp_path)
    (tmp_path / "list.jsonl.record.jsonl").unlink()
    kept = identity(tmp_path / "out" / "eight_bits-marlin" / "config.json")
    done, _ = convert_many(listed, out_dir=tmp_path / "out").items
    assert (done.status, done.verified) == ("done", 2)
    assert identity(tmp_path / "out" / "eight_bits-marlin" / "config.json") == kept


def test_a_batch_of_then_converts_again_what_is_gone_since(tmp_path):
    listed = stage_batch(tmp_path)
    shutil.rmtree(tmp_path / "out" / "eight_bits-marlin")
    result = convert_many(listed, out_dir=tmp_path / "out")
    assert [(item.status, item.earlier) for item in result.items] == [("done", False), ("failed", True)]
    assert converted(tmp_path / "out" / "eight_bits-marlin", "eight_bits/marlin") == written("eight_bits/marlin")


# --- the same on the command line ----------------------------------------------------------------------------------


def test_the_command_line_resumes_verifies_inspects_and_reverts_what_was_begun_then(tmp_path):
    source, out = DATA / "llama" / "source", copy_fixture("llama/killed_convert", tmp_path / "out")
    code, told = run("convert", source, out)
    assert (code, told["details"]["resumed"], converted(out, "llama/marlin")) == (
        0,
        [FIRST],
        written("llama/marlin"),
    )
    code, compared = run("verify", source, DATA / "llama" / "marlin")
    assert (code, compared["details"]["modules_verified"], compared["details"]["side_files"]) == (0, 3, 4)
    code, found = run("inspect", DATA / "llama" / "padded")
    assert (code, found["details"]["format"], found["bytes"]) == (0, "marlin_native", 44600)
    back = copy_fixture("llama/killed_revert", tmp_path / "back")
    code, reverted = run("revert", DATA / "llama" / "marlin", back)
    assert (code, contents(back)) == (0, restored("llama"))
    assert {file["name"]: file["sha256"] for file in reverted["files"]} == hashes(back)


def test_the_command_line_does_only_what_a_batch_of_then_has_left(tmp_path):
    listed = stage_batch(tmp_path)
    before = contents(tmp_path)
    code, report = run("batch", listed, "--out-dir", tmp_path / "out")
    assert (code, report["details"]["earlier"], contents(tmp_path)) == (1, 2, before)
    code, report = run("batch", listed, "--out-dir", tmp_path / "out", "--retry-failed")
    assert (code, [item["earlier"] for item in report["details"]["items"]]) == (1, [True, False])
    assert [error["code"] for error in report["errors"]] == ["not-found"]
