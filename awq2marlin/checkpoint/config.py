"""Reading a checkpoint's config: where the quantization config stands, and which format it is one of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq2marlin.errors import refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.names import CONFIG_FILENAME, LEGACY_CONFIG_FILENAMES
from awq2marlin.formats.registry import FORMER_CONFIG_KEYS, recognise
from awq2marlin.io.source import Source

#: Parts of a multimodal model's config that may hold the quantization config.
NESTED_CONFIGS = ("text_config", "llm_config")


def read_config(folder: Source) -> dict[str, Any]:
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


def read_quantization(folder: Source, config: Mapping[str, Any]) -> tuple[Format, Quantization]:
    """Returns the format of the checkpoint in ``folder``, and how it is quantized.

    Looks in ``config.json``, its ``text_config`` and ``llm_config``, and the files of older tools; where
    several say something they must agree.

    Args:
        folder: the checkpoint.
        config: its ``config.json``, as `read_config` returns it.

    Raises:
        CheckpointError: if it is not quantized, of a format that is none of ours, or says two different things.
    """
    legacy = {name: folder.read_json(name, constants=True) for name in LEGACY_CONFIG_FILENAMES if folder.exists(name)}
    documents = quantization_documents(config, legacy)
    if not documents:
        raise refuse(
            "not-quantized",
            "there is no quantization config: this checkpoint is not quantized. Name one that is",
            file=CONFIG_FILENAME,
        )
    first, *others = documents
    format = recognise(documents[first], first)
    quantization = format.read_config(documents[first], first)
    if not format.is_own:  # our own has one config, and what stands beside it was carried over
        for place in others:
            _refuse_contradiction(format, quantization, documents[first], documents[place], place)
    return format, quantization


def quantization_documents(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns every quantization config of a checkpoint by where it stands; `read_quantization` says where they are.

    Args:
        config: ``config.json``.
        legacy: the documents in the files of older tools, by name.

    Raises:
        CheckpointError: if one is no object.
    """
    places: dict[str, Any] = {}
    if config.get("quantization_config") is not None:
        places[CONFIG_FILENAME] = config["quantization_config"]
    for nested in NESTED_CONFIGS:
        inner = config.get(nested)
        if isinstance(inner, dict) and inner.get("quantization_config") is not None:
            places[f"{CONFIG_FILENAME} ({nested})"] = inner["quantization_config"]
    places |= legacy
    for key, method in FORMER_CONFIG_KEYS.items():
        if config.get(key) is not None:
            place = f"{CONFIG_FILENAME} ({key})"
            places[place] = {**_object(config[key], place), "quant_method": method}
    return {place: _object(document, place) for place, document in places.items()}


def _refuse_contradiction(
    format: Format, said: Quantization, first: Mapping[str, Any], other: Mapping[str, Any], place: str
) -> None:
    """Refuses a second quantization config that is of another format than the first, or says something else."""
    other_format = recognise(other, place)
    if other_format is not format:
        message = f"it is {other_format.title} here but {format.title} in {said.origin}; remove the file that is wrong"
        raise refuse("contradiction", message, file=place)
    found = format.read_config(other, place)
    for what in ("bits", "group_size", "zero_point"):
        both_say_it = all(document.get(what) is not None for document in (first, other))
        if getattr(said, what) != getattr(found, what) and (both_say_it or what != "zero_point"):
            raise refuse(
                "contradiction",
                f"{what} is {getattr(found, what)} here but {getattr(said, what)} in "
                f"{said.origin}; remove the file that is wrong",
                file=place,
            )


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
        elif key in FORMER_CONFIG_KEYS:
            continue
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
