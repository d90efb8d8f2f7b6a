"""Which files are the checkpoint, which are carried over unopened, which are left behind: what real folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, convert, convert_many, inspect, revert, verify
from awq2marlin.checkpoint.choice import Choice, matches
from awq2marlin.cli.app import main
from awq2marlin.errors import size_text
from awq2marlin.pipeline.plan import plan_conversion
from tests.hostile.hostile_files import INDEX, MANIFEST, SHARD, pack_tensors, tree, unpack_tensors, write_awq, zeros

ADAPTER = pack_tensors({"lora_A.weight": zeros("F16", 4, 4)})

#: What models need, though its name looks like weights in another form; none of it is opened, so anything will do.
NEEDED = {
    "spk_dict.pt": b"cos\nsystem\n",
    "token2wav/vocoder.pth": b"\x80\x02",
    "assets/table.bin": bytes(range(256)),
    "2_Dense/model.safetensors": b"not even one",
    "2_Dense/pytorch_model.bin": b"\x80\x02",
    "adapter/adapter_model.safetensors": ADAPTER,
    "tokenizer/model.safetensors": b"",
    "x.pkl": b"\x80\x04.",
    "voices.safetensors.index.json": b"{}",
    "ggml.bin": b"GGUF",
}
LEFT = {
    "pytorch_model-00001-of-00002.bin": "pickled weights",
    "pytorch_model.bin.index.json": "pickled weights",
    "consolidated.safetensors": "the same weights in another form",
    "original/consolidated.00.pth": "the same weights in another form",
    "tf_model.h5": "the same weights in another form",
    "flax_model.msgpack": "the same weights in another form",
    "optimizer.pt": "left over from training",
    "checkpoint-5/scheduler.pt": "left over from training",
    "training_args.bin": "left over from training",
    "rng_state_0.pth": "left over from training",
    ".gitattributes": "hidden",
}


def add(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def files_of(folder: Path) -> dict[str, Any]:
    return {name: data for name, data in tree(folder).items() if data != "folder"}


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Runs a command with --json: exit code, its object, what it said on standard error."""
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def split(folder: Path, *names: str) -> None:
    """Deals the tensors of the only shard out to files of the given names, in order; there is no index."""
    tensors = [*unpack_tensors(folder / SHARD).items()]
    (folder / SHARD).unlink()
    for number, name in enumerate(names):
        (folder / name).write_bytes(pack_tensors(dict(tensors[number :: len(names)]), {"format": "pt"}))


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return write_awq(tmp_path / "awq")


# --- carried over, left behind -------------------------------------------------------------------------------------


def test_every_file_that_a_model_may_need_comes_along_and_back(awq: Path, tmp_path: Path) -> None:
    add(awq, NEEDED)
    result = convert(awq, tmp_path / "out")
    assert (dict(result.left_behind), result.warnings) == ({}, ())
    assert {name: len(data) for name, data in NEEDED.items()}.items() <= result.files.items()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in NEEDED} == NEEDED
    assert verify(awq, tmp_path / "out").files == len(result.files)
    assert "What to know about the source" not in (tmp_path / "out" / "README.md").read_text()
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


def test_large_files_that_are_carried_over_are_a_stage(awq: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from awq2marlin.pipeline import run
    from awq2marlin.progress import Silence

    class Heard(Silence):
        stages: list[list[Any]] = []  # noqa: RUF012

        def start(self, what: str, total: int) -> None:
            self.stages.append([what, total, 0])

        def advance(self, count: int) -> None:
            self.stages[-1][2] += count

    add(awq, {"table.bin": bytes(5_000_000)})
    monkeypatch.setattr(run, "LARGE_BYTES", 5_000_000)
    convert(awq, tmp_path / "out", verify="none", progress=Heard())
    assert [what for what, _, _ in Heard.stages] == ["convert", "carry over"]
    assert Heard.stages[1][1] == Heard.stages[1][2] == 5_000_000 + (awq / "generation_config.json").stat().st_size


def test_what_is_left_behind_is_told_with_its_bytes_everywhere(awq: Path, tmp_path: Path, capsys: Any) -> None:
    add(awq, {name: bytes(number + 1) for number, name in enumerate(LEFT)})
    sizes = {name: number + 1 for number, name in enumerate(LEFT)}
    code, told, _ = report(capsys, "convert", awq, tmp_path / "out")
    assert (code, told["left_behind"], told["details"]["left_behind_bytes"]) == (0, LEFT, sizes)
    (warning,) = told["warnings"]
    assert "consolidated.safetensors (3 B, the same weights in another form)" in warning
    total = sum(sizes.values()) - sizes[".gitattributes"]
    assert warning.endswith(f" and 2 more, {size_text(total)} in all; --carry GLOB carries a file over")
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"* `{name}`: {size_text(sizes[name])}, {reason}\n" in card for name, reason in LEFT.items())
    assert "Every file except those left behind is restored byte for byte" in card
    assert main(["convert", str(awq), "--dry-run"]) == 0
    assert f"warning    {warning}" in capsys.readouterr().out
    for command in (["verify", awq, tmp_path / "out"], ["inspect", awq]):
        assert report(capsys, *command)[1]["warnings"] == [warning]
    assert revert(tmp_path / "out", tmp_path / "back").left_behind == LEFT
    assert files_of(tmp_path / "back").keys() == files_of(awq).keys() - LEFT.keys()


def test_options_decide_otherwise_and_everybody_knows_later(awq: Path, tmp_path: Path, capsys: Any) -> None:
    add(awq, {"pytorch_model.bin": b"1", "old/optimizer.pt": b"22", "assets/a.bin": b"333", ".env": b"x", "b.txt": b""})
    options = ["--carry", "old", "--carry", "pytorch*", "--carry", ".env", "--leave", "assets", "--leave", "b.*"]
    code, told, _ = report(capsys, "convert", awq, tmp_path / "out", *options)
    assert code == 0
    assert told["left_behind"] == {".env": "hidden", "assets/a.bin": "as --leave says", "b.txt": "as --leave says"}
    assert "--carry .env matches no file that can be carried over or left behind" in told["warnings"]
    assert {"pytorch_model.bin", "old/optimizer.pt"} <= {*told["details"]["side_files"]}
    assert verify(awq, tmp_path / "out").notes[0].startswith("left behind, so 'revert' cannot restore it: b.txt")
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back").keys() == files_of(awq).keys() - {".env", "assets/a.bin", "b.txt"}


def test_a_list_gives_each_item_its_patterns(awq: Path, tmp_path: Path) -> None:
    add(awq, {"pytorch_model.bin": b"1", "b.txt": b"2"})
    entries = [
        {"source": awq, "output": tmp_path / "one", "leave": ["b.txt"]},
        {"source": awq, "output": tmp_path / "two"},
    ]
    for _ in range(2):  # the second time both are there, and are compared with what they are to be
        assert [each.status for each in convert_many(entries, carry=["*.bin"]).items] == ["done", "done"]
    there = [
        {name for name in ("pytorch_model.bin", "b.txt") if (tmp_path / out / name).exists()} for out in ("one", "two")
    ]
    assert there == [{"pytorch_model.bin"}, {"pytorch_model.bin", "b.txt"}]
    (other,) = convert_many(entries[:1]).items
    assert (other.status, other.errors[0].code) == ("failed", "not-empty")


@pytest.mark.parametrize("value", ["*.bin", [1], [""], None, {"a": 1}])
def test_patterns_are_lists_of_texts(awq: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="leave must be a list of non-empty strings"):
        convert(awq, leave=value)


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("*.pt", ["a.pt", "x/a.pt"]),
        ("x", ["x/a.pt", "x/y/b.bin"]),
        ("x/", ["x/a.pt", "x/y/b.bin"]),
        ("x/*.bin", ["x/y/b.bin"]),
        ("a.p?", ["a.pt"]),
        ("[ab].pt", ["a.pt"]),
        ("A.pt", []),
    ],
)
def test_a_pattern_speaks_of_whole_paths_and_of_folders(pattern: str, taken: list[str]) -> None:
    assert [name for name in ("a.pt", "x/a.pt", "x/y/b.bin", "c.txt") if matches(name, pattern)] == taken


def test_what_both_options_speak_of_is_carried_over() -> None:
    assert Choice(["a/b"], ["a"]).fate("a/b") == "carry"
    assert Choice(["a/b"], ["a"]).fate("a/c") == "leave"
    assert Choice(["a/b"], ["a"]).fate("c") is None


def test_a_conversion_of_then_that_left_more_behind_still_equals_its_source(awq: Path, tmp_path: Path) -> None:
    add(awq, {"spk_dict.pt": b"1", "stray.safetensors": b"x"})
    convert(awq, tmp_path / "out", leave=["spk_dict.pt", "stray.safetensors"])
    document = json.loads((tmp_path / "out" / MANIFEST).read_text())
    document["left_behind"] = {"spk_dict.pt": "pickled weights", "stray.safetensors": "not named by the index"}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(document))
    result = verify(awq, tmp_path / "out")  # though the source alone could not be opened: stray.safetensors is none
    assert (result.kind, result.modules_total) == ("conversion", 1)
    assert "spk_dict.pt (1 B, as --leave says)" in result.notes[0]


# --- without an index ----------------------------------------------------------------------------------------------


def test_a_second_file_without_an_index_is_of_the_checkpoint(awq: Path, tmp_path: Path) -> None:
    (awq / "mtp.safetensors").write_bytes(pack_tensors({"mtp.fc.weight": zeros("F16", 8, 8)}))
    result = convert(awq, tmp_path / "out")
    assert [*result.shards] == [SHARD, "mtp.safetensors"]
    assert result.warnings[0].startswith(
        f"there is no {INDEX}, so all 2 .safetensors files in the folder count as the checkpoint"
    )
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert weight_map["mtp.fc.weight"] == "mtp.safetensors"
    assert weight_map.keys() == plan_conversion_tensors(awq)
    assert f"* {result.warnings[0]}" in (tmp_path / "out" / "README.md").read_text()
    assert verify(awq, tmp_path / "out").kind == "conversion"
    assert inspect(tmp_path / "out").warnings == ()
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)
    (awq / "mtp.safetensors").unlink()
    convert(awq, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / INDEX).exists()


def plan_conversion_tensors(folder: Path) -> set[str]:
    from awq2marlin.checkpoint.opening import open_checkpoint

    return {name for shard in plan_conversion(open_checkpoint(folder)).shards for name in shard.target.tensors}


def test_a_made_index_is_compared(awq: Path, tmp_path: Path) -> None:
    from awq2marlin import DifferenceError

    (awq / "mtp.safetensors").write_bytes(pack_tensors({"mtp.fc.weight": zeros("F16", 8, 8)}))
    convert(awq, tmp_path / "out")
    document = json.loads((tmp_path / "out" / INDEX).read_text())
    document["metadata"]["total_size"] += 1
    (tmp_path / "out" / INDEX).write_text(json.dumps(document))
    with pytest.raises(DifferenceError) as caught:
        verify(awq, tmp_path / "out", modules=1)
    assert [(each.file, each.code) for each in caught.value.problems] == [(INDEX, "different-bytes")]


@pytest.mark.parametrize("options", [{}, {"carry": ["other*"]}], ids=["adapter", "chosen"])
def test_a_file_beside_the_only_shard_is_none_for_any_reader_of_the_output(
    awq: Path, tmp_path: Path, options: Any
) -> None:
    name = "other.safetensors" if options else "adapter_model.safetensors"
    (awq / name).write_bytes(ADAPTER)
    result = convert(awq, tmp_path / "out", **options)
    assert ([*result.shards], result.files[name]) == ([SHARD], len(ADAPTER))
    assert {*json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()} == {SHARD}  # engines go by it
    assert (tmp_path / "out" / name).read_bytes() == ADAPTER
    assert verify(awq, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


def test_a_stranger_s_file_beside_an_output_without_an_index_is_no_shard(awq: Path, tmp_path: Path) -> None:
    convert(awq, tmp_path / "out")
    (tmp_path / "out" / "mine.safetensors").write_bytes(b"x")
    assert verify(awq, tmp_path / "out").kind == "conversion"
    assert inspect(tmp_path / "out").left_behind == {"mine.safetensors": "no part of the conversion"}
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


def test_a_file_without_tensors_is_no_shard_where_no_index_names_it(awq: Path, tmp_path: Path) -> None:
    (awq / "a.safetensors").write_bytes(pack_tensors({}))
    result = convert(awq, tmp_path / "out")
    assert ([*result.shards], "a.safetensors" in result.files) == ([SHARD], True)
    assert {*json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()} == {SHARD}
    assert verify(awq, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


def test_weights_of_which_there_is_no_other_form_are_the_checkpoint(awq: Path, tmp_path: Path) -> None:
    (awq / SHARD).rename(awq / "consolidated.safetensors")
    assert [*convert(awq, tmp_path / "out").shards] == ["consolidated.safetensors"]
    assert verify(awq, tmp_path / "out").kind == "conversion"


def test_shards_without_an_index_are_a_checkpoint(awq: Path, tmp_path: Path) -> None:
    split(awq, "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
    (awq / "a.safetensors.index.json").write_text("{}")
    result = convert(awq, tmp_path / "out", to="compressed-tensors")
    assert "a.safetensors.index.json is ignored, as engines know no index of this name" in result.warnings[0]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    held = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in unpack_tensors(path)}
    assert weight_map == held
    assert verify(awq, tmp_path / "out").modules_total == 2
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


def refused(folder: Path, **options: Any) -> Any:
    with pytest.raises(CheckpointError) as caught:
        convert(folder, folder.with_name("refused"), **options)
    assert not folder.with_name("refused").exists()
    return caught.value.problems


def test_shards_that_hold_a_tensor_twice_need_a_word(awq: Path, tmp_path: Path) -> None:
    (awq / "model.fp16.safetensors").write_bytes((awq / SHARD).read_bytes())
    (problem,) = refused(awq)
    assert (problem.code, problem.file) == ("no-index", INDEX)
    assert f"model.fp16.safetensors and {SHARD} both hold model.embed_tokens.weight and " in problem.message
    assert "--leave FILE, or --carry FILE" in problem.message
    assert [*convert(awq, tmp_path / "out", leave=["model.fp16.*"]).shards] == [SHARD]
    assert convert(awq, tmp_path / "and", carry=["model.fp16.*"]).files["model.fp16.safetensors"]
    for output in ("out", "and"):
        assert verify(awq, tmp_path / output).kind == "conversion"


def test_half_a_file_beside_the_only_one_is_refused_by_its_name(awq: Path) -> None:
    (awq / "model-2.safetensors").write_bytes(b"half")
    (problem,) = refused(awq)
    assert (problem.code, problem.file) == ("no-index", INDEX)
    assert (
        "model-2.safetensors cannot be read (it has 4 bytes, too few for a safetensors file; download it again)"
        in problem.message
    )


def test_without_an_index_the_numbers_of_shards_tell_what_is_missing(awq: Path) -> None:
    split(awq, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    (problem,) = refused(awq)
    assert (problem.code, problem.file) == ("missing-file", "model-00002-of-00003.safetensors")
    assert "1 of 3 files are missing; download them too" in problem.message


def test_leaving_every_file_of_tensors_is_refused(awq: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"--leave excludes every \.safetensors file: {SHARD} would count"):
        convert(awq, awq.with_name("out"), leave=["*"])


# --- an index that does not fit ------------------------------------------------------------------------------------


def test_an_index_left_over_from_another_checkpoint_is_told_from_a_download(awq: Path, tmp_path: Path) -> None:
    wanted = {f"t{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (awq / INDEX).write_text(json.dumps({"weight_map": wanted}))
    problems = refused(awq)
    assert [(each.code, each.file) for each in problems] == [("missing-file", name) for name in wanted.values()]
    assert f"download it too (missing: 2 of 2 files; present: {SHARD})" in problems[0].message
    assert f"ignore it: --leave {INDEX}" in problems[0].message
    result = convert(awq, tmp_path / "out", leave=[INDEX])
    assert (result.left_behind[INDEX], [*result.shards]) == ("as --leave says", [SHARD])
    assert verify(awq, tmp_path / "out").kind == "conversion"


def test_an_index_and_a_shard_left_over_from_another_checkpoint_are_told_from_a_wrong_config(awq: Path) -> None:
    name, tensor = "model-00001-of-00001.safetensors", "model.norm.weight"
    (awq / name).write_bytes(pack_tensors({tensor: unpack_tensors(awq / SHARD)[tensor]}))
    (awq / INDEX).write_text(json.dumps({"weight_map": {tensor: name}}))
    (problem,) = refused(awq)
    assert (problem.code, problem.file) == ("no-quantized-modules", INDEX)
    assert f"it does not list {SHARD}. If the index is left over" in problem.message
    assert problem.message.endswith(f"ignore it: --leave {INDEX}")


def test_an_index_with_a_name_too_many_says_what_to_do(tmp_path: Path) -> None:
    awq = write_awq(tmp_path / "awq", shards=2)
    document = json.loads((awq / INDEX).read_text())
    shard = document["weight_map"]["model.norm.weight"]
    document["weight_map"]["model.gone.weight"] = shard
    (awq / INDEX).write_text(json.dumps(document))
    (problem,) = refused(awq)
    assert (problem.code, problem.file, problem.tensor) == ("missing-tensor", shard, "model.gone.weight")
    assert f"if the checkpoint was published like this, ignore the index: --leave {INDEX}" in problem.message
    result = convert(awq, tmp_path / "out", leave=[INDEX])
    assert result.warnings[0].startswith(
        f"{INDEX} is not used, so all 2 .safetensors files in the folder count as the checkpoint"
    )
    assert result.warnings[0].endswith("; the output gets an index")
    assert result.warnings[1].endswith(f"{INDEX} ({size_text((awq / INDEX).stat().st_size)}, as --leave says)")
    assert len(result.shards) == 2
    assert "model.gone.weight" not in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert verify(awq, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back").keys() == files_of(awq).keys() - {INDEX}


def test_a_file_that_the_index_passes_over_and_engines_would_read_first_is_left_behind(tmp_path: Path) -> None:
    awq = write_awq(tmp_path / "awq", shards=2)
    (awq / SHARD).write_bytes(ADAPTER)
    result = convert(awq, tmp_path / "out")
    assert dict(result.left_behind) == {SHARD: "not named by the index, but some engines would read it first"}
    assert convert(awq, tmp_path / "and", carry=[SHARD]).files[SHARD] == len(ADAPTER)


def test_what_the_index_names_is_neither_left_nor_carried(tmp_path: Path) -> None:
    awq = write_awq(tmp_path / "awq", shards=2)
    name = "model-00001-of-00002.safetensors"
    result = convert(awq, tmp_path / "out", leave=[name])
    assert result.shards[name]
    assert result.warnings == (f"--leave {name} matches no file that can be carried over or left behind",)
