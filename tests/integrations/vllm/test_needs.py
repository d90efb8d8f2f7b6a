"""What the plugin uses of vLLM is there, and all of it is looked up. The first test runs without vLLM."""

import logging
from unittest import mock

import pytest

from awq2marlin.integrations.serving.needs import numbers
from awq2marlin.integrations.vllm.needs import ALWAYS, EXPERTS, TRIED


def test_registering_never_raises(caplog):
    from awq2marlin.integrations.vllm import register

    absent = {"vllm": None, "awq2marlin.integrations.vllm.config": None}  # importing them fails
    with mock.patch.dict("sys.modules", absent):
        register()
    (record,) = caplog.records
    assert "could not register" in record.message
    assert record.levelname == "WARNING"


@pytest.mark.usefixtures("harness")
def test_the_installed_version_has_all_and_was_tried():
    import vllm

    assert [each for need in (*ALWAYS, *EXPERTS) for each in need.lacks("vllm")] == []
    assert numbers(vllm.__version__, 2) in TRIED


@pytest.mark.usefixtures("harness")
def test_all_that_the_plugin_imports_of_vllm_is_looked_up():
    """So that no ImportError comes from the middle of a load. What registering takes is reported by that."""
    import ast
    from pathlib import Path

    from awq2marlin.integrations import vllm as plugin

    known = {(f"vllm.{need.module}", need.name.partition(".")[0]) for need in (*ALWAYS, *EXPERTS)}
    known |= {("vllm", need.module) for need in ALWAYS if "." not in need.module}
    optional = {"is_weights_pre_processed", "marlin_make_workspace_new"}  # where a version has them
    registering = {"init_logger", "register_quantization_config", "QuantizationConfig", "QuantizeMethodBase"}
    for path in Path(plugin.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm":
                used = {(node.module, name.name) for name in node.names if name.name not in optional | registering}
                used -= {("vllm.scalar_type", "ScalarType")}  # a type
                assert used <= known, (path.name, used - known)


def test_an_untried_version_is_said_once(harness, monkeypatch, caplog):  # noqa: ARG001 - it decides whether vLLM is there
    import vllm

    from awq2marlin.integrations.vllm import config

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(config, "logger", logging.getLogger("test"))
    config._warn_of_untried_version.cache_clear()
    for _ in range(3):
        config._warn_of_untried_version()
    config._warn_of_untried_version.cache_clear()
    assert [record.getMessage()[:30] for record in caplog.records] == ["vLLM 0.34.0 was never tried wi"]
