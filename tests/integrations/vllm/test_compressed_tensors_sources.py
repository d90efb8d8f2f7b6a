"""Our plugin for vLLM loads Marlin-native outputs of compressed-tensors sources, with the values of the source."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe
from tests.formats import peers

LAYER = "model.layers.0"
NOT_MARLIN = peers.REFUSED | peers.WITHOUT_ZEROS

#: 8 bits with zero points have no kernel in vLLM.
LOADABLE = [
    name
    for name in peers.NAMES
    if name not in NOT_MARLIN
    and (
        peers.weight_args(peers.checkpoint(name))["num_bits"] == 4
        or peers.weight_args(peers.checkpoint(name))["symmetric"]
    )
]
ALIGNED = [name for name in LOADABLE if name.startswith(("w", "old_w"))]


class Converted:
    """What a fixture is converted to, as `harness` needs a model; 16-bit floats are loaded as float16."""

    def __init__(self, folder, name, unaligned="keep"):
        from awq2marlin.integrations.serving.inventory import read_inventory
        from awq2marlin.integrations.vllm.config import MarlinNativeConfig
        from tests.integrations.vllm.harness import PACKED

        source = peers.checkpoint(name)
        convert(source, folder / "marlin", unaligned=unaligned)
        args = peers.weight_args(source)
        self.recipe = Recipe({}, bits=args["num_bits"], group_size=args["group_size"] or -1)
        self.source = peers.decode_all(source)
        self.marlin = {
            each: tensor
            for path in (folder / "marlin").glob("*.safetensors")
            for each, tensor in load_file(path).items()
        }
        document = json.loads((folder / "marlin" / "config.json").read_text("utf-8"))
        self.config = MarlinNativeConfig.from_config(document["quantization_config"])
        self.config.packed_modules_mapping = PACKED
        self.inventory = read_inventory(folder / "marlin", self.config.contents.quantization)
        self.config.contents = replace(self.config.contents, inventory=self.inventory)
        self.has_zeros = not args["symmetric"]

    def values(self, module):
        """Returns (codes, zeros, scales as float16) of a module of the source; no zeros where it is symmetric."""
        found = self.source[module]
        scales = peers.floats(found.scales, found.dtype).astype("float16")
        return found.codes, found.zeros if self.has_zeros else None, scales


@pytest.mark.parametrize("name", LOADABLE)
def test_a_complete_output_is_found_complete(harness, tmp_path, name):  # noqa: ARG001 - it decides whether vLLM is there
    model = Converted(tmp_path, name)
    expected = {module for module in model.source if model.has_zeros}
    assert model.inventory.zero_point_modules == expected
    assert model.inventory.largest_tensor_parallel_size >= 1


@pytest.mark.parametrize("name", ALIGNED)
def test_a_layer_holds_the_values_of_the_source(harness, tmp_path, name):
    model, module = Converted(tmp_path, name), f"{LAYER}.self_attn.o_proj"
    layer = harness.build("RowParallelLinear", model, module, *model.source[module].codes.shape)
    harness.load(layer, model, {None: module})
    harness.finish(layer)
    harness.assert_holds(layer, model, model.values(module))


def test_fused_layers_hold_the_values_of_the_source(harness, tmp_path):
    model = Converted(tmp_path, "llama")
    for kind, prefix, sizes, names in (
        ("QKVParallelLinear", f"{LAYER}.self_attn.qkv_proj", (128, 32, 4, 2), {"q": "q", "k": "k", "v": "v"}),
        ("MergedColumnParallelLinear", f"{LAYER}.mlp.gate_up_proj", (128, [128, 128]), {0: "gate", 1: "up"}),
    ):
        parts = {part: f"{prefix.rpartition('.')[0]}.{each}_proj" for part, each in names.items()}
        layer = harness.build(kind, model, prefix, *sizes)
        harness.load(layer, model, parts)
        harness.finish(layer)
        expected = harness.side_by_side(*(model.values(module) for module in parts.values()))
        harness.assert_holds(layer, model, expected)


def test_a_layer_that_was_padded_holds_the_values_of_the_source(harness, tmp_path):
    model, module = Converted(tmp_path, "w4_asym_g32", "pad"), f"{LAYER}.mlp.down_proj"
    layer = harness.build("RowParallelLinear", model, module, 128, 16)
    harness.load(layer, model, {None: module})
    harness.finish(layer)
    harness.assert_holds(layer, model, model.values(module))
