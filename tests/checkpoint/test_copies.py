"""Two files that hold a tensor of one name, and an index that says which counts: overlays and shards taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq2marlin import CheckpointError, DifferenceError, convert, inspect, revert, verify
from tests.checkpoint.test_files import files_of
from tests.hostile.hostile_files import INDEX, MANIFEST, MODULE, SHARD, pack_tensors, unpack_tensors, write_awq, zeros

OTHER = "model.layers.0.self_attn.o_proj"
BASE, OVERLAY = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PARTS = ("qweight", "qzeros", "scales")


def other_bytes(tensor: tuple[str, list[int], bytes], seed: int) -> tuple[str, list[int], bytes]:
    """Returns other values of the same type and shape; of floating-point ones positive numbers."""
    dtype, shape, data = tensor
    random = np.random.default_rng(seed)
    if dtype.startswith("I"):
        return dtype, shape, random.bytes(len(data))
    return dtype, shape, (random.random(len(data) // 2) + 0.5).astype("<f2").tobytes()


def write(folder: Path, base: dict[str, Any], overlay: dict[str, Any], counts: dict[str, str]) -> Path:
    """Writes two shards, and an index that says which of their tensors counts."""
    for name, tensors in ((BASE, base), (OVERLAY, overlay)):
        (folder / name).write_bytes(pack_tensors(tensors, {"format": "pt"}))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": counts}))
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder without weights, and its tensors."""
    folder = write_awq(tmp_path / "awq")
    tensors = unpack_tensors(folder / SHARD)
    (folder / SHARD).unlink()
    return folder, tensors


@pytest.fixture(params=[BASE, OVERLAY])
def overlaid(request: Any, parts: tuple[Path, dict[str, Any]]) -> tuple[Path, str]:
    """Two modules' tensors and the norm stand in both files, with other values; one of the files counts."""
    folder, tensors = parts
    twice = [name for name in tensors if name.rpartition(".")[2] in PARTS or "norm" in name]
    overlay = {name: other_bytes(tensors[name], number) for number, name in enumerate(twice)}
    counts = {**dict.fromkeys(tensors, BASE), **dict.fromkeys(twice, request.param), "new": OVERLAY}
    return write(folder, tensors, {**overlay, "new": zeros("U8", 1)}, counts), request.param


def alone(folder: Path, shard: str, target: Path) -> Path:
    """Writes a checkpoint of one file: the tensors of a shard, and those that it lacks."""
    write_awq(target)
    (target / SHARD).write_bytes(
        pack_tensors({**unpack_tensors(folder / BASE), **unpack_tensors(folder / shard)}, {"format": "pt"})
    )
    return target


@pytest.mark.parametrize("options", [{}, {"unaligned": "pad"}, {"to": "compressed-tensors"}], ids=str)
def test_both_copies_are_converted_alike_and_come_back(
    overlaid: tuple[Path, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, counting = overlaid
    out = tmp_path / "out"
    result = convert(folder, out, **options)
    assert any("7 tensors are in a second file too, which engines also read; the copy is converted as well" in each
               for each in result.warnings)  # fmt: skip
    for shard in (BASE, OVERLAY):  # each file holds what a conversion of its tensors alone gives
        convert(alone(folder, shard, tmp_path / shard), tmp_path / f"{shard}-out", **options)
        expected, found = unpack_tensors(tmp_path / f"{shard}-out" / SHARD), unpack_tensors(out / shard)
        assert found == {name: expected[name] for name in found}
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    shared = unpack_tensors(out / BASE).keys() & unpack_tensors(out / OVERLAY).keys()
    assert len(shared) >= 7
    assert {weight_map[name] for name in shared} == {counting}
    assert json.loads((out / MANIFEST).read_text())["format_version"] == 2
    assert verify(folder, out).modules_total == inspect(out).modules.__len__() - len(result.kept)
    revert(out, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)


def test_what_counts_is_compared_and_so_is_the_copy(overlaid: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = overlaid
    convert(folder, tmp_path / "out", verify="all", low_disk=True)
    for shard in (BASE, OVERLAY):
        for name in (f"{MODULE}.qweight", f"{OTHER}.scales", "model.norm.weight"):
            changed = unpack_tensors(tmp_path / "out" / shard)
            dtype, shape, data = changed[name]
            changed[name] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
            sound = (tmp_path / "out" / shard).read_bytes()
            (tmp_path / "out" / shard).write_bytes(sound[: -sum(len(each[2]) for each in changed.values())])
            with (tmp_path / "out" / shard).open("ab") as stream:
                stream.writelines(each[2] for each in changed.values())
            with pytest.raises(DifferenceError) as caught:
                verify(folder, tmp_path / "out", modules=2)
            assert [(each.file, each.tensor) for each in caught.value.problems] == [(shard, name)]
            (tmp_path / "out" / shard).write_bytes(sound)
    assert verify(folder, tmp_path / "out").kind == "conversion"


def test_two_checkpoints_are_compared_by_what_counts(overlaid: tuple[Path, str], tmp_path: Path) -> None:
    folder, counting = overlaid
    twin = alone(folder, counting, tmp_path / "twin")
    held = unpack_tensors(twin / SHARD)
    (twin / SHARD).write_bytes(pack_tensors({**held, "new": zeros("U8", 1)}, {"format": "pt"}))
    result = verify(folder, twin)
    assert (result.kind, result.modules_total) == ("checkpoints", 2)
    assert "7 tensors of A do not count, as its index says, and were not compared" in result.notes


def test_a_copy_of_another_shape_is_carried_over_and_told(parts: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, tensors = parts
    strange = {f"{MODULE}.qweight": zeros("I32", 3, 5), f"{MODULE}.scales": zeros("F32", 1), "new": zeros("U8", 1)}
    write(folder, tensors, strange, {**dict.fromkeys(tensors, BASE), "new": OVERLAY})
    result = convert(folder, tmp_path / "out")
    assert unpack_tensors(tmp_path / "out" / OVERLAY) == strange
    (warning,) = result.warnings
    assert warning.startswith(
        "2 tensors are in a second file too, with another type or shape; the copy is carried over"
    )
    assert warning.endswith(f"the first is {MODULE}.qweight in {OVERLAY}")
    assert warning in (tmp_path / "out" / "README.md").read_text()
    assert verify(folder, tmp_path / "out").modules_total == 1
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)


@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "listed"])
@pytest.mark.parametrize("to", ["marlin", "awq"])
def test_a_shard_that_was_taken_over_may_hold_the_weight_of_a_quantized_module(
    parts: tuple[Path, dict[str, Any]], tmp_path: Path, listed: bool, to: str
) -> None:
    folder, tensors = parts
    old = {f"{MODULE}.weight": zeros("F8_E4M3", 64, 128), f"{MODULE}.weight_scale_inv": zeros("F32", 1, 1)}
    official = {**{name: each for name, each in tensors.items() if MODULE not in name}, **old}
    counts = {**dict.fromkeys(official, BASE), **dict.fromkeys([n for n in tensors if MODULE in n], OVERLAY)}
    if not listed:
        counts = {name: shard for name, shard in counts.items() if name not in old}
    write(folder, official, {n: each for n, each in tensors.items() if MODULE in n}, counts)
    if to == "awq":
        convert(folder, tmp_path / "marlin")
        folder = tmp_path / "marlin"
    result = convert(folder, tmp_path / "out", to=to)
    assert MODULE in {module.name for module in result.modules}
    told = [each for each in result.warnings if "do not count, as the index lists their module in another form" in each]
    assert told[0].endswith(f"the first is {MODULE}.weight in {BASE}")
    assert {name: unpack_tensors(tmp_path / "out" / BASE)[name] for name in old} == old
    assert f"{MODULE}.weight" not in inspect(tmp_path / "out").unquantized_modules
    assert verify(folder, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)


def test_a_shard_of_which_no_tensor_counts_stays_one_where_the_tensors_get_other_names(
    parts: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, tensors = parts
    old = {f"{MODULE}.weight": zeros("F8_E4M3", 64, 128)}
    write(folder, old, tensors, {**dict.fromkeys(old, BASE), **dict.fromkeys(tensors, OVERLAY)})
    convert(folder, tmp_path / "out", to="compressed-tensors")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"][f"{MODULE}.weight"] == BASE
    assert verify(folder, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)
    convert(tmp_path / "out", tmp_path / "marlin")
    assert verify(tmp_path / "out", tmp_path / "marlin").kind == "conversion"


def test_a_module_whose_weight_counts_is_none(parts: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, tensors = parts
    counts = {name: BASE for name in tensors if MODULE not in name} | {f"{MODULE}.weight": OVERLAY}
    write(folder, tensors, {f"{MODULE}.weight": zeros("F16", 64, 128)}, counts)
    result = convert(folder, tmp_path / "out", unaligned="pad")
    assert [module.name for module in result.modules] == [OTHER]
    assert MODULE in inspect(tmp_path / "out").unquantized_modules
    assert verify(folder, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)


def test_two_copies_of_which_the_index_names_none_are_refused(
    parts: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, tensors = parts
    twice = {"model.norm.weight": tensors["model.norm.weight"], "new": zeros("U8", 1)}
    write(folder, tensors, twice, {n: BASE for n in tensors if "norm" not in n} | {"new": OVERLAY})
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    assert [(each.code, each.file, each.tensor) for each in caught.value.problems] == [
        ("duplicate-tensor", OVERLAY, "model.norm.weight")
    ]


def test_the_vllm_loader_takes_the_copies_as_they_are_meant(overlaid: tuple[Path, str], tmp_path: Path) -> None:
    from awq2marlin.integrations.serving.inventory import read_inventory

    folder, _ = overlaid
    convert(folder, tmp_path / "out")
    from awq2marlin.checkpoint.opening import open_checkpoint

    found = read_inventory(tmp_path / "out", open_checkpoint(tmp_path / "out").quantization)
    assert found.zero_point_modules == {MODULE, OTHER}
