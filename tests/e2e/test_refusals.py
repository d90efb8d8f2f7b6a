"""Formats that are not AWQ's "gemm", and checkpoints that contradict themselves: refused by name, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, convert
from awq2marlin.checkpoint.synthetic import write_checkpoint
from tests.e2e.inputs import (
    INDEX,
    SINGLE,
    add_tensors,
    edit_json,
    join_file,
    layer,
    old_config,
    plain,
    say,
    split_file,
    write_files,
)
from tests.skips import OTHER_FILE_SYSTEM

Change = Callable[[Path], Any]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def only(quantization: dict[str, Any]) -> Change:
    """Replaces the whole quantization config."""
    return edit_json("config.json", lambda config: config.update(quantization_config=quantization))


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        header, data = split_file(folder / SINGLE)
        edit(header)
        join_file(folder / SINGLE, json.dumps(header).encode(), data)

    return change


def reshape(tensor: str, shape: list[int]) -> Change:
    return edit_header(lambda header: header[tensor].update(shape=shape))


def rename(old: str, new: str) -> Change:
    return edit_header(lambda header: header.update({new: header.pop(old)}))


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def pickled_by_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))


def many_files_no_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


REFUSED: dict[str, tuple[Change, str, str, str]] = {
    # name: (change, code, where, a part of the message)
    "gemv": (say(version="gemv"), "contradiction", "config.json", "says AWQ gemv"),
    "gemv_in_capitals": (say(version="GEMV"), "contradiction", "config.json", "the tensors are those of AWQ"),
    "gemv_fast": (say(version="gemv_fast"), "contradiction", "config.json", "says AWQ gemv_fast"),
    "two_layouts": (
        say(checkpoint_format="gemv_fast"),
        "contradiction",
        "config.json",
        "checkpoint_format 'gemv_fast'",
    ),
    "llm_awq_by_version": (say(version="llm-awq"), "foreign-format", "config.json", "llm-awq"),
    "llm_awq_by_backend": (say(backend="llm-awq"), "foreign-format", "config.json", "llm-awq"),
    "version_marlin": (say(version="marlin"), "contradiction", "config.json", "has no zero points"),
    "marlin": (say(version="marlin", zero_point=False), "contradiction", "config.json", "says AWQ marlin"),
    "version_exllama": (say(version="exllama"), "foreign-format", "config.json", "ExLlama"),
    "version_unknown": (say(version="x\x1b[31m"), "foreign-format", "config.json", "AWQ with version 'x"),
    "compressed_tensors": (
        only({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}),
        "foreign-format",
        "config.json",
        "a compressed-tensors checkpoint of format 'nvfp4-pack-quantized'",
    ),
    "compression_config": (
        edit_json("config.json", lambda config: config.update(compression_config=config.pop("quantization_config"))),
        "foreign-format",
        "config.json (compression_config)",
        "a compressed-tensors checkpoint of no format",
    ),
    "gptq": (
        only({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}),
        "contradiction",
        "config.json",
        "says GPTQ (4 bits in groups of 64 with zero points), but the tensors are those of AWQ;",
    ),
    "gptq_without_a_method": (
        only({"bits": 4, "group_size": 64, "desc_act": True, "damp_percent": 0.1}),
        "foreign-format",
        "config.json",
        "a GPTQ checkpoint",
    ),
    "gptq_tensors": (
        add_tensors({f"{Q_PROJ}.g_idx": ("I32", [1], bytes(4))}),
        "foreign-format",
        SINGLE,
        "this is a GPTQ module",
    ),
    "bitsandbytes": (only({"quant_method": "bitsandbytes"}), "foreign-format", "config.json", "bitsandbytes"),
    "three_bits": (say(bits=3), "unsupported-bits", "config.json", "3 bits, but only 4 and 8"),
    "bits_as_text": (say(bits="4"), "unsupported-bits", "config.json", "bits must be a whole number, found '4'"),
    "group_size_16": (say(group_size=16), "unsupported-group-size", "config.json", "16, but only -1, 32, 64 and 128"),
    "no_bits": (say(remove=("bits",)), "bad-config", "config.json", "lacks bits or w_bit"),
    "no_group_size": (say(remove=("group_size",)), "bad-config", "config.json", "lacks group_size or q_group_size"),
    "two_bits_said": (say(w_bit=8), "contradiction", "config.json", "bits is 4, but w_bit is 8; correct"),
    "two_configs_that_differ": (
        old_config("quant_config.json", only=False, q_group_size=128),
        "contradiction",
        "quant_config.json",
        "group_size is 128 here but 64 in config.json",
    ),
    "not_quantized": (
        edit_json("config.json", lambda config: config.pop("quantization_config")),
        "not-quantized",
        "config.json",
        "not quantized",
    ),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "no-config", "config.json", "not found in "),
    "fp32_scales": (
        edit_header(lambda h: h[f"{Q_PROJ}.scales"].update(dtype="F32", shape=[1, 128])),
        "wrong-dtype",
        SINGLE,
        "its dtype is F32, expected F16 or BF16",
    ),
    "the_config_says_other_bits": (say(bits=8), "contradiction", SINGLE, "that fits 4 bits, the config says 8"),
    "the_config_says_another_group_size": (
        say(group_size=32),
        "contradiction",
        SINGLE,
        "but there are 4: that fits group size 64",
    ),
    "one_module_has_another_group_size": (
        lambda folder: (
            reshape(f"{Q_PROJ}.scales", [1, 256])(folder),
            reshape(f"{Q_PROJ}.qzeros", [1, 32])(folder),
        ),
        "contradiction",
        SINGLE,
        "scales are [1, 256]",
    ),
    "qzeros_missing": (
        rename(f"{Q_PROJ}.qzeros", f"{Q_PROJ}.other"),
        "missing-tensor",
        SINGLE,
        "(zero_point is true)",
    ),
    "scales_missing": (rename(f"{Q_PROJ}.scales", f"{Q_PROJ}.other"), "missing-tensor", SINGLE, "it is missing"),
    "qweight_missing": (rename(f"{Q_PROJ}.qweight", f"{Q_PROJ}.other"), "missing-tensor", SINGLE, "it is missing"),
    "a_module_with_a_weight_too": (
        add_tensors({f"{Q_PROJ}.weight": ("F16", [1, 1], bytes(2))}),
        "contradiction",
        SINGLE,
        "both a qweight and a weight",
    ),
    "a_bias_of_another_length": (
        add_tensors({f"{Q_PROJ}.bias": ("F16", [64], bytes(128))}),
        "contradiction",
        SINGLE,
        "expected [128]",
    ),
    "gptq_shapes": (
        reshape(f"{Q_PROJ}.qweight", [16, 128]),
        "contradiction",
        SINGLE,
        "that is the layout of GPTQ, but config.json says AWQ",
    ),
    "pickled": (pickled, "pickled-weights", "pytorch_model.bin", "look for a safetensors version"),
    "pickled_by_index": (pickled_by_index, "pickled-weights", INDEX, "only .safetensors files are read"),
    "no_index": (many_files_no_index, "no-index", INDEX, "2 .safetensors files but no"),
    "no_weights": (
        lambda folder: (folder / SINGLE).unlink(),
        "no-weights",
        SINGLE,
        "download the complete checkpoint",
    ),
    "no_quantized_modules": (
        edit_header(lambda h: [h.update({n.replace(".q", ".w"): h.pop(n)}) for n in list(h) if ".q" in n]),
        "no-quantized-modules",
        "config.json",
        "the config does not belong to these shards",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_a_byte_is_written(name: str, tmp_path: Path) -> None:
    change, code, where, text = REFUSED[name]
    write_checkpoint(tmp_path / "source", plain(layer()))
    change(tmp_path / "source")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "output")
    problem = caught.value.problems[0]
    assert (problem.code, problem.file) == (code, where)
    assert text in problem.message
    assert problem.message.isprintable()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "names",
    [("readme.md", "README.md"), ("Readme.md/x.txt", None), ("Marlin_Manifest.json", None), ("Config.JSON", None)],
)
def test_names_that_differ_from_ours_only_in_case_are_refused(names: tuple[str, str | None], tmp_path: Path) -> None:
    """On some file systems such a file would be one of ours."""
    write_checkpoint(tmp_path / "source", plain(layer()))
    write_files({name: name.encode() for name in names if name})(tmp_path / "source")
    if len(list((tmp_path / "source").iterdir())) < 5:
        pytest.skip(OTHER_FILE_SYSTEM)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "output")
    assert {problem.code for problem in caught.value.problems} == {"unsafe-name"}
    assert "rename" in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_an_already_converted_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", plain())
    convert(tmp_path / "source", tmp_path / "output")
    with pytest.raises(CheckpointError, match="already Marlin-native; 'awq2marlin revert' gives the original back"):
        convert(tmp_path / "output", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_all_problems_are_told_at_once_and_capped(tmp_path: Path) -> None:
    modules = {name: size for number in range(5) for name, size in layer(number).items()}
    write_checkpoint(tmp_path / "source", plain(modules, {}))
    say(group_size=32)(tmp_path / "source")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "output")
    assert len(caught.value.problems) == 35
    assert [problem.tensor for problem in caught.value.problems] == sorted(f"{name}.scales" for name in modules)
    assert str(caught.value).splitlines()[-1] == "... and 15 more of this kind"
    assert len(str(caught.value).splitlines()) == 21
