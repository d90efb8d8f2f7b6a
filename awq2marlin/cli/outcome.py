"""How a command ends: its exit code, its result or its errors, for people or as the JSON object."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

import typer

from awq2marlin.arguments import ArgumentError
from awq2marlin.cli.options import option_of
from awq2marlin.cli.terminal import print_error
from awq2marlin.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    MAX_PROBLEMS_SHOWN,
    Awq2MarlinError,
    KernelUnavailableError,
    Problem,
    Terminated,
    internal_error,
    pattern,
    printable,
    problem_from_os_error,
)

if TYPE_CHECKING:
    from awq2marlin.cli.json import Report
    from awq2marlin.progress import Progress

#: Commands that go on where they were interrupted.
_RESUMING = {"convert", "batch", "revert", "push"}


def run(
    command: str,
    work: Callable[[Progress | None], Any],
    where: Sequence[object],
    quiet: bool,
    as_json: bool,
) -> None:
    """Runs a command and tells the outcome.

    Args:
        command: its name.
        work: the library's call; given where to tell its progress, None for nowhere.
        where: what the user named, the source first.
        quiet: whether to print errors only.
        as_json: whether to print the JSON object.

    Raises:
        typer.Exit: with the exit code, if it is not 0.
    """
    started = time.perf_counter()
    progress = None if quiet else _console_progress()
    try:
        result = work(progress)
    except BrokenPipeError:
        raise
    except ArgumentError as error:  # what only the checkpoints show
        if progress is not None:
            progress.finish()
        raise typer.Exit(tell_usage_error(error.spelled(option_of), command, as_json)) from None
    except (Exception, KeyboardInterrupt) as error:
        code, problems = _meaning(error, command)
        is_ours = problems[0].code == "internal-error"
        if not is_ours:
            if progress is not None:
                progress.finish()
            print_error(_problems_text(error, problems))
        if as_json:
            _print_json(_report_of_error(error, command, where, started), code, problems)
        if is_ours:
            raise  # with its traceback
        raise typer.Exit(code) from None
    _tell_result(result, started, quiet, as_json)


def _console_progress() -> Progress:
    from awq2marlin.cli.progress import ConsoleProgress  # which a quiet command does not wait for

    return ConsoleProgress()


def _report_of_error(error: BaseException, command: str, where: Sequence[object], started: float) -> Report:
    """Returns what is known of a command that failed: of a comparison that went on to the end, all."""
    from awq2marlin.cli.json import Report, report_of

    result = getattr(error, "result", None)
    source, output = [*map(str, where), "", ""][:2]
    report = Report(command, source, output) if result is None else report_of(result)
    report.seconds = time.perf_counter() - started
    return report


def _tell_result(result: Any, started: float, quiet: bool, as_json: bool) -> None:
    """Prints a result; one that knows of failures has an ``exit_code`` and ``problems``."""
    code = getattr(result, "exit_code", EXIT_DONE)
    if as_json:
        from awq2marlin.cli.json import report_of

        report = report_of(result)
        report.seconds = report.seconds or time.perf_counter() - started
        _print_json(report, code, getattr(result, "problems", ()))
    elif not quiet:
        from awq2marlin.cli.text import show

        show(result)
    if code != EXIT_DONE:
        raise typer.Exit(code)


def _meaning(error: BaseException, command: str) -> tuple[int, Sequence[Problem]]:
    """Returns what an error of the library means: exit code and problems."""
    if isinstance(error, Awq2MarlinError):
        return error.exit_code, error.problems
    if isinstance(error, OSError):
        return EXIT_FAILED, [problem_from_os_error(error)]
    if isinstance(error, MemoryError):
        return EXIT_FAILED, [Problem("", "", "out-of-memory", "out of memory; use fewer --workers")]
    if isinstance(error, KeyboardInterrupt):
        resumes = "; run the same command again to continue" if command in _RESUMING else ""
        code, word = how_interrupted(error)
        return code, [Problem("", "", "interrupted", f"{word}{resumes}")]
    return EXIT_FAILED, [internal_error(error, "the traceback", "internal-error")]


def how_interrupted(error: BaseException) -> tuple[int, str]:
    """Returns the exit code after an interruption, and what it is called."""
    return (
        (EXIT_TERMINATED, "terminated (SIGTERM)")
        if isinstance(error, Terminated)
        else (EXIT_INTERRUPTED, "interrupted")
    )


@contextmanager
def told_of_termination() -> Iterator[None]:
    """Lets SIGTERM end the work as Ctrl-C does while the context lasts; a second one ends the process at once."""

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _problems_text(error: BaseException, problems: Sequence[Problem]) -> str:
    """Returns what went wrong, a line each, with their number if there are several; only the first are spelled out."""
    result = getattr(error, "result", None)
    if result is not None:
        from awq2marlin.cli.differences import differences_text

        return differences_text(result, result.differences)
    head = "" if len(problems) == 1 else f"{len(problems)} problems:\n"
    lines = list(_grouped(problems))
    hidden = len(lines) - MAX_PROBLEMS_SHOWN
    more = [f"... and {hidden} more of this kind"] if hidden > 0 else []
    told = str(error) if isinstance(error, KernelUnavailableError) else "\n".join([*lines[:MAX_PROBLEMS_SHOWN], *more])
    return head + told


def _grouped(problems: Sequence[Problem]) -> Iterator[str]:
    """Yields a line on each problem; one on all that say the same of tensors whose names differ in numbers only."""
    alike: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((pattern(problem.tensor) or problem.file, problem.message), []).append(problem)
    for group in alike.values():
        first, files = group[0], {problem.file for problem in group}
        common = replace(first, tensor=pattern(first.tensor), file=first.file if len(files) == 1 else "")
        yield str(first) if len(group) == 1 else f"{common} ({len(group)} of them)"


def tell_usage_error(message: str, command: str, as_json: bool) -> int:
    """Tells what is wrong with a command line, and returns the exit code.

    Args:
        message: what is wrong, for people.
        command: the command's name; empty if none is named.
        as_json: whether to print the JSON object.
    """
    message = printable(message)
    print_error(f"{message}\nTry '{' '.join(filter(None, ('awq2marlin', command)))} --help'.", "usage error")
    if as_json:
        from awq2marlin.cli.json import Report

        _print_json(Report(command), EXIT_USAGE, [Problem("", "", "usage", message)])
    return EXIT_USAGE


def _print_json(report: Report, code: int, problems: Sequence[Problem]) -> None:
    print(json.dumps(report.document(code, problems), indent=2, ensure_ascii=True), flush=True)


def guarded(command_line: Callable[[], int]) -> int:
    """Runs a command line and returns its exit code, whatever its output is connected to.

    Args:
        command_line: what to run; returns an exit code.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the command
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command_line()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left; nothing more can be told, not even at exit
        _silence(sys.stdout, sys.stderr)
    except OSError as error:  # what the work met is told by now: this one is of telling it
        _silence(sys.stdout)
        reason = printable(error.strerror or str(error)).lower()
        print_error(f"cannot write to standard output: {reason}")
    else:
        return code
    return EXIT_FAILED


def _open_closed_streams() -> None:
    """Has standard streams that were closed (``>&-``) take everything, or give nothing; Python has None for them.

    So nothing else is opened under the number of one, either, and gets what is meant for it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open


def _silence(*streams: TextIO) -> None:
    """Lets streams that take nothing any more take everything, also what Python still holds for them at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
