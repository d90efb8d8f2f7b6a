"""Modules run through the GEMM: sound ones pass, and every fault is named with its place. On the CPU reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from awq2marlin import (
    DifferenceError,
    GemmRun,
    KernelUnavailableError,
    UnavailableError,
    convert,
    marlin_gemm,
    verify,
)
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.cli.app import main
from awq2marlin.gemm import check as gemm_verification
from awq2marlin.gemm import jit

DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
MODULES = {UP: (128, 192), DOWN: (192, 128)}
ODD = {UP: (192, 64), DOWN: (96, 200)}

Gemm = Callable[..., torch.Tensor]


def checkpoint(folder: Path, **options: Any) -> Path:
    write_checkpoint(folder, Recipe(**{"modules": MODULES, "group_size": 64, **options}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = checkpoint(tmp_path / "awq")
    convert(source, tmp_path / "marlin", verify="none")
    return source, tmp_path / "marlin"


def through(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Lets the GEMM's result pass through ``change(activations, result)``."""

    def changed(activations: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return change(activations, marlin_gemm(activations, *arguments, **options))

    monkeypatch.setattr(gemm_verification, "marlin_gemm", changed)


def is_identity(activations: torch.Tensor) -> bool:
    return activations.shape[0] == activations.shape[1] and bool((activations.sum(1) == 1).all())


@pytest.mark.parametrize(
    ("options", "unaligned"),
    [
        ({}, "keep"),
        ({"bits": 8, "group_size": 32, "scale_dtype": "BF16"}, "keep"),
        ({"group_size": -1, "has_qzeros": False}, "keep"),
        ({"modules": {UP: (128, 64)}, "group_size": 128}, "keep"),
        ({"modules": ODD, "group_size": 32}, "pad"),
        ({"modules": ODD, "group_size": -1, "bits": 8}, "pad"),
    ],
    ids=["4-bit", "8-bit bf16", "one group, no zero points", "K = g", "padded", "padded, one group"],
)
def test_a_sound_conversion_is_exact_and_within_its_bound(tmp_path: Path, options: Any, unaligned: Any) -> None:
    source = checkpoint(tmp_path / "awq", **options)
    converted = convert(source, tmp_path / "marlin", unaligned=unaligned, verify="all", device="cpu")
    assert converted.gemm == verify(source, tmp_path / "marlin", device="cpu").gemm
    assert converted.gemm is not None
    assert (converted.gemm.device, converted.gemm.device_name) == ("cpu", "CPU reference")
    assert [check.name for check in converted.gemm.checks] == [module.name for module in converted.converted]
    for check, module in zip(converted.gemm.checks, converted.converted, strict=True):
        assert (check.size_k, check.size_n) == (module.padded_k, module.padded_n)
        assert check.dtype == ("bfloat16" if options.get("scale_dtype") == "BF16" else "float16")
        assert 0 < check.mean_error <= check.max_error
        assert 0 < check.max_relative < 1
        assert math.isfinite(check.bound)


def test_a_weight_that_does_not_come_back_is_named_with_its_place(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(activations: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if is_identity(activations) and result.shape == (192, 128):
            result[70, 9] += 1
        return result

    through(monkeypatch, change)
    with pytest.raises(DifferenceError) as raised:
        verify(*pair, device="cpu")
    (problem,) = raised.value.problems
    assert (problem.code, problem.file, problem.tensor) == ("gemm-difference", "model.safetensors", f"{DOWN}.qweight")
    assert "weight at row 70, column 9: the source has " in problem.message


def test_zeros_of_either_sign_are_equal(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, lambda _, result: torch.where(result == 0, -torch.zeros_like(result), result))
    assert verify(*pair, device="cpu").gemm is not None


@pytest.mark.parametrize("wrong", [1.0, math.nan, math.inf])
def test_a_product_beyond_its_bound_is_a_difference(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def change(activations: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if not is_identity(activations):
            result[-1, -1] += wrong
        return result

    through(monkeypatch, change)
    with pytest.raises(DifferenceError, match="times the bound that K=128") as raised:
        verify(*pair, device="cpu")
    (problem,) = raised.value.problems
    assert (problem.code, problem.tensor) == ("gemm-error", UP)


@pytest.mark.parametrize("place", [(7, 0), (7, 191), (1, 0)])
def test_a_nan_is_a_difference_wherever_it_stands(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]
) -> None:
    size_m, column = place

    def change(_: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if result.shape == (size_m, 192):
            result[0, column] = math.nan
        return result

    through(monkeypatch, change)
    monkeypatch.setattr(gemm_verification, "_COLUMNS_AT_ONCE", 64)
    with pytest.raises(DifferenceError) as raised:
        verify(*pair, device="cpu")
    assert [(problem.code, problem.tensor) for problem in raised.value.problems] == [("gemm-error", UP)]


def test_a_conversion_that_fails_through_the_gemm_never_becomes_loadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = checkpoint(tmp_path / "awq"), tmp_path / "marlin"
    with monkeypatch.context() as patch:
        through(patch, lambda _, result: result + 1)
        with pytest.raises(DifferenceError):
            convert(source, output, device="cpu")
    assert not (output / "config.json").exists()
    again = convert(source, output, device="cpu")
    assert again.resumed == (), "every shard is made again"
    assert (output / "config.json").is_file()


def test_auto_says_that_it_used_the_cpu_reference(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", *map(str, pair), "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert "running modules on CPU reference: there is no GPU here" in err
    assert "run on CPU reference, exact: identity inputs reproduced every weight bit for bit" in out
    assert DOWN in out


def test_cuda_without_a_gpu_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = checkpoint(tmp_path / "awq")
    with pytest.raises(UnavailableError, match="awq2marlin doctor") as raised:
        convert(source, tmp_path / "marlin", device="cuda")
    assert raised.value.problems[0].code == "no-gpu"
    assert not (tmp_path / "marlin").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KernelUnavailableError("no compiler here"), "no-kernel", "no compiler here"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out-of-memory", "2.00 GiB"),
    ],
    ids=["no-kernel", "out-of-memory"],
)
def test_a_device_that_cannot_is_a_refusal_that_names_the_module(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, words: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(gemm_verification, "marlin_gemm", fail)
    with pytest.raises(UnavailableError) as raised:
        verify(*pair, device="cpu")
    (problem,) = raised.value.problems
    assert (problem.code, problem.tensor) == (code, UP)
    assert words in problem.message


def test_compilation_is_told_as_progress_and_not_printed(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiling(*arguments: Any, **options: Any) -> torch.Tensor:
        jit._say.get()("compiled a kernel")
        return marlin_gemm(*arguments, **options)

    monkeypatch.setattr(gemm_verification, "marlin_gemm", compiling)
    assert main(["verify", *map(str, pair), "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["verify", *map(str, pair), "--device", "cpu"]) == 0
    assert "compiled a kernel" in capsys.readouterr().err


def test_json_holds_every_check_and_the_picture_is_drawn(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "errors.png"
    assert main(["verify", *map(str, pair), "--device", "cpu", "--plot", str(picture), "--json", "--quiet"]) == 0
    details = json.loads(capsys.readouterr().out)["details"]
    assert details["device"] == "CPU reference"
    keys = ["name", "size_k", "size_n", "dtype", "sizes_m", "max_error", "mean_error", "max_relative", "bound"]
    assert [list(check) for check in details["gemm"]] == [keys, keys]
    assert [check["name"] for check in details["gemm"]] == [UP, DOWN]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sample_is_what_is_run(pair: tuple[Path, Path]) -> None:
    run = verify(*pair, layers=1, device="cpu").gemm
    assert isinstance(run, GemmRun)
    assert [check.name for check in run.checks] == [UP]
