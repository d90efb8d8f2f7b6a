"""What is SGLang's about its linear layers: what it reads or joins itself, the output embedding, running engines."""

import pytest

from tests.equality import assert_identical
from tests.integrations.serving.plugins import problem_of


def test_the_class_of_loaders_that_fits_our_parameters_is_chosen(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 64)})
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 256, 64)
    assert layer.qweight.weight_loader.__wrapped__ == layer.weight_loader_v2


@pytest.mark.parametrize("fits", [True, False])
def test_awq_modules_with_zero_points_are_repacked_and_padded(harness, tmp_path, fits):
    """SGLang's own AWQ code takes those apart for every product, if Marlin's shapes do not fit."""
    sizes = (256, 128) if fits else (192, 192)
    names = ("lm_head",) if fits else ("attn.o_proj",)  # an output embedding is never converted
    model = harness.Model(tmp_path, {**dict.fromkeys(names, sizes), "mlp.down_proj": (256, 64)}, group_size=64)
    assert model.config.contents.quantization.awq_modules == {*names}
    layer = harness.build("RowParallelLinear", model, names[0], *sizes)
    harness.load(layer, model, {None: names[0]})
    harness.finish(layer)
    harness.assert_holds(layer, model, model.values(names[0]))


def test_an_output_embedding_that_is_not_in_the_checkpoint_is_not_quantized(harness, tmp_path):
    model = harness.Model(tmp_path, {"lm_head": (128, 256), "a.down_proj": (128, 64)}, group_size=64)
    head = harness.output_embedding(model, 256, 128, prefix="head")
    assert type(head.quant_method).__name__ == "UnquantizedEmbeddingMethod"


@pytest.mark.parametrize(("bits", "has_qzeros"), [(4, False), (8, True)])
def test_what_sglang_takes_apart_itself_must_be_as_it_knows_it(harness, tmp_path, bits, has_qzeros):
    model = harness.Model(tmp_path, {"attn.kv_b_proj": (128, 256)}, bits=bits, has_qzeros=has_qzeros)
    problem = problem_of(harness.build, "ColumnParallelLinear", model, "attn.kv_b_proj", 128, 256)
    assert (problem.tensor, "which needs 4 bits and zero points" in problem.message) == ("attn.kv_b_proj", True)


JOINED = {"attn.q_a_proj": (256, 192), "attn.kv_a_proj_with_mqa": (256, 192)}


def test_modules_that_sglang_joins_before_it_loads_them_lie_side_by_side(harness, tmp_path):
    model = harness.Model(tmp_path, JOINED, group_size=64)
    layer = harness.build("ReplicatedLinear", model, "attn.fused_qkv_a_proj_with_mqa", 256, 384)
    assert layer.quant_method.tile == 16
    for name, parameter in layer.named_parameters():
        parts = [model.marlin[f"{module}.{name}"] for module in JOINED]
        parameter.weight_loader(parameter, harness.torch.cat(parts, dim=1))
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.side_by_side(*map(model.values, JOINED)))


@pytest.mark.parametrize("sizes", [(192, 160), (96, 96)], ids=str)
def test_padded_ones_are_refused(harness, tmp_path, sizes):
    modules = dict.fromkeys(JOINED, sizes)
    model = harness.Model(tmp_path, modules, group_size=32, unaligned="pad")
    layer = "ReplicatedLinear", model, "attn.fused_qkv_a_proj_with_mqa", sizes[0], 2 * sizes[1]
    assert "SGLang joins attn.q_a_proj, attn.kv_a_proj_with_mqa" in problem_of(harness.build, *layer).message


def test_both_kept_in_awq_layout_are_joined_too(harness, tmp_path):
    model = harness.Model(tmp_path, {**dict.fromkeys(JOINED, (96, 96)), "a.down_proj": (128, 64)}, group_size=32)
    layer = harness.build("ReplicatedLinear", model, "attn.fused_qkv_a_proj_with_mqa", 96, 192)
    for name, parameter in layer.named_parameters():
        parts = [model.marlin[f"{module}.{name}"] for module in JOINED]
        parameter.weight_loader(parameter, harness.torch.cat(parts, dim=1))
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.side_by_side(*map(model.values, JOINED)))


def test_other_weights_for_a_running_engine_are_refused(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 64)})
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 256, 64)
    assert (
        "cannot be replaced while SGLang runs"
        in problem_of(layer.quant_method.restore_weights_before_loading, layer).message
    )


def test_what_a_rank_has_saved_is_loaded_into_finished_layers(harness, tmp_path):
    """As SGLang's loader of sharded states does: it finishes empty layers, and copies into them."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (512, 256)})
    done = harness.build("RowParallelLinear", model, "mlp.down_proj", 512, 256, rank=3, ranks=4)
    harness.load(done, model, {None: "mlp.down_proj"})
    harness.finish(done)
    with harness.load_format("sharded_state", model):
        fresh = harness.build("RowParallelLinear", model, "mlp.down_proj", 512, 256, rank=3, ranks=4)
    harness.finish(fresh)
    for name, tensor in done.state_dict().items():
        fresh.state_dict()[name].copy_(tensor)
    for name, tensor in harness.tensors(fresh).items():
        assert_identical(tensor.numpy(), harness.tensors(done)[name].numpy(), name)
