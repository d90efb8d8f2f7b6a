"""vLLM's load format ``sharded_state``: what one rank had after processing is saved, and loaded without processing."""

from unittest import mock

import pytest

from tests.integrations.serving.plugins import problem_of

RANKS = [(0, 1), (1, 2)]


def saved(layer):
    """Returns what vLLM's saver writes of a layer: its state, each tensor under the first of its names."""
    from vllm.model_executor.model_loader import ShardedStateLoader

    return {name: tensor.clone() for name, tensor in ShardedStateLoader._filter_subtensors(layer.state_dict()).items()}


def restore(layer, tensors):
    """Does what vLLM's loader does with them."""
    state = layer.state_dict()
    assert state.keys() >= tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].shape == tensor.shape, name
        state[name].copy_(tensor)


#: A layer whose tensors change after loading: two groups become one, rows are padded, columns end within a tile, or it
#: lies in AWQ layout.
CASES = {
    "a single group is left": ("RowParallelLinear", "mlp.down_proj", (256, 128), {None: "mlp.down_proj"}),
    "rows are padded": ("RowParallelLinear", "mlp.wide", (704, 128), {None: "mlp.wide"}),
    "a cut within tiles": (
        "MergedColumnParallelLinear", "mlp.gate_up_proj", (256, [192, 192]), {0: "mlp.gate_proj", 1: "mlp.up_proj"}
    ),
    "kept in AWQ layout": ("RowParallelLinear", "attn.o_proj", (192, 192), {None: "attn.o_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["own", "engine"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_a_layer_comes_back_as_it_was(harness, tmp_path, monkeypatch, case, rank, ranks, kernel):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", kernel)
    kind, prefix, sizes, parts = CASES[case]
    modules = {
        "mlp.down_proj": (256, 128), "mlp.wide": (704, 128), "mlp.gate_proj": (256, 192), "mlp.up_proj": (256, 192),
        "attn.o_proj": (192, 192),
    }  # fmt: skip
    weights = {"mlp.down_proj.bias": (128,)}
    group_size = 128 if case.startswith("a single") else 32
    model = harness.Model(
        tmp_path, modules if group_size == 32 else {prefix: sizes}, group_size=group_size, weights=weights
    )
    options = {"rank": rank, "ranks": ranks, "bias": prefix == "mlp.down_proj"}
    layer = harness.build(kind, model, prefix, *sizes, **options)
    harness.load(layer, model, parts)
    harness.finish(layer)
    tensors = saved(layer)
    with harness.load_format("sharded_state"):
        again = harness.build(kind, model, prefix, *sizes, **options)
    restore(again, tensors)
    harness.finish(again)
    harness.assert_same(harness.tensors(again), harness.tensors(layer))
    if options["bias"]:
        assert harness.torch.equal(again.ordered_bias, layer.ordered_bias)


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
@pytest.mark.parametrize("sizes", [(192, 128), (192, 192)], ids=["padded when cut", "kept in AWQ layout"])
def test_experts_come_back_as_they_were(harness, experts, tmp_path, rank, ranks, sizes):
    """192 by 128 at two ranks: inner sizes are padded from 64 to 128."""
    prefix, group_size = "mlp.experts", 64 if sizes[1] == 128 else 32
    shapes = {"gate_proj": sizes, "up_proj": sizes, "down_proj": sizes[::-1]}
    modules = {f"{prefix}.{expert}.{name}": size for expert in range(2) for name, size in shapes.items()}
    modules["mlp.down_proj"] = (256, 64)  # something that is converted in any case
    model = harness.Model(tmp_path, modules, group_size=group_size, heads=(2, 2))

    def layer():
        with harness.as_rank(rank, ranks):
            return experts.experts_layer(model, prefix, 2, *sizes, rank, ranks)

    first = layer()
    experts.load_experts(first, model, prefix)
    experts.finish_experts(first)
    tensors = saved(first)
    with harness.load_format("sharded_state"):
        again = layer()
    restore(again, tensors)
    assert experts.finish_experts(again) == 1
    harness.assert_same(harness.tensors(again), harness.tensors(first))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Makes vLLM believe that it has a GPU."""
    from vllm import platforms

    monkeypatch.setattr(type(platforms.current_platform), "is_cuda", lambda _: True)


def saved_model(harness, folder, **options):
    """Returns a model whose only file has the name of a rank's."""
    model = harness.Model(folder, {"mlp.down_proj": (256, 64)}, with_inventory=False, **options)
    (model.folder / "model.safetensors").rename(model.folder / "model-rank-0-part-0.safetensors")
    return model


@pytest.mark.usefixtures("on_a_gpu")
def test_a_folder_of_sharded_state_is_not_read_as_a_checkpoint(harness, tmp_path):
    model = saved_model(harness, tmp_path)
    with mock.patch("awq2marlin.integrations.vllm.config.read_inventory") as read:
        model.config.maybe_update_config(str(model.folder))
    read.assert_not_called()
    assert model.config.contents.inventory is None


@pytest.mark.usefixtures("on_a_gpu")
def test_8_bits_with_zero_points_in_a_saved_state_are_refused_where_ours_may_not_serve_them(
    harness, tmp_path, monkeypatch
):
    model = saved_model(harness, tmp_path, bits=8)
    model.config.maybe_update_config(str(model.folder))
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "engine")
    message = problem_of(model.config.maybe_update_config, str(model.folder)).message
    assert "8 bits with zero points: AWQ2MARLIN_KERNEL=engine leaves it to the engine's kernels" in message
