"""Quantized modules: what their tensors are called, how they are shaped, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from awq2marlin.layout.marlin import is_single_group, num_groups, qweight_shape
from awq2marlin.layout.repack import Repack

#: The tensors that make a quantized module, by the last component of their names.
QUANTIZED_PARTS = ("qweight", "qzeros", "scales")

#: Last name components that mark the output embedding, which is never converted.
OUTPUT_EMBEDDING_NAMES = frozenset({"lm_head", "output", "embed_out"})

#: Data types of scales that Marlin kernels take.
SCALE_DTYPES = ("F16", "BF16")


def is_output_embedding(module: str) -> bool:
    """Returns whether the module's last name component marks the output embedding."""
    return module.rpartition(".")[2] in OUTPUT_EMBEDDING_NAMES


def module_name(module: str, part: str) -> str:
    """Returns the name of a module's tensor, e.g. ``model.layers.0.mlp.up_proj.qweight``."""
    return f"{module}.{part}" if module else part


@dataclass(frozen=True)
class AwqModule:
    """A quantized module of an AWQ checkpoint.

    Attributes:
        name: full name.
        size_k: in features K.
        size_n: out features N.
        parts: which of ``qweight``, ``qzeros``, ``scales`` it has.
    """

    name: str
    size_k: int
    size_n: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one quantized module.

    Attributes:
        name: full name.
        size_k: in features K.
        size_n: out features N.
        padded_k: K in the output; K unless padded.
        padded_n: N in the output; N unless padded.
        parts: which of ``qweight``, ``qzeros``, ``scales`` it has.
        converted: whether it becomes Marlin; otherwise it is kept in AWQ layout.
        reason: why it is kept, in words; empty for a converted module.
    """

    name: str
    size_k: int
    size_n: int
    padded_k: int
    padded_n: int
    parts: tuple[str, ...]
    converted: bool
    reason: str = ""

    @property
    def is_padded(self) -> bool:
        """Whether the output is larger than the source."""
        return (self.padded_k, self.padded_n) != (self.size_k, self.size_n)


def planned_module(module: AwqModule, reason: str = "") -> ModulePlan:
    """Returns the plan of a module that is not padded.

    Args:
        module: of an AWQ checkpoint.
        reason: why it is kept in AWQ layout; empty if it is converted.
    """
    return ModulePlan(
        module.name,
        module.size_k,
        module.size_n,
        module.size_k,
        module.size_n,
        module.parts,
        converted=not reason,
        reason=reason,
    )


def repack_of(module: ModulePlan, part: str, quantization: Any) -> Repack:
    """Returns how one tensor of a converted module is repacked.

    Args:
        module: the module, with its true and padded sizes.
        part: ``qweight``, ``qzeros`` or ``scales``.
        quantization: for bits and group size.
    """
    groups = num_groups(module.size_k, quantization.group_size)
    source_rows = module.size_k if part == "qweight" else groups
    shape = target_shape(module, part, quantization)
    single = is_single_group(module.padded_k, quantization.group_size)
    return Repack(part, quantization.bits, source_rows, shape[0], module.size_n, module.padded_n, single)  # type: ignore[arg-type]


def target_shape(module: ModulePlan, part: str, quantization: Any) -> tuple[int, int]:
    """Returns the shape of one tensor of a converted module in the output."""
    groups = num_groups(module.padded_k, quantization.group_size)
    if part == "qweight":
        return qweight_shape(module.padded_k, module.padded_n, quantization.bits)
    return (groups, module.padded_n if part == "scales" else module.padded_n * quantization.bits // 32)
