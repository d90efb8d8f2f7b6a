"""What stops Transformers without our loader: a sentence in ``config.json``, where it looks for a file's name.

Transformers only warns of a quantization method that it does not know, leaves the quantized weights out, and fills the
model with random numbers. But from version 4.52 on it takes the name of the file with the weights from
``transformers_weights``, if ``config.json`` has that, and raises a ValueError that ends with the value if it is no name
of a safetensors file. So the value is what people have to know. vLLM and SGLang do not look there, nor does the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

WEIGHTS_KEY = "transformers_weights"

#: Parts of a multimodal model's config from which Transformers builds its language model without the rest.
_LANGUAGE_MODELS = ("text_config", "llm_config", "language_config", "thinker_config", "talker_config")

_BEGINNING = "marlin_native: "
_SENTENCE = (
    f"{_BEGINNING}by itself Transformers would leave the quantized weights out and write garbage. Install the newest "
    "awq2marlin, and put 'import awq2marlin.integrations.transformers' before from_pretrained"
)

#: The source's own value, kept at the end of the sentence as JSON.
_KEPT = re.compile(r" \[(.*)\]\Z", re.DOTALL)


def with_stop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that Transformers without our loader refuses with a sentence.

    Args:
        config: a ``config.json``, or a part of one; what it says there itself is kept in the sentence.
    """
    parts = {key: with_stop(config[key]) for key in _LANGUAGE_MODELS if isinstance(config.get(key), dict)}
    return {**config, **parts, WEIGHTS_KEY: _sentence(config)}


def without_stop(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, or a part of one, as it was before `with_stop`; parts below it stay as they are.

    Args:
        part: any; one that is not stopped comes back as it is.
    """
    if not is_stop(part.get(WEIGHTS_KEY)):
        return dict(part)
    kept = _kept(part[WEIGHTS_KEY])
    return {key: kept.get(key, value) for key, value in part.items() if key != WEIGHTS_KEY or kept}


def is_stop(value: Any) -> bool:
    """Returns whether a value under `WEIGHTS_KEY` is our sentence, of whatever version."""
    return isinstance(value, str) and value.startswith(_BEGINNING)


def _sentence(part: Mapping[str, Any]) -> str:
    own = without_stop(part)
    return f"{_SENTENCE} [{json.dumps(own[WEIGHTS_KEY])}]" if WEIGHTS_KEY in own else _SENTENCE


def _kept(sentence: str) -> dict[str, Any]:
    found = _KEPT.search(sentence)
    try:
        return {WEIGHTS_KEY: json.loads(found[1])} if found else {}
    except (ValueError, RecursionError):  # a stranger's
        return {}
