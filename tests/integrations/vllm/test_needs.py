"""Versions of vLLM: judged by what they have. Runs without vLLM, but for the last test."""

import logging
import sys
from types import ModuleType

import pytest

from awq2marlin.integrations.vllm.needs import (
    ALWAYS,
    EXPERTS,
    TRIED,
    Need,
    minor_version,
    missing_reason,
    untried_warning,
)


@pytest.fixture
def place(monkeypatch):
    """A module ``vllm.made_up`` with a class and a function."""

    def multiply(x, weight, scale=1, *, bias=None):
        return x, weight, scale, bias

    module = ModuleType("vllm.made_up")
    module.multiply, module.anything = multiply, lambda **options: options
    module.Kinds = type("Kinds", (), {"MARLIN": 1})
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.made_up", module)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("need", "lost"),
    [
        (Need("made_up", "multiply", ("x", "weight", "bias")), []),
        (Need("made_up", "multiply", ("x", "weight", "workspace")), ["vllm.made_up.multiply(workspace=)"]),
        (Need("made_up", "multiply", ("x", "bias")), ["vllm.made_up.multiply(without weight=)"]),
        (Need("made_up", "multiply", ("x",), optional=("weight", "order")), []),
        (Need("made_up", "anything", ("x", "y")), []),
        (Need("made_up", "Kinds.MARLIN"), []),
        (Need("made_up", "Kinds", (), ("MARLIN", "BATCHED")), ["vllm.made_up.Kinds.BATCHED"]),
        (Need("made_up", "divide", ("x",)), ["vllm.made_up.divide"]),
        (Need("elsewhere", "multiply"), ["vllm.elsewhere.multiply"]),
    ],
)
def test_what_is_missing_is_named(need, lost):
    assert need.lacks() == lost


@pytest.mark.usefixtures("place")
def test_a_vllm_that_lacks_something_is_refused_with_all_of_it():
    needs = (Need("made_up", "divide"), Need("made_up", "multiply", ("x", "weight")), Need("elsewhere", "Layer"))
    assert missing_reason(needs, "0.40.0\x1b") == (
        "vLLM 0.40.0\\x1b lacks what this awq2marlin uses of it: vllm.made_up.divide, vllm.elsewhere.Layer. It was "
        "tried with 0.25, 0.29 and 0.33; install one of those, or a newer awq2marlin, or take the AWQ checkpoint back "
        "with 'awq2marlin revert'"
    )
    assert missing_reason(needs[1:2], "0.40.0") is None


@pytest.mark.parametrize(
    ("version", "is_tried"), [("0.25.1", True), ("0.33.0rc1", True), ("0.30.0", False), ("dev", False)]
)
def test_a_version_that_nobody_tried_is_warned_of(version, is_tried):
    warning = untried_warning(version)
    assert (warning is None) == is_tried
    if warning:
        assert warning.startswith(f"vLLM {version} was never tried with this awq2marlin; 0.25, 0.29 and 0.33 were.")


@pytest.mark.parametrize(
    ("version", "minor"),
    [
        ("0.25.0", (0, 25)),
        ("0.25.1+cu130", (0, 25)),
        ("0.33.0rc1", (0, 33)),
        ("1.2", (1, 2)),
        ("dev", None),
        ("v0.25.0", None),
    ],
)
def test_a_version_is_read_up_to_its_second_number(version, minor):
    assert minor_version(version) == minor


@pytest.mark.usefixtures("harness")
def test_the_installed_version_has_all_and_was_tried():
    import vllm

    assert [each for need in (*ALWAYS, *EXPERTS) for each in need.lacks()] == []
    assert minor_version(vllm.__version__) in TRIED


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
