"""What the plugin uses of vLLM is there, and all of it is looked up. The first test runs without vLLM."""

import importlib
import inspect

import pytest

from awq2marlin.integrations.vllm.needs import ALWAYS, EXPERTS, VLLM
from tests.integrations.serving.plugins import (
    assert_has_all_and_was_tried,
    assert_imports_are_looked_up,
    assert_registering_never_raises,
)

#: What registering takes, types, and what the plugin uses where a version has it.
NOT_LOOKED_UP = {
    "init_logger", "register_quantization_config", "QuantizationConfig", "QuantizeMethodBase", "ScalarType",
    "is_weights_pre_processed", "marlin_make_workspace_new",
}  # fmt: skip


def test_registering_never_raises(caplog):
    from awq2marlin.integrations.vllm import register

    assert_registering_never_raises(register, ("vllm", "awq2marlin.integrations.vllm.config"), caplog)


@pytest.mark.usefixtures("harness")
def test_the_installed_version_has_all_and_was_tried():
    import vllm

    assert_has_all_and_was_tried(VLLM, (*ALWAYS, *EXPERTS), vllm.__version__)


@pytest.mark.usefixtures("harness")
def test_all_that_the_plugin_imports_of_vllm_is_looked_up():
    from awq2marlin.integrations import vllm as plugin

    assert_imports_are_looked_up(plugin, VLLM, ALWAYS, EXPERTS, NOT_LOOKED_UP)


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("vllm.model_executor.layers.fused_moe", "RoutedExperts", "_expert_routing_tables"),
        ("vllm.model_executor.layers.quantization.auto_awq", "AutoAWQMoEMethod", "_setup_kernel"),
        ("vllm.model_executor.layers.fused_moe.config", "FusedMoEParallelConfig", "use_batched_activation_format"),
        ("vllm.model_executor.layers.fused_moe.experts.marlin_moe", "MarlinExperts", "is_supported_config"),
    ],
)
def test_what_the_plugin_calls_of_layers_and_their_configs_is_looked_up(module, owner, name, monkeypatch):
    found = getattr(importlib.import_module(module), owner)
    place = next(base for base in found.__mro__ if name in vars(base))
    monkeypatch.delattr(place, name)
    lost = [each for need in EXPERTS for each in need.lacks("vllm")]
    assert lost == [f"{module}.{owner}.{name}"]


@pytest.mark.usefixtures("harness")
def test_what_every_layer_is_compared_with_is_looked_up_for_dense_models_too(monkeypatch):
    monkeypatch.delattr("vllm.model_executor.layers.fused_moe.RoutedExperts")
    lost = [each for need in ALWAYS for each in need.lacks("vllm")]
    assert lost == ["vllm.model_executor.layers.fused_moe.RoutedExperts"]


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("name", ["VLLM_BATCH_INVARIANT", "VLLM_MARLIN_INPUT_DTYPE"])
def test_a_setting_that_would_be_refused_is_looked_up(name, monkeypatch):
    monkeypatch.delitem(importlib.import_module("vllm.envs").environment_variables, name)
    lost = [each for need in ALWAYS for each in need.lacks("vllm")]
    assert lost == [f"vllm.envs.{name}"]


@pytest.mark.usefixtures("harness")
def test_a_method_of_ours_that_vllm_would_call_with_more_is_named(monkeypatch):
    from vllm.model_executor.layers.linear import LinearMethodBase

    monkeypatch.setattr(LinearMethodBase, "apply", lambda self, layer, x, bias=None, out=None: None)  # noqa: ARG005
    lost = [each for need in ALWAYS for each in need.lacks("vllm")]
    assert lost == ["vllm.model_executor.layers.linear.LinearMethodBase.apply(without out=)"]


@pytest.mark.usefixtures("harness")
def test_what_vllm_may_call_our_methods_with_is_what_they_take():
    from awq2marlin.integrations.vllm.config import MarlinNativeConfig
    from awq2marlin.integrations.vllm.experts import MarlinNativeMoEMethod
    from awq2marlin.integrations.vllm.linear import MarlinNativeLinearMethod

    ours = {
        "QuantizationConfig": MarlinNativeConfig,
        "LinearMethodBase": MarlinNativeLinearMethod,
        "AutoAWQMoEMethod": MarlinNativeMoEMethod,
    }
    looked_up = [need for need in (*ALWAYS, *EXPERTS) if need.accepts]
    assert len(looked_up) == 7
    for need in looked_up:
        owner, _, method = need.name.partition(".")
        assert tuple(inspect.signature(getattr(ours[owner], method)).parameters) == need.accepts
