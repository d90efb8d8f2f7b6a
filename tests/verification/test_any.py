"""`verify` tells any two checkpoints apart, whatever their formats, and says how much differs and where."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq2marlin import CheckpointError, DifferenceError, Problem, VerifyResult, convert, revert, verify
from awq2marlin.arguments import ArgumentError
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import write_checkpoint
from awq2marlin.cli.app import main
from tests.e2e.inputs import edit_json, join_file, layer, plain, split_file

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
FILE, SIDE_FILE = "model.safetensors", "generation_config.json"
MODULES = layer(0, hidden=192, kv=64, inter=512)
WEIGHTS = {NORM: (192,), "model.embed_tokens.weight": (8, 192), f"{UP}.bias": (512,), "lm_head.weight": (8, 192)}

#: Every format, and Marlin-native both ways; each made of the AWQ checkpoint, without a manifest that says so.
KINDS = ("awq", "compressed-tensors", "kept", "padded")


def recipe(**options: Any) -> Any:
    return plain(MODULES, WEIGHTS, **options)


def make(folder: Path, awq: Path, kind: str) -> Path:
    """Makes a checkpoint of a kind; one that others can write too forgets that it was converted."""
    if kind == "awq":
        return Path(shutil.copytree(awq, folder))
    to, unaligned = ("marlin", "keep" if kind == "kept" else "pad") if kind in ("kept", "padded") else (kind, None)
    convert(awq, folder, to=to, unaligned=unaligned, verify="none")
    if to != "marlin":
        (folder / "marlin_manifest.json").unlink()
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same checkpoint in every kind, and of another one in AWQ and compressed-tensors."""
    root = tmp_path_factory.mktemp("any")
    write_checkpoint(root / "source", recipe())
    write_checkpoint(root / "random", recipe(seed=7))
    for kind in KINDS:
        make(root / kind, root / "source", kind)
    make(root / "other", root / "random", "compressed-tensors")
    return root


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_tensor(folder: Path, tensor: str, edit: Callable[[bytearray], Any]) -> None:
    header, data = split_file(folder / FILE)
    begin, end = header[tensor]["data_offsets"]
    content = bytearray(data[begin:end])
    edit(content)
    join_file(folder / FILE, json.dumps(header).encode(), data[:begin] + content + data[end:])


def change(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites the one file of a checkpoint from its tensors: name to (type, shape, bytes)."""
    header, data = split_file(folder / FILE)
    header.pop("__metadata__", None)
    tensors = {name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in header.items()}
    document, content = {}, b""
    for name, (dtype, shape, part) in edit(tensors).items():
        offsets = [len(content), len(content) + len(part)]
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += part
    join_file(folder / FILE, json.dumps(document).encode(), content)


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def differences(one: Any, other: Any, **options: Any) -> tuple[tuple[Problem, ...], VerifyResult]:
    with pytest.raises(DifferenceError) as caught:
        verify(one, other, **options)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.result, VerifyResult)
    return caught.value.problems, caught.value.result


# --- equal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), list(itertools.product(KINDS, repeat=2)))
def test_the_same_model_in_any_two_formats_is_equal(made: Path, one: str, other: str) -> None:
    result = verify(made / one, made / other)
    if "awq" in (one, other) and {one, other} & {"kept", "padded"}:
        assert result.kind == "conversion"
        assert result.differences is None
        return
    assert result.kind == "checkpoints"
    assert (len(result.modules), result.modules_total, result.tensors, result.files) == (7, 7, 4, 1)
    numbers = sum(size_k * size_n for size_k, size_n in MODULES.values())
    assert result.differences is not None
    assert not result.differences
    assert (result.differences.values.compared, result.differences.values.differing) == (numbers, 0)
    assert result.differences.scales.compared == result.differences.zero_points.compared == numbers // 64


@pytest.mark.parametrize("options", [{"bits": 8}, {"group_size": -1}, {"group_size": 32, "bits": 8}])
@pytest.mark.parametrize(("one", "other"), [("compressed-tensors", "padded"), ("awq", "compressed-tensors")])
def test_other_bits_and_groups(tmp_path: Path, options: Any, one: str, other: str) -> None:
    write_checkpoint(tmp_path / "source", recipe(**options))
    left, right = (make(tmp_path / kind, tmp_path / "source", kind) for kind in (one, other))
    assert not verify(left, right).differences
    assert verify(right, left).modules_total == 7


def test_what_belongs_to_the_format_is_listed(made: Path) -> None:
    result = verify(made / "awq", made / "compressed-tensors")
    one, other = result.formats
    assert (one.name, other.name) == ("awq", "compressed-tensors")
    assert one.not_compared == ("README.md", "config.json")
    shapes = tuple(f"{module}.weight_shape" for module in sorted(MODULES))
    assert other.not_compared == ("README.md", "config.json", *shapes)
    assert verify(made / "padded", made / "kept").formats[0].not_compared == (
        "README.md",
        "config.json",
        "marlin_manifest.json",
    )


def test_zero_points_in_the_middle_are_those_that_are_not_stored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "symmetric", recipe(has_qzeros=False))
    convert(tmp_path / "symmetric", tmp_path / "awq", to="compressed-tensors")
    convert(tmp_path / "awq", tmp_path / "with_zeros", to="awq")
    (tmp_path / "with_zeros" / "marlin_manifest.json").unlink()
    for one, other in itertools.permutations(("symmetric", "with_zeros")):
        result = verify(tmp_path / one, tmp_path / other)
        assert result.differences is not None
        assert result.differences.zero_points.compared == result.differences.scales.compared
    edit_tensor(tmp_path / "with_zeros", f"{UP}.qzeros", lambda c: c.__setitem__(0, 0x87))
    (problem,), _ = differences(tmp_path / "symmetric", tmp_path / "with_zeros")
    message = "zero point at row 0, column 0: 8 in A, 7 in B"
    assert problem == Problem(FILE, f"{UP}.qzeros", "different-value", message)
    (problem,), _ = differences(tmp_path / "with_zeros", tmp_path / "symmetric")
    assert problem.message == "zero point at row 0, column 0: 7 in A, 8 in B"
    assert problem.tensor == f"{UP}.qzeros"


def test_one_file_and_two_files_of_the_same_model_are_equal(made: Path, tmp_path: Path) -> None:
    two = copy(made / "awq", tmp_path / "two")
    header, data = split_file(two / FILE)
    (two / FILE).unlink()
    names = [name for name in header if name != "__metadata__"]
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        shard, entries, content = f"model-{number:05d}-of-00002.safetensors", {}, b""
        for name in part:
            piece = data[slice(*header[name]["data_offsets"])]
            entries[name] = {**header[name], "data_offsets": [len(content), len(content) + len(piece)]}
            content += piece
            weight_map[name] = shard
        join_file(two / shard, json.dumps(entries).encode(), content)
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for other in KINDS:
        result = verify(two, made / other)
        assert result.kind == "checkpoints"
        assert result.formats[0].not_compared == ("README.md", "config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("rounded", [True, False])
def test_scales_of_another_type_are_compared_as_numbers(made: Path, tmp_path: Path, rounded: bool) -> None:
    """bf16 holds what fp16 holds if its last three bits are zero; the type alone is a note, no difference."""
    one, other = copy(made / "awq", tmp_path / "fp16"), copy(made / "awq", tmp_path / "bf16")

    def cut(tensors: dict[str, Any]) -> dict[str, Any]:
        if not rounded:
            return tensors
        return {
            name: value if not name.endswith(".scales") else (*value[:2], _cut(value[2]))
            for name, value in tensors.items()
        }

    def as_bf16(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value if not name.endswith(".scales") else ("BF16", value[1], _bf16(value[2]))
            for name, value in tensors.items()
        }

    change(one, cut)
    change(other, lambda tensors: as_bf16(cut(tensors)))
    note = "scales of 7 modules are F16 in A, BF16 in B; they were compared as numbers"
    if rounded:
        assert verify(one, other).notes == (note,)
        return
    problems, result = differences(one, other)
    assert result.notes == (note,)
    assert len(problems) == 7
    assert result.differences is not None
    assert 0 < result.differences.scales.largest < 2**-7
    assert result.differences.values.differing == result.differences.zero_points.differing == 0


def _cut(data: bytes) -> bytes:
    return (np.frombuffer(data, np.uint16) & np.uint16(0xFFF8)).tobytes()


def _bf16(data: bytes) -> bytes:
    values = np.frombuffer(data, np.float16).astype(np.float32)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def test_zeros_of_either_sign_are_equal_scales(made: Path, tmp_path: Path) -> None:
    folders = [copy(made / "awq", tmp_path / name) for name in ("plus", "minus")]
    for folder, zero in zip(folders, (0x00, 0x80), strict=True):
        edit_tensor(folder, f"{UP}.scales", lambda c, zero=zero: c.__setitem__(slice(0, 2), bytes([0, zero])))
    assert not verify(*folders).differences


def test_other_keys_of_the_config_are_a_note(made: Path, tmp_path: Path) -> None:
    other = copy(made / "awq", tmp_path / "other")
    edit_json("config.json", lambda config: config.update(rope_theta=1, model_type="gpt2"))(other)
    assert verify(made / "compressed-tensors", other).notes == (
        "config.json: A and B differ in model_type, rope_theta",
    )


# --- one difference ------------------------------------------------------------------------------------------------


def flip(at: int, mask: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        content[at] ^= mask

    return edit


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("other", ["compressed-tensors", "padded"])
@pytest.mark.parametrize(
    ("part", "at", "mask", "place"),
    [
        ("weight_packed", 4 * (24 * 77 + 2), 0x30, "value at row 17, column 77"),
        ("weight_zero_point", 4 * (3 * 9 + 1), 0x01, "zero point at row 1, column 72"),
        ("weight_scale", 2 * (3 * 500 + 2), 0x01, "scale at row 2, column 500"),
    ],
)
def test_one_number(
    made: Path, tmp_path: Path, other: str, part: str, at: int, mask: int, place: str, swapped: bool
) -> None:
    changed = copy(made / "compressed-tensors", tmp_path / "changed")
    edit_tensor(changed, f"{UP}.{part}", flip(at, mask))
    pair = (changed, made / other) if not swapped else (made / other, changed)
    (problem,), result = differences(*pair)
    assert (problem.file, problem.code) == (FILE, "different-value")
    names = {"weight_packed": "qweight", "weight_zero_point": "qzeros", "weight_scale": "scales"}
    assert problem.tensor == f"{UP}.{names[part] if other == 'padded' and not swapped else part}"
    assert problem.message.startswith(f"{place}: ")
    assert problem.message.endswith(" in B")
    assert result.differences is not None
    (module,) = result.differences.modules
    counts = (module.values, module.zero_points, module.scales)
    assert [count.differing for count in counts] == [int(name == part) for name in names]
    assert [count.compared for count in counts] == [192 * 512, 3 * 512, 3 * 512]
    expected = {"weight_packed": 3, "weight_zero_point": 1}.get(part)
    assert expected is None or max(count.largest for count in counts) in (1, 2, 3)


def test_both_values_are_told(made: Path, tmp_path: Path) -> None:
    one, other = (copy(made / "awq", tmp_path / name) for name in ("one", "other"))
    for folder, word, scale in ((one, 0x51, 0x3C00), (other, 0x59, 0x3C01)):
        edit_tensor(folder, f"{UP}.qweight", lambda c, word=word: c.__setitem__(0, word))
        edit_tensor(folder, f"{DOWN}.scales", lambda c, s=scale: c.__setitem__(slice(0, 2), s.to_bytes(2, "little")))
    problems, _ = differences(one, other)
    assert [(problem.tensor, problem.message) for problem in problems] == [
        (f"{DOWN}.scales", "scale at row 0, column 0: 1 (0x3c00) in A, 1.00098 (0x3c01) in B"),
        (f"{UP}.qweight", "value at row 0, column 0: 1 in A, 9 in B"),
    ]


@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_padding_must_be_zero(made: Path, tmp_path: Path, part: str) -> None:
    """q_proj of K=192 is padded to 256: the last word of its weight, and of its scales, are padding."""
    padded = copy(made / "padded", tmp_path / "padded")
    edit_tensor(padded, f"{Q_PROJ}.{part}", flip(-1, 0x70))
    (problem,), result = differences(made / "compressed-tensors", padded)
    assert (problem.tensor, problem.code) == (f"{Q_PROJ}.{part}", "different-value")
    assert problem.message.startswith("padding at row ")
    assert problem.message.endswith(" in B, expected 0")
    assert result.differences is not None
    assert [(each.padding, each.values.differing) for each in result.differences.modules] == [(1, 0)]


@pytest.mark.parametrize("swapped", [False, True])
def test_one_byte_of_another_tensor(made: Path, tmp_path: Path, swapped: bool) -> None:
    changed = copy(made / "awq", tmp_path / "changed")
    edit_tensor(changed, "lm_head.weight", lambda c: c.__setitem__(slice(2 * 194, 2 * 194 + 1), b"\x77"))
    edit_tensor(changed, NORM, lambda c: c.__setitem__(slice(7, 9), b"\xee\xee"))
    pair = (changed, made / "compressed-tensors")
    problems, _ = differences(*(pair[::-1] if swapped else pair))
    there, here = ("B", "A") if swapped else ("A", "B")
    assert [(problem.tensor, problem.code) for problem in problems] == [
        ("lm_head.weight", "different-bytes"),
        (NORM, "different-bytes"),
    ]
    assert problems[0].message.startswith("row 1, column 2, byte 388: ")
    assert f"0x77 in {there}" in problems[0].message
    assert f" in {here}" in problems[0].message
    assert problems[1].message.startswith("byte 7: ")
    assert problems[1].message.endswith("; 2 of 384 bytes differ")


def test_another_shape_or_type_of_a_tensor(made: Path, tmp_path: Path) -> None:
    changed = copy(made / "awq", tmp_path / "changed")
    change(changed, lambda tensors: {**tensors, NORM: ("F32", [96], tensors[NORM][2])})
    (problem,), _ = differences(changed, made / "compressed-tensors")
    assert problem == Problem(FILE, NORM, "wrong-shape", "F32 [96] in A, F16 [192] in B")


def test_files(made: Path, tmp_path: Path) -> None:
    changed = copy(made / "awq", tmp_path / "changed")
    (changed / SIDE_FILE).write_bytes((changed / SIDE_FILE).read_bytes() + b"\n")
    (changed / "tokenizer.json").write_text("{}")
    problems, _ = differences(changed, made / "compressed-tensors")
    assert problems == (
        Problem(SIDE_FILE, "", "different-bytes", "the files differ from byte 25 on: 26 bytes in A, 25 in B"),
        Problem("tokenizer.json", "", "missing-file", "only A has this file"),
    )
    problems, _ = differences(made / "compressed-tensors", changed)
    assert problems[1].message == "only B has this file"


def test_what_one_side_lacks(made: Path, tmp_path: Path) -> None:
    """A module is one difference, not three tensors; a weight in its place belongs to it."""
    changed = copy(made / "awq", tmp_path / "changed")
    parts = [f"{module}.{part}" for module in (UP, DOWN) for part in ("qweight", "qzeros", "scales")]
    weight = ("F16", [192, 512], bytes(2 * 192 * 512))
    change(
        changed, lambda tensors: {**without(*parts, NORM)(tensors), f"{DOWN}.weight": weight, "x": ("F16", [0], b"")}
    )
    problems, result = differences(changed, made / "compressed-tensors")
    assert problems == (
        Problem(
            FILE, f"{DOWN}.weight_packed", "missing-tensor", "the module is quantized in B, in full precision in A"
        ),
        Problem(FILE, f"{UP}.weight_packed", "missing-tensor", "only B has this module"),
        Problem(FILE, NORM, "missing-tensor", "only B has this tensor"),
        Problem(FILE, "x", "missing-tensor", "only A has this tensor"),
    )
    assert (len(result.modules), result.modules_total) == (5, 5)


def test_a_derived_tensor_that_does_not_follow(made: Path, tmp_path: Path) -> None:
    changed = copy(made / "compressed-tensors", tmp_path / "changed")
    edit_tensor(changed, f"{UP}.weight_shape", flip(0, 1))
    (problem,), _ = differences(made / "awq", changed)
    assert (problem.tensor, problem.code) == (f"{UP}.weight_shape", "different-value")
    assert problem.message.startswith("in B its content does not match its module's shape: K ends inside")


# --- many ----------------------------------------------------------------------------------------------------------


def test_other_bits_and_other_groups_are_told_once(made: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "eight", recipe(bits=8))
    write_checkpoint(tmp_path / "wide", recipe(group_size=32, seed=3))
    problems, result = differences(tmp_path / "eight", made / "compressed-tensors")
    message = "8 bits in A, 4 in B; no module was compared value for value"
    assert problems[0] == Problem("config.json", "", "config", message)
    assert (result.modules, result.tensors) == ((), 4)
    problems, result = differences(tmp_path / "wide", made / "compressed-tensors")
    message = "group size 32 in A, 64 in B; zero points and scales were not compared"
    assert problems[0] == Problem("config.json", "", "config", message)
    assert result.differences is not None
    assert (len(result.differences.modules), result.differences.scales.compared) == (7, 0)


def test_numbers_that_were_not_compared_are_none_in_the_table(made: Path, tmp_path: Path, run: Any) -> None:
    write_checkpoint(tmp_path / "wide", recipe(group_size=32, seed=3))
    _, _, err = run("verify", tmp_path / "wide", made / "compressed-tensors")
    assert err.count("15, -, -\n") == 8  # seven modules, and all together


def test_a_module_of_another_k_says_nothing_of_the_groups(made: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "short", plain({**MODULES, UP: (128, 512)}, WEIGHTS))
    problems, _ = differences(tmp_path / "short", made / "compressed-tensors")
    assert [problem.message for problem in problems if problem.file == "config.json"] == []
    assert "K=128, N=512 in A, K=192, N=512 in B" in {problem.message for problem in problems}


def test_other_shapes_of_a_module(made: Path, tmp_path: Path) -> None:
    modules = {**MODULES, UP: (192, 256)}
    write_checkpoint(tmp_path / "narrow", plain(modules, {**WEIGHTS, f"{UP}.bias": (256,)}))
    problems, result = differences(tmp_path / "narrow", made / "compressed-tensors")
    found = {problem.tensor: problem for problem in problems}[f"{UP}.weight_packed"]
    assert (found.code, found.message) == ("wrong-shape", "K=192, N=256 in A, K=192, N=512 in B")
    assert result.modules_total == 6


def test_a_sample_looks_at_some_modules_and_everything_else(made: Path, tmp_path: Path) -> None:
    changed = copy(made / "awq", tmp_path / "changed")
    edit_tensor(changed, f"{UP}.qweight", flip(0, 1))
    result = verify(changed, made / "compressed-tensors", modules=1)
    assert ([module.name for module in result.modules], result.modules_total) == ([DOWN], 7)
    assert verify(changed, made / "compressed-tensors", layers=0).modules == ()
    differences(changed, made / "compressed-tensors", modules=7)


def test_the_outcome_is_the_same_whatever_the_number_of_workers(made: Path) -> None:
    found = [differences(made / "awq", made / "other", workers=workers)[0] for workers in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_an_error_with_its_counts_can_be_sent_elsewhere(made: Path) -> None:
    with pytest.raises(DifferenceError) as caught:
        verify(made / "awq", made / "other")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, again.result) == (caught.value.problems, caught.value.result)


def test_problems_are_capped_and_counts_are_not(tmp_path: Path) -> None:
    modules = {f"model.layers.{number}.x": (64, 8) for number in range(230)}
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), plain(modules, {}, seed=seed))
    problems, result = differences(tmp_path / "0", tmp_path / "1")
    assert len(problems) == 200
    assert result.differences is not None
    assert len(result.differences.modules) == 230


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return call


def test_two_models_are_summed_up(made: Path, run: Any) -> None:
    code, out, err = run("verify", made / "awq", made / "other", "--quiet")
    assert (code, out) == (3, "")
    head, count, table, others, places, tail = err.rstrip("\n").split("\n\n")
    assert head.splitlines() == [
        "error: the two checkpoints differ",
        f"A  {made / 'awq'}: AWQ, 4 bits, groups of 64, with zero points",
        f"B  {made / 'other'}: compressed-tensors, 4 bits, groups of 64, with zero points",
    ]
    assert count == "7 of 7 compared modules differ; 4 other differences"
    rows = table.splitlines()
    assert rows[0].split("  ")[0] == "module"
    assert [row.split()[0] for row in rows[2:-1]] == sorted(MODULES)
    assert rows[-1].startswith("all compared modules")
    result = differences(made / "awq", made / "other")[1].differences
    assert result is not None
    for each in (result.values, result.zero_points, result.scales):
        assert f"{each.differing:,} of {each.compared:,} (" in rows[-1]
    assert others.splitlines()[0] == "other differences:"
    assert len(others.splitlines()) == 5
    firsts = places.splitlines()
    assert firsts[0] == "first place in each module:"
    assert len(firsts) == 8
    assert firsts[1].startswith(f"  {FILE}: {DOWN}.weight_packed: value at row 0, column ")
    assert (
        tail
        == "specific to the format, not compared: A README.md, config.json; B README.md, config.json, 7 x weight_shape"
    )


def test_a_long_list_is_cut_and_counted(tmp_path: Path, run: Any) -> None:
    modules = {f"model.layers.{number}.x": (64, 8) for number in range(30)}
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), plain(modules, {f"n.{n}.weight": (4,) for n in range(25)}, seed=seed))
    _, _, err = run("verify", tmp_path / "0", tmp_path / "1")
    assert "30 of 30 compared modules differ; 25 other differences" in err
    assert err.count("... and 10 more\n") == 2
    assert err.count("  ... and 5 more\n") == 1
    assert len(err.splitlines()) < 80


def test_names_are_escaped(made: Path, tmp_path: Path, run: Any) -> None:
    changed = copy(made / "awq", tmp_path / "changed")
    change(changed, lambda tensors: {**tensors, "\x1b[31m": ("F16", [0], b"")})
    _, _, err = run("verify", changed, made / "compressed-tensors", "-q")
    assert "\x1b" not in err
    assert "\\x1b[31m: only A has this tensor" in err


def test_json_of_two_models(made: Path, run: Any) -> None:
    code, out, _ = run("verify", made / "awq", made / "other", "--json", "-q")
    document = json.loads(out)
    assert (code, document["status"], document["exit_code"]) == (3, "difference", 3)
    assert len(document["errors"]) == 11
    details = document["details"]
    assert (details["kind"], details["modules_verified"], details["side_files"]) == ("checkpoints", 7, 1)
    assert details["formats"] == {"source": "awq", "output": "compressed-tensors"}
    assert details["of_the_format"]["source"] == ["README.md", "config.json"]
    found = details["differences"]
    assert (found["others"], [each["name"] for each in found["modules"]]) == (4, sorted(MODULES))
    assert found["values"]["differing"] == sum(each["values"]["differing"] for each in found["modules"])
    assert {module["verified"] for module in document["modules"]} == {False}
    assert {module["layout"] for module in document["modules"]} == {"compressed-tensors"}


def test_text_and_json_of_two_equal_checkpoints(made: Path, run: Any) -> None:
    code, out, _ = run("verify", made / "compressed-tensors", made / "padded")
    lines = out.splitlines()
    assert (code, lines[0]) == (0, "equal: 7 of 7 modules, value for value")
    assert lines[2] == "two checkpoints of the same model, compared by values:"
    assert lines[3].startswith(f"A  {made / 'compressed-tensors'}: compressed-tensors, 4 bits")
    assert lines[5].startswith("specific to the format, not compared: A README.md, config.json, 7 x weight_shape; B ")
    code, out, _ = run("verify", made / "compressed-tensors", made / "padded", "--json")
    differences = json.loads(out)["details"]["differences"]
    assert (code, differences["modules"], differences["others"]) == (0, [], 0)
    numbers = sum(size_k * size_n for size_k, size_n in MODULES.values())
    assert differences["values"] == {"differing": 0, "compared": numbers, "largest": 0.0}


# --- a conversion or not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["marlin", "compressed-tensors"])
def test_a_conversion_is_told_as_one_in_either_order(made: Path, tmp_path: Path, to: str, run: Any) -> None:
    convert(made / "source", tmp_path / "out", to=to)
    for pair in itertools.permutations((made / "source", tmp_path / "out")):
        result = verify(*pair)
        assert (result.kind, result.source, result.output) == ("conversion", made / "source", tmp_path / "out")
        _, out, _ = run("verify", *pair)
        assert f"{tmp_path / 'out'} is the conversion of {made / 'source'}\n" in out


def test_a_conversion_of_a_conversion_is_one_of_the_second_only(made: Path, tmp_path: Path) -> None:
    convert(made / "source", tmp_path / "ct", to="compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "awq", to="awq")
    convert(tmp_path / "awq", tmp_path / "marlin")
    assert verify(tmp_path / "ct", tmp_path / "awq").kind == "conversion"
    assert verify(tmp_path / "awq", tmp_path / "marlin").kind == "conversion"
    assert verify(made / "source", tmp_path / "awq").kind == "checkpoints"
    assert verify(tmp_path / "ct", tmp_path / "marlin").kind == "checkpoints"


def test_a_conversion_that_makes_zero_points_is_one(tmp_path: Path) -> None:
    """AWQ outputs always have them, and say so in their config."""
    write_checkpoint(tmp_path / "symmetric", recipe(has_qzeros=False))
    convert(tmp_path / "symmetric", tmp_path / "ct", to="compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "awq", to="awq")
    assert verify(tmp_path / "ct", tmp_path / "awq").kind == "conversion"
    assert verify(tmp_path / "symmetric", tmp_path / "awq").kind == "checkpoints"


def test_a_conversion_of_another_model_of_the_same_shapes_is_summed_up(made: Path, tmp_path: Path) -> None:
    """Its manifest could be of the first one, but for the digests: none of the files is the one that was converted."""
    convert(made / "random", tmp_path / "out")
    for pair in itertools.permutations((made / "source", tmp_path / "out")):
        problems, result = differences(*pair)
        assert (result.kind, len(problems)) == ("checkpoints", 11)


def test_a_damaged_conversion_is_told_by_its_first_difference(made: Path, tmp_path: Path) -> None:
    convert(made / "source", tmp_path / "out")
    for module in (UP, DOWN):
        edit_tensor(tmp_path / "out", f"{module}.qweight", flip(0, 1))
    with pytest.raises(DifferenceError) as caught:
        verify(made / "source", tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.tensor, caught.value.result) == (f"{DOWN}.qweight", None)


# --- devices, the Hub, refusals ------------------------------------------------------------------------------------


def test_a_device_needs_something_to_run(made: Path, run: Any) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match=r"device runs modules that are Marlin-native; .*awq is AWQ"):
        verify(made / "compressed-tensors", made / "awq", device="cpu")
    code, out, err = run("verify", made / "padded", made / "compressed-tensors", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("usage error: --device runs modules that are Marlin-native; ")


def test_a_device_runs_the_modules_of_the_second_checkpoint(made: Path) -> None:
    pytest.importorskip("torch")
    run = verify(made / "compressed-tensors", made / "kept", device="cpu").gemm
    assert run is not None
    assert [check.name.rpartition(".")[2] for check in run.checks] == ["down_proj", "gate_proj", "up_proj"]


def test_repositories_of_the_hub(made: Path, hub: Any) -> None:
    hub.add_repository("org/one", made / "compressed-tensors")
    hub.add_repository("org/other", made / "padded")
    result = verify("org/one", "hf://org/other")
    assert (result.kind, str(result.source).split("@")[0], str(result.output).split("@")[0]) == (
        "checkpoints",
        "org/one",
        "org/other",
    )
    problems, _ = differences("org/one", made / "random")
    assert len(problems) == 11


@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_refused_is_named_with_its_checkpoint(made: Path, tmp_path: Path, swapped: bool) -> None:
    bad = copy(made / "compressed-tensors", tmp_path / "bad")
    change(bad, without(f"{UP}.weight_scale"))
    pair = (bad, made / "awq")
    with pytest.raises(CheckpointError) as caught:
        verify(*(pair[::-1] if swapped else pair))
    (problem,) = caught.value.problems
    assert (problem.file, problem.tensor, problem.code) == (FILE, f"{UP}.weight_scale", "missing-tensor")
    assert problem.message.endswith(f" (in {bad})")
    (bad / FILE).write_bytes((bad / FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        verify(*(pair[::-1] if swapped else pair))
    assert caught.value.problems[0].message.endswith(f" (in {bad})")


def test_a_false_manifest_beside_a_checkpoint_is_refused(made: Path, tmp_path: Path) -> None:
    bad = copy(made / "awq", tmp_path / "bad")
    (bad / "marlin_manifest.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        verify(made / "compressed-tensors", bad)
    assert caught.value.problems[0].file == "marlin_manifest.json"
    assert caught.value.problems[0].message.endswith(f" (in {bad})")
    (bad / "marlin_manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="install a newer awq2marlin"):
        convert(bad, tmp_path / "out")


def test_a_manifest_of_another_conversion_is_no_way_back(made: Path, tmp_path: Path) -> None:
    convert(made / "source", tmp_path / "marlin")
    stray = copy(made / "source", tmp_path / "stray")
    shutil.copy(tmp_path / "marlin" / "marlin_manifest.json", stray)
    with pytest.raises(CheckpointError, match="but so is this checkpoint: it belongs to another one"):
        revert(stray, tmp_path / "back")


def test_memory_does_not_grow_with_a_tensor_that_is_read_by_rows(tmp_path: Path) -> None:
    import tracemalloc

    modules = {"model.layers.0.x": (16384, 2048)}
    write_checkpoint(tmp_path / "awq", plain(modules, {}, group_size=128))
    convert(tmp_path / "awq", tmp_path / "marlin", verify="none")
    convert(tmp_path / "awq", tmp_path / "other", unaligned="pad", verify="none")
    open_checkpoint(tmp_path / "marlin")
    tracemalloc.start()
    verify(tmp_path / "other", tmp_path / "marlin", workers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48e6
