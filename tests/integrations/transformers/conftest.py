"""Small converted models, made once for all tests; GPU tests are skipped, with a sentence, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import awq2marlin.integrations.transformers  # noqa: F401 - registers the format
from awq2marlin import convert
from tests.integrations.transformers.checkpoints import Format, write_awq, write_dense
from tests.skips import why_no_gpu

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
#: Every token goes to all experts: a router of random weights nearly ties too often for bounds on the result.
EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 128, "num_experts": 4}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "unaligned": lambda: transformers.LlamaConfig(**{**SIZES, "hidden_size": 192, "head_dim": 48}),
    "qwen2 tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=4),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32),
    "qwen2 moe": lambda: transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=256),
}


@dataclass(frozen=True)
class Case:
    """One model as AWQ, converted, and dense."""

    awq: Path
    marlin: Path
    dense: Path

    def load(self, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.marlin, **options)

    def load_dense(self, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.dense, **options)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Makes a case of an architecture, or returns the one made before."""
    made: dict[Any, Case] = {}

    def make(architecture: str, form: Format | None = None, unaligned: str = "keep") -> Case:
        form = form or Format()
        key = (architecture, form, unaligned)
        if key not in made:
            folder = tmp_path_factory.mktemp("case")
            awq = write_awq(folder / "awq", ARCHITECTURES[architecture](), form)
            convert(awq, folder / "marlin", unaligned=unaligned, verify="none")
            made[key] = Case(awq, folder / "marlin", write_dense(folder / "dense", awq))
        return made[key]

    return make


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """Tokens of two texts."""
    return torch.randint(0, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
