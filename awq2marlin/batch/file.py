"""The list of a batch: one source a line, or YAML, JSON or JSONL with options for each item.

Everything that is wrong with a list is told at once, before anything starts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from awq2marlin.arguments import ArgumentError, Kind, kind_of, kinds
from awq2marlin.commands.options import TARGET_OPTIONS, ConvertOptions
from awq2marlin.errors import BatchError, CheckpointError, Problem, printable
from awq2marlin.hub.target import PushTarget
from awq2marlin.io.source import MAX_JSON_BYTES
from awq2marlin.io.strict_json import parse_json

#: (where it stands, what stands there): a source, or a mapping with ``source`` and options.
Entry = tuple[str, Any]


@dataclass(frozen=True)
class BatchItem:
    """One conversion of a batch, as the list says it.

    Attributes:
        place: where it stands in the list, for messages.
        source: as `awq2marlin.convert` takes it.
        options: keyword arguments of `awq2marlin.convert`, checked; ``output`` among them if it is given.
    """

    place: str
    source: str
    options: Mapping[str, Any]


_TEXT = kind_of(str)

#: What an item may give beside its source: the options of `convert` and, beside them, those of a `PushTarget`.
OPTIONS: Mapping[str, Kind] = {
    "output": Kind(("a path",), _TEXT.takes),
    **{name: kind for name, kind in kinds(ConvertOptions).items() if name != "dry_run"},
    "push_to": Kind(("a repository or an owner on the Hub",), kind_of(str | None).takes),
    **{name: kind for name, kind in kinds(PushTarget).items() if name in TARGET_OPTIONS},
}


def read_batch_file(path: Path) -> list[BatchItem]:
    """Reads a list; its form follows from its name.

    Args:
        path: ``.yaml``, ``.yml`` or ``.json``: a list of sources and of mappings with ``source`` and options;
            ``.jsonl`` or ``.ndjson``: one of these a line; any other: one source a line.

    Raises:
        BatchError: with everything that is wrong with it.
        OSError: if it cannot be read.
    """
    problems: list[Problem] = []
    if path.is_dir():
        advice = "'ls -d FOLDER/* | awq2marlin batch -' converts everything in it"
        raise BatchError(_problem(str(path), f"this is a folder, not a list of sources; {advice}"))
    items = _checked(_entries(path, problems), str(path), problems)
    if not items and not problems:
        problems.append(_problem(str(path), "the list is empty"))
    if problems:
        raise BatchError(problems)
    return items


def lines_of(stream: BinaryIO, name: str) -> list[str]:
    """Returns the sources in a list of one source a line, such as standard input.

    Args:
        stream: the list.
        name: what messages call it.

    Raises:
        BatchError: if it is no text, too long, or names no source.
    """
    entries = [line.strip() for line in _text_of(stream, name).split("\n")]
    sources = [line for line in entries if line and not line.startswith("#")]
    if not sources:
        raise BatchError(_problem(name, "the list is empty"))
    return sources


def check_entries(entries: Iterable[Any]) -> list[BatchItem]:
    """Returns the items of a list that a caller made.

    Args:
        entries: sources, and mappings with ``source`` and options.

    Raises:
        BatchError: with everything that is wrong with them.
    """
    problems: list[Problem] = []
    items = _checked(((f"item {number}", entry) for number, entry in enumerate(entries, 1)), "", problems)
    if problems:
        raise BatchError(problems)
    return items


def check_options(options: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yields what is wrong with options, one sentence each.

    Args:
        options: by name.
        place: where they stand, for the sentence.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            meant = "".join(f"; did you mean {each!r}?" for each in get_close_matches(str(name), OPTIONS, 1))
            advice = meant or f"; the options are {', '.join(OPTIONS)}"
            yield f"{place}: unknown option {printable(str(name))!r}{advice}"
            continue
        try:
            OPTIONS[name].check(name, value)
        except ArgumentError as error:
            yield f"{place}: {error}"


def _problem(file: str, message: str) -> Problem:
    return Problem(file, "", "bad-batch", message)


def _checked(entries: Iterable[Entry], file: str, problems: list[Problem]) -> list[BatchItem]:
    items = []
    for place, entry in entries:
        found = dict(entry) if isinstance(entry, Mapping) else {"source": entry}
        plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in found.items()}
        source = plain.pop("source", None)
        wrong = list(check_options(plain, place))
        if not _TEXT.takes(source):
            found_instead = "nothing" if source is None else printable(repr(source))
            wrong.insert(0, f"{place}: source must be a folder or a repository, found {found_instead}")
        problems += [_problem(file, each) for each in wrong]
        items.append(BatchItem(place, str(source), plain))
    return items


def _entries(path: Path, problems: list[Problem]) -> Iterator[Entry]:
    """Yields what the file lists; what cannot be read of it becomes a problem."""
    text = _read_text(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        yield from _yaml_entries(text, str(path), problems)
    elif path.suffix.lower() == ".json":
        yield from _json_entries(text, str(path))
    else:
        is_json = path.suffix.lower() in (".jsonl", ".ndjson")
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            place = f"line {number}"
            if not is_json:
                yield place, line.strip()
                continue
            try:
                yield place, parse_json(line.encode(), place)
            except CheckpointError as error:
                problems.append(_problem(str(path), str(error)))


def _read_text(path: Path) -> str:
    with path.open("rb") as stream:
        return _text_of(stream, str(path))


def _text_of(stream: BinaryIO, name: str) -> str:
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise BatchError(_problem(name, f"it has more than {MAX_JSON_BYTES} bytes; is it a list of sources?"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BatchError(_problem(name, f"it is not UTF-8 (byte {error.start}); is it a list of sources?")) from None


def _json_entries(text: str, file: str) -> Iterator[Entry]:
    try:
        document = parse_json(text.encode(), file)
    except CheckpointError as error:
        raise BatchError(_problem(file, error.problems[0].message)) from None
    if not isinstance(document, list):
        raise BatchError(_problem(file, "it must be a list"))
    yield from ((f"item {number}", entry) for number, entry in enumerate(document, 1))


def _yaml_entries(text: str, file: str, problems: list[Problem]) -> Iterator[Entry]:
    import yaml

    class Strict(yaml.SafeLoader):
        """Plain values only, and no key twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, count in names.items():
                if count > 1:
                    message = f"it names {printable(name)!r} twice"
                    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        loader = Strict(text)
        document = loader.get_single_node()
        if not isinstance(document, yaml.SequenceNode):
            raise BatchError(_problem(file, "it must be a list: lines that begin with '- '"))
        for node in document.value:
            try:
                yield f"line {node.start_mark.line + 1}", loader.construct_object(node, deep=True)
            except yaml.MarkedYAMLError as error:
                problems.append(_yaml_problem(error, file))
    except yaml.MarkedYAMLError as error:
        raise BatchError(_yaml_problem(error, file)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BatchError(_problem(file, f"it is not YAML: {type(error).__name__}")) from None


def _yaml_problem(error: Any, file: str) -> Problem:
    place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return _problem(file, f"{place}it is not YAML that this command reads: {error.problem or error.context}")
