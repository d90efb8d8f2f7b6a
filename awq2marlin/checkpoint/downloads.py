"""Downloads that went wrong: what is not finished, and what lies in the place of a file that never came."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from awq2marlin.checkpoint.choice import Choice
from awq2marlin.errors import CheckpointError, Problem, printable, some_of
from awq2marlin.io.impostors import HEAD_BYTES, Impostor, impostor
from awq2marlin.io.source import Source

_MARKS = r"\.(?:aria2(?:__temp)?|part|partial|incomplete|crdownload|download)"
_UNFINISHED_SHARD = re.compile(rf"(.*?\.safetensors)(?:\..*)?{_MARKS}")
_UNFINISHED = re.compile(rf".*{_MARKS}")

#: Files of these names hold bytes, so that a page or JSON in one is something else.
_BINARY = re.compile(
    r".*\.(?:safetensors|bin|pth?|ckpt|pkl|pickle|onnx|gguf|model|h5|msgpack|np[yz]|png|jpe?g|gif|webp|wav|mp[34]|flac|zip|t?gz)",
    re.IGNORECASE,
)


def refuse_unfinished(visible: Iterable[str], weight_map: Mapping[str, str] | None, choice: Choice) -> None:
    """Refuses shards whose download is not finished, as a file of a download manager beside them says.

    Args:
        visible: names of all files that are not hidden.
        weight_map: what the index says; None without one.
        choice: what is said of single files; one that is spoken of is no sign.

    Raises:
        CheckpointError: naming every such file.
    """
    shards = None if weight_map is None else set(weight_map.values())
    problems = []
    for name in visible:
        found = _UNFINISHED_SHARD.fullmatch(name)
        if found is None or choice.fate(name) is not None:
            continue
        shard = found[1]
        if shard in shards if shards is not None else "/" not in shard:
            message = (
                f"this file means that the download of {printable(shard)} is not finished; finish it and "
                "run the command again, or remove this file if you know that the other one is complete"
            )
            problems.append(Problem(name, "", "unfinished-download", message))
    if problems:
        raise CheckpointError(problems)


def doubtful(folder: Source, names: Collection[str]) -> Iterator[str]:
    """Yields what is to say of files that are carried over and are not what their names promise.

    Args:
        folder: the checkpoint's.
        names: of the files.
    """
    found: dict[Impostor, list[str]] = defaultdict(list)
    for name in names:
        what = _impostor(folder, name)
        if what is not None:
            found[what].append(name)
    for what, members in found.items():
        shown = some_of(map(printable, members))
        yield f"{what.what} instead of the file itself, carried over as it is: {shown}; {what.remedy}"
    unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
    if unfinished:
        shown = some_of(map(printable, unfinished))
        yield f"unfinished downloads beside the checkpoint: {shown}; finish or remove them"


def _impostor(folder: Source, name: str) -> Impostor | None:
    is_binary = _BINARY.fullmatch(name) is not None
    size = folder.size(name)
    if folder.origin is not None and not (size <= HEAD_BYTES and (is_binary or name == "tokenizer.json")):
        return None  # elsewhere every look is a request, and what was uploaded as a whole is one
    found = impostor(folder.read_range(name, 0, min(size, HEAD_BYTES)))
    if found is None or found.is_pointer or is_binary:
        return found
    return found if name.endswith(".json") and not found.is_json else None
