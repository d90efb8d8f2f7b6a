"""Marlin-native checkpoints, version 1: what this package writes, and its loaders serve (docs/marlin-native.md).

A module's tensors lie as `marlin_tensors` says. A module that Marlin's shapes cannot take is kept in AWQ layout and
listed in the config, so that loaders know two layouts and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from awq2marlin.arguments import one_of
from awq2marlin.errors import Problem, printable, refuse
from awq2marlin.formats.awq_gemm import AWQ_GEMM
from awq2marlin.formats.base import Fault, Quantization, StoredModule, find_modules
from awq2marlin.formats.config import first_of, method_of, scheme_of
from awq2marlin.formats.marlin_tensors import MarlinTensors
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.serving import Serving, in_sglang, in_transformers, in_vllm
from awq2marlin.installing import PLACE, install_command
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.marlin import padded_shapes, paddings, unaligned_reason
from awq2marlin.layout.modules import is_output_embedding, module_name
from awq2marlin.layout.scheme import Scheme

MARLIN_QUANT_METHOD = "marlin_native"
FORMAT_VERSION = 1

_SGLANG_CAVEAT = "Tested on one H100 and two H200s, with small models"

_NEEDS_OURS = "Only awq2marlin's kernels support 8 bits with zero points; they need compute capability 8.0 or newer"


class MarlinNative(MarlinTensors):
    """The Marlin-native format, version 1."""

    name = MARLIN_QUANT_METHOD
    title = "Marlin-native"
    layout_name = "marlin"
    layout_title = "Marlin"
    output_suffix = "-marlin"
    is_source = is_target = True
    is_own = True
    has_module_lists = True
    version = FORMAT_VERSION

    warning = (
        "> **Load this checkpoint only with an engine that knows the format `marlin_native`.** vLLM, SGLang and\n"
        "> Transformers from 4.52 on stop with an error without `awq2marlin`. Older Transformers only warn, skip the\n"
        "> quantized weights, and generate garbage."
    )
    purpose = "the layout of the Marlin kernels, so engines need not repack them at every start."
    library_name = "awq2marlin"  # not transformers: the Hub would show commands that build garbage

    def serving(self, scheme: Scheme, place: str, ranks: Sequence[int] = (1,)) -> tuple[Serving, ...]:
        """Returns the commands of vLLM and SGLang and the lines for Transformers."""
        is_only_ours = scheme.bits == 8 and scheme.zero_point  # which no engine's Marlin supports
        several, first = [size for size in ranks if size > 1], min(ranks, default=1)

        def cutting(
            engine: str, versions: str, serve: Callable[[str, str], str], option: str, *caveats: str
        ) -> Serving:
            sizes = (
                f"Over several GPUs: {option} {one_of(several)}" if several else "It cannot be split over several GPUs"
            )
            note = ". ".join([sizes, *([_NEEDS_OURS] if is_only_ours else []), *caveats])
            command = serve(place, f" {option} {first}" if first > 1 else "")
            return Serving(engine, command, install=install_command("cuda"), where=PLACE, versions=versions, note=note)

        imported = "import awq2marlin.integrations.transformers  # without this line, Transformers refuses it\n"
        return (
            cutting("vLLM", "0.25 or newer", in_vllm, "--tensor-parallel-size"),
            cutting("SGLang", "0.5.23 or newer", in_sglang, "--tp-size", _SGLANG_CAVEAT),
            Serving(
                "Transformers",
                in_transformers(place, imported),
                language="python",
                install=install_command("transformers", "cuda"),
                where=PLACE,
                versions="5.17 or newer",
            ),
        )

    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether the config names the method."""
        return method_of(document, place) == MARLIN_QUANT_METHOD

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns what the config says; every key that a conversion writes must be there.

        Raises:
            CheckpointError: if a value is missing or of the wrong kind, or the format is newer than this tool.
        """
        version = document.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise refuse(
                "unsupported-format",
                f"format_version is {printable(repr(version))}; this tool reads "
                f"version {FORMAT_VERSION}. Install a newer awq2marlin",
                file=place,
            )
        if document.get("zero_point") is None:
            raise refuse("bad-config", "zero_point is missing; a conversion always writes it", file=place)
        bits, group_size = first_of(document, ("bits",), place), first_of(document, ("group_size",), place)
        scheme = scheme_of(bits, group_size, document["zero_point"], place)
        manifest = document.get("manifest")
        if manifest != MANIFEST_FILENAME:
            message = f"manifest must be {MANIFEST_FILENAME!r}, found {printable(repr(manifest))}"
            raise refuse("bad-config", message, file=place)
        padded = document.get("padded_modules", {})
        if not isinstance(padded, dict) or not all(_is_shape(value) for value in padded.values()):
            raise refuse("bad-config", "padded_modules must map module names to [K, N]", file=place)
        return Quantization(
            scheme,
            document.get("modules_to_not_convert"),
            place,
            _names(document, "awq_modules", place),
            _names(document, "unquantized_modules", place),
            {name: (value[0], value[1]) for name, value in padded.items()},
        )

    def write_config(self, quantization: Quantization) -> dict[str, Any]:
        """Returns the config; ``padded_modules`` is left out where there are none."""
        padded = quantization.padded_modules
        document: dict[str, Any] = {
            "quant_method": MARLIN_QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "zero_point": quantization.zero_point,
            "awq_modules": sorted(quantization.awq_modules),
            "unquantized_modules": sorted(quantization.unquantized_modules),
            "modules_to_not_convert": quantization.modules_to_not_convert,
            "manifest": MANIFEST_FILENAME,
        }
        if padded:
            document["padded_modules"] = {name: list(padded[name]) for name in sorted(padded)}
        return document

    def find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        """Returns the modules in Marlin layout, and those that the config lists as kept in AWQ layout."""
        listed, padded = quantization.awq_modules, quantization.padded_modules
        kept, faults = find_modules(AWQ_GEMM, tensors, quantization, shard_of, among=listed.__contains__)
        own, more = find_modules(self, tensors, quantization, shard_of, among=lambda name: name not in listed)
        for name in padded.keys() & own.keys():
            size_k, size_n = padded[name]
            own[name] = replace(own[name], size_k=size_k, size_n=size_n)
        problems = list(dict.fromkeys([*faults, *more]))
        troubled = {problem.tensor.rpartition(".")[0] for problem in problems}
        problems += _missing_from_lists({*kept, *own, *troubled}, tensors, quantization)
        return dict(sorted({**kept, **own}.items())), problems

    def faults(
        self, module: str, tensors: Mapping[str, TensorInfo], size_k: int, size_n: int, quantization: Quantization
    ) -> Iterator[Fault]:
        """Yields what no conversion writes: unaligned sizes, a padding that is none, parts that do not fit."""
        scheme, qweight = quantization.scheme, tensors["qweight"]
        reason = self.unaligned_reason(size_k, size_n, scheme)
        if not reason and qweight.shape != self.shape("qweight", size_k, size_n, scheme):
            reason = f"a row of {qweight.shape[1]} words does not hold whole columns"
        if reason:
            message = f"{list(qweight.shape)} is not a Marlin weight of {scheme.bits} bits: {reason}"
            yield qweight.name, "wrong-shape", message
            return
        true_sizes = quantization.padded_modules.get(module)
        if true_sizes is not None and (size_k, size_n) not in paddings(*true_sizes):
            message = f"K={size_k}, N={size_n} is not how K={true_sizes[0]}, N={true_sizes[1]} is padded"
            yield qweight.name, "wrong-shape", message
        shapes = {part: self.shape(part, size_k, size_n, scheme) for part in ("scales", "qzeros")}
        shapes["bias"] = (true_sizes[1] if true_sizes else size_n,)
        for part, shape in shapes.items():
            tensor = tensors.get(part)
            if tensor is not None and tensor.shape != shape:
                message = f"its shape is {list(tensor.shape)}, expected {list(shape)} to match qweight"
                yield tensor.name, "wrong-shape", message

    def refusal(self, module: str, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns that the output embedding is never converted."""
        del size_k, size_n, scheme
        return "output embedding" if is_output_embedding(module) else ""

    def unaligned_reason(self, size_k: int, size_n: int, scheme: Scheme) -> str:
        """Returns why Marlin's shapes do not fit a module."""
        return unaligned_reason(size_k, size_n, scheme.bits, scheme.group_size) or ""

    def padded_shapes(self, sizes: Sequence[tuple[int, int]], scheme: Scheme) -> list[tuple[int, int]]:
        """Returns aligned shapes, K in common; see `layout.marlin.padded_shapes`."""
        return padded_shapes(sizes, scheme.group_size)


MARLIN_NATIVE = MarlinNative()


def _missing_from_lists(
    found: set[str], tensors: Mapping[str, TensorInfo], quantization: Quantization
) -> Iterator[Problem]:
    """Yields what the config's lists name and the files do not hold."""
    for key in ("awq_modules", "padded_modules"):
        for module in getattr(quantization, key):
            if module not in found:
                message = f"{key} lists its module, but no file holds it; download the complete checkpoint again"
                yield Problem(CONFIG_FILENAME, module_name(module, "qweight"), "missing-tensor", message)
    for module in quantization.unquantized_modules:
        if module_name(module, "weight") not in tensors:
            message = "unquantized_modules lists it, but no file holds it; download the complete checkpoint again"
            yield Problem(CONFIG_FILENAME, module_name(module, "weight"), "missing-tensor", message)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _names(document: Mapping[str, Any], key: str, place: str) -> frozenset[str]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refuse("bad-config", f"{key} must be a list of module names", file=place)
    if len(set(value)) != len(value):
        raise refuse("bad-config", f"{key} names a module twice", file=place)
    return frozenset(value)
