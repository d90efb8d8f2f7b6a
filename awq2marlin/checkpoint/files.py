"""Which files of a folder hold the tensors, which are carried over as they are, and which stay behind.

What a model needs is nobody's to guess, so every file is carried over, unopened, but for what is recognisably the
model's own weights once more, what training left, and hidden files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import NamedTuple

from awq2marlin.checkpoint.choice import Choice
from awq2marlin.checkpoint.config import refuse_only_gguf
from awq2marlin.checkpoint.downloads import refuse_unfinished
from awq2marlin.checkpoint.index import read_index
from awq2marlin.checkpoint.nearby import weights_below
from awq2marlin.errors import CheckpointError, Problem, printable, refuse, size_text, some_of
from awq2marlin.formats.names import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    INDEX_FILENAME,
    LEGACY_CONFIG_FILENAMES,
    MANIFEST_FILENAME,
)
from awq2marlin.io.folder import is_hostile_name, is_plain_name, is_safe_name
from awq2marlin.io.source import Source

SINGLE_SHARD = "model.safetensors"
OWN_FILENAMES = (CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME, *LEGACY_CONFIG_FILENAMES)
_SAFETENSORS = ".safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

#: The model's own weights in another form, at the top: in a folder such a file belongs to a part of the model.
_OTHER_FORMS = {
    "pickled weights": ("pytorch_model*.bin", "*.bin.index.json"),
    "the same weights in another form": ("tf_model*.h5", "tf_model*.h5.index.json", "flax_model*.msgpack*"),
}
#: What is left behind wherever it lies.
_NEVER_NEEDED = {
    "the same weights in another form": (
        *(f"consolidated*{suffix}" for suffix in (_SAFETENSORS, *_PICKLE_SUFFIXES)),
        "consolidated*.safetensors.index.json",
    ),
    "left over from training": (
        *(f"{what}*{suffix}" for what in ("optimizer", "scheduler") for suffix in _PICKLE_SUFFIXES),
        *("training_args.bin", "scaler.pt", "rng_state*.pth", "random_states*.pkl", "*_optim_states.pt"),
    ),
}
_HIDDEN = "hidden"
_NOT_NAMED = "not named by the index"
_FIRST_READ = f"{_NOT_NAMED}, but some engines would read it first"
_NOT_OF_THE_CONVERSION = "no part of the conversion"
_CHOSEN = "as --leave says"
_HOSTILE = "is absolute, has '..', or control characters"
_UNWRITABLE = "its name means something else on other systems"
CANNOT_HOLD = "the output's file system cannot hold its name"

#: Reasons that no option helps against.
_BY_NAME = (_UNWRITABLE, CANNOT_HOLD)

#: Tensors that are none of the model's, beside it: engines load such files by name.
_ADAPTERS = ("adapter_*.safetensors", "adapters.safetensors")

_NUMBERED = re.compile(r"(.*-)([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")


class Files(NamedTuple):
    """The files of a folder, sorted out by their names.

    Attributes:
        weight_map: the file of every tensor, as the index says; None without one that counts.
        shards: files that hold the tensors, sorted.
        side_files: files to carry over, sorted.
        card: name of the model card, or None.
        left_behind: files, and hidden folders, that are left behind, with the reason.
        left_behind_bytes: their bytes.
        warnings: oddities.
    """

    weight_map: dict[str, str] | None
    shards: list[str]
    side_files: list[str]
    card: str | None
    left_behind: Mapping[str, str]
    left_behind_bytes: Mapping[str, int]
    warnings: list[str]


def sort_files(folder: Source, choice: Choice) -> Files:
    """Sorts out the files of a folder; no file but the index is opened.

    Args:
        folder: the checkpoint's.
        choice: what is said of single files.

    Raises:
        CheckpointError: if there are no tensors, some are missing, or a name cannot be carried over.
    """
    names = list(folder.names())
    visible = [name for name in names if not _is_hidden(name)]
    followed = folder.exists(INDEX_FILENAME) and choice.fate(INDEX_FILENAME) != "leave"
    weight_map = read_index(folder) if followed else None
    refuse_unfinished(visible, weight_map, choice)
    if weight_map is None:
        shards, warnings = _shards_without_index(folder, visible, choice)
    else:
        shards, warnings = sorted(set(weight_map.values())), []
        _refuse_missing(shards, visible, folder)
    left: dict[str, list[str]] = defaultdict(list)
    reasons, side_files, cards = {}, [], []
    own = {*OWN_FILENAMES, *shards} - (set() if followed else {INDEX_FILENAME})
    for name in names:
        if _is_hidden(name):
            group, reason = (name.split("/")[0] if name.startswith(".") else name), _HIDDEN
        elif name in own:
            continue
        else:
            group, reason = name, _why_left(name, choice, weight_map is not None)
        if reason:
            reasons[group] = reason
            left[group].append(name)
        elif name.casefold() == CARD_FILENAME.casefold():
            cards.append(name)
        elif is_safe_name(name):
            side_files.append(name)
        elif is_hostile_name(name):
            raise refuse("unsafe-name", f"this file's name {_HOSTILE}; rename or remove it", file=name)
        else:
            reasons[name] = _UNWRITABLE
            left[name].append(name)
    others = [name for name in visible if name not in own]
    warnings += [f"{option} matches no file that can be carried over or left behind" for option in choice.idle(others)]
    sizes = {group: sum(_size(folder, name) for name in members) for group, members in left.items()}
    return Files(weight_map, shards, side_files + cards[1:], cards[0] if cards else None, reasons, sizes, warnings)


def left_behind_warning(left_behind: Mapping[str, str], sizes: Mapping[str, int]) -> Iterator[str]:
    """Yields a sentence on the files that are left behind, with their bytes; none if only hidden ones are.

    Args:
        left_behind: names with the reasons.
        sizes: bytes of each.
    """
    hidden = unmentioned(left_behind)
    names = [name for name in left_behind if name not in hidden]
    if names:
        shown = some_of(f"{printable(name)} ({size_text(sizes[name])}, {left_behind[name]})" for name in names)
        total = f", {size_text(sum(sizes[name] for name in names))} in all" if len(names) > 1 else ""
        yield f"left behind, so 'revert' cannot restore it: {shown}{total}{_advice({*left_behind.values()})}"


def unmentioned(left_behind: Mapping[str, str]) -> dict[str, str]:
    """Returns the files of which `left_behind_warning` does not speak, with the reasons: hidden ones."""
    return {name: reason for name, reason in left_behind.items() if reason == _HIDDEN}


def _advice(reasons: Set[str]) -> str:
    """Returns what to do about files that are left behind; nothing where somebody asked for it."""
    reasons = reasons - {_HIDDEN, _CHOSEN}
    if reasons - {*_BY_NAME}:
        return "; --carry GLOB carries a file over"
    return "; rename it in a copy of the source" if reasons else ""


def _why_left(name: str, choice: Choice, has_index: bool) -> str:
    """Returns why a file is left behind that holds no tensors of the checkpoint; empty if it is carried over."""
    fate = choice.fate(name)
    if fate is not None:
        return _CHOSEN if fate == "leave" else ""
    if name == INDEX_FILENAME:
        return _CHOSEN
    if has_index and name == SINGLE_SHARD:
        return _FIRST_READ
    at_the_top = "/" not in name
    if at_the_top and name.endswith(_SAFETENSORS) and choice.is_of_output:  # engines might take it for weights
        return _NOT_NAMED if has_index else _NOT_OF_THE_CONVERSION
    for known, candidate in ((_OTHER_FORMS if at_the_top else {}, name), (_NEVER_NEEDED, name.rpartition("/")[2])):
        for reason, patterns in known.items():
            if _is_one(candidate, patterns):
                return reason
    return ""


def _shards_without_index(folder: Source, visible: Sequence[str], choice: Choice) -> tuple[list[str], list[str]]:
    """Returns the files that hold the tensors where no index says so, and what is to say of that."""
    top = [name for name in visible if "/" not in name and name.endswith(_SAFETENSORS)]
    if choice.shards is not None:
        known = [name for name in top if name in choice.shards]
        if known:
            return known, []
    kept = [name for name in top if choice.fate(name) != "leave"]
    kept = [name for name in kept if not _why_left(name, Choice(), False)] or kept  # the only form there is
    found = [name for name in kept if choice.fate(name) != "carry" and not _is_one(name, _ADAPTERS)] or kept
    for name in found:
        if not is_plain_name(name):
            raise refuse("unsafe-name", "not every system allows this file name; rename it", file=name)
    if not found and folder.exists(SINGLE_SHARD) and choice.fate(SINGLE_SHARD) is None:
        return [SINGLE_SHARD], []  # a folder of this name, of which reading it will tell
    if not found:
        raise _no_weights(folder, visible, top)
    _refuse_missing_numbers(found)
    if len(found) == 1:
        return found, []
    why = f"{INDEX_FILENAME} is not used" if INDEX_FILENAME in visible else f"there is no {INDEX_FILENAME}"
    others = [name for name in visible if name.endswith(".safetensors.index.json") and "/" not in name]
    others = [name for name in others if name != INDEX_FILENAME]
    unread = f"; {some_of(map(printable, others))} is ignored, as engines know no index of this name" if others else ""
    return found, [
        f"{why}, so all {len(found)} .safetensors files in the folder count as the checkpoint, as "
        f"they do for engines: {some_of(map(printable, found))}; the output gets an index{unread}"
    ]


def _no_weights(folder: Source, visible: Sequence[str], top: Sequence[str]) -> CheckpointError:
    pickled = [name for name in visible if name.endswith(_PICKLE_SUFFIXES)]
    if top:
        message = f"--leave excludes every .safetensors file: {some_of(map(printable, top))} would count; exclude fewer"
        return refuse("no-weights", message, file=SINGLE_SHARD)
    refuse_only_gguf(folder)
    if pickled:
        return refuse(
            "pickled-weights",
            "the weights are pickled, which can run code when opened, so they are never read; look "
            "for a safetensors version of this model",
            file=pickled[0],
        )
    advice = weights_below(folder) or "download the complete checkpoint"
    where = printable(str(folder.where))
    return refuse("no-weights", f"there is no .safetensors file in {where}; {advice}", file=SINGLE_SHARD)


def _refuse_missing(shards: Sequence[str], visible: Sequence[str], folder: Source) -> None:
    """Refuses an index that names files which are not there, with those that are."""
    missing = [name for name in shards if not folder.exists(name)]
    if not missing:
        return
    there = [name for name in visible if name.endswith(_SAFETENSORS) and "/" not in name]
    present = some_of(map(printable, there)) if there else "none"
    counts = f"missing: {len(missing)} of {len(shards)} files; present: {present}"
    message = f"the index lists this file, but it is missing; download it too ({counts})"
    if any(name not in shards for name in there):
        message += (
            ". If the index is another checkpoint's, such as the one before quantization, ignore it: "
            f"--leave {INDEX_FILENAME}"
        )
    raise CheckpointError(Problem(name, "", "missing-file", message) for name in missing)


def _refuse_missing_numbers(names: Sequence[str]) -> None:
    """Refuses shards that are not all there, as their own numbers say: without an index nothing else would tell."""
    sets: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            sets[numbered[1], int(numbered[3])].add(int(numbered[2]))
    for (prefix, count), there in sets.items():
        first = 0 if 0 in there else 1
        missing = [number for number in range(first, first + count) if number not in there]
        if missing:
            message = (
                f"there is no {INDEX_FILENAME}, and the names of {some_of(map(printable, names))} say that "
                f"{len(missing)} of {count} files are missing; download them too, or exclude with "
                "--leave what does not belong to the checkpoint"
            )
            raise refuse("missing-file", message, file=f"{prefix}{missing[0]:05}-of-{count:05}{_SAFETENSORS}")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_one(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _size(folder: Source, name: str) -> int:
    """Returns the bytes of a file that is left behind; 0 for a link that leads out, a pipe, and the like."""
    try:
        return folder.size(name)
    except CheckpointError:
        return 0
