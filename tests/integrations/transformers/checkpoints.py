"""Small models of real architectures, quantized to AWQ, and the dense model that their AWQ tensors mean.

Nothing here uses the package's code for layouts: packing and dequantizing are plain NumPy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
PARTS = ("qweight", "qzeros", "scales")
INDEX = "model.safetensors.index.json"

#: Linear layers that AWQ tools quantize, by the last component of their names.
QUANTIZED = re.compile(r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj|w[123])\.weight$")


@dataclass(frozen=True)
class Format:
    """How a model is quantized and stored."""

    bits: int = 4
    group_size: int = 64
    zero_point: bool = True
    scales: torch.dtype = torch.float16
    others: torch.dtype = torch.float16
    shards: int = 1


def pack(values: np.ndarray, bits: int) -> torch.Tensor:
    """[R, N] below 2^bits to AWQ words, int32 [R, N/f]."""
    order = ORDER[bits]
    words = np.zeros((values.shape[0], values.shape[1] // len(order)), np.uint32)
    for field, column in enumerate(order):
        words |= values[:, column :: len(order)].astype(np.uint32) << np.uint32(bits * field)
    return torch.from_numpy(words.view(np.int32))


def unpack(words: torch.Tensor, bits: int) -> np.ndarray:
    """Undoes `pack`."""
    order, array = ORDER[bits], words.numpy().view(np.uint32)
    values = np.zeros((array.shape[0], array.shape[1] * len(order)), np.int32)
    for field, column in enumerate(order):
        values[:, column :: len(order)] = (array >> np.uint32(bits * field)) & np.uint32(2**bits - 1)
    return values


def quantize(weight: torch.Tensor, form: Format) -> dict[str, torch.Tensor]:
    """A dense weight [N, K] to AWQ tensors, rounded to the nearest."""
    w = weight.double().numpy().T
    size_k, size_n = w.shape
    rows = size_k if form.group_size == -1 else form.group_size
    groups = w.reshape(-1, rows, size_n)
    top = 2**form.bits - 1
    if form.zero_point:
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        steps = (high - low) / top
        zeros = np.rint(-low / steps).clip(0, top).astype(np.int64)
    else:
        steps = np.abs(groups).max(1) / (2 ** (form.bits - 1) - 1)
        zeros = np.full(steps.shape, 2 ** (form.bits - 1))
    scales = torch.from_numpy(steps).to(form.scales)
    q = np.rint(groups / scales.double().numpy()[:, None]) + zeros[:, None]
    parts = {"qweight": pack(q.clip(0, top).reshape(size_k, size_n), form.bits), "scales": scales}
    return {**parts, "qzeros": pack(zeros, form.bits)} if form.zero_point else parts


def dequantize(tensors: Mapping[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """The dense weight [N, K] that AWQ tensors mean, exact in fp32."""
    q, scales = unpack(tensors[f"{module}.qweight"], bits), tensors[f"{module}.scales"].float().numpy()
    if f"{module}.qzeros" in tensors:
        zeros = unpack(tensors[f"{module}.qzeros"], bits)
    else:
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    rows = len(q) // len(scales)
    weight = (q - zeros.repeat(rows, 0)).astype(np.float32) * scales.repeat(rows, 0)
    return torch.from_numpy(np.ascontiguousarray(weight.T))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], shards: int = 1
) -> Path:
    """A checkpoint of these tensors, in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]  # modules fall apart, as they do in life
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(document), "utf-8")
    return folder


def write_awq(folder: Path, config: Any, form: Format, seed: int = 0) -> Path:
    """A random model of an architecture, quantized."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder.with_name(folder.name + "-plain"))  # under the names that files have
    plain = read_tensors(folder.with_name(folder.name + "-plain"))
    tensors = {}
    for name, tensor in plain.items():
        if QUANTIZED.search(name):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": value for part, value in quantize(tensor, form).items()}
        else:
            tensors[name] = tensor.to(form.others)
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": form.bits,
        "group_size": form.group_size,
        "zero_point": form.zero_point,
        "modules_to_not_convert": None,
    }
    document = {**config.to_dict(), "architectures": [type(model).__name__], "quantization_config": quantization}
    document["dtype"] = str(form.others).removeprefix("torch.")
    return write_tensors(folder, tensors, document, form.shards)


def write_dense(folder: Path, awq: Path) -> Path:
    """The dense checkpoint, fp32, that an AWQ one means."""
    tensors, config = read_tensors(awq), json.loads((awq / "config.json").read_text("utf-8"))
    quantization = config.pop("quantization_config")
    dense = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for module in quantized_modules(tensors):
        dense[f"{module}.weight"] = dequantize(tensors, module, quantization["bits"])
    return write_tensors(folder, dense, {**config, "dtype": "float32"})


def quantized_modules(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The names of the quantized modules."""
    return (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
