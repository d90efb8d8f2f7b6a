"""The inventory of a converted checkpoint: its modules with their sizes, and everything that is missing or wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import convert
from awq2marlin.checkpoint.converted import converted_modules
from awq2marlin.checkpoint.opening import Checkpoint, open_checkpoint
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.errors import CheckpointError

LAYER = "model.layers.0"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Converts a model of one layer whose attention is unaligned."""

    def make(unaligned: Any = "keep") -> Checkpoint:
        write_checkpoint(tmp_path / "awq", llama_recipe(192, 256, 1, 96, 32, group_size=64))
        convert(tmp_path / "awq", tmp_path / "marlin", unaligned=unaligned, verify="none")
        return open_checkpoint(tmp_path / "marlin")

    return make


def modules_of(checkpoint: Checkpoint, without: tuple[str, ...] = (), **changes: Any) -> Any:
    quantization = checkpoint.quantization
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in without}
    tensors |= {name: replace(tensors[name], **change) for name, change in changes.pop("tensors", {}).items()}
    return converted_modules(checkpoint.format, tensors, replace(quantization, **changes), checkpoint.shard_of)


def problems_of(checkpoint: Checkpoint, *arguments: Any, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        modules_of(checkpoint, *arguments, **changes)
    return [(problem.tensor, problem.code) for problem in caught.value.problems]


def test_tells_layout_and_sizes_of_every_module(checkpoint: Callable[..., Checkpoint]) -> None:
    modules = modules_of(checkpoint())
    assert list(modules) == sorted(modules)
    assert len(modules) == 7
    kept, converted = modules[f"{LAYER}.self_attn.k_proj"], modules[f"{LAYER}.mlp.down_proj"]
    assert (kept.converted, kept.size_k, kept.size_n, kept.is_padded) == (False, 192, 96, False)
    assert (converted.converted, converted.size_k, converted.size_n) == (True, 256, 192)
    assert converted.parts == ("qweight", "qzeros", "scales")


def test_tells_true_and_padded_sizes(checkpoint: Callable[..., Checkpoint]) -> None:
    module = modules_of(checkpoint("pad"))[f"{LAYER}.self_attn.k_proj"]
    assert module.converted
    assert module.is_padded
    assert (module.size_k, module.size_n, module.padded_k, module.padded_n) == (192, 96, 192, 128)


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.q_proj"], ids=["marlin", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_names_a_missing_part(checkpoint: Callable[..., Checkpoint], module: str, part: str) -> None:
    name = f"{LAYER}.{module}.{part}"
    assert (name, "missing-tensor") in problems_of(checkpoint(), (name,))


def test_names_everything_that_is_missing_at_once(checkpoint: Callable[..., Checkpoint]) -> None:
    missing = (f"{LAYER}.mlp.up_proj.scales", f"{LAYER}.mlp.down_proj.qzeros", "model.embed_tokens.weight")
    found = problems_of(checkpoint(), missing)
    assert sorted(found) == sorted((name, "missing-tensor") for name in missing)


def test_names_a_listed_module_that_is_not_there(checkpoint: Callable[..., Checkpoint]) -> None:
    opened = checkpoint()
    kept = frozenset({*opened.quantization.awq_modules, "model.gone"})  # type: ignore[union-attr]
    assert problems_of(opened, awq_modules=kept) == [("model.gone.qweight", "missing-tensor")]


WRONG = [
    ("mlp.up_proj.scales", {"shape": (2, 256)}, "wrong-shape"),
    ("mlp.up_proj.qzeros", {"shape": (3, 16)}, "wrong-shape"),
    ("mlp.up_proj.scales", {"dtype": "F32"}, "wrong-dtype"),
    ("mlp.up_proj.qweight", {"dtype": "F16"}, "wrong-dtype"),
    ("mlp.up_proj.qweight", {"shape": (12, 500)}, "wrong-shape"),
    ("mlp.up_proj.qweight", {"shape": (6144,)}, "wrong-shape"),
    ("mlp.up_proj.qweight", {"shape": (0, 512)}, "wrong-shape"),
    ("self_attn.q_proj.scales", {"shape": (3, 64)}, "contradiction"),
]


@pytest.mark.parametrize(("name", "change", "code"), WRONG)
def test_names_a_tensor_of_another_shape_or_type(
    checkpoint: Callable[..., Checkpoint], name: str, change: dict[str, Any], code: str
) -> None:
    assert (f"{LAYER}.{name}", code) in problems_of(checkpoint(), tensors={f"{LAYER}.{name}": change})


def test_says_why_a_weight_holds_no_whole_columns(checkpoint: Callable[..., Checkpoint]) -> None:
    name = f"{LAYER}.mlp.up_proj.qweight"
    with pytest.raises(CheckpointError, match="a row of 513 words does not hold whole columns"):
        modules_of(checkpoint(), tensors={name: {"shape": (12, 513)}})


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.q_proj"], ids=["marlin", "awq"])
@pytest.mark.parametrize("part", ["weight", "g_idx"])
def test_refuses_what_a_quantized_module_must_not_have(
    checkpoint: Callable[..., Checkpoint], module: str, part: str
) -> None:
    opened, name = checkpoint(), f"{LAYER}.{module}.{part}"
    opened.tensors[name] = replace(opened.tensors[f"{LAYER}.{module}.qweight"], name=name)
    opened.shard_of[name] = "model.safetensors"
    ((found, code),) = problems_of(opened)
    assert found == name
    assert code in ("contradiction", "foreign-format")


def test_scales_alone_belong_to_no_module(checkpoint: Callable[..., Checkpoint]) -> None:
    opened = checkpoint()
    scales = replace(opened.tensors[f"{LAYER}.mlp.up_proj.scales"], name="act.scales", shape=(64,))
    opened.tensors["act.scales"] = scales
    assert "act" not in modules_of(opened)


def test_refuses_a_padding_that_no_conversion_makes(checkpoint: Callable[..., Checkpoint]) -> None:
    opened = checkpoint("pad")
    padded = {**opened.quantization.padded_modules, f"{LAYER}.self_attn.k_proj": (192, 200)}  # type: ignore[union-attr]
    assert problems_of(opened, padded_modules=padded) == [(f"{LAYER}.self_attn.k_proj.qweight", "wrong-shape")]
