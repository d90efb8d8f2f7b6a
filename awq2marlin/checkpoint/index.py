"""The index of a checkpoint's shards: which file holds which tensor, and what a conversion changes in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.formats.base import Format
from awq2marlin.formats.names import INDEX_FILENAME
from awq2marlin.io.folder import check_name
from awq2marlin.io.safetensors import Header, TensorIndex
from awq2marlin.io.source import Source

#: What to do about an index that the files contradict, where nobody can download a better one.
_GO_BY_THE_FILES = f"if the checkpoint was published like this, ignore the index: --leave {INDEX_FILENAME}"

#: What is wrong with a file that is no safetensors file, or none any more.
_UNREADABLE = ("truncated", "header-too-long", "bad-header", "bad-json")


def read_index(folder: Source) -> dict[str, str]:
    """Returns the file of every tensor, as the index says.

    Raises:
        CheckpointError: if it is malformed, or names what is no safetensors file inside the folder.
    """
    try:
        weight_map = _weight_map(folder)
    except CheckpointError as error:
        raise CheckpointError(replace(each, message=_advised(each.message)) for each in error.problems) from None
    for shard in sorted({*weight_map.values()}):
        if not shard.endswith(".safetensors"):
            raise refuse(
                "pickled-weights",
                f"it lists {printable(shard)!r}; only .safetensors files are read",
                file=INDEX_FILENAME,
            )
    return weight_map


def _advised(message: str) -> str:
    """Returns what is wrong with an index, and what to do; a part of that may be said already."""
    again = "" if "download it again" in message else "download it again; "
    return f"{message}; {again}{_GO_BY_THE_FILES}"


def _weight_map(folder: Source) -> dict[str, str]:
    """Returns the index's map from tensors to files, all names of which are safe."""
    document = folder.read_json(INDEX_FILENAME)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        message = "it must hold an object 'weight_map' that maps tensor names to files"
        raise refuse("bad-index", message, file=INDEX_FILENAME)
    named = {each if isinstance(each, str) else check_name(each, INDEX_FILENAME) for each in weight_map.values()}
    for shard in sorted(named):
        check_name(shard, INDEX_FILENAME)
    return weight_map


def open_index(
    folder: Source,
    shards: Sequence[str],
    weight_map: Mapping[str, str] | None,
    format: Format,
    known: Mapping[str, Header],
) -> tuple[TensorIndex, list[str]]:
    """Reads the headers of a checkpoint, and checks them against its index.

    Args:
        folder: the checkpoint's.
        shards: the files that hold its tensors.
        weight_map: what the index says; None without one.
        format: the checkpoint's.
        known: headers that were read already.

    Returns:
        The headers, and oddities. Without an index a file that holds no tensor is no shard, as no index would name it.

    Raises:
        CheckpointError: if a header is malformed, or the files cannot be one checkpoint.
    """
    try:
        read = folder.read_headers([name for name in shards if name not in known])
    except CheckpointError as error:
        problem = error.problems[0]
        if weight_map is not None or len(shards) == 1 or problem.code not in _UNREADABLE:
            raise
        raise _not_one(shards, f"{printable(problem.file)} cannot be read ({problem.message})") from None
    headers = {name: known[name] if name in known else read[name] for name in shards}
    if weight_map is None:
        _refuse_clash(headers)
        return TensorIndex({name: header for name, header in headers.items() if header.tensors} or headers), []
    _refuse_contradictions(headers, weight_map)
    index = index_of(headers, weight_map, format)
    return index, [*_unlisted(index), *_copies(index)]


def index_of(headers: Mapping[str, Header], weight_map: Mapping[str, str] | None, format: Format) -> TensorIndex:
    """Returns the tensors of a checkpoint that count.

    Args:
        headers: by file name.
        weight_map: what the index says; None without one.
        format: the checkpoint's.
    """
    if weight_map is None:
        return TensorIndex(headers)
    names = {name for header in headers.values() for name in header.tensors}
    return TensorIndex(headers, weight_map, format.set_aside(names, weight_map))


def _not_one(shards: Sequence[str], why: str) -> CheckpointError:
    names = ", ".join(map(printable, shards[:20]))
    return refuse(
        "no-index",
        f"there are {len(shards)} .safetensors files but no {INDEX_FILENAME} that says which tensors they hold, and "
        f"they are not one checkpoint: {why}. The files are {names}. Download the index, or exclude "
        "the file that does not belong: --leave FILE, or --carry FILE to copy it as it is",
        file=INDEX_FILENAME,
    )


def _refuse_clash(shards: Mapping[str, Header]) -> None:
    """Refuses shards without an index of which two hold a tensor of one name: nobody knows which one counts."""
    owner: dict[str, str] = {}
    for shard, header in shards.items():
        twice = [name for name in header.tensors if name in owner]
        if twice:
            more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            both = f"{printable(owner[twice[0]])} and {printable(shard)} both hold {printable(twice[0])}{more}"
            raise _not_one([*shards], both)
        owner |= dict.fromkeys(header.tensors, shard)


def _refuse_contradictions(shards: Mapping[str, Header], weight_map: Mapping[str, str]) -> None:
    """Refuses files that are not those of the index.

    Two files may hold a tensor of one name, as where official shards were taken over and only some tensors were
    written anew: the index says which counts.
    """
    problems = []
    owner: dict[str, str] = {}
    for shard, header in shards.items():
        for name in header.tensors:
            said = weight_map.get(name)
            if said == shard:
                continue
            if said is None and name in owner:
                message = f"{owner[name]} also holds a tensor of this name, and the index does not say which one counts"
                problems.append(Problem(shard, name, "duplicate-tensor", message))
            if said is None:
                owner[name] = shard
            elif name not in shards[said].tensors:
                message = f"the index says it is in {said}; {_GO_BY_THE_FILES}"
                problems.append(Problem(shard, name, "contradiction", message))
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            message = (
                f"the index says it is in this file, but it is not; download the file again, or {_GO_BY_THE_FILES}"
            )
            problems.append(Problem(shard, name, "missing-tensor", message))
    if problems:
        raise CheckpointError(problems)


def _unlisted(index: TensorIndex) -> Iterator[str]:
    unlisted = sorted(index.tensors.keys() - index.weight_map.keys())
    if unlisted:
        yield f"{len(unlisted)} tensors are missing from the index; the first is {printable(unlisted[0])}"


def _copies(index: TensorIndex) -> Iterator[str]:
    """Yields what is to say of tensors that do not count."""
    copies = [(name, shard) for shard, names in index.copies.items() for name in names]
    same = [each for each in copies if each[0] in index.tensors and is_like(index, *each)]
    other = [each for each in copies if each[0] in index.tensors and not is_like(index, *each)]
    beside = [each for each in copies if each[0] not in index.tensors]
    for found, what in (
        (same, "are in a second file too, which engines also read; the copy is converted as well"),
        (other, "are in a second file too, with another type or shape; the copy is carried over as it is"),
        (beside, "do not count, as the index lists their module in another form; they are carried over"),
    ):
        if found:
            name, shard = min(found)
            place = f"{printable(name)} in {printable(shard)}"
            yield f"{len(found)} tensors {what} (the index decides which count); the first is {place}"


def is_like(index: TensorIndex, name: str, shard: str) -> bool:
    """Returns whether a copy has the type and shape of the tensor that counts.

    Args:
        index: of a checkpoint.
        name: of the tensor.
        shard: the file of the copy.
    """
    copy, counting = index.headers[shard].tensors[name], index.tensors[name]
    return (copy.dtype, copy.shape) == (counting.dtype, counting.shape)


def made_index(headers: Mapping[str, Header]) -> dict[str, Any]:
    """Returns an index of files that have none.

    Args:
        headers: by file name.
    """
    weight_map = {name: shard for shard, header in headers.items() for name in header.tensors}
    total = sum(header.data_size for header in headers.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def converted_index(
    read: Callable[[], Any], source: TensorIndex, target: Mapping[str, Header], counterparts: Counterparts
) -> Any:
    """Returns the index of a converted checkpoint, or None if it is the source's.

    It differs where padding makes another total size, and where tensors have other names.

    Args:
        read: returns the source's index.
        source: the source's tensors.
        target: the converted headers, by file name.
        counterparts: which tensor is which.
    """
    before, after = (sum(header.data_size for header in headers.values()) for headers in (source.headers, target))
    renamed = any(source.headers[name].tensors.keys() != target[name].tensors.keys() for name in source.headers)
    if before == after and not renamed:
        return None
    document = read()
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = after
    if renamed:
        document["weight_map"] = target_weight_map(source, target, counterparts)
    return document


def target_weight_map(source: TensorIndex, target: Mapping[str, Header], counterparts: Counterparts) -> dict[str, str]:
    """Returns the file of every converted tensor that counts: the one whose source counts, or which the index names.

    It may name tensors that are set aside; a file that holds no others would be no shard without them.

    Args:
        source: the source's tensors.
        target: the converted headers, by file name.
        counterparts: which tensor is which.
    """
    if not source.copies:
        return {name: shard for shard, header in target.items() for name in header.tensors}
    return {
        name: shard
        for shard, header in source.headers.items()
        for place, name in counterparts.names(shard, header)
        if source.counts(shard, place) or source.weight_map.get(place) == shard
    }
