"""The command line: reads arguments, calls the library, prints. No logic of its own.

What a command needs is imported when it runs, so that ``awq2marlin --help`` is instant.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

import typer

from awq2marlin._version import __version__
from awq2marlin.cli.json import Report
from awq2marlin.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Awq2MarlinError,
    Problem,
    internal_error,
    printable,
    problem_from_os_error,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from awq2marlin.hub.name import HubName
    from awq2marlin.hub.publication import PushTarget
    from awq2marlin.progress import Progress

_Result = TypeVar("_Result")

app = typer.Typer(
    name="awq2marlin",
    help="Convert AWQ checkpoints to the Marlin layout, offline: streamed, verified, and reversible byte for byte.",
    epilog="Exit codes: 0 done, 1 failed or refused, 2 usage, 3 a difference was found, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: The common base of the command line parser's usage errors.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

#: Code of an error that no input may cause; its traceback is shown.
_INTERNAL_ERROR = "internal-error"

_COMMANDS = ("convert", "batch", "verify", "revert", "push", "inspect", "demo", "doctor")

_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of the AWQ checkpoint, or a repository of the Hub: org/name[@revision], where there is no such "
        "folder, or hf://org/name[@revision].",
    ),
]
_Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Threads; by default one a processor, at most 8.")]
_Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Also run the compared modules through the Marlin GEMM: on a GPU, or the exact CPU reference."),
]
_Unaligned = Annotated[
    Literal["keep", "pad", "error"],
    typer.Option(
        help="Modules whose shapes Marlin cannot take: keep them in AWQ layout, pad them with zeros, or stop."
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier conversion; only files that it wrote are removed.")
]
_LowDisk = Annotated[
    bool,
    typer.Option(
        "--low-disk",
        help="Of a repository: remove each shard as soon as it is converted and compared; needs the output plus "
        "two shards of disk. With --push-to: send each shard at once and keep nothing. Not with --device.",
    ),
]
_PushTo = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME", help="Repository of the Hub that gets the result; made if needed."),
]
_PushAllTo = Annotated[
    str | None,
    typer.Option(
        metavar="ORG", help="Send every result to the Hub, to a repository of this owner named as the output."
    ),
]
_Private = Annotated[
    bool, typer.Option("--private", help="With --push-to: make a new repository private; an existing one must be.")
]
_Revision = Annotated[
    str | None,
    typer.Option(metavar="BRANCH", help="With --push-to: branch to commit to, made if needed; by default main."),
]
_CreatePr = Annotated[
    bool, typer.Option("--create-pr", help="With --push-to: open a pull request instead of changing the branch.")
]
_CommitMessage = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With --push-to: first line of the commits' messages.")
]
_Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Spread the shards over a Dask cluster that shares the storage: tcp://HOST:8786, or its scheduler file.",
    ),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _part(value: str) -> tuple[int, int]:
    number, _, count = value.partition("/")
    if number.isdecimal() and count.isdecimal() and len(value) < 20 and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise typer.BadParameter(f"{printable(value)!r} is not of the form 3/20, with a number from 1 to the count")


def _number_or(*words: str) -> Callable[[str], int | str]:
    def parse(value: str) -> int | str:
        if value in words:
            return value
        if value.isascii() and value.isdigit() and len(value) < 10:
            return int(value)
        raise typer.BadParameter(f"{printable(value)!r} is neither a number nor {' nor '.join(map(repr, words))}")

    return parse


_Verify = Annotated[
    Any,
    typer.Option(
        metavar="N|all|none",
        parser=_number_or("all", "none"),
        help="Modules to compare with the source before the output becomes loadable.",
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"awq2marlin {__version__}", flush=True)
        raise typer.Exit


@app.command()
def convert(
    source: _Source,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="Folder to write; by default ./<name>-marlin.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole plan and write nothing.")] = False,
    unaligned: _Unaligned = "keep",
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    verify: _Verify = "8",
    device: _Device = None,
    low_disk: _LowDisk = False,
    push_to: _PushTo = None,
    private: _Private = False,
    revision: _Revision = None,
    create_pr: _CreatePr = False,
    commit_message: _CommitMessage = None,
    dask: _Dask = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Convert an AWQ checkpoint to a Marlin-native one. Interrupted, the same command resumes."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.convert import convert as run
        from awq2marlin.hub.name import parse_source

        address = None if dry_run else dask
        with _executor(address, lambda: ([parse_source(source)], [output or Path("output")]), progress) as executor:
            return run(
                source,
                output,
                unaligned=unaligned,
                workers=workers,
                overwrite=overwrite,
                verify=verify,
                dry_run=dry_run,
                device=device,
                low_disk=low_disk,
                push_to=target,
                commit_message=commit_message,
                executor=executor,
                progress=progress,
            )

    def show(result: Any) -> None:
        from awq2marlin.cli import text as console

        (console.print_plan if dry_run else console.print_conversion)(result)

    _check_device(device, verify, low_disk)
    if push_to is None and (private or revision or create_pr or commit_message):
        raise typer.BadParameter(
            "--private, --revision, --create-pr and --commit-message need --push-to; "
            "a revision of the source is named org/name@revision"
        )
    target = None if push_to is None else _push_target(push_to, private, revision, create_pr, overwrite)
    _run("convert", work, show, "of_conversion", [source, *([output] if output else [])], quiet, as_json)


@app.command()
def batch(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="One source a line, or YAML, JSON or JSONL with options for each item (.yaml, .jsonl)."
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the outputs; by default the working directory.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Conversions at the same time; they share --workers.")] = 1,
    part: Annotated[
        Any,
        typer.Option(metavar="I/N", parser=_part, help="Take only the I-th of N parts, one for each job of an array."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in an earlier run.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL file of what became of each item; by default FILE.record.jsonl."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan every item and write nothing.")] = False,
    unaligned: _Unaligned = "keep",
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    verify: _Verify = "8",
    device: _Device = None,
    low_disk: _LowDisk = False,
    push_to: _PushAllTo = None,
    private: _Private = False,
    revision: _Revision = None,
    create_pr: _CreatePr = False,
    commit_message: _CommitMessage = None,
    dask: _Dask = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Convert many checkpoints; one failure stops no other. Run again, it does only what is left."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.batch.jobs import batch_folders
        from awq2marlin.batch.run import convert_many
        from awq2marlin.cli.batch_view import batch_progress, print_failures

        options = {
            "unaligned": unaligned,
            "overwrite": overwrite,
            "verify": verify,
            "device": device,
            "low_disk": low_disk,
            "push_to": push_to,
            "private": private,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message,
        }
        address = None if dry_run else dask
        folders = partial(batch_folders, file, out_dir=out_dir, part=part, **options)
        with _executor(address, folders, progress) as executor:
            result = convert_many(
                file,
                out_dir=out_dir,
                jobs=jobs,
                workers=workers,
                part=part,
                retry_failed=retry_failed,
                record=record,
                dry_run=dry_run,
                executor=executor,
                progress=batch_progress() if progress is not None else None,
                **options,
            )
        if progress is None:
            print_failures(result)
        return result

    def show(result: Any) -> None:
        from awq2marlin.cli.batch_view import print_batch

        print_batch(result)

    _check_device(device, verify, low_disk)
    _run("batch", work, show, "of_batch", [file], quiet, as_json)


def _executor(
    address: str | None,
    folders: Callable[[], tuple[Sequence[Path | HubName], Sequence[Path]]],
    progress: Progress | None,
) -> AbstractContextManager[Executor | None]:
    """Returns the executor that ``--dask`` names; without one the work is done here."""
    if address is None:
        return nullcontext()
    from awq2marlin.pipeline.dask import dask_executor

    return dask_executor(address, *folders(), progress)


@app.command()
def verify(
    source: _Source,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the converted one, or its repository.")],
    modules: Annotated[
        Any,
        typer.Option(
            "--modules",
            "--layers",
            metavar="N|all",
            parser=_number_or("all"),
            help="Converted modules to compare value for value; everything else is always compared.",
        ),
    ] = "all",
    workers: _Workers = None,
    device: _Device = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="With --device: draw the GEMM's error against depth.")
    ] = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Compare a converted checkpoint with its source, value for value; exit 3 on a difference."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.verification.compare import verify as run

        if plot is not None:
            from awq2marlin.verification.error_plot import check_picture, plot_errors

            check_picture(plot)
        result = run(source, output, modules=modules, workers=workers, device=device, progress=progress)
        if plot is not None and result.gemm is not None:
            plot_errors(result.gemm, plot)
        return result

    if plot is not None and device is None:
        raise typer.BadParameter("--plot needs --device: it draws what the GEMM said")

    _run("verify", work, "print_verification", "of_verification", [source, output], quiet, as_json)


@app.command()
def revert(
    converted: Annotated[
        str, typer.Argument(metavar="CONVERTED", help="Folder of the converted checkpoint, or its repository.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    workers: _Workers = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Give the AWQ checkpoint back, every file byte for byte, and print each file's SHA-256."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.revert import revert as run

        return run(converted, output, workers=workers, progress=progress)

    _run("revert", work, "print_reversion", "of_reversion", [converted, output], quiet, as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the converted checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; made if needed.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; an existing one must then be.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to, made if needed; by default main.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="First line of the commit's message.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a checkpoint of another model or run that the repository holds."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder, look at the repository, and write nothing.")
    ] = False,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Upload a converted checkpoint to the Hub, in one commit. Interrupted, the same command sends only the rest."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.push import push as run

        return run(
            folder,
            repository,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )

    _push_target(repository, private, revision, create_pr, overwrite)
    _run("push", work, "print_push", "of_push", [folder, Path(repository)], quiet, as_json)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder of an AWQ or a converted checkpoint, or a repository of the Hub."),
    ],
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Show what a checkpoint is: format, bits, group size, modules with their shapes, and what Marlin can take."""

    def work(_progress: Progress | None) -> Any:
        from awq2marlin.commands.inspect import inspect as run

        return run(path)

    _run("inspect", work, "print_inspection", "of_inspection", [path], quiet, as_json)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Where to leave the files; a temporary folder if not given."),
    ] = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Make a small AWQ checkpoint, convert, verify and revert it, and show what happened."""

    def work(progress: Progress | None) -> Any:
        from awq2marlin.commands.demo import demo as run

        return run(folder, progress=progress)

    _run("demo", work, "print_demonstration", "of_demonstration", [], quiet, as_json)


@app.command()
def doctor(quiet: _Quiet = False, as_json: _Json = False) -> None:
    """Show what this machine has for running the Marlin GEMM, and the command that mends what is missing."""

    def work(_progress: Progress | None) -> Any:
        from awq2marlin.commands.doctor import doctor as run

        return run()

    _run("doctor", work, "print_doctor", "of_doctor", [], quiet, as_json)


def _check_device(device: str | None, verify: int | str, low_disk: bool) -> None:
    """Refuses options that leave nothing to run on a device."""
    if device is not None and verify in ("none", 0):
        raise typer.BadParameter("--device needs --verify N or all: it runs the modules that are compared")
    if device is not None and low_disk:
        raise typer.BadParameter("--device needs the whole source, which --low-disk removes; use 'verify' afterwards")


def _push_target(repository: str, private: bool, revision: str | None, create_pr: bool, overwrite: bool) -> PushTarget:
    """Returns where to push; a usage error if the names are none."""
    from awq2marlin.hub.publication import PushTarget

    try:
        return PushTarget(repository, private, revision, create_pr, overwrite)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _run(
    command: str,
    work: Callable[[Progress | None], Any],
    show: Callable[[Any], None] | str,
    report_maker: str,
    where: Sequence[Path | str],
    quiet: bool,
    as_json: bool,
) -> None:
    """Runs one command and tells the outcome in one place, for people or as JSON.

    Args:
        command: its name.
        work: the library call; given where to tell its progress.
        show: prints its result for people; a name is a function of `console`.
        report_maker: the function of `report` that makes the JSON report of its result.
        where: the folders that the user named, source first.
        quiet: whether to print errors only.
        as_json: whether to print the JSON object.

    Raises:
        typer.Exit: with the exit code, if it is not 0.
    """
    from awq2marlin.cli import json as reports
    from awq2marlin.cli import text as console

    started = time.perf_counter()
    progress = None if quiet else console.ConsoleProgress()
    try:
        result = work(progress)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, problems, text = _failure(command, error)
        is_known = problems[0].code != _INTERNAL_ERROR
        if is_known:
            if progress is not None:
                progress.finish()
            console.print_problems(problems, text)
        if as_json:
            source, output = [*map(str, where), "", ""][:2]
            report = Report(command, source, output, seconds=time.perf_counter() - started)
            _print_json(report.document(code, problems))
        if not is_known:
            raise
        raise typer.Exit(code) from None
    code, problems = getattr(result, "exit_code", EXIT_DONE), getattr(result, "problems", ())
    if as_json:
        done: Report = getattr(reports, report_maker)(result)
        done.seconds = done.seconds or time.perf_counter() - started
        _print_json(done.document(code, problems))
    elif not quiet:
        (getattr(console, show) if isinstance(show, str) else show)(result)
    if code != EXIT_DONE:
        raise typer.Exit(code)


def _failure(command: str, error: BaseException) -> tuple[int, Sequence[Problem], str]:
    """Returns what an error of the library means: exit code, problems, and their text."""
    if isinstance(error, Awq2MarlinError):
        return error.exit_code, error.problems, str(error)
    code = EXIT_FAILED
    if isinstance(error, OSError):
        problem = problem_from_os_error(error)
    elif isinstance(error, MemoryError):
        problem = Problem("", "", "out-of-memory", "there is not enough memory; use fewer --workers")
    elif isinstance(error, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
        resumes = (
            "; the same command resumes where it stopped" if command in ("convert", "batch", "revert", "push") else ""
        )
        problem = Problem("", "", "interrupted", f"interrupted{resumes}")
    else:
        problem = internal_error(error, "the traceback")
    return code, (problem,), str(problem)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=True), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: without the program's name; by default the process's.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's idle threads would take time from ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the command
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left; nothing more can be told, not even at exit
        _silence(sys.stdout, sys.stderr)
    except OSError as error:  # what the work met is told by now: this one is of telling it
        _silence(sys.stdout)
        reason = printable(error.strerror or str(error)).lower()
        print(f"error: cannot write to standard output: {reason}", file=sys.stderr, flush=True)
    else:
        return code
    return EXIT_FAILED


def _silence(*streams: TextIO) -> None:
    """Lets streams that take nothing any more take everything, also what Python still holds for them at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _main(arguments: list[str]) -> int:
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="awq2marlin", standalone_mode=False)
    except _UsageError as error:
        message = printable(error.format_message())  # type: ignore[attr-defined]
        if message:  # empty where the help was printed instead
            print(
                f"usage error: {message}\nTry 'awq2marlin --help' or 'awq2marlin COMMAND --help'.",
                file=sys.stderr,
            )
        if "--json" in arguments:
            command = arguments[0] if arguments[0] in _COMMANDS else ""
            _print_json(Report(command).document(EXIT_USAGE, [Problem("", "", "usage", message)]))
        return EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else EXIT_DONE
