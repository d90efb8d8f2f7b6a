"""The scripts of benchmarks/ that need no GPU, on small made-up inputs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from awq2marlin import convert, inspect, verify
from awq2marlin.layout import reference

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

RUN = {
    "ready_seconds": 21.5,
    "read_seconds": 2.25,
    "process_seconds": 0.75,
    "gpu_peak_mib": 7168.0,
    "gpu_reserved_peak_mib": 8192.0,
    "gpu_after_mib": 5120.0,
    "host_anonymous_peak_mib": 3072.0,
    "host_anonymous_after_mib": 2048.0,
}


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_the_load_chart_is_drawn_and_its_table_holds_the_figures(tmp_path):
    vllm = {"engine": "vllm", "awq": RUN, "marlin": {**RUN, "process_seconds": 0.0625, "gpu_reserved_peak_mib": 5632.0}}
    transformers = {"engine": "transformers", "awq": {"error": "GPTQModel is missing"}, "marlin": RUN}
    results, chart = tmp_path / "load.json", tmp_path / "load.png"
    results.write_text(json.dumps({"rows": [vllm, transformers]}))
    command = [sys.executable, str(FOLDER / "load_chart.py"), str(results), "--output", str(chart)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_size > 10_000
    lines = done.stdout.splitlines()
    assert lines[2] == "| vLLM | AWQ source | 21.50 | 2.25 | 0.75 | 7.00 | 8.00 | 5.00 | 3.00 | 2.00 |"
    assert lines[3] == "| vLLM | converted | 21.50 | 2.25 | 0.06 | 7.00 | 5.50 | 5.00 | 3.00 | 2.00 |"
    assert lines[4].startswith("| Transformers | AWQ source | not run: GPTQModel is missing |")


def test_random_models_convert_and_their_dequantized_form_is_what_the_oracle_says(tmp_path, script):
    random_models, dense_models = script("random_models"), script("dense_models")
    model = random_models.Model(128, 256, 1, 2, 1, 64, experts=2, group_size=64)
    size = random_models.write_model(tmp_path / "awq", model)
    assert size < inspect(tmp_path / "awq").bytes
    result = convert(tmp_path / "awq", tmp_path / "marlin")
    assert len(result.converted) == 10
    verify(tmp_path / "awq", tmp_path / "marlin")

    import torch
    from safetensors.numpy import load_file

    dense_models.dequantize(tmp_path / "awq", tmp_path / "dense", torch.float16)
    awq = load_file(tmp_path / "awq" / "model-00001.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    q = reference.unpack_awq(awq[f"{module}.qweight"].view(np.uint32), 4).astype(np.float32)
    z = reference.unpack_awq(awq[f"{module}.qzeros"].view(np.uint32), 4).repeat(64, axis=0)
    weight = ((q - z) * awq[f"{module}.scales"].astype(np.float32).repeat(64, axis=0)).T.astype(np.float16)
    np.testing.assert_array_equal(dense[f"{module}.weight"], weight)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float16"
    assert {each.dtype for each in dense.values()} == {np.dtype(np.float16)}


def test_every_model_of_the_token_comparison_is_what_its_name_says(script):
    models = script("vllm_tokens").MODELS
    assert {model.experts > 0 for model in models.values()} == {True, False}
    for name, model in models.items():
        assert model.zero_points == ("without zero points" not in name)
        assert model.biases == ("biases" in name)
        assert (model.bits == 8) == ("8 bits" in name)


def test_the_load_summary_takes_medians_and_compares_tokens(script):
    summary = script("load").summary
    run = {"ready_seconds": 2.0, "tokens": [1, 2], "vllm": "0.25.0"}
    found = summary({"awq": [{"error": "no"}], "marlin": [run, {**run, "ready_seconds": 4.0}]})
    assert found == {
        "awq": {"error": "no"}, "marlin": {"ready_seconds": 3.0}, "vllm": "0.25.0", "same_tokens": True,
    }  # fmt: skip
    assert not summary({"awq": [{**run, "tokens": [1, 3]}], "marlin": [run]})["same_tokens"]
