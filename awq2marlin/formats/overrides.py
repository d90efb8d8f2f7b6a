"""What configs of GPTQ and AutoRound say of single modules, beside what they say of all.

All modules of a checkpoint that is converted have the same bits and groups, as their tensors show. So what a config
says of one in particular can only repeat that, or contradict it. Sources: GPTQModel 7.7, ``QuantizeConfig.dynamic``;
auto-round 0.16, ``extra_config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from awq2marlin.errors import Problem, printable
from awq2marlin.layout.scheme import Scheme

#: Patterns that cannot take long, whatever they are held against: names, ``.`` and a few ``.*``.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\\.|\.(?!\*))*(?:\.\*(?:[\w-]|\\\.|\.(?!\*))*){0,3}\$?")

#: Bits from which on a weight is not quantized.
_FULL_BITS = 16

#: More patterns than this are not tried.
_MAX_PATTERNS = 32

_ADVICE = "correct it in a copy of the config, or look for another version of this model"


class Override(NamedTuple):
    """What a config says of some modules.

    Attributes:
        place: the config's key and the name or pattern there, for messages.
        said: of them, e.g. ``{"bits": 8}``; None if it says that they are not quantized.
    """

    place: str
    said: Mapping[str, int] | None


class Overrides(NamedTuple):
    """What a config says of single modules.

    Attributes:
        by_name: by a module's full name.
        by_pattern: (pattern, what it says of modules whose names begin so), of which the first counts.
    """

    by_name: Mapping[str, Override] = {}
    by_pattern: Sequence[tuple[re.Pattern[str], Override]] = ()

    def of(self, module: str) -> Override | None:
        """Returns what is said of a module; None if nothing is."""
        matching = (override for pattern, override in self.by_pattern if pattern.match(module))
        return self.by_name.get(module) or next(matching, None)


NO_OVERRIDES = Overrides()


def overrides_of(document: Mapping[str, Any]) -> Overrides:
    """Returns what a quantization config says of single modules, as far as it is understood.

    Args:
        document: a stranger's config. A pattern that might take long is not tried, nor are more than a few.
    """
    by_name = {
        name: Override(f"extra_config[{printable(repr(name))}]", _said(entry))
        for name, entry in _entries(document, "extra_config")
    }
    by_pattern = []
    for key, entry in islice(_entries(document, "dynamic"), _MAX_PATTERNS):
        pattern = key.removeprefix("-:").removeprefix("+:")
        if _PLAIN.fullmatch(pattern):
            said = None if key.startswith("-:") else _said(entry)
            by_pattern.append((re.compile(pattern), Override(f"dynamic[{printable(repr(key))}]", said)))
    return Overrides(by_name, by_pattern)


def contradictions(overrides: Overrides, modules: Iterable[str], scheme: Scheme, file: str) -> Iterator[Problem]:
    """Yields what a config says of modules otherwise than their tensors show.

    Args:
        overrides: what it says.
        modules: names of the quantized ones, all of one scheme.
        scheme: theirs.
        file: the config.
    """
    shown = {"bits": scheme.bits, "group_size": scheme.group_size}
    for name in modules if any(overrides) else ():
        override = overrides.of(name)
        if override is None:
            continue
        if override.said is None:
            message = f"{override.place} says that it is not quantized, but it has the tensors of a quantized module"
            yield Problem(file, name, "contradiction", f"{message}; {_ADVICE}")
        for key, value in (override.said or {}).items():
            if value != shown[key]:
                message = f"{override.place} says {key} {value}, but its tensors are of {scheme}"
                yield Problem(file, name, "contradiction", f"{message}; {_ADVICE}")


def _entries(document: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    value = document.get(key)
    for name, said in value.items() if isinstance(value, dict) else ():
        if isinstance(said, dict):
            yield name, said


def _said(entry: Mapping[str, Any]) -> Mapping[str, int] | None:
    said = {key: entry[key] for key in ("bits", "group_size") if type(entry.get(key)) is int}
    return None if said.get("bits", 0) >= _FULL_BITS else said
