"""Reading a checkpoint's config: where the quantization config stands, and which format it is one of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from awq2marlin.checkpoint.nearby import checkpoints_below
from awq2marlin.errors import CheckpointError, printable, refuse, some_of
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.foreign import MODELOPT_FILENAME, foreign_file, said_otherwise
from awq2marlin.formats.names import CONFIG_FILENAME, LEGACY_CONFIG_FILENAMES
from awq2marlin.formats.plain_transformers import with_stop, without_stop
from awq2marlin.formats.registry import FORMER_CONFIG_KEYS, recognise
from awq2marlin.io.source import Source
from awq2marlin.io.strict_json import parse_json, same_json

_KEY = "quantization_config"

#: What JSON values are called that are no objects, nor null.
_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}


class Document(NamedTuple):
    """A quantization config, and where it stands.

    Attributes:
        place: the file, with the part of ``config.json`` in parentheses if it stands deeper: ``config.json
            (thinker_config.text_config)``.
        content: the config, as the file says it.
    """

    place: str
    content: dict[str, Any]


def read_config(folder: Source) -> dict[str, Any]:
    """Returns the document in ``config.json``.

    Raises:
        CheckpointError: if it is missing, malformed or no object.
    """
    if not folder.exists(CONFIG_FILENAME):
        refuse_only_gguf(folder)
        raise refuse(
            "no-config",
            f"not found in {printable(str(folder.where))}; "
            f"{checkpoints_below(folder) or 'pass a complete checkpoint folder'}",
            file=CONFIG_FILENAME,
        )
    return _object(folder.read_json(CONFIG_FILENAME, constants=True), CONFIG_FILENAME)


def refuse_only_gguf(folder: Source) -> None:
    """Refuses a folder that has GGUF files, where the caller misses what all other checkpoints have.

    Raises:
        CheckpointError: naming the first of them.
    """
    names = [name for name in folder.names() if "/" not in name]
    found = [name for name in names if name.endswith(".gguf")]
    if found and not any(name.endswith(".safetensors") for name in names):
        raise foreign_file(found[0])


def read_quantization(folder: Source, config: Mapping[str, Any]) -> tuple[Format, Quantization, list[str]]:
    """Returns the format of the checkpoint in ``folder``, how it is quantized, and oddities that do no harm.

    Looks in ``config.json``, in its parts however deep, and in the files of older tools; where several say something of
    one format they must agree. Beside a ``config.json`` that says it, a file of an older tool that says nothing, or
    speaks of another format, is only told of: no engine asks it then.

    Args:
        folder: the checkpoint.
        config: its ``config.json``, as `read_config` returns it.

    Raises:
        CheckpointError: if it is not quantized, of a format that is none of ours, or says two different things.
    """
    documents = _all_documents(folder, config)
    older, warnings = _older_documents(folder, is_needed=not documents)
    if not documents:
        documents, older = older[:1], older[1:]
    if not documents:
        refuse_only_gguf(folder)
        raise refuse(
            "not-quantized",
            "there is no quantization config: this checkpoint is not quantized. Pass one that is",
            file=CONFIG_FILENAME,
        )
    first, *others = documents
    format = recognise(first.content, first.place)
    quantization = format.read_config(first.content, first.place)
    if not format.is_own:  # our own has one config, and what stands beside it was carried over
        for other in others:
            _refuse_contradiction(format, quantization, first.content, other)
        for other in older:
            warnings += _compare_older(format, quantization, first, other)
    return format, quantization, warnings


def quantization_documents(config: Mapping[str, Any]) -> list[Document]:
    """Returns every quantization config in ``config.json``, the one at the top first; an empty one only if all are.

    Args:
        config: ``config.json``.

    Raises:
        CheckpointError: if one is no object.
    """
    found = [Document(place, _object(value, place, _KEY)) for place, value in _places(config, ())]
    return [each for each in found if each.content] or found


def quantization_said(folder: Source, config: Mapping[str, Any]) -> Document | None:
    """Returns the quantization config that counts, whatever it says; None if there is none.

    Args:
        folder: the checkpoint.
        config: its ``config.json``; empty if there is none.
    """
    documents = _all_documents(folder, config)
    if not documents:
        documents, _ = _older_documents(folder, is_needed=False)
    return documents[0] if documents else None


def _all_documents(folder: Source, config: Mapping[str, Any]) -> list[Document]:
    documents = quantization_documents(config)
    if any("quant_method" in each.content for each in documents):
        return documents
    return [*_said_otherwise(folder, config), *documents]


def _said_otherwise(folder: Source, config: Mapping[str, Any]) -> list[Document]:
    """Returns what tools whose formats are not converted say elsewhere, as a quantization config."""
    if folder.exists(MODELOPT_FILENAME):
        said = _object(folder.read_json(MODELOPT_FILENAME, constants=True), MODELOPT_FILENAME).get("quantization")
        numbers = said if isinstance(said, dict) else {}
        return [Document(MODELOPT_FILENAME, {**numbers, "quant_method": "modelopt"})]
    is_older = any(map(folder.exists, LEGACY_CONFIG_FILENAMES))  # then a file that only lies there means nothing
    found = said_otherwise(config, () if is_older else {*folder.names()})
    return [] if found is None else [Document(*found)]


def _places(part: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields what stands in a part of a config under the keys of quantization configs, and in the parts below it."""
    if isinstance(part, list):
        for at, each in enumerate(part):
            yield from _places(each, (*path, str(at)))
    if not isinstance(part, dict):
        return
    if part.get(_KEY) is not None:
        yield _place(path), part[_KEY]
    for key, method in FORMER_CONFIG_KEYS.items():
        if part.get(key) is not None:
            place = _place((*path, key))
            yield place, {**_object(part[key], place, key), "quant_method": method}
    for key, each in part.items():
        if not _is_key(key):
            yield from _places(each, (*path, key))


def _place(path: tuple[str, ...]) -> str:
    return f"{CONFIG_FILENAME} ({printable('.'.join(path))})" if path else CONFIG_FILENAME


def _is_key(key: str) -> bool:
    return key == _KEY or key in FORMER_CONFIG_KEYS


def _older_documents(folder: Source, *, is_needed: bool) -> tuple[list[Document], list[str]]:
    """Returns the quantization configs in files of older tools; and a sentence on each file that holds none.

    Args:
        folder: the checkpoint.
        is_needed: whether ``config.json`` says nothing, so that such a file is refused.
    """
    documents, warnings = [], []
    for name in filter(folder.exists, LEGACY_CONFIG_FILENAMES):
        data = folder.read(name)
        try:
            documents.append(Document(name, _object(parse_json(data, name, constants=True), name)))
        except CheckpointError as error:
            if is_needed or not _is_text(data):  # the manifest keeps texts only
                raise
            warnings.append(_unused(name, error.problems[0].message if data.strip() else "it is empty"))
    return documents, warnings


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unused(name: str, reason: str) -> str:
    return f"{name} is ignored: {CONFIG_FILENAME} says how the checkpoint is quantized ({printable(reason)})"


def _compare_older(format: Format, said: Quantization, first: Document, other: Document) -> Iterator[str]:
    """Refuses an older tool's file that contradicts the first config; yields why one of another format is not used."""
    if first.place in LEGACY_CONFIG_FILENAMES:  # there is nothing else that would count
        _refuse_contradiction(format, said, first.content, other)
        return
    try:
        found = recognise(other.content, other.place)
        found.read_config(other.content, other.place)
    except CheckpointError as error:
        yield _unused(other.place, error.problems[0].message if other.content else "it is empty")
        return
    if found is format:
        _refuse_contradiction(format, said, first.content, other)
    else:
        yield _unused(other.place, f"it describes {found.title}")


def _refuse_contradiction(format: Format, said: Quantization, first: Mapping[str, Any], other: Document) -> None:
    """Refuses a second quantization config that is of another format than the first, or says something else."""
    place, content = other
    other_format = recognise(content, place)
    if other_format is not format:
        message = f"it is {other_format.title} here but {format.title} in {said.origin}; remove the one that is wrong"
        raise refuse("contradiction", message, file=place)
    found = format.read_config(content, place)
    if said.layout and found.layout and said.layout.layout_name != found.layout.layout_name:
        message = (
            f"the layout is that of {found.layout.title} here, of {said.layout.title} in {said.origin}; "
            "remove the one that is wrong"
        )
        raise refuse("contradiction", message, file=place)
    key = format.zero_point_key
    theirs, ours = content.get(key), first.get(key)
    if theirs is not None and ours is not None and theirs != ours:
        raise _contradiction(key, theirs, ours, said, place)
    for what in ("bits", "group_size"):
        if getattr(said, what) != getattr(found, what):
            raise _contradiction(what, getattr(found, what), getattr(said, what), said, place)


def _contradiction(what: str, theirs: Any, ours: Any, said: Quantization, place: str) -> CheckpointError:
    message = f"{what} is {theirs} here but {ours} in {said.origin}; remove the one that is wrong"
    return refuse("contradiction", message, file=place)


def written_config(config: Mapping[str, Any], format: Format, quantization: Quantization) -> dict[str, Any]:
    """Returns the ``config.json`` of an output.

    Args:
        config: the source's.
        format: of the output.
        quantization: what the output's config has to say.
    """
    document, result = format.write_config(quantization), {}
    for key, value in without_stop(config).items():
        if key == _KEY:
            result[key] = document  # in the old one's place
        elif not _is_key(key):
            result[key] = _stripped(value)
    result.setdefault(_KEY, document)
    return with_stop(result) if format.is_own else result


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a config without what says how it is quantized, wherever it stands.

    Args:
        config: any ``config.json``, that of a conversion too.
    """
    return {key: _stripped(value) for key, value in without_stop(config).items() if not _is_key(key)}


def changed_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Returns under which keys two configs differ, but for how they are quantized, in words; empty if under none.

    Args:
        one: a ``config.json``.
        other: another one.
    """
    left, right = without_quantization(one), without_quantization(other)
    keys = sorted(
        key for key in {*left, *right} if not (key in left and key in right and same_json(left[key], right[key]))
    )
    return some_of(map(printable, keys)) if keys else ""


def _stripped(part: Any) -> Any:
    """Returns a part of a config without the quantization configs in it."""
    if isinstance(part, dict):
        return without_quantization(part)
    return [_stripped(each) for each in part] if isinstance(part, list) else part


def _object(value: Any, file: str, key: str = "") -> dict[str, Any]:
    """Returns a value that must be an object.

    Args:
        value: of a config.
        file: where it stands, for messages.
        key: what it stands under; empty if it is the whole file.
    """
    if not isinstance(value, dict):
        found = _KINDS.get(type(value), "null")
        must = f"{key} must be" if key else "it must hold"
        raise refuse("bad-config", f"{must} a JSON object, found {found}; download the file again", file=file)
    return value
