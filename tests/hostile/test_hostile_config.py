"""Configs that lie, contradict themselves or the tensors, or belong to another format: refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from awq2marlin import convert
from tests.hostile.hostile_files import (
    INDEX,
    MANIFEST,
    MODULE,
    NASTY,
    SHARD,
    edit_json,
    pack_tensors,
    split_file,
    unpack_tensors,
    write_awq,
    zeros,
)

AWQ: dict[str, Any] = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True}
QWEIGHT, QZEROS, SCALES = (f"{MODULE}.{part}" for part in ("qweight", "qzeros", "scales"))
OTHER = "model.layers.0.self_attn.o_proj"


def set_config(folder, document: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": document}))


def set_tensors(folder, **changes: Any) -> None:
    """Replaces (or with None removes) parts of the first module; `name=` adds a whole tensor."""
    tensors = unpack_tensors(folder / SHARD)
    for part, tensor in changes.items():
        name = f"{MODULE}.{part}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    (folder / SHARD).write_bytes(pack_tensors(tensors, {"format": "pt"}))


#: What is only described by `inspect`: the checkpoint is sound, but of a kind that is not converted.
DESCRIBED = {"foreign-format", "unsupported-bits", "unsupported-group-size"}


@pytest.fixture
def refused(awq, tmp_path, run):
    """Asserts that both commands refuse the checkpoint with one problem, and write nothing."""

    def check(
        code: str, *parts: str, file: str = "config.json", tensor: str = "", is_described: bool | None = None
    ) -> None:
        for command in (["convert", awq, tmp_path / "out"], ["convert", awq, "--dry-run"]):
            run(*command).refused(code, *parts, file=file, tensor=tensor)
        outcome = run("inspect", awq)
        if code in DESCRIBED if is_described is None else is_described:
            outcome.is_described(*parts)
        else:
            outcome.refused(code, *parts, file=file, tensor=tensor)
        assert not (tmp_path / "out").exists()

    return check


MALFORMED = {
    "empty": (b"", "bad-json", "it is empty; download the file again, or correct it"),
    "cut": (b'{"a": 1', "bad-json", "not valid JSON"),
    "a list": (b"[]", "bad-config", "it must hold a JSON object, found a list; download"),
    "a string": (b'"x"', "bad-config", "found a string"),
    "null": (b"null", "bad-config", "found null"),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0", "bad-json", "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "bad-json", "begins with a byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "bad-json", "not UTF-8"),
    "duplicate key": (b'{"a": 1, "a": 2}', "duplicate-key", "'a'"),
    "duplicate deep down": (b'{"quantization_config": {"bits": 4, "bits": 8}}', "duplicate-key", "'bits'"),
    "duplicate by escape": (b'{"bits": 4, "b\\u0069ts": 8}', "duplicate-key", "'bits'"),
    "duplicate of a nasty name": (b'{"\\u001b[31m\\u202e": 1, "\\u001b[31m\\u202e": 2}', "duplicate-key", r"x1b[31m"),
    "deep": (b'{"a":' * 100_000, "bad-json", "nested too deeply"),
    "deep list": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "bad-json", "nested too deeply"),
    "deep where it is shown": (
        b'{"quantization_config": {"bits": ' + b"[" * 300 + b"]" * 300 + b"}}",
        "bad-json",
        "nested too deeply",
    ),
    "number without end": (b'{"a": ' + b"1" * 10_000 + b"}", "bad-json", "not valid JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_config_is_refused(awq, refused, name: str) -> None:
    content, code, part = MALFORMED[name]
    (awq / "config.json").write_bytes(content)
    refused(code, part)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_config_of_an_older_tool_is_refused_where_it_counts(awq, refused, name: str) -> None:
    content, code, part = MALFORMED[name]
    (awq / "quant_config.json").write_bytes(content)
    (awq / "config.json").write_text('{"model_type": "llama"}')
    refused(code, part, file="quant_config.json")


@pytest.mark.parametrize("name", MALFORMED)
def test_beside_a_complete_config_it_is_told_of_and_comes_back(awq, tmp_path, run, name: str) -> None:
    content, code, part = MALFORMED[name]
    (awq / "quant_config.json").write_bytes(content)
    outcome = run("convert", awq, tmp_path / "out")
    if part == "not UTF-8":  # the manifest keeps texts only
        outcome.refused(code, part, file="quant_config.json")
        assert not (tmp_path / "out").exists()
        return
    (warning,) = outcome.report["warnings"]
    said = part if content else "it is empty"
    assert warning.startswith("quant_config.json is ignored: config.json says how the checkpoint is quantized (")
    assert said in warning
    assert not (tmp_path / "out/quant_config.json").exists()
    assert run("verify", awq, tmp_path / "out").code == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0
    assert (tmp_path / "back/quant_config.json").read_bytes() == content


@pytest.mark.parametrize("value", ["awq", 4, True, [], [AWQ], 1.5, "", 0, False], ids=repr)
def test_a_quantization_config_is_an_object(awq, refused, value: object) -> None:
    set_config(awq, value)
    refused("bad-config", "quantization_config must be a JSON object, found ")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}

FOREIGN = {
    "llm-awq": ({**AWQ, "version": "llm-awq"}, "of the llm-awq repository"),
    "llm-awq by its backend": ({**AWQ, "backend": "llm-awq"}, "of the llm-awq repository"),
    "ExLlama": ({**AWQ, "version": "exllama"}, "ExLlama layout"),
    "a version to come": ({**AWQ, "version": "gemm2"}, "version 'gemm2'"),
    "a version of escapes": ({**AWQ, "version": NASTY}, r"x1b[31m"),
    "GPTQ of a version to come": ({**GPTQ, "checkpoint_format": "gptq_v3"}, "a GPTQ checkpoint of format 'gptq_v3'"),
    "GPTQ for Marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "a GPTQ checkpoint of format 'marlin'"),
    "GPTQ for Marlin, older": ({**GPTQ, "is_marlin_format": True}, "a GPTQ checkpoint of format 'marlin'"),
    "GPTQ-Marlin": ({"quant_method": "marlin", "bits": 4, "group_size": 128}, "GPTQ-Marlin"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "of format 'marlin-24'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "FP8": ({"quant_method": "fp8"}, "FP8"),
    "packed by an engine": ({**AWQ, "quant_method": "awq_marlin"}, "packed by an engine"),
    "unheard of": ({"quant_method": "quux"}, "quant_method 'quux'"),
    "of escapes": ({"quant_method": NASTY}, r"x1b[31m"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_format_is_refused_by_name_with_advice(awq, refused, name: str) -> None:
    document, part = FOREIGN[name]
    set_config(awq, document)
    refused("foreign-format", part, "awq2marlin converts only", "look for another version of this model")


def test_a_config_under_the_old_key_of_compressed_tensors_is_read(awq, refused) -> None:
    for document, code, said in (
        ({"format": "pack-quantized"}, "bad-config", "config_groups names no group"),
        ({"format": "marlin-24"}, "foreign-format", "a compressed-tensors checkpoint of format 'marlin-24'"),
        ([], "bad-config", " must be a JSON object, found a list"),
    ):
        (awq / "config.json").write_text(json.dumps({"compression_config": document}))
        refused(code, said, file="config.json (compression_config)")


def test_a_foreign_format_is_refused_wherever_it_stands(awq, refused) -> None:
    gptq = {"bits": 4, "group_size": 64, "desc_act": True}
    deep = {"audio_config": None, "thinker_config": {"parts": [{"quantization_config": gptq}]}}
    (awq / "config.json").write_text(json.dumps(deep))
    refused("foreign-format", "GPTQ", file="config.json (thinker_config.parts.0)")
    (awq / "config.json").write_text(json.dumps({"text_config": {"quantization_config": gptq}}))
    refused("foreign-format", "GPTQ", file="config.json (text_config)")
    (awq / "config.json").write_text("{}")
    (awq / "quantize_config.json").write_text(json.dumps(gptq))
    refused("foreign-format", "GPTQ", file="quantize_config.json")


def test_a_foreign_config_of_an_older_tool_is_told_of_beside_a_complete_one(awq, run) -> None:
    (awq / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": True}))
    (warning,) = run("convert", awq, "--dry-run").report["warnings"]
    assert "quantize_config.json is ignored" in warning
    assert "this is a GPTQ checkpoint" in warning
    (awq / "quantize_config.json").write_text(json.dumps({NASTY: NASTY}))
    assert len(run("inspect", awq).report["warnings"]) == 1


UNSUPPORTED = {
    "3 bits": (
        {**AWQ, "bits": 3},
        "unsupported-bits",
        "to 3 bits, but only 4 and 8 are supported; look for",
    ),
    "2 bits": ({**AWQ, "bits": 2}, "unsupported-bits", "2 bits"),
    "bits as a string": ({**AWQ, "bits": "4"}, "unsupported-bits", "bits must be a whole number, found '4'"),
    "bits as a float": ({**AWQ, "bits": 4.0}, "unsupported-bits", "4.0"),
    "bits true": ({**AWQ, "bits": True}, "unsupported-bits", "True"),
    "bits huge": ({**AWQ, "bits": 10**4000}, "unsupported-bits", "…"),
    "bits a list": ({**AWQ, "bits": [4]}, "unsupported-bits", "[4]"),
    "bits nasty": ({**AWQ, "bits": NASTY}, "unsupported-bits", r"x1b[31m"),
    "bits absent": (
        {"quant_method": "awq", "group_size": 64},
        "bad-config",
        "lacks bits or w_bit; download the file again",
    ),
    "bits null": ({**AWQ, "bits": None}, "bad-config", "lacks bits or w_bit; download the file again"),
    "group size 16": (
        {**AWQ, "group_size": 16},
        "unsupported-group-size",
        "16, but only -1, 32, 64 and 128 are",
    ),
    "group size 256": ({**AWQ, "group_size": 256}, "unsupported-group-size", "256"),
    "group size 0": ({**AWQ, "group_size": 0}, "unsupported-group-size", "0"),
    "group size a string": ({**AWQ, "group_size": "64"}, "unsupported-group-size", "'64'"),
    "group size a float": ({**AWQ, "group_size": 64.0}, "unsupported-group-size", "64.0"),
    "group size absent": ({"quant_method": "awq", "bits": 4}, "bad-config", "lacks group_size or q_group_size"),
    "zero_point a number": ({**AWQ, "zero_point": 1}, "bad-config", "zero_point must be true or false, found 1"),
    "zero_point a string": ({**AWQ, "zero_point": "true"}, "bad-config", "zero_point must be"),
    "two layouts": (
        {**AWQ, "version": "gemm", "format": "gemv_fast"},
        "contradiction",
        "version 'gemm', format 'gemv_fast'",
    ),
    "GEMV of 8 bits": (
        {**AWQ, "version": "gemv", "bits": 8},
        "unsupported-bits",
        "AWQ gemv supports 4 bits only; correct a copy",
    ),
    "GEMV fast of 8 bits": (
        {**AWQ, "version": "gemv_fast", "bits": 8},
        "unsupported-bits",
        "AWQ gemv_fast supports 4 bits only",
    ),
    "Marlin with zero points": ({**AWQ, "version": "marlin"}, "contradiction", "has no zero points"),
    "two bits": ({**AWQ, "w_bit": 8}, "contradiction", "bits is 4, but w_bit is 8; correct a copy"),
    "two group sizes": ({**AWQ, "q_group_size": 128}, "contradiction", "group_size is 64, but q_group_size is 128"),
    "method a number": ({**AWQ, "quant_method": 0}, "bad-config", "quant_method must be a string, found 0"),
    "method a list": ({**AWQ, "quant_method": []}, "bad-config", "quant_method must be a string, found []"),
    "method false": ({**AWQ, "quant_method": False}, "bad-config", "quant_method must be a string"),
    "version false": ({**AWQ, "version": False}, "bad-config", "version must be a string, found False"),
    "version a list": ({**AWQ, "version": ["gemm"]}, "bad-config", "version must be a string"),
    "version a number": ({**AWQ, "version": 0}, "bad-config", "version must be a string"),
}


#: Those whose values are some of a sound checkpoint.
SOUND = {"3 bits", "2 bits", "group size 16", "group size 256", "GEMV of 8 bits", "GEMV fast of 8 bits"}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_or_malformed_value_is_refused(awq, refused, name: str) -> None:
    document, code, part = UNSUPPORTED[name]
    set_config(awq, document)
    refused(code, part, is_described=name in SOUND)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("bits", 8, "quant_config.json"),
        ("group_size", 128, "quant_config.json"),
        ("zero_point", False, "quantize_config.json"),
        ("bits", 8, "text_config"),
        ("group_size", 32, "llm_config"),
        ("group_size", 32, "talker_config"),
    ],
)
def test_two_configs_must_agree(awq, refused, key: str, value: object, place: str) -> None:
    other = {**AWQ, key: value}
    if place.endswith(".json"):
        (awq / place).write_text(json.dumps(other))
    else:
        edit_json(awq / "config.json", lambda config: {**config, place: {"quantization_config": other}})
        place = f"config.json ({place})"
    refused("contradiction", f"{key} is {value} here but", "in config.json", "remove", file=place)


def test_all_three_configs_are_compared(awq, refused) -> None:
    (awq / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64}))
    (awq / "quantize_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 128}))
    refused("contradiction", "group_size is 128 here but 64", file="quantize_config.json")


def test_a_checkpoint_without_quantization_is_refused(awq, refused) -> None:
    (awq / "config.json").write_text('{"model_type": "llama"}')
    refused("not-quantized", "not quantized", "Pass one that is")


def test_a_missing_config_is_refused(awq, refused) -> None:
    (awq / "config.json").unlink()
    refused("no-config", f"not found in {awq}; pass a complete checkpoint folder")


def test_pickled_weights_are_refused_unopened(awq, refused) -> None:
    (awq / SHARD).unlink()
    (awq / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    refused("pickled-weights", "can run code when opened", "look for a safetensors version", file="pytorch_model.bin")


def test_no_weights_and_weights_without_an_index_are_refused(awq, refused) -> None:
    (awq / SHARD).rename(awq / "a.safetensors")
    (awq / "b.safetensors").write_bytes(b"")
    refused("no-index", "there are 2 .safetensors files but no", file=INDEX)
    (awq / "a.safetensors").unlink()
    (awq / "b.safetensors").unlink()
    refused("no-weights", "download the complete checkpoint", file=SHARD)


def test_an_already_converted_checkpoint_is_refused(marlin, tmp_path, run) -> None:
    for options in ([tmp_path / "out"], ["--dry-run"]):
        run("convert", marlin, *options).refused("already-converted", "awq2marlin revert", file="config.json")
    assert not (tmp_path / "out").exists()


def test_an_awq_checkpoint_with_a_manifest_is_refused(awq, tmp_path, run) -> None:
    (awq / MANIFEST).write_text("{}")
    run("convert", awq, tmp_path / "out").refused("already-converted", "remove it", file=MANIFEST)


CONTRADICTIONS = {
    "8 bits that are 4": ({"bits": 8}, {}, SCALES, "that fits 4 bits, the config says 8"),
    "another group size": ({"group_size": 32}, {}, SCALES, "mean 4 groups, but there are 2: that fits group size 64"),
    "one group for all": ({"group_size": -1}, {}, SCALES, "mean 1 groups, but there are 2"),
    "no group size fits": ({}, {"scales": zeros("F16", 3, 64)}, SCALES, "fits no supported group size"),
    "transposed": ({}, {"scales": zeros("F16", 64, 2)}, SCALES, "perhaps it is packed in another layout"),
    "3 bits in truth": ({}, {"qweight": zeros("I32", 128, 6)}, SCALES, "qweight [128, 6] and 4 bits mean N=48"),
    "one zero point for all": ({}, {"qzeros": zeros("I32", 1, 8)}, QZEROS, "its shape is [1, 8], expected [2, 8]"),
    "a short bias": ({}, {"bias": zeros("F16", 63)}, f"{MODULE}.bias", "its shape is [63], expected [64]"),
    "a weight besides": ({}, {"weight": zeros("F16", 64, 128)}, f"{MODULE}.weight", "both a qweight and a weight"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused(awq, tmp_path, run, name: str) -> None:
    changes, tensors, tensor, part = CONTRADICTIONS[name]
    set_config(awq, {**AWQ, **changes})
    set_tensors(awq, **tensors)
    outcome = run("convert", awq, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.codes == {"contradiction"}
    assert (SHARD, tensor) in {(error["file"], error["tensor"]) for error in outcome.report["errors"]}
    assert part in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_config_that_says_awq_of_plain_tensors_is_refused(awq, refused) -> None:
    (awq / SHARD).write_bytes(pack_tensors({"model.norm.weight": zeros("F16", 16)}))
    refused("no-quantized-modules", "the config does not belong to these shards")


MODULE_FAULTS = {
    "fp32 scales": ({"scales": zeros("F32", 2, 64)}, "wrong-dtype", SCALES, "its dtype is F32, expected F16 or BF16"),
    "fp8 scales": ({"scales": zeros("F8_E4M3", 2, 64)}, "wrong-dtype", SCALES, "F8_E4M3"),
    "int64 qweight": ({"qweight": zeros("I64", 128, 8)}, "wrong-dtype", QWEIGHT, "its dtype is I64, expected I32"),
    "unsigned qweight": ({"qweight": zeros("U32", 128, 8)}, "wrong-dtype", QWEIGHT, "expected I32"),
    "fp16 qzeros": ({"qzeros": zeros("F16", 2, 8)}, "wrong-dtype", QZEROS, "expected I32"),
    "flat qweight": (
        {"qweight": zeros("I32", 1024)},
        "wrong-shape",
        QWEIGHT,
        "expected a 2-D tensor, found shape [1024]",
    ),
    "stacked qweight": ({"qweight": zeros("I32", 1, 128, 8)}, "wrong-shape", QWEIGHT, "expected a 2-D tensor"),
    "scalar scales": ({"scales": zeros("F16")}, "wrong-shape", SCALES, "expected a 2-D tensor, found shape []"),
    "empty K": ({"qweight": zeros("I32", 0, 8)}, "wrong-shape", QWEIGHT, "K=0, N=64 is empty"),
    "empty N": ({"qweight": zeros("I32", 128, 0)}, "wrong-shape", QWEIGHT, "K=128, N=0 is empty"),
    "qzeros missing": ({"qzeros": None}, "missing-tensor", QZEROS, "(zero_point is true)"),
    "scales missing": ({"scales": None}, "missing-tensor", SCALES, "it is missing"),
    "qweight missing": ({"qweight": None}, "missing-tensor", QWEIGHT, "the module has qzeros and scales"),
    "GPTQ's g_idx": ({"g_idx": zeros("I32", 128)}, "foreign-format", f"{MODULE}.g_idx", "a GPTQ module"),
}


@pytest.mark.parametrize("name", MODULE_FAULTS)
def test_a_faulty_module_is_refused_by_its_tensor(awq, refused, name: str) -> None:
    tensors, code, tensor, part = MODULE_FAULTS[name]
    set_tensors(awq, **tensors)
    refused(code, part, file=SHARD, tensor=tensor)


def test_bits_and_group_sizes_that_differ_between_modules_are_refused(awq, tmp_path, run) -> None:
    """The first two modules that differ are named, the one that the config does not speak of first."""
    usual = f"but {OTHER} has 4 bits in groups of 64; only checkpoints with one kind"
    set_tensors(awq, qweight=zeros("I32", 128, 16), qzeros=zeros("I32", 2, 16))
    outcome = run("convert", awq, tmp_path / "out")
    outcome.refused("foreign-format", f"this module has 8 bits in groups of 64, {usual}", file=SHARD, tensor=QWEIGHT)
    set_tensors(awq, qweight=zeros("I32", 128, 8), qzeros=zeros("I32", 4, 8), scales=zeros("F16", 4, 64))
    outcome = run("convert", awq, tmp_path / "out")
    outcome.refused("foreign-format", f"this module has 4 bits in groups of 32, {usual}", file=SHARD, tensor=QWEIGHT)


def test_all_problems_are_told_at_once_sorted(awq, run) -> None:
    set_tensors(awq, scales=zeros("F32", 2, 64), qweight=zeros("I8", 128, 8), qzeros=None)
    problems = run("inspect", awq).report["errors"]
    assert [(each["tensor"], each["code"]) for each in problems] == [
        (QWEIGHT, "wrong-dtype"),
        (QZEROS, "missing-tensor"),
        (SCALES, "wrong-dtype"),
    ]


def test_a_module_too_wide_for_the_memory_is_refused_from_its_header(awq, refused) -> None:
    """A sparse file holds a terabyte; a row of tiles of it would not fit the memory."""
    words = 1 << 28
    header, _ = split_file(awq / SHARD)
    header = {QWEIGHT: {"dtype": "I32", "shape": [128, words], "data_offsets": [0, 128 * words * 4]}}
    end = 128 * words * 4
    for name, dtype, shape, size in (
        (QZEROS, "I32", [2, words], 8 * words),
        (SCALES, "F16", [2, words * 8], 32 * words),
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (awq / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)
    with (awq / SHARD).open("ab") as stream:
        stream.truncate(8 + len(text) + end)
    refused("wrong-shape", "wider than 1048576 columns", file=SHARD, tensor=QWEIGHT)


@pytest.mark.parametrize("value", [None, True, 7, "lm_head", ["lm_head", NASTY], {"a": [1, {}]}], ids=ascii)
def test_any_modules_to_not_convert_is_carried_unread(tmp_path, value: object) -> None:
    awq = write_awq(tmp_path / "awq")
    set_config(awq, {**AWQ, "modules_to_not_convert": value})
    convert(awq, tmp_path / "out", workers=1)
    carried = json.loads((tmp_path / "out/config.json").read_text("utf-8"))["quantization_config"]
    assert carried["modules_to_not_convert"] == value


@pytest.mark.parametrize("value", [NASTY, [NASTY], {NASTY: NASTY}, 1e400, -0.0, 10**300, None], ids=ascii)
def test_a_config_of_odd_values_converts_verifies_and_comes_back(awq, tmp_path, run, say, value: object) -> None:
    edit_json(awq / "config.json", lambda config: {**config, "model_type": value, "custom": [value]})
    before = (awq / "config.json").read_bytes()
    assert run("convert", awq, tmp_path / "out").code == 0
    assert run("verify", awq, tmp_path / "out").code == 0
    for path in (awq, tmp_path / "out"):
        assert run("inspect", path).code == 0
        assert say("inspect", path)[0] == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0
    assert (tmp_path / "back/config.json").read_bytes() == before


@pytest.mark.parametrize("others", [{}, {".g_idx": zeros("I32", 64)}, {"qweight": zeros("I32", 64, 16)}])
def test_a_tensor_of_a_module_without_a_name_is_refused(awq, refused, others: dict[str, Any]) -> None:
    """Found by fuzzing: `.qweight` was looked up as `qweight`, the tensor of the whole model."""
    parts = {"qweight": zeros("I32", 64, 16), "scales": zeros("F16", 1, 128), "qzeros": zeros("I32", 1, 16)}
    sound = parts if "qweight" in others else {}
    (awq / SHARD).write_bytes(pack_tensors({".qweight": zeros("I32", 64, 16), **others, **sound}))
    tensor = min([".qweight", *(name for name in others if name.startswith("."))])
    refused("bad-name", "begins with a dot", file=SHARD, tensor=tensor)
