"""GPTQ and AutoRound checkpoints that lie, or hold what cannot be converted: each is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq2marlin import convert, inspect, revert
from tests.faults.helpers import contents
from tests.formats import peers

DOWN, O_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
SHARD = "model.safetensors"
NASTY = "\x1b[31m"

Config = dict[str, Any]
Tensors = dict[str, tuple[str, np.ndarray]]


def copied(name: str, folder: Path) -> Path:
    """Copies a fixture; one config is enough."""
    shutil.copytree(peers.ALL_DATA / name / "checkpoint", folder)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """GPTQ of version 2: 4 bits in groups of 64 with zero points."""
    return copied("gptq/gptqmodel_v2_w4_asym_g64", tmp_path / "source")


def set_config(source: Path, change: Callable[[Config], Any]) -> None:
    """Changes a quantization config."""
    document = peers.read_config(source)
    change(document["quantization_config"])
    (source / "config.json").write_text(json.dumps(document), "utf-8")


def set_tensors(source: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a checkpoint."""
    tensors = peers.read_tensors(source)
    change(tensors)
    peers.write_tensors(source / SHARD, tensors)


def says(**keys: Any) -> Callable[[Config], Any]:
    return lambda config: config.update(keys)


GPTQ, AUTO = "gptq/gptqmodel_v2_w4_asym_g64", "auto_round/v2_w4_asym_g64"
UNCONVERTIBLE: dict[str, tuple[str, Callable[[Config], Any], str, str]] = {
    "ordered": (GPTQ, says(desc_act=True), "foreign-format", "desc_act: true); look for a version of this model"),
    "ordered 1": (GPTQ, says(desc_act=1), "bad-config", "desc_act must be true or false, found 1"),
    "symmetric 1": (GPTQ, says(sym=1), "bad-config", "sym must be true or false, found 1"),
    "3 bits": (GPTQ, says(bits=3), "unsupported-bits", "3 bits, but only 4 and 8 are supported"),
    "bits as text": (GPTQ, says(bits="4"), "unsupported-bits", "'4'"),
    "no bits": (GPTQ, lambda config: config.pop("bits"), "bad-config", "lacks bits; download the file again"),
    "groups of 16": (GPTQ, says(group_size=16), "unsupported-group-size", "16"),
    "words of 64 bits": (GPTQ, says(pack_dtype="int64"), "foreign-format", "'int64'"),
    "two versions": (
        GPTQ,
        says(format="gptq"),
        "contradiction",
        "checkpoint_format is 'gptq_v2', but format is 'gptq'",
    ),
    "planes": (GPTQ, says(checkpoint_format="gptq_p"), "foreign-format", "of format 'gptq_p'"),
    "a format of escapes": (GPTQ, says(checkpoint_format=NASTY), "foreign-format", r"x1b[31m"),
    "a format that is none": (GPTQ, says(checkpoint_format=[]), "bad-config", "checkpoint_format must be a string"),
    "a packing to come": (AUTO, says(packing_format="auto_round:new"), "foreign-format", "'auto_round:new'"),
    "llm-compressor's": (AUTO, says(packing_format="auto_round:llm_compressor"), "foreign-format", "llm_compressor"),
    "no packing": (AUTO, lambda config: config.pop("packing_format"), "foreign-format", "has no packing_format."),
    "a packing of escapes": (AUTO, says(packing_format=NASTY), "foreign-format", r"x1b[31m"),
    "floats": (AUTO, says(data_type="mx_fp"), "foreign-format", "its data_type is 'mx_fp'"),
    "activations": (AUTO, says(act_bits=8), "foreign-format", "act_bits 8"),
    "rotated": (AUTO, says(rotation_config={"a": 1}), "foreign-format", "rotated"),
    "2 bits": (AUTO, says(bits=2), "unsupported-bits", "2 bits"),
}


@pytest.mark.parametrize("name", UNCONVERTIBLE)
def test_a_config_that_cannot_be_converted_is_refused_by_name(tmp_path: Path, run, name: str) -> None:
    fixture, change, code, said = UNCONVERTIBLE[name]
    source = copied(fixture, tmp_path / "source")
    set_config(source, change)
    for arguments in (("convert", source, tmp_path / "out"), ("convert", source, "--dry-run")):
        run(*arguments).refused(code, said, file="config.json")
    assert not (tmp_path / "out").exists()


OVERRIDES: dict[str, tuple[str, Callable[[Config], Any], str]] = {
    "other bits": (GPTQ, says(dynamic={r"+:.*\.down_proj": {"bits": 8}}), "says bits 8, but its tensors are of 4 bits"),
    "other groups": (GPTQ, says(dynamic={"^.*down_proj$": {"group_size": 32}}), "says group_size 32, but"),
    "not quantized": (GPTQ, says(dynamic={"-:.*down.*": {}}), "says that it is not quantized, but it has the tensors"),
    "by name": (AUTO, says(extra_config={DOWN: {"bits": 8, "group_size": 64}}), f"extra_config['{DOWN}'] says bits 8"),
    "16 bits": (AUTO, says(extra_config={DOWN: {"bits": 16}}), "says that it is not quantized"),
    "layout of AWQ": ("auto_round/awq_w4_asym_g32", says(extra_config={DOWN: {"bits": 8}}), "says bits 8"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_config_says_of_one_module_against_its_tensors_is_told(tmp_path: Path, run, name: str) -> None:
    fixture, change, said = OVERRIDES[name]
    source = copied(fixture, tmp_path / "source")
    set_config(source, change)
    run("convert", source, "--dry-run").refused("contradiction", said, file="config.json")


HARMLESS: dict[str, tuple[str, Callable[[Config], Any]]] = {
    "a module left out": (GPTQ, says(dynamic={"-:.*lm_head": {}})),
    "an override of nothing that is there": (GPTQ, says(dynamic={"+:.*experts.*": {"bits": 8}})),
    "overrides that say the same": (GPTQ, says(dynamic={"+:.*": {"bits": 4}, "-:.*": {}, ".*down": {"bits": 8}})),
    "overrides that are none": (GPTQ, says(dynamic={"+:.*": [8], "-:": 1}, extra_config=[NASTY])),
    "a pattern that would never end": (GPTQ, says(dynamic={"-:(.*.*.*.*)*x": {}, "+:" + ".*" * 9: {"bits": 8}})),
    "no word of symmetry": (GPTQ, lambda config: config.pop("sym")),
    "no word of an order": (GPTQ, lambda config: config.pop("desc_act")),
    "a meta that is none": (GPTQ, says(meta=[NASTY, 1])),
    "a quantizer that is none": (GPTQ, says(meta={"quantizer": {"gptqmodel": 1}})),
    "other keys": (
        GPTQ,
        says(damp_percent=0.1, static_groups=False, lm_head=False, true_sequential=True, rotation="x"),
    ),
    "16 bits are not quantized": (AUTO, says(extra_config={"lm_head": {"bits": 16, "data_type": "fp"}})),
    "activations of 16 bits": (AUTO, says(act_bits=16, rotation_config={}, backend="auto")),
    "both kinds of integers": (AUTO, says(data_type="int_asym_dq")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_carried(tmp_path: Path, name: str) -> None:
    fixture, change = HARMLESS[name]
    source = copied(fixture, tmp_path / "source")
    set_config(source, change)
    convert(source, tmp_path / "out", verify="all")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def _drop(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def _put(name: str, dtype: str, array: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: (dtype, np.asarray(array))})


def _grown(name: str, **parts: tuple[str, tuple[int, ...]]) -> Callable[[Tensors], Any]:
    """Returns a change that gives a module tensors of other shapes, all zeros."""
    zeros = {"I32": np.int32, "F16": np.uint16}
    return lambda tensors: tensors.update(
        {f"{name}.{part}": (dtype, np.zeros(shape, zeros[dtype])) for part, (dtype, shape) in parts.items()}
    )


# down_proj has K=128, N=32 and two groups, o_proj K=128, N=64.
WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str, str, str]] = {
    "no codes": (_drop(f"{DOWN}.qweight"), "missing-tensor", f"{DOWN}.qweight", "it is missing"),
    "no scales": (_drop(f"{DOWN}.scales"), "missing-tensor", f"{DOWN}.scales", "it is missing"),
    "no zero points": (_drop(f"{DOWN}.qzeros"), "missing-tensor", f"{DOWN}.qzeros", "it is missing"),
    "the groups alone": (
        _drop(f"{DOWN}.qweight", f"{DOWN}.qzeros", f"{DOWN}.scales"),
        "missing-tensor",
        f"{DOWN}.qweight",
        "the module has g_idx",
    ),
    "scales of fp32": (_put(f"{DOWN}.scales", "F32", np.ones((2, 32))), "wrong-dtype", f"{DOWN}.scales", "F32"),
    "scales of another N": (
        _put(f"{DOWN}.scales", "F16", np.ones((2, 24))),
        "contradiction",
        f"{DOWN}.scales",
        "expected [2, 32]",
    ),
    "flat codes": (
        _put(f"{DOWN}.qweight", "I32", np.ones(512)),
        "wrong-shape",
        f"{DOWN}.qweight",
        "expected a 2-D tensor",
    ),
    "groups of another length": (
        _put(f"{DOWN}.g_idx", "I32", np.zeros(64)),
        "contradiction",
        f"{DOWN}.g_idx",
        "expected I32 [128]",
    ),
    "groups of 64 bits": (_put(f"{DOWN}.g_idx", "I64", np.zeros(128)), "contradiction", f"{DOWN}.g_idx", "I64 [128]"),
    "columns that end inside a word": (
        _grown(DOWN, qweight=("I32", (16, 28)), qzeros=("I32", (2, 4)), scales=("F16", (2, 28))),
        "wrong-shape",
        f"{DOWN}.qweight",
        "ends inside a word of 8 zero points",
    ),
    "no rows": (_grown(DOWN, qweight=("I32", (0, 32))), "wrong-shape", f"{DOWN}.qweight", "K=0, N=32 is empty"),
    "mixed bits": (
        _grown(DOWN, qweight=("I32", (32, 32)), qzeros=("I32", (2, 8))),
        "foreign-format",
        f"{DOWN}.qweight",
        f"this module has 8 bits in groups of 64, but {O_PROJ} has 4 bits in groups of 64; only checkpoints with one",
    ),
    "mixed groups": (
        _grown(O_PROJ, qzeros=("I32", (4, 8)), scales=("F16", (4, 64))),
        "foreign-format",
        f"{O_PROJ}.qweight",
        f"this module has 4 bits in groups of 32, but {DOWN} has 4 bits in groups of 64",
    ),
    "an output embedding of other bits": (
        _grown("lm_head", qweight=("I32", (32, 32)), qzeros=("I32", (2, 8)), scales=("F16", (2, 32))),
        "foreign-format",
        "lm_head.qweight",
        "this module has 8 bits",
    ),
    "an embedding": (
        lambda tensors: tensors.update(
            {f"model.embed_tokens.{part}": tensors.pop(f"{DOWN}.{part}") for part in ("qweight", "qzeros", "scales")}
        ),
        "foreign-format",
        "model.embed_tokens.qweight",
        "quantized embedding",
    ),
    "a dense weight besides": (
        _put(f"{DOWN}.weight", "F16", np.ones((32, 128))),
        "contradiction",
        f"{DOWN}.weight",
        "both a qweight and a weight",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_headers_are_refused_by_name_before_a_byte_is_written(source: Path, tmp_path: Path, run, name) -> None:
    change, code, tensor, said = WRONG_TENSORS[name]
    set_tensors(source, change)
    outcome = run("convert", source, tmp_path / "out")
    assert outcome.code == 1
    assert (code, tensor) in {(each["code"], each["tensor"]) for each in outcome.report["errors"]}, outcome.err
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [(GPTQ, "sym is not true"), (AUTO, "sym is not true"), ("auto_round/awq_w4_asym_g32", "zero_point is true")],
)
def test_a_tensor_that_is_missing_is_named_and_the_format_stays_what_the_config_says(
    tmp_path: Path, run, name: str, said: str
) -> None:
    source = copied(name, tmp_path / "source")
    set_tensors(source, _drop(f"{DOWN}.qzeros"))
    outcome = run("convert", source, tmp_path / "out")
    outcome.refused("missing-tensor", f"({said})", file=SHARD, tensor=f"{DOWN}.qzeros")


def test_an_output_embedding_of_the_same_kind_is_converted_with_the_others(source: Path, tmp_path: Path) -> None:
    parts = {part: peers.read_tensors(source)[f"{DOWN}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    set_tensors(source, lambda tensors: tensors.update({f"lm_head.{part}": each for part, each in parts.items()}))
    set_config(source, says(lm_head=True))
    result = convert(source, tmp_path / "out", to="awq", verify="all")
    assert "lm_head" in {module.name for module in result.converted}
    assert peers.read_config(tmp_path / "out")["quantization_config"]["lm_head"] is True
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize(("fixture", "said"), [(GPTQ, "awq"), ("auto_round/awq_w4_asym_g32", "gptq")])
def test_a_config_that_names_the_other_layout_is_told_with_both_sides(tmp_path: Path, run, fixture, said) -> None:
    source = copied(fixture, tmp_path / "source")
    document = peers.read_config(source)
    document["quantization_config"] = {"quant_method": said, "bits": 4, "group_size": 32, "sym": False}
    (source / "config.json").write_text(json.dumps(document), "utf-8")
    outcome = run("convert", source, tmp_path / "out")
    assert outcome.code == 1
    assert "GPTQ" in outcome.err
    assert "AWQ" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 8}, "the config's 8 bits in groups of 64"),
        ({"group_size": 128}, "the config's 4 bits in groups of 128"),
        ({"group_size": -1}, "the config's 4 bits in one group"),
    ],
)
def test_bits_and_groups_that_the_tensors_contradict_are_told_with_both_sides(source, tmp_path, run, change, said):
    set_config(source, says(**change))
    outcome = run("convert", source, tmp_path / "out")
    assert outcome.codes == {"contradiction"}
    assert said in outcome.err
    assert "; 4 bits in groups of 64 would fit them all" in outcome.err
    assert not (tmp_path / "out").exists()


# --- what only the data tells ----------------------------------------------------------------------------------------


LIES: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "an order": (
        _put(f"{DOWN}.g_idx", "I32", np.arange(128)[::-1] // 64),
        f"{DOWN}.g_idx",
        "look for a version of",
    ),
    "one row elsewhere": (_put(f"{DOWN}.g_idx", "I32", [1] + 63 * [0] + 64 * [1]), f"{DOWN}.g_idx", "byte 0"),
    "a group that is none": (_put(f"{DOWN}.g_idx", "I32", 127 * [0] + [-1]), f"{DOWN}.g_idx", "activation ordering"),
}


@pytest.mark.parametrize("to", ["marlin", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", LIES)
def test_rows_in_another_order_are_refused_by_name(source: Path, tmp_path: Path, run, name: str, to: str) -> None:
    change, tensor, said = LIES[name]
    set_tensors(source, change)
    run("convert", source, tmp_path / "out", "--to", to).refused("contradiction", said, file=SHARD, tensor=tensor)
    assert not (tmp_path / "out" / "config.json").exists()


SYMMETRIC = {
    "gptq/gptqmodel_v1_w8_sym_channel": "if they count, set sym to false in a copy of the config",
    "gptq/gptqmodel_v2_w4_sym_g32": "sym: true",
    "auto_round/gptq_w4_sym_g32": "sym: true",
    "auto_round/awq_w4_sym_g64": "sym: true",
    "auto_round/as_awq_sym": "zero_point: false",
}


@pytest.mark.parametrize("to", ["marlin", "compressed-tensors"])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_zero_points_of_a_symmetric_checkpoint_are_in_the_middle_or_stop_the_run(
    tmp_path: Path, run, name: str, to: str
) -> None:
    source = copied(name, tmp_path / "source")
    tensor = f"{DOWN}.qzeros"
    convert(source, tmp_path / "sound", to=to)
    assert not [each for each in peers.read_tensors(tmp_path / "sound") if "zero" in each]
    assert not inspect(tmp_path / "sound").zero_point

    def flip(tensors: Tensors) -> None:
        words = tensors[tensor][1].copy()
        words[-1, -1] ^= 1 << 28
        tensors[tensor] = "I32", words

    set_tensors(source, flip)
    outcome = run("convert", source, tmp_path / "out", "--to", to)
    outcome.refused("contradiction", SYMMETRIC[name], file=SHARD, tensor=tensor)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("fixture", "largest"), [("gptq/auto_round_w4_asym_g32", 15), ("gptq/old_config", 15)])
def test_a_stored_zero_point_that_readers_take_differently_is_refused_in_words(
    tmp_path: Path, run, fixture: str, largest: int
) -> None:
    shutil.copytree(peers.ALL_DATA / fixture / "checkpoint", tmp_path / "source")
    tensor = f"{DOWN}.qzeros"

    def fill(tensors: Tensors) -> None:
        words = tensors[tensor][1].copy()
        words[0, 1] |= largest << 8
        tensors[tensor] = "I32", words

    set_tensors(tmp_path / "source", fill)
    outcome = run("convert", tmp_path / "source", tmp_path / "out")
    outcome.refused("contradiction", f"stored as {largest}", "readers differ over which", file=SHARD, tensor=tensor)
    assert not (tmp_path / "out" / "config.json").exists()


def test_gptqmodel_s_zero_points_borrow_so_that_any_word_is_one_of_its(tmp_path: Path) -> None:
    source = copied("gptq/gptqmodel_v1_w4_asym_g32", tmp_path / "source")
    stored = peers.fields(peers.read_tensors(source)[f"{O_PROJ}.qzeros"][1], 4)
    assert (stored == 15).any()  # which any other writer's checkpoint would be refused for
    random = np.random.default_rng(3).integers(-(2**31), 2**31, (4, 8), dtype=np.int32)
    set_tensors(source, _put(f"{O_PROJ}.qzeros", "I32", random))
    convert(source, tmp_path / "awq", to="awq", verify="all")
    found = peers.numbers_of(tmp_path / "awq")[O_PROJ].zeros
    words = random.astype(np.int64) + 0x11111111
    assert (found == np.stack([words >> shift & 15 for shift in range(0, 32, 4)], -1).reshape(4, 64)).all()
    revert(tmp_path / "awq", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_two_configs_of_gptq_must_agree(source: Path, run) -> None:
    document = peers.read_config(source)["quantization_config"]
    for change, said in (
        ({"sym": True}, "sym is True here but False in config.json"),
        ({"bits": 8}, "bits is 8 here but 4"),
        ({"checkpoint_format": "gptq", "format": "gptq"}, "the layout is that of GPTQ here, of GPTQ v2 in config.json"),
    ):
        (source / "quantize_config.json").write_text(json.dumps({**document, **change}), "utf-8")
        run("convert", source, "--dry-run").refused("contradiction", said, file="quantize_config.json")


def test_a_changed_value_is_found_by_its_place(source: Path, tmp_path: Path, run) -> None:
    convert(source, tmp_path / "out")

    def flip(tensors: Tensors) -> None:
        words = tensors[f"{O_PROJ}.qweight"][1].copy()
        words[2, 5] ^= 1 << 12  # row 2 * 8 + 3, column 5
        tensors[f"{O_PROJ}.qweight"] = "I32", words

    set_tensors(source, flip)
    run("verify", source, tmp_path / "out").differs("different-value", "row 19, column 5")
