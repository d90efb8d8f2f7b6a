"""A layer's module, where SGLang names layers otherwise than files do. Needs no SGLang."""

from awq2marlin.integrations.sglang.names import Names

VISION = "vision_tower.vision_model.encoder.layers.0.self_attn"
FILE = [
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.0.mlp.down_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "language_model.model.layers.0.mlp.experts.0.down_proj",
    "language_model.model.layers.1.mlp.experts.0.down_proj",
    "language_model.lm_head",
    f"{VISION}.q_proj",
    f"{VISION}.qkv",
]


def test_a_layer_is_found_by_its_name_or_by_the_end_of_it_that_only_one_module_has():
    names = Names(FILE, is_complete=True)
    assert names.find(FILE[1]) == FILE[1]
    assert names.find("model.layers.0.mlp.down_proj") == FILE[1]
    assert names.find("lm_head") == "language_model.lm_head"
    assert names.find("model.layers.0.self_attn.q_proj") == FILE[0], "the longer end of two"
    assert names.find("tower.encoder.layers.0.self_attn.q_proj") == f"{VISION}.q_proj"


def test_a_layer_that_several_modules_may_be_is_none():
    names = Names(FILE, is_complete=True)
    assert names.find("model.decoder.mlp.down_proj") is None, "layer 0 and 1 end so"
    assert names.find("model.layers.0.mlp.gate_up_proj") is None
    assert names.find("down_proj") is None


def test_parents_are_found_likewise():
    names = Names(FILE, is_complete=True)
    assert names.find_parent("model.layers.1.mlp.experts") == "language_model.model.layers.1.mlp.experts"
    assert names.find_parent("mlp.experts") is None
    assert names.near("model.vision_model.encoder.layers.0.self_attn.qkv_proj") == [f"{VISION}.q_proj", f"{VISION}.qkv"]
    assert names.near("elsewhere.qkv_proj") == []


def test_where_not_all_names_are_known_only_whole_ones_are_found():
    """The module that a layer is may be one of those that are not known."""
    names = Names(FILE, is_complete=False)
    assert names.find(FILE[1]) == FILE[1]
    assert names.find("model.layers.0.mlp.down_proj") is None
    assert names.near("model.layers.0.self_attn.qkv_proj") == []
