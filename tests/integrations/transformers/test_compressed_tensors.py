"""Transformers with compressed-tensors loads what we write in that format on a CPU, to the logits of the dense model.

The harness is shown to work by the library's own files. Equal weights give equal logits, bit for bit: the dense weights
are rounded to the type of the scales, as the library rounds them, or are exact where the model is loaded in float32.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from awq2marlin import convert
from tests.formats import peers
from tests.skips import NO_COMPRESSED_TENSORS

SYMMETRIC = ["tied", "llm_compressor_gptq", "llm_compressor_experts_sym"]
ASYMMETRIC = ["llama", "llm_compressor_awq"]


@pytest.fixture(autouse=True)
def library() -> None:
    """Skips where compressed-tensors is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("compressed_tensors.compressors")
    except ImportError as error:
        if os.environ.get("AWQ2MARLIN_REQUIRE_VLLM") == "1":
            pytest.fail(f"compressed-tensors must be importable here, but: {error}")
        pytest.skip(NO_COMPRESSED_TENSORS)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the file's config is used, beside what is asked for here
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model(tokens).logits


def dequantized(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of a model that is decompressed while it is loaded."""
    from transformers import CompressedTensorsConfig

    return logits(folder, tokens, quantization_config=CompressedTensorsConfig(dequantize=True), **options)


# --- the harness, on what the library wrote ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYMMETRIC + ASYMMETRIC)
def test_the_library_s_files_give_the_logits_of_the_dense_model(
    name: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    expected = logits(peers.write_dense(tmp_path / "dense", peers.checkpoint(name)), tokens)
    assert expected.std() > 0.5
    assert torch.equal(dequantized(peers.checkpoint(name), tokens), expected)
    if name in SYMMETRIC:
        assert torch.equal(logits(peers.checkpoint(name), tokens), expected)


@pytest.mark.parametrize("name", SYMMETRIC[:2])
def test_in_float32_they_give_those_of_the_exact_weights(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    expected = logits(peers.write_dense(tmp_path / "dense", peers.checkpoint(name), exact=True), tokens)
    assert torch.equal(logits(peers.checkpoint(name), tokens, dtype=torch.float32), expected)


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_with_zero_points_they_are_loaded_only_if_they_are_dequantized(name: str, tokens: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        logits(peers.checkpoint(name), tokens)


def test_experts_with_zero_points_are_not_loaded_at_all(tokens: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        dequantized(peers.checkpoint("llm_compressor_experts"), tokens)


def altered(folder: Path, name: str, alter: Callable[[dict[str, Any]], object]) -> Path:
    """A fixture with another quantization config."""
    shutil.copytree(peers.checkpoint(name), folder)
    document = peers.read_config(folder)
    alter(document["quantization_config"])
    (folder / "config.json").write_text(json.dumps(document), "utf-8")
    return folder


def test_a_config_can_say_itself_that_it_is_to_be_dequantized(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = altered(tmp_path / "says", "llama", lambda config: config.update(dequantize=True))
    assert torch.equal(logits(folder, tokens), dequantized(peers.checkpoint("llama"), tokens))


def test_a_tied_output_embedding_must_be_ignored_by_name(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = altered(tmp_path / "silent", "tied", lambda config: config.update(ignore=[]))
    with pytest.raises(AttributeError, match="has no attribute `weight`"):
        logits(folder, tokens)


def test_without_its_status_a_model_is_loaded_silently_wrong(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = altered(tmp_path / "silent", "tied", lambda config: config.pop("quantization_status"))
    assert not torch.equal(logits(folder, tokens), logits(peers.checkpoint("tied"), tokens))


# --- what we write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYMMETRIC + ASYMMETRIC)
def test_our_files_give_the_logits_of_the_dense_model(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    awq = peers.write_awq(tmp_path / "awq", peers.checkpoint(name))
    convert(awq, tmp_path / "ct", to="compressed-tensors")
    expected = logits(peers.write_dense(tmp_path / "dense", peers.checkpoint(name)), tokens)
    assert torch.equal(dequantized(tmp_path / "ct", tokens), expected)
    if name in SYMMETRIC:
        assert torch.equal(logits(tmp_path / "ct", tokens), expected)


def test_our_files_keep_embeddings_tied(tmp_path: Path) -> None:
    awq = peers.write_awq(tmp_path / "awq", peers.checkpoint("tied"))
    convert(awq, tmp_path / "ct", to="compressed-tensors")
    assert "lm_head" in peers.read_config(tmp_path / "ct")["quantization_config"]["ignore"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# AWQ always has zero points, and Transformers 5.23 loads no experts in compressed-tensors that have them.
@pytest.mark.parametrize("name", [name for name in SYMMETRIC + ASYMMETRIC if "experts" not in name])
def test_compressed_tensors_of_awq_of_compressed_tensors_gives_them_too(
    name: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    convert(peers.checkpoint(name), tmp_path / "awq", to="awq")
    convert(tmp_path / "awq", tmp_path / "ct", to="compressed-tensors")
    expected = logits(peers.write_dense(tmp_path / "dense", peers.checkpoint(name)), tokens)
    assert torch.equal(dequantized(tmp_path / "ct", tokens), expected)


# --- what our loader makes of Marlin-native outputs -----------------------------------------------------------------


@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("name", [*SYMMETRIC, *ASYMMETRIC, "llm_compressor_experts"])
def test_our_loader_gives_the_logits_of_the_same_numbers_in_awq(
    name: str, unaligned: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    convert(peers.write_awq(tmp_path / "awq", peers.checkpoint(name)), tmp_path / "of_awq", unaligned=unaligned)
    convert(peers.checkpoint(name), tmp_path / "of_ct", unaligned=unaligned)
    found = logits(tmp_path / "of_ct", tokens)
    assert torch.equal(found, logits(tmp_path / "of_awq", tokens))
    exact = logits(peers.write_dense(tmp_path / "exact", peers.checkpoint(name), exact=True), tokens)
    assert (found.float() - exact).abs().max() < 0.1 * exact.std()
