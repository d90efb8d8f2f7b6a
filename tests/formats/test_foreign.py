"""Formats that are not converted: each is told by its name, with the same words by every command, and described."""

import json
from pathlib import Path

import pytest

from awq2marlin import CheckpointError, convert, inspect
from awq2marlin.cli.app import main
from tests.hostile.hostile_files import pack_tensors

LAYER = "model.layers.0.mlp.up_proj"


def tensor(dtype, *shape):
    """(type, shape, zeros)"""
    size = {"U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}[dtype]
    for each in shape:
        size *= each
    return dtype, list(shape), bytes(size)


NORM = {"model.norm.weight": tensor("F16", 8)}
DENSE = {f"{LAYER}.weight": tensor("F16", 8, 8)}
NUMBERS = {"bits": 4, "group_size": 64}


def said(**quantization):
    """A config of Transformers."""
    return {"model_type": "llama", "quantization_config": quantization}


#: By name: config, tensors, other files; what `inspect` calls the format; bits and group size; words of the reason.
CASES = {
    "bitsandbytes": (
        said(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        {f"{LAYER}.weight": tensor("U8", 32, 1), f"{LAYER}.weight.absmax": tensor("U8", 1)},
        {},
        ("bitsandbytes", 4, 0),
        "a bitsandbytes checkpoint",
    ),
    "bitsandbytes of 8 bits": (
        said(quant_method="bitsandbytes", load_in_8bit=True), DENSE, {}, ("bitsandbytes", 8, 0), "a bitsandbytes",
    ),
    "bitsandbytes that does not say so": (
        said(load_in_4bit=False, load_in_8bit=True), DENSE, {}, ("bitsandbytes", 8, 0), "a bitsandbytes checkpoint",
    ),
    "FP8": (
        said(quant_method="fp8", weight_block_size=[128, 128]),
        {f"{LAYER}.weight": tensor("F8_E4M3", 8, 8), f"{LAYER}.weight_scale_inv": tensor("F32", 1, 1)},
        {},
        ("fp8", 0, 0),
        "8-bit floating-point numbers",
    ),
    "NVFP4 of compressed-tensors": (
        said(
            quant_method="compressed-tensors",
            format="nvfp4-pack-quantized",
            config_groups={"group_0": {"weights": {"num_bits": 4, "group_size": 64}}},
        ),
        {},
        {},
        ("compressed-tensors", 4, 64),
        "of format 'nvfp4-pack-quantized': its weights are 4-bit floating-point numbers",
    ),
    "NVFP4 of ModelOpt": (
        {"model_type": "llama"},
        {f"{LAYER}.weight": tensor("U8", 8, 4), f"{LAYER}.weight_scale_2": tensor("F32")},
        {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}},
        ("modelopt", 0, 16),
        "a ModelOpt checkpoint (NVFP4): its weights are 4-bit floating-point numbers",
    ),
    "AWQ of ModelOpt": (
        {"model_type": "llama"},
        {},
        {"hf_quant_config.json": {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}}},
        ("modelopt", 0, 128),
        "a ModelOpt checkpoint (W4A16_AWQ)",
    ),
    "ModelOpt by its method": (said(quant_method="modelopt", quant_algo="FP8"), {}, {}, ("modelopt", 0, 0), "(FP8)"),
    "MXFP4": (said(quant_method="mxfp4"), {}, {}, ("mxfp4", 0, 0), "an MXFP4 checkpoint"),
    "MLX": (
        {"quantization": NUMBERS, "quantization_config": NUMBERS},
        {f"{LAYER}.weight": tensor("U32", 8, 8), f"{LAYER}.biases": tensor("BF16", 8, 1)},
        {},
        ("mlx", 4, 64),
        "an MLX checkpoint",
    ),
    "MLX by its tensors": (
        said(**NUMBERS, zero_point=True),
        {f"{LAYER}.{part}": tensor("BF16", 8, 1) for part in ("weight", "scales", "biases")},
        {},
        ("mlx", 4, 64),
        "an MLX checkpoint",
    ),
    "TensorRT-LLM": (
        {"architecture": "LlamaForCausalLM", "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}},
        {},
        {},
        ("tensorrt-llm", 0, 128),
        "a TensorRT-LLM checkpoint",
    ),
    "an engine of TensorRT-LLM": (
        {"pretrained_config": {"quantization": {"quant_algo": "FP8"}}, "build_config": {}},
        {},
        {},
        ("tensorrt-llm", 0, 0),
        "a TensorRT-LLM checkpoint",
    ),
    "EXL2": (said(quant_method="exl2", bits=4.65), {}, {}, ("exl2", 4.65, 0), "an EXL2 checkpoint"),
    "EXL2 by its files": ({"model_type": "llama"}, {}, {"job_new.json": {}}, ("exl2", 0, 0), "an EXL2 checkpoint"),
    "EXL2 by its tensors": (
        said(**NUMBERS), {f"{LAYER}.q_weight": tensor("I32", 8, 8)}, {}, ("exl2", 4, 64), "an EXL2 checkpoint",
    ),
    "EXL3": (said(quant_method="exl3", bits=4.0), {}, {}, ("exl3", 4, 0), "a trellis"),
    "HQQ": (
        said(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 64}}),
        {},
        {},
        ("hqq", 4, 64),
        "an HQQ checkpoint",
    ),
    "torchao": (said(quant_method="torchao", quant_type="int4_weight_only"), {}, {}, ("torchao", 0, 0), "a torchao"),
    "quanto": (said(quant_method="quanto", weights="int4"), {}, {}, ("quanto", 0, 0), "a quanto checkpoint"),
    "AQLM": (said(quant_method="aqlm", nbits_per_codebook=16), {}, {}, ("aqlm", 0, 0), "codebooks"),
    "SpQR": (said(quant_method="spqr", bits=3), {}, {}, ("spqr", 3, 0), "an SpQR checkpoint"),
    "VPTQ": (said(quant_method="vptq"), {}, {}, ("vptq", 0, 0), "a VPTQ checkpoint"),
    "QuIP#": (said(quant_method="QuIP#"), {}, {}, ("quip", 0, 0), "a QuIP# checkpoint"),
    "llm-awq": (
        said(quant_method="awq", backend="llm-awq", bits=4, group_size=128), {}, {}, ("llm-awq", 4, 128), "llm-awq",
    ),
    "llm-awq by its tensors": (
        said(quant_method="awq", bits=4, group_size=128),
        {
            f"{LAYER}.qweight": tensor("I16", 2, 128),
            f"{LAYER}.scales": tensor("F16", 8, 8),
            f"{LAYER}.scaled_zeros": tensor("F16", 8, 8),
        },
        {},
        ("llm-awq", 4, 128),
        "of the llm-awq repository",
    ),
    "an order of activations": (
        said(quant_method="gptq", bits=4, group_size=128, desc_act=True), {}, {}, ("gptq", 4, 128), "desc_act: true",
    ),
    "3 bits": (said(quant_method="awq", bits=3, group_size=128, zero_point=True), {}, {}, ("awq", 3, 128), "3 bits"),
    "unheard of": (said(quant_method="quux", bits=4), {}, {}, ("quux", 4, 0), "a checkpoint of quant_method 'quux'"),
}  # fmt: skip


def write(folder, config, tensors, files):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "model.safetensors").write_bytes(pack_tensors({**NORM, **tensors}))
    for name, document in files.items():
        (folder / name).write_text(json.dumps(document), "utf-8")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_it_is_described_and_refused_with_the_same_words(name, tmp_path):
    config, tensors, files, (format, bits, group_size), words = CASES[name]
    source = write(tmp_path / "source", config, tensors, files)
    found = inspect(source)
    assert (found.format, found.bits, found.group_size) == (format, bits, group_size)
    assert not found.is_convertible
    assert words in found.reason
    assert found.tensors == len({**NORM, **tensors})
    assert sum(found.dtypes.values()) == found.tensors
    assert found.bytes == (source / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.problems[0].message == found.reason
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, said(quant_method="gguf")])
def test_gguf_files_are_told_whatever_lies_beside_them(config, tmp_path):
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    found = inspect(tmp_path)
    assert (found.format, found.tensors, found.bytes) == ("gguf", 0, 104)
    assert "this is a GGUF checkpoint: its blocks have" in found.reason
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, tmp_path / "out")
    assert [problem.code for problem in caught.value.problems] == ["foreign-format"]


def test_what_is_said_of_it_on_the_screen_and_in_json(tmp_path, capsys):
    source = write(tmp_path / "source", *CASES["bitsandbytes"][:3])
    assert main(["inspect", str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bitsandbytes checkpoint, 4 bits, llama"
    assert lines[1].endswith(f"1 file of weights, 3 tensors, {(source / 'model.safetensors').stat().st_size} B")
    assert lines[2] == "types      2 U8, 1 F16"
    assert lines[3].startswith("it cannot be converted: this is a bitsandbytes checkpoint: its")
    assert lines[3].endswith("look for another version of this model")
    assert main(["inspect", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["status"], report["modules"], report["errors"]) == ("done", [], [])
    details = report["details"]
    assert (details["format"], details["bits"], details["convertible"]) == ("bitsandbytes", 4, False)
    assert details["dtypes"] == {"U8": 2, "F16": 1}
    assert details["reason"] == lines[3].removeprefix("it cannot be converted: ")


def test_a_repository_is_described_without_its_weights(hub, tmp_path):
    hub.add_repository("org/foreign", write(tmp_path / "source", *CASES["EXL2"][:3]))
    assert inspect("org/foreign").format == "exl2"


def test_modules_that_are_quantized_otherwise_are_named_by_inspect(tmp_path):
    """As where the output embedding has bits of its own."""
    tensors = {}
    for module, words in ((LAYER, 8), ("lm_head", 16)):
        tensors[f"{module}.qweight"] = tensor("I32", 128, words)
        tensors[f"{module}.qzeros"] = tensor("I32", 2, words)
        tensors[f"{module}.scales"] = tensor("F16", 2, 64)
    source = write(tmp_path / "source", said(quant_method="awq", bits=4, group_size=64), tensors, {})
    found = inspect(source)
    assert (found.format, found.title) == ("awq", "AWQ checkpoint")
    assert found.reason.startswith("lm_head.qweight: this module has 8 bits in groups of 64, but ")
    assert f"{LAYER} has 4 bits in groups of 64" in found.reason


@pytest.mark.parametrize("name", ["measurement.json", "job_new.json"])
def test_a_file_of_another_tool_beside_a_sound_checkpoint_means_nothing(name, tmp_path):
    source = Path(__file__).parent / "data" / "awq" / "gemv_g64" / "checkpoint"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text("{}")
    assert inspect(tmp_path).is_convertible
