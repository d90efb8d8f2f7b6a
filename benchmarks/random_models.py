"""Quantized models of random weights that say something: AWQ, GPTQ, AutoRound or compressed-tensors.

Weights are centred and of the usual size, and the output embedding is large, so that tokens differ in probability and
a wrong weight shows. Made tensor by tensor, on a GPU where there is one; no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Standard deviation of the difference of a uniform value and a zero point near the middle, by bits.
_SPREAD = {4: 4.6, 8: 73.9}


#: Formats of a model, as a table names them.
FORMATS = {"awq": "AWQ", "gptq": "GPTQ", "auto-round": "AutoRound", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True)
class Model:
    """A model to be made.

    Attributes:
        hidden: size of the residual stream.
        inner: size inside the MLP, or of an expert.
        layers: how many.
        heads: query heads.
        key_value_heads: key and value heads.
        vocabulary: rows of the embeddings.
        experts: experts of each layer, 0 for a dense model.
        top_k: experts that a token chooses; with 2 the model is a Mixtral, else a Qwen3-MoE.
        head_size: of query, key and value; 0 for ``hidden / heads``.
        biases: whether query, key and value have biases (Qwen2).
        bits: 4 or 8.
        group_size: rows that share scales, -1 for all.
        zero_points: whether modules have ``qzeros``.
        dtype: of scales and unquantized tensors.
        format: ``awq``, ``gptq`` (its first version), ``auto-round`` (its default packing) or ``compressed-tensors``;
            the second and the third without zero points only.
        quantized_head: whether the output embedding is quantized as well; in AWQ only.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    experts: int = 0
    top_k: int = 2
    head_size: int = 0
    biases: bool = False
    bits: int = 4
    group_size: int = 128
    zero_points: bool = True
    dtype: torch.dtype = torch.float16
    format: str = "awq"
    quantized_head: bool = False

    @property
    def kind(self) -> str:
        """What Transformers calls such models."""
        if self.experts:
            return "mixtral" if self.top_k == 2 else "qwen3_moe"
        return "qwen2" if self.biases else "llama"

    @property
    def head_columns(self) -> int:
        """Columns of a head."""
        return self.head_size or self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """Returns ``config.json``."""
        kind = self.kind
        name = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "qwen2": "Qwen2", "llama": "Llama"}[kind]
        config = {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_columns,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "quantization_config": self.quantization(),
        }
        if kind == "mixtral":
            config |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        if kind == "qwen3_moe":
            config |= {"num_experts": self.experts, "num_experts_per_tok": self.top_k, "norm_topk_prob": True}
            config |= {"moe_intermediate_size": self.inner, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return config

    def quantization(self) -> dict[str, Any]:
        """Returns the quantization config, with the keys that the format's own tools write and engines read."""
        if self.format == "compressed-tensors":
            scheme = {"num_bits": self.bits, "type": "int", "symmetric": not self.zero_points, "dynamic": False}
            groups = {"strategy": "group", "group_size": self.group_size, "actorder": None}
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme | groups}},
                "ignore": ["lm_head"],
            }
        if self.format == "awq":
            own = {"quant_method": "awq", "zero_point": self.zero_points, "version": "gemm"}
            own |= {"lm_head": True} if self.quantized_head else {}
        elif self.format == "gptq":
            own = {"quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
        else:
            own = {"quant_method": "auto-round", "sym": True, "data_type": "int", "autoround_version": "0.16.0"}
            own |= {"packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers"}
        return {**own, "bits": self.bits, "group_size": self.group_size}


def write_model(folder: Path, model: Model, seed: int = 1234) -> int:
    """Writes the model, one file for each layer; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    maker = _Maker(model, seed)
    weight_map, total = {}, 0
    for number, tensors in enumerate(maker.files()):
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=1))
    return total


class _Maker:
    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def files(self) -> Iterator[dict[str, torch.Tensor]]:
        model = self.model
        hidden = model.hidden
        yield {
            "model.embed_tokens.weight": self.normal(model.vocabulary, hidden, std=1.0),
            **dict(self.head()),
            "model.norm.weight": self.ones(hidden),
        }
        for layer in range(model.layers):
            yield dict(self.layer(f"model.layers.{layer}"))

    def head(self) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, vocabulary = self.model.hidden, self.model.vocabulary
        if not self.model.quantized_head:
            yield "lm_head.weight", self.normal(vocabulary, hidden, std=3 * hidden**-0.5)
            return
        for name, tensor in self.module("lm_head", hidden, vocabulary):
            yield name, 3 * tensor if name.endswith(".scales") else tensor

    def layer(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        hidden = model.hidden
        query, key_value = (model.head_columns * heads for heads in (model.heads, model.key_value_heads))
        for name, size_n in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            yield from self.module(f"{prefix}.self_attn.{name}", hidden, size_n)
            if model.biases:
                yield f"{prefix}.self_attn.{name}.bias", self.normal(size_n, std=0.5)
        yield from self.module(f"{prefix}.self_attn.o_proj", query, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", self.ones(hidden)
        if not model.experts:
            yield from self.mlp(f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"))
            return
        is_mixtral = model.kind == "mixtral"
        block, names = (
            (f"{prefix}.block_sparse_moe", ("w1", "w3", "w2"))
            if is_mixtral
            else (f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"))
        )
        if not is_mixtral:
            yield from ((f"{prefix}.self_attn.{x}_norm.weight", self.ones(model.head_columns)) for x in "qk")
        yield f"{block}.gate.weight", self.normal(model.experts, hidden, std=hidden**-0.5)
        for expert in range(model.experts):
            yield from self.mlp(f"{block}.experts.{expert}", names)

    def mlp(self, prefix: str, names: tuple[str, str, str]) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, inner = self.model.hidden, self.model.inner
        gate, up, down = names
        yield from self.module(f"{prefix}.{gate}", hidden, inner)
        yield from self.module(f"{prefix}.{up}", hidden, inner)
        yield from self.module(f"{prefix}.{down}", inner, hidden)

    def module(self, name: str, size_k: int, size_n: int) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        groups = 1 if model.group_size == -1 else size_k // model.group_size
        spread = torch.rand(groups, size_n, generator=self.generator, device=self.device) * 0.5 + 0.75
        scales = (spread / (_SPREAD[model.bits] * size_k**0.5)).to(model.dtype)
        make = {"awq": self.awq, "compressed-tensors": self.compressed_tensors}.get(model.format, self.gptq)
        yield from ((f"{name}.{part}", tensor) for part, tensor in make(size_k, size_n, scales))

    def awq(self, size_k: int, size_n: int, scales: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields words of N, and zero points likewise."""
        columns = size_n * self.model.bits // 32
        yield "qweight", self.codes(size_k, columns)
        if self.model.zero_points:
            yield "qzeros", self.zeros(len(scales), columns)
        yield "scales", scales

    def gptq(self, size_k: int, size_n: int, scales: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields words of K; the zero points in the middle are stored minus 1. AutoRound has no ``g_idx``."""
        model, groups = self.model, len(scales)
        yield "qweight", self.codes(size_k * model.bits // 32, size_n)
        stored = 2 ** (model.bits - 1) - 1
        yield "qzeros", self.words(stored, stored + 1, groups, size_n * model.bits // 32)
        yield "scales", scales
        if model.format == "gptq":
            yield "g_idx", torch.arange(size_k, dtype=torch.int32) // (size_k // groups)

    def compressed_tensors(self, size_k: int, size_n: int, scales: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields words of K, N first; words of N of the zero points."""
        yield "weight_packed", self.codes(size_n, size_k * self.model.bits // 32)
        yield "weight_scale", scales.T
        yield "weight_shape", torch.tensor([size_n, size_k])
        if self.model.zero_points:
            yield "weight_zero_point", self.zeros(size_n * self.model.bits // 32, len(scales))

    def codes(self, rows: int, columns: int) -> torch.Tensor:
        """Returns words of weights; without zero points from 1, so that the mean is the implied zero point."""
        if not self.model.zero_points:
            return self.words(1, 2**self.model.bits, rows, columns)
        shape = (rows, columns)
        return torch.randint(
            -(2**31), 2**31 - 1, shape, generator=self.generator, device=self.device, dtype=torch.int32
        )

    def zeros(self, rows: int, columns: int) -> torch.Tensor:
        """Returns words of zero points near the middle."""
        middle = 2 ** (self.model.bits - 1)
        return self.words(middle - 2, middle + 2, rows, columns)

    def words(self, low: int, high: int, rows: int, columns: int) -> torch.Tensor:
        """Returns words whose fields are drawn from ``low`` to ``high`` - 1."""
        bits = self.model.bits
        shape = (rows, columns, 32 // bits)
        fields = torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.int32)
        shifts = torch.arange(0, 32, bits, device=self.device, dtype=torch.int32)
        return (fields << shifts).sum(-1, dtype=torch.int32)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * std).to(self.model.dtype)

    def ones(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=self.model.dtype)
