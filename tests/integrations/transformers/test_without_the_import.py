"""Transformers without our import stops with a sentence; with it, it loads all, also what version 0.1 wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import awq2marlin
from awq2marlin import convert, revert, verify
from awq2marlin.checkpoint.config import written_config
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.layout.scheme import Scheme
from tests.integrations.transformers.checkpoints import Format
from tests.integrations.transformers.conftest import Case

MakeCase = Callable[..., Case]
KEY = "transformers_weights"
SAID = "put 'import awq2marlin.integrations.transformers' before from_pretrained$"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is without the import."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "marlin_native")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "marlin_native")


def saying(name: str | None, folder: Path, target: Path) -> Path:
    """A copy of a checkpoint whose config names this file as the one with the weights, or none."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config.pop(KEY, None)
    (target / "config.json").write_text(json.dumps(config if name is None else {**config, KEY: name}), "utf-8")
    return target


def test_a_process_that_does_not_import_the_loader_ends_with_the_sentence(make_case: MakeCase) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('loaded')"
    )
    line = [sys.executable, "-c", code, str(make_case("llama").marlin)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.rstrip().splitlines()[-1].endswith(SAID.removesuffix("$"))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("shards", [1, 3])
def test_nothing_is_loaded_without_the_import(make_case: MakeCase, auto: Any, shards: int) -> None:
    case = make_case("llama", Format(shards=shards))
    with pytest.raises(ValueError, match=SAID):
        auto.from_pretrained(case.marlin)
    with pytest.raises(ValueError, match=SAID):
        auto.from_pretrained(case.marlin, config=AutoConfig.from_pretrained(case.marlin))


@pytest.mark.usefixtures("plain")
def test_nor_is_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    config = {**transformers.Qwen3_5Config().to_dict(), "architectures": ["Qwen3_5ForConditionalGeneration"]}
    document = written_config(config, MARLIN_NATIVE, Quantization(Scheme(4, 128, True)))
    (tmp_path / "config.json").write_text(json.dumps(document), "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for auto in AutoModelForCausalLM, AutoModel, transformers.Qwen3_5TextModel:
        with pytest.raises(ValueError, match=SAID):
            auto.from_pretrained(tmp_path)


def test_what_version_0_1_wrote_loads_as_ever(make_case: MakeCase, tmp_path: Path, prompt: torch.Tensor) -> None:
    case = make_case("llama")
    older = saying(None, case.marlin, tmp_path / "older")
    model = AutoModelForCausalLM.from_pretrained(older)
    assert torch.equal(model(prompt).logits, case.load()(prompt).logits)
    verify(case.awq, older)


def test_a_file_that_the_source_names_is_loaded(make_case: MakeCase, tmp_path: Path, prompt: torch.Tensor) -> None:
    case = make_case("llama")
    awq = saying("other.safetensors", case.awq, tmp_path / "awq")
    (awq / "model.safetensors").rename(awq / "other.safetensors")
    convert(awq, tmp_path / "marlin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "marlin")
    assert torch.equal(model(prompt).logits, case.load()(prompt).logits)
    revert(tmp_path / "marlin", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (awq / "config.json").read_bytes()


def test_a_saved_model_stops_transformers_too(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_case("llama").load()
    model.save_pretrained(tmp_path / "saved")
    revert(tmp_path / "saved", tmp_path / "back")
    assert KEY not in json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for mapping in AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING:
        monkeypatch.delitem(mapping, "marlin_native")
    with pytest.raises(ValueError, match=SAID):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_other_formats_are_written_without_it(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama")
    awq2marlin.convert(case.marlin, tmp_path / "ct", to="compressed-tensors")
    assert "marlin_native" not in (tmp_path / "ct" / "config.json").read_text("utf-8")
