"""What the plugin uses of SGLang is there, and all of it is looked up. The first test runs without SGLang."""

import pytest

from awq2marlin.integrations.sglang.needs import ALWAYS, EXPERTS, SGLANG
from tests.integrations.serving.plugins import (
    assert_has_all_and_was_tried,
    assert_imports_are_looked_up,
    assert_registering_never_raises,
)

#: What registering takes, and a type.
NOT_LOOKED_UP = {"QUANTIZATION_CHOICES", "QUANTIZATION_METHODS", "HookRegistry", "HookType", "QuantizationConfig",
                 "QuantizeMethodBase"}  # fmt: skip


def test_registering_never_raises(caplog):
    from awq2marlin.integrations.sglang import register

    assert_registering_never_raises(register, ("sglang", "awq2marlin.integrations.sglang.hooks"), caplog)


@pytest.mark.usefixtures("harness")
def test_the_installed_version_has_all_and_was_tried():
    import sglang

    assert_has_all_and_was_tried(SGLANG, (*ALWAYS, *EXPERTS), sglang.__version__)


@pytest.mark.usefixtures("harness")
def test_all_that_the_plugin_imports_of_sglang_is_looked_up():
    from awq2marlin.integrations import sglang as plugin

    assert_imports_are_looked_up(plugin, SGLANG, ALWAYS, EXPERTS, NOT_LOOKED_UP)


@pytest.mark.usefixtures("harness")
def test_the_functions_that_are_hooked_have_been():
    """SGLang only logs where it cannot apply a hook."""
    from sglang.srt.model_loader import loader, utils, weight_utils

    from awq2marlin.integrations.sglang import hooks

    for module, name, ours in (
        (weight_utils, "get_quant_config", hooks.check),
        (utils, "get_model_architecture", hooks.model_architecture),
    ):
        wrapped = getattr(module, name)
        assert ours in [cell.cell_contents for cell in wrapped.__closure__]
        assert getattr(loader, name) is wrapped, "the loader has it under its own name"
