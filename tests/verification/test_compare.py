"""`verify` finds every single planted difference, and says where it is, what was expected and what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, DifferenceError, ModulePlan, Problem, convert, verify
from awq2marlin.checkpoint.synthetic import write_checkpoint
from awq2marlin.commands.verify import sample_modules
from tests.e2e import oracle
from tests.e2e.inputs import INDEX, edit_json, join_file, layer, plain, split_file

MANIFEST = "marlin_manifest.json"
UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
MODULES = layer(0, hidden=192, kv=64, inter=512)
WEIGHTS = {NORM: (192,), EMBEDDING: (8, 192), f"{UP}.bias": (512,), "lm_head.weight": (8, 192)}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes source and output of a kind once, to be copied."""
    root = tmp_path_factory.mktemp("pairs")

    def make(bits: int, group_size: int, unaligned: Any) -> tuple[Path, Path]:
        folder = root / f"{bits}-{group_size}-{unaligned}"
        if not folder.exists():
            write_checkpoint(folder / "awq", plain(MODULES, WEIGHTS, bits=bits, group_size=group_size, shards=2))
            convert(folder / "awq", folder / "marlin", unaligned=unaligned, verify="none")
        return folder / "awq", folder / "marlin"

    return make


@pytest.fixture
def pair(pairs: Callable[..., tuple[Path, Path]], tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A source, and a converted copy to be damaged; 4 bits and groups of 64 unless a test asks for others."""
    awq, marlin = pairs(*getattr(request, "param", (4, 64, "keep")))
    return awq, Path(shutil.copytree(marlin, tmp_path / "marlin"))


def shard_of(folder: Path, tensor: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensor(folder: Path, tensor: str, edit: Callable[[bytearray], Any]) -> None:
    path = folder / shard_of(folder, tensor)
    header, data = split_file(path)
    begin, end = header[tensor]["data_offsets"]
    content = bytearray(data[begin:end])
    edit(content)
    assert len(content) == end - begin
    length = path.stat().st_size - len(data)
    path.write_bytes(path.read_bytes()[:length] + data[:begin] + content + data[end:])


def edit_field(folder: Path, tensor: str, field: int, bits: int, value: int) -> int:
    """Changes one packed value; fields count from the lowest bits of the first word. Returns what it was."""
    before = 0

    def edit(content: bytearray) -> None:
        nonlocal before
        at, shift = field * bits // 8, field * bits % 8
        mask = (2**bits - 1) << shift
        before = (content[at] & mask) >> shift
        content[at] = content[at] & ~mask | value << shift

    edit_tensor(folder, tensor, edit)
    return before


def field_of(part: str, row: int, column: int, size_n: int, bits: int) -> int:
    """Returns the field in which the specification puts a value of a converted module."""
    if part == "qweight":
        tile = row // 16 * (size_n // 64) + column // 64
        return tile * 1024 + oracle.tile_order(bits).index((row % 16, column % 64))
    position = column // 64 * 64 + 8 * (column % 8) + column % 64 // 8
    factor = 32 // bits
    return row * size_n + position // factor * factor + oracle.ORDER[bits].index(position % factor)


def scale_position(column: int, single_group: bool) -> int:
    if not single_group:
        return column // 64 * 64 + 8 * (column % 8) + column % 64 // 8
    block, rest = column // 32 * 32, column % 32
    order = [2 * i + offset for i in range(4) for offset in (0, 1, 8, 9, 16, 17, 24, 25)]
    return block + order.index(rest)


def the_difference(awq: Path, marlin: Path, **options: Any) -> Problem:
    with pytest.raises(DifferenceError) as caught:
        verify(awq, marlin, **options)
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    return problem


def test_an_untouched_pair_is_equal(pair: tuple[Path, Path]) -> None:
    result = verify(*pair)
    assert [module.name for module in result.modules] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert (result.modules_total, result.tensors, result.files) == (3, 4 + 4 * 3, 2)


PLACES = [(0, 0), (17, 70), (191, 511), (100, 257)]


@pytest.mark.parametrize(("row", "column"), PLACES)
@pytest.mark.parametrize("pair", [(4, 64, "keep"), (8, 64, "keep"), (4, -1, "pad"), (8, 32, "pad")], indirect=True)
def test_one_weight(pair: tuple[Path, Path], row: int, column: int, request: pytest.FixtureRequest) -> None:
    bits = request.node.callspec.params["pair"][0]
    field = field_of("qweight", row, column, 512, bits)
    expected = edit_field(pair[1], f"{UP}.qweight", field, bits, 5)
    if expected == 5:
        edit_field(pair[1], f"{UP}.qweight", field, bits, 6)
    found = 6 if expected == 5 else 5
    assert the_difference(*pair) == Problem(
        shard_of(pair[1], f"{UP}.qweight"),
        f"{UP}.qweight",
        "different-value",
        f"value at row {row}, column {column}: the source has {expected}, the output {found}",
    )


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 511), (1, 77)])
@pytest.mark.parametrize("pair", [(4, 64, "keep"), (8, 64, "keep")], indirect=True)
def test_one_zero_point(pair: tuple[Path, Path], row: int, column: int, request: pytest.FixtureRequest) -> None:
    bits = request.node.callspec.params["pair"][0]
    field = field_of("qzeros", row, column, 512, bits)
    expected = edit_field(pair[1], f"{UP}.qzeros", field, bits, 0)
    found = 1 if expected == 0 else 0
    edit_field(pair[1], f"{UP}.qzeros", field, bits, found)
    problem = the_difference(*pair)
    assert (problem.file, problem.tensor) == (shard_of(pair[1], f"{UP}.qzeros"), f"{UP}.qzeros")
    assert problem.message == f"zero point at row {row}, column {column}: the source has {expected}, the output {found}"


@pytest.mark.parametrize(
    ("pair", "row", "column"),
    [((4, 64, "keep"), 0, 0), ((4, 64, "keep"), 2, 300), ((4, -1, "keep"), 0, 41), ((4, -1, "pad"), 0, 511)],
    indirect=["pair"],
)
def test_one_scale(pair: tuple[Path, Path], row: int, column: int, request: pytest.FixtureRequest) -> None:
    single = request.node.callspec.params["pair"][1] == -1
    at = 2 * (row * 512 + scale_position(column, single))
    values = []

    def edit(content: bytearray) -> None:
        values.append(int.from_bytes(content[at : at + 2], "little"))
        content[at] ^= 1  # one unit in the last place

    edit_tensor(pair[1], f"{UP}.scales", edit)
    problem = the_difference(*pair)
    assert (problem.file, problem.tensor) == (shard_of(pair[1], f"{UP}.scales"), f"{UP}.scales")
    assert problem.message == (
        f"scale (bits) at row {row}, column {column}: the source has {values[0]}, the output {values[0] ^ 1}"
    )


@pytest.mark.parametrize("pair", [(4, 64, "pad")], indirect=True)
@pytest.mark.parametrize(
    ("part", "row", "column", "what"),
    [
        ("qweight", 255, 0, "value"),
        ("qweight", 192, 191, "value"),
        ("qzeros", 3, 5, "zero point"),
        ("scales", 3, 191, "scale (bits)"),
    ],
)
def test_anything_in_the_padding(pair: tuple[Path, Path], part: str, row: int, column: int, what: str) -> None:
    """q_proj of K=192, N=192 is padded to K=256: 64 rows and one group of zeros."""
    tensor = f"{Q_PROJ}.{part}"
    if part == "scales":
        edit_tensor(pair[1], tensor, lambda c: c.__setitem__(2 * (row * 192 + scale_position(column, False)), 1))
    else:
        assert edit_field(pair[1], tensor, field_of(part, row, column, 192, 4), 4, 1) == 0
    problem = the_difference(*pair)
    assert problem.tensor == tensor
    assert problem.message == f"{what} at row {row}, column {column}: the source has 0, the output 1"


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_two_modules_swapped(pair: tuple[Path, Path], part: str) -> None:
    contents: dict[str, bytes] = {}
    for module in (GATE, UP):
        edit_tensor(pair[1], f"{module}.{part}", lambda c, module=module: contents.update({module: bytes(c)}))
    for module, other in ((GATE, UP), (UP, GATE)):
        edit_tensor(pair[1], f"{module}.{part}", lambda c, other=other: c.__setitem__(slice(None), contents[other]))
    problem = the_difference(*pair)
    assert (problem.tensor, problem.code) == (f"{GATE}.{part}", "different-value")
    assert "row 0, column " in problem.message


@pytest.mark.parametrize(
    ("tensor", "byte", "place"),
    [
        (NORM, 7, "byte 7"),
        (EMBEDDING, 2 * 192 * 3 + 2 * 5 + 1, "row 3, column 5, byte 1163"),
        (f"{UP}.bias", 1023, "byte 1023"),
        ("lm_head.weight", 0, "row 0, column 0, byte 0"),
        (f"{Q_PROJ}.qweight", 4 * (24 * 9 + 2), "row 9, column 2, byte 872"),
        (f"{Q_PROJ}.scales", 2 * 191, "row 0, column 191, byte 382"),
    ],
)
def test_one_byte_of_what_is_only_copied(pair: tuple[Path, Path], tensor: str, byte: int, place: str) -> None:
    values = []

    def edit(content: bytearray) -> None:
        values.append(content[byte])
        content[byte] ^= 0x80

    edit_tensor(pair[1], tensor, edit)
    assert the_difference(*pair, layers=1) == Problem(
        shard_of(pair[1], tensor),
        tensor,
        "different-bytes",
        f"{place}: the source has {values[0]:#04x}, the output {values[0] ^ 0x80:#04x}",
    )


def edit_quantization(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]))


CONFIG_CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a_key_changed": (
        edit_json("config.json", lambda c: c.update(model_type="gpt2")),
        "config",
        "the source's in model_type",
    ),
    "a_key_added": (edit_json("config.json", lambda c: c.update(x=1)), "config", "the source's in x"),
    "a_key_removed": (edit_json("config.json", lambda c: c.pop("model_type")), "config", "the source's in model_type"),
    "another_type": (
        edit_json("config.json", lambda c: c.update(tie_word_embeddings=0)),
        "config",
        "the source's in tie_word_embeddings",
    ),
    "zero_point": (edit_quantization(lambda q: q.update(zero_point=False)), "config", "in zero_point"),
    "zero_point_as_a_number": (edit_quantization(lambda q: q.update(format_version=1.0)), "unsupported-format", ""),
    "bits": (edit_quantization(lambda q: q.update(bits=8)), "config", "in bits"),
    "group_size": (edit_quantization(lambda q: q.update(group_size=32)), "config", "in group_size"),
    "modules_to_not_convert": (
        edit_quantization(lambda q: q.update(modules_to_not_convert=[])),
        "config",
        "in modules_to_not_convert",
    ),
    "a_new_key": (edit_quantization(lambda q: q.update(version="gemm")), "config", "in an additional key"),
    "a_kept_module_forgotten": (edit_quantization(lambda q: q["awq_modules"].remove(Q_PROJ)), "unaligned", "K=192"),
    "a_converted_module_called_awq": (
        edit_quantization(lambda q: q.update(awq_modules=sorted([*q["awq_modules"], UP]))),
        "wrong-shape",
        "expected I32 [192, 64], found I32 [12, 1024]",
    ),
    "an_unknown_module": (
        edit_quantization(lambda q: q["awq_modules"].append("model.x")),
        "unknown-module",
        "awq_modules lists model.x",
    ),
    "awq_modules_not_sorted": (edit_quantization(lambda q: q["awq_modules"].reverse()), "config", "in awq_modules"),
    "an_unquantized_module_forgotten": (
        edit_quantization(lambda q: q["unquantized_modules"].pop()),
        "contradiction",
        "unquantized_modules does not list it",
    ),
    "false_padded_modules": (
        edit_quantization(lambda q: q.update(padded_modules={UP: [192, 500]})),
        "contradiction",
        "padded_modules says [192, 500], the source has [192, 512]",
    ),
    "needless_padded_modules": (
        edit_quantization(lambda q: q.update(padded_modules={UP: [192, 512]})),
        "config",
        "in padded_modules",
    ),
}


@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_a_changed_config(pair: tuple[Path, Path], name: str) -> None:
    change, code, text = CONFIG_CHANGES[name]
    change(pair[1])
    with pytest.raises((DifferenceError, CheckpointError)) as caught:
        verify(*pair)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert text in problem.message
    assert code != "config" or problem.file == "config.json"


def edit_header(tensor: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / shard_of(folder, tensor)
        header, data = split_file(path)
        edit(header)
        join_file(path, json.dumps(header).encode(), data)

    return change


def drop(tensor: str) -> Callable[[Path], None]:
    """Removes a tensor from its shard and from the index."""

    def change(folder: Path) -> None:
        path = folder / shard_of(folder, tensor)
        header, data = split_file(path)
        begin, end = header.pop(tensor)["data_offsets"]
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
        join_file(path, json.dumps(header).encode(), data[:begin] + data[end:])
        edit_json(INDEX, lambda index: index["weight_map"].pop(tensor))(folder)

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_header(old, lambda header: header.update({new: header.pop(old)}))(folder)
        edit_json(INDEX, lambda index: index["weight_map"].update({new: index["weight_map"].pop(old)}))(folder)

    return change


def swap_entries(header: dict[str, Any]) -> None:
    """Names two modules' tensors by each other's names."""
    for part in ("qweight", "qzeros", "scales"):
        names = f"{Q_PROJ}.{part}", f"{O_PROJ}.{part}"
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]


def reorder(header: dict[str, Any]) -> None:
    last = list(header)[-1]
    others = {name: header.pop(name) for name in list(header) if name not in ("__metadata__", last)}
    header |= others


STRUCTURE_CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a_norm_dropped": (drop(NORM), "missing-tensor", NORM),
    "qzeros_dropped": (drop(f"{UP}.qzeros"), "missing-tensor", f"{UP}.qzeros"),
    "a_tensor_renamed": (rename(NORM, "model.norm.weights"), "missing-tensor", NORM),
    "a_tensor_too_many": (
        edit_header(NORM, lambda h: h.update(z={"dtype": "F16", "shape": [0], "data_offsets": [0, 0]})),
        "extra-tensor",
        "z",
    ),
    "another_type": (
        edit_header(f"{UP}.scales", lambda h: h[f"{UP}.scales"].update(dtype="BF16")),
        "wrong-shape",
        f"{UP}.scales",
    ),
    "another_shape": (
        edit_header(f"{UP}.bias", lambda h: h[f"{UP}.bias"].update(shape=[512, 1])),
        "wrong-shape",
        f"{UP}.bias",
    ),
    "names_swapped_in_the_header": (edit_header(f"{Q_PROJ}.scales", swap_entries), "moved-tensor", ""),
    "names_in_another_order": (edit_header(NORM, reorder), "header", ""),
    "metadata_lost": (edit_header(NORM, lambda h: h.pop("__metadata__")), "header", ""),
    "metadata_changed": (edit_header(NORM, lambda h: h["__metadata__"].update(format="tf")), "header", ""),
}


@pytest.mark.parametrize("name", STRUCTURE_CHANGES)
def test_changed_headers(pair: tuple[Path, Path], name: str) -> None:
    change, code, tensor = STRUCTURE_CHANGES[name]
    change(pair[1])
    shutil.copyfile(pair[0] / INDEX, pair[1] / INDEX) if code == "header" else None
    problem = the_difference(*pair)
    assert (problem.code, problem.tensor) == (code, tensor)
    assert problem.file.endswith(".safetensors")


FILE_CHANGES: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "a_side_file_changed": (
        lambda f: (f / "generation_config.json").write_bytes(b'{"do_sample": False}\n'),
        "different-bytes",
        "generation_config.json",
        "the file differs from the source's at byte ",
    ),
    "a_side_file_longer": (
        lambda f: (f / "generation_config.json").write_bytes((f / "generation_config.json").read_bytes() + b"\n"),
        "different-bytes",
        "generation_config.json",
        "the file differs from the source's at byte 25",
    ),
    "a_side_file_empty": (
        lambda f: (f / "generation_config.json").write_bytes(b""),
        "different-bytes",
        "generation_config.json",
        "the file differs from the source's at byte 0",
    ),
    "a_side_file_missing": (
        lambda f: (f / "generation_config.json").unlink(),
        "missing-file",
        "generation_config.json",
        "the source has this file, the output does not",
    ),
    "an_index_changed": (
        edit_json(INDEX, lambda index: index["metadata"].update(total_size=1)),
        "different-bytes",
        INDEX,
        "the file differs from the source's at byte ",
    ),
}


@pytest.mark.parametrize("name", FILE_CHANGES)
def test_changed_files(pair: tuple[Path, Path], name: str) -> None:
    change, code, file, text = FILE_CHANGES[name]
    change(pair[1])
    problem = the_difference(*pair)
    assert (problem.code, problem.file, problem.tensor) == (code, file, "")
    assert problem.message.startswith(text)


@pytest.mark.parametrize("pair", [(4, 64, "pad")], indirect=True)
def test_a_padded_index_is_compared_by_its_names(pair: tuple[Path, Path]) -> None:
    assert verify(*pair).files == 1
    edit_json(INDEX, lambda index: index["weight_map"].pop(NORM))(pair[1])
    problem = the_difference(*pair)
    assert (problem.code, problem.file) == ("different-bytes", INDEX)


def edit_shard_entry(key: str, value: Any) -> Callable[[Path], None]:
    return edit_json(MANIFEST, lambda m: next(iter(m["shards"].values()))[key].update(value))


OTHER = "xxh3_128:" + 32 * "0"
MANIFEST_CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the_size_of_a_converted_shard": (edit_shard_entry("output", {"size": 5}), "model-00001-of-00002.safetensors"),
    "the_digest_of_a_converted_shard": (
        edit_shard_entry("output", {"digests": [OTHER]}),
        "model-00001-of-00002.safetensors",
    ),
    "the_digest_of_a_source_shard": (
        edit_shard_entry("source", {"digests": [OTHER]}),
        "model-00001-of-00002.safetensors",
    ),
    "the_text_of_the_config": (edit_json(MANIFEST, lambda m: m["texts"].update({"config.json": "{}"})), "config.json"),
    "a_text_too_many": (
        edit_json(
            MANIFEST,
            lambda m: [
                m[key].update({"quant_config.json": m[key]["config.json"]}) for key in ("texts", "text_digests")
            ],
        ),
        "quant_config.json",
    ),
    "the_digest_of_a_side_file": (
        edit_json(MANIFEST, lambda m: m["files"]["generation_config.json"].update(digests=[OTHER])),
        "generation_config.json",
    ),
    "a_side_file_forgotten": (
        edit_json(MANIFEST, lambda m: m["files"].pop("generation_config.json")),
        "generation_config.json",
    ),
    "a_card_forgotten": (edit_json(MANIFEST, lambda m: m.update(source_card=None)), "README.md"),
    "a_card_changed": (edit_json(MANIFEST, lambda m: m["source_card"].update(data="eJwDAAAAAAE=")), "README.md"),
    "a_shard_forgotten": (
        edit_json(MANIFEST, lambda m: m["shards"].pop("model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_manifest_that_could_not_give_the_source_back(pair: tuple[Path, Path], name: str) -> None:
    change, file = MANIFEST_CHANGES[name]
    change(pair[1])
    problem = the_difference(*pair)
    assert (problem.code, problem.file) == ("manifest", file)


def test_a_manifest_whose_source_header_is_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As after a conversion of a checkpoint that differs in its metadata only."""
    awq = Path(shutil.copytree(pair[0], tmp_path / "awq"))
    path = awq / "model-00001-of-00002.safetensors"
    header, data = split_file(path)
    join_file(path, json.dumps(header).encode(), data)
    problem = the_difference(awq, pair[1])
    assert (problem.code, problem.file) == ("manifest", path.name)
    assert "header" in problem.message


def test_a_missing_manifest_is_told(pair: tuple[Path, Path]) -> None:
    (pair[1] / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="it is missing, and without it the original cannot be restored"):
        verify(*pair)


def test_the_first_difference_is_named_whatever_the_number_of_workers(pair: tuple[Path, Path]) -> None:
    for module in ("model.layers.0.mlp.down_proj", UP):
        edit_tensor(pair[1], f"{module}.qweight", lambda c: c.__setitem__(0, c[0] ^ 1))
    problems = {the_difference(*pair, workers=workers) for workers in (1, 2, 5)}
    assert [problem.tensor for problem in problems] == ["model.layers.0.mlp.down_proj.qweight"]


def test_the_order_of_a_source_and_its_conversion_does_not_matter(pair: tuple[Path, Path]) -> None:
    """The manifest says which one is the source, so there is nothing that a user could have mistaken."""
    awq, marlin = pair
    swapped, result = verify(marlin, awq), verify(awq, marlin)
    assert (result.kind, result.source, result.output) == ("conversion", awq, marlin)
    assert replace(swapped, seconds=0) == replace(result, seconds=0)


def test_a_checkpoint_is_compared_with_itself_by_its_values(pair: tuple[Path, Path]) -> None:
    """Any two checkpoints are compared; none of them need be converted."""
    for folder in pair:
        result = verify(folder, folder)
        assert (result.kind, len(result.modules), result.modules_total) == ("checkpoints", 7, 7)


# --- samples -------------------------------------------------------------------------------------------------------


def module(number: int, size_k: int, size_n: int) -> ModulePlan:
    return ModulePlan(f"m{number:02d}", size_k, size_n, size_k, size_n, ("qweight",), converted=True)


PLANS = [module(n, 128, 64) for n in range(10)] + [module(10, 256, 64)] + [module(n, 128, 128) for n in range(11, 20)]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (0, []),
        (1, ["m00"]),
        (3, ["m00", "m10", "m11"]),
        (5, ["m00", "m04", "m08", "m10", "m11"]),
        (20, [plan.name for plan in PLANS]),
        (99, [plan.name for plan in PLANS]),
        ("all", [plan.name for plan in PLANS]),
    ],
)
def test_a_sample_takes_one_of_each_shape_first_then_spreads(layers: Any, names: list[str]) -> None:
    assert [plan.name for plan in sample_modules(PLANS, layers)] == names
    assert sample_modules(PLANS, layers) == sample_modules(PLANS, layers)


@pytest.mark.parametrize("layers", range(21))
def test_a_sample_has_as_many_modules_as_asked_for(layers: int) -> None:
    assert len(sample_modules(PLANS, layers)) == layers


def test_layers_samples_modules_but_compares_everything_else(pair: tuple[Path, Path]) -> None:
    result = verify(*pair, layers=2)
    assert [plan.name for plan in result.modules] == ["model.layers.0.mlp.down_proj", GATE]
    assert (result.modules_total, result.tensors, result.files) == (3, 16, 2)
    edit_tensor(pair[1], f"{UP}.qweight", lambda c: c.__setitem__(0, c[0] ^ 1))
    assert verify(*pair, layers=2).modules == result.modules
    assert the_difference(*pair, layers=3).tensor == f"{UP}.qweight"
