"""What a checkpoint holds: layouts, zero points, names, what is missing. Needs no vLLM."""

import json
from dataclasses import replace

import pytest

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.errors import CheckpointError
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.names import INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.integrations.serving.contents import Contents
from awq2marlin.integrations.serving.inventory import Inventory, inventory_of, read_inventory, tensors_of
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.scheme import Scheme

MODULES = {
    "model.layers.0.self_attn.o_proj": (256, 512),
    "model.layers.0.mlp.down_proj": (512, 256),
    "model.layers.1.mlp.down_proj": (512, 200),  # unaligned
}
WEIGHTS = {"model.embed_tokens.weight": (64, 256), "model.norm.weight": (256,)}


def quantization(**changes):
    empty = Quantization(Scheme(changes.pop("bits", 4), 64, changes.pop("zero_point", True)))
    return replace(
        empty, **{name: frozenset(value) if type(value) is set else value for name, value in changes.items()}
    )


@pytest.fixture
def made(tmp_path):
    """A converted checkpoint of two shards, as vLLM's config names it: (folder, quantization)."""
    recipe = Recipe(MODULES, WEIGHTS, group_size=64, shards=2, config={"num_attention_heads": 4})
    write_checkpoint(tmp_path / "awq", recipe)
    folder = tmp_path / "marlin"
    convert(tmp_path / "awq", folder, verify="none")
    document = json.loads((folder / "config.json").read_text())
    return folder, MARLIN_NATIVE.read_config(document["quantization_config"], "config.json")


def problems(call, *arguments):
    with pytest.raises(CheckpointError) as refused:
        call(*arguments)
    return [(problem.file, problem.tensor, problem.code) for problem in refused.value.problems]


# --- what is missing --------------------------------------------------------------------------------------


def test_the_inventory_of_a_complete_checkpoint(made):
    inventory = read_inventory(*made)
    assert inventory.zero_point_modules == MODULES.keys()
    assert inventory.largest_tensor_parallel_size == 4  # 4 heads; 512 rows and 256 columns in four


def rewrite(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_shard_that_is_not_there_is_named(made):
    folder, said = made
    shard = max(path.name for path in folder.glob("*.safetensors"))
    (folder / shard).unlink()
    assert problems(read_inventory, folder, said) == [(shard, "", "missing-file")]


def test_an_index_cut_short_is_noticed_by_the_manifest_or_by_parts_that_have_no_module(made):
    folder, said = made
    index = json.loads((folder / INDEX_FILENAME).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    lost = sorted(name for name, shard in index.items() if shard == shards[1])

    def cut(document):
        document["weight_map"] = {name: shard for name, shard in index.items() if shard == shards[0]}

    rewrite(folder / INDEX_FILENAME, cut)
    assert problems(read_inventory, folder, said) == [(shards[1], name, "missing-tensor") for name in lost]
    (folder / MANIFEST_FILENAME).unlink()
    torn = problems(read_inventory, folder, said)
    assert torn
    assert {tensor for _, tensor, _ in torn} < set(lost)


def test_a_folder_that_says_another_method_is_refused(made):
    folder, said = made
    rewrite(
        folder / "config.json",
        lambda document: document.update(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64}),
    )
    assert problems(read_inventory, folder, said) == [("config.json", "", "contradiction")]


SHAPES = {"a.qweight": (8, 128), "a.qzeros": (2, 8), "a.scales": (2, 64), "norm.weight": (64,)}


def tensors(shapes):
    dtype = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "weight": "F16"}
    return {name: TensorInfo(name, dtype[name.rpartition(".")[2]], shape, 0, 0) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ({}, ["a.qzeros", "a.scales"]),
        ({}, ["a.qweight"]),
        ({"awq_modules": {"b"}}, ["b.qweight"]),
        ({"unquantized_modules": {"lm_head"}}, ["lm_head.weight"]),
    ],
)
def test_missing_tensors_are_named_where_files_are_not_known(said, lost):
    present = tensors({name: shape for name, shape in SHAPES.items() if name not in lost})
    found = problems(inventory_of, present, quantization(**said), {})
    assert [(tensor, code) for _, tensor, code in found] == [(name, "missing-tensor") for name in lost]


def test_8_bits_with_zero_points_are_known_even_if_the_config_is_silent():
    said = quantization(bits=8, zero_point=False)
    without = {"a.qweight": (8, 256), "a.scales": (2, 64)}
    assert inventory_of(tensors({**without, "a.qzeros": (2, 16)}), said, {}).zero_point_modules == {"a"}
    assert inventory_of(tensors(without), said, {}).zero_point_modules == frozenset()


def test_a_padded_module_is_cut_by_its_true_size():
    shapes = {"a.down_proj.qweight": (8, 128), "a.down_proj.qzeros": (2, 8), "a.down_proj.scales": (2, 64)}
    heads = {"num_attention_heads": 4}
    said = quantization(padded_modules={"a.down_proj": (96, 56)})
    assert inventory_of(tensors(shapes), said, heads).largest_tensor_parallel_size == 1  # 48 rows are no group of 64
    assert inventory_of(tensors(shapes), quantization(), heads).largest_tensor_parallel_size == 2


def test_metadata_of_a_repository_may_hold_what_is_no_tensor():
    metadata = {"__metadata__": {"format": "pt"}, "a.qweight": {"dtype": "I32", "shape": [8, 128]}}
    assert tensors_of(metadata) == tensors({"a.qweight": (8, 128)})


@pytest.mark.parametrize("entry", [None, [], {}, {"shape": "ab"}, {"shape": [True]}, {"shape": [-1, 2]}])
def test_a_shape_that_is_none_is_refused_by_name(entry):
    assert problems(tensors_of, {"a.qweight": entry}) == [("", "a.qweight", "bad-header")]


# --- layouts ----------------------------------------------------------------------------------------------


def test_the_layout_of_modules_that_become_one_layer():
    contents = Contents(quantization(awq_modules={"q", "k"}, unquantized_modules={"gate"}))
    assert [contents.layout([name]) for name in ("q", "gate", "up")] == ["awq", "none", "marlin"]
    assert contents.layout(["q", "k"]) == "awq"


def test_a_layer_of_both_layouts_is_brought_into_marlin_s():
    assert Contents(quantization(awq_modules={"q"})).layout(["q", "k", "v"]) == "marlin"


def test_a_layer_of_which_a_part_is_not_quantized_is_refused_with_every_name():
    contents = Contents(quantization(awq_modules={"q"}, unquantized_modules={"k"}))
    with pytest.raises(CheckpointError) as refused:
        contents.layout(["q", "k", "v"])
    (problem,) = refused.value.problems
    assert (problem.code, problem.file) == ("unsupported-engine", "config.json")
    assert "q is in AWQ layout, v is in Marlin layout, k is not quantized" in problem.message
    assert "Quantize all of them, or none" in problem.message


def test_the_layout_of_experts_is_that_of_the_modules_below_them():
    contents = Contents(
        quantization(awq_modules={"a.experts.0.up"}, unquantized_modules={"b.experts.0.up", "c.experts2.x"})
    )
    assert [contents.layout_of_experts(f"{layer}.experts") for layer in "abc"] == ["awq", "none", "marlin"]


@pytest.mark.parametrize("plain", ["a.experts.1.up", "a.experts.0.down"])
@pytest.mark.parametrize("layout", ["awq", "marlin"])
def test_experts_of_which_some_are_not_quantized_are_refused_by_name(plain, layout):
    said = quantization(awq_modules={"a.experts.0.up"} if layout == "awq" else set(), unquantized_modules={plain})
    contents = Contents(said, Inventory(frozenset(), 1, frozenset({"a.experts.0.up"})))
    with pytest.raises(CheckpointError) as refused:
        contents.layout_of_experts("a.experts")
    (problem,) = refused.value.problems
    assert (problem.code, problem.file) == ("unsupported-engine", "config.json")
    assert f"{plain} is not quantized, but a.experts.0.up is" in problem.message


def test_a_router_below_experts_that_is_not_quantized_is_none_of_them():
    contents = Contents(quantization(awq_modules={"a.shared.up"}, unquantized_modules={"a.0.up", "a.router"}))
    assert contents.layout_of_experts("a") == "none"


def test_zero_points_are_those_of_the_headers_where_the_config_says_none():
    said = quantization(zero_point=False)
    assert not Contents(said).has_zero_points(["q"])
    contents = Contents(said, Inventory(frozenset({"q", "experts.0.up"}), 1))
    assert contents.has_zero_points(["q", "k"])
    assert contents.has_zero_points(["experts"])
    assert not contents.has_zero_points(["k"])
    assert Contents(quantization(), Inventory(frozenset(), 1)).has_zero_points(["k"])


# --- names of a model of vLLM -----------------------------------------------------------------------------


def test_every_list_takes_the_model_s_names_and_loses_what_the_model_does_not_have():
    said = quantization(
        awq_modules={"model.q", "visual.q"},
        unquantized_modules={"model.gate"},
        padded_modules={"model.down": (100, 64)},
    )
    contents = Contents(said, Inventory(frozenset({"model.q"}), 2))

    def rename(names):
        return [name.replace("model.", "language_model.model.") for name in names if not name.startswith("visual.")]

    renamed = contents.renamed(rename)
    assert renamed.quantization.awq_modules == {"language_model.model.q"}
    assert renamed.quantization.unquantized_modules == {"language_model.model.gate"}
    assert renamed.quantization.padded_modules == {"language_model.model.down": (100, 64)}
    assert renamed.inventory == Inventory(frozenset({"language_model.model.q"}), 2)
    assert Contents(said).renamed(rename).inventory is None
    assert [contents.is_listed(name) for name in ("model.q", "model.gate", "model.down", "model.up")] == [
        True,
        True,
        True,
        False,
    ]


def test_advice_names_the_largest_size_if_it_is_known():
    said = quantization()
    assert "'awq2marlin inspect' reports" in Contents(said).tensor_parallel_advice()
    advice = Contents(said, Inventory(frozenset(), 4)).tensor_parallel_advice()
    assert advice.endswith("size that works is 4: serve it with --tensor-parallel-size 4")
    assert Contents(said, Inventory(frozenset(), 0)).tensor_parallel_advice() == "No tensor-parallel size works"
