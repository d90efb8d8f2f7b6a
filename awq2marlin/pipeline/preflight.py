"""Where a conversion reads from and writes to: opened, looked at, and refused before any work."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.names import CARD_FILENAME, CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME
from awq2marlin.errors import HubError, OutputError, Problem
from awq2marlin.hub.name import HUB_PREFIX, HubName, is_ambiguous, parse_source
from awq2marlin.io.folder import Folder, hub_repository
from awq2marlin.pipeline.output import FETCHED_DIRECTORY, WORK_DIRECTORY, OutputFolder, read_journal
from awq2marlin.pipeline.plan import Plan
from awq2marlin.pipeline.run import two_largest
from awq2marlin.progress import Progress

if TYPE_CHECKING:
    from awq2marlin.hub.publication import Publication, PushTarget


def default_output(source: Path | HubName) -> Path:
    """Returns ``./<name>-marlin`` for a source, a snapshot of the Hub cache by its repository's name."""
    if isinstance(source, HubName):
        return Path(f"{source.repo_id.partition('/')[2]}-marlin")
    source = Folder.at(source).root
    repository = hub_repository(source)
    name = repository.name.split("--")[-1] if repository else source.name
    return Path(f"{name}-marlin")


def open_source_of_run(
    source: str | os.PathLike[str], root: Path, *, overwrite: bool, low_disk: bool, progress: Progress
) -> tuple[Folder, tuple[str, str] | None]:
    """Opens the source; of a repository, the commit that an unfinished run in ``root`` began with.

    Args:
        source: as the user named it.
        root: the output folder.
        overwrite: whether to begin anew instead.
        low_disk: whether what is fetched goes to a place of our own in the output folder.
        progress: told if something is not as it seems.

    Returns:
        The source, and what a later run has to know of it; see `Journal.pinned`.
    """
    name = parse_source(source)
    if not isinstance(name, HubName):
        if is_ambiguous(source):
            progress.note(f"{source} is a folder here and is taken; {HUB_PREFIX}{source} is the one on the Hub")
        return Folder.at(name), None
    from awq2marlin.hub.repository import open_hub

    place = root.absolute() / WORK_DIRECTORY / FETCHED_DIRECTORY if low_disk else None
    folder = open_hub(name, place=place)
    journal = None if overwrite else read_journal(root)
    if journal and journal.pinned and journal.pinned != (str(name), folder.commit) and journal.pinned[0] == str(name):
        progress.note(
            f"{name} has moved on to {folder.commit}; this run goes on with {journal.pinned[1]}, which it began with "
            "(--overwrite begins anew)"
        )
        folder = open_hub(name, commit=journal.pinned[1], place=place)
    return folder, (str(name), folder.commit)


def open_target(target: PushTarget, plan: Plan, root: Path, overwrite: bool) -> Publication:
    """Looks at where the result shall go, and refuses it unless it may, before any work.

    A pull request that an unfinished run in ``root`` opened is the target of this one.

    Args:
        target: as the user named it.
        plan: of the conversion.
        root: the output folder.
        overwrite: whether an earlier checkpoint may be replaced.

    Raises:
        HubError: if it may not receive the result, or has it already.
    """
    from awq2marlin.hub.publication import Publication
    from awq2marlin.pipeline.departures import is_conversion_of

    journal = read_journal(root)
    target = replace(target, overwrite=target.overwrite or overwrite)
    if target.create_pr and journal is not None and journal.pull_request is not None:
        target = replace(target, create_pr=False, revision=journal.pull_request[0], overwrite=True)
    publication = Publication.open(target, output_names(plan), lambda manifest: is_conversion_of(plan, manifest))
    if publication.is_loadable and journal is None and not (target.overwrite or target.create_pr):
        raise HubError(
            Problem(
                publication.repo_id,
                "",
                "target-finished",
                "the repository holds this very conversion already; use --overwrite to do it again",
            )
        )
    return publication


def output_names(plan: Plan) -> list[str]:
    """Returns every file that a conversion leaves in its output folder."""
    shards = [shard.name for shard in plan.shards]
    index = [INDEX_FILENAME] if plan.checkpoint.has_index else []
    return sorted([*shards, *plan.checkpoint.side_files, *index, CARD_FILENAME, CONFIG_FILENAME, MANIFEST_FILENAME])


def owned_files(root: Path, overwrite: bool) -> list[str] | None:
    """Returns the files that ``--overwrite`` may remove from ``root``, or None if it is not to be touched.

    What an unfinished conversion may remove stands in its journal, so that is not repeated here.

    Raises:
        OutputError: if ``root`` holds a finished conversion and ``overwrite`` is False.
    """
    unfinished = read_journal(root) is not None
    finished = not unfinished and (root / MANIFEST_FILENAME).exists()
    if finished and not overwrite:
        raise OutputError(
            Problem(
                str(root),
                "",
                "not-empty",
                "the folder holds a finished conversion; use --overwrite to replace it, or choose another",
            )
        )
    if not overwrite:
        return None
    if finished:
        return read_manifest(Folder.at(root)).names()
    return [] if unfinished else None


def refuse_full_disk(plan: Plan, out: OutputFolder, *, low_disk: bool, is_passed_on: bool) -> None:
    """Compares what the output and what has to be fetched need with the space that their disks have.

    Args:
        plan: the whole plan.
        out: the output folder; what is finished in it needs no more.
        low_disk: whether source shards go as soon as they are converted.
        is_passed_on: whether finished shards go too.

    Raises:
        OutputError: if there is not enough.
    """
    folder, side_files = plan.checkpoint.folder, plan.checkpoint.side_files
    todo = [shard for shard in plan.shards if shard.name not in out.finished]
    targets = [shard.target.file_size for shard in todo]
    written = sum(map(folder.size, side_files)) + (sum(targets) if not is_passed_on else two_largest(targets))
    place, fetched = folder.disk_need([*(shard.name for shard in todo), *side_files])
    if low_disk:
        fetched = min(fetched, two_largest([shard.source.file_size for shard in todo]))
    needs: dict[int, int] = defaultdict(int)
    for path, size in ((out.root, written), (place, fetched)):
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        needs[there.stat().st_dev] += size
        free = shutil.disk_usage(there).free
        if needs[there.stat().st_dev] > free:
            advice = ", use --low-disk" if folder.origin and not low_disk else ""
            message = (
                f"the conversion needs {needs[there.stat().st_dev] / 1e9:.2f} GB, the disk has "
                f"{free / 1e9:.2f} GB free; free some space{advice} or choose another disk"
            )
            raise OutputError(Problem(str(path), "", "disk-full", message))
