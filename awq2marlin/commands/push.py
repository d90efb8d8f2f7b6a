"""`push`: a finished checkpoint goes to a repository on the Hub.

Look at the folder, look at the repository, compare every file with the manifest, upload what is missing, commit
once. Nothing is changed on the Hub before the whole folder was found sound.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from awq2marlin.checkpoint.config import changed_keys
from awq2marlin.checkpoint.converted import ConvertedCheckpoint
from awq2marlin.checkpoint.manifest import Manifest
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import DifferenceError, OutputError, Problem, difference, refuse
from awq2marlin.formats.names import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    INDEX_FILENAME,
    MANIFEST_FILENAME,
    MAX_CARD_BYTES,
    REPORT_FILENAME,
)
from awq2marlin.hub.identity import PushedFile, PushResult, identify
from awq2marlin.hub.publication import DEFAULT_MESSAGE, Content, FileIdentity, Publication, PushTarget
from awq2marlin.io.folder import Folder
from awq2marlin.io.stream import NamedPath
from awq2marlin.io.strict_json import parse_json
from awq2marlin.io.workers import check_workers
from awq2marlin.pipeline.journal import read_journal, refuse_unfinished
from awq2marlin.pipeline.model_card import addressed
from awq2marlin.progress import Progress, Silence

#: With what the report of a verification begins.
REPORT_BEGINNING = b"<!doctype html>\n<!-- awq2marlin verify --report -->\n"
_MAX_REPORT_BYTES = 100_000_000


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Checks that every file is as the conversion wrote it, then uploads a checkpoint to the Hub in one commit.

    Files that the repository already has are not uploaded again. If it is interrupted, call it again: it continues.

    Args:
        folder: folder of the converted checkpoint; never written to.
        repo_id: Hub repository, ``org/name``; created if needed.
        private: create the repository as private; refuse one that exists and is public.
        revision: branch to commit to, created if needed; by default ``main``.
        create_pr: open a pull request instead.
        commit_message: first line of the commit message.
        overwrite: replace a different checkpoint that the repository holds, and remove those of its files that this
            one does not have.
        dry_run: check the folder and the repository; nothing is uploaded.
        report: page that ``verify --report`` wrote; it is uploaded as ``awq2marlin-report.html``.
        progress: receives what is being done.

    Raises:
        CheckpointError: if this is not a sound converted checkpoint, or the report is not a page.
        OutputError: if the conversion is unfinished.
        DifferenceError: if a file differs from the one that the conversion wrote.
        HubError: if the Hub refuses, or the repository holds something else.
        ValueError: if an argument has a wrong value.
    """
    target = PushTarget(repo_id, private, revision, create_pr, overwrite)
    if os.fspath(folder) == "":
        raise OutputError(
            Problem("", "", "not-found", "the folder's name is empty; pass the folder of the converted checkpoint")
        )
    _refuse_unfinished(Path(folder))
    beside = {} if report is None else {REPORT_FILENAME: _page(Path(report))}
    return push_folder(Path(folder), target, commit_message, dry_run, progress or Silence(), beside)


def _refuse_unfinished(root: Path) -> None:
    if not root.is_dir():
        return
    refuse_unfinished(Folder.at(root))
    if read_journal(root) is not None:
        message = "the conversion into this folder is not finished; run the same 'awq2marlin convert' again first"
        raise OutputError(Problem(str(root), "", "unfinished", message))


def push_folder(
    root: Path,
    target: PushTarget,
    commit_message: str | None,
    dry_run: bool,
    progress: Progress,
    beside: Mapping[str, Content] | None = None,
) -> PushResult:
    """Does what `push` does with a folder that is known to be finished.

    Args:
        root: the folder.
        target: where it goes.
        commit_message: first line of the commit's message.
        dry_run: whether to write nothing.
        progress: told what is being done.
        beside: what else goes there, by name.

    Raises:
        Awq2MarlinError: as `push`.
    """
    started = time.perf_counter()
    overwrite, create_pr = target.overwrite, target.create_pr
    converted = _finished_checkpoint(root)
    checkpoint, manifest = converted.checkpoint, converted.manifest
    files = {**_contents(checkpoint, manifest, target.repo_id), **(beside or {})}
    ours = checkpoint.folder.read(MANIFEST_FILENAME)
    publication = Publication.open(target, files, ours.__eq__)
    created = not publication.exists
    identities = _sound_files(manifest, files, progress)
    if not dry_run:
        publication.create()
    missing = {name: content for name, content in files.items() if not publication.has(name, identities[name])}
    removed = publication.stale if overwrite or create_pr else ()
    if not dry_run:
        progress.start("upload", sum(identities[name].size for name in missing))
        publication.commit(missing, commit_message or DEFAULT_MESSAGE, identities, progress)
        progress.finish()
    return PushResult.of(
        publication,
        checkpoint.folder.root,
        (PushedFile(name, identities[name].size, identities[name].sha256, name in missing) for name in files),
        created=created,
        removed=removed,
        started=started,
        dry_run=dry_run,
        left_behind=checkpoint.left_behind,
    )


def _page(file: Path) -> bytes:
    """Returns a report's bytes; refuses what is none, so that a slip of the pen publishes nothing."""
    with file.open("rb") as page:
        data = page.read(_MAX_REPORT_BYTES + 1)
    if len(data) > _MAX_REPORT_BYTES or not data.startswith(REPORT_BEGINNING):
        message = "it is not a report of awq2marlin; 'awq2marlin verify ... --report FILE.html' writes one"
        raise refuse("unknown-report", message, file=str(file))
    return data


def _finished_checkpoint(root: Path) -> ConvertedCheckpoint:
    """Opens a folder that `convert` has finished, and checks everything that headers and configs say."""
    otherwise = "awq2marlin did not convert this checkpoint; convert it first, with 'awq2marlin convert'"
    converted = ConvertedCheckpoint.open(Folder.at(root), otherwise)
    _check_config(converted.checkpoint, converted.manifest)
    return converted


def _check_config(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Compares the keys of the config that a conversion does not touch with the source's text in the manifest."""
    source = parse_json(manifest.texts[CONFIG_FILENAME].encode("utf-8"), MANIFEST_FILENAME, constants=True)
    keys = changed_keys(source if isinstance(source, dict) else {}, checkpoint.config)
    if keys:
        raise difference(
            "config",
            f"it differs from the source's, which is in the manifest, in {keys}: convert again, or edit the config on "
            "the Hub if you want the change",
            file=CONFIG_FILENAME,
        )


def _contents(checkpoint: Checkpoint, manifest: Manifest, repo_id: str) -> dict[str, Content]:
    """Returns every file of the checkpoint, the card with the repository's name in its commands."""
    folder = checkpoint.folder
    missing = sorted(name for name in manifest.files if not folder.exists(name))
    if missing:
        raise refuse("missing-file", "the manifest lists this file, but it is missing; convert again", file=missing[0])
    index = [INDEX_FILENAME] if checkpoint.has_index else []
    carried = {*checkpoint.side_files, *manifest.files} - {INDEX_FILENAME}
    names = [*checkpoint.shards, *sorted(carried), *index, CONFIG_FILENAME, MANIFEST_FILENAME]
    files: dict[str, Content] = {name: folder.path(name) for name in names}
    if checkpoint.card is not None:
        files[CARD_FILENAME] = _card(folder.read(checkpoint.card, MAX_CARD_BYTES), repo_id)
    return files


def _card(card: bytes, repo_id: str) -> bytes:
    try:
        card.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8 (byte {error.start}), but the Hub requires UTF-8 for model cards; save it as UTF-8"
        raise refuse("hub-bad-card", message, file=CARD_FILENAME) from None
    return addressed(card, repo_id)


def _sound_files(manifest: Manifest, files: Mapping[str, Content], progress: Progress) -> dict[str, FileIdentity]:
    """Reads every file once: compares it with the manifest's digest and returns what the Hub would know it by.

    Raises:
        DifferenceError: naming every file that is not the one that the conversion wrote.
    """
    recorded = manifest.output_files
    paths = {name: content for name, content in files.items() if isinstance(content, Path)}
    identities = {name: FileIdentity.of(content) for name, content in files.items() if isinstance(content, bytes)}
    problems: list[Problem] = []

    def look(name: str) -> None:
        identity, found = identify(NamedPath(paths[name], name))
        identities[name] = identity
        if not recorded.get(name, found).is_of(found):
            message = (
                f"it differs from the file that the conversion wrote (recorded {recorded[name]}; found "
                f"{found}): it was changed or damaged afterwards; convert again"
            )
            problems.append(Problem(name, "", "wrong-digest", message))
        progress.advance(identity.size)

    progress.start("check", sum(path.stat().st_size for path in paths.values()))
    with ThreadPoolExecutor(check_workers(None), thread_name_prefix="check") as pool:
        list(pool.map(look, sorted(paths)))
    progress.finish()
    if problems:
        raise DifferenceError(problems)
    return identities
