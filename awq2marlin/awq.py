"""The source format: AWQ checkpoints of the "gemm" version, as facts without data.

A quantized module has ``qweight`` int32 [K, N/f], ``qzeros`` int32 [G, N/f] and ``scales`` [G, N]; its
weight is ``w[k, n] = (q[k, n] - z[k // g, n]) * s[k // g, n]``. Shapes and the packing order are those of
AutoAWQ's GEMM kernels; docs/marlin-native.md states them in full.
"""

from __future__ import annotations

#: Bits per packed value that the format knows.
AWQ_SUPPORTED_BITS = (4, 8)

#: Field i of a packed word (bits ``num_bits * i`` upward) holds this column of the word's columns.
AWQ_PACK_ORDER: dict[int, tuple[int, ...]] = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}

#: The tensors that make a quantized module, by the last component of their names.
QUANTIZED_PARTS = ("qweight", "qzeros", "scales")

#: Files in which older tools kept the quantization config, in the order they are looked for.
LEGACY_CONFIG_FILENAMES = ("quant_config.json", "quantize_config.json")

#: Last name components that mark the output embedding, which is never converted.
OUTPUT_EMBEDDING_NAMES = frozenset({"lm_head", "output", "embed_out"})

#: Data types of scales that Marlin kernels take.
SCALE_DTYPES = ("F16", "BF16")


def pack_factor(num_bits: int) -> int:
    """Returns how many values one int32 holds: 8 for 4 bits, 4 for 8.

    Args:
        num_bits: 4 or 8.

    Raises:
        ValueError: for any other number of bits.
    """
    if num_bits not in AWQ_SUPPORTED_BITS:
        raise ValueError(f"num_bits must be one of {AWQ_SUPPORTED_BITS}, found {num_bits!r}")
    return 32 // num_bits


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the permutation that undoes ``order``: ``inverse[order[i]] == i``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def is_output_embedding(module: str) -> bool:
    """Returns whether the module's last name component marks the output embedding."""
    return module.rpartition(".")[2] in OUTPUT_EMBEDDING_NAMES


def module_name(module: str, part: str) -> str:
    """Returns the name of a module's tensor, e.g. ``model.layers.0.mlp.up_proj.qweight``."""
    return f"{module}.{part}" if module else part
