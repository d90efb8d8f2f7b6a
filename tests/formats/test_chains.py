"""Every way between formats: each step is compared by value, gives its source back, and loses nothing on the way."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq2marlin import CheckpointError, convert, convert_many, inspect, revert, verify
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.synthetic import CompressedTensorsRecipe, Recipe, write_checkpoint
from awq2marlin.formats.registry import formats
from awq2marlin.io.folder import Folder
from tests.faults.helpers import contents, run_here
from tests.formats import peers

TARGETS = [format.layout_name for format in formats() if format.is_target]

#: (K, N): two that Marlin takes as they are, and some that it takes padded only, the last with one word of columns.
SIZES = st.sampled_from([(128, 64), (64, 128), (128, 72), (192, 64), (64, 8)])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Returns a small model in AWQ."""
    names = draw(
        st.lists(st.sampled_from(["mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"]), min_size=1, unique=True)
    )
    modules = {f"model.layers.0.{name}": draw(SIZES) for name in names}
    return Recipe(
        modules,
        {"model.embed_tokens.weight": (4, 16), "model.norm.weight": (16,)},
        bits=draw(st.sampled_from([4, 8])),
        group_size=draw(st.sampled_from([32, 64, -1])),
        scale_dtype=draw(st.sampled_from(["F16", "BF16"])),
        has_qzeros=draw(st.booleans()),
        shards=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def ways(draw: st.DrawFn) -> list[tuple[str, str | None]]:
    """Returns formats to be written one after the other, beginning after AWQ, never one twice in a row."""
    steps, last = [], "awq"
    for _ in range(draw(st.integers(1, 4))):
        last = draw(st.sampled_from([name for name in TARGETS if name != last]))
        steps.append((last, draw(st.sampled_from(["keep", "pad"])) if last == "marlin" else None))
    return steps


@settings(deadline=None, max_examples=25)
@given(recipes(), ways())
def test_any_way_between_formats_keeps_every_number_and_every_step_gives_its_source_back(
    recipe: Recipe, way: list[tuple[str, str | None]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_checkpoint(root / "0", recipe)
        for step, (to, unaligned) in enumerate(way):
            before, after = root / str(step), root / str(step + 1)
            convert(before, after, to=to, unaligned=unaligned, verify="all", workers=1)
            assert verify(before, after, workers=1).kind == "conversion"
            revert(after, root / "back", workers=1)
            assert contents(root / "back") == contents(before)
            shutil.rmtree(root / "back")
        last = root / str(len(way))
        if len(way) > 1:
            assert verify(root / "0", last, workers=1).kind == "checkpoints"
        assert inspect(last).bits == recipe.bits


@settings(deadline=None, max_examples=10)
@given(recipes())
def test_awq_of_compressed_tensors_of_awq_is_the_same_tensors(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_checkpoint(root / "awq", recipe)
        convert(root / "awq", root / "ct", to="compressed-tensors", workers=1)
        convert(root / "ct", root / "again", to="awq", workers=1)
        expected, found = peers.read_tensors(root / "awq"), peers.read_tensors(root / "again")
        made = {f"{module}.qzeros" for module in recipe.modules} if not recipe.has_qzeros else set()
        assert found.keys() == expected.keys() | made
        for tensor, (dtype, array) in expected.items():
            assert found[tensor][0] == dtype
            assert found[tensor][1].tobytes() == array.tobytes(), tensor


PART = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("kind", "to"), [(Recipe, "compressed-tensors"), (CompressedTensorsRecipe, "awq"), (Recipe, "marlin")]
)
def test_a_family_with_a_member_in_full_precision(tmp_path: Path, kind: type[Recipe], to: str) -> None:
    modules = dict.fromkeys([f"{PART}.q_proj", f"{PART}.k_proj", f"{PART}.o_proj"], (128, 64))
    write_checkpoint(tmp_path / "source", kind(modules, {f"{PART}.v_proj.weight": (64, 128)}, group_size=32))
    result = convert(tmp_path / "source", tmp_path / "out", to=to, verify="all")
    # Only Marlin-native has a list of modules in another layout; in the others all have the one of the format.
    assert len(result.kept) == (2 if to == "marlin" else 0)
    assert verify(tmp_path / "source", tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_only_what_version_0_1_can_revert_has_the_first_version_of_the_manifest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "0", Recipe({f"{PART}.o_proj": (128, 64)}, {}, group_size=32))
    versions = []
    for step, to in enumerate(["marlin", "awq", "marlin"]):
        convert(tmp_path / str(step), tmp_path / str(step + 1), to=to)
        versions.append(read_manifest(Folder.at(tmp_path / str(step + 1))).version)
    assert versions == [1, 2, 2]  # the last one's source has a manifest of its own


def test_json_names_the_layout_that_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = {f"{PART}.o_proj": (128, 64), "model.layers.0.mlp.down_proj": (128, 72)}
    write_checkpoint(tmp_path / "awq", Recipe(modules, {}, group_size=32))
    write_checkpoint(tmp_path / "ct", CompressedTensorsRecipe(modules, {}, group_size=32))
    for source, to, layouts in (
        ("awq", "marlin", {"awq", "marlin"}),
        ("awq", "compressed-tensors", {"compressed-tensors"}),
        ("ct", "awq", {"awq"}),
    ):
        outcome = run_here(capsys, "convert", tmp_path / source, tmp_path / f"to-{to}", "--to", to, "--json")
        assert outcome.code == 0
        assert {module["layout"] for module in outcome.report["modules"]} == layouts


@pytest.mark.parametrize("to", ["marlin", "compressed-tensors"])
def test_zero_points_that_the_config_denies_must_all_be_in_the_middle(tmp_path: Path, to: str) -> None:
    recipe = Recipe({f"{PART}.o_proj": (128, 64)}, {}, group_size=32, has_qzeros=True, zero_point=False)
    write_checkpoint(tmp_path / "awq", recipe)
    with pytest.raises(CheckpointError, match="these are not all in the middle; if they count, reverse") as caught:
        convert(tmp_path / "awq", tmp_path / "out", to=to)
    assert [(each.tensor, each.code) for each in caught.value.problems] == [(f"{PART}.o_proj.qzeros", "contradiction")]
    assert not (tmp_path / "out" / "config.json").exists()
    tensors = peers.read_tensors(tmp_path / "awq")
    dtype, zeros = tensors[f"{PART}.o_proj.qzeros"]
    tensors[f"{PART}.o_proj.qzeros"] = dtype, np.full_like(zeros, 0x88888888 - (1 << 32))
    peers.write_tensors(tmp_path / "awq" / "model.safetensors", tensors)
    convert(tmp_path / "awq", tmp_path / "out", to=to, verify="all", overwrite=True)
    assert not [name for name in peers.read_tensors(tmp_path / "out") if "zero" in name]
    assert read_manifest(Folder.at(tmp_path / "out")).version == 2  # version 0.1 took them for parts
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "awq")


def test_a_file_of_which_nothing_would_be_left_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ct", CompressedTensorsRecipe({f"{PART}.o_proj": (128, 64)}, {}, group_size=32))
    tensors, files = peers.read_tensors(tmp_path / "ct"), ("a.safetensors", "b.safetensors")
    (tmp_path / "ct" / "model.safetensors").unlink()
    weight_map = {name: files[name.endswith("weight_shape")] for name in tensors}
    for file in files:
        mine = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        peers.write_tensors(tmp_path / "ct" / file, mine)
    index = tmp_path / "ct" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors: no tensor of this file remains in AWQ.* into another file"
    ):
        convert(tmp_path / "ct", tmp_path / "out", to="awq")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_of_each(tmp_path: Path) -> Path:
    """Returns a folder with a checkpoint of every format that is written, each called like its layout."""
    write_checkpoint(tmp_path / "awq", Recipe({f"{PART}.o_proj": (128, 64)}, {}, group_size=32))
    for to in TARGETS:
        if to != "awq":
            convert(tmp_path / "awq", tmp_path / to, to=to, workers=1)
    return tmp_path


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("to", TARGETS)
def test_asking_for_the_format_of_the_source_is_a_usage_error(
    one_of_each: Path, to: str, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = one_of_each / to, one_of_each / "out"
    with pytest.raises(ValueError, match=f"^to is '{to}', but the source is in that format already$"):
        convert(source, out, to=to, dry_run=dry_run)
    outcome = run_here(capsys, "convert", source, out, "--to", to, *["--dry-run"] * dry_run, "--json")
    assert outcome.code == 2
    assert [(each["code"], each["message"]) for each in outcome.report["errors"]] == [
        ("usage", f"--to is '{to}', but the source is in that format already")
    ]
    assert f"usage error: --to is '{to}', but the source is in that format already\n" in outcome.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["old_w4_asym_g32", "old_w8_asym_channel"])
def test_the_older_form_of_a_format_is_that_format(name: str, tmp_path: Path) -> None:
    """Its output's manifest would name the format of the output as the source's, and `revert` refuses that."""
    with pytest.raises(ValueError, match="to is 'compressed-tensors', but the source is in that format already"):
        convert(peers.checkpoint(name), tmp_path / "out", to="compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_the_option_a_marlin_native_source_is_refused_as_in_version_0_1(
    one_of_each: Path, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = one_of_each / "marlin", one_of_each / "out"
    with pytest.raises(CheckpointError, match="already Marlin-native") as caught:
        convert(source, out, dry_run=dry_run)
    assert [each.code for each in caught.value.problems] == ["already-converted"]
    outcome = run_here(capsys, "convert", source, out, *["--dry-run"] * dry_run, "--json")
    assert (outcome.code, [each["code"] for each in outcome.report["errors"]]) == (1, ["already-converted"])
    assert not out.exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_item_of_a_batch_that_is_of_the_format_to_write_is_told_so(one_of_each: Path, dry_run: bool) -> None:
    def codes(*items: dict[str, object], **options: object) -> list[list[str]]:
        entries = [{"source": one_of_each / "marlin", **item} for item in items]
        result = convert_many(entries, out_dir=one_of_each / "out", dry_run=dry_run, **options)
        return [[each.code for each in item.errors] for item in result.items]

    own = {"to": "marlin", "output": "own"}
    assert codes({}, own, {"to": "awq"}) == [["already-converted"], ["usage"], []]
    assert codes({}, {"to": None, "output": "own"}, to="marlin") == [["usage"], ["already-converted"]]
    sources = [one_of_each / "awq", one_of_each / "compressed-tensors"]
    refused, done = convert_many(sources, out_dir=one_of_each / "more", to="awq", dry_run=dry_run).items
    assert [(each.code, each.message) for each in refused.errors] == [
        ("usage", "to is 'awq', but the source is in that format already")
    ]
    assert done.exit_code == 0


@pytest.mark.parametrize(("name", "to"), [("old_w8_asym_channel", "marlin"), ("w4_sym_g32", "awq")])
def test_killed_before_any_of_its_steps_it_is_completed_by_the_same_command(
    killed_there_and_back, name: str, to: str
) -> None:
    killed_there_and_back(peers.checkpoint(name), to)
