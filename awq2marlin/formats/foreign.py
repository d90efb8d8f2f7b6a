"""Formats that are not converted: refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq2marlin.errors import CheckpointError, printable, refuse
from awq2marlin.formats.awq import GPTQ_KEYS, LAYOUT_KEYS, is_llm_awq
from awq2marlin.formats.config import method_of, word

_LAYOUT_NAMES = {
    "llm-awq": "the layout of the llm-awq repository",
    "llm_awq": "the layout of the llm-awq repository",
    "exllama": "AWQ's ExLlama layout",
    "ipex": "AWQ's IPEX layout",
    "bitblas": "the BitBLAS layout",
}
_METHOD_NAMES = {
    "gptq_marlin": "a GPTQ checkpoint",
    "marlin": "an old GPTQ-Marlin checkpoint",
    "awq_marlin": "a checkpoint marked as packed by an engine",
    "bitsandbytes": "a bitsandbytes checkpoint",
    "fp8": "an FP8 checkpoint",
    "gguf": "a GGUF checkpoint",
}
_WHAT_TO_DO = (
    "Only AWQ (versions gemm, gemv, gemv_fast and marlin), GPTQ of format 'gptq' or 'gptq_v2', and compressed-tensors "
    "of format 'pack-quantized' are converted; look for such a version of this model"
)


def foreign(document: Mapping[str, Any], place: str) -> CheckpointError:
    """Returns the refusal of a checkpoint that no format claims, to be raised by the caller.

    Args:
        document: its quantization config.
        place: where that stands.
    """
    message = f"this is {_name(document, place)}, which is not converted. {_WHAT_TO_DO}"
    return refuse("foreign-format", message, file=place)


def _name(document: Mapping[str, Any], place: str) -> str:
    method = method_of(document, place)
    if method == "compressed-tensors":
        layout = word(document, "format", place)
        return f"a compressed-tensors checkpoint {f'of format {printable(layout)!r}' if layout else 'of no format'}"
    if method == "gptq" or (not method and any(key in document for key in GPTQ_KEYS)):
        said = [word(document, key, place) for key in ("checkpoint_format", "format")]
        layout = next((each for each in said if each not in ("", "gptq", "gptq_v2")), "marlin")
        return f"a GPTQ checkpoint of format {printable(layout)!r}"
    if method in _METHOD_NAMES:
        return _METHOD_NAMES[method]
    if method not in ("awq", ""):
        return f"a checkpoint of quant_method {printable(method)!r}"
    if is_llm_awq(document, place):
        return _LAYOUT_NAMES["llm-awq"]
    layouts = {key: word(document, key, place) for key in LAYOUT_KEYS}
    key, layout = next((key, layout) for key, layout in layouts.items() if layout not in ("gemm", ""))
    return _LAYOUT_NAMES.get(layout, f"AWQ with {key} {printable(layout)!r}")
