"""Formats that are not converted: each told by its name, why it cannot be, and what to do.

Sources of what is said of each: Transformers 5.23 ``quantizers/``, and the libraries' own documents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from awq2marlin.errors import CheckpointError, printable, refuse
from awq2marlin.formats.awq import GPTQ_KEYS, LAYOUT_KEYS, is_llm_awq
from awq2marlin.formats.config import method_of, word


class Foreign(NamedTuple):
    """A format that is not converted.

    Attributes:
        name: what `inspect` calls it.
        noun: what sentences call a checkpoint of it.
        why: why it is not converted; empty if that is not known.
    """

    name: str
    noun: str
    why: str = ""


_FLOATS_OF_8 = "its weights are 8-bit floating-point numbers, not integers"
_FLOATS_OF_4 = "its weights are 4-bit floating-point numbers with 8-bit scales, not integers"
_CODEBOOKS = "its weights are vectors from codebooks, not integers with scales"
_INPUTS = "its weights are 8-bit integers for inputs that are quantized too"

_METHODS = {
    "aqlm": Foreign("aqlm", "an AQLM checkpoint", _CODEBOOKS),
    "awq_marlin": Foreign("awq_marlin", "a checkpoint marked as packed by an engine"),
    "bitnet": Foreign("bitnet", "a BitNet checkpoint", "its weights have three values"),
    "bitsandbytes": Foreign(
        "bitsandbytes",
        "a bitsandbytes checkpoint",
        "its weights are indices into a table, or are quantized at run time, without groups along K",
    ),
    "eetq": Foreign("eetq", "an EETQ checkpoint", "its weights are packed for one kind of kernel"),
    "exl2": Foreign("exl2", "an EXL2 checkpoint", "it mixes bits within every tensor, and orders rows by activations"),
    "exl3": Foreign("exl3", "an EXL3 checkpoint", "its codes are paths through a trellis, not integers"),
    "fbgemm_fp8": Foreign("fp8", "an FP8 checkpoint", _FLOATS_OF_8),
    "fp8": Foreign("fp8", "an FP8 checkpoint", _FLOATS_OF_8),
    "fp_quant": Foreign("fp_quant", "an FP-Quant checkpoint", _FLOATS_OF_4),
    "gguf": Foreign("gguf", "a GGUF checkpoint", "its blocks have scales within scales, of types of their own"),
    "gptq_marlin": Foreign("gptq_marlin", "a GPTQ checkpoint packed by an engine"),
    "higgs": Foreign("higgs", "a HIGGS checkpoint", _CODEBOOKS),
    "hqq": Foreign("hqq", "an HQQ checkpoint", "its zero points are floating-point numbers"),
    "llm-awq": Foreign(
        "llm-awq",
        "a checkpoint of the llm-awq repository",
        "its zero points are scaled, and its words are in an order of their own",
    ),
    "marlin": Foreign("marlin", "an old GPTQ-Marlin checkpoint"),
    "mlx": Foreign(
        "mlx", "an MLX checkpoint", "it stores biases beside the scales, and they are not products with zero points"
    ),
    "modelopt": Foreign("modelopt", "a ModelOpt checkpoint", "its weights are bytes, with scales for the inputs"),
    "mxfp4": Foreign("mxfp4", "an MXFP4 checkpoint", _FLOATS_OF_4),
    "nvfp4": Foreign("nvfp4", "an NVFP4 checkpoint", _FLOATS_OF_4),
    "quanto": Foreign(
        "quanto", "a quanto checkpoint", "its shifts are floating-point numbers, and its packing is its own"
    ),
    "quip": Foreign("quip", "a QuIP# checkpoint", _CODEBOOKS),
    "spqr": Foreign("spqr", "an SpQR checkpoint", "it keeps some weights separately in more bits"),
    "tensorrt-llm": Foreign("tensorrt-llm", "a TensorRT-LLM checkpoint", "it is packed for one kind of GPU"),
    "torchao": Foreign("torchao", "a torchao checkpoint", "its tensors are packed by classes of torchao"),
    "vptq": Foreign("vptq", "a VPTQ checkpoint", _CODEBOOKS),
}
_SAME = {
    "exllamav2": "exl2",
    "exllamav3": "exl3",
    "finegrained_fp8": "fp8",
    "fbgemm-fp8": "fp8",
    "llm_awq": "llm-awq",
    "modelopt_fp4": "nvfp4",
    "quip#": "quip",
    "quip-sharp": "quip",
    "quip_sharp": "quip",
    "tensorrt_llm": "tensorrt-llm",
    "trtllm": "tensorrt-llm",
}
_LAYOUTS = {
    "llm-awq": _METHODS["llm-awq"],
    "llm_awq": _METHODS["llm-awq"],
    "exllama": Foreign("awq", "AWQ's ExLlama layout"),
    "ipex": Foreign("awq", "AWQ's IPEX layout"),
    "bitblas": Foreign("awq", "the BitBLAS layout"),
}
_COMPRESSED_TENSORS = {
    "float-quantized": _FLOATS_OF_8,
    "int-quantized": _INPUTS,
    "marlin-24": "two of every four weights are zero and not stored",
    "mxfp4-pack-quantized": _FLOATS_OF_4,
    "naive-quantized": _INPUTS,
    "nvfp4-pack-quantized": _FLOATS_OF_4,
}

#: Last name components of tensors that only one format has; of two formats the first one counts.
_TENSORS = {
    "absmax": "bitsandbytes",
    "biases": "mlx",
    "centroids": "vptq",
    "codebooks": "aqlm",
    "q_invperm": "exl2",
    "q_weight": "exl2",
    "Qidxs": "quip",
    "scaled_zeros": "llm-awq",
    "trellis": "exl3",
    "W_q": "hqq",
    "weight_scale_2": "modelopt",
}

#: Files that only a tool's output has beside a config that says nothing of a quantization.
_FILES = {"job_new.json": "exl2", "measurement.json": "exl2", "quantization_config.json": "exl3"}

#: The file in which ModelOpt says how it quantized.
MODELOPT_FILENAME = "hf_quant_config.json"

_WHAT_TO_DO = (
    "awq2marlin converts only AWQ (versions gemm, gemv, gemv_fast and marlin), GPTQ of format 'gptq' or 'gptq_v2', "
    "AutoRound's packings of these, and compressed-tensors of format 'pack-quantized'; look for another version of "
    "this model"
)


def foreign(document: Mapping[str, Any], place: str) -> CheckpointError:
    """Returns the refusal of a checkpoint that no format claims, to be raised by the caller.

    Args:
        document: its quantization config.
        place: where that stands.
    """
    return _refusal(foreign_kind(document, place), place)


def foreign_file(name: str) -> CheckpointError:
    """Returns the refusal of a GGUF file, which is all that there is of a checkpoint."""
    return _refusal(_METHODS["gguf"], name)


def foreign_tensors(names: Collection[str]) -> Foreign | None:
    """Returns the format that the names of tensors show, if it is one of those that are not converted."""
    suffixes = {name.rpartition(".")[2] for name in names}
    return next((_METHODS[method] for suffix, method in _TENSORS.items() if suffix in suffixes), None)


def refuse_foreign_tensors(names: Collection[str], place: str) -> None:
    """Refuses tensors of a format that is not converted, where the config does not name it.

    Args:
        names: of all tensors.
        place: the config.

    Raises:
        CheckpointError: naming the format.
    """
    kind = foreign_tensors(names)
    if kind is not None:
        raise _refusal(kind, place)


def _refusal(kind: Foreign, place: str) -> CheckpointError:
    why = f": {kind.why}" if kind.why else ""
    return refuse("foreign-format", f"this is {kind.noun}{why}. {_WHAT_TO_DO}", file=place)


def said_otherwise(config: Mapping[str, Any], names: Collection[str]) -> tuple[str, dict[str, Any]] | None:
    """Returns what a checkpoint says of its quantization where no other tool says it, as a quantization config.

    Args:
        config: ``config.json``.
        names: of all files.

    Returns:
        Where it stands, in ``config.json`` or another file, and what it says; None if it says nothing.
    """
    found = config.get("quantization")
    if isinstance(found, dict) and found:
        method = "tensorrt-llm" if "quant_algo" in found or "pretrained_config" in config else "mlx"
        return "config.json (quantization)", {**found, "quant_method": method}
    engine = config.get("pretrained_config")
    if isinstance(engine, dict):
        said = engine.get("quantization")
        return "config.json (pretrained_config)", {
            **(said if isinstance(said, dict) else {}),
            "quant_method": "tensorrt-llm",
        }
    for name, method in _FILES.items():
        if name in names:
            return name, {"quant_method": method}
    return None


def foreign_kind(document: Mapping[str, Any], place: str) -> Foreign:
    """Returns which format a quantization config is one of, if no format claims it.

    Args:
        document: the config.
        place: where it stands.
    """
    method = method_of(document, place)
    method = _SAME.get(method, method)
    if method == "compressed-tensors":
        layout = word(document, "format", place)
        noun = f"a compressed-tensors checkpoint {f'of format {printable(layout)!r}' if layout else 'of no format'}"
        return Foreign(method, noun, _COMPRESSED_TENSORS.get(layout, ""))
    if method == "gptq" or (not method and any(key in document for key in GPTQ_KEYS)):
        said = [word(document, key, place) for key in ("checkpoint_format", "format")]
        layout = next((each for each in said if each not in ("", "gptq", "gptq_v2")), "marlin")
        return Foreign("gptq", f"a GPTQ checkpoint of format {printable(layout)!r}")
    if method == "modelopt":
        return _modelopt(document, place)
    if method in _METHODS:
        return _METHODS[method]
    if method not in ("awq", ""):
        return Foreign(printable(method), f"a checkpoint of quant_method {printable(method)!r}")
    if is_llm_awq(document, place):
        return _LAYOUTS["llm-awq"]
    layouts = {key: word(document, key, place) for key in LAYOUT_KEYS}
    key, layout = next((key, layout) for key, layout in layouts.items() if layout not in ("gemm", ""))
    return _LAYOUTS.get(layout, Foreign("awq", f"AWQ with {key} {printable(layout)!r}"))


def _modelopt(document: Mapping[str, Any], place: str) -> Foreign:
    algorithm = word(document, "quant_algo", place)
    if not algorithm:
        return _METHODS["modelopt"]
    kinds = {"fp8": _FLOATS_OF_8, "nvfp4": _FLOATS_OF_4, "mxfp4": _FLOATS_OF_4}
    why = next((why for kind, why in kinds.items() if kind in algorithm), _METHODS["modelopt"].why)
    return Foreign("modelopt", f"a ModelOpt checkpoint ({printable(algorithm.upper())})", why)


def said_numbers(document: Mapping[str, Any]) -> tuple[float, int]:
    """Returns bits and group size as a config of any tool says them, as far as it does; 0 for what is not known.

    Args:
        document: a quantization config that a stranger wrote.
    """
    parts = [*_parts(document, 4)]
    bits = next(_numbers(parts, ("bits", "w_bit", "num_bits", "nbits"), (int, float)), 0)
    for key, meaning in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = bits or (meaning if document.get(key) is True else 0)
    return bits, int(next(_numbers(parts, ("group_size", "q_group_size"), (int,)), 0))


def _parts(document: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yields a document and the objects in it, down to a depth."""
    yield document
    for each in document.values():
        if isinstance(each, dict) and depth:
            yield from _parts(each, depth - 1)


def _numbers(
    parts: Collection[Mapping[str, Any]], keys: Collection[str], types: tuple[type[float], ...]
) -> Iterator[float]:
    """Yields what stands under some keys, if it is a number that may be meant."""
    for part in parts:
        for key in keys:
            value = part.get(key)
            if type(value) in types and value is not None and -1 <= value <= 1 << 20:
                yield value
