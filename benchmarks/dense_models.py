"""The dense checkpoint that an AWQ one means: the reference where an engine cannot load the AWQ one itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from awq2marlin.layout.reference import unpack_awq

PARTS = ("qweight", "qzeros", "scales")


def dequantize(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint in which every AWQ module is an ordinary linear layer.

    Args:
        source: the AWQ checkpoint.
        target: the folder to be made; it gets one file of weights.
        dtype: of all weights; in fp32 they are exact.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    bits = config.pop("quantization_config")["bits"]
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    dense = {name: tensor.to(dtype) for name, tensor in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            dense[f"{module}.weight"] = dense_weight(tensors, module, bits).to(dtype)
    target.mkdir()
    save_file(dense, target / "model.safetensors", {"format": "pt"})
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the name that older versions know too
    (target / "config.json").write_text(json.dumps(config), "utf-8")


def dense_weight(tensors: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """Returns what a module's AWQ tensors mean, fp32 [N, K]."""

    def unpacked(part: str) -> np.ndarray:
        return unpack_awq(tensors[f"{module}.{part}"].numpy().view(np.uint32), bits).astype(np.float32)

    q, scales = unpacked("qweight"), tensors[f"{module}.scales"].float().numpy()  # [K, N], [G, N]
    has_zeros = f"{module}.qzeros" in tensors
    zeros = unpacked("qzeros") if has_zeros else np.full(scales.shape, 2.0 ** (bits - 1), np.float32)
    rows = len(q) // len(scales)
    return torch.from_numpy(np.ascontiguousarray(((q - zeros.repeat(rows, 0)) * scales.repeat(rows, 0)).T))
