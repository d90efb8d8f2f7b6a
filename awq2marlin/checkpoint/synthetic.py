"""Making AWQ checkpoints of random weights, for the demo, the tests and the benchmarks.

The files are real in every respect but what the model would say: headers, packing order, config, index.
Written tensor by tensor, so that a large one needs no memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME
from awq2marlin.io.safetensors import DTYPE_BITS, LENGTH_BYTES
from awq2marlin.layout.marlin import num_groups
from awq2marlin.layout.modules import QUANTIZED_PARTS, module_name
from awq2marlin.layout.packing import pack_factor

_WRITE_BYTES = 1 << 24


@dataclass(frozen=True)
class Recipe:
    """What a synthetic checkpoint consists of.

    Attributes:
        modules: (K, N) of each quantized module, by name.
        weights: shape of each full-precision tensor, by full name.
        bits: 4 or 8.
        group_size: rows of K that share scales; -1 for all.
        scale_dtype: ``F16`` or ``BF16``.
        weight_dtype: data type of the full-precision tensors.
        has_qzeros: whether modules have zero points.
        zero_point: what the config says; None follows ``has_qzeros``.
        shards: how many files; 1 writes no index.
        seed: of the random values.
        config: further keys of ``config.json``.
    """

    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "F16"
    weight_dtype: str = "F16"
    has_qzeros: bool = True
    zero_point: bool | None = None
    shards: int = 1
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of every tensor, by name, sorted."""
        factor = pack_factor(self.bits)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for module, (size_k, size_n) in self.modules.items():
            groups = num_groups(size_k, self.group_size)
            shapes = {
                "qweight": (size_k, size_n // factor),
                "qzeros": (groups, size_n // factor),
                "scales": (groups, size_n),
            }
            for part in QUANTIZED_PARTS:
                if part != "qzeros" or self.has_qzeros:
                    dtype = self.scale_dtype if part == "scales" else "I32"
                    tensors[module_name(module, part)] = (dtype, shapes[part])
        for name, shape in self.weights.items():
            tensors[name] = (self.weight_dtype, shape)
        return dict(sorted(tensors.items()))


def llama_recipe(hidden: int, intermediate: int, layers: int, kv_size: int, vocab: int, **options: Any) -> Recipe:
    """Returns the recipe of a Llama.

    Args:
        hidden: size of the residual stream.
        intermediate: size inside the MLP.
        layers: how many.
        kv_size: out features of the key and value projections.
        vocab: rows of the embeddings.
        **options: further attributes of `Recipe`.
    """
    modules, weights = {}, {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    weights_1d = {"model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, size_n in (
            ("q_proj", hidden),
            ("k_proj", kv_size),
            ("v_proj", kv_size),
            ("o_proj", hidden),
        ):
            modules[f"{prefix}.self_attn.{name}"] = (hidden, size_n)
        modules[f"{prefix}.mlp.gate_proj"] = modules[f"{prefix}.mlp.up_proj"] = (hidden, intermediate)
        modules[f"{prefix}.mlp.down_proj"] = (intermediate, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights_1d[f"{prefix}.{norm}.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    return Recipe(
        modules=modules,
        weights={**weights, **weights_1d},
        config={**config, **options.pop("config", {})},
        **options,
    )


def write_checkpoint(folder: Path, recipe: Recipe) -> None:
    """Writes an AWQ checkpoint.

    Args:
        folder: created if needed; files in it are replaced.
        recipe: what it consists of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64(recipe.seed))
    tensors = recipe.tensors()
    if recipe.shards == 1:
        _write_shard(folder / "model.safetensors", tensors, rng)
    else:
        weight_map = _spread(tensors, recipe.shards)
        for shard in sorted(set(weight_map.values())):
            _write_shard(folder / shard, {name: tensors[name] for name in tensors if weight_map[name] == shard}, rng)
        total = sum(_size(*tensor) for tensor in tensors.values())
        _write_json(folder / INDEX_FILENAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / CONFIG_FILENAME, _config(recipe))
    _write_json(folder / "generation_config.json", {"do_sample": False})
    (folder / "README.md").write_text(
        "# A synthetic AWQ checkpoint\n\nRandom weights; it says nothing sensible.\n", "utf-8"
    )


def _config(recipe: Recipe) -> dict[str, Any]:
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "zero_point": recipe.has_qzeros if recipe.zero_point is None else recipe.zero_point,
        "modules_to_not_convert": None,
    }
    return {**recipe.config, "quantization_config": quantization}


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _spread(tensors: Mapping[str, tuple[str, tuple[int, ...]]], shards: int) -> dict[str, str]:
    """Cuts the sorted tensors into files of about equal size; modules may fall apart, as they do in life."""
    total = sum(_size(*tensor) for tensor in tensors.values())
    weight_map, done = {}, 0
    for name, tensor in tensors.items():
        number = min(done * shards // max(total, 1), shards - 1) + 1
        weight_map[name] = f"model-{number:05d}-of-{shards:05d}.safetensors"
        done += _size(*tensor)
    return weight_map


def _write_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + _size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for dtype, shape in tensors.values():
            _write_tensor(stream, dtype, math.prod(shape), rng)


def _write_tensor(stream: BinaryIO, dtype: str, elements: int, rng: np.random.Generator) -> None:
    for count in _chunks(elements):
        stream.write(_random(dtype, count, rng))


def _chunks(elements: int) -> Iterator[int]:
    for done in range(0, elements, _WRITE_BYTES):
        yield min(_WRITE_BYTES, elements - done)


def _random(dtype: str, count: int, rng: np.random.Generator) -> bytes:
    """Returns random elements: words with all their bits random, positive scales and weights around zero."""
    if dtype == "I32":
        return rng.integers(0, 1 << 32, count, np.uint32).tobytes()
    values = rng.random(count, np.float32) * np.float32(0.02) + np.float32(0.001)
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
