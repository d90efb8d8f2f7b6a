"""GPTQ checkpoints, both versions, as AutoGPTQ, GPTQModel and AutoRound write them; without an order of activations.

A module has ``qweight`` int32 [K/f, N], f codes of one column a word, along K; ``qzeros`` int32 [G, N/f], packed along
N; ``scales`` [G, N]; and mostly ``g_idx`` int32 [K], the group of every row, which is k // g. All fields stand in
sequence. Version 2 stores zero points as they are, version 1 one less. GPTQModel takes that 1 from the word as a whole,
so that borrows cross fields, and adds it again when it reads. Source: GPTQModel 7.7, ``nn_modules/qlinear`` and
``utils/model.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.formats.awq import GPTQ_KEYS
from awq2marlin.formats.base import (
    ORDERED_BY_ACTIVATIONS,
    DerivedTensor,
    Fault,
    Format,
    Quantization,
    StoredModule,
    embedding_faults,
    group_bytes,
)
from awq2marlin.formats.config import first_of, flag, method_of, scheme_of, word
from awq2marlin.formats.overrides import contradictions, overrides_of
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.sequential import (
    BorrowingZeroPoints,
    LowerZeroPoints,
    SequentialCodes,
    SequentialZeroPoints,
)

_UNORDERED = "look for a version of this model that was quantized with desc_act: false"


class Gptq(Format):
    """GPTQ; its own layout is the first version's as any tool but GPTQModel writes it: 1 less for each zero point."""

    name = layout_name = "gptq"
    title = layout_title = "GPTQ"
    is_source = True
    zero_point_key = "sym"
    zero_points_said = "sym is not true"
    denial = ("sym: true", "set sym to false")
    drops_middle_zeros = True
    companions: ClassVar[tuple[str, ...]] = ("g_idx",)
    foreign_suffixes: ClassVar[tuple[str, ...]] = ("weight",)

    #: How the tensor of zero points holds them.
    zero_points: ClassVar[type[PartLayout]] = LowerZeroPoints

    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether a config names GPTQ, or no method and keys of GPTQ, and one of its two versions."""
        method = method_of(document, place)
        if method != "gptq" and (method or not any(key in document for key in GPTQ_KEYS)):
            return False
        return {*_versions(document, place)} <= {"gptq", "gptq_v2"} and not document.get("is_marlin_format")

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns bits, group size, whether there are zero points, and which version's layout it is.

        Where ``sym`` is left out, zero points are taken as they stand.

        Raises:
            CheckpointError: if a value is missing, wrong or not supported, or the rows are ordered by activations.
        """
        if flag(document, "desc_act", place):
            raise _unsupported(f"its rows are in the order of activations (desc_act: true); {_UNORDERED}", place)
        words = word(document, "pack_dtype", place) or "int32"
        if words != "int32":
            message = (
                f"it is packed in words of {printable(words)!r}, not of int32; look for another version of this model"
            )
            raise _unsupported(message, place)
        bits, group_size = (first_of(document, (key,), place) for key in ("bits", "group_size"))
        scheme = scheme_of(bits, group_size, not flag(document, "sym", place), place)
        return Quantization(scheme, origin=place, overrides=overrides_of(document), layout=_layout(document, place))

    def title_of(self, quantization: Quantization) -> str:
        """Returns the version's title."""
        return (quantization.layout or self).title

    def find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        """Returns the modules, and where the config says of single ones what their tensors do not show."""
        modules, problems = self._find(tensors, quantization, shard_of)
        said = contradictions(quantization.overrides, modules, quantization.scheme, quantization.origin)
        return modules, problems or list(said)

    def _find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        return super().find(tensors, quantization, shard_of)

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N as ``qweight`` says."""
        rows, size_n = tensors["qweight"].shape
        return rows * scheme.pack_factor, size_n

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:
        """Returns bits, K and groups: words of ``qzeros`` beside columns of ``scales`` tell the bits."""
        (groups, size_n), bits = tensors["scales"].shape, float(scheme.bits)
        if "qzeros" in tensors:
            bits = 32 * tensors["qzeros"].shape[1] / max(size_n, 1)
        return bits, 32 * tensors["qweight"].shape[0] / max(bits, 1), groups

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: rows along K, those of codes in words."""
        if part == "qweight":
            return size_k // scheme.pack_factor, size_n
        groups = scheme.num_groups(size_k)
        return groups, size_n if part == "scales" else size_n // scheme.pack_factor

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns words in sequence, or plain rows of scales."""
        if part == "qweight":
            return SequentialCodes(part, scheme.bits, size_k, size_n)
        kind = self.zero_points if part == "qzeros" else PartLayout
        return kind(part, scheme.bits, scheme.num_groups(size_k), size_n)

    def derived(self, size_k: int, size_n: int, scheme: Scheme) -> Sequence[DerivedTensor]:
        """Returns the group of every row, which some tools write, and the zero points of a symmetric checkpoint."""
        groups = partial(group_bytes, size_k, scheme.group_size)
        derived = [DerivedTensor("g_idx", "I32", (size_k,), groups, is_optional=True, meaning=ORDERED_BY_ACTIVATIONS)]
        if not scheme.zero_point:
            derived.append(self.middle_zero_points(size_k, size_n, scheme))
        return derived

    def size_fault(self, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns why there is no module of a size: columns fill words of zero points."""
        if reason := super().size_fault(size_k, size_n, scheme):
            return reason
        if size_n % scheme.pack_factor:
            return f"K={size_k}, N={size_n} ends inside a word of {scheme.pack_factor} zero points"
        return ""

    def faults(
        self, module: str, tensors: Mapping[str, TensorInfo], size_k: int, size_n: int, quantization: Quantization
    ) -> Iterator[Fault]:
        """Yields what contradicts ``qweight`` or the config, with the layout that the shapes are of instead."""
        scheme, qweight, scales = quantization.scheme, tensors["qweight"], tensors["scales"]
        is_of_awq = size_n != scales.shape[1] == qweight.shape[1] * scheme.pack_factor
        if embedding := list(embedding_faults(module, qweight)):
            yield from embedding
        elif is_of_awq and not self.size_fault(size_k, size_n, scheme):
            message = (
                f"{quantization.origin} says {self.title}, whose rows have a word for every column, but "
                f"{list(qweight.shape)} beside scales {list(scales.shape)} is the layout of AWQ; correct a copy of the "
                "config, or download the checkpoint again"
            )
            yield qweight.name, "contradiction", message
        else:
            yield from super().faults(module, tensors, size_k, size_n, quantization)

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns f for words of codes; words of zero points lie along N."""
        return scheme.pack_factor if part == "qweight" else 1

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the fields of the words, one after the other; see `read_zero_points`."""
        del size_k
        if part == "scales":
            return rows
        from awq2marlin.layout.reference import split_fields  # a conversion that compares nothing does not need it

        words = np.ascontiguousarray(rows, np.uint32)
        if part == "qzeros":
            return self.read_zero_points(words, scheme.bits)
        fields = split_fields(words[..., None], scheme.bits)  # [rows, N, f]
        return fields.transpose(0, 2, 1).reshape(-1, words.shape[1])

    def read_zero_points(self, words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
        """Returns the zero points that words hold, [G, N]; slowly and plainly, for comparison."""
        from awq2marlin.layout.reference import split_fields

        return split_fields(words, bits) + np.uint8(1)


class BorrowedGptq(Gptq):
    """The layout of the first version as GPTQModel writes it: 1 is taken from every field by one subtraction a word."""

    zero_points: ClassVar[type[PartLayout]] = BorrowingZeroPoints

    def read_zero_points(self, words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
        """Returns the fields of the words, once it is added again."""
        from awq2marlin.layout.reference import split_fields

        return split_fields(words + np.uint32(sum(1 << shift for shift in range(0, 32, bits))), bits)


class GptqV2(Gptq):
    """The layout of the second version: zero points are stored as they are."""

    layout_name = "gptq_v2"
    title = layout_title = "GPTQ v2"
    zero_points: ClassVar[type[PartLayout]] = SequentialZeroPoints

    def read_zero_points(self, words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
        """Returns the fields of the words."""
        from awq2marlin.layout.reference import split_fields

        return split_fields(words, bits)


GPTQ = Gptq()
GPTQ_V2 = GptqV2()
_BORROWED_GPTQ = BorrowedGptq()


def _versions(document: Mapping[str, Any], place: str) -> list[str]:
    """Returns what the config calls its layout; GPTQModel says it twice."""
    said = [word(document, key, place) for key in ("checkpoint_format", "format")]
    return [each for each in said if each]


def _layout(document: Mapping[str, Any], place: str) -> Format:
    """Returns which version's layout the modules have, and by which writer."""
    versions = _versions(document, place)
    if len(set(versions)) > 1:
        message = f"checkpoint_format is {versions[0]!r}, but format is {versions[1]!r}; correct a copy of the config"
        raise refuse("contradiction", message, file=place)
    if versions and versions[0] == "gptq_v2":
        return GPTQ_V2
    meta = document.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    is_borrowed = any(isinstance(name, str) and name.lower().startswith("gptqmodel") for name in names)
    return _BORROWED_GPTQ if is_borrowed else GPTQ


def _unsupported(what: str, place: str) -> CheckpointError:
    return refuse("foreign-format", f"this is a GPTQ checkpoint, but {what}", file=place)
