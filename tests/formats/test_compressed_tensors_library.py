"""The library itself reads what we write as compressed-tensors, and what it wrote is read by us as what it means.

Needs compressed-tensors, which comes with the requirements of the plugin's tests (.ci/run).
"""

import importlib
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from awq2marlin import CheckpointError, convert, revert, verify
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from tests.equality import assert_identical
from tests.faults.helpers import contents
from tests.formats import peers
from tests.skips import NO_COMPRESSED_TENSORS

MODULES = {
    "model.layers.0.self_attn.o_proj": (128, 64),
    "model.layers.0.mlp.down_proj": (256, 72),
    "model.layers.0.mlp.experts.1.gate_proj": (128, 128),
}
WEIGHTS = {
    "model.embed_tokens.weight": (8, 128),
    "model.layers.0.mlp.gate.weight": (2, 128),
    "model.norm.weight": (128,),
    "lm_head.weight": (8, 128),
}
SCHEMES = [
    pytest.param({"group_size": 32}, id="groups of 32"),
    pytest.param({"group_size": 64, "scale_dtype": "BF16", "weight_dtype": "BF16"}, id="groups of 64 in bf16"),
    pytest.param({"group_size": 128, "shards": 2}, id="groups of 128 in shards"),
    pytest.param({"group_size": -1}, id="one group"),
    pytest.param({"group_size": -1, "scale_dtype": "BF16", "has_qzeros": False}, id="one group without zero points"),
    pytest.param({"group_size": 64, "has_qzeros": False}, id="no zero points"),
    pytest.param({"group_size": 128, "bits": 8}, id="8 bits"),
    pytest.param({"group_size": 32, "bits": 8, "has_qzeros": False, "scale_dtype": "BF16"}, id="8 bits without them"),
]
CONVERTIBLE = [name for name in peers.NAMES if name not in peers.REFUSED | peers.WITHOUT_ZEROS]
OWN = [name for name in peers.NAMES if not name.startswith("old_")]  # newer releases do not read old zero points


@pytest.fixture(scope="session")
def library():
    """The parts of compressed-tensors that are needed here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it, and what it imports, warn of at import
            convert = importlib.import_module("compressed_tensors.entrypoints.convert")
            converters = importlib.import_module("compressed_tensors.entrypoints.convert.converters")
            quantization = importlib.import_module("compressed_tensors.quantization")
    except ImportError as error:
        if os.environ.get("AWQ2MARLIN_REQUIRE_VLLM") == "1":
            pytest.fail(f"compressed-tensors must be importable here, but: {error}")
        pytest.skip(NO_COMPRESSED_TENSORS)
    return SimpleNamespace(
        dequantizer=convert.CompressedTensorsDequantizer,
        from_awq=converters.AutoAWQConverter,
        config=quantization.QuantizationConfig,
    )


def read(folder):
    """Returns every tensor of a checkpoint as torch has it."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def scale_type(tensors):
    """Returns the type of the scales."""
    return next(tensor.dtype for name, tensor in tensors.items() if name.endswith(("weight_scale", ".scales")))


def dense_of(library, folder):
    """Returns the bits of every dense weight that the library makes of a checkpoint, and its other tensors."""
    tensors = read(folder)
    modules = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    dense = library.dequantizer(str(folder), dtype=scale_type(tensors)).process(dict(tensors))
    # All of the module's other tensors have been used up.
    assert dense.keys() == {name for name in tensors if ".weight_" not in name} | {f"{each}.weight" for each in modules}
    return {name: tensor.contiguous().view(torch.uint16).numpy() for name, tensor in dense.items()}


# --- the harness, on what the library wrote ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_the_installed_library_reads_its_own_files_as_it_did(library, name):
    found, said = dense_of(library, peers.checkpoint(name)), peers.library(name)
    for module in peers.decode_all(peers.checkpoint(name)):
        assert peers.digest(found[f"{module}.weight"]) == said[f"{module}.dense_sha256"], module


def test_the_installed_library_does_not_read_zero_points_of_old_releases(library):
    with pytest.raises((ValueError, KeyError)):
        dense_of(library, peers.checkpoint("old_w8_asym_channel"))


# --- what we write --------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """Makes (an AWQ checkpoint, the compressed-tensors checkpoint that is made of it)."""

    def make(**options):
        awq, out = tmp_path / "awq", tmp_path / "ct"
        write_checkpoint(awq, Recipe(MODULES, WEIGHTS, config={"model_type": "qwen3_moe"}, **options))
        convert(awq, out, to="compressed-tensors", verify="all")
        return awq, out

    return make


@pytest.mark.parametrize("options", SCHEMES)
def test_the_library_decompresses_our_output_to_the_dense_weights_of_the_source(library, written, options):
    awq, out = written(**options)
    source, found = peers.read_tensors(awq), dense_of(library, out)
    for module in MODULES:
        expected = peers.decode_awq(source, module, options.get("bits", 4)).rounded
        assert_identical(found.pop(f"{module}.weight"), expected, module)
    for name, array in found.items():
        assert_identical(array, source[name][1], name)


@pytest.mark.parametrize("options", [each for each in SCHEMES if each.values[0].get("bits", 4) == 4])
def test_our_tensors_are_those_of_the_library_s_own_converter(library, written, options):
    awq, out = written(**options)
    config = peers.read_config(awq)["quantization_config"]
    expected = library.from_awq.from_autoawq_config(config).process(read(awq))
    found = read(out)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("options", SCHEMES)
def test_the_library_takes_our_config_and_writes_the_same(library, written, options):
    _, out = written(**options)
    document = peers.read_config(out)["quantization_config"]
    parsed = library.config.model_validate(document)
    (group,) = parsed.config_groups.values()
    assert (parsed.quant_method, parsed.format, parsed.quantization_status.value) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    assert (group.input_activations, group.output_activations) == (None, None)
    weights = group.weights
    assert (weights.num_bits, weights.type, weights.symmetric) == (
        options.get("bits", 4),
        "int",
        not options.get("has_qzeros", True),
    )
    is_channel = options["group_size"] == -1
    assert (weights.strategy, weights.group_size or -1) == ("channel" if is_channel else "group", options["group_size"])
    assert not weights.dynamic
    assert set(parsed.ignore) >= {"lm_head", "model.layers.0.mlp.gate"}
    assert not set(parsed.ignore) & MODULES.keys()
    # Nothing is said in keys that the library does not know.
    assert library.config.model_validate(json.loads(json.dumps(parsed.model_dump()))) == parsed


def test_a_quantized_output_embedding_is_a_target_by_its_name(library, tmp_path):
    write_checkpoint(tmp_path / "awq", Recipe({**MODULES, "lm_head": (128, 64)}, {}, group_size=64))
    convert(tmp_path / "awq", tmp_path / "ct", to="compressed-tensors")
    (group,) = library.config.model_validate(
        peers.read_config(tmp_path / "ct")["quantization_config"]
    ).config_groups.values()
    # A name is needed: vLLM's class of output embeddings is no "Linear".
    assert group.targets == ["Linear", "lm_head"]
    assert "lm_head.weight" in dense_of(library, tmp_path / "ct")


# --- what we read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("unaligned", ["keep", "pad"])
def test_marlin_native_is_that_of_the_same_numbers_in_awq(name, unaligned, tmp_path):
    source = peers.checkpoint(name)
    convert(source, tmp_path / "of_ct", unaligned=unaligned, verify="all")
    assert_marlin_of(source, tmp_path, unaligned)


def assert_marlin_of(source, tmp_path, unaligned):
    """Fails unless ``of_ct`` is what the same numbers in AWQ become, equals its source, and gives it back."""
    convert(peers.write_awq(tmp_path / "awq", source), tmp_path / "of_awq", unaligned=unaligned)
    found, expected = (peers.read_tensors(tmp_path / each) for each in ("of_ct", "of_awq"))
    assert found.keys() == expected.keys()
    for tensor, (dtype, array) in found.items():
        assert dtype == expected[tensor][0], tensor
        assert_identical(array, expected[tensor][1], tensor)
    assert verify(source, tmp_path / "of_ct").modules_total == len(peers.decode_all(source))
    revert(tmp_path / "of_ct", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_awq_of_what_the_library_wrote_holds_its_numbers(name, tmp_path):
    source = peers.checkpoint(name)
    convert(source, tmp_path / "awq", to="awq", verify="all")
    tensors, bits = peers.read_tensors(tmp_path / "awq"), peers.weight_args(source)["num_bits"]
    config = peers.read_config(tmp_path / "awq")["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", bits)
    assert config["zero_point"] is True
    for module, expected in peers.decode_all(source).items():
        assert f"{module}.qzeros" in tensors
        found = peers.decode_awq(tensors, module, bits)
        for part in ("codes", "zeros", "scales"):
            assert_identical(getattr(found, part), getattr(expected, part), f"{module} {part}")
    revert(tmp_path / "awq", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", sorted(peers.WITHOUT_ZEROS))
def test_zero_points_that_old_releases_left_out_are_the_middle_ones_or_missed_by_name(name, tmp_path):
    source = peers.checkpoint(name)
    try:
        convert(source, tmp_path / "of_ct", verify="all")
    except CheckpointError as refused:
        problems = [(each.tensor, each.code) for each in refused.problems]
        assert problems == [("model.layers.0.mlp.down_proj.weight_zero_point", "missing-tensor")]
    else:
        assert_marlin_of(source, tmp_path, "keep")


@pytest.mark.parametrize("name", sorted(peers.PERMUTED | peers.ODD_ROWS))
def test_what_revert_could_not_give_back_is_refused_by_name_before_the_output_is_loadable(name, tmp_path):
    source = peers.checkpoint(name)
    with pytest.raises(CheckpointError, match="not converted") as refused:
        convert(source, tmp_path / "out")
    tensor = "weight_g_idx" if name in peers.PERMUTED else "weight_shape"
    assert {each.tensor for each in refused.value.problems} == {f"model.layers.0.self_attn.o_proj.{tensor}"}
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", sorted(peers.ODD_COLUMNS))
def test_columns_that_awq_cannot_hold_are_refused_by_name_and_padded_if_that_is_asked_for(name, tmp_path):
    source = peers.checkpoint(name)
    with pytest.raises(CheckpointError, match="o_proj"):
        convert(source, tmp_path / "kept")
    assert not (tmp_path / "kept" / "config.json").exists()
    convert(source, tmp_path / "padded", unaligned="pad", verify="all")
    revert(tmp_path / "padded", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", ["w4_sym_g32", "w8_asym_g64", "tied"])
def test_the_gemm_runs_what_is_converted_and_passes_over_what_is_kept(name, tmp_path):
    source = peers.checkpoint(name)
    result = convert(source, tmp_path / "out", verify="all", device="cpu")
    assert result.kept
    converted = [module.name for module in result.converted]
    assert [check.name for check in result.gemm.checks] == converted
    assert [check.name for check in verify(source, tmp_path / "out", device="cpu").gemm.checks] == converted
