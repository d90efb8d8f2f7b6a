"""What follows loading a linear layer: padding, biases, processing once, completeness, layouts other than Marlin."""

import pytest

from tests.equality import assert_identical
from tests.integrations.serving.harness import refusal

QKV = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}
ATTENTION = {"attn.q_proj": (256, 512), "attn.k_proj": (256, 128), "attn.v_proj": (256, 128)}
BIASES = {f"{name}.bias": (size_n,) for name, (_, size_n) in ATTENTION.items()}


def qkv_layer(harness, model, **options):
    """256 features to 8 query heads and 2 key and value heads of 64."""
    return harness.build("QKVParallelLinear", model, "attn.qkv_proj", 256, 64, 8, 2, **options)


# --- biases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (2, 4)])
def test_biases_of_fused_layers_are_cut_and_take_the_kernel_s_order(harness, tmp_path, rank, ranks):
    model = harness.Model(tmp_path, ATTENTION, weights=BIASES, heads=(8, 2))
    layer = qkv_layer(harness, model, bias=True, rank=rank, ranks=ranks)
    harness.load(layer, model, QKV)
    harness.finish(layer)
    copies = max(ranks // 2, 1)
    shares = {"q": (rank, ranks), "k": (rank // copies, min(ranks, 2)), "v": (rank // copies, min(ranks, 2))}
    parts = []
    for part, (place, count) in shares.items():
        whole = model.awq[f"{QKV[part]}.bias"]
        parts.append(whole.reshape(count, -1)[place])
    assert_identical(harness.plain_bias(layer), harness.torch.cat(parts).numpy(), "bias")
    assert_identical(layer.bias.data.numpy(), harness.torch.cat(parts).numpy(), "the bias that is saved")
    assert "ordered_bias" not in layer.state_dict()


def test_a_bias_that_the_model_adds_by_itself_stays_plain(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.fc": (256, 128)}, weights={"mlp.fc.bias": (128,)})
    layer = harness.build("ColumnParallelLinear", model, "mlp.fc", 256, 128, bias=True, skip_bias_add=True)
    harness.load(layer, model, {None: "mlp.fc"})
    harness.finish(layer)
    assert_identical(layer.bias.data.numpy(), model.awq["mlp.fc.bias"].numpy(), "bias")
    assert not hasattr(layer, "ordered_bias")


# --- processing once --------------------------------------------------------------------------------------


@pytest.fixture
def finished(harness, tmp_path):
    """A layer of rank 3 of 4 with a bias and a single group, whose scales change their order: (model, layer)."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (512, 256)}, weights={"mlp.down_proj.bias": (256,)})
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 512, 256, bias=True, rank=3, ranks=4)
    harness.load(layer, model, {None: "mlp.down_proj"})
    loaded = harness.tensors(layer)
    harness.finish(layer)
    assert not harness.torch.equal(loaded["scales"], layer.scales)
    assert harness.torch.equal(loaded["bias"], layer.bias)
    return model, layer


def test_processing_twice_changes_nothing_more(harness, finished):
    _, layer = finished
    places = lambda: [tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())]  # noqa: E731
    once, bias, before = harness.tensors(layer), layer.ordered_bias.clone(), places()
    harness.finish(layer)
    harness.assert_same(harness.tensors(layer), once)
    assert harness.torch.equal(layer.ordered_bias, bias)
    assert places() == before, "captured graphs know where they lie"


# --- padding of slices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "has_qzeros"), [(32, True), (32, False), (-1, True)])
def test_a_slice_that_tiles_do_not_divide_is_padded_with_zeros(harness, tmp_path, group_size, has_qzeros):
    """11008 rows at 8 ranks are 1376 = 10.75 times 128."""
    options = {"group_size": group_size, "has_qzeros": has_qzeros}
    model = harness.Model(tmp_path, {"mlp.down_proj": (11008, 64)}, heads=(8, 8), **options)
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 11008, 64, rank=5, ranks=8)
    harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    assert layer.qweight.shape == (1408 // 16, 64 * 16 // 8)
    assert layer.scales.shape[0] == (1 if group_size == -1 else 1408 // group_size)
    harness.assert_holds(layer, model, harness.rows(model.values("mlp.down_proj"), group_size, 5, 8))


def test_a_padded_module_is_loaded_whole_and_its_padding_is_known_to_the_kernel(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (320, 96)}, group_size=64, unaligned="pad")
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", 320, 96)
    harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    harness.assert_holds(layer, model, model.values("mlp.down_proj"))
    assert harness.kernel_sizes(layer) == (320, 96)


# --- fused in the file already ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("bits", [4, 8])
def test_modules_fused_in_the_file_are_cut_part_by_part(harness, tmp_path, bits, rank, ranks):
    modules = {"attn.qkv_proj": (256, 1024), "mlp.gate_up_proj": (256, 2 * 512)}
    model = harness.Model(tmp_path, modules, heads=(8, 4), bits=bits, has_qzeros=bits == 4)
    q, *others = harness.apart(model.values("attn.qkv_proj"), [512, 256, 256])
    qkv = harness.build("QKVParallelLinear", model, "attn.qkv_proj", 256, 64, 8, 4, rank=rank, ranks=ranks)
    harness.load(qkv, model, {None: "attn.qkv_proj"})
    harness.finish(qkv)
    shares = [harness.columns(part, rank, ranks) for part in (q, *others)]
    harness.assert_holds(qkv, model, harness.side_by_side(*shares))

    halves = harness.apart(model.values("mlp.gate_up_proj"), [512, 512])
    options = {"rank": rank, "ranks": ranks}
    both = harness.build("MergedColumnParallelLinear", model, "mlp.gate_up_proj", 256, [512, 512], **options)
    harness.load(both, model, {None: "mlp.gate_up_proj"})
    harness.finish(both)
    harness.assert_holds(both, model, harness.side_by_side(*(harness.columns(half, rank, ranks) for half in halves)))


def test_a_module_fused_in_the_file_is_found_in_the_lists_under_its_own_name(harness, tmp_path):
    model = harness.Model(tmp_path, {"attn.qkv_proj": (256, 1000), "mlp.down_proj": (256, 64)}, has_qzeros=False)
    assert model.config.contents.quantization.awq_modules == {"attn.qkv_proj"}
    layer = harness.build("QKVParallelLinear", model, "attn.qkv_proj", 256, 8, 75, 25)
    assert layer.quant_method.tile == 1


# --- modules kept in AWQ layout ---------------------------------------------------------------------------


REPACKED = [(4, 64, True), (8, 64, False), (4, 64, False), (4, -1, True), (8, -1, False)]


@pytest.mark.parametrize(("bits", "group_size", "has_qzeros"), REPACKED)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
def test_awq_modules_are_repacked_and_padded(harness, tmp_path, bits, group_size, has_qzeros, rank, ranks):
    options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros}
    modules = {"attn.o_proj": (192, 192), "mlp.down_proj": (256, 64)}
    model = harness.Model(tmp_path, modules, weights={"attn.o_proj.bias": (192,)}, heads=(3, 3), **options)
    assert model.config.contents.quantization.awq_modules == {"attn.o_proj"}
    layer = harness.build("RowParallelLinear", model, "attn.o_proj", 192, 192, bias=True, rank=rank, ranks=ranks)
    harness.load(layer, model, {None: "attn.o_proj"})
    harness.finish(layer)
    harness.assert_holds(layer, model, harness.rows(model.values("attn.o_proj"), group_size, rank, ranks))
    bias = harness.plain_bias(layer)
    assert_identical(bias[:192], model.awq["attn.o_proj.bias"].numpy(), "bias")
    assert not bias[192:].any()
    once = harness.tensors(layer)
    harness.finish(layer)
    harness.assert_same(harness.tensors(layer), once)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
def test_fused_awq_modules_are_repacked_together(harness, tmp_path, rank, ranks):
    modules = {"attn.q_proj": (192, 192), "attn.k_proj": (192, 96), "attn.v_proj": (192, 96)}
    model = harness.Model(
        tmp_path, {**modules, "mlp.down_proj": (256, 64)}, heads=(6, 3), group_size=64, has_qzeros=False
    )
    layer = harness.build("QKVParallelLinear", model, "attn.qkv_proj", 192, 32, 6, 3, rank=rank, ranks=ranks)
    harness.load(layer, model, QKV)
    harness.finish(layer)
    parts = [harness.columns(model.values(name), rank, ranks) for name in QKV.values()]
    harness.assert_holds(layer, model, harness.side_by_side(*parts))


def test_modules_in_full_precision_are_left_to_the_engine(harness, tmp_path):
    weights = {"attn.gate.weight": (64, 256)}
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 64)}, weights=weights)
    layer = harness.build("ColumnParallelLinear", model, "attn.gate", 256, 64)
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


# --- what is missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", QKV.values())
def test_a_tensor_that_was_not_loaded_is_named(harness, tmp_path, name, part):
    model = harness.Model(tmp_path, ATTENTION, heads=(8, 2))
    layer = qkv_layer(harness, model)
    harness.load(layer, model, QKV, leave_out=[f"{name}.{part}"])
    (problem,) = refusal(harness.finish, layer)
    assert (problem.tensor, problem.code) == (f"{name}.{part}", "missing-tensor")


def test_all_tensors_of_a_layer_that_was_not_loaded_are_named(harness, tmp_path):
    model = harness.Model(tmp_path, ATTENTION, heads=(8, 2))
    found = refusal(harness.finish, qkv_layer(harness, model))
    assert [problem.tensor for problem in found] == sorted(
        f"{name}.{part}" for name in QKV.values() for part in ("qweight", "qzeros", "scales")
    )


def test_random_weights_are_not_missed(harness, tmp_path):
    model = harness.Model(tmp_path, ATTENTION, heads=(8, 2))
    with harness.load_format("dummy", model):
        layer = qkv_layer(harness, model)
    harness.finish(layer)


# --- refused layers ---------------------------------------------------------------------------------------


def test_a_cut_that_is_not_exact_names_the_largest_size_that_works(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (1024, 128)}, heads=(16, 16))
    build = lambda **options: harness.build("RowParallelLinear", model, "mlp.down_proj", 1024, 128, **options)  # noqa: E731
    build(rank=7, ranks=8)
    (problem,) = refusal(build, rank=0, ranks=16)
    assert (problem.tensor, problem.code) == ("mlp.down_proj", "unsupported-engine")
    assert problem.message == (
        "64 rows on one rank are not a multiple of the group size 128. The largest tensor-parallel size that works is "
        "8: serve it with --tensor-parallel-size 8"
    )


def test_a_group_as_large_as_k_is_not_cut(harness, tmp_path):
    """Unlike -1 it is a real group, of which a slice would hold a part."""
    model = harness.Model(tmp_path, {"mlp.down_proj": (128, 128)}, group_size=128)
    (problem,) = refusal(harness.build, "RowParallelLinear", model, "mlp.down_proj", 128, 128, rank=1, ranks=2)
    assert "64 rows on one rank are not a multiple of the group size 128" in problem.message


def test_awq_modules_of_ours_are_cut_at_words(harness, tmp_path):
    modules = {"attn.o_proj": (192, 192), "mlp.up_proj": (128, 200)}
    model = harness.Model(tmp_path, modules, heads=(5, 5), group_size=64, has_qzeros=False)
    harness.build("ColumnParallelLinear", model, "mlp.up_proj", 128, 200, rank=0, ranks=5)
    (problem,) = refusal(harness.build, "ColumnParallelLinear", model, "mlp.up_proj", 128, 200, rank=0, ranks=2)
    assert "100 columns on one rank are not a multiple of 8" in problem.message


def test_a_layer_of_which_a_part_is_not_quantized_is_refused(harness, tmp_path):
    model = harness.Model(tmp_path, ATTENTION, heads=(8, 2))
    lists = harness.replace(model.config.contents.quantization, unquantized_modules=frozenset({"attn.k_proj"}))
    model.config.contents = harness.replace(model.config.contents, quantization=lists)
    (problem,) = refusal(qkv_layer, harness, model)
    assert "attn.k_proj is not quantized" in problem.message
    assert "attn.v_proj is in Marlin layout" in problem.message
