"""Versions of engines: judged by what they have. Runs without any engine."""

import logging
import sys
from types import ModuleType

import pytest

from awq2marlin.integrations.serving.needs import Engine, Need, numbers

VLLM = Engine("vLLM", "vllm", ((0, 25), (0, 29), (0, 33)))
SGLANG = Engine("SGLang", "sglang", ((0, 5, 23),))


class Layer:
    """A class whose instances have what it does not."""

    def __init__(self, size):
        self.width = size


@pytest.fixture
def place(monkeypatch):
    """A module ``vllm.made_up`` with a class and a function."""

    def multiply(x, weight, scale=1, *, bias=None):
        return x, weight, scale, bias

    module = ModuleType("vllm.made_up")
    module.multiply, module.anything = multiply, lambda **options: options
    module.Kinds = type("Kinds", (), {"MARLIN": 1, "__annotations__": {"size": int}})
    module.Layer = type("Layer", (Layer,), {})
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
        (Need("made_up", "Kinds", (), ("size",)), []),
        (Need("made_up", "Layer", (), ("width", "height")), ["vllm.made_up.Layer.height"]),
        (Need("made_up", "multiply", accepts=("x", "weight", "scale", "bias", "more")), []),
        (
            Need("made_up", "multiply", accepts=("x", "weight")),
            ["vllm.made_up.multiply(without scale=)", "vllm.made_up.multiply(without bias=)"],
        ),
        (Need("made_up", "anything", accepts=("x",)), []),
        (Need("made_up", "divide", ("x",)), ["vllm.made_up.divide"]),
        (Need("elsewhere", "multiply"), ["vllm.elsewhere.multiply"]),
    ],
)
def test_what_is_missing_is_named(need, lost):
    assert need.lacks("vllm") == lost


@pytest.mark.usefixtures("place")
def test_a_vllm_that_lacks_something_is_refused_with_all_of_it():
    needs = (Need("made_up", "divide"), Need("made_up", "multiply", ("x", "weight")), Need("elsewhere", "Layer"))
    assert VLLM.missing_reason(needs, "0.40.0\x1b") == (
        "vLLM 0.40.0\\x1b lacks what this awq2marlin uses of it: vllm.made_up.divide, vllm.elsewhere.Layer. It was "
        "tried with 0.25, 0.29 and 0.33; install one of those, or a newer awq2marlin, or get the AWQ checkpoint back "
        "with 'awq2marlin revert'"
    )
    assert VLLM.missing_reason(needs[1:2], "0.40.0") is None


@pytest.mark.parametrize(
    ("version", "is_tried"), [("0.25.1", True), ("0.33.0rc1", True), ("0.30.0", False), ("dev", False)]
)
def test_a_version_that_nobody_tried_is_warned_of(version, is_tried):
    warning = VLLM.untried_warning(version)
    assert (warning is None) == is_tried
    if warning:
        assert warning.startswith(f"vLLM {version} was never tried with this awq2marlin; 0.25, 0.29 and 0.33 were.")


def test_an_untried_version_is_said_once(caplog):
    log = logging.getLogger("made up")
    for _ in range(3):
        VLLM.warn_if_untried("0.34.0", log)
    VLLM.warn_if_untried("0.33.1", log)
    assert [record.getMessage()[:30] for record in caplog.records] == ["vLLM 0.34.0 was never tried wi"]


def test_an_engine_that_was_tried_in_one_version_is_told_of_that_one():
    (need,) = lost = (Need("made_up_too", "divide"),)
    assert "It was tried with 0.5.23; install that, or" in str(SGLANG.missing_reason(lost, "0.5.30"))
    assert need.lacks("sglang") == ["sglang.made_up_too.divide"]
    assert SGLANG.untried_warning("0.5.23.post1") is None
    assert "; 0.5.23 was. All that it uses of SGLang is there" in str(SGLANG.untried_warning("0.5.24"))


@pytest.mark.parametrize(
    ("version", "count", "found"),
    [
        ("0.25.0", 2, (0, 25)),
        ("0.25.1+cu130", 2, (0, 25)),
        ("0.33.0rc1", 2, (0, 33)),
        ("1.2", 2, (1, 2)),
        ("1.2", 3, None),
        ("0.5.23.post1", 3, (0, 5, 23)),
        ("0.5.23rc0", 3, (0, 5, 23)),
        ("dev", 2, None),
        ("v0.25.0", 2, None),
    ],
)
def test_a_version_is_read_up_to_some_number(version, count, found):
    assert numbers(version, count) == found
