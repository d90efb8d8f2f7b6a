"""Which GEMM serves linear layers: by setting, by compute capability, and by what can be compiled."""

import logging
from unittest import mock

import pytest

from awq2marlin.errors import CheckpointError, KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.source import repack_source
from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE, KernelChoice, choose, reason_without_own, setting
from awq2marlin.io.code_cache import CACHE_VARIABLE
from tests.skips import NO_COMPILER

HOPPER, ADA, TURING = (9, 0), (8, 9), (7, 5)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)


@pytest.fixture
def choice(caplog):
    caplog.set_level("INFO")
    return KernelChoice("vLLM's Marlin", logging.getLogger("test"))


@pytest.mark.parametrize(
    ("wanted", "capability", "kernel", "reason"),
    [
        ("auto", HOPPER, "own", "measured faster on compute capability 9.0"),
        ("", HOPPER, "own", "measured faster"),
        ("auto", ADA, "engine", "not measured on compute capability 8.9; AWQ2MARLIN_KERNEL=own takes it"),
        ("auto", (10, 0), "engine", "not measured on compute capability 10.0"),
        ("auto", TURING, "engine", "needs compute capability 8.0"),
        ("auto", None, "engine", "there is no GPU"),
        ("own", ADA, "own", "AWQ2MARLIN_KERNEL=own"),
        ("engine", HOPPER, "engine", "AWQ2MARLIN_KERNEL=engine"),
    ],
)
def test_the_setting_decides_and_else_what_was_measured(monkeypatch, wanted, capability, kernel, reason):
    monkeypatch.setenv(KERNEL_VARIABLE, wanted)
    found = choose(capability)
    assert found.kernel == kernel
    assert reason in found.reason


def test_another_word_is_refused_with_those_that_are_known(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "fast\x1b")
    with pytest.raises(CheckpointError) as refused:
        setting()
    (problem,) = refused.value.problems
    assert problem.code == "unsupported-engine"
    assert "must be one of auto, own, engine" in problem.message
    assert "\x1b" not in problem.message


def test_a_layer_that_only_ours_knows_needs_a_gpu_for_it_and_leave(monkeypatch):
    assert reason_without_own(HOPPER) is None
    assert reason_without_own(ADA) is None
    assert reason_without_own(None) is None
    assert "need compute capability 8.0; this GPU has 7.5" in reason_without_own(TURING)
    monkeypatch.setenv(KERNEL_VARIABLE, "engine")
    assert "AWQ2MARLIN_KERNEL=engine leaves it" in reason_without_own(HOPPER)


def lines(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_process_says_once_which_kernel_it_takes(choice, caplog):
    ready = mock.Mock()
    assert [choice.kernel_for(HOPPER, ready) for _ in range(3)] == ["own"] * 3
    assert ready.call_count == 3, "other layers may need other kernels"
    ((level, text),) = lines(caplog)
    assert level == "INFO"
    assert text.startswith("linear layers in Marlin layout run on awq2marlin's GEMM: measured faster")


def test_the_engine_s_kernel_needs_no_compiler(choice, caplog):
    ready = mock.Mock()
    assert choice.kernel_for(ADA, ready) == choice.kernel == "engine"
    ready.assert_not_called()
    assert "run on vLLM's Marlin: awq2marlin's was not measured" in lines(caplog)[0][1]


def test_a_compiler_that_fails_costs_one_warning_and_then_the_engine_s_is_taken(choice, caplog):
    ready = mock.Mock(side_effect=KernelUnavailableError("NVRTC is missing. To install it: pip install x"))
    assert [choice.kernel_for(HOPPER, ready) for _ in range(3)] == ["engine"] * 3
    assert ready.call_count == 1
    assert choice.kernel == "engine"
    warnings = [text for level, text in lines(caplog) if level == "WARNING"]
    assert warnings == [
        "vLLM's Marlin is used instead of awq2marlin's GEMM: NVRTC is missing. To install it: pip install x"
    ]


def test_layers_that_ran_on_two_kernels_are_told_from_those_of_one(choice):
    """A graph of the first holds calls of ours, which a start on the engine's kernel must not find."""
    assert choice.taken == ""
    assert [choice.kernel_for(HOPPER, mock.Mock()) for _ in range(2)] == ["own"] * 2
    assert choice.taken == "own"
    assert choice.kernel_for(HOPPER, mock.Mock(side_effect=KernelUnavailableError("no"))) == choice.kernel == "engine"
    assert choice.taken == "engine 1, own 2"


def test_whoever_asks_for_ours_is_told_if_it_cannot_be_had(choice, monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "own")
    with pytest.raises(KernelUnavailableError, match="NVRTC is missing"):
        choice.kernel_for(HOPPER, mock.Mock(side_effect=KernelUnavailableError("NVRTC is missing")))


def test_a_layer_that_only_ours_knows_runs_on_ours_beside_others_that_do_not(choice):
    ready = mock.Mock()
    assert choice.kernel_for(ADA, ready) == "engine"
    assert choice.kernel_for(ADA, ready, only_own=True) == "own"
    assert ready.call_count == 1
    assert choice.kernel_for(ADA, ready) == "engine"
    with pytest.raises(KernelUnavailableError):
        choice.kernel_for(ADA, mock.Mock(side_effect=KernelUnavailableError("no")), only_own=True)


def test_the_log_says_how_long_compiling_took(choice, caplog, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cuda.bindings.nvrtc", reason=NO_COMPILER)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    ready = lambda: jit.build(repack_source(4), "sm_80")  # noqa: E731
    assert choice.kernel_for(HOPPER, ready) == "own"
    text = lines(caplog)[-1][1]
    assert text.startswith("compiled a kernel in ")
    assert str(tmp_path) in text
    count = len(caplog.records)
    choice.kernel_for(HOPPER, ready)
    assert len(caplog.records) == count, "nothing was compiled"
    assert capsys.readouterr().err == ""


def test_the_log_says_that_kernels_cannot_be_kept(choice, caplog, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc", reason=NO_COMPILER)
    place = tmp_path / "file" / "cache"
    place.parent.write_text("no folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(place))
    assert choice.kernel_for(HOPPER, lambda: jit.build(repack_source(4), "sm_80")) == "own"
    assert lines(caplog)[-1][1].endswith(f" s; every start will, as {place / 'kernels'} cannot be written")
