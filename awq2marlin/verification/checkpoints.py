"""Comparing any two checkpoints of the same model: all their numbers, all other tensors, all files.

What belongs to the format (configs, index, card, manifest, tensors that follow from a module's shape) is listed and not
compared with the other's. Everything that differs is counted, in one pass and in memory that does not grow with the
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from awq2marlin.checkpoint.config import changed_keys
from awq2marlin.errors import Problem
from awq2marlin.formats.base import DerivedTensor
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.layout.modules import ModulePlan, module_name
from awq2marlin.progress import Progress
from awq2marlin.verification.differences import Count, Differences, ModuleDifference, total
from awq2marlin.verification.headers import first_difference
from awq2marlin.verification.numbers import Side, compare_module, compared_bytes
from awq2marlin.verification.sampling import Modules, sample_modules
from awq2marlin.verification.values import BAND_BYTES, place_of

Sides = tuple[Side, Side]
_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True)
class Compared:
    """What a comparison of two checkpoints looked at and found.

    Attributes:
        modules: the modules whose numbers were compared, as the second checkpoint holds them.
        modules_total: modules of the same shape that both have.
        tensors: other tensors that both have, compared byte for byte.
        files: files that both have, compared byte for byte.
        bytes: bytes of the first checkpoint's tensors that were compared.
        of_the_format: files and tensors of each checkpoint that belong to its format.
        notes: what differs and is no difference of the model.
        differences: what differs.
    """

    modules: tuple[ModulePlan, ...]
    modules_total: int
    tensors: int
    files: int
    bytes: int
    of_the_format: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]
    differences: Differences


def compare_checkpoints(sides: Sides, modules: Modules, workers: int, progress: Progress) -> Compared:
    """Compares two checkpoints to the end, whatever is found on the way.

    Args:
        sides: both.
        modules: how many modules are compared value for value.
        workers: threads.
        progress: told of every byte of the first one's tensors that was compared.
    """
    same, others = _modules(sides)
    chosen = sample_modules([_plan(sides[1], name) for name in same], modules)
    tensors, files = _common_tensors(sides), sorted(_side_files(sides[0]) & _side_files(sides[1]))
    size = sum(compared_bytes(sides[0], each.name) for each in chosen)
    size += sum(sides[0].files.info(name).size for name in tensors)
    progress.start("verify", size)
    others += [*_one_sided_tensors(sides), *_one_sided_files(sides)]
    found = _all([partial(_compare_tensor, name, sides, progress) for name in tensors], workers)
    found += _all([partial(_compare_derived, *each) for side in sides for each in _derived(side)], workers)
    found += _all([partial(_compare_file, name, sides) for name in files], workers)
    others += [problem for problem in found if problem is not None]
    results = _all([partial(_compare_numbers, each.name, sides, progress) for each in chosen], workers)
    progress.finish()
    of_the_format = _of_the_format(sides[0]), _of_the_format(sides[1])
    counts = (len(same), len(tensors), len(files), size, of_the_format, tuple(_notes(sides, same)))
    return Compared(tuple(chosen), *counts, _differences(results, others))


def _differences(
    results: Sequence[tuple[tuple[Count, Count, Count], ModuleDifference | None]], others: Sequence[Problem]
) -> Differences:
    values, zero_points, scales = (total([counts[part] for counts, _ in results]) for part in range(3))
    modules = tuple(difference for _, difference in results if difference is not None)
    return Differences(modules, tuple(others), values, zero_points, scales)


def _all(jobs: Sequence[Callable[[], _Outcome]], workers: int) -> list[_Outcome]:
    """Runs comparisons side by side and returns what each found, in order."""
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            return [each.result() for each in running]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# --- modules -------------------------------------------------------------------------------------------------------


def _modules(sides: Sides) -> tuple[list[str], list[Problem]]:
    """Returns the modules that can be compared value for value, and what keeps the others from it."""
    one, other = sides
    both = sorted(one.opened.modules.keys() & other.opened.modules.keys())
    problems = [
        _lacking_module(sides, name) for name in sorted(one.opened.modules.keys() ^ other.opened.modules.keys())
    ]
    if one.scheme.bits != other.scheme.bits:
        message = f"{one.scheme.bits} bits in A, {other.scheme.bits} in B; no module was compared value for value"
        return [], [Problem(CONFIG_FILENAME, "", "config", message), *problems]
    same = []
    for name in both:
        shapes = [f"K={each.size_k}, N={each.size_n}" for each in (side.opened.modules[name] for side in sides)]
        if shapes[0] == shapes[1]:
            same.append(name)
        else:
            problems.append(other.problem(_weight(other, name), "wrong-shape", f"{shapes[0]} in A, {shapes[1]} in B"))
    if any(one.groups_of(name) != other.groups_of(name) for name in same):
        sizes = f"group size {one.scheme.group_size} in A, {other.scheme.group_size} in B"
        problems.insert(0, Problem(CONFIG_FILENAME, "", "config", f"{sizes}; zero points and scales were not compared"))
    return same, problems


def _weight(side: Side, module: str) -> str:
    return side.opened.modules[module].layout.tensor_name(module, "qweight")


def _lacking_module(sides: Sides, name: str) -> Problem:
    holder, lacker = sides if name in sides[0].opened.modules else sides[::-1]
    if module_name(name, "weight") in lacker.files.index.tensors:
        message = f"the module is quantized in {holder.label}, in full precision in {lacker.label}"
    else:
        message = f"only {holder.label} has this module"
    return holder.problem(_weight(holder, name), "missing-tensor", message)


def _plan(side: Side, name: str) -> ModulePlan:
    """Returns a module as a checkpoint holds it."""
    module = side.opened.modules[name]
    is_own = module.layout is side.opened.checkpoint.format
    return ModulePlan.of(module, "" if is_own else "kept", (module.stored_k, module.stored_n))


def _compare_numbers(
    name: str, sides: Sides, progress: Progress
) -> tuple[tuple[Count, Count, Count], ModuleDifference | None]:
    found = compare_module(name, sides)
    progress.advance(compared_bytes(sides[0], name))
    return found


# --- other tensors -------------------------------------------------------------------------------------------------


def _derived(side: Side) -> Iterator[tuple[Side, str, DerivedTensor]]:
    """Yields the tensors that follow from their modules' shapes."""
    tensors = side.files.index.tensors
    for module in side.opened.modules.values():
        for derived in module.layout.derived(module.stored_k, module.stored_n, side.scheme):
            if (name := module_name(module.name, derived.suffix)) in tensors:
                yield side, name, derived


def _plain_tensors(side: Side) -> set[str]:
    """Returns the tensors that are no part of a quantized module."""
    names = {*side.files.index.tensors} - {name for _, name, _ in _derived(side)}
    for module in side.opened.modules.values():
        names -= {module.layout.tensor_name(module.name, part) for part in module.parts}
    return names


def _common_tensors(sides: Sides) -> list[str]:
    return sorted(_plain_tensors(sides[0]) & _plain_tensors(sides[1]))


def _one_sided_tensors(sides: Sides) -> Iterator[Problem]:
    """Yields the tensors that only one checkpoint has; the module of a ``weight`` may be quantized in the other."""
    plain = [_plain_tensors(side) for side in sides]
    for name in sorted(plain[0] ^ plain[1]):
        holder, lacker = sides if name in plain[0] else sides[::-1]
        module, _, suffix = name.rpartition(".")
        if suffix != "weight" or module not in lacker.opened.modules:
            yield holder.problem(name, "missing-tensor", f"only {holder.label} has this tensor")


def _compare_tensor(name: str, sides: Sides, progress: Progress) -> Problem | None:
    """Compares a tensor byte for byte."""
    one, other = (side.files.info(name) for side in sides)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        progress.advance(one.size)
        message = f"{one.dtype} {list(one.shape)} in A, {other.dtype} {list(other.shape)} in B"
        return sides[1].problem(name, "wrong-shape", message)
    differing, first = 0, ""
    for begin in range(0, one.size, BAND_BYTES):
        end = min(begin + BAND_BYTES, one.size)
        left, right = (side.files.read(name, begin, end) for side in sides)
        unequal = left != right
        if unequal.any():
            at = int(np.argmax(unequal))
            first = first or f"{place_of(one, begin + at)}: {left[at]:#04x} in A, {right[at]:#04x} in B"
            differing += int(np.count_nonzero(unequal))
        progress.advance(end - begin)
    if not differing:
        return None
    return sides[1].problem(name, "different-bytes", f"{first}; {_of(differing, one)} differ")


def _of(differing: int, tensor: TensorInfo) -> str:
    return f"{differing:,} of {tensor.size:,} bytes"


def _compare_derived(side: Side, name: str, derived: DerivedTensor) -> Problem | None:
    if side.files.read(name, 0, side.files.info(name).size).tobytes() == derived.data():
        return None
    meaning = f": {derived.meaning}" if derived.meaning else ""
    message = f"in {side.label} its content does not match its module's shape{meaning}"
    return side.problem(name, "different-value", message)


# --- files ---------------------------------------------------------------------------------------------------------


def _side_files(side: Side) -> set[str]:
    return {*side.opened.checkpoint.side_files}


def _one_sided_files(sides: Sides) -> Iterator[Problem]:
    for name in sorted(_side_files(sides[0]) ^ _side_files(sides[1])):
        label = next(side.label for side in sides if name in _side_files(side))
        yield Problem(name, "", "missing-file", f"only {label} has this file")


def _compare_file(name: str, sides: Sides) -> Problem | None:
    one, other = (side.opened.checkpoint.folder for side in sides)
    at = first_difference(one, other, name)
    if at is None:
        return None
    sizes = f"{one.size(name):,} bytes in A, {other.size(name):,} in B"
    return Problem(name, "", "different-bytes", f"the files differ from byte {at} on: {sizes}")


def _of_the_format(side: Side) -> tuple[str, ...]:
    """Returns the files and tensors of a checkpoint that another format does not have, or has otherwise."""
    checkpoint = side.opened.checkpoint
    files = [CONFIG_FILENAME, *checkpoint.legacy_configs]
    files += [INDEX_FILENAME] if checkpoint.has_index else []
    files += [checkpoint.card] if checkpoint.card else []
    files += [MANIFEST_FILENAME] if checkpoint.has_manifest else []
    return (*sorted(files), *sorted(name for _, name, _ in _derived(side)))


def _notes(sides: Sides, modules: Sequence[str]) -> Iterator[str]:
    """Yields what a reader wants to know, and is no difference: other keys of the config, another type of scales."""
    keys = changed_keys(*(side.opened.checkpoint.config for side in sides))
    if keys:
        yield f"{CONFIG_FILENAME}: A and B differ in {keys}"
    types = [[_scale_type(side, name) for name in modules] for side in sides]
    pairs = [(left, right) for left, right in zip(*types, strict=True) if left != right]
    if pairs:
        left, right = pairs[0]
        yield f"scales of {len(pairs)} modules are {left} in A, {right} in B; they were compared as numbers"
    for side in sides:
        copies = sum(map(len, side.files.index.copies.values()))
        if copies:
            yield f"{copies} tensors of {side.label} do not count, as its index says, and were not compared"


def _scale_type(side: Side, name: str) -> str:
    return side.files.info(side.opened.modules[name].layout.tensor_name(name, "scales")).dtype
