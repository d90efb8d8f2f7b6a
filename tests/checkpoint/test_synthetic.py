"""Checkpoints of random weights have the tensors, shapes and configs of their formats."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from awq2marlin import convert, inspect, revert
from awq2marlin.checkpoint.synthetic import (
    AwqGemvFastRecipe,
    AwqGemvRecipe,
    AwqMarlinRecipe,
    CompressedTensorsRecipe,
    GptqRecipe,
    llama_recipe,
    write_checkpoint,
)
from tests.faults.helpers import contents


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_compressed_tensors_checkpoint_has_n_first(tmp_path, symmetric):
    recipe = llama_recipe(128, 256, 1, 64, 32, CompressedTensorsRecipe, group_size=32, has_qzeros=not symmetric)
    write_checkpoint(tmp_path, recipe)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"  # K = 256, N = 128
    found = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    expected = {"weight_packed": (128, 32), "weight_scale": (128, 8), "weight_shape": (2,)}
    if not symmetric:
        expected["weight_zero_point"] = (16, 8)
    assert {key: value.shape for key, value in found.items()} == expected
    assert found["weight_shape"].tolist() == [128, 256]
    assert {found[key].dtype for key in expected if key in ("weight_packed", "weight_zero_point")} == {
        np.dtype("int32")
    }
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, symmetric)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, False), (8, -1, True)])
def test_a_gptq_checkpoint_is_converted_compared_and_taken_back(tmp_path, bits, group_size, symmetric):
    options = {"bits": bits, "group_size": group_size, "has_qzeros": not symmetric}
    write_checkpoint(tmp_path / "gptq", llama_recipe(128, 256, 1, 64, 32, GptqRecipe, **options))
    name = "model.layers.0.mlp.down_proj"  # K = 256, N = 128
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    groups = 8 if group_size == 32 else 1
    shapes = {"qweight": (8 * bits, 128), "qzeros": (groups, 4 * bits), "scales": (groups, 128), "g_idx": (256,)}
    assert {part: tensors[f"{name}.{part}"].shape for part in shapes} == shapes
    found = inspect(tmp_path / "gptq")
    assert (found.format, found.bits, found.group_size, found.zero_point) == ("gptq", bits, group_size, not symmetric)
    convert(tmp_path / "gptq", tmp_path / "out", verify="all")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "gptq")


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("kind", [AwqGemvRecipe, AwqGemvFastRecipe, AwqMarlinRecipe])
def test_a_checkpoint_of_another_layout_of_awq_is_converted_compared_and_taken_back(tmp_path, kind, group_size):
    recipe = llama_recipe(128, 256, 1, 64, 32, kind, group_size=group_size, shards=2)
    write_checkpoint(tmp_path / "source", recipe)
    found = inspect(tmp_path / "source")
    assert (found.format, found.group_size) == (recipe.format.name, group_size)
    assert {module.name: (module.size_k, module.size_n) for module in found.modules} == dict(recipe.modules)
    convert(tmp_path / "source", tmp_path / "out", verify="all")
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")
