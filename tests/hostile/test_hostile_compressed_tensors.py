"""compressed-tensors checkpoints that lie, or hold what cannot be converted: each is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq2marlin import convert, inspect, revert, verify
from tests.faults.helpers import contents
from tests.formats import peers

DOWN, O_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
SHARD = "model.safetensors"
NASTY = "\x1b[31m"

Tensors = dict[str, tuple[str, np.ndarray]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound checkpoint of 4 bits in groups of 32 with zero points."""
    shutil.copytree(peers.checkpoint("w4_asym_g32"), tmp_path / "source")
    return tmp_path / "source"


def set_group(source: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]) -> None:
    """Changes a config: the change gets the quantization config, its group and that group's weights."""
    document = json.loads((source / "config.json").read_text("utf-8"))
    quantization = document["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    change(quantization, group, group["weights"])
    (source / "config.json").write_text(json.dumps(document), "utf-8")


def set_tensors(source: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a checkpoint."""
    tensors = peers.read_tensors(source)
    change(tensors)
    peers.write_tensors(source / SHARD, tensors)


def two_groups(quantization: dict[str, Any], group: dict[str, Any], weights: dict[str, Any]) -> None:
    quantization["config_groups"]["group_1"] = {**group, "weights": {**weights, "num_bits": 8}}


UNCONVERTIBLE: dict[str, tuple[Callable[..., Any], str, str]] = {
    "activations": (
        lambda _q, g, _w: g.update(input_activations={"num_bits": 8}),
        "foreign-format",
        "input_activations",
    ),
    "outputs": (lambda _q, g, _w: g.update(output_activations={"num_bits": 8}), "foreign-format", "output_activations"),
    "two groups": (two_groups, "foreign-format", "quantized differently"),
    "floats": (lambda _q, _g, w: w.update(type="float"), "foreign-format", "'float'"),
    "tensor": (lambda _q, _g, w: w.update(strategy="tensor"), "foreign-format", "'tensor'"),
    "blocks": (lambda _q, _g, w: w.update(strategy="block"), "foreign-format", "'block'"),
    "block structure": (lambda _q, _g, w: w.update(block_structure=[128, 128]), "foreign-format", "block_structure"),
    "dynamic": (lambda _q, _g, w: w.update(dynamic=True), "foreign-format", "dynamically"),
    "transform": (lambda q, _g, _w: q.update(transform_config={"a": 1}), "foreign-format", "transform_config"),
    "sparsity": (lambda q, _g, _w: q.update(sparsity_config={"format": "dense"}), "foreign-format", "sparsity_config"),
    "cache": (lambda q, _g, _w: q.update(kv_cache_scheme={"num_bits": 8}), "foreign-format", "kv_cache_scheme"),
    "3 bits": (lambda _q, _g, w: w.update(num_bits=3), "unsupported-bits", "3 bits"),
    "bits true": (lambda _q, _g, w: w.update(num_bits=True), "unsupported-bits", "True"),
    "groups of 16": (lambda _q, _g, w: w.update(group_size=16), "unsupported-group-size", "16"),
    "groups of escapes": (lambda _q, _g, w: w.update(group_size=NASTY), "unsupported-group-size", r"x1b[31m"),
    "symmetric 1": (lambda _q, _g, w: w.update(symmetric=1), "bad-config", "1"),
    "a group of another format": (
        lambda _q, g, _w: g.update(format="int-quantized"),
        "foreign-format",
        "int-quantized",
    ),
    "no weights": (lambda _q, g, _w: g.update(weights=None), "bad-config", "group_0 has no weights"),
    "groups a list": (lambda q, _g, _w: q.update(config_groups=[]), "bad-config", "config_groups must map"),
    "a group a list": (lambda q, _g, _w: q.update(config_groups={NASTY: []}), "bad-config", "config_groups must map"),
    "no group": (lambda q, _g, _w: q.update(config_groups={}), "bad-config", "names no group"),
    "type a number": (lambda _q, _g, w: w.update(type=1), "bad-config", "type must be a string"),
    "strategy of escapes": (lambda _q, _g, w: w.update(strategy=NASTY), "foreign-format", r"x1b[31m"),
}


@pytest.mark.parametrize("name", UNCONVERTIBLE)
def test_a_config_that_cannot_be_converted_is_refused_by_name(source: Path, tmp_path: Path, run, name: str) -> None:
    change, code, said = UNCONVERTIBLE[name]
    set_group(source, change)
    for arguments in (("convert", source, tmp_path / "out"), ("convert", source, "--dry-run")):
        run(*arguments).refused(code, said, file="config.json")
    outcome = run("inspect", source)
    if code == "foreign-format" or name in ("3 bits", "groups of 16"):
        outcome.is_described(said)
    else:
        outcome.refused(code, said, file="config.json")
    assert not (tmp_path / "out").exists()


HARMLESS: dict[str, Callable[..., Any]] = {
    "empty and null": lambda q, g, _w: (q.update(transform_config={}, sparsity_config=None), g.update(targets=[])),
    "format in the group only": lambda q, _g, _w: q.pop("format"),
    "format at the top only": lambda _q, g, _w: g.pop("format"),
    "no strategy": lambda _q, _g, w: w.pop("strategy"),
    "static order": lambda _q, _g, w: w.update(actorder="static", observer="mse", observer_kwargs={}),
    "unknown keys": lambda q, g, w: (q.update(new=1), g.update(new=1), w.update(new=1)),
    "patterns": lambda q, g, _w: (q.update(ignore=["re:.*gate$"]), g.update(targets=["re:.*proj"])),
    "the same group twice": lambda q, g, _w: q["config_groups"].update(config_group_1=dict(g)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_carried(source: Path, tmp_path: Path, name: str) -> None:
    set_group(source, HARMLESS[name])
    convert(source, tmp_path / "out", verify="all")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def _drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, dtype: str, array: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: (dtype, np.asarray(array))})


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "no shape": (_drop(f"{DOWN}.weight_shape"), "missing-tensor", f"{DOWN}.weight_shape"),
    "no scales": (_drop(f"{DOWN}.weight_scale"), "missing-tensor", f"{DOWN}.weight_scale"),
    "no codes": (_drop(f"{DOWN}.weight_packed"), "missing-tensor", f"{DOWN}.weight_packed"),
    "scales of fp32": (_put(f"{DOWN}.weight_scale", "F32", np.ones((16, 4))), "wrong-dtype", f"{DOWN}.weight_scale"),
    "scales of another N": (
        _put(f"{DOWN}.weight_scale", "BF16", np.ones((8, 4))),
        "contradiction",
        f"{DOWN}.weight_scale",
    ),
    "scales of more groups": (
        _put(f"{DOWN}.weight_scale", "BF16", np.ones((16, 5))),
        "contradiction",
        f"{DOWN}.weight_",
    ),
    "codes of one dimension": (
        _put(f"{DOWN}.weight_packed", "I32", np.ones(256)),
        "wrong-shape",
        f"{DOWN}.weight_packed",
    ),
    "codes of 16 bits": (
        _put(f"{DOWN}.weight_packed", "BF16", np.ones((16, 16))),
        "wrong-dtype",
        f"{DOWN}.weight_packed",
    ),
    "zero points by row": (
        _put(f"{DOWN}.weight_zero_point", "I32", np.ones((4, 2))),
        "contradiction",
        f"{DOWN}.weight_zero_point",
    ),
    "a shape of three": (_put(f"{DOWN}.weight_shape", "I64", [16, 128, 1]), "contradiction", f"{DOWN}.weight_shape"),
    "an embedding": (
        lambda tensors: tensors.update(
            {
                f"model.embed_tokens.{part}": tensors.pop(f"{DOWN}.{part}")
                for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
            }
        ),
        "foreign-format",
        "model.embed_tokens.weight_packed",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_headers_are_refused_by_name_before_a_byte_is_written(source: Path, tmp_path: Path, run, name) -> None:
    change, code, tensor = WRONG_TENSORS[name]
    set_tensors(source, change)
    outcome = run("convert", source, tmp_path / "out")
    assert outcome.code == 1
    errors = outcome.report["errors"]
    assert code in {error["code"] for error in errors}, outcome.err
    assert any(error["tensor"].startswith(tensor) for error in errors), outcome.err
    assert not (tmp_path / "out").exists()


LIES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "K": (_put(f"{DOWN}.weight_shape", "I64", [16, 127]), f"{DOWN}.weight_shape"),
    "N": (_put(f"{DOWN}.weight_shape", "I64", [15, 128]), f"{DOWN}.weight_shape"),
    "turned": (_put(f"{DOWN}.weight_shape", "I64", [128, 16]), f"{DOWN}.weight_shape"),
    "huge": (_put(f"{DOWN}.weight_shape", "I64", [2**62, -1]), f"{DOWN}.weight_shape"),
    "order": (_put(f"{DOWN}.weight_g_idx", "I32", np.arange(128)[::-1] // 32), f"{DOWN}.weight_g_idx"),
    "one row": (_put(f"{DOWN}.weight_g_idx", "I32", [*range(127), 9]), f"{DOWN}.weight_g_idx"),
}


@pytest.mark.parametrize("to", ["marlin", "awq"])
@pytest.mark.parametrize("name", LIES)
def test_what_could_not_be_given_back_is_refused_by_name(source: Path, tmp_path: Path, run, name, to: str) -> None:
    change, tensor = LIES[name]
    set_tensors(source, change)
    outcome = run("convert", source, tmp_path / "out", "--to", to)
    outcome.refused("contradiction", "could not be undone", file=SHARD, tensor=tensor)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", sorted(peers.ODD_ROWS))
def test_inspect_promises_nothing_of_a_module_whose_k_ends_inside_a_word(run, name: str) -> None:
    outcome = run("inspect", peers.checkpoint(name))
    outcome.refused("contradiction", "K ends inside a word", tensor=f"{O_PROJ}.weight_shape")


@pytest.mark.parametrize("name", sorted(peers.ODD_ROWS))
def test_k_that_ends_inside_a_word_is_refused_before_a_byte_is_written(tmp_path: Path, run, name: str) -> None:
    outcome = run("convert", peers.checkpoint(name), tmp_path / "out", "--unaligned", "pad", "--dry-run")
    outcome.refused("contradiction", "K ends inside a word", tensor=f"{O_PROJ}.weight_shape")
    run("convert", peers.checkpoint(name), tmp_path / "out", "--unaligned", "pad")
    assert not (tmp_path / "out").exists()


def test_bits_past_the_last_column_are_refused_by_name(tmp_path: Path, run) -> None:
    shutil.copytree(peers.checkpoint("odd_n_w4"), tmp_path / "source")
    name = f"{O_PROJ}.weight_zero_point"

    def set_a_bit(tensors: Tensors) -> None:
        zeros = tensors[name][1].copy()
        zeros[-1, -1] |= np.int32(1) << 30
        tensors[name] = "I32", zeros

    set_tensors(tmp_path / "source", set_a_bit)
    outcome = run("convert", tmp_path / "source", tmp_path / "out", "--unaligned", "pad")
    assert outcome.code == 1
    assert outcome.report["errors"][0]["tensor"] == name
    assert not (tmp_path / "out" / "config.json").exists()


def test_zero_points_of_a_symmetric_checkpoint_must_be_the_middle(tmp_path: Path, run) -> None:
    shutil.copytree(peers.checkpoint("w4_sym_g32"), tmp_path / "source")
    name = f"{DOWN}.weight_zero_point"
    middle = np.full((2, 4), 0x88888888, np.uint32).view(np.int32)
    set_tensors(tmp_path / "source", _put(name, "I32", middle))
    convert(tmp_path / "source", tmp_path / "out")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")
    set_tensors(tmp_path / "source", _put(name, "I32", middle + 1))
    outcome = run("convert", tmp_path / "source", tmp_path / "other")
    outcome.refused("contradiction", "no zero points (symmetric: true)", file=SHARD, tensor=name)


def test_a_changed_value_is_found_by_its_place(source: Path, tmp_path: Path, run) -> None:
    convert(source, tmp_path / "out")

    def flip(tensors: Tensors) -> None:
        words = tensors[f"{O_PROJ}.weight_packed"][1].copy()
        words[5, 2] ^= 1 << 12  # column 5, row 2 * 8 + 3
        tensors[f"{O_PROJ}.weight_packed"] = "I32", words

    set_tensors(source, flip)
    run("verify", source, tmp_path / "out").differs("different-value", "row 19, column 5")


@pytest.mark.parametrize("to", ["awq", "marlin"])
def test_a_symmetric_source_has_no_zero_points_of_its_own(tmp_path: Path, to: str) -> None:
    source = peers.checkpoint("w8_sym_g64")
    convert(source, tmp_path / "out", to=to, verify="all")
    zeros = [name for name in peers.read_tensors(tmp_path / "out") if name.endswith(".qzeros")]
    # A module that Marlin cannot take is kept in AWQ layout, of the same scheme.
    assert len(zeros) == (len(peers.decode_all(source)) if to == "awq" else 0)
    assert inspect(tmp_path / "out").zero_point is (to == "awq")
    assert verify(source, tmp_path / "out").modules_total == len(peers.decode_all(source))


LOST: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "codes": (_drop(f"{DOWN}.weight_packed"), "missing-tensor", f"{DOWN}.weight_packed"),
    "all but the shape": (
        lambda tensors: [tensors.pop(f"{DOWN}.{part}") for part in ("weight_packed", "weight_scale")],
        "missing-tensor",
        f"{DOWN}.weight_packed",
    ),
    "codes that are not packed": (
        lambda tensors: tensors.update({f"{DOWN}.weight": ("I8", tensors.pop(f"{DOWN}.weight_packed")[1])}),
        "foreign-format",
        f"{DOWN}.weight",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_symmetric_module_without_its_codes_is_not_carried_over_in_silence(tmp_path: Path, run, name: str) -> None:
    shutil.copytree(peers.checkpoint("w4_sym_g32"), tmp_path / "source")
    change, code, tensor = LOST[name]
    set_tensors(tmp_path / "source", change)
    run("convert", tmp_path / "source", tmp_path / "out").refused(code, file=SHARD, tensor=tensor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj_packed", "mlp.experts.down_proj.weight_packed"])
def test_experts_in_one_tensor_are_refused_by_name(source: Path, tmp_path: Path, run, name: str) -> None:
    set_tensors(source, _put(f"model.layers.0.{name}", "I32", np.zeros((2, 16, 16), np.int32)))
    outcome = run("convert", source, tmp_path / "out")
    outcome.refused("foreign-format", "this one 3-D tensor", file=SHARD, tensor=f"model.layers.0.{name}")


@pytest.mark.parametrize("to", ["marlin", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_that_the_target_would_take_for_a_part_is_refused(tmp_path: Path, run, part: str, to: str) -> None:
    shutil.copytree(peers.checkpoint("w4_sym_g32"), tmp_path / "source")
    set_tensors(tmp_path / "source", _put(f"{DOWN}.{part}", "I32", np.zeros((4, 2))))
    outcome = run("convert", tmp_path / "source", tmp_path / "out", "--to", to)
    assert outcome.report["errors"][0]["tensor"] == f"{DOWN}.{part}", outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("middle", [0, 1])
def test_old_zero_points_of_a_symmetric_checkpoint_must_be_the_middle(tmp_path: Path, run, middle: int) -> None:
    shutil.copytree(peers.checkpoint("w4_sym_g32"), tmp_path / "source")
    for name, columns in ((DOWN, 16), (O_PROJ, 64)):
        set_tensors(tmp_path / "source", _put(f"{name}.weight_zero_point", "I8", np.full((columns, 4), middle)))
    outcome = run("convert", tmp_path / "source", tmp_path / "out")
    if middle:
        outcome.refused("contradiction", "no zero points (symmetric: true)", file=SHARD)
        return
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (("--to", "awq"), "Use --to marlin with --unaligned pad"),
        (("--unaligned", "error"), "use --unaligned pad"),
        ((), "Use --unaligned pad"),
    ],
)
def test_the_advice_for_an_odd_number_of_columns_helps(tmp_path: Path, run, options, advice: str) -> None:
    source = peers.checkpoint("odd_n_w4")
    outcome = run("convert", source, tmp_path / "out", *options)
    outcome.refused("unaligned", advice, file=SHARD, tensor=O_PROJ)
    assert "and it cannot be kept" not in outcome.err or not options
    assert run("convert", source, tmp_path / "out", "--unaligned", "pad").code == 0


def test_an_output_embedding_with_an_odd_number_of_columns_cannot_be_padded(tmp_path: Path, run) -> None:
    shutil.copytree(peers.checkpoint("odd_n_w4"), tmp_path / "source")

    def to_head(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
            tensors[f"lm_head.{part}"] = tensors[f"{O_PROJ}.{part}"]

    set_tensors(tmp_path / "source", to_head)
    for options in (("--unaligned", "pad"), ("--to", "awq")):
        outcome = run("convert", tmp_path / "source", tmp_path / "out", *options)
        assert outcome.code == 1
        assert "No other format" in outcome.err
        assert "--unaligned pad" not in outcome.err
