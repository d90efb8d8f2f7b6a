"""Where a run reads from and writes to: opened, looked at, and refused before any work."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from awq2marlin.checkpoint.manifest import decode_manifest, read_manifest
from awq2marlin.errors import CheckpointError, HubError, OutputError, Problem, size_text
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import DEFAULT_TARGET
from awq2marlin.hub.name import HUB_PREFIX, HubName, folder_at, is_ambiguous, links_text, parse_source
from awq2marlin.io.folder import Folder
from awq2marlin.io.source import Source
from awq2marlin.pipeline.journal import WORK_DIRECTORY, Pinned, read_journal, refuse_unfinished
from awq2marlin.pipeline.output import FETCHED_DIRECTORY, Owned, hindrance, would_stop
from awq2marlin.pipeline.plan import Plan
from awq2marlin.pipeline.run import Work, two_largest
from awq2marlin.pipeline.sink import Sink
from awq2marlin.pipeline.transfer import Transfer
from awq2marlin.progress import Progress

if TYPE_CHECKING:
    from awq2marlin.hub.publication import Publication, PushTarget


#: What is said of ``--low-disk`` where there is nothing that it could remove.
LOW_DISK_IGNORED = "--low-disk (low_disk) does nothing for a folder: your own files are never removed"


def output_folder(
    output: str | os.PathLike[str] | None, source: str | os.PathLike[str], suffix: str = DEFAULT_TARGET.output_suffix
) -> Path:
    """Returns the folder that a run writes.

    Args:
        output: as the user named it; None for `default_output`.
        source: as the user named it.
        suffix: what the default name ends with.

    Raises:
        OutputError: if the name is empty.
        CheckpointError: if the source's is.
    """
    if output == "":
        raise OutputError(Problem("", "", "not-found", "the output folder's name is empty; pass a folder"))
    return Path(output) if output is not None else default_output(parse_source(source), suffix)


def default_output(source: Path | HubName, suffix: str = DEFAULT_TARGET.output_suffix) -> Path:
    """Returns ``./<name><suffix>`` for a source, by the name that the user gave it: of a link, the link's own.

    A folder of the Hub's cache goes by its repository's name. The source need not be there.
    """
    if isinstance(source, HubName):
        return Path(source.repo_id.partition("/")[2] + suffix)
    given = Path(os.path.abspath(source))  # noqa: PTH100 - which resolves no links
    cached = [each for each in (given, given.parent, given.parent.parent) if each.name.startswith("models--")]
    is_cached = cached and given in (cached[0], cached[0] / "snapshots", cached[0] / "snapshots" / given.name)
    return Path((cached[0].name.split("--")[-1] if is_cached else given.name) + suffix)


def open_source_of_run(
    source: str | os.PathLike[str],
    root: Path,
    *,
    overwrite: bool,
    low_disk: bool,
    progress: Progress,
    follow_links: bool = False,
) -> tuple[Source, Pinned | None]:
    """Opens the source; of a repository, the commit that an unfinished run in ``root`` began with.

    Args:
        source: as the user named it.
        root: the output folder.
        overwrite: whether to begin anew instead.
        low_disk: whether what is fetched goes to a place of our own in the output folder.
        progress: told if something is not as it seems.
        follow_links: whether links that lead out of a folder are followed.

    Returns:
        The source, and what a later run has to know of it; see `Journal.pinned`.
    """
    name = parse_source(source)
    if not isinstance(name, HubName):
        if is_ambiguous(source):
            progress.note(
                f"reading the local folder {source}; for the Hub repository of that name, pass {HUB_PREFIX}{source}"
            )
        found = folder_at(source, follow_links=follow_links)
        for line in links_text(found):
            progress.note(line)
        refuse_unfinished(found)
        return found, None
    from awq2marlin.hub.repository import open_hub

    place = root.absolute() / WORK_DIRECTORY / FETCHED_DIRECTORY if low_disk else None
    folder = open_hub(name, place=place)
    journal = None if overwrite else read_journal(root)
    pinned = journal.pinned if journal else None
    if pinned and pinned.name == str(name) and pinned.commit != folder.commit:
        progress.note(
            f"{name} has moved on to {folder.commit}; this run continues with {pinned.commit}, which "
            "it began with (--overwrite starts again)"
        )
        folder = open_hub(name, commit=pinned.commit, place=place)
    return folder, Pinned(str(name), folder.commit)


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

    journal = read_journal(root)
    target = replace(target, overwrite=target.overwrite or overwrite)
    if target.create_pr and journal is not None and journal.pull_request is not None:
        target = replace(target, create_pr=False, revision=journal.pull_request.revision, overwrite=True)
    publication = Publication.open(target, plan.transfer.names, lambda manifest: _is_conversion_of(plan, manifest))
    if publication.is_loadable and journal is None and not (target.overwrite or target.create_pr):
        raise HubError(
            Problem(
                publication.repo_id,
                "",
                "target-finished",
                "the repository already holds this conversion; use --overwrite to do it again",
            )
        )
    return publication


def _is_conversion_of(plan: Plan, manifest: bytes) -> bool:
    """Returns whether a manifest, from the Hub, can be this conversion's, as far as headers and texts tell."""
    try:
        found = decode_manifest(manifest)
    except CheckpointError:
        return False
    folder = plan.checkpoint.folder
    shards = {name: (shard.source_header.text, shard.target.size) for name, shard in found.shards.items()}
    return (
        (found.repo_id, found.revision) == (folder.origin or (None, None))
        and shards == {shard.name: (shard.source.text, shard.target.file_size) for shard in plan.shards}
        and found.files.keys() == plan.transfer.carried.keys()
        and found.texts.get(CONFIG_FILENAME, "").encode("utf-8") == folder.read(CONFIG_FILENAME)
    )


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
                "the folder holds a finished conversion; use --overwrite to replace it, or choose another folder",
            )
        )
    if not overwrite:
        return None
    if finished:
        return read_manifest(Folder.at(root)).names()
    return [] if unfinished else None


class DiskNeed(NamedTuple):
    """What a run needs on a disk.

    Attributes:
        folder: where it goes; need not exist.
        bytes: how much.
        stays: whether it is still there when the run has ended.
    """

    folder: Path
    bytes: int
    stays: bool


class Disk(NamedTuple):
    """A disk, and what is needed of it.

    Attributes:
        folder: the first of the folders that lie there.
        needed: bytes.
        free: bytes.
    """

    folder: Path
    needed: int
    free: int


def disk_needs(transfer: Transfer, root: Path, *, stays: bool, low_disk: bool) -> list[DiskNeed]:
    """Returns what a run needs: for the output, and for what has to be fetched.

    Args:
        transfer: what is left to be read and written.
        root: the output folder.
        stays: whether the output stays there, instead of being passed on shard by shard.
        low_disk: whether what is fetched goes to the output folder, two shards at a time.
    """
    targets = [shard.target.file_size for shard in transfer.shards]
    carried = sum(map(transfer.source.size, transfer.carried))
    place, fetched = transfer.source.disk_need([*(shard.name for shard in transfer.shards), *transfer.carried])
    if low_disk:
        fetched = min(fetched, two_largest([shard.source.file_size for shard in transfer.shards]))
    return [
        DiskNeed(root, carried + (sum(targets) if stays else two_largest(targets)), stays),
        DiskNeed(root if low_disk else place, fetched, not low_disk),
    ]


def disks(needs: Iterable[DiskNeed], at_once: int = 1) -> list[Disk]:
    """Returns the disks on which several runs need something, and how much: of what does not stay the largest.

    Args:
        needs: of all of them, one after the other.
        at_once: how many run at the same time.
    """
    folders: dict[int, Path] = {}
    found: dict[int, list[DiskNeed]] = defaultdict(list)
    for need in needs:
        there = next(each for each in (need.folder, *need.folder.absolute().parents) if each.exists())
        device = there.stat().st_dev
        folders.setdefault(device, need.folder)
        found[device].append(need)
    result = []
    for device, folder in folders.items():
        stays = sum(need.bytes for need in found[device] if need.stays)
        passing = sorted((need.bytes for need in found[device] if not need.stays), reverse=True)
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        result.append(Disk(folder, stays + sum(passing[: 2 * at_once]), shutil.disk_usage(there).free))
    return result


def refuse_full_disk(transfer: Transfer, sink: Sink, work: Work) -> None:
    """Compares what the output and what has to be fetched need with the space that their disks have.

    Args:
        transfer: what is read and written.
        sink: where it goes; what is finished needs no more.
        work: how it is done.

    Raises:
        OutputError: if there is not enough.
    """
    todo = replace(transfer, shards=tuple(each for each in transfer.shards if each.name not in sink.out.finished))
    stays = not sink.steps(todo.shards)
    problems = full_disks(todo, sink.out.root, stays=stays, low_disk=work.low_disk)
    if problems:
        raise OutputError(problems)


def full_disks(transfer: Transfer, root: Path, *, stays: bool, low_disk: bool) -> list[Problem]:
    """Returns which disks have less space than a run needs; arguments as for `disk_needs`."""
    advice = ", use --low-disk" if transfer.source.origin and not low_disk else ""
    what = "conversion" if transfer.verb == "convert" else "revert"
    return [
        Problem(
            str(disk.folder),
            "",
            "disk-full",
            f"the {what} needs {size_text(disk.needed)}, {size_text(disk.needed - disk.free)} more than the disk has "
            f"free; free some space{advice} or choose another disk",
        )
        for disk in disks(disk_needs(transfer, root, stays=stays, low_disk=low_disk))
        if disk.needed > disk.free
    ]


def hindrances(transfer: Transfer, root: Path, owned: Owned, *, stays: bool, low_disk: bool) -> tuple[str, ...]:
    """Returns what would stop a run, without touching its output folder; empty if nothing is known to.

    Space is looked at only where the folder is not there yet: how much an earlier run has written, or would give back,
    is known once the folder is locked.

    Args:
        transfer: what a run reads and writes.
        root: the output folder; need not exist.
        owned: as for `output.claim`.
        stays: whether the output stays there, instead of being passed on shard by shard.
        low_disk: whether what is fetched goes to the output folder, two shards at a time.
    """
    found = hindrance(root, transfer.digest, owned)
    if found or root.exists():
        return found
    return tuple(map(would_stop, full_disks(transfer, root, stays=stays, low_disk=low_disk)))
