"""The items of a batch before anything starts: what each reads, writes and asks for, and that none disturbs another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from awq2marlin.arguments import ArgumentError
from awq2marlin.batch.file import OPTIONS, BatchItem, check_entries, check_options, read_batch_file
from awq2marlin.batch.record import ItemResult
from awq2marlin.commands.options import ABOUT_TARGET, TARGET_OPTIONS, ConvertOptions
from awq2marlin.errors import STATUS, BatchError, CheckpointError, Problem, printable
from awq2marlin.formats.registry import DEFAULT_TARGET, target_named
from awq2marlin.hub.name import HUB_PREFIX, HubName, parse_source
from awq2marlin.hub.target import PushTarget
from awq2marlin.layout.modules import DEFAULT_UNALIGNED
from awq2marlin.pipeline.preflight import default_output

#: Options that decide neither what is written nor what is checked: the record leaves them out.
_PASSING = ("workers", "dry_run", "commit_message", "follow_links")

#: Options that say where a result goes on the Hub.
PUSHING = ("push_to", *TARGET_OPTIONS)

#: Where options stand that hold for every item which does not give them itself.
_OF_ALL = "the options of all items"

#: A list's file, or the list itself.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """One item, with everything decided that can be without opening its source.

    Attributes:
        item: as the list says it.
        source: what tells this source from others: an absolute path, or ``hf://org/name[@revision]``.
        output: absolute path of the folder to write.
        options: how it is converted.
    """

    item: BatchItem
    source: str
    output: Path
    options: ConvertOptions

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options that the record remembers, those of the target beside the others."""
        target = self.options.target
        options = {name: value for name, value in vars(self.options).items() if name not in _PASSING}
        options["push_to"] = target.repo_id if target else None
        options["unaligned"] = options["unaligned"] or DEFAULT_UNALIGNED  # which records always tell
        if options["to"] is None:  # as in records of version 0.1
            del options["to"]
        for name in ("carry", "leave"):
            options[name] = list(options[name])
            if not options[name]:
                del options[name]
        return options | {name: getattr(target, name, getattr(PushTarget, name)) for name in TARGET_OPTIONS}

    def result(self, exit_code: int, **found: Any) -> ItemResult:
        """Returns a result of this item."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return ItemResult(
            **{
                "source": self.source,
                "output": str(self.output),
                "status": STATUS[exit_code],
                "exit_code": exit_code,
                "options": self.recorded_options,
                "finished_at": now,
                **found,
            }
        )


def list_file(sources: Sources) -> Path | None:
    """Returns the list's file; None if the list is none."""
    return Path(sources) if isinstance(sources, (str, os.PathLike)) else None


def batch_folders(
    sources: Sources,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    part: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[list[Path | HubName], list[Path]]:
    """Returns what `convert_many` would read, and the folders that it would write.

    Args:
        sources: as for `convert_many`, as all others are.
        out_dir: folder for the outputs.
        part: (number, of how many).
        **options: options of every item.

    Raises:
        BatchError: if anything is wrong with the list or the options.
    """
    jobs = plan_jobs(sources, out_dir, part, options)
    return [parse_source(job.item.source) for job in jobs], [job.output for job in jobs]


def plan_jobs(
    sources: Sources, out_dir: str | os.PathLike[str] | None, part: tuple[int, int] | None, options: Mapping[str, Any]
) -> list[Job]:
    """Returns what is to be done by this part, in the list's order; all parts are checked.

    Args:
        sources: a list's file, or the list itself.
        out_dir: folder for the outputs; None for the working directory.
        part: (number, of how many); None for all.
        options: of every item that does not give them itself.

    Raises:
        BatchError: with everything that is wrong with options and outputs.
        ValueError: if there is no such part.
    """
    number, count = part or (1, 1)
    if not 1 <= number <= count:
        raise ValueError(f"part must be (number, count) with 1 <= number <= count, found {part}")
    items = read_batch_file(Path(sources)) if isinstance(sources, (str, os.PathLike)) else check_entries(sources)
    wrong = list(check_options(options, _OF_ALL))
    if "output" in options:
        wrong.append(f"{_OF_ALL}: each item needs an output of its own; use out_dir")
    sound = {name: value for name, value in options.items() if name in OPTIONS and OPTIONS[name].takes(value)}
    jobs = list(_jobs(items, Path(out_dir or ""), sound, wrong))
    alone = [name for name in ABOUT_TARGET if sound.get(name)]
    if alone and all(job.options.target is None for job in jobs):
        wrong.append(f"{_OF_ALL}: {alone[0]} needs push_to")
    wrong += _clashes(jobs)
    if wrong:
        raise BatchError([Problem(str(list_file(sources) or ""), "", "bad-batch", each) for each in wrong])
    return jobs[number - 1 :: count]


def _jobs(items: Iterable[BatchItem], out_dir: Path, of_all: Mapping[str, Any], wrong: list[str]) -> Iterator[Job]:
    """Yields the jobs of items; what is wrong with one is added to ``wrong``, and the other items are looked at too."""
    for item in items:
        try:
            source, output = _places(item, out_dir, item.options.get("to", of_all.get("to")))
        except CheckpointError as error:  # its source cannot be a name
            wrong.append(f"{item.place}: {error}")
            continue
        options = ConvertOptions()
        try:
            options = _options(item, output.name, of_all)
        except ArgumentError as error:
            wrong.append(f"{item.place}: {error}")
        yield Job(item, source, output, options)


def _places(item: BatchItem, out_dir: Path, to: Any) -> tuple[str, Path]:
    """Returns `Job.source` and `Job.output` of an item."""
    name = parse_source(item.source)
    source = HUB_PREFIX + str(name) if isinstance(name, HubName) else os.path.realpath(name)
    output = item.options.get("output") or default_output(name, _suffix(to))
    return source, Path(os.path.realpath(out_dir / output))


def _options(item: BatchItem, name: str, of_all: Mapping[str, Any]) -> ConvertOptions:
    """Returns the options of an item.

    Args:
        item: as the list says it.
        name: of its output, for a repository of which only the owner is given.
        of_all: options of every item that does not give them itself.

    Raises:
        ArgumentError: if they do not go together.
    """
    given = {**of_all, **item.options}
    push_to = given.get("push_to")
    if push_to is None:  # what all items say of their target is said of those that have one
        given = {**{key: value for key, value in of_all.items() if key not in ABOUT_TARGET}, **item.options}
    elif "/" not in push_to:
        given["push_to"] = f"{push_to}/{name}"
    return ConvertOptions.of(given)


def _suffix(to: Any) -> str:
    """Returns what the default name of an output ends with; for a format that is none, of which the options tell."""
    try:
        return target_named(to).output_suffix
    except ArgumentError:
        return DEFAULT_TARGET.output_suffix


def _clashes(jobs: Sequence[Job]) -> Iterator[str]:
    """Yields every pair of items of which one would write where the other writes or reads."""
    outputs: dict[Path, Job] = {}
    for job in jobs:
        other = outputs.setdefault(job.output, job)
        if other is not job:
            yield (
                f"{job.item.place}: its output {printable(str(job.output))} is that of {other.item.place} too; "
                "give one of them its own 'output'"
            )
    targets: dict[tuple[str, str], Job] = {}
    for job in jobs:
        target = job.options.target
        if target is not None:
            other = targets.setdefault((target.repo_id, target.branch), job)
            if other is not job:
                yield (
                    f"{job.item.place}: it would be pushed to the repository of {other.item.place}; give it its own "
                    "'push_to'"
                )
    sources = {Path(job.source): job for job in jobs if not job.source.startswith(HUB_PREFIX)}
    for job in jobs:
        for what, path, others in (
            ("its output is inside the output", job.output, outputs),
            ("its output is inside the source", job.output, sources),
            ("its source is inside the output", Path(job.source), outputs),
        ):
            for folder in (path, *path.parents):
                other = others.get(folder, job)
                if other.item is not job.item and not (folder == path and "output is inside the output" in what):
                    yield f"{job.item.place}: {what} of {other.item.place}; choose another"
