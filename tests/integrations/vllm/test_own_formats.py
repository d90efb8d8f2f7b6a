"""vLLM's own AWQ and compressed-tensors load what we write in these formats, with the values that the source has.

The harness is shown to work by the library's own files, and by AWQ files that the tests pack themselves.
"""

import importlib
import json
import shutil
import warnings

import numpy as np
import pytest

from awq2marlin import convert
from tests.equality import assert_identical
from tests.formats import peers
from tests.skips import OLD_VLLM

LAYER = "model.layers.0"
O_PROJ, DOWN_PROJ = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"

#: How a checkpoint came about that vLLM loads without a plugin.
KINDS = ("the library's", "AWQ packed here", "our compressed-tensors", "our AWQ")

#: Fixtures of single modules, o_proj of 128 x 64 (or 256 x 64) and down_proj of 128 x 16.
SINGLE = [name for name in peers.NAMES if name.startswith("w")]


@pytest.fixture(scope="session")
def own(harness):  # noqa: ARG001 - it decides whether vLLM is there
    """The module `own_harness`, which imports vLLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("tests.integrations.vllm.own_harness")


@pytest.fixture
def since_033(harness):  # noqa: ARG001 - it decides whether vLLM is there
    """For what the tests call of vLLM itself, in the shape that it has from 0.33 on."""
    import vllm

    from awq2marlin.integrations.serving.needs import numbers

    if numbers(vllm.__version__, 2) < (0, 33):
        pytest.skip(OLD_VLLM)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a fixture's numbers a checkpoint of some kind, or returns the one made before."""
    folders = {}

    def make(kind, name):
        if (kind, name) not in folders:
            folders[kind, name] = write(kind, name, tmp_path_factory.mktemp("made"))
        return folders[kind, name]

    return make


def write(kind, name, folder):
    source = peers.checkpoint(name)
    if kind == "the library's":
        return source
    if kind == "our AWQ":
        convert(source, folder / "out", to="awq", verify="none")
        return folder / "out"
    awq = peers.write_awq(folder / "awq", source)
    if kind == "AWQ packed here":
        return awq
    convert(awq, folder / "out", to="compressed-tensors", verify="none")
    return folder / "out"


def cases(names, kinds=KINDS):
    """Fixtures in the kinds that vLLM takes: AWQ has 4 bits and zero points, which what we write always has."""
    found = []
    for name in names:
        args = peers.weight_args(peers.checkpoint(name))
        taken = {"our AWQ": args["num_bits"] == 4, "AWQ packed here": args["num_bits"] == 4 and not args["symmetric"]}
        found += [pytest.param(kind, name, id=f"{kind}, {name}") for kind in kinds if taken.get(kind, True)]
    return found


each_single = pytest.mark.parametrize(("kind", "name"), cases(SINGLE))


def loaded(own, checkpoint, prefix, *sizes, kind="RowParallelLinear", parts=None, **options):
    """A layer with its tensors."""
    args = checkpoint.document.get("config_groups", {}).get("group_0", {}).get("weights", {"num_bits": 4})
    any_kernel = args["num_bits"] == 8 and not args["symmetric"]
    layer = own.layer(kind, checkpoint, prefix, *sizes, any_kernel=any_kernel, **options)
    own.load(layer, checkpoint, parts or {None: prefix})
    return layer


@each_single
def test_a_layer_holds_the_values_of_the_source(own, made, kind, name):
    checkpoint, source = own.Own(made(kind, name)), peers.decode_all(peers.checkpoint(name))
    for module in (O_PROJ, DOWN_PROJ):
        expected = source[module]
        layer = loaded(own, checkpoint, module, *expected.codes.shape)
        own.assert_holds(layer, expected.bits, own.values(expected))


@each_single
def test_a_rank_of_two_holds_its_columns(own, made, kind, name):
    checkpoint, expected = own.Own(made(kind, name)), peers.decode_all(peers.checkpoint(name))[O_PROJ]
    for rank in range(2):
        ranks = {"rank": rank, "ranks": 2}
        layer = loaded(own, checkpoint, O_PROJ, *expected.codes.shape, kind="ColumnParallelLinear", **ranks)
        own.assert_holds(layer, expected.bits, own.columns(expected, rank, 2))


@pytest.mark.parametrize(("kind", "name"), cases([name for name in SINGLE if name.endswith(("g32", "g64"))]))
def test_a_rank_of_two_holds_its_rows(own, made, kind, name):
    checkpoint, expected = own.Own(made(kind, name)), peers.decode_all(peers.checkpoint(name))[O_PROJ]
    for rank in range(2):
        layer = loaded(own, checkpoint, O_PROJ, *expected.codes.shape, rank=rank, ranks=2)
        own.assert_holds(layer, expected.bits, own.rows(expected, rank, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_fused_layers_lie_side_by_side(own, harness, made, kind):
    checkpoint, source = own.Own(made(kind, "llama")), peers.decode_all(peers.checkpoint("llama"))
    fused = [
        ("QKVParallelLinear", f"{LAYER}.self_attn.qkv_proj", (128, 32, 4, 2), {"q": "q", "k": "k", "v": "v"}),
        ("MergedColumnParallelLinear", f"{LAYER}.mlp.gate_up_proj", (128, [128, 128]), {0: "gate", 1: "up"}),
    ]
    for layer_kind, prefix, sizes, names in fused:
        parts = {part: f"{prefix.rpartition('.')[0]}.{name}_proj" for part, name in names.items()}
        layer = loaded(own, checkpoint, prefix, *sizes, kind=layer_kind, parts=parts)
        expected = harness.side_by_side(*(own.values(source[module]) for module in parts.values()))
        own.assert_holds(layer, 4, expected)


@pytest.mark.parametrize(("kind", "name"), cases(SINGLE, ("AWQ packed here", "our AWQ")))
def test_vllm_s_awq_repacks_the_values_of_the_source_for_its_kernels(own, made, kind, name):
    expected = peers.decode_all(peers.checkpoint(name))[O_PROJ]
    layer = loaded(own, own.Own(made(kind, name)), O_PROJ, *expected.codes.shape)
    assert type(layer.quant_method).__name__ == "AutoAWQMarlinLinearMethod"
    own.finish_as_awq(layer)
    codes, zeros = own.held_as_gptq(layer, expected.bits)
    assert_identical(codes, expected.codes, "codes")
    assert_identical(zeros, expected.zeros, "zeros")


@pytest.mark.parametrize("kind", ["the library's", "our compressed-tensors"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_what_is_not_quantized_is_left_alone(own, made, kind, name):
    checkpoint = own.Own(made(kind, name))
    assert "lm_head" in checkpoint.config.ignore
    assert [each for each, _ in own.output_embedding(checkpoint, 64, 128).named_parameters()] == ["weight"]


@pytest.mark.parametrize(("kind", "name"), cases(["tied"]))
def test_biases_are_no_obstacle(own, made, kind, name):
    source, module = peers.decode_all(peers.checkpoint(name)), f"{LAYER}.self_attn.q_proj"
    checkpoint = own.Own(made(kind, name))
    layer = own.layer("ColumnParallelLinear", checkpoint, module, 64, 64, bias=True)
    own.load(layer, checkpoint, {None: module})
    expected = peers.read_tensors(peers.checkpoint(name))[f"{module}.bias"][1]
    assert_identical(own.as_numpy(layer.bias.data).view(np.uint16), expected, "bias")
    del layer.bias
    own.assert_holds(layer, 4, own.values(source[module]))


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("since_033")
@pytest.mark.parametrize("kind", KINDS)
def test_experts_hold_the_values_of_the_source(own, experts, harness, made, kind):
    name, prefix = "llm_compressor_experts", f"{LAYER}.mlp.experts"
    checkpoint, source = own.Own(made(kind, name)), peers.decode_all(peers.checkpoint(name))
    with own.on(own.A100), harness.as_rank(0, 1):
        layer = experts.experts_layer(checkpoint, prefix, 2, 128, 64, dtype=checkpoint.dtype)
    load_experts(layer, checkpoint, prefix)
    for expert in range(2):
        gate, up, down = (own.values(source[f"{prefix}.{expert}.{part}_proj"]) for part in ("gate", "up", "down"))
        for group, expected in (("w13", harness.side_by_side(gate, up)), ("w2", down)):
            parameters = {
                each.removeprefix(f"{group}_"): parameter.data[expert]
                for each, parameter in layer.named_parameters()
                if each.startswith(group)
            }
            for part, found, wanted in zip(
                ("codes", "zeros", "scales"), own.held(parameters, 4), expected, strict=True
            ):
                assert_identical(found, wanted, f"expert {expert} {group} {part}")


def load_experts(layer, checkpoint, prefix):
    parameters = dict(layer.named_parameters())
    shards = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
    names = [name for name in checkpoint.tensors if name.startswith(f"{prefix}.")]
    assert names
    for name in names:
        expert, projection, part = name.removeprefix(f"{prefix}.").split(".")
        group, shard = shards[projection]
        target = f"{group}_{part}"
        assert parameters[target].weight_loader(
            parameters[target],
            checkpoint.tensors[name],
            f"{prefix}.{target}",
            shard_id=shard,
            expert_id=int(expert),
            return_success=True,
        )


# --- what vLLM takes ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("since_033")
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_vllm_s_marlin_takes_everything_but_8_bits_with_zero_points(own, group_size):
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        assert own.kernel(bits, symmetric, group_size) == "MarlinLinearKernel"
    refusal = own.kernel(8, False, group_size)
    assert "Marlin, supported types are" in refusal
    assert own.kernel(8, False, group_size, with_humming=True) == "HummingLinearKernel"
    on_hopper = own.kernel(8, False, group_size, own.HOPPER)
    assert (on_hopper == "MacheteLinearKernel") == (group_size != 32)


def test_vllm_refuses_awq_of_8_bits(own, made):
    with pytest.raises(ValueError, match="Unsupported num_bits = 8"):
        own.Own(made("AWQ packed here", "w8_asym_g32"))


def test_vllm_leaves_zero_points_of_awq_empty_that_no_file_has(own, made):
    checkpoint = own.Own(made("AWQ packed here", "w4_sym_g32"))
    assert checkpoint.document["zero_point"] is False
    layer = own.layer("RowParallelLinear", checkpoint, O_PROJ, 128, 64)
    assert type(layer.quant_method).__name__ == "AutoAWQLinearMethod"  # not Marlin, and
    assert "qzeros" in dict(layer.named_parameters())  # it would compute with them


def test_vllm_takes_no_list_of_ignored_modules_that_is_null(own, tmp_path):
    folder = altered(tmp_path, "w4_asym_g32", lambda config: config.update(ignore=None))
    with pytest.raises(TypeError):
        own.layer("RowParallelLinear", own.Own(folder), O_PROJ, 128, 64)


@pytest.mark.parametrize("targets", [["Linear"], ["Linear", "lm_head"], ["re:.*"]])
def test_vllm_needs_the_name_of_an_output_embedding_that_is_quantized(own, tmp_path, targets):
    def alter(config):
        config["config_groups"]["group_0"]["targets"] = targets
        config["ignore"] = []

    head = own.output_embedding(own.Own(altered(tmp_path, "w4_asym_g32", alter)), 64, 128)
    assert ("weight_packed" in dict(head.named_parameters())) == (targets != ["Linear"])


def altered(folder, name, alter):
    """A fixture with another quantization config."""
    shutil.copytree(peers.checkpoint(name), folder / "altered")
    path = folder / "altered" / "config.json"
    document = json.loads(path.read_text("utf-8"))
    alter(document["quantization_config"])
    path.write_text(json.dumps(document), "utf-8")
    return folder / "altered"


@pytest.mark.usefixtures("since_033")
@pytest.mark.parametrize("said", [False, True])
def test_vllm_s_awq_needs_to_be_told_of_an_output_embedding_that_is_quantized(own, made, tmp_path, said):
    shutil.copytree(made("AWQ packed here", "w4_asym_g32"), tmp_path / "altered")
    document = peers.read_config(tmp_path / "altered")
    document["quantization_config"]["lm_head"] = said
    (tmp_path / "altered" / "config.json").write_text(json.dumps(document), "utf-8")
    head = own.output_embedding(own.Own(tmp_path / "altered"), 64, 128)
    assert ("qweight" in dict(head.named_parameters())) == said


def test_vllm_s_awq_takes_one_group_over_all_rows_only_where_rows_are_not_cut(own, made):
    checkpoint = own.Own(made("AWQ packed here", "w4_asym_channel"))
    whole = own.layer("RowParallelLinear", checkpoint, O_PROJ, 128, 64)
    cut = own.layer("RowParallelLinear", checkpoint, O_PROJ, 128, 64, rank=0, ranks=2)
    assert [layer.scales.shape[0] for layer in (whole, cut)] == [1, 0]
