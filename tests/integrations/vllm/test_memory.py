"""What vLLM does with the memory of our parameters: it moves it to the host, and loads other weights into it."""

import pytest

from tests.integrations.serving.mixtures import PREFIX, layer_of, make_model
from tests.skips import OLD_VLLM

NOTE = "_vllm_is_uva_offloaded"


def places(layer):
    return {name: tensor.data_ptr() for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}


def noted(layer):
    return {name for name, parameter in layer.named_parameters() if getattr(parameter, NOTE, False)}


def moved(layer):
    """Notes on all parameters what vLLM notes where it has moved them to the host."""
    for parameter in layer.parameters():
        setattr(parameter, NOTE, True)
    return places(layer)


@pytest.mark.parametrize(
    ("sizes", "new"),
    [((512, 256), set()), ((352, 256), {"qweight", "qzeros", "scales"})],
    ids=["as in the file", "padded"],
)
def test_a_layer_that_vllm_offloads_is_moved_again_only_where_it_changed(harness, tmp_path, sizes, new):
    """vLLM copies every parameter to the host again that lacks its note after processing."""
    model = harness.Model(tmp_path, {"mlp.down_proj": sizes}, group_size=32, heads=(1, 1))
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", *sizes)
    before = moved(layer)
    harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    assert noted(layer) == before.keys() - new
    assert {name for name, place in places(layer).items() if place != before[name]} == new


def test_experts_that_vllm_offloads_are_not_moved_again(harness, experts, tmp_path):
    model = make_model(harness, tmp_path)
    layer = layer_of(experts, model)
    before = moved(layer)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    assert noted(layer) == before.keys()
    assert before.items() <= places(layer).items()


# --- weights that are loaded again --------------------------------------------------------------------------


@pytest.fixture
def reload():
    """vLLM's module that loads weights again layer by layer, into the memory that captured graphs know."""
    try:
        from vllm.model_executor.model_loader.reload import layerwise
    except ImportError:
        pytest.skip(OLD_VLLM)
    return layerwise


#: A layer as it lies in the file, with a bias and a group less; padded; cut within tiles; kept in AWQ layout.
CASES = {
    "a single group is left": ("RowParallelLinear", "mlp.down_proj", (256, 128), {None: "mlp.down_proj"}, 2),
    "rows are padded": ("RowParallelLinear", "mlp.wide", (704, 128), {None: "mlp.wide"}, 2),
    "a cut within tiles": (
        "MergedColumnParallelLinear", "mlp.gate_up", (256, [192, 192]), {0: "mlp.gate", 1: "mlp.up"}, 2
    ),
    "kept in AWQ layout": ("RowParallelLinear", "attn.o_proj", (192, 192), {None: "attn.o_proj"}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_other_weights_take_the_place_of_the_first(harness, tmp_path, reload, case):
    kind, prefix, sizes, parts, ranks = CASES[case]
    group_size = 128 if case.startswith("a single") else 32
    modules = {module: (sizes[0], 192 if len(parts) > 1 else sizes[1]) for module in parts.values()}
    if case.startswith("kept"):
        modules["mlp.down_proj"], group_size = (256, 64), 64
    has_bias = len(parts) == 1
    weights = {f"{prefix}.bias": (sizes[1],)} if has_bias else {}
    first, second = (
        harness.Model(
            tmp_path / str(seed), modules, group_size=group_size, weights=weights, heads=(ranks, ranks), seed=seed
        )
        for seed in (1, 2)
    )
    options = {"rank": 0, "ranks": ranks, "bias": has_bias}
    layer = harness.build(kind, first, prefix, *sizes, **options)
    reload.record_metadata_for_reloading(layer)
    harness.load(layer, first, parts)
    harness.finish(layer)
    before = places(layer)
    old = harness.tensors(layer)

    with harness.as_rank(0, ranks):
        reload.initialize_layerwise_reload(layer)
        harness.load(layer, second, parts)
        reload.finalize_layerwise_reload(layer, None)

    wanted = harness.build(kind, second, prefix, *sizes, **options)
    harness.load(wanted, second, parts)
    harness.finish(wanted)
    assert not harness.torch.equal(old["qweight"], wanted.qweight)
    harness.assert_same(harness.tensors(layer), harness.tensors(wanted))
    if has_bias:
        assert harness.torch.equal(layer.ordered_bias, wanted.ordered_bias)
    assert places(layer) == before


@pytest.mark.parametrize("first", ["auto", "dummy"])
def test_other_weights_that_lack_a_tensor_are_refused_by_its_name(harness, tmp_path, reload, first):
    """vLLM would process what was in the memory by chance; also where there were no real weights before."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 128)}, group_size=32)
    with harness.load_format(first):
        layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 256, 128)
    reload.record_metadata_for_reloading(layer)
    if first != "dummy":
        harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    with harness.as_rank(0, 1):
        reload.initialize_layerwise_reload(layer)
        harness.load(layer, model, {None: "mlp.down_proj"}, leave_out=["mlp.down_proj.scales"])
        (problem,) = harness.refusal(reload.finalize_layerwise_reload, layer, None)
    assert (problem.code, problem.tensor) == ("missing-tensor", "mlp.down_proj.scales")


def test_other_experts_that_lack_a_tensor_are_refused_by_its_name(harness, experts, tmp_path, reload):
    model = make_model(harness, tmp_path)
    layer, lacking = layer_of(experts, model), f"{PREFIX}.1.up_proj.qzeros"
    reload.record_metadata_for_reloading(layer)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    with harness.as_rank(0, 1):
        reload.initialize_layerwise_reload(layer)
        experts.load_experts(layer, model, PREFIX, leave_out=[lacking])
        (problem,) = harness.refusal(reload.finalize_layerwise_reload, layer, None)
    assert (problem.code, problem.tensor) == ("missing-tensor", lacking)


def test_other_experts_take_the_place_of_the_first(harness, experts, tmp_path, reload, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    first, second = (make_model(harness, tmp_path / str(seed), heads=(2, 2), seed=seed) for seed in (1, 2))
    layer, wanted = (layer_of(experts, model, 1, 2) for model in (first, second))
    reload.record_metadata_for_reloading(layer)
    experts.load_experts(layer, first, PREFIX)
    experts.finish_experts(layer)
    before = places(layer)
    with harness.as_rank(1, 2):
        reload.initialize_layerwise_reload(layer)
        experts.load_experts(layer, second, PREFIX)
        reload.finalize_layerwise_reload(layer, None)
    experts.load_experts(wanted, second, PREFIX)
    experts.finish_experts(wanted)
    harness.assert_same(harness.tensors(layer), harness.tensors(wanted))
    assert places(layer) == before
    torch = harness.torch
    tokens = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32), torch.full((3, 2), 0.5)
    found, expected = (experts.run_experts(each, tokens, ids, weights) for each in (layer, wanted))
    assert torch.equal(found, expected)
