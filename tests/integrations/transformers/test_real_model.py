"""SmolLM2-135M-Instruct in Transformers: the logits and the words of the dense model that its AWQ tensors mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from awq2marlin import convert
from tests.integrations.transformers.checkpoints import write_dense
from tests.integrations.transformers.conftest import Case

MODEL = "smollm2-135m-awq-g64"
PROMPT = "Explain in simple words why the sky is blue."


def make(awq: Path, folder: Path, unaligned: Any) -> Iterator[Case]:
    convert(awq, folder / "marlin", unaligned=unaligned, verify="none")
    yield Case(awq, folder / "marlin", write_dense(folder / "dense", awq))
    for path in folder.glob("*/*"):  # hundreds of megabytes: pytest would keep three runs of them
        path.unlink()


@pytest.fixture(scope="module")
def real(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from make(shared_dir / "models" / MODEL, tmp_path_factory.mktemp("keep"), "keep")


@pytest.fixture(scope="module")
def padded(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from make(shared_dir / "models" / MODEL, tmp_path_factory.mktemp("pad"), "pad")


@pytest.fixture(scope="module")
def question(shared_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / MODEL)
    messages = [{"role": "user", "content": PROMPT}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def distances(real: Case, question: Any) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """How far the converted model and the dense fp16 one are from the truth; the models.

    The truth is the dense fp32 model: its weights are exact.
    """
    exact, half, model = real.load_dense(), real.load_dense(dtype=torch.float16), real.load()
    assert model.dtype == torch.float16
    with torch.no_grad():
        truth, rounded, found = (each(**question).logits.float() for each in (exact, half, model))
    assert torch.equal(found.argmax(-1), truth.argmax(-1))
    return (found - truth).abs().max(), (rounded - truth).abs().max(), model, exact


def test_logits_and_64_greedy_tokens_are_those_of_the_dense_model(real: Case, question: Any) -> None:
    """The bound is twice the distance of the dense fp16 model (0.2 of logits up to 37, on an AMD EPYC, 2026-11-22)."""
    found, rounded, model, exact = distances(real, question)
    assert 0 < found <= 2 * rounded
    options = {"max_new_tokens": 64, "do_sample": False}
    assert torch.equal(model.generate(**question, **options), exact.generate(**question, **options))


def test_so_are_they_with_padded_attention(padded: Case, question: Any) -> None:
    found, rounded, model, _ = distances(padded, question)
    assert 0 < found <= 2 * rounded
    assert model.model.layers[3].self_attn.q_proj.padded_k == 640
