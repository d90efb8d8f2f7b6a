"""Arguments whose types say what they may be: stated once, checked where they are stated, refused in words.

A frozen data class of options inherits `Checked`, and its annotations are the rules for each of its fields. A rule
about several fields stands in the class's own ``__post_init__``. A refusal is an `ArgumentError`, whose sentence a
command line can put into its own spelling.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from awq2marlin.errors import printable

#: More threads than this are a mistake.
MAX_WORKERS = 256

#: How many threads to use.
Workers = Annotated[int, range(1, MAX_WORKERS + 1)]

#: How many of something, none included.
Count = Annotated[int, range(sys.maxsize)]


#: Several texts, none included.
Texts = Sequence[str]

_Options = TypeVar("_Options", bound="Checked")


class ArgumentError(ValueError):
    """An argument that is none of its choices, or does not go with another."""

    def __init__(self, sentence: str, **found: str) -> None:
        """Takes what is wrong.

        Args:
            sentence: for people, with the names of arguments in braces: ``"{device} needs {verify}"``.
            **found: texts that stand in the sentence in braces too, but are no arguments; already printable.
        """
        super().__init__(sentence)
        self._sentence, self._found = sentence, found

    def __str__(self) -> str:
        """Returns the sentence with the names as they are in Python."""
        return self.spelled(str)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """Returns the sentence with every argument's name as ``spell`` writes it."""
        return re.sub(r"\{(\w+)\}", lambda name: self._found.get(name[1]) or spell(name[1]), self._sentence)


def one_of(words: Iterable[object]) -> str:
    """Returns things of which one is to be taken, in one phrase: ``a, b or c``; empty without any."""
    *several, last = [str(word) for word in words] or [""]
    return f"{', '.join(several)} or {last}" if several else last


class Kind(NamedTuple):
    """What an argument may be.

    Attributes:
        words: its choices, for people; an argument that may be left out has no word for that.
        takes: answers whether a value is one of them.
    """

    words: tuple[str, ...]
    takes: Callable[[Any], bool]

    @property
    def needed(self) -> str:
        """The choices in one phrase, such as ``a number >= 0, 'all' or 'none'``."""
        return one_of(self.words)

    def check(self, name: str, value: object) -> None:
        """Refuses a value that is none of the choices.

        Args:
            name: the argument's.
            value: what the caller gave.

        Raises:
            ArgumentError: naming the argument, what is needed and what was found.
        """
        if not self.takes(value):
            found = printable(repr(value))
            raise ArgumentError(f"{{{name}}} must be {{needed}}, found {{found}}", needed=self.needed, found=found)


def kind_of(hint: Any) -> Kind:
    """Returns what a type says that an argument may be.

    Args:
        hint: ``bool``, ``str`` (which must not be empty), a sequence of texts, an ``int`` annotated with its range, a
            `Literal`, another class or a protocol that is checked at run time, or a union of these; with None if the
            argument may be left out.
    """
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind_of(each) for each in get_args(hint)]
        words = tuple(word for kind in kinds for word in kind.words)
        return Kind(words, lambda value: any(kind.takes(value) for kind in kinds))
    if hint == Texts:
        text = kind_of(str)
        return Kind(
            ("a list of non-empty strings",),
            lambda value: isinstance(value, (list, tuple)) and all(map(text.takes, value)),
        )
    if get_origin(hint) is Literal:
        return Kind(tuple(map(repr, get_args(hint))), lambda value: value in get_args(hint))
    if get_origin(hint) is Annotated:
        bounds: range = hint.__metadata__[0]
        is_bounded = bounds.stop < sys.maxsize
        what = f"a number from {bounds.start} to {bounds.stop - 1}" if is_bounded else f"a number >= {bounds.start}"
        return Kind((what,), lambda value: type(value) is int and value in bounds)
    if hint is NoneType:
        return Kind((), lambda value: value is None)
    if hint is bool:
        return Kind(("true or false",), lambda value: type(value) is bool)
    if hint is str:
        return Kind(("a non-empty string",), lambda value: isinstance(value, str) and bool(value) and "\0" not in value)
    article = "an" if hint.__name__[0] in "AEIOU" else "a"
    return Kind((f"{article} {hint.__name__}",), lambda value: isinstance(value, hint))


def kinds(options: type) -> Mapping[str, Kind]:
    """Returns what each field of a data class may be, by its name, in order."""
    return {name: kind_of(hint) for name, hint in get_type_hints(options, include_extras=True).items()}


class Checked:
    """A base of frozen data classes of options, which refuse a value that is not of its field's type."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ArgumentError: naming the field.
        """
        for name, kind in kinds(type(self)).items():
            kind.check(name, getattr(self, name))

    @classmethod
    def of(cls: type[_Options], given: Mapping[str, Any]) -> _Options:
        """Returns the options among several arguments; those that are not given have their defaults.

        Args:
            given: values by name; what is no field of this class is left aside.

        Raises:
            ArgumentError: as the class does.
        """
        return cls(**{name: given[name] for name in kinds(cls) if name in given})
