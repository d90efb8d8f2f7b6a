"""One item of a batch: what an earlier run left of it to do, and doing it.

An item counts as done if the record says so and the output still has the manifest that was recorded, with every
file in its length. A finished output that the record does not tell of is compared with the source, completely,
before it counts as done.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from awq2marlin.arguments import ArgumentError
from awq2marlin.batch.jobs import PUSHING, Job
from awq2marlin.batch.record import BatchRecord, ItemResult
from awq2marlin.checkpoint.config import quantization_documents, read_config, without_quantization
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.commands.convert import convert
from awq2marlin.commands.push import push
from awq2marlin.commands.verify import verify
from awq2marlin.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    Awq2MarlinError,
    CheckpointError,
    DifferenceError,
    ExecutorError,
    HubError,
    OutputError,
    Problem,
    difference,
    internal_error,
    problem_from_os_error,
)
from awq2marlin.formats.names import CONFIG_FILENAME, MANIFEST_FILENAME
from awq2marlin.formats.registry import DEFAULT_TARGET
from awq2marlin.hub.name import HUB_PREFIX
from awq2marlin.hub.repository import open_source
from awq2marlin.io.digest import digest_of_file
from awq2marlin.io.folder import Folder
from awq2marlin.io.source import RepoCommit
from awq2marlin.io.stream import NamedPath
from awq2marlin.io.strict_json import same_json
from awq2marlin.io.workers import StoppedError
from awq2marlin.pipeline.journal import read_journal
from awq2marlin.pipeline.output import hindrance, refuse_overlap, tidy
from awq2marlin.pipeline.plan import plan_conversion
from awq2marlin.pipeline.preflight import disk_needs, owned_files
from awq2marlin.pipeline.record import refuse_unreadable
from awq2marlin.progress import Progress


def known(job: Job, record: BatchRecord, retry_failed: bool) -> ItemResult | None:
    """Returns what became of an item in an earlier run, if nothing of it is left to do now; else None.

    Args:
        job: what is to be done.
        record: what earlier runs remember.
        retry_failed: whether something that failed is left to do.
    """
    last = record.last(str(job.output))
    if last is None or last.source != job.source:
        return None
    if last.exit_code == EXIT_DONE:
        passed_on = bool(last.options.get("low_disk") and last.options.get("push_to"))  # and nothing of it is here
        stands = passed_on == job.options.passes_on and (
            passed_on or (last.manifest is not None and _whole_manifest(job.output) == last.manifest)
        )
        return replace(last, earlier=True) if stands and _covers(last.options, job.recorded_options) else None
    is_same = dict(last.options) == job.recorded_options
    return replace(last, earlier=True) if is_same and not retry_failed else None


def _covers(done: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Returns whether what was done is all that is asked: the same bytes, compared as thoroughly, sent as far."""
    of_done, of_asked = (
        (each.get("unaligned"), each.get("to") or DEFAULT_TARGET.layout_name) for each in (done, asked)
    )
    if of_done != of_asked:
        return False
    if any(list(done.get(name) or []) != list(asked.get(name) or []) for name in ("carry", "leave")):
        return False
    if asked["device"] is not None and done.get("device") != asked["device"]:
        return False
    if asked["push_to"] is not None and any(done.get(name) != asked[name] for name in PUSHING):
        return False
    return _thoroughness(done.get("verify")) >= _thoroughness(asked["verify"])


def _thoroughness(value: Any) -> float:
    words: dict[Any, float] = {"all": float("inf"), "none": 0}
    return words.get(value, value if type(value) is int else 0)


def _holds_finished(output: Path) -> bool:
    """Returns whether a folder looks like a finished conversion."""
    names = (CONFIG_FILENAME, MANIFEST_FILENAME)
    return all((output / name).is_file() for name in names) and read_journal(output) is None


def _whole_manifest(output: Path) -> str | None:
    """Returns the digest of the manifest of a finished conversion whose files all have their length, else None."""
    try:
        if not _holds_finished(output):
            return None
        folder = Folder.at(output)
        manifest = read_manifest(folder)
        if any(folder.size(name) != file.size for name, file in manifest.output_files.items()):
            return None
        return digest_of_file(NamedPath(folder.path(MANIFEST_FILENAME), MANIFEST_FILENAME)).xxh3
    except (Awq2MarlinError, OSError):
        return None


def run_job(
    job: Job, progress: Progress, *, dry_run: bool, workers: int | None, executor: Executor | None
) -> ItemResult:
    """Does one item; what goes wrong with it becomes its result.

    Args:
        job: what is to be done.
        progress: told what is being done; stops the work if it raises `StoppedError`.
        dry_run: plan only.
        workers: threads, where the item does not say how many.
        executor: does the shards, as for `convert`.

    Raises:
        ExecutorError: if the executor can do no other item either.
    """
    started = time.perf_counter()
    job = replace(job, options=replace(job.options, workers=job.options.workers or workers))
    try:
        result = _plan_only(job, progress) if dry_run else _compare_finished(job, progress)
        result = result or _convert(job, executor, progress)
    except Awq2MarlinError as error:
        if isinstance(error, ExecutorError) and error.problems[0].code != "killed-workers":
            raise  # it can do no other item either
        result = job.result(error.exit_code, errors=error.problems)
    except OSError as error:
        result = job.result(EXIT_FAILED, errors=(problem_from_os_error(error),))
    except MemoryError:
        problem = Problem("", "", "out-of-memory", "out of memory; use fewer --workers or --jobs")
        result = job.result(EXIT_FAILED, errors=(problem,))
    except ArgumentError as error:  # an option that does not fit the item's source
        result = job.result(EXIT_FAILED, errors=(Problem("", "", "usage", str(error)),))
    except StoppedError:
        raise
    except Exception as error:  # a fault of ours: it must not cost the rest of a night's batch, nor be hidden
        place = traceback.extract_tb(error.__traceback__)[-1]
        evidence = f"what 'awq2marlin convert' prints for this source ({Path(place.filename).name}:{place.lineno})"
        result = job.result(EXIT_FAILED, errors=(internal_error(error, evidence, "unexpected-error"),))
    return replace(result, seconds=time.perf_counter() - started)


def _convert(job: Job, executor: Executor | None, progress: Progress) -> ItemResult:
    options = job.options
    try:
        done = convert(job.item.source, job.output, **vars(options), executor=executor, progress=progress)
    except HubError as error:
        if options.target is None or error.problems[0].code != "target-finished":
            raise
        progress.note("the repository already holds this conversion")
        return job.result(EXIT_DONE, pushed=f"{HUB_PREFIX}{options.target.repo_id}")
    for warning in done.warnings:
        progress.note(warning)
    return job.result(
        EXIT_DONE,
        bytes=done.output_bytes,
        written=done.written_bytes,
        converted=len(done.converted),
        kept=len(done.kept),
        verified=len(done.verified),
        resumed=len(done.resumed),
        manifest=None if options.passes_on else _whole_manifest(job.output),
        pushed=done.pushed.url if done.pushed else None,
    )


def _plan_only(job: Job, progress: Progress) -> ItemResult:
    options = job.options
    checkpoint = open_checkpoint(open_source(job.item.source, follow_links=options.follow_links), options.choice)
    plan = plan_conversion(checkpoint, options.unaligned, options.to)
    refuse_unreadable(plan)
    refuse_overlap(checkpoint.folder.root, job.output)
    owned = partial(owned_files, job.output, options.overwrite)
    hindered = () if _holds_finished(job.output) else hindrance(job.output, plan.transfer.digest, owned)
    for warning in (*checkpoint.warnings, *hindered):
        progress.note(warning)
    needs = disk_needs(plan.transfer, job.output, stays=not options.passes_on, low_disk=options.low_disk)
    return job.result(
        EXIT_DONE,
        status="planned",
        bytes=plan.target_bytes,
        written=plan.target_bytes,
        converted=len(plan.converted),
        kept=len(plan.kept),
        needs=tuple(needs),
    )


def _compare_finished(job: Job, progress: Progress) -> ItemResult | None:
    """Compares a finished output, which the record does not answer for, with the source, completely.

    Returns:
        The result, if it is what this item would give; None if there is no finished output, or one to replace.

    Raises:
        CheckpointError: if the source is no convertible AWQ checkpoint.
        OutputError: if the output is another one, and may not be replaced.
    """
    if not _holds_finished(job.output):
        return None
    tidy(job.output)
    options = job.options
    folder = open_source(job.item.source, follow_links=options.follow_links)
    plan = plan_conversion(open_checkpoint(folder, options.choice), options.unaligned, options.to)
    progress.note(f"{job.output} already exists; comparing it with its source")
    try:
        if not same_json(_said(read_config(Folder.at(job.output))), _said(plan.config())):
            raise difference("config", "its config differs", file=CONFIG_FILENAME)
        if read_manifest(Folder.at(job.output)).files.keys() != plan.transfer.carried.keys():
            raise difference("manifest", "other files were carried over", file=MANIFEST_FILENAME)
        if options.low_disk and folder.origin is not None:
            verified = 0  # the source is not fetched again for that: its commit says that it is the same
            _check_recorded(job.output, folder.origin)
        else:
            workers, device = options.workers, options.device
            found = verify(
                job.item.source,
                job.output,
                workers=workers,
                device=device,
                progress=progress,
                follow_links=options.follow_links,
            )
            verified = len(found.modules)
    except (CheckpointError, DifferenceError) as error:
        if options.overwrite:
            return None
        raise _not_this_one(job.output, error) from None
    return job.result(
        EXIT_DONE,
        bytes=plan.target_bytes,
        converted=len(plan.converted),
        kept=len(plan.kept),
        verified=verified,
        manifest=_whole_manifest(job.output),
        pushed=_push(job, progress),
    )


def _push(job: Job, progress: Progress) -> str | None:
    """Sends a finished output to where it shall go, if anywhere; what is there already is not sent again."""
    target, message = job.options.target, job.options.commit_message
    if target is None:
        return None
    return push(job.output, **vars(target), commit_message=message, progress=progress).url


def _check_recorded(output: Path, origin: RepoCommit) -> None:
    """Raises DifferenceError unless an output was made from a commit, and its files are those that it was."""
    folder = Folder.at(output)
    manifest = read_manifest(folder)
    if (manifest.repo_id, manifest.revision) != origin:
        raise difference("manifest", f"it was made from {manifest.repo_id}@{manifest.revision}")
    for name, expected in manifest.output_files.items():
        if not expected.is_of(digest_of_file(NamedPath(folder.path(name), name))):
            raise difference("manifest", "the file differs from the one that was written", file=name)


def _said(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns what a config says of the model, and of its quantization: all but what stops Transformers."""
    return without_quantization(config), [each.content for each in quantization_documents(config)]


def _not_this_one(output: Path, error: Awq2MarlinError) -> OutputError:
    message = (
        f"the folder holds a different finished conversion ({error.problems[0]}); "
        "use --overwrite to replace it, or choose another folder"
    )
    return OutputError(Problem(str(output), "", "not-empty", message))
