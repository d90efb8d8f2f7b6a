"""What the plugin uses of SGLang is there, and all of it is looked up. The first test runs without SGLang."""

import ast
import logging
from pathlib import Path
from unittest import mock

import pytest

from awq2marlin.integrations.serving.needs import numbers
from awq2marlin.integrations.sglang.needs import ALWAYS, EXPERTS, TRIED


def test_registering_never_raises(caplog):
    from awq2marlin.integrations.sglang import register

    absent = {"sglang": None, "awq2marlin.integrations.sglang.hooks": None}  # importing them fails
    with mock.patch.dict("sys.modules", absent):
        register()
    (record,) = caplog.records
    assert "could not register" in record.message
    assert record.levelname == "WARNING"


@pytest.mark.usefixtures("harness")
def test_the_installed_version_has_all_and_was_tried():
    import sglang

    assert [each for need in (*ALWAYS, *EXPERTS) for each in need.lacks("sglang")] == []
    assert numbers(sglang.__version__, 3) in TRIED


@pytest.mark.usefixtures("harness")
def test_all_that_the_plugin_imports_of_sglang_is_looked_up():
    """So that no ImportError comes from the middle of a load. What registering takes is reported by that."""
    from awq2marlin.integrations import sglang as plugin

    known = {(f"sglang.{need.module}", need.name.partition(".")[0]) for need in (*ALWAYS, *EXPERTS)}
    registering = {"QUANTIZATION_CHOICES", "QUANTIZATION_METHODS", "HookRegistry", "HookType", "QuantizationConfig"}
    types = {"QuantizeMethodBase"}
    for path in Path(plugin.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "sglang":
                used = {(node.module, name.name) for name in node.names if name.name not in registering | types}
                assert used <= known, (path.name, used - known)


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


@pytest.mark.usefixtures("harness")
def test_an_untried_version_is_said_once(monkeypatch, caplog):
    import sglang

    from awq2marlin.integrations.sglang import config

    monkeypatch.setattr(sglang, "__version__", "0.5.24")
    monkeypatch.setattr(config, "logger", logging.getLogger("test"))
    config._warn_of_untried_version.cache_clear()
    for _ in range(3):
        config._warn_of_untried_version()
    config._warn_of_untried_version.cache_clear()
    assert [record.getMessage()[:32] for record in caplog.records] == ["SGLang 0.5.24 was never tried wi"]
