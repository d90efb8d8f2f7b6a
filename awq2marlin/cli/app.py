"""The commands: each reads its arguments and calls the library. No logic of its own.

What a command needs is imported when it runs, so that ``awq2marlin --help`` is instant. Its options are made of its
``locals()``, all arguments by name, so that a new one is not forgotten on the way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq2marlin._version import __version__
from awq2marlin.cli import options as opt
from awq2marlin.cli.help import Command, Group, description
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

app = typer.Typer(
    name="awq2marlin",
    help=description(""),
    cls=Group,
    rich_markup_mode=None,  # which would take [@revision] for markup, and hide it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command under its name, with its description."""
    return app.command(name, cls=Command, help=description(name))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"awq2marlin {__version__}", flush=True)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), flush=True)
        raise typer.Exit(EXIT_USAGE)


@_command("convert")
def _convert(
    source: opt.Source,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUTPUT",
            parser=opt.path,
            help="Folder to write. By default ./<name>-marlin, with --to also ./<name>-awq or ./<name>-ct.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    to: opt.To = ConvertOptions.to,
    unaligned: opt.Unaligned = ConvertOptions.unaligned,
    workers: opt.Workers = None,
    overwrite: opt.Overwrite = False,
    verify: opt.Verify = ConvertOptions.verify,
    device: opt.Device = None,
    low_disk: opt.LowDisk = False,
    carry: opt.Carry = opt.NO_PATTERNS,
    leave: opt.Leave = opt.NO_PATTERNS,
    follow_links: opt.FollowLinks = False,
    push_to: opt.PushTo = None,
    private: opt.Private = False,
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    commit_message: opt.CommitMessage = None,
    dask: opt.Dask = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    options = opt.made(ConvertOptions, locals())

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.convert import convert

        folders = partial(_of_one_run, source, output)
        with _executor(None if dry_run else dask, folders, progress) as executor:
            return convert(source, output, **vars(options), executor=executor, progress=progress)

    run("convert", work, [source, output or ""], quiet, as_json)


@_command("batch")
def _batch(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="List of sources: one per line, or a .yaml, .json or .jsonl file with options for each item. With - "
            "lines are read from standard input.",
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the outputs. By default the working directory.")
    ] = None,
    jobs: opt.Jobs = 1,
    part: opt.Part = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also retry what failed in an earlier run.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSONL file that records the result of each item. By default FILE.record.jsonl."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan every item and write nothing.")] = False,
    to: opt.To = ConvertOptions.to,
    unaligned: opt.Unaligned = ConvertOptions.unaligned,
    workers: opt.Workers = None,
    overwrite: opt.Overwrite = False,
    verify: opt.Verify = ConvertOptions.verify,
    device: opt.Device = None,
    low_disk: opt.LowDisk = False,
    carry: opt.Carry = opt.NO_PATTERNS,
    leave: opt.Leave = opt.NO_PATTERNS,
    follow_links: opt.FollowLinks = False,
    push_to: opt.PushAllTo = None,
    private: opt.Private = False,
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    commit_message: opt.CommitMessage = None,
    dask: opt.Dask = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    given = locals()
    from awq2marlin.batch.file import OPTIONS

    of_items = {name: given[name] for name in OPTIONS if name in given and name != "workers"}
    opt.made(ConvertOptions, {name: value for name, value in of_items.items() if name not in ABOUT_TARGET})

    def work(progress: Progress | None) -> Any:
        from awq2marlin.batch.file import lines_of
        from awq2marlin.batch.jobs import batch_folders
        from awq2marlin.batch.run import convert_many
        from awq2marlin.cli.progress import batch_progress
        from awq2marlin.cli.text import print_failures

        of_list = {"out_dir": out_dir, "part": part, **of_items}
        sources = lines_of(sys.stdin.buffer, "standard input") if str(file) == "-" else file
        if progress is not None and sources is not file and record is None and not dry_run:
            progress.note("no record is kept for a list from standard input; pass --record FILE to keep one")
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


@_command("verify")
def _verify(
    source: opt.Source,
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT",
            help="Its conversion, or any other checkpoint: folder or Hub repository, written like SOURCE.",
        ),
    ],
    modules: opt.Modules = None,
    layers: opt.Layers = VerifyOptions.layers,
    workers: opt.Workers = None,
    device: opt.Device = None,
    plot: opt.Picture = None,
    follow_links: opt.FollowLinks = False,
    report: opt.ReportFile = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    options = opt.made(VerifyOptions, locals())
    if plot is not None and device is None:
        raise opt.UsageError("--plot needs --device: there is nothing to plot otherwise")

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.verify import verify

        if plot is not None:
            from awq2marlin.verification.error_plot import check_picture, plot_errors

            check_picture(plot)
        call = partial(verify, source, output, **vars(options), progress=progress)
        if report is not None:
            from awq2marlin.cli.report import Asked, reported

            call = partial(reported, report, Asked(source, output, options.count, options.device), call, progress)
        result = call()
        if plot is not None and result.gemm is not None:
            plot_errors(result.gemm, plot)
        return result

    run("verify", work, [source, output], quiet, as_json)


@_command("revert")
def _revert(
    converted: Annotated[
        str,
        typer.Argument(
            metavar="CONVERTED", help="Converted checkpoint: folder, or Hub repository as org/name[@revision]."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUTPUT", parser=opt.path, help="Folder to write. By default ./<name>-reverted."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be restored and write nothing.")] = False,
    workers: opt.Workers = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Write into a folder that has files: equal ones stay as they are, different ones of the same name are "
            "refused.",
        ),
    ] = False,
    low_disk: Annotated[
        bool,
        typer.Option(
            "--low-disk",
            help="Hub repositories only: delete each downloaded shard once it is restored. Needs space for the output "
            "plus two shards.",
        ),
    ] = False,
    follow_links: opt.FollowLinks = False,
    dask: opt.Dask = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    options = opt.made(RevertOptions, locals())

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.revert import revert

        folders = partial(_of_one_run, converted, output)
        with _executor(None if dry_run else dask, folders, progress) as executor:
            return revert(converted, output, **vars(options), executor=executor, progress=progress)

    run("revert", work, [converted, output or ""], quiet, as_json)


@_command("push")
def _push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", parser=opt.path, help="Folder of the converted checkpoint.")
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Hub repository. It is created if needed.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private; refuse one that exists and is public.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to, created if needed. By default main.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="First line of the commit message.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a different checkpoint that the repository holds."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and the repository, and upload nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Also upload this page, written by 'verify --report'."),
    ] = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    target = opt.made(PushTarget, {**locals(), "repo_id": repository})

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


@_command("inspect")
def _inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Checkpoint: folder, or Hub repository as org/name[@revision]."),
    ],
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:

    def work(_progress: Progress | None) -> Any:
        from awq2marlin.commands.inspect import inspect

        return inspect(path)

    run("inspect", work, [path], quiet, as_json)


@_command("demo")
def _demo(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Where to keep the files. By default they are removed at the end."),
    ] = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.demo import demo

        return demo(folder, progress=progress)

    run("demo", work, [], quiet, as_json)


@_command("doctor")
def _doctor(quiet: opt.Quiet = False, as_json: opt.Json = False) -> None:

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


@cache
def _group() -> Any:
    """Returns all commands as Typer makes them; made once, which takes half as long as a small conversion."""
    return typer.main.get_command(app)


def _main(arguments: list[str]) -> int:
    group = _group()
    try:
        code = group.main(args=arguments, prog_name="awq2marlin", standalone_mode=False)
    except opt.UsageError as error:
        command = next((name for name in arguments[:1] if name in group.commands), "")
        return tell_usage_error(_what_is_wrong(error), command, "--json" in arguments)
    except (KeyboardInterrupt, typer.Abort) as error:
        return how_interrupted(error)[0]
    return code if isinstance(code, int) else EXIT_DONE


def _what_is_wrong(error: Any) -> str:
    """Returns what a usage error says; of an option that there is not, only one is named, if it looks like a typo."""
    option, similar = getattr(error, "option_name", ""), getattr(error, "possibilities", None)
    if not (option and similar):
        return str(error.format_message())
    from difflib import get_close_matches  # Typer's own limit, 0.6, takes --to for --out

    meant = get_close_matches(option, similar, n=1, cutoff=0.7)
    return f"No such option: {option}" + (f". Did you mean {meant[0]}?" if meant else "")
