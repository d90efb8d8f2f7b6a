"""AWQ checkpoints of the "gemm" version, as AutoAWQ and its heirs write them.

A module has ``qweight`` int32 [K, N/f], ``qzeros`` int32 [G, N/f] and ``scales`` [G, N]: plain rows along K, f values a
word in the order of `layout.packing`. Shapes and the packing order are those of AutoAWQ's GEMM kernels;
docs/marlin-native.md states them in full. Source: AutoAWQ 0.2.9, ``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import Problem
from awq2marlin.formats.awq import Awq
from awq2marlin.formats.base import DerivedTensor, Fault, Quantization, StoredModule, find_modules
from awq2marlin.formats.serving import Serving, in_sglang, in_transformers, in_vllm
from awq2marlin.io.safetensors import DTYPE_BITS, TensorInfo
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES, num_groups
from awq2marlin.layout.modules import module_name, part_shape
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme


class AwqGemm(Awq):
    """AWQ, version "gemm"."""

    name = "awq"
    title = "AWQ"
    layout_name = "awq"
    layout_title = "AWQ"
    output_suffix = "-awq"
    is_source = is_target = True
    versions = ("gemm",)
    only_bits = ()

    purpose = "AWQ's layout, which engines read without a plugin."

    def serving(self, scheme: Scheme, place: str, ranks: Sequence[int] = (1,)) -> tuple[Serving, ...]:
        """Returns the plain commands, and which engines take these bits."""
        del ranks
        if scheme.bits != 4:
            advice = "In compressed-tensors it takes 8 bits, if all zero points are 128"
            reason = f"it takes AWQ checkpoints of 4 bits only. {advice}"
            return (
                Serving("vLLM", reason=reason),
                Serving("SGLang", reason=reason),
                Serving("Transformers", reason="nobody has tried AWQ checkpoints of 8 bits there"),
            )
        note = (
            "One group spans all of K: vLLM 0.33 cuts such layers over several GPUs by columns only, and loads no "
            "mixture of experts that has them"
        )
        return (
            Serving("vLLM", in_vllm(place), note=note if scheme.group_size == -1 else ""),
            Serving("SGLang", in_sglang(place)),
            Serving(
                "Transformers", in_transformers(place), language="python", install="pip install transformers gptqmodel"
            ),
        )

    def target_scheme(self, scheme: Scheme) -> Scheme:
        """Returns the scheme with zero points: engines leave absent ones uninitialised."""
        return replace(scheme, zero_point=True)

    def write_config(self, quantization: Quantization) -> dict[str, Any]:
        """Returns the config as AutoAWQ writes it; ``lm_head`` tells vLLM of a quantized output embedding."""
        has_head = any(name.rpartition(".")[2] == "lm_head" for name in quantization.quantized_modules)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "zero_point": quantization.zero_point,
            "modules_to_not_convert": quantization.modules_to_not_convert
            or sorted(quantization.unquantized_modules)
            or None,
            **({"lm_head": True} if has_head else {}),
        }

    def find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        """Returns the modules. Zero points that the config denies are no parts of theirs, but must be in the middle.

        AutoRound writes such ones.
        """
        if quantization.zero_point or quantization.layout is not None:
            return super().find(tensors, quantization, shard_of)
        found: dict[str, StoredModule] = {}
        problems: list[Problem] = []
        for layout, has_zeros in ((self, False), (_WITH_MIDDLE_ZEROS, True)):
            among = partial(_has_zeros, tensors, has_zeros)
            modules, faults = find_modules(layout, tensors, quantization, shard_of, among=among)
            found, problems = {**found, **modules}, [*problems, *faults]
        return dict(sorted(found.items())), list(dict.fromkeys(problems))

    def as_recorded(self, quantization: Quantization, manifest_version: int) -> Quantization:
        """Returns that zero points are parts whatever the config says: so version 0.1 had it, and its manifests."""
        return replace(quantization, layout=self) if manifest_version == 1 else quantization

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N as ``qweight`` says."""
        size_k, words = tensors["qweight"].shape
        return size_k, words * scheme.pack_factor

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:
        """Returns bits, K and groups: words of ``qweight`` beside columns of ``scales`` tell the bits."""
        del scheme
        (size_k, words), (groups, size_n) = tensors["qweight"].shape, tensors["scales"].shape
        return 32 * words / max(size_n, 1), size_k, groups

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: rows along K."""
        return part_shape(part, size_k, size_n, scheme)

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns plain rows."""
        rows = size_k if part == "qweight" else scheme.num_groups(size_k)
        return PartLayout(part, scheme.bits, rows, size_n)

    def faults(
        self, module: str, tensors: Mapping[str, TensorInfo], size_k: int, size_n: int, quantization: Quantization
    ) -> Iterator[Fault]:
        """Yields what contradicts ``qweight`` or the config, with what it fits instead."""
        del module
        qweight, scales = tensors["qweight"], tensors["scales"]
        scheme = quantization.scheme
        if reason := self.size_fault(size_k, size_n, scheme):
            yield qweight.name, "wrong-shape", reason
            return
        if scales.shape[1] != size_n:
            yield (
                scales.name,
                "contradiction",
                f"qweight {list(qweight.shape)} and {scheme.bits} bits mean N={size_n}, "
                f"but scales are {list(scales.shape)}; {_other_hint(qweight.shape[1], scales.shape[1], quantization)}",
            )
            return
        groups = scheme.num_groups(size_k)
        if scales.shape[0] != groups:
            yield (
                scales.name,
                "contradiction",
                f"K={size_k} and group size {scheme.group_size} mean {groups} groups, "
                f"but there are {scales.shape[0]}: {_group_hint(size_k, scales.shape[0])}. "
                "One group size for all modules is needed",
            )
        qzeros, expected = tensors.get("qzeros"), (scales.shape[0], qweight.shape[1])
        if qzeros is not None and qzeros.shape != expected:
            message = f"its shape is {list(qzeros.shape)}, expected {list(expected)} to match scales and qweight"
            yield qzeros.name, "contradiction", message
        bias = tensors.get("bias")
        if bias is not None and bias.shape != (size_n,):
            yield bias.name, "contradiction", f"its shape is {list(bias.shape)}, expected {[size_n]}"

    def refusal(self, module: str, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns that whole words are needed."""
        del module, size_k
        if size_n % scheme.pack_factor:
            return f"N={size_n} is not a multiple of {scheme.pack_factor}, the values in a word of AWQ's layout"
        return ""

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns 1: rows are plain."""
        del part, scheme
        return 1

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the columns of packed words in their order; scales are plain."""
        del size_k
        if part == "scales":
            return rows
        from awq2marlin.layout.reference import unpack_awq  # a conversion that compares nothing does not need it

        return unpack_awq(rows.astype(np.uint32, copy=False), scheme.bits)


class _WithMiddleZeros(AwqGemm):
    """The layout of modules whose zero points are all 2^(bits-1), and stored all the same."""

    drops_middle_zeros = True

    def derived(self, size_k: int, size_n: int, scheme: Scheme) -> Sequence[DerivedTensor]:
        """Returns the zero points."""
        return [self.middle_zero_points(size_k, size_n, scheme)]


AWQ_GEMM = AwqGemm()
_WITH_MIDDLE_ZEROS = _WithMiddleZeros()


def _has_zeros(tensors: Mapping[str, TensorInfo], wanted: bool, module: str) -> bool:
    return (module_name(module, "qzeros") in tensors) == wanted


def _other_hint(words: int, columns: int, said: Quantization) -> str:
    """Returns which layout or bits would fit a row of words and a row of scales."""
    if words == columns:
        return f"that is the layout of GPTQ, but {said.origin} says AWQ; correct a copy of the config"
    for bits in DTYPE_BITS.values():
        if bits < 32 and words * 32 == columns * bits:
            return f"that fits {bits} bits, the config says {said.bits}"
    return "perhaps it is packed in another layout than AWQ's 'gemm'"


def _group_hint(size_k: int, groups: int) -> str:
    """Returns which group size would fit."""
    fits = [size for size in MARLIN_SUPPORTED_GROUP_SIZES if num_groups(size_k, size) == groups]
    return f"that fits group size {fits[0]}" if fits else "that fits no supported group size"
