"""Indexes that name what they should not, and file names that nobody should follow."""

from __future__ import annotations

import io
import json

import pytest

from awq2marlin import CheckpointError, convert, inspect, revert
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.cli.app import main
from awq2marlin.errors import Awq2MarlinError, Problem
from awq2marlin.io.folder import is_plain_name
from tests.hostile.hostile_files import INDEX, MODULE, NASTY, SHARD, pack_tensors, tree, unpack_tensors, write_awq

UNSAFE_NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "//host/share/model.safetensors",
    "../model.safetensors",
    "a/../../model.safetensors",
    "a/..",
    "./model.safetensors",
    "a//model.safetensors",
    "a/",
    "a/./model.safetensors",
    "..\\model.safetensors",
    "a\\model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "C:\\model.safetensors",
    "C:/model.safetensors",
    "C:model.safetensors",
    "model.safetensors:stream",
    "model\0.safetensors",
    "model\n.safetensors",
    "model\x1b[31m.safetensors",
    "model\u202e.safetensors",
    "model\ud800.safetensors",
    ".model.safetensors",
    ".awq2marlin/model.safetensors",
    ".AWQ2MARLIN/journal.json",
    "a/.git/model.safetensors",
    "x" * 1025,
]


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=ascii)
def test_an_index_names_only_plain_relative_paths(awq, tmp_path, run, name: str) -> None:
    assert not is_plain_name(name)
    weight_map = dict.fromkeys(unpack_tensors(awq / SHARD), SHARD)
    weight_map[f"{MODULE}.qweight"] = name
    (awq / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    before = tree(tmp_path)
    outcome = run("convert", awq, tmp_path / "out")
    outcome.refused("unsafe-name", "only plain relative paths inside the folder", file=INDEX)
    assert len(outcome.err) < 1000
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "a/b.safetensors", "a..b", "…", "模型.safetensors", "a b"])
def test_plain_names_are_taken(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("value", [None, True, 0, 1.5, [], {}, [SHARD], {"file": SHARD}, [["x"] * 1000]], ids=str)
def test_an_index_names_strings(awq, tmp_path, run, value: object) -> None:
    (awq / INDEX).write_text(json.dumps({"weight_map": {f"{MODULE}.qweight": value}}))
    run("convert", awq, tmp_path / "out").refused("unsafe-name", "it names", file=INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors.bin", "config.json", "model"])
def test_an_index_names_only_safetensors(awq, tmp_path, run, name: str) -> None:
    (awq / INDEX).write_text(json.dumps({"weight_map": {f"{MODULE}.qweight": name}}))
    run("convert", awq, tmp_path / "out").refused("pickled-weights", name, "only .safetensors", file=INDEX)


@pytest.mark.parametrize(
    "document", [None, [], "x", 1, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}]
)
def test_an_index_is_an_object_with_a_map(awq, run, document: object) -> None:
    (awq / INDEX).write_text(json.dumps(document))
    run("inspect", awq).refused("bad-index", "weight_map", file=INDEX)
    run("inspect", awq).refused("bad-index", f"ignore the index: --leave {INDEX}", file=INDEX)


MALFORMED = {
    "empty": (b"", "bad-json"),
    "cut": (b'{"weight_map": {"a": "b', "bad-json"),
    "binary": (b"\x80\x02}q\x00.", "bad-json"),
    "UTF-16": ('{"weight_map": {}}'.encode("utf-16"), "bad-json"),
    "trailing": (b'{"weight_map": {"a": "model.safetensors"}} x', "bad-json"),
    "NaN": (b'{"weight_map": {"a": NaN}}', "bad-json"),
    "duplicate tensor": (b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', "duplicate-key"),
    "duplicate map": (b'{"weight_map": {}, "weight_map": {}}', "duplicate-key"),
    "deep": (b'{"weight_map":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", "bad-json"),
    "deep metadata": (b'{"metadata":' + b"[" * 300 + b"]" * 300 + b',"weight_map": {"a": "b"}}', "bad-json"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_index_is_refused(awq, run, name: str) -> None:
    content, code = MALFORMED[name]
    (awq / INDEX).write_bytes(content)
    run("inspect", awq).refused(code, file=INDEX)


def test_a_file_that_the_index_names_must_be_there(awq, tmp_path, run) -> None:
    (awq / INDEX).write_text(json.dumps({"weight_map": {f"{MODULE}.qweight": "gone.safetensors"}}))
    run("convert", awq, tmp_path / "out").refused(
        "missing-file", "the index lists this file", "download it", file="gone.safetensors"
    )
    assert not (tmp_path / "out").exists()


def _two_shards(folder) -> dict[str, str]:
    write_awq(folder, shards=2)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_tensors_must_lie_where_the_index_says(tmp_path, run) -> None:
    folder = tmp_path / "awq"
    weight_map = _two_shards(folder)
    first, second = sorted(set(weight_map.values()))
    moved = next(name for name, shard in weight_map.items() if shard == first)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, moved: second}}))
    outcome = run("convert", folder, tmp_path / "out")
    assert outcome.code == 1
    assert {(error["code"], error["file"], error["tensor"]) for error in outcome.report["errors"]} == {
        ("contradiction", first, moved),
        ("missing-tensor", second, moved),
    }
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_all_named_sorted_and_capped(awq, run) -> None:
    weight_map = dict.fromkeys([*unpack_tensors(awq / SHARD), *(f"gone{i:03}" for i in range(100))], SHARD)
    (awq / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    outcome = run("inspect", awq)
    outcome.refused("missing-tensor", "100 problems", "gone000: the index says", "... and 80 more", file=SHARD)
    assert [error["tensor"] for error in outcome.report["errors"]] == [f"gone{i:03}" for i in range(100)]


def test_tensors_of_many_layers_that_are_missing_are_told_in_one_line(awq, run) -> None:
    weight_map = dict.fromkeys([*unpack_tensors(awq / SHARD), *(f"layers.{i}.gone" for i in range(100))], SHARD)
    (awq / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    outcome = run("inspect", awq)
    outcome.refused("missing-tensor", "100 problems", f"{SHARD}: layers.*.gone: the index says", " (100 of them)")
    assert len(outcome.err.splitlines()) == 2
    assert len(outcome.report["errors"]) == 100


def test_a_tensor_in_two_shards_is_refused_unless_the_index_says_which_counts(tmp_path, run) -> None:
    folder = tmp_path / "awq"
    weight_map = _two_shards(folder)
    first, second = sorted(set(weight_map.values()))
    twice = next(name for name, shard in weight_map.items() if shard == first)
    both = {twice: unpack_tensors(folder / first)[twice], **unpack_tensors(folder / second)}
    (folder / second).write_bytes(pack_tensors(both))
    assert run("inspect", folder).code == 0
    del weight_map[twice]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    outcome = run("inspect", folder)
    assert outcome.code == 1
    assert "duplicate-tensor" in outcome.codes
    assert f"{second}: {twice}: {first} also holds a tensor of this name" in outcome.err


def test_a_tensor_that_the_index_forgets_is_noted(tmp_path) -> None:
    folder = tmp_path / "awq"
    weight_map = _two_shards(folder)
    del weight_map["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(folder).warnings == ("1 tensors are missing from the index; the first is model.norm.weight",)


def test_a_huge_index_of_one_entry_each_is_refused_in_time(awq, run) -> None:
    (awq / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": "gone.safetensors" for i in range(50_000)}}))
    run("inspect", awq).refused("missing-file", file="gone.safetensors")


def test_a_single_file_of_an_unsafe_name_is_refused(awq, tmp_path, run) -> None:
    (awq / SHARD).rename(awq / "evil\x1b[2J\n.safetensors")
    run("convert", awq, tmp_path / "out").refused("unsafe-name", r"evil\x1b[2J\n.safetensors")
    assert not (tmp_path / "out").exists()


HARMLESS_NAMES = [
    "Bildschirmfoto 2026-05-01 um 10.11.12\u202fPM.png",
    "no\u00a0break.txt",
    "全角\u3000スペース.txt",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
    "figures: loss.png",
    "what?.md",
    "soft\u00adhyphen",
    "assets/\ufeffbom.txt",
    "LICENSE",
    "license",
]


def test_side_files_of_harmless_names_are_carried_shown_escaped_and_given_back(awq, tmp_path, run, say) -> None:
    (awq / "assets").mkdir()
    for name in HARMLESS_NAMES:
        (awq / name).write_text(name)
    out, back = tmp_path / "out", tmp_path / "back"
    report = run("convert", awq, out).report
    assert set(HARMLESS_NAMES) <= set(report["details"]["side_files"])
    assert report["warnings"] == []
    assert run("verify", awq, out).code == 0
    code, said = say("revert", out, back)
    assert code == 0
    assert r"12\u202fPM.png" in said
    assert tree(back) == tree(awq)


@pytest.mark.parametrize(
    "name", ["evil\x1b[31m.txt", "a\nb.py", "\u202etxt.py", "a\u2067b", "\u200emark", "line\u2028", "\x9b2J"], ids=ascii
)
def test_a_side_file_of_a_hostile_name_is_refused(awq, tmp_path, run, name: str) -> None:
    (awq / name).write_text("x")
    run("convert", awq, tmp_path / "out").refused("unsafe-name", "rename or remove it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["back\\slash", "\udcff.json", "c:d.txt", "assets\\logo.png"], ids=ascii)
def test_a_name_that_means_something_else_elsewhere_is_left_behind_with_a_warning(awq, tmp_path, run, name) -> None:
    (awq / name).write_text("x")
    report = run("convert", awq, tmp_path / "out").report
    assert report["left_behind"] == {name: "its name means something else on other systems"}
    (warning,) = report["warnings"]
    assert warning.endswith("rename it in a copy of the source")
    assert run("verify", awq, tmp_path / "out").code == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0


def test_another_file_where_the_card_goes_is_refused(awq, tmp_path, run) -> None:
    (awq / "readme.md").write_text("another")
    run("convert", awq, tmp_path / "out").refused("unsafe-name", "README.md", "differ only", file="readme.md")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Marlin_Manifest.JSON", "CONFIG.json", "Quant_Config.json", "folder"])
def test_a_file_where_ours_goes_on_other_systems_is_refused(awq, run, kind: str) -> None:
    if kind == "folder":
        (awq / "readme.md").mkdir()
        (awq / "readme.md/x").write_text("x")
    else:
        (awq / kind).write_text("x")
    run("inspect", awq).refused("unsafe-name")


def test_names_that_look_odd_come_back_byte_for_byte(awq, tmp_path) -> None:
    for name in ("a b", "模型.txt", "é", "[bold]x[/].md", "a+b", "%41", "~", "$HOME", "-rf", "sub/deep/x"):
        (awq / name).parent.mkdir(parents=True, exist_ok=True)
        (awq / name).write_text(name)
    convert(awq, tmp_path / "out", workers=1)
    revert(tmp_path / "out", tmp_path / "back", workers=1)
    assert tree(tmp_path / "back") == tree(awq)


def test_odd_tensor_names_are_converted_and_shown_escaped(tmp_path, run, say) -> None:
    name = NASTY.replace("\ud800", "") + ".proj"
    folder = write_awq(tmp_path / "awq", modules={name: (128, 64), "": (128, 64)})
    for command in (["convert", folder, tmp_path / "out", "--dry-run"], ["inspect", folder]):
        code, text = say(*command)
        assert code == 0
        assert r"\x1b[31m" in text
    assert {module["name"] for module in run("convert", folder, tmp_path / "out").report["modules"]} == {name, ""}
    for command in (["inspect", tmp_path / "out"], ["verify", folder, tmp_path / "out"]):
        assert run(*command).code == 0
        assert say(*command)[0] == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0
    assert tree(tmp_path / "back") == tree(folder)


def test_the_error_from_python_is_the_same(awq) -> None:
    (awq / INDEX).write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(CheckpointError, match="only plain relative paths") as caught:
        inspect(awq)
    assert caught.value.problems[0].file == INDEX


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_encode_are_escaped(tmp_path, monkeypatch, encoding: str) -> None:
    awq = write_awq(tmp_path / "awq", modules={"模型.proj": (128, 64)})
    for name in ("模型.txt", "pytorch_model-模型.bin"):
        (awq / name).write_text("x")
    for command in (
        ["inspect", awq],
        ["convert", awq, tmp_path / "out"],
        ["revert", tmp_path / "out", tmp_path / "back"],
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stream)
        assert main([*map(str, command)]) == 0
        stream.flush()
        assert rb"\u6a21\u578b." in stream.buffer.getvalue()


def test_module_names_inside_a_message_are_escaped(tmp_path, run, say) -> None:
    name = NASTY.replace("\ud800", "")
    awq = write_awq(tmp_path / "awq", modules={f"{name}.q_proj": (128, 48), f"{name}.k_proj": (128, 64)})
    command = ["convert", awq, tmp_path / "out", "--unaligned", "error"]
    run(*command).refused("unaligned", r"x\x1b[31m", "use --unaligned keep or pad")
    assert say(*command)[0] == 1


def test_every_line_of_an_error_is_printable() -> None:
    problem = Problem(NASTY, NASTY, "unsafe-name", NASTY)
    assert str(problem).isprintable()
    assert len(str(Awq2MarlinError([problem] * 30)).splitlines()) == 21


def test_an_index_of_a_very_large_model_is_read_kept_and_given_back(tmp_path, run) -> None:
    """As of 300,000 tensors; padding changes it, so its text is kept in the manifest."""
    awq, out, back = tmp_path / "awq", tmp_path / "out", tmp_path / "back"
    write_awq(awq, modules={"a.proj": (128, 48)}, shards=2)
    text = (awq / INDEX).read_bytes() + b" " * 33_000_000
    (awq / INDEX).write_bytes(text)
    assert run("convert", awq, out, "--unaligned", "pad").code == 0
    assert run("verify", awq, out).code == 0
    assert run("revert", out, back).code == 0
    assert (back / INDEX).read_bytes() == text


def test_an_index_that_is_too_large_is_refused_with_what_to_do(tmp_path, run) -> None:
    awq = write_awq(tmp_path / "awq", shards=2)
    with (awq / INDEX).open("r+b") as stream:
        stream.truncate(256_000_001)
    for command in (["inspect", awq], ["convert", awq, tmp_path / "out"]):
        run(*command).refused("too-large", "256000001 bytes", "download it again, or shorten it in a copy", file=INDEX)
