"""How engines serve an output, or why one cannot: a format says it once, and screen, JSON and model card print it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """How one engine serves an output.

    Attributes:
        engine: its name.
        command: lines that serve it, of a shell or of Python; empty if it cannot.
        reason: why it cannot, in words; empty if it can.
        language: what the lines are of: ``sh`` or ``python``.
        install: the command that brings what the engine needs besides; empty if it needs nothing.
        where: where that is run; empty if it does not matter.
        versions: which versions of the engine serve it, in words; empty for all.
        note: what else is to know, in a sentence; may be empty.
    """

    engine: str
    command: str = ""
    reason: str = ""
    language: str = "sh"
    install: str = ""
    where: str = ""
    versions: str = ""
    note: str = ""


def in_vllm(place: str, options: str = "") -> str:
    """Returns the command with which vLLM serves a checkpoint.

    Args:
        place: its folder or repository.
        options: further ones.
    """
    return f"vllm serve {_argument(place)}{options}"


def in_sglang(place: str, options: str = "") -> str:
    """Returns the command with which SGLang serves a checkpoint; arguments as for `in_vllm`."""
    return f"sglang serve --model-path {_argument(place)}{options}"


def in_transformers(place: str, first: str = "") -> str:
    """Returns the lines with which Transformers loads a checkpoint.

    Args:
        place: its folder or repository.
        first: lines before these, each with its end.
    """
    name = json.dumps(place)
    return (
        f"{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({name}, device_map="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({name})"
    )


def _argument(place: str) -> str:
    """Returns a place as one word of a shell that is no option."""
    return shlex.quote(f"./{place}" if place.startswith("-") else place)
