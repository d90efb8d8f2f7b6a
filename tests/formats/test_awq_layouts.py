"""AWQ's other layouts, as AutoAWQ's own layers wrote them: what `test_every_format` does not ask of them."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from awq2marlin import CheckpointError, DifferenceError, convert, convert_many, inspect, revert, verify
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.io.folder import Folder
from awq2marlin.pipeline.plan import plan_conversion
from tests.equality import assert_identical
from tests.faults.helpers import contents
from tests.formats import peers

DATA = Path(__file__).resolve().parent / "data" / "awq"
NAMES = sorted(folder.name for folder in DATA.glob("*/"))
TARGETS = ["marlin", "awq", "compressed-tensors"]
O_PROJ, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"


def checkpoint(name):
    """The folder of a fixture's checkpoint."""
    return DATA / name / "checkpoint"


def numbers(name):
    """The modules of a fixture, as its layers were given them."""
    with np.load(DATA / name / "numbers.npz") as stored:
        names = sorted({key.rpartition(".")[0] for key in stored})
        return {
            module: _module(*(stored[f"{module}.{part}"] for part in ("codes", "zeros", "scales"))) for module in names
        }


def _module(codes, zeros, scales):
    groups = np.arange(len(codes)) // (len(codes) // len(scales))
    return peers.Module(4, codes, zeros, scales.view(np.uint16), "F16", groups)


def write_gemm(folder, name):
    """Writes the same checkpoint in AWQ's "gemm" layout."""
    folder.mkdir()
    with_zeros = not name.startswith("marlin")
    document = peers.read_config(checkpoint(name))
    document["quantization_config"]["version"] = "gemm"
    tensors = {
        key: tensor
        for key, tensor in peers.read_tensors(checkpoint(name)).items()
        if key.rpartition(".")[2] not in ("qweight", "qzeros", "scales")
    }
    for module, found in numbers(name).items():
        tensors[f"{module}.qweight"] = "I32", peers.awq_words(found.codes, 4)
        tensors[f"{module}.scales"] = "F16", found.scales
        if with_zeros:
            tensors[f"{module}.qzeros"] = "I32", peers.awq_words(found.zeros, 4)
    peers.write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(document), "utf-8")
    return folder


def apart(folder, name, of_file=lambda tensor: tensor.rpartition(".")[2]):
    """Writes a fixture in several files: by default codes, scales and zero points each in one of their own."""
    shutil.copytree(checkpoint(name), folder)
    (folder / "model.safetensors").unlink()
    tensors = peers.read_tensors(checkpoint(name))
    weight_map = {tensor: f"{of_file(tensor)}.safetensors" for tensor in tensors}
    for file in set(weight_map.values()):
        mine = {tensor: held for tensor, held in tensors.items() if weight_map[tensor] == file}
        peers.write_tensors(folder / file, mine)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("name", NAMES)
def test_marlin_native_is_that_of_the_same_numbers_in_awq(name, unaligned, tmp_path):
    source, awq = checkpoint(name), write_gemm(tmp_path / "awq", name)
    convert(awq, tmp_path / "of_awq", unaligned=unaligned)
    result = convert(source, tmp_path / "out", unaligned=unaligned, verify="all")
    kept = unaligned == "keep" and name != "marlin_g128"
    assert [module.name for module in result.kept] == ([DOWN] if kept else [])
    found, expected = (peers.read_tensors(tmp_path / each) for each in ("out", "of_awq"))
    assert found.keys() == expected.keys()
    for tensor, (dtype, array) in found.items():
        assert dtype == expected[tensor][0], tensor
        assert_identical(array, expected[tensor][1], tensor)
    assert verify(source, tmp_path / "out").kind == "conversion"
    assert verify(source, awq).kind == "checkpoints"
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_and_dry_run_tell_what_it_is(name, tmp_path):
    version, _, group_size = name.rpartition("_g")
    found = inspect(checkpoint(name))
    assert (found.format, found.bits, found.group_size) == (f"awq-{version}", 4, int(group_size))
    assert found.zero_point is (version != "marlin")
    sizes = {module: (each.codes.shape[0], each.codes.shape[1]) for module, each in numbers(name).items()}
    assert {module.name: (module.size_k, module.size_n) for module in found.modules} == sizes
    assert convert(checkpoint(name), tmp_path / "out", dry_run=True).dry_run
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["gemv_fast_g32", "gemv_fast_g128", "gemv_g64", "marlin_g64"])
def test_tensors_of_a_module_may_lie_in_several_files(name, to, tmp_path):
    source = apart(tmp_path / "source", name)
    convert(checkpoint(name), tmp_path / "whole", to=to)
    convert(source, tmp_path / "out", to=to, verify="all")
    found, expected = (peers.read_tensors(tmp_path / each) for each in ("out", "whole"))
    assert found.keys() == expected.keys()
    for tensor, (_, array) in found.items():
        assert_identical(array, expected[tensor][1], tensor)
    assert verify(source, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", ["marlin_g32", "marlin_g128"])
def test_what_lies_as_in_marlin_native_is_copied(name, tmp_path):
    convert(checkpoint(name), tmp_path / "out")
    before, after = peers.read_tensors(checkpoint(name)), peers.read_tensors(tmp_path / "out")
    for part in ("qweight", "scales"):
        assert_identical(after[f"{O_PROJ}.{part}"][1], before[f"{O_PROJ}.{part}"][1], part)
    (shard,) = plan_conversion(open_checkpoint(checkpoint(name))).shards
    kept = sum(span.rewrite is not None for span in shard.spans)
    assert kept == (0 if name == "marlin_g128" else 2)  # the module that Marlin's shapes cannot take is rewritten
    if name == "marlin_g128":
        assert len(shard.spans) == 1


# --- the ways in and out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize("name", ["gemv_fast_g32", "gemv_g128", "marlin_g64"])
def test_repositories_are_converted_and_reverted_file_by_file(hub, name, low_disk, tmp_path):
    """Scales and zero points lie in files of their own, so that one comes before the other."""
    source = apart(tmp_path / "source", name)
    hub.add_repository("org/awq", source)
    convert("org/awq", tmp_path / "out", low_disk=low_disk, verify="all", workers=1)
    convert(source, tmp_path / "expected", verify="all")
    found, expected = (peers.read_tensors(tmp_path / each) for each in ("out", "expected"))
    for tensor, (_, array) in expected.items():
        assert_identical(found[tensor][1], array, tensor)
    hub.add_repository("org/out", tmp_path / "out")
    revert("org/out", tmp_path / "back", low_disk=low_disk, workers=1)
    assert contents(tmp_path / "back") == contents(source)
    assert not (tmp_path / "out" / ".awq2marlin").exists()


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_executors_read_what_lies_in_other_files(kind, tmp_path):
    source = apart(tmp_path / "source", "gemv_fast_g64")
    with kind(2) as executor:
        convert(source, tmp_path / "out", to="compressed-tensors", verify="all", executor=executor)
        revert(tmp_path / "out", tmp_path / "back", executor=executor)
    assert contents(tmp_path / "back") == contents(source)


def test_a_batch_takes_them_all(tmp_path):
    sources = [str(shutil.copytree(checkpoint(name), tmp_path / name)) for name in NAMES]
    result = convert_many(sources, out_dir=tmp_path / "out", verify="all")
    assert [item.exit_code for item in result.items] == [0] * len(NAMES)
    for name in NAMES:
        assert verify(tmp_path / name, tmp_path / "out" / f"{name}-marlin").kind == "conversion"


def test_the_manifest_asks_version_01_for_a_newer_one_and_the_card_names_the_source(tmp_path):
    for name in ("gemv_g64", "gemv_fast_g64", "marlin_g64"):
        convert(checkpoint(name), tmp_path / name)
        assert read_manifest(Folder.at(tmp_path / name)).version == 2
        title = f"AWQ {name.removesuffix('_g64')}"
        card = (tmp_path / name / "README.md").read_text("utf-8")
        assert f"The weights of an {title} checkpoint (4 bits, group size 64" in card
        assert f"How to get the {title} checkpoint back" in card


def test_killed_before_any_of_its_steps_it_is_completed_by_the_same_command(killed_there_and_back, tmp_path):
    source = apart(tmp_path / "source", "gemv_fast_g128", lambda tensor: "b" if tensor.endswith("scales") else "a")
    killed_there_and_back(source)


# --- what lies, or cannot be converted -------------------------------------------------------------------------------


def changed(folder, name, tensor, change):
    """Writes a fixture with one tensor changed, and returns its folder."""
    shutil.copytree(checkpoint(name), folder)
    tensors = peers.read_tensors(folder)
    dtype, array = tensors[tensor]
    array = array.copy()
    made = change(array)
    tensors[tensor] = dtype, array if made is None else made
    peers.write_tensors(folder / "model.safetensors", tensors)
    return folder


def put(index, value):
    """Returns a change of one element."""

    def change(array):
        array[index] = value

    return change


LIES = {
    "gemv: scales past the last group": ("gemv_g64", "scales", put((5, 6), 1)),
    "gemv: zero points past the last group": ("gemv_g64", "qzeros", put((5, 0), np.int32(1) << 30)),
    "gemv: a word past the last group": ("gemv_g64", "qzeros", put((71, 1), 1)),
    "gemv_fast: a product of nothing": ("gemv_fast_g64", "qzeros", put((0, 3), 0x3C01)),
    "gemv_fast: a product that is no number": ("gemv_fast_g64", "qzeros", put((1, 3), 0x7E00)),
    "gemv_fast: products past the last group": ("gemv_fast_g64", "qzeros", put((3, 3), 0x8000)),
    "gemv_fast: scales past the last group": ("gemv_fast_g64", "scales", put((15, 71), 1)),
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("case", LIES)
def test_what_could_not_be_given_back_is_refused_by_name(case, to, tmp_path):
    name, part, change = LIES[case]
    source = changed(tmp_path / "source", name, f"{DOWN}.{part}", change)
    with pytest.raises(CheckpointError, match="could not be undone") as caught:
        convert(source, tmp_path / "out", to=to)
    (problem,) = caught.value.problems
    assert (problem.file, problem.code) == ("model.safetensors", "contradiction")
    assert problem.tensor == f"{DOWN}.{part}"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7E01])
def test_an_infinite_scale_is_exact_where_it_is_only_moved_and_refused_where_zero_points_hang_on_it(scale, tmp_path):
    source = changed(tmp_path / "gemv", "gemv_g64", f"{O_PROJ}.scales", put((3, 0), scale))
    convert(source, tmp_path / "out", verify="all")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    source = changed(tmp_path / "fast", "gemv_fast_g64", f"{O_PROJ}.scales", put((0, 3), scale))
    with pytest.raises(CheckpointError, match="infinite or NaN") as caught:
        convert(source, tmp_path / "other")
    assert caught.value.problems[0].tensor == f"{O_PROJ}.qzeros"


def test_a_zero_scale_has_the_zero_point_0_and_comes_back(tmp_path):
    source = changed(tmp_path / "half", "gemv_fast_g64", f"{O_PROJ}.scales", put((0, 3), 0))
    tensors = peers.read_tensors(source)
    products = tensors[f"{O_PROJ}.qzeros"][1].copy()
    products[0, 3] = 0x8000  # -(0 z)
    tensors[f"{O_PROJ}.qzeros"] = "F16", products
    peers.write_tensors(source / "model.safetensors", tensors)
    convert(source, tmp_path / "awq", to="awq", verify="all")
    assert peers.decode_awq(peers.read_tensors(tmp_path / "awq"), O_PROJ, 4).zeros[0, 3] == 0
    revert(tmp_path / "awq", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


WRONG = {
    "gemv: codes of 16 bits": ("gemv_g64", "qweight", "F16", (72, 24), "wrong-dtype"),
    "gemv: scales of fp32": ("gemv_g64", "scales", "F32", (72, 16), "wrong-dtype"),
    "gemv: scales of no padding": ("gemv_g64", "scales", "F16", (72, 3), "contradiction"),
    "gemv: zero points of no padding": ("gemv_g64", "qzeros", "I32", (72, 1), "contradiction"),
    "gemv: K of no group": ("gemv_g64", "qweight", "I32", (72, 23), "wrong-shape"),
    "gemv: flat": ("gemv_g64", "qweight", "I32", (1728,), "wrong-shape"),
    "gemv: empty": ("gemv_g64", "qweight", "I32", (0, 24), "wrong-shape"),
    "gemv_fast: codes of 32 bits": ("gemv_fast_g64", "qweight", "I32", (18, 192), "wrong-dtype"),
    "gemv_fast: products of bf16": ("gemv_fast_g64", "qzeros", "BF16", (16, 72), "wrong-dtype"),
    "gemv_fast: K of half a turn": ("gemv_fast_g32", "qweight", "I16", (18, 160), "wrong-shape"),
    "gemv_fast: fewer groups": ("gemv_fast_g64", "qzeros", "F16", (3, 72), "contradiction"),
    "marlin: half a tile": ("marlin_g64", "qweight", "I32", (4, 64), "wrong-shape"),
    "marlin: scales of more groups": ("marlin_g64", "scales", "F16", (2, 64), "foreign-format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_headers_are_refused_by_name_before_a_byte_is_written(case, tmp_path):
    name, part, dtype, shape, code = WRONG[case]
    shutil.copytree(checkpoint(name), tmp_path / "source")
    tensors = peers.read_tensors(tmp_path / "source")
    kind = {"F16": np.uint16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I16": np.int16}[dtype]
    tensors[f"{DOWN}.{part}"] = dtype, np.zeros(shape, kind)
    peers.write_tensors(tmp_path / "source" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert code in {problem.code for problem in caught.value.problems}
    assert {problem.tensor.rpartition(".")[0] for problem in caught.value.problems} == {DOWN}
    assert not (tmp_path / "out").exists()


VERSIONS = ["gemm", "gemv", "gemv_fast", "marlin"]
NAMES_OF_64 = {"gemm": "gemm", **{version: f"{version}_g64" for version in VERSIONS[1:]}}


@pytest.mark.parametrize(
    ("name", "said"),
    [(name, said) for version, name in NAMES_OF_64.items() for said in VERSIONS if said != version],
)
def test_a_config_of_another_version_than_the_tensors_is_told_with_both(name, said, tmp_path):
    shown = name.removesuffix("_g64")
    if name == "gemm":
        write_gemm(tmp_path / "source", "marlin_g64")  # no version needs a tensor that it lacks, but those with zeros
    else:
        shutil.copytree(checkpoint(name), tmp_path / "source")
    document = peers.read_config(tmp_path / "source")
    document["quantization_config"] |= {"version": said, "zero_point": said != "marlin" and name != "gemm"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path / "source")
    (problem,) = caught.value.problems
    titles = {"gemm": "AWQ", "gemv": "AWQ gemv", "gemv_fast": "AWQ gemv_fast", "marlin": "AWQ marlin"}
    assert (problem.file, problem.code) == ("config.json", "contradiction")
    assert f"the config says {titles[said]} (4 bits" in problem.message
    assert f"the tensors are those of {titles[shown]};" in problem.message


def test_whether_the_config_says_the_truth_is_asked_before_whether_the_source_is_of_the_target(tmp_path):
    shutil.copytree(checkpoint("gemv_g64"), tmp_path / "source")
    document = peers.read_config(tmp_path / "source")
    document["quantization_config"] |= {"version": "gemm"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError, match="the tensors are those of AWQ gemv;"):
        convert(tmp_path / "source", tmp_path / "out", to="awq")


@pytest.mark.parametrize(("version", "size"), [("gemv", 32), ("gemv_fast", 32), ("marlin", 32)])
def test_groups_that_the_config_says_wrongly_are_told_with_those_that_fit(version, size, tmp_path):
    shutil.copytree(checkpoint(f"{version}_g64"), tmp_path / "source")
    document = peers.read_config(tmp_path / "source")
    document["quantization_config"] |= {"group_size": size}
    (tmp_path / "source" / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path / "source")
    for problem in caught.value.problems:
        assert f"as the config's 4 bits in groups of {size} and the module's other tensors mean" in problem.message
        assert problem.message.endswith("; 4 bits in groups of 64 would fit them all")


def test_a_changed_zero_point_is_found_by_its_place(tmp_path):
    scale = peers.read_tensors(checkpoint("gemv_fast_g64"))[f"{O_PROJ}.scales"][1][1, 7]
    zero = int(numbers("gemv_fast_g64")[O_PROJ].zeros[1, 7])
    product = -(np.array(scale, np.uint16).view(np.float16).astype(np.float32) * (zero ^ 1)).astype(np.float16)
    source = changed(tmp_path / "source", "gemv_fast_g64", f"{O_PROJ}.qzeros", put((1, 7), product.view(np.uint16)))
    convert(checkpoint("gemv_fast_g64"), tmp_path / "out")
    with pytest.raises(DifferenceError, match="zero point at row 1, column 7"):
        verify(source, tmp_path / "out")
    with pytest.raises(DifferenceError, match="zero point at row 1, column 7"):
        verify(source, checkpoint("gemv_g64"))


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin"])
def test_modules_of_other_groups_are_named_in_pairs(version, tmp_path):
    shutil.copytree(checkpoint(f"{version}_g64"), tmp_path / "source")
    tensors, others = (peers.read_tensors(checkpoint(f"{version}_g{size}")) for size in (64, 32))
    tensors |= {name: held for name, held in others.items() if name.startswith(DOWN)}
    peers.write_tensors(tmp_path / "source" / "model.safetensors", tensors)
    found = inspect(tmp_path / "source")
    assert not found.is_convertible
    assert found.reason.startswith(
        f"{DOWN}.qweight: this module has 4 bits in groups of 32, but {O_PROJ} has 4 bits in"
    )
    with pytest.raises(CheckpointError, match="has 4 bits in groups of 64; only checkpoints with one kind"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("said", [False, None])
@pytest.mark.parametrize("name", ["gemv_g64", "gemv_fast_g64"])
def test_zero_points_count_whatever_the_config_says_as_the_kernels_read_them_always(name, said, tmp_path):
    shutil.copytree(checkpoint(name), tmp_path / "source")
    document = peers.read_config(tmp_path / "source")
    document["quantization_config"]["zero_point"] = said
    (tmp_path / "source" / "config.json").write_text(json.dumps(document), "utf-8")
    assert inspect(tmp_path / "source").zero_point
    for to in TARGETS:
        convert(tmp_path / "source", tmp_path / to, to=to, verify="all")
        convert(checkpoint(name), tmp_path / "expected" / to, to=to)
        found, expected = (peers.read_tensors(folder / to) for folder in (tmp_path, tmp_path / "expected"))
        assert found.keys() == expected.keys()
        for tensor, (_, array) in expected.items():
            assert_identical(found[tensor][1], array, tensor)
        revert(tmp_path / to, tmp_path / "back" / to)
        assert contents(tmp_path / "back" / to) == contents(tmp_path / "source")
