"""Reading a checkpoint's quantization config: the one border where foreign formats are refused by name.

Behind it there are only `AwqQuantization` (an AWQ source) and `MarlinQuantization` (a converted one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from awq2marlin.checkpoint.names import CONFIG_FILENAME, LEGACY_CONFIG_FILENAMES, MANIFEST_FILENAME
from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.io.folder import Folder
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES
from awq2marlin.layout.packing import AWQ_SUPPORTED_BITS

MARLIN_QUANT_METHOD = "marlin_native"
FORMAT_VERSION = 1

#: Parts of a multimodal model's config that may hold the quantization config.
NESTED_CONFIGS = ("text_config", "llm_config")

#: The keys under which tools name the layout of an AWQ checkpoint. Only "gemm" is taken.
_LAYOUT_KEYS = ("version", "format", "checkpoint_format")
_LAYOUT_NAMES = {
    "gemv": "AWQ's GEMV layout",
    "gemv_fast": "AWQ's GEMV-fast layout",
    "gemvfast": "AWQ's GEMV-fast layout",
    "gemv-fast": "AWQ's GEMV-fast layout",
    "llm-awq": "the layout of the llm-awq repository",
    "llm_awq": "the layout of the llm-awq repository",
    "marlin": "AutoAWQ's own Marlin layout (without zero points)",
    "exllama": "AWQ's ExLlama layout",
    "ipex": "AWQ's IPEX layout",
    "bitblas": "the BitBLAS layout",
}
_METHOD_NAMES = {
    "gptq": "a GPTQ checkpoint",
    "gptq_marlin": "a GPTQ checkpoint",
    "marlin": "an old GPTQ-Marlin checkpoint",
    "compressed-tensors": "a compressed-tensors checkpoint",
    "awq_marlin": "a checkpoint marked as packed by an engine",
    "bitsandbytes": "a bitsandbytes checkpoint",
    "fp8": "an FP8 checkpoint",
    "gguf": "a GGUF checkpoint",
}
_WHAT_TO_DO = "Only AWQ checkpoints of version 'gemm' are converted; look for such a one of this model"


@dataclass(frozen=True)
class AwqQuantization:
    """How an AWQ source is quantized.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share scales; -1 for all.
        zero_point: what the config says; without qzeros and False, every zero point is 2^(bits-1).
        modules_to_not_convert: the source's value, unchanged.
        origin: the file that said so.
    """

    bits: int
    group_size: int
    zero_point: bool
    modules_to_not_convert: Any
    origin: str


@dataclass(frozen=True)
class MarlinQuantization:
    """How a converted checkpoint is quantized.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share scales; -1 for all.
        zero_point: as the source's config said.
        awq_modules: quantized modules kept in AWQ layout.
        unquantized_modules: modules with a floating-point weight of two or more dimensions.
        padded_modules: true (K, N) of the modules that were padded.
    """

    bits: int
    group_size: int
    zero_point: bool
    awq_modules: frozenset[str]
    unquantized_modules: frozenset[str]
    padded_modules: Mapping[str, tuple[int, int]]


def read_config(folder: Folder) -> dict[str, Any]:
    """Returns the document in ``config.json``.

    Raises:
        CheckpointError: if it is missing, malformed or no object.
    """
    if not folder.exists(CONFIG_FILENAME):
        raise refuse(
            "no-config",
            "there is no config.json; name a complete checkpoint",
            file=CONFIG_FILENAME,
        )
    return _object(folder.read_json(CONFIG_FILENAME, constants=True), CONFIG_FILENAME)


def read_quantization(folder: Folder, config: Mapping[str, Any]) -> AwqQuantization | MarlinQuantization:
    """Returns how the checkpoint in ``folder`` is quantized.

    Looks in ``config.json``, its ``text_config`` and ``llm_config``, and the files of older tools; where
    several say something they must agree.

    Args:
        folder: the checkpoint.
        config: its ``config.json``, as `read_config` returns it.

    Raises:
        CheckpointError: if it is not quantized, of another format, or says two different things.
    """
    documents = _quantization_documents(folder, config)
    if not documents:
        raise refuse(
            "not-quantized",
            "there is no quantization config: this checkpoint is not quantized. Name an AWQ checkpoint",
            file=CONFIG_FILENAME,
        )
    for place, document in documents.items():
        method = _word(document, "quant_method", place) or _word(document, "method", place)
        if method == MARLIN_QUANT_METHOD:
            return read_marlin_quantization(document, place)
        _refuse_foreign(document, method, place)
    read = {place: _awq_quantization(document, place) for place, document in documents.items()}
    first, *others = read.values()
    for other in others:
        for what in ("bits", "group_size", "zero_point"):
            said = all(documents[one.origin].get(what) is not None for one in (first, other))
            if getattr(first, what) != getattr(other, what) and (said or what != "zero_point"):
                raise refuse(
                    "contradiction",
                    f"{what} is {getattr(other, what)} here but {getattr(first, what)} in "
                    f"{first.origin}; remove the file that is wrong",
                    file=other.origin,
                )
    return first


def without_quantization(config: Mapping[str, Any], replacement: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns a copy of a config without the source's quantization configs, wherever they stand.

    Args:
        config: the source's ``config.json``.
        replacement: a quantization config to put at the top level, in the old one's place.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "quantization_config":
            if replacement is not None:
                result[key] = dict(replacement)
        elif key in NESTED_CONFIGS and isinstance(value, dict):
            result[key] = {inner: item for inner, item in value.items() if inner != "quantization_config"}
        else:
            result[key] = value
    if replacement is not None:
        result.setdefault("quantization_config", dict(replacement))
    return result


def _object(value: Any, file: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse("bad-config", f"it must hold a JSON object, found {type(value).__name__}", file=file)
    return value


def _quantization_documents(folder: Folder, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    places: dict[str, Any] = {}
    if config.get("quantization_config") is not None:
        places[CONFIG_FILENAME] = config["quantization_config"]
    for nested in NESTED_CONFIGS:
        inner = config.get(nested)
        if isinstance(inner, dict) and inner.get("quantization_config") is not None:
            places[f"{CONFIG_FILENAME} ({nested})"] = inner["quantization_config"]
    for name in LEGACY_CONFIG_FILENAMES:
        if folder.exists(name):
            places[name] = folder.read_json(name, constants=True)
    if "compression_config" in config:
        places.setdefault(CONFIG_FILENAME, {"quant_method": "compressed-tensors"})
    return {place: _object(document, place) for place, document in places.items()}


def _word(document: Mapping[str, Any], key: str, place: str) -> str:
    """Returns a value that names something, in small letters; empty if it is absent."""
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise refuse("bad-config", f"{key} must be a string, found {printable(repr(value))}", file=place)
    return value.lower()


def _refuse_foreign(document: Mapping[str, Any], method: str, place: str) -> None:
    def foreign(what: str) -> NoReturn:
        raise refuse(
            "foreign-format",
            f"this is {what}, not an AWQ checkpoint in the 'gemm' layout. {_WHAT_TO_DO}",
            file=place,
        )

    if method in _METHOD_NAMES:
        foreign(_METHOD_NAMES[method])
    if method not in ("awq", ""):
        foreign(f"a checkpoint of quant_method {printable(method)!r}")
    if not method and ("desc_act" in document or "damp_percent" in document):
        foreign(_METHOD_NAMES["gptq"])
    if _word(document, "backend", place) in ("llm-awq", "llm_awq"):
        foreign(_LAYOUT_NAMES["llm-awq"])
    for key in _LAYOUT_KEYS:
        layout = _word(document, key, place)
        if layout not in ("gemm", ""):
            foreign(_LAYOUT_NAMES.get(layout, f"AWQ with {key} {printable(layout)!r}"))


def _first_of(document: Mapping[str, Any], keys: tuple[str, ...], place: str) -> Any:
    found = {key: document[key] for key in keys if document.get(key) is not None}
    if not found:
        raise refuse("bad-config", f"the quantization config has none of {', '.join(keys)}", file=place)
    if len(set(map(repr, found.values()))) > 1:
        raise refuse("contradiction", f"the quantization config says {printable(str(found))}", file=place)
    return next(iter(found.values()))


def _awq_quantization(document: Mapping[str, Any], place: str) -> AwqQuantization:
    bits = _first_of(document, ("bits", "w_bit"), place)
    if type(bits) is not int or bits not in AWQ_SUPPORTED_BITS:
        raise refuse(
            "unsupported-bits",
            f"it is quantized to {printable(repr(bits))} bits; "
            f"{' and '.join(map(str, AWQ_SUPPORTED_BITS))} are supported",
            file=place,
        )
    group_size = _first_of(document, ("group_size", "q_group_size"), place)
    if type(group_size) is not int or group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise refuse(
            "unsupported-group-size",
            f"its group size is {printable(repr(group_size))}; "
            f"{', '.join(map(str, MARLIN_SUPPORTED_GROUP_SIZES))} are supported",
            file=place,
        )
    zero_point = document.get("zero_point")
    if zero_point is None:
        zero_point = True  # the default of every tool that leaves it out
    if not isinstance(zero_point, bool):
        raise refuse("bad-config", f"zero_point must be true or false, found {printable(repr(zero_point))}", file=place)
    return AwqQuantization(bits, group_size, zero_point, document.get("modules_to_not_convert"), place)


def marlin_document(
    quantization: AwqQuantization,
    awq_modules: list[str],
    unquantized_modules: list[str],
    padded_modules: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a converted checkpoint (docs/marlin-native.md).

    Args:
        quantization: the source's.
        awq_modules: quantized modules kept in AWQ layout.
        unquantized_modules: modules with a floating-point weight of two or more dimensions.
        padded_modules: true (K, N) of padded modules; the key is left out when there are none.
    """
    document: dict[str, Any] = {
        "quant_method": MARLIN_QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "zero_point": quantization.zero_point,
        "awq_modules": sorted(awq_modules),
        "unquantized_modules": sorted(unquantized_modules),
        "modules_to_not_convert": quantization.modules_to_not_convert,
        "manifest": MANIFEST_FILENAME,
    }
    if padded_modules:
        document["padded_modules"] = {name: list(padded_modules[name]) for name in sorted(padded_modules)}
    return document


def read_marlin_quantization(document: Mapping[str, Any], place: str) -> MarlinQuantization:
    """Returns the quantization of a converted checkpoint, checked.

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
    basics = _awq_quantization(document, place)
    manifest = document.get("manifest")
    if manifest != MANIFEST_FILENAME:
        raise refuse(
            "bad-config",
            f"manifest must be {MANIFEST_FILENAME!r}, found {printable(repr(manifest))}",
            file=place,
        )
    padded = document.get("padded_modules", {})
    if not isinstance(padded, dict) or not all(_is_shape(value) for value in padded.values()):
        raise refuse("bad-config", "padded_modules must map module names to [K, N]", file=place)
    return MarlinQuantization(
        basics.bits,
        basics.group_size,
        basics.zero_point,
        _names(document, "awq_modules", place),
        _names(document, "unquantized_modules", place),
        {name: (value[0], value[1]) for name, value in padded.items()},
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _names(document: Mapping[str, Any], key: str, place: str) -> frozenset[str]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refuse("bad-config", f"{key} must be a list of module names", file=place)
    if len(set(value)) != len(value):
        raise CheckpointError(Problem(place, "", "bad-config", f"{key} names a module twice"))
    return frozenset(value)
