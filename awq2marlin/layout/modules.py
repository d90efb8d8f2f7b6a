"""Quantized modules: what their parts are called, how they are shaped, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from awq2marlin.layout.scheme import Scheme

#: The parts of a quantized module: its codes q [K, N], zero points z [G, N] and scales s [G, N]. AWQ and Marlin call
#: the tensors that hold them so, and so does this package, whatever the format.
QUANTIZED_PARTS = ("qweight", "qzeros", "scales")

#: What to do with modules whose shapes the target's layout cannot take.
Unaligned = Literal["keep", "pad", "error"]
UNALIGNED_CHOICES: tuple[Unaligned, ...] = get_args(Unaligned)
#: What is done unless another way is asked for.
DEFAULT_UNALIGNED: Unaligned = "keep"

#: Last name components that mark the output embedding, which is never converted.
OUTPUT_EMBEDDING_NAMES = frozenset({"lm_head", "output", "embed_out"})
#: Parents of which ``output`` is the whole model's. What a layer or an encoder calls its output is no embedding; it is
#: not converted either, because the format's rule goes by the last component alone.
_PARENTS_OF_OUTPUT = frozenset({"", "model", "language_model"})

#: Data types of scales that Marlin kernels take.
SCALE_DTYPES = ("F16", "BF16")

#: Bytes of one scale, fp16 or bf16.
SCALE_BYTES = 2


def is_output_embedding(module: str) -> bool:
    """Returns whether the module's last name component marks the output embedding."""
    return module.rpartition(".")[2] in OUTPUT_EMBEDDING_NAMES


def is_models_output_embedding(module: str) -> bool:
    """Returns whether a module is the output embedding of the whole model, not only named like one."""
    parent, _, name = module.rpartition(".")
    return is_output_embedding(module) and (name != "output" or parent in _PARENTS_OF_OUTPUT)


def module_name(module: str, part: str) -> str:
    """Returns the name of a module's tensor, e.g. ``model.layers.0.mlp.up_proj.qweight``."""
    return f"{module}.{part}" if module else part


def part_shape(part: str, size_k: int, size_n: int, scheme: Scheme, *, tile: int = 1) -> tuple[int, int]:
    """Returns the shape of one tensor of a module whose rows go along K: the one place that knows.

    Args:
        part: ``qweight``, ``qzeros`` or ``scales``.
        size_k: in features K, padding included.
        size_n: out features N, padding included.
        scheme: bits and group size.
        tile: rows of K in one row of ``qweight``: 16 in Marlin layout, 1 in AWQ's.

    Returns:
        [K / tile, N * tile / f], [G, N / f] or [G, N]; f values fill a word of int32.
    """
    if part == "qweight":
        return size_k // tile, size_n * tile // scheme.pack_factor
    groups = scheme.num_groups(size_k)
    return groups, size_n if part == "scales" else size_n // scheme.pack_factor


@dataclass(frozen=True, slots=True)
class Linear:
    """A quantized module, as the tensors of a file show it.

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


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What becomes of one quantized module.

    Attributes:
        name: full name.
        size_k: in features K.
        size_n: out features N.
        padded_k: K in the output; K unless padded.
        padded_n: N in the output; N unless padded.
        parts: which of ``qweight``, ``qzeros``, ``scales`` it has.
        converted: whether it takes the layout of the output's format; otherwise it is kept in AWQ layout.
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

    @classmethod
    def of(cls, module: Linear, reason: str = "", padded: tuple[int, int] | None = None) -> ModulePlan:
        """Returns what becomes of a module.

        Args:
            module: as it was found.
            reason: why it is kept; empty if it is converted.
            padded: (K, N) in the output; None if it is not padded.
        """
        padded_k, padded_n = padded or (module.size_k, module.size_n)
        return cls(module.name, module.size_k, module.size_n, padded_k, padded_n, module.parts, not reason, reason)

    @property
    def is_padded(self) -> bool:
        """Whether the output is larger than the source."""
        return (self.padded_k, self.padded_n) != (self.size_k, self.size_n)
