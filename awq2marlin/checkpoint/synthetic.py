"""Making checkpoints of random weights, for the demo, the tests and the benchmarks.

The files are real in every respect but what the model would say: headers, packing order, config, index.
Written tensor by tensor, so that a large one needs no memory.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from awq2marlin.formats.awq import Awq
from awq2marlin.formats.awq_gemv import AwqGemv
from awq2marlin.formats.awq_gemv_fast import AwqGemvFast
from awq2marlin.formats.awq_marlin import AwqMarlin
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME
from awq2marlin.io.safetensors import DTYPE_BITS, LENGTH_BYTES
from awq2marlin.layout.marlin import num_groups
from awq2marlin.layout.modules import module_name
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import PartLayout, Repack
from awq2marlin.layout.scheme import Scheme

_WRITE_BYTES = 1 << 24


@dataclass(frozen=True)
class Recipe:
    """What a synthetic checkpoint consists of; this one is of AWQ.

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

    #: What its README.md calls the format.
    title: ClassVar[str] = "AWQ"

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of every tensor, by name, sorted."""
        tensors = {name: (self.weight_dtype, shape) for name, shape in self.weights.items()}
        for module, (size_k, size_n) in self.modules.items():
            for suffix, tensor in self.module_tensors(size_k, size_n).items():
                tensors[module_name(module, suffix)] = tensor
        return dict(sorted(tensors.items()))

    def module_tensors(self, size_k: int, size_n: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of a module's tensors, by the last component of their names."""
        factor, groups = pack_factor(self.bits), num_groups(size_k, self.group_size)
        tensors = {
            "qweight": ("I32", (size_k, size_n // factor)),
            "qzeros": ("I32", (groups, size_n // factor)),
            "scales": (self.scale_dtype, (groups, size_n)),
        }
        return {name: tensor for name, tensor in tensors.items() if name != "qzeros" or self.has_qzeros}

    def fixed(self, name: str) -> bytes | None:  # noqa: ARG002
        """Returns the contents of a tensor that is not random; None for all others."""
        return None

    def quantization(self) -> dict[str, Any]:
        """Returns the quantization config."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.has_qzeros if self.zero_point is None else self.zero_point,
            "modules_to_not_convert": None,
        }


@dataclass(frozen=True)
class CompressedTensorsRecipe(Recipe):
    """A checkpoint of compressed-tensors, "pack-quantized": N first; without ``has_qzeros`` it is symmetric.

    K and N are multiples of the values in a word, so that no word has a field to spare.
    """

    title: ClassVar[str] = "compressed-tensors"

    def module_tensors(self, size_k: int, size_n: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of a module's tensors, by the last component of their names."""
        factor, groups = pack_factor(self.bits), num_groups(size_k, self.group_size)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (size_n, size_k // factor)),
            "weight_scale": (self.scale_dtype, (size_n, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if self.has_qzeros:
            tensors["weight_zero_point"] = ("I32", (size_n // factor, groups))
        return tensors

    def fixed(self, name: str) -> bytes | None:
        """Returns what ``weight_shape`` holds: N and K."""
        module, _, suffix = name.rpartition(".")
        if suffix != "weight_shape":
            return None
        size_k, size_n = self.modules[module]
        return np.array([size_n, size_k], "<i8").tobytes()

    def quantization(self) -> dict[str, Any]:
        """Returns the quantization config, as compressed-tensors 0.20 writes it."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": not self.has_qzeros,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "dynamic": False,
            "actorder": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        }


@dataclass(frozen=True)
class GptqRecipe(Recipe):
    """A checkpoint of GPTQ's first version as GPTQModel writes it; without ``has_qzeros`` it is symmetric."""

    title: ClassVar[str] = "GPTQ"

    def module_tensors(self, size_k: int, size_n: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of a module's tensors, by the last component of their names."""
        factor, groups = pack_factor(self.bits), num_groups(size_k, self.group_size)
        return {
            "qweight": ("I32", (size_k // factor, size_n)),
            "qzeros": ("I32", (groups, size_n // factor)),
            "scales": (self.scale_dtype, (groups, size_n)),
            "g_idx": ("I32", (size_k,)),
        }

    def fixed(self, name: str) -> bytes | None:
        """Returns the group of every row; and zero points of a symmetric checkpoint, stored as 2^(b-1) - 1."""
        module, _, suffix = name.rpartition(".")
        if module not in self.modules:
            return None
        size_k, size_n = self.modules[module]
        groups = num_groups(size_k, self.group_size)
        if suffix == "g_idx":
            return (np.arange(size_k, dtype="<i4") // -(-size_k // groups)).astype("<i4").tobytes()
        if suffix == "qzeros" and not self.has_qzeros:
            return bytes([0x77 if self.bits == 4 else 0x7F]) * (groups * size_n * self.bits // 8)
        return None

    def quantization(self) -> dict[str, Any]:
        """Returns the quantization config, as GPTQModel 7.7 writes it, as far as it is read."""
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": not self.has_qzeros,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        }


@dataclass(frozen=True)
class AwqMarlinRecipe(Recipe):
    """A checkpoint of AWQ, version "marlin": 4 bits without zero points."""

    has_qzeros: bool = False

    format: ClassVar[Awq] = AwqMarlin()
    title: ClassVar[str] = format.title

    @property
    def scheme(self) -> Scheme:
        """Bits, groups and zero points."""
        return Scheme(self.bits, self.group_size, self.has_qzeros)

    def module_tensors(self, size_k: int, size_n: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns data type and shape of a module's tensors, by the last component of their names."""
        return {
            suffix: (self.format.dtypes[part][0], self.format.shape(part, size_k, size_n, self.scheme))
            for part, suffix in self.format.suffixes.items()
        }

    def quantization(self) -> dict[str, Any]:
        """Returns the quantization config, as AutoAWQ 0.2.9 writes it."""
        said = {"version": self.format.versions[0], "zero_point": "qzeros" in self.format.suffixes}
        return {**super().quantization(), **said}


@dataclass(frozen=True)
class AwqGemvRecipe(AwqMarlinRecipe):
    """A checkpoint of AWQ, version "gemv": 4 bits with zero points; what is past the last group is zero."""

    has_qzeros: bool = True

    format: ClassVar[Awq] = AwqGemv()
    title: ClassVar[str] = format.title

    def fixed(self, name: str) -> bytes | None:
        """Returns zero points and scales that are random as far as there are groups, and fit each other."""
        module, _, part = name.rpartition(".")
        if part not in ("qzeros", "scales") or module not in self.modules:
            return None
        size_k, size_n = self.modules[module]
        groups = num_groups(size_k, self.group_size)
        rng = np.random.default_rng([self.seed, zlib.crc32(module.encode())])
        scales = (rng.random((groups, size_n), np.float32) / 50 + np.float32(0.001)).astype(np.float16).view(np.uint16)
        words = rng.integers(0, 1 << 32, (groups, size_n // pack_factor(self.bits)), np.uint32)
        layout = self.format.layout(part, size_k, size_n, self.scheme).beside(scales)
        made = np.empty(layout.size, np.uint8)
        plain = scales if part == "scales" else words
        Repack(PartLayout(part, self.bits, groups, size_n), layout).rewrite(plain.reshape(-1).view(np.uint8), made)
        return made.tobytes()


@dataclass(frozen=True)
class AwqGemvFastRecipe(AwqGemvRecipe):
    """A checkpoint of AWQ, version "gemv_fast": as "gemv", with zero points that are products with the scales."""

    format: ClassVar[Awq] = AwqGemvFast()
    title: ClassVar[str] = format.title


def llama_recipe(
    hidden: int,
    intermediate: int,
    layers: int,
    kv_size: int,
    vocab: int,
    kind: type[Recipe] = Recipe,
    **options: Any,
) -> Recipe:
    """Returns the recipe of a Llama.

    Args:
        hidden: size of the residual stream.
        intermediate: size inside the MLP.
        layers: how many.
        kv_size: out features of the key and value projections.
        vocab: rows of the embeddings.
        kind: of which format.
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
    return kind(
        modules=modules,
        weights={**weights, **weights_1d},
        config={**config, **options.pop("config", {})},
        **options,
    )


def write_checkpoint(folder: Path, recipe: Recipe) -> None:
    """Writes a checkpoint.

    Args:
        folder: created if needed; files in it are replaced.
        recipe: what it consists of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64(recipe.seed))
    tensors = recipe.tensors()
    if recipe.shards == 1:
        _write_shard(folder / "model.safetensors", tensors, recipe, rng)
    else:
        weight_map = _spread(tensors, recipe.shards)
        for shard in sorted(set(weight_map.values())):
            mine = {name: tensors[name] for name in tensors if weight_map[name] == shard}
            _write_shard(folder / shard, mine, recipe, rng)
        total = sum(_size(*tensor) for tensor in tensors.values())
        _write_json(folder / INDEX_FILENAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / CONFIG_FILENAME, {**recipe.config, "quantization_config": recipe.quantization()})
    _write_json(folder / "generation_config.json", {"do_sample": False})
    (folder / "README.md").write_text(
        f"# A synthetic {recipe.title} checkpoint\n\nRandom weights; it says nothing sensible.\n", "utf-8"
    )


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


def _write_shard(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], recipe: Recipe, rng: np.random.Generator
) -> None:
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
        for name, (dtype, shape) in tensors.items():
            fixed = recipe.fixed(name)
            if fixed is not None:
                stream.write(fixed)
            else:
                _write_tensor(stream, dtype, math.prod(shape), rng)


def _write_tensor(stream: BinaryIO, dtype: str, elements: int, rng: np.random.Generator) -> None:
    for count in _chunks(elements):
        stream.write(_random(dtype, count, rng))


def _chunks(elements: int) -> Iterator[int]:
    for done in range(0, elements, _WRITE_BYTES):
        yield min(_WRITE_BYTES, elements - done)


def _random(dtype: str, count: int, rng: np.random.Generator) -> bytes:
    """Returns random elements: words with all their bits random, positive scales and weights around zero."""
    if dtype in ("I16", "I32"):
        return rng.integers(0, 1 << DTYPE_BITS[dtype], count, np.uint32).astype(f"u{DTYPE_BITS[dtype] // 8}").tobytes()
    values = rng.random(count, np.float32) * np.float32(0.02) + np.float32(0.001)
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
