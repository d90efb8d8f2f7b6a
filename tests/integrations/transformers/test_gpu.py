"""The Transformers loader on a GPU: the same packed tensors as on a CPU, the dense model's tokens, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.transformers.checkpoints import Format, read_tensors
from tests.integrations.transformers.conftest import ARCHITECTURES, Case

MakeCase = Callable[..., Case]
pytestmark = pytest.mark.gpu

GREEDY: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_as_exact_as_the_dense_model_s(
    make_case: MakeCase, prompt: torch.Tensor, architecture: str, dtype: torch.dtype
) -> None:
    """Within twice the distance of the dense model of the same type from the dense one of fp32, computed on a CPU."""
    case = make_case(architecture, Format(scales=dtype, others=dtype))
    exact, dense = logits(case.load_dense(), prompt), logits(case.load_dense(dtype=dtype, device_map="cuda"), prompt)
    bound = 2 * (dense - exact).abs().max()
    assert 0 < bound < 0.3 * exact.std()
    assert (logits(case.load(device_map="cuda"), prompt) - exact).abs().max() <= bound


@pytest.mark.parametrize("architecture", ["unaligned", "mixtral"])
def test_repacks_on_the_gpu_to_the_same_bits_and_saves_them(
    make_case: MakeCase, tmp_path: Path, architecture: str
) -> None:
    case = make_case(architecture)
    on_cpu, on_gpu = case.load(), case.load(device_map="cuda")
    assert on_gpu.device.type == "cuda"
    expected = on_cpu.state_dict()
    for name, tensor in on_gpu.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    on_gpu.save_pretrained(tmp_path)
    saved, there = read_tensors(tmp_path), read_tensors(case.marlin)
    assert saved.keys() == there.keys()
    assert all(torch.equal(saved[name], there[name]) for name in there)


@pytest.mark.parametrize("architecture", ["unaligned", "qwen2 tied", "mixtral"])
def test_generates_the_dense_model_s_tokens(make_case: MakeCase, prompt: torch.Tensor, architecture: str) -> None:
    case, tokens = make_case(architecture), prompt[:1].cuda()
    model, dense = case.load(device_map="cuda"), case.load_dense(device_map="cuda")
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    assert torch.equal(found, dense.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY))
    assert torch.equal(found, model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY))


@pytest.mark.filterwarnings("default")  # torch.compile warns of its own old parts
@pytest.mark.parametrize("architecture", ["unaligned", "mixtral"])
def test_compiles_with_the_default_backend(make_case: MakeCase, prompt: torch.Tensor, architecture: str) -> None:
    model = make_case(architecture).load(device_map="cuda")
    expected = logits(model, prompt)
    compiled = torch.compile(model, fullgraph=True)
    assert (logits(compiled, prompt) - expected).abs().max() < 0.02 * expected.std()


@pytest.mark.filterwarnings("default")  # torch.compile warns of its own old parts
@pytest.mark.parametrize("architecture", ["unaligned", "mixtral"])
def test_generates_with_a_static_cache_which_compiles_with_cuda_graphs(
    make_case: MakeCase, prompt: torch.Tensor, architecture: str
) -> None:
    model, tokens = make_case(architecture).load(device_map="cuda"), prompt[:1].cuda()
    options = {**GREEDY, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)


def test_layers_can_be_left_on_the_cpu(make_case: MakeCase, prompt: torch.Tensor) -> None:
    """What is offloaded is computed on the GPU all the same: accelerate brings it there."""
    case = make_case("unaligned")
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), 0)
    model = case.load(device_map={**places, "model.rotary_emb": 0, "model.layers.1": "cpu"})
    assert torch.equal(logits(model, prompt), logits(case.load(device_map="cuda"), prompt))


def test_the_real_model_writes_the_dense_model_s_64_tokens(shared_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from awq2marlin import convert
    from tests.integrations.transformers.checkpoints import write_dense

    awq = shared_dir / "models" / "smollm2-135m-awq-g64"
    convert(awq, tmp_path / "marlin", verify="none")
    case = Case(awq, tmp_path / "marlin", write_dense(tmp_path / "dense", awq))
    tokens = AutoTokenizer.from_pretrained(awq)("The sky is blue because", return_tensors="pt").to("cuda")
    options = {"max_new_tokens": 64, "do_sample": False}
    found = case.load(device_map="cuda").generate(**tokens, **options)
    assert torch.equal(found, case.load_dense(device_map="cuda").generate(**tokens, **options))
