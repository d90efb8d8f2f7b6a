"""The commands: each reads its arguments and calls the library. No logic of its own.

What a command needs is imported when it runs, so that ``awq2marlin --help`` is instant. Its options are made of all
arguments that it does not name itself, so that a new one is not forgotten on the way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from awq2marlin._version import __version__
from awq2marlin.cli import options as opt
from awq2marlin.cli.outcome import guarded, how_interrupted, run, tell_usage_error, told_of_termination
from awq2marlin.commands.options import ABOUT_TARGET, ConvertOptions, RevertOptions, VerifyOptions
from awq2marlin.errors import EXIT_DONE, EXIT_USAGE
from awq2marlin.hub.target import PushTarget

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from awq2marlin.hub.name import HubName
    from awq2marlin.progress import Progress

    #: What a run would read, and the folders that it would write.
    _Folders = tuple[Sequence[Path | HubName], Sequence[Path]]


class _InOrder(click.Group):
    """Commands that the help lists as they stand here, the most used first."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return [*self.commands]


@click.group(
    cls=_InOrder,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    help="Convert quantized checkpoints to the Marlin layout: offline, streamed, verified, reversible byte for byte.",
    epilog="Exit codes: 0 done, 1 failed or refused, 2 usage, 3 a difference was found, 130 interrupted, "
    "143 terminated.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@opt.flag("--version", "Print the version and exit.")
@click.pass_context
def app(context: click.Context, version: bool) -> None:
    """The command line."""
    if version:
        print(f"awq2marlin {__version__}", flush=True)
        context.exit()
    if context.invoked_subcommand is None:
        print(context.get_help(), flush=True)
        context.exit(EXIT_USAGE)


@app.command()
@opt.source
@click.argument(
    "output", required=False, type=opt.path, help="Folder to write; by default ./<name>-marlin, or -awq or -ct."
)
@opt.flag("--dry-run", "Print the whole plan and write nothing.")
@opt.conversion(
    click.option("--push-to", metavar="ORG/NAME", help="Repository of the Hub that gets the result; made if needed.")
)
@opt.telling
def convert(source: str, output: Path | None, dask: str | None, quiet: bool, as_json: bool, **given: Any) -> None:
    """Convert a checkpoint to Marlin's layout, or to another format.

    It reads AWQ, GPTQ, AutoRound, compressed-tensors and Marlin-native checkpoints, and writes AWQ, compressed-tensors
    and Marlin-native ones.

    If interrupted, run it again to continue.
    """
    options = opt.made(ConvertOptions, given)

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.convert import convert

        folders = partial(_of_one_run, source, output)
        with _executor(None if options.dry_run else dask, folders, progress) as executor:
            return convert(source, output, **vars(options), executor=executor, progress=progress)

    run("convert", work, [source, output or ""], quiet, as_json)


@app.command()
@click.argument(
    "file",
    help="One source a line, or YAML, JSON or JSONL with options for each item (.yaml, .jsonl); - for a list "
    "of sources on standard input.",
)
@click.option("--out-dir", metavar="DIR", type=Path, help="Folder for the outputs; by default the working directory.")
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(1, 256),
    default=1,
    help="Conversions at the same time; they share --workers.",
)
@opt.part
@opt.flag("--retry-failed", "Try again what failed in an earlier run.")
@click.option(
    "--record",
    metavar="FILE",
    type=Path,
    help="JSONL file that records the result of each item; by default FILE.record.jsonl.",
)
@opt.flag("--dry-run", "Plan every item and write nothing.")
@opt.conversion(
    click.option(
        "--push-to",
        metavar="ORG",
        help="Send every result to the Hub, to a repository under this owner, named like the output folder.",
    )
)
@opt.telling
def batch(
    file: str,
    out_dir: Path | None,
    jobs: int,
    part: tuple[int, int] | None,
    retry_failed: bool,
    record: Path | None,
    dry_run: bool,
    workers: int | None,
    dask: str | None,
    quiet: bool,
    as_json: bool,
    **of_items: Any,
) -> None:
    """Convert many checkpoints; one failure stops no other. Run again, it does only what is left."""
    opt.made(ConvertOptions, {name: value for name, value in of_items.items() if name not in ABOUT_TARGET})

    def work(progress: Progress | None) -> Any:
        from awq2marlin.batch.file import lines_of
        from awq2marlin.batch.jobs import batch_folders
        from awq2marlin.batch.run import convert_many
        from awq2marlin.cli.progress import batch_progress
        from awq2marlin.cli.text import print_failures

        of_list = {"out_dir": out_dir, "part": part, **of_items}
        sources = lines_of(sys.stdin.buffer, "standard input") if file == "-" else Path(file)
        if progress is not None and file == "-" and record is None and not dry_run:
            progress.note("no record is kept of what becomes of a list from standard input; --record FILE keeps one")
        with _executor(None if dry_run else dask, partial(batch_folders, sources, **of_list), progress) as executor:
            result = convert_many(
                sources,
                jobs=jobs,
                workers=workers,
                retry_failed=retry_failed,
                record=record,
                dry_run=dry_run,
                executor=executor,
                progress=batch_progress() if progress is not None else None,
                **of_list,
            )
        if progress is None:
            print_failures(result)
        return result

    run("batch", work, [file], quiet, as_json)


@app.command()
@opt.source
@click.argument("output", help="Its conversion, or any other checkpoint: folder or Hub repository, as for SOURCE.")
@opt.modules
@opt.layers
@opt.workers
@opt.device
@click.option("--plot", metavar="FILE.png", type=Path, help="With --device: plot the GEMM error per layer.")
@opt.follow_links
@click.option("--report", metavar="FILE.html", type=Path, help="Write what was compared and found as one page.")
@opt.telling
def verify(
    source: str, output: str, plot: Path | None, report: Path | None, quiet: bool, as_json: bool, **given: Any
) -> None:
    """Compare a conversion with its source, or any two checkpoints.

    Values are compared one by one. Exit code 3 if they differ.
    """
    options = opt.made(VerifyOptions, given)
    if plot is not None and options.device is None:
        raise click.BadParameter("--plot needs --device: there is nothing to plot otherwise")

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.verify import verify

        if plot is not None:
            from awq2marlin.verification.error_plot import check_picture, plot_errors

            check_picture(plot)
        call = partial(verify, source, output, **vars(options), progress=progress)
        if report is not None:
            from awq2marlin.cli.report import Asked, reported

            call = partial(reported, report, Asked(source, output, options.count, options.device), call)
        result = call()
        if plot is not None and result.gemm is not None:
            plot_errors(result.gemm, plot)
        return result

    run("verify", work, [source, output], quiet, as_json)


@app.command()
@click.argument("converted", help="Converted checkpoint: folder or Hub repository, org/name[@revision].")
@click.argument("output", required=False, type=opt.path, help="Folder to write; by default ./<name>-reverted.")
@opt.flag("--dry-run", "Print what would be restored and write nothing.")
@opt.workers
@opt.flag(
    "--overwrite",
    "Complete an earlier reversion: equal files stay as they are, others of the same name are refused.",
)
@opt.flag(
    "--low-disk",
    "Hub repositories only: delete each fetched shard once it is restored. Needs space for the output plus two shards.",
)
@opt.follow_links
@opt.dask
@opt.telling
def revert(converted: str, output: Path | None, dask: str | None, quiet: bool, as_json: bool, **given: Any) -> None:
    """Restore what a checkpoint was converted from, byte for byte.

    Prints each file's SHA-256. If interrupted, run it again to continue.
    """
    options = opt.made(RevertOptions, given)

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.revert import revert

        folders = partial(_of_one_run, converted, output)
        with _executor(None if options.dry_run else dask, folders, progress) as executor:
            return revert(converted, output, **vars(options), executor=executor, progress=progress)

    run("revert", work, [converted, output or ""], quiet, as_json)


@app.command()
@click.argument("folder", type=opt.path, help="Folder of the converted checkpoint.")
@click.argument("repository", metavar="ORG/NAME", help="Repository on the Hub; made if needed.")
@opt.flag("--private", "Create the repository as private; refuse one that exists and is public.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made if needed; by default main.")
@opt.flag("--create-pr", "Open a pull request instead of changing the branch.")
@click.option("--commit-message", metavar="TEXT", help="First line of the commit's message.")
@opt.flag("--overwrite", "Replace a checkpoint of another model or run that the repository holds.")
@opt.flag("--dry-run", "Check the folder, look at the repository, and write nothing.")
@click.option("--report", metavar="FILE.html", type=Path, help="A page that 'verify --report' wrote; it goes along.")
@opt.telling
def push(
    folder: Path,
    repository: str,
    commit_message: str | None,
    dry_run: bool,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Upload a converted checkpoint to the Hub, in one commit. If interrupted, run it again to continue."""
    target = opt.made(PushTarget, {**given, "repo_id": repository})

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.push import push

        return push(
            folder,
            **vars(target),
            commit_message=commit_message,
            dry_run=dry_run,
            report=report,
            progress=progress,
        )

    run("push", work, [folder, repository], quiet, as_json)


@app.command()
@click.argument("path", help="The checkpoint: folder, or Hub repository, org/name[@revision].")
@opt.telling
def inspect(path: str, quiet: bool, as_json: bool) -> None:
    """Show what a checkpoint is, and what of it Marlin can take.

    Lists format, bits, group size, and the modules with their shapes.
    """

    def work(_progress: Progress | None) -> Any:
        from awq2marlin.commands.inspect import inspect

        return inspect(path)

    run("inspect", work, [path], quiet, as_json)


@app.command()
@click.argument("folder", required=False, type=Path, help="Where to leave the files; a temporary folder if not given.")
@opt.telling
def demo(folder: Path | None, quiet: bool, as_json: bool) -> None:
    """Convert, verify and revert a small checkpoint made on the spot. Shows what happened."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.demo import demo

        return demo(folder, progress=progress)

    run("demo", work, [], quiet, as_json)


@app.command()
@opt.telling
def doctor(quiet: bool, as_json: bool) -> None:
    """Show what this machine has for running the Marlin GEMM. Tells how to install what is missing."""

    def work(_progress: Progress | None) -> Any:
        from awq2marlin.commands.doctor import doctor

        return doctor()

    run("doctor", work, [], quiet, as_json)


def _of_one_run(source: str, output: Path | None) -> _Folders:
    from awq2marlin.hub.name import parse_source

    return [parse_source(source)], [output or Path("output")]


def _executor(
    address: str | None, folders: Callable[[], _Folders], progress: Progress | None
) -> AbstractContextManager[Executor | None]:
    """Returns the executor that ``--dask`` names; without one the work is done here."""
    if address is None:
        return nullcontext()
    from awq2marlin.pipeline.dask import dask_executor

    return dask_executor(address, *folders(), progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: without the program's name; by default the process's.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's idle threads would take time from ours
    with told_of_termination():
        return guarded(partial(_main, list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    try:
        with app.make_context("awq2marlin", arguments.copy()) as context:
            app.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        command = next((name for name in arguments[:1] if name in app.commands), "")
        return tell_usage_error(error.format_message(), command, "--json" in arguments)
    except KeyboardInterrupt as error:
        return how_interrupted(error)[0]
    return EXIT_DONE
