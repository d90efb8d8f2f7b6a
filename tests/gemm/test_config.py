"""`AWQMarlinConfig`, and the small helpers that engines call beside the layout."""

import pytest
import torch
from torch import nn

from awq2marlin.gemm.config import AWQMarlinConfig
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.marlin import SCALAR_TYPE_UINT4, SCALAR_TYPE_UINT8
from tests.skips import NO_GPU

# --- AWQMarlinConfig --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize(("bits", "factor", "kind"), [(4, 8, SCALAR_TYPE_UINT4), (8, 4, SCALAR_TYPE_UINT8)])
def test_config_holds_what_it_was_given_and_what_follows(bits, factor, kind, group_size, zero_point):
    config = AWQMarlinConfig(bits, group_size, zero_point)
    assert (config.weight_bits, config.group_size, config.zero_point) == (bits, group_size, zero_point)
    assert config.pack_factor == factor
    assert config.quant_type == kind


def test_config_takes_its_arguments_by_the_field_s_names():
    config = AWQMarlinConfig(weight_bits=4, group_size=128, zero_point=True)
    assert (config.weight_bits, config.group_size, config.zero_point) == (4, 128, True)


def test_config_says_what_engines_ask_of_it():
    assert AWQMarlinConfig.get_name() == "awq_marlin"
    assert AWQMarlinConfig.get_supported_act_dtypes() == [torch.float16, torch.bfloat16]
    assert AWQMarlinConfig.get_min_capability() == 80
    assert AWQMarlinConfig.get_config_filenames() == ["quant_config.json", "quantize_config.json"]


def test_the_repr_of_a_config_is_the_call_that_makes_it():
    config = AWQMarlinConfig(8, -1, False)
    assert repr(config) == "AWQMarlinConfig(weight_bits=8, group_size=-1, zero_point=False)"
    again = eval(repr(config))
    assert vars(again) == vars(config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, 128, True), ["weight_bits", "[4, 8]", "found 3"]),
        ((16, 128, True), ["weight_bits", "[4, 8]", "found 16"]),
        (("4", 128, True), ["weight_bits", "[4, 8]", "found '4'"]),
        ((None, 128, True), ["weight_bits", "[4, 8]", "found None"]),
        ((4, 16, True), ["group_size", "[-1, 32, 64, 128]", "found 16"]),
        ((4, 0, True), ["group_size", "[-1, 32, 64, 128]", "found 0"]),
        ((4, "128", True), ["group_size", "[-1, 32, 64, 128]", "found '128'"]),
        ((4, 128, None), ["zero_point", "True or False", "found None"]),
        ((4, 128, 1), ["zero_point", "True or False", "found 1"]),
        ((4, 128, "true"), ["zero_point", "True or False", "found 'true'"]),
    ],
)
def test_other_values_are_refused_naming_what_was_found_and_what_is_supported(arguments, said):
    with pytest.raises(ValueError, match="must be") as raised:
        AWQMarlinConfig(*arguments)
    for words in said:
        assert words in str(raised.value), f"{raised.value!s} does not say {words!r}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([4], 128, True), "found [4]"),
        (({"bits": 4}, 128, True), "found {'bits': 4}"),
        ((4.0, 128, True), "found 4.0"),
        ((4, 128.0, True), "found 128.0"),
        ((4, [128], True), "found [128]"),
    ],
)
def test_numbers_that_are_no_integers_are_refused_as_any_other_value(arguments, said):
    with pytest.raises(ValueError, match="must be one of") as raised:
        AWQMarlinConfig(*arguments)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"bits": 4, "group_size": 128, "zero_point": True}, (4, 128, True)),
        ({"bits": 8, "group_size": -1, "zero_point": False}, (8, -1, False)),
        ({"w_bit": 4, "q_group_size": 64, "zero_point": True}, (4, 64, True)),
        ({"bits": 4, "q_group_size": 32, "zero_point": False}, (4, 32, False)),
        ({"w_bit": 8, "group_size": 128, "zero_point": True}, (8, 128, True)),
        ({"bits": 4, "group_size": 128}, (4, 128, True)),
        ({"bits": 4, "group_size": 128, "zero_point": None}, (4, 128, True)),
        ({"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 64}, (4, 64, True)),
        (
            {
                "quant_method": "awq",
                "version": "GEMM",
                "bits": 4,
                "group_size": 128,
                "zero_point": True,
                "modules_to_not_convert": None,
                "quantizer": ["autoawq"],
            },
            (4, 128, True),
        ),
    ],
)
def test_from_config_reads_new_and_old_keys(document, expected):
    before = dict(document)
    config = AWQMarlinConfig.from_config(document)
    assert type(config) is AWQMarlinConfig
    assert (config.weight_bits, config.group_size, config.zero_point) == expected
    assert document == before


def test_from_config_of_a_subclass_makes_one_of_it():
    class Engine(AWQMarlinConfig):
        pass

    assert type(Engine.from_config({"bits": 4, "group_size": 128})) is Engine


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"group_size": 128}, ["'bits'", "'w_bit'", "group_size"]),
        ({"bits": 4, "version": "gemm"}, ["'group_size'", "'q_group_size'", "version"]),
        ({}, ["'bits'", "'w_bit'"]),
        ({"bits": 3, "group_size": 128}, ["weight_bits", "[4, 8]", "found 3"]),
        ({"w_bit": 4, "q_group_size": 256}, ["group_size", "found 256"]),
        ({"bits": 4, "group_size": 128, "zero_point": "yes"}, ["zero_point", "found 'yes'"]),
        ({"bits": [4], "group_size": 128}, ["weight_bits", "found [4]"]),
        ({"bits": 4, "group_size": 128, "quant_method": "gptq"}, ["quant_method", "'awq'", "found 'gptq'"]),
        ({"bits": 4, "group_size": 128, "version": "gemv"}, ["version", "'gemm'", "found 'gemv'"]),
        ({"bits": 4, "group_size": 128, "modules_to_not_convert": "gate"}, ["modules_to_not_convert", "found 'gate'"]),
    ],
)
def test_from_config_refuses_what_is_missing_or_unsupported_by_name(document, said):
    with pytest.raises(ValueError, match="found") as raised:
        AWQMarlinConfig.from_config(document)
    for words in said:
        assert words in str(raised.value), f"{raised.value!s} does not say {words!r}"


# --- workspace and g_idx ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["name", "device"])
def test_the_workspace_on_a_cpu_is_one_zero(device):
    workspace = layout.marlin_make_workspace(device)
    assert (workspace.dtype, workspace.tolist()) == (torch.int32, [0])
    assert workspace.device.type == "cpu"


def test_the_workspace_on_a_gpu_is_one_zero_a_multiprocessor(monkeypatch):
    class Properties:
        multi_processor_count = 132

    asked, real_zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties)
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, device, **kwargs: asked.append(device) or real_zeros(*shape, **kwargs)
    )
    workspace = layout.marlin_make_workspace("cuda:1")
    assert (workspace.dtype, workspace.tolist()) == (torch.int32, [0] * 132)
    assert asked == [torch.device("cuda:1")] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_the_workspace_on_the_gpu_here():
    workspace = layout.marlin_make_workspace("cuda")
    assert workspace.device.type == "cuda"
    assert workspace.tolist() == [0] * torch.cuda.get_device_properties("cuda").multi_processor_count


def test_the_empty_g_idx_is_an_int32_parameter_without_elements():
    g_idx = layout.marlin_make_empty_g_idx("cpu")
    assert (g_idx.dtype, tuple(g_idx.shape), g_idx.requires_grad) == (torch.int32, (0,), False)
    assert isinstance(g_idx, nn.Parameter)
    assert layout.marlin_make_empty_g_idx(torch.device("meta")).device.type == "meta"


# --- replace_parameter ------------------------------------------------------------------------------------


def layer_with(name, how):
    layer = nn.Module()
    old = torch.zeros(2, 3)
    if how == "parameter":
        layer.register_parameter(name, nn.Parameter(old))
    elif how == "no parameter":
        layer.register_parameter(name, None)
    elif how == "buffer":
        layer.register_buffer(name, old)
    elif how == "attribute":
        setattr(layer, name, old)
    return layer


@pytest.mark.parametrize("how", ["nothing", "parameter", "no parameter", "buffer", "attribute"])
@pytest.mark.parametrize(
    "new", [torch.arange(4, dtype=torch.int32), torch.ones(2, 3, dtype=torch.float16)], ids=["int32", "fp16"]
)
def test_replace_parameter_replaces_whatever_bears_the_name(how, new):
    layer = layer_with("qweight", how)
    layout.replace_parameter(layer, "qweight", new)
    assert isinstance(layer.qweight, nn.Parameter)
    assert not layer.qweight.requires_grad
    assert torch.equal(layer.qweight, new)
    assert layer.qweight.dtype == new.dtype
    assert [name for name, _ in layer.named_parameters()] == ["qweight"]
    assert list(layer.state_dict()) == ["qweight"]


def test_replace_parameter_uses_the_data_without_a_copy():
    layer, new = layer_with("scales", "parameter"), torch.ones(4)
    layout.replace_parameter(layer, "scales", new)
    assert layer.scales.data_ptr() == new.data_ptr()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_replace_parameter_takes_a_parameter_and_cuts_it_from_its_graph(requires_grad):
    layer = layer_with("scales", "parameter")
    new = nn.Parameter(torch.ones(4), requires_grad=requires_grad)
    layout.replace_parameter(layer, "scales", new)
    assert not layer.scales.requires_grad
    assert torch.equal(layer.scales, torch.ones(4))
    assert new.requires_grad is requires_grad


def test_replace_parameter_leaves_other_parameters_alone():
    layer = nn.Linear(3, 2)
    bias = layer.bias
    layout.replace_parameter(layer, "weight", torch.zeros(5, dtype=torch.int32))
    assert layer.bias is bias
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
