"""compressed-tensors checkpoints of the format "pack-quantized", as llm-compressor writes them.

A module lies the other way round than in AWQ; docs/marlin-native.md has the tensors in a table and a picture:
``weight_packed`` int32 [N, ceil(K/f)] holds f codes of one column a word, along K; ``weight_scale`` [N, G];
``weight_zero_point``, where the checkpoint is asymmetric, int32 [ceil(N/f), G], packed along N, before April 2025 int8
[N, G], signed; ``weight_shape`` int64 [2] is (N, K). Fields are q and z as they stand: the library adds 2^(b-1) to its
signed values. Source: compressed-tensors 0.20, ``compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import CheckpointError, Problem, printable, refuse
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
from awq2marlin.formats.config import method_of, scheme_of, word
from awq2marlin.formats.serving import Serving, in_sglang, in_transformers, in_vllm
from awq2marlin.io.safetensors import TensorIndex, TensorInfo
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme
from awq2marlin.layout.transposed import SignedZeroPoints, TransposedCodes, TransposedScales, TransposedZeroPoints

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
_HEAD = "lm_head"

#: What it means if a tensor that follows from a module's shape holds something else.
_ODD_K = "K ends inside a word, or the shape differs from that of weight_packed; such modules are not converted"

_STACKED = (
    "all experts of a layer are in this one 3-D tensor, which no loader supports; only checkpoints with "
    "tensors for each expert are converted"
)

_INSTALL = "pip install transformers compressed-tensors"
# It gives packed zero points a wrong size, unless it unpacks the weights at once.
_LOADS_ZERO_POINTS = """from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

unpacked = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained({place}, quantization_config=unpacked, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained({place})"""

_WHAT_TO_DO = "Only weights of 4 or 8 bits in groups or channels are converted; look for another version of this model"


class CompressedTensors(Format):
    """compressed-tensors, format "pack-quantized"."""

    name = METHOD
    title = METHOD
    layout_name = METHOD
    layout_title = "compressed-tensors"
    output_suffix = "-ct"
    is_source = is_target = True
    purpose = "the layout of compressed-tensors, which engines read without a plugin."
    suffixes: ClassVar[Mapping[str, str]] = {
        "qweight": "weight_packed",
        "qzeros": "weight_zero_point",
        "scales": "weight_scale",
    }
    #: Nothing else has scales of this name, so that a module whose codes are lost is missed.
    marks: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    zero_points_said = "symmetric is false"
    denial = ("symmetric: true", "set symmetric to false")
    drops_middle_zeros = True
    companions: ClassVar[tuple[str, ...]] = ("weight_shape",)
    layouts: ClassVar[Mapping[str, type[PartLayout]]] = {
        "qweight": TransposedCodes,
        "qzeros": TransposedZeroPoints,
        "scales": TransposedScales,
    }

    def serving(self, scheme: Scheme, place: str, ranks: Sequence[int] = (1,)) -> tuple[Serving, ...]:
        """Returns the plain commands, and which engines take these bits."""
        del ranks
        if scheme.bits == 8 and scheme.zero_point:
            reason = "it has no Marlin kernel for 8 bits with zero points"
            engines = (Serving("vLLM", reason=reason), Serving("SGLang", reason=reason))
        else:
            engines = (Serving("vLLM", in_vllm(place)), Serving("SGLang", in_sglang(place)))
        if not scheme.zero_point:
            return (*engines, Serving("Transformers", in_transformers(place), language="python", install=_INSTALL))
        return (
            *engines,
            Serving(
                "Transformers",
                _LOADS_ZERO_POINTS.format(place=json.dumps(place)),
                language="python",
                install=_INSTALL,
                note="Transformers 5.23 loads zero points only in dense models, and only unpacked like this",
            ),
        )

    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether the config names the method and, at the top or in a group, the packed format."""
        if method_of(document, place) != METHOD:
            return False
        formats = {word(each, "format", place) for each in (document, *_groups(document, place).values())}
        return PACKED in formats

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns bits, group size and zero points of the one kind of group there may be.

        Raises:
            CheckpointError: naming what the checkpoint has that cannot be converted.
        """
        for key in ("transform_config", "sparsity_config", "kv_cache_scheme"):
            if document.get(key):
                raise _unsupported(f"it has a {key}", place)
        groups = _groups(document, place)
        schemes = {name: _scheme(name, group, place) for name, group in groups.items()}
        if not schemes:
            raise refuse("bad-config", "config_groups names no group", file=place)
        (first, scheme), *others = schemes.items()
        for name, other in others:
            if other != scheme:
                names = f"{printable(first)} and {printable(name)}"
                raise _unsupported(f"{names} are quantized differently: {scheme}; {other}", place)
        return Quantization(scheme, origin=place)

    def write_config(self, quantization: Quantization) -> dict[str, Any]:
        """Returns the config as the library writes it."""
        scheme = quantization.scheme
        is_channel = scheme.group_size == -1
        # An engine's class of output embeddings is no "Linear": a quantized one has to be named.
        heads = sorted(name for name in quantization.quantized_modules if name.rpartition(".")[2] == _HEAD)
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": not scheme.zero_point,
            "strategy": "channel" if is_channel else "group",
            "group_size": None if is_channel else scheme.group_size,
            "dynamic": False,
            "actorder": None,
        }
        return {
            "quant_method": METHOD,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear", *heads], "weights": weights}},
            "ignore": sorted({*quantization.unquantized_modules, *(() if heads else (_HEAD,))}),
        }

    def variant(self, index: TensorIndex) -> Format:
        """Returns the format with old zero points, if these are int8; which it is, only the tensors tell."""
        types = {tensor.dtype for name, tensor in index.tensors.items() if name.endswith(".weight_zero_point")}
        return OLD_COMPRESSED_TENSORS if types == {"I8"} else self

    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N: the groups tell K exactly, packed words of a single one up to the padding of the last."""
        size_n, words = tensors["qweight"].shape
        if scheme.group_size == -1:
            return words * scheme.pack_factor, size_n
        return tensors["scales"].shape[1] * scheme.group_size, size_n

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: N first, but for the words of zero points."""
        if part == "qweight":
            return size_n, -(-size_k // scheme.pack_factor)
        groups = scheme.num_groups(size_k)
        return (size_n, groups) if part == "scales" else (-(-size_n // scheme.pack_factor), groups)

    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns the transposed layout of a part."""
        rows = size_k if part == "qweight" else scheme.num_groups(size_k)
        return self.layouts[part](part, scheme.bits, rows, size_n)

    def find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        """Returns the modules; experts of a layer in one tensor of three dimensions are none of them, and refused."""
        stacked = sorted(
            name for name, tensor in tensors.items() if name.endswith("_packed") and len(tensor.shape) == 3
        )
        if stacked:
            return {}, [Problem(shard_of[name], name, "foreign-format", _STACKED) for name in stacked]
        return super().find(tensors, quantization, shard_of)

    def derived(self, size_k: int, size_n: int, scheme: Scheme) -> Sequence[DerivedTensor]:
        """Returns what follows from a module's shape: the shape, and what some versions write besides."""
        derived = [
            DerivedTensor(
                "weight_shape",
                "I64",
                (2,),
                partial(_shape_bytes, size_k, size_n),
                meaning=_ODD_K,
                is_telling=scheme.group_size == -1,
            ),
            DerivedTensor(
                "weight_g_idx",
                "I32",
                (size_k,),
                partial(group_bytes, size_k, scheme.group_size),
                True,
                ORDERED_BY_ACTIVATIONS,
            ),
        ]
        if not scheme.zero_point:
            derived.append(self.middle_zero_points(size_k, size_n, scheme))
        return derived

    def faults(
        self, module: str, tensors: Mapping[str, TensorInfo], size_k: int, size_n: int, quantization: Quantization
    ) -> Iterator[Fault]:
        """Yields an embedding, which is no linear layer, and what contradicts ``weight_packed`` or the config."""
        packed = tensors["qweight"]
        if embedding := list(embedding_faults(module, packed)):
            yield from embedding
            return
        yield from super().faults(module, tensors, size_k, size_n, quantization)

    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns 0: rows of the tensors are columns."""
        del part, scheme
        return 0

    def rows_per_column(self, part: str, scheme: Scheme) -> int:
        """Returns f for words of codes; words of zero points lie along N."""
        return scheme.pack_factor if part == "qweight" else 1

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the fields of the words, one after the other, the right way round."""
        if part == "scales":
            return rows.T
        from awq2marlin.layout.reference import split_fields  # a conversion that compares nothing does not need it

        words = np.ascontiguousarray(rows, np.uint32)
        if part == "qweight":
            return split_fields(words, scheme.bits)[:, :size_k].T
        return split_fields(np.ascontiguousarray(words.T), scheme.bits)


class OldCompressedTensors(CompressedTensors):
    """The same with zero points as compressed-tensors wrote them before April 2025: int8 [N, G], signed."""

    title = f"{METHOD} with int8 zero points"
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {**CompressedTensors.dtypes, "qzeros": ("I8",)}
    layouts: ClassVar[Mapping[str, type[PartLayout]]] = {**CompressedTensors.layouts, "qzeros": SignedZeroPoints}

    def variant(self, index: TensorIndex) -> Format:
        """Returns itself."""
        del index
        return self

    def has_zero_points(self, scheme: Scheme) -> bool:
        """Returns False: zero points that were all 2^(b-1) were not written."""
        del scheme
        return False

    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of a part: N first."""
        return super().shape("scales" if part == "qzeros" else part, size_k, size_n, scheme)

    def element_type(self, part: str) -> npt.DTypeLike:
        """Returns the type in which `values` takes a part's tensor."""
        return np.int8 if part == "qzeros" else super().element_type(part)

    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns plain values; zero points are signed, 2^(b-1) less than ours."""
        if part != "qzeros":
            return super().values(part, rows, size_k, scheme)
        return (rows.T.astype(np.int16) + scheme.middle).astype(np.uint8)


COMPRESSED_TENSORS = CompressedTensors()
OLD_COMPRESSED_TENSORS = OldCompressedTensors()


def _groups(document: Mapping[str, Any], place: str) -> dict[str, dict[str, Any]]:
    groups = document.get("config_groups")
    if groups is None:
        return {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise refuse("bad-config", "config_groups must map names to objects", file=place)
    return groups


def _unsupported(what: str, place: str) -> CheckpointError:
    return refuse("foreign-format", f"this is a compressed-tensors checkpoint, but {what}. {_WHAT_TO_DO}", file=place)


def _scheme(name: str, group: Mapping[str, Any], place: str) -> Scheme:
    """Returns bits, group size and zero points of one group; refuses by name what cannot be converted."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise refuse("bad-config", f"{printable(name)} has no weights", file=place)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _unsupported(f"{printable(name)} has {key}: its activations are quantized too", place)
    kind = word(weights, "type", place) or "int"
    strategy = word(weights, "strategy", place) or ("channel" if weights.get("group_size") is None else "group")
    layout = word(group, "format", place) or PACKED
    for wrong, what in (
        (layout != PACKED, f"{printable(name)} is of format {printable(layout)!r}"),
        (kind != "int", f"its weights are of type {printable(kind)!r}"),
        (strategy not in ("group", "channel"), f"its strategy is {printable(strategy)!r}"),
        (bool(weights.get("block_structure")), "it has a block_structure"),
        (bool(weights.get("dynamic")), "its weights are quantized dynamically"),
    ):
        if wrong:
            raise _unsupported(what, place)
    group_size = -1 if strategy == "channel" else weights.get("group_size")
    symmetric = weights.get("symmetric", True)
    return scheme_of(
        weights.get("num_bits", 8), group_size, not symmetric if type(symmetric) is bool else symmetric, place
    )


def _shape_bytes(size_k: int, size_n: int) -> bytes:
    return np.array([size_n, size_k], "<i8").tobytes()
