"""Every fixture of every format, to every target: converted, compared value for value, and taken back.

A fixture is a folder ``data/FORMAT/NAME/checkpoint`` that the library of the format wrote. Adding one adds a row to
this matrix. Beside it is ``numbers.npz``, the numbers that the library was given, or ``library.npz``, the dense weights
that it made of the file; then the numbers are what a slow reader says, `peers.READERS`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from awq2marlin import convert, convert_many, inspect, revert, verify
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.part_rows import PartRows
from awq2marlin.checkpoint.source import SourceCheckpoint
from awq2marlin.errors import article
from awq2marlin.formats.registry import formats
from awq2marlin.io.folder import Folder
from awq2marlin.io.tensors import TensorFiles
from tests.equality import assert_identical
from tests.faults.helpers import contents
from tests.formats import peers

#: compressed-tensors has a matrix of its own in `test_compressed_tensors_library`; here are some of each kind.
SOME = {"w4_asym_g32", "w4_sym_g64", "w8_asym_channel", "w8_sym_g128", "llama", "tied", "old_w8_asym_channel"}

FIXTURES = sorted(
    folder
    for folder in peers.ALL_DATA.glob("*/*/checkpoint")
    if folder.parts[-3] != "compressed_tensors" or folder.parts[-2] in SOME
)
TARGETS = [format for format in formats() if format.is_target]


def named(folder: Path) -> str:
    """Returns what a fixture is called."""
    return "/".join(folder.parts[-3:-1])


each_fixture = pytest.mark.parametrize("source", FIXTURES, ids=named)


@pytest.mark.parametrize("source", [each for each in FIXTURES if (each.parent / "library.npz").exists()], ids=named)
def test_the_slow_reader_says_what_the_library_says(source: Path) -> None:
    said = peers.said_of(source)
    for module, found in peers.numbers_of(source).items():
        dense = found.rounded
        dense[dense == 0x8000] = 0  # 0 has no sign there: a scale may be below zero
        if f"{module}.dense" in said:
            assert_identical(dense, said[f"{module}.dense"], module)
        assert peers.digest(dense) == said[f"{module}.dense_sha256"], module


@each_fixture
def test_the_format_s_own_values_are_these_numbers(source: Path) -> None:
    expected, opened = peers.numbers_of(source), SourceCheckpoint.of(open_checkpoint(source))
    checkpoint = opened.checkpoint
    files, scheme = TensorFiles(checkpoint.folder, checkpoint.index), checkpoint.quantization.scheme
    assert opened.modules.keys() == expected.keys()
    for name, module in opened.modules.items():
        for part, attribute in (("qweight", "codes"), ("qzeros", "zeros"), ("scales", "scales")):
            wanted = getattr(expected[name], attribute)
            if part not in module.parts:
                assert (wanted == scheme.middle).all(), name  # they are proven, and not carried over
                continue
            found = PartRows.of(module.layout, files, name, part, module.stored_k, scheme).read(0, len(wanted))
            assert_identical(found[: len(wanted), : wanted.shape[1]], wanted, f"{name} {part}")


@each_fixture
def test_every_target_holds_these_numbers_and_gives_the_very_files_back(source: Path, tmp_path: Path) -> None:
    expected, before, format = peers.numbers_of(source), contents(source), inspect(source).format
    targets = [target.layout_name for target in TARGETS if target.name != format]
    assert len(targets) >= len(TARGETS) - 1
    for to in targets:
        out = tmp_path / to
        convert(source, out, to=to, verify="all")
        assert verify(source, out).kind == "conversion"
        if to != "marlin":
            assert_holds(out, expected, to)
        reverted = revert(out, tmp_path / "back" / to)
        assert (reverted.restores, contents(tmp_path / "back" / to)) == ("files", before)
    for one, other in itertools.pairwise(targets):
        assert verify(tmp_path / one, tmp_path / other).kind == "checkpoints"


def assert_holds(out: Path, expected: dict[str, peers.Module], to: str) -> None:
    """Fails unless an output holds some numbers, as its reader says."""
    assert peers.layout_of(peers.quantization_of(out)) == to
    found = peers.numbers_of(out)
    assert found.keys() == expected.keys()
    for module, wanted in expected.items():
        for attribute in ("codes", "zeros", "scales"):
            assert_identical(getattr(found[module], attribute), getattr(wanted, attribute), f"{module} {attribute}")
        assert found[module].dtype == wanted.dtype


@each_fixture
def test_padded_to_marlin_every_module_is_converted(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", unaligned="pad", verify="all", workers=1)
    assert not [module for module in result.kept if module.reason.startswith("unaligned")]
    revert(tmp_path / "out", tmp_path / "back", workers=1)
    assert contents(tmp_path / "back") == contents(source)


# --- the ways in and out ---------------------------------------------------------------------------------------------

#: One of each layout that a config of GPTQ or AutoRound may mean; the AWQ layouts have theirs in `test_awq_layouts`.
LAYOUTS = [
    peers.ALL_DATA / name / "checkpoint"
    for name in (
        "gptq/gptqmodel_v1_w4_asym_g32",
        "gptq/auto_round_w8_sym_channel",
        "gptq/gptqmodel_v2_w4_sym_g32",
        "auto_round/gptq_w4_sym_g32",
        "auto_round/awq_w4_sym_g64",
        "auto_round/as_awq_sym",
    )
]
each_layout = pytest.mark.parametrize("source", LAYOUTS, ids=named)


def apart(folder: Path, source: Path) -> Path:
    """Writes a checkpoint in two files, of which the first has only the codes, and returns its folder."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    tensors = peers.read_tensors(source)
    weight_map = {name: f"model-{2 - name.endswith('.qweight')}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        peers.write_tensors(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.mark.parametrize("low_disk", [False, True])
@each_layout
def test_a_repository_is_converted_and_taken_back(hub, source: Path, low_disk: bool, tmp_path: Path) -> None:
    torn = apart(tmp_path / "source", source)
    hub.add_repository("org/model", torn)
    convert("org/model", tmp_path / "out", low_disk=low_disk, verify="all", workers=1)
    convert(torn, tmp_path / "expected")
    found, expected = (peers.read_tensors(tmp_path / each) for each in ("out", "expected"))
    assert found.keys() == expected.keys()
    for name, (_, array) in expected.items():
        assert_identical(found[name][1], array, name)
    hub.add_repository("org/out", tmp_path / "out")
    revert("org/out", tmp_path / "back", low_disk=low_disk, workers=1)
    assert contents(tmp_path / "back") == contents(torn)


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_executors_convert_them(kind: type[Executor], tmp_path: Path) -> None:
    with kind(2) as executor:
        for number, source in enumerate(LAYOUTS):
            convert(source, tmp_path / str(number), verify="all", executor=executor)
            revert(tmp_path / str(number), tmp_path / f"back{number}", executor=executor)
            assert contents(tmp_path / f"back{number}") == contents(source)


def test_a_batch_takes_them_all(tmp_path: Path) -> None:
    sources = [str(shutil.copytree(source, tmp_path / source.parent.name)) for source in LAYOUTS]
    result = convert_many(sources, out_dir=tmp_path / "out", verify="all", to="compressed-tensors")
    assert [item.exit_code for item in result.items] == [0] * len(LAYOUTS)
    for source in LAYOUTS:
        assert verify(source, tmp_path / "out" / f"{source.parent.name}-ct").kind == "conversion"


@each_layout
def test_the_card_says_what_the_source_was_and_version_01_is_asked_for_a_newer_one(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out")
    assert read_manifest(Folder.at(tmp_path / "out")).version == 2
    result = inspect(source)
    title = {"gptq": "GPTQ", "gptq_v2": "GPTQ v2"}.get(result.modules[0].layout, "") if result.format == "gptq" else ""
    title = title or {"auto-round": "AutoRound", "awq": "AWQ"}[result.format]
    assert result.title == title
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"The weights of {article(title)} checkpoint (" in card
    assert f"How to get the {title} checkpoint back" in card
    count = len(result.modules)
    assert f"| compared with the source, value for value | {count} of {count}: no difference |" in card


def test_killed_before_any_of_its_steps_it_is_completed_by_the_same_command(killed_there_and_back) -> None:
    """What is dropped on the way there is made on the way back."""
    killed_there_and_back(peers.ALL_DATA / "gptq" / "gptqmodel_v2_w4_sym_g32" / "checkpoint")


def test_the_fixtures_are_of_every_kind() -> None:
    kinds = {}
    for folder in FIXTURES:
        found = inspect(folder)
        kinds.setdefault(found.format, set()).add((found.bits, found.zero_point, found.group_size))
        kinds[found.format] |= {module.layout for module in found.modules}
    sources = {format.name for format in formats() if format.is_source and not format.is_own}
    assert kinds.keys() == sources
    assert {"gptq", "gptq_v2", (4, True, 32), (4, False, 128), (8, True, 64), (8, False, -1)} <= kinds["gptq"]
    assert {"awq", "gptq", "gptq_v2", (4, True, 64), (4, False, 32), (8, False, -1)} <= kinds["auto-round"]
    assert {(4, True, 32), (4, False, 64)} <= kinds["awq"]
