"""Every kind of real input: converted exactly as the specification says, verified, and given back to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, convert, revert, verify
from tests.e2e import oracle
from tests.e2e.inputs import CASES, INDEX, SIDE_FILES, Case

EMBEDDINGS = ("lm_head", "output", "embed_out")


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("unaligned", ["keep", "pad", "error"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converts_exactly_and_back(case: Case, unaligned: Any, tmp_path: Path) -> None:
    source, output, back = case.write(tmp_path / "source"), tmp_path / "output", tmp_path / "back"
    before = oracle.file_hashes(source)
    expected = oracle.expect(source, case.quantization, unaligned)
    refused = sorted(name for name in expected.unaligned if name.rpartition(".")[2] not in EMBEDDINGS)
    if unaligned == "error" and refused:
        with pytest.raises(CheckpointError) as caught:
            convert(source, output, unaligned=unaligned)
        assert sorted(problem.tensor for problem in caught.value.problems) == refused
        assert {problem.code for problem in caught.value.problems} == {"unaligned"}
        assert not output.exists()
        return

    result = convert(source, output, unaligned=unaligned, workers=2)

    assert (len(expected.converted), len(expected.kept)) == ((unaligned == "pad" and case.pad) or case.keep)
    assert {module.name: (module.padded_k, module.padded_n) for module in result.converted} == expected.converted
    assert sorted(module.name for module in result.kept) == expected.kept
    assert all(module.reason for module in result.kept)
    assert sorted(result.left_behind) == sorted(case.left_behind)
    oracle.check_output(source, output, expected)
    check_files(case, source, output, expected)

    compared = verify(source, output)
    assert [module.name for module in compared.modules] == sorted(expected.converted)
    assert compared.modules_total == len(expected.converted)

    reverted = revert(output, back)
    after = {name: digest for name, digest in before.items() if not is_left_behind(name, case)}
    assert oracle.file_hashes(back) == after
    assert {file.name: file.sha256 for file in reverted.files} == after
    assert oracle.file_hashes(source) == before, "the source is never written to"


def is_left_behind(name: str, case: Case) -> bool:
    return any(name == left or name.startswith(f"{left}/") for left in case.left_behind)


def check_files(case: Case, source: Path, output: Path, expected: oracle.Expected) -> None:
    """Asserts which files the output holds, and that the manifest accounts for all of the source's."""
    carried = {*SIDE_FILES, *case.carried}
    assert set(oracle.file_hashes(output)) == {
        *carried,
        *expected.shards,
        "README.md",
        "config.json",
        "marlin_manifest.json",
    }
    rewritten = ["config.json", *case.rewritten]
    if INDEX in carried and "padded_modules" in expected.quantization:  # its total size is another
        carried.remove(INDEX)
        rewritten.append(INDEX)
        old, new = (json.loads((folder / INDEX).read_text("utf-8")) for folder in (source, output))
        old["metadata"]["total_size"] = sum(len(e.data) for shard in expected.shards.values() for e in shard.values())
        assert new == old
    oracle.check_manifest(source, output, sorted(carried), rewritten, list(case.left_behind))


@pytest.mark.parametrize(
    ("name", "shards", "apart"),
    [("many_shards_that_cut_modules_apart", 7, 2), ("modules_of_which_each_part_is_in_another_shard", 4, 3)],
)
def test_modules_really_are_cut_apart(name: str, shards: int, apart: int, tmp_path: Path) -> None:
    source = by_name(name).write(tmp_path / "source")
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    modules = {name.rpartition(".")[0] for name in weight_map if name.endswith(".qweight")}
    places = [{weight_map[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")} for module in modules]
    assert len(set(weight_map.values())) == shards
    assert max(map(len, places)) == apart


def test_3584x512_makes_headers_and_files_grow(tmp_path: Path) -> None:
    source = by_name("shapes_whose_digits_make_the_header_grow").write(tmp_path / "source")
    convert(source, tmp_path / "output")
    for shard in oracle.shard_names(source):
        (_, old), (_, new) = (oracle.read_header(folder / shard) for folder in (source, tmp_path / "output"))
        shapes = [(old[name]["shape"], new[name]["shape"]) for name in old if name.endswith(".qweight")]
        assert set(map(str, shapes)) == {"([3584, 64], [224, 1024])"}
        grown = (tmp_path / "output" / shard).stat().st_size - (source / shard).stat().st_size
        assert grown > 0
        assert grown % 8 == 0


def test_awkward_sizes_are_padded_to_the_smaller_choice(tmp_path: Path) -> None:
    source = by_name("awkward_sizes").write(tmp_path / "source")
    found = {module.name: module for module in convert(source, tmp_path / "output", unaligned="pad").modules}
    sizes = {name: (module.padded_k, module.padded_n) for name, module in found.items()}
    assert sizes == {
        "model.n48": (128, 64),
        "model.n96": (128, 128),
        "model.n576": (640, 576),  # as large as (576, 640), so the first choice is taken
        "model.n576_k128": (128, 576),
        "model.layers.0.mlp.down_proj": (10944, 128),
        "model.k10944_n64": (11008, 64),
        "model.k64_n128": (64, 128),
        "model.k64_n64": (128, 64),
    }


def test_siblings_are_padded_to_one_k(tmp_path: Path) -> None:
    source = by_name("groups_of_32").write(tmp_path / "source")
    found = {
        module.name.rpartition(".")[2]: module
        for module in convert(source, tmp_path / "output", unaligned="pad").modules
    }
    # q, k, v of K=192: 256 * (192 + 64 + 64) = 81920 values by (128, 64), 192 * (256 + 128 + 128) = 98304 by (64, 128)
    assert [(found[name].padded_k, found[name].padded_n) for name in ("q_proj", "k_proj", "v_proj")] == [
        (256, 192),
        (256, 64),
        (256, 64),
    ]
    # alone, o_proj costs 256 * 192 = 49152 = 192 * 256: the sums are equal too, so the first choice is taken
    assert (found["o_proj"].padded_k, found["o_proj"].padded_n) == (256, 192)
    assert (found["gate_proj"].padded_k, found["gate_proj"].padded_n) == (192, 512)


@pytest.mark.parametrize(
    "name", ["bf16_scales", "unsorted_names_with_white_space_in_eight_bits", "a_hub_snapshot_of_links"]
)
def test_the_output_does_not_depend_on_workers_time_or_path(name: str, tmp_path: Path) -> None:
    source = by_name(name).write(tmp_path / "source")
    convert(source, tmp_path / "one", workers=1, verify="all")
    convert(source, tmp_path / "other" / "place", workers=5, verify="all")
    assert oracle.file_hashes(tmp_path / "one") == oracle.file_hashes(tmp_path / "other" / "place")


def test_an_unlisted_tensor_is_a_warning_and_is_carried_over(tmp_path: Path) -> None:
    source = by_name("an_index_that_forgets_a_tensor").write(tmp_path / "source")
    result = convert(source, tmp_path / "output")
    assert result.warnings == ("1 tensors are missing from the index; the first is model.norm.weight",)
