"""What GPTQ and AutoRound checkpoints are converted to gives the logits of the dense model that they mean, on a CPU."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from awq2marlin import convert
from tests.formats import peers
from tests.skips import NO_COMPRESSED_TENSORS

#: Whole models that AutoRound exported, of every packing.
NAMES = ["gptq_w4_sym_g32", "gptq_w8_sym_channel", "v2_w4_asym_g64", "awq_w4_sym_g64", "as_awq_sym", "as_awq_asym"]


@torch.no_grad()
def logits(folder: Path, **options) -> torch.Tensor:
    tokens = torch.randint(0, 8, (2, 12), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the file's config is used, beside what is asked for here
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model(tokens).logits.float()


@pytest.mark.parametrize("name", NAMES)
def test_our_loader_gives_the_logits_of_the_dense_model(name: str, tmp_path: Path) -> None:
    source = peers.ALL_DATA / "auto_round" / name / "checkpoint"
    convert(source, tmp_path / "marlin")
    found = logits(tmp_path / "marlin")
    exact = logits(peers.write_dense(tmp_path / "exact", source, exact=True))
    assert exact.std() > 0.05
    apart = (found - exact).abs()  # the model computes in bf16
    assert apart.mean() < 0.02 * exact.std()
    assert apart.max() < 0.2 * exact.std()


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason=NO_COMPRESSED_TENSORS)
@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_reads_what_we_write(name: str, tmp_path: Path) -> None:
    source = peers.ALL_DATA / "auto_round" / name / "checkpoint"
    convert(source, tmp_path / "ct", to="compressed-tensors")
    found = logits(tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto")
    assert torch.equal(found, logits(peers.write_dense(tmp_path / "dense", source), dtype="auto"))
