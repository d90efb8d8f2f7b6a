"""The items of a batch before anything starts: what each reads, writes and asks for, and that none disturbs another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from awq2marlin.batch.file import BatchItem, check_entries, check_options, read_batch_file
from awq2marlin.batch.record import ItemResult
from awq2marlin.commands.convert import DEFAULT_VERIFIED
from awq2marlin.errors import STATUS, BatchError, CheckpointError, Problem, printable
from awq2marlin.hub.name import HUB_PREFIX, HubName, parse_source
from awq2marlin.hub.publication import PushTarget
from awq2marlin.pipeline.preflight import default_output

#: Options that decide neither what is written nor what is checked: the record leaves them out.
_PASSING = ("output", "workers", "commit_message")

#: Every option of an item that has a default; the same as `convert`'s.
_DEFAULTS: Mapping[str, Any] = {
    "unaligned": "keep",
    "verify": DEFAULT_VERIFIED,
    "device": None,
    "overwrite": False,
    "low_disk": False,
    "push_to": None,
    "private": False,
    "revision": None,
    "create_pr": False,
    "commit_message": None,
}

#: Options that say where a result goes on the Hub.
PUSHING = ("push_to", "private", "revision", "create_pr")

#: A list's file, or the list itself.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """One item, with everything decided that can be without opening its source.

    Attributes:
        item: as the list says it.
        source: what tells this source from others: an absolute path, or ``hf://org/name[@revision]``.
        output: absolute path of the folder to write.
        options: keyword arguments of `convert` but ``output``.
    """

    item: BatchItem
    source: str
    output: Path
    options: Mapping[str, Any]

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options that the record remembers."""
        return {name: value for name, value in self.options.items() if name not in _PASSING}

    @property
    def target(self) -> PushTarget | None:
        """Where the result goes on the Hub, if it does.

        Raises:
            ValueError: if that cannot be.
        """
        if self.options["push_to"] is None:
            return None
        repo_id, private, revision, create_pr = (self.options[name] for name in PUSHING)
        return PushTarget(repo_id, private, revision, create_pr, self.options["overwrite"])

    @property
    def passes_on(self) -> bool:
        """Whether the result goes to the Hub and nothing of it stays here."""
        return bool(self.options["low_disk"] and self.options["push_to"])

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
    wrong = list(check_options(options, "the options of all items"))
    if "output" in options:
        wrong.append("the options of all items: each item needs an output of its own; use out_dir")
    jobs = []
    for item in items:
        try:
            jobs.append(_job(item, Path(out_dir or ""), {**_DEFAULTS, **options}))
        except CheckpointError as error:  # its source cannot be a name
            wrong.append(f"{item.place}: {error}")
    for job in jobs:
        if job.options["device"] is not None and job.options["verify"] in ("none", 0):
            wrong.append(f"{job.item.place}: device needs verify: it runs the modules that are compared")
        if job.options["device"] is not None and job.options["low_disk"]:
            wrong.append(f"{job.item.place}: device needs the whole source at the end, which low_disk removes")
        wrong += (f"{job.item.place}: {each}" for each in _wrong_target(job))
    alone = [name for name in (*PUSHING, "commit_message") if options.get(name)]
    if alone and all(job.options["push_to"] is None for job in jobs):
        wrong.append(f"the options of all items: {alone[0]} needs push_to")
    wrong += _clashes(jobs)
    if wrong:
        raise BatchError([Problem(str(list_file(sources) or ""), "", "bad-batch", each) for each in wrong])
    return jobs[number - 1 :: count]


def _job(item: BatchItem, out_dir: Path, defaults: Mapping[str, Any]) -> Job:
    name = parse_source(item.source)
    source = HUB_PREFIX + str(name) if isinstance(name, HubName) else os.path.realpath(name)
    output = item.options.get("output") or _default_output(name)
    path = Path(os.path.realpath(out_dir / output))
    options = {name: value for name, value in {**defaults, **item.options}.items() if name != "output"}
    owner = options["push_to"]
    if isinstance(owner, str) and "/" not in owner:
        options["push_to"] = f"{owner}/{path.name}"
    return Job(item, source, path, options)


def _wrong_target(job: Job) -> Iterator[str]:
    """Yields what is wrong with where an item shall go on the Hub."""
    alone = [name for name in (*PUSHING, "commit_message") if name in job.item.options and name != "push_to"]
    if job.options["push_to"] is None and alone:
        yield f"{alone[0]} needs push_to"
    try:
        _ = job.target
    except ValueError as error:
        yield str(error)


def _default_output(source: Path | HubName) -> Path:
    """Returns what `convert` would write; also for a folder that is not there, whose item is going to fail."""
    try:
        return default_output(source)
    except CheckpointError:
        return Path(f"{Path(os.path.realpath(str(source))).name}-marlin")


def _clashes(jobs: Sequence[Job]) -> Iterator[str]:
    """Yields every pair of items of which one would write where the other writes or reads."""
    outputs: dict[Path, Job] = {}
    for job in jobs:
        other = outputs.setdefault(job.output, job)
        if other is not job:
            yield (
                f"{job.item.place}: its output {printable(str(job.output))} is that of {other.item.place} too; "
                "give one of them an 'output' of its own"
            )
    targets: dict[tuple[Any, Any], Job] = {}
    for job in jobs:
        if job.options["push_to"] is not None:
            other = targets.setdefault((job.options["push_to"], job.options["revision"]), job)
            if other is not job:
                yield f"{job.item.place}: it would be pushed where {other.item.place} is; give it its own 'push_to'"
    sources = {Path(job.source): job for job in jobs if not job.source.startswith(HUB_PREFIX)}
    for job in jobs:
        for what, path, others in (
            ("its output lies in the output", job.output, outputs),
            ("its output lies in the source", job.output, sources),
            ("its source lies in the output", Path(job.source), outputs),
        ):
            for folder in (path, *path.parents):
                other = others.get(folder, job)
                if other.item is not job.item and not (folder == path and "output lies in the output" in what):
                    yield f"{job.item.place}: {what} of {other.item.place}; choose another"
