"""The options that commands share, as they are written and described on the command line.

What an option may be and goes with is stated in `commands.options`; `made` puts a refusal from there into the spelling
of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from awq2marlin.arguments import MAX_WORKERS, ArgumentError, Checked
from awq2marlin.errors import printable
from awq2marlin.layout import modules
from awq2marlin.verification import sampling

_Options = TypeVar("_Options", bound=Checked)

#: What is wrong with a command line as a whole: the common base of the parser's usage errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def option_of(name: str) -> str:
    """Returns how the command line spells an argument."""
    return "--" + name.replace("_", "-")


def made(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Returns the options of a command.

    Args:
        kind: their class.
        given: the command's arguments by name; what is no option of the class is left aside.

    Raises:
        UsageError: if they are wrong, or cannot be used together.
    """
    try:
        return kind.of(given)
    except ArgumentError as error:
        raise UsageError(error.spelled(option_of)) from None


def _number_or(*words: str) -> Callable[[object], int | str]:
    def parse(value: object) -> int | str:
        text = str(value)
        if text in words:
            return text
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        raise typer.BadParameter(f"{printable(text)!r} is neither a number nor {' nor '.join(map(repr, words))}")

    return parse


def _number(most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        text = str(value)
        if text.isascii() and text.isdigit() and 1 <= int(text[:10]) <= most:
            return int(text)
        raise typer.BadParameter(f"{printable(text)!r} is not a number from 1 to {most}")

    return parse


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        text = str(value)
        if text in words:
            return text
        raise typer.BadParameter(f"{printable(text)!r} is not {', '.join(words[:-1])} or {words[-1]}")

    return parse


def _completing(words: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(begun: str) -> list[str]:
        return [each for each in words if each.startswith(begun)]

    return complete


def _part(value: str) -> tuple[int, int]:
    number, _, count = value.partition("/")
    if number.isdecimal() and count.isdecimal() and len(value) < 20 and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise typer.BadParameter(f"{printable(value)!r} must be I/N, such as 3/20, with I from 1 to N")


def _formats(begun: str) -> list[str]:
    """Returns the names of formats that begin so, for the shell's completion."""
    from awq2marlin.formats.registry import formats  # brings NumPy along

    return [each.layout_name for each in formats() if each.is_target and each.layout_name.startswith(begun)]


def path(value: str) -> Path:
    """Returns the path that an argument names; an empty one, which would be the working directory, is refused."""
    if not value:
        raise typer.BadParameter("the path is empty")
    return Path(value)


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder, or Hub repository: org/name[@revision] (a folder of that name takes precedence), "
        "hf://org/name[@revision], or https://huggingface.co/org/name.",
    ),
]
Workers = Annotated[
    Any,
    typer.Option(
        metavar="N", parser=_number(MAX_WORKERS), help="Number of threads. By default one per CPU, but at most 8."
    ),
]
Jobs = Annotated[
    Any,
    typer.Option(
        metavar="N", parser=_number(MAX_WORKERS), help="Conversions to run at the same time. They share --workers."
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        autocompletion=_formats,
        help="Format to write: marlin, awq or compressed-tensors.",
        show_default="marlin",  # not the option's, which is None: who names the source's own format is told so
    ),
]
Unaligned = Annotated[
    Any,
    typer.Option(
        metavar="|".join(modules.UNALIGNED_CHOICES),
        parser=_one_of(*modules.UNALIGNED_CHOICES),
        autocompletion=_completing(modules.UNALIGNED_CHOICES),
        help="What to do with modules whose shapes Marlin cannot take: keep them in AWQ layout, pad them with zeros, "
        "or stop.",
        show_default=modules.DEFAULT_UNALIGNED,  # None is the option's: with another target there is nothing to choose
    ),
]
#: No patterns: the default of the options, which the parser makes a list of.
NO_PATTERNS: Any = ()

Carry = Annotated[
    list[str],
    typer.Option(
        metavar="GLOB",
        help="Files to carry over that would otherwise be left behind. They are copied unopened. May be repeated.",
    ),
]
Leave = Annotated[list[str], typer.Option(metavar="GLOB", help="Files to leave behind. May be repeated.")]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Also follow links that lead out of the folder, but only to regular files. Prints each link with its "
        "target first.",
    ),
]
Verify = Annotated[
    Any,
    typer.Option(
        metavar="N|all|none",
        parser=_number_or("all", "none"),
        help="How many modules to compare with the source before the output can be loaded.",
    ),
]
Modules = Annotated[
    Any,
    typer.Option(
        metavar="N|all",
        parser=_number_or("all"),
        help="How many converted modules to compare value for value. By default all. Everything else is always "
        "compared.",
    ),
]
Layers = Annotated[Any, typer.Option(metavar="N|all", parser=_number_or("all"), help="Earlier name of --modules.")]
Device = Annotated[
    Any,
    typer.Option(
        metavar="|".join(get_args(sampling.Device)),
        parser=_one_of(*get_args(sampling.Device)),
        autocompletion=_completing(get_args(sampling.Device)),
        help="Also run the compared modules through the Marlin GEMM: on the GPU (cuda), in the exact CPU reference "
        "(cpu), or wherever it can run (auto).",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier conversion. Removes only files that it wrote.")
]
LowDisk = Annotated[
    bool,
    typer.Option(
        "--low-disk",
        help="Hub sources only: delete each source shard once it is converted and checked. Needs space for the output "
        "plus two shards. With --push-to, also for local sources: upload each finished shard at once and keep "
        "nothing locally. Not with --device.",
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME", help="Upload the result to this Hub repository. It is created if needed."),
]
PushAllTo = Annotated[
    str | None,
    typer.Option(
        metavar="ORG",
        help="Upload every result to the Hub, to a repository under this owner, with the name of the output folder.",
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="With --push-to: create the repository as private; refuse one that exists and is public."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="BRANCH", help="With --push-to: branch to commit to, created if needed. By default main."),
]
CreatePr = Annotated[
    bool, typer.Option("--create-pr", help="With --push-to: open a pull request instead of changing the branch.")
]
CommitMessage = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With --push-to: first line of the commit messages.")
]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Spread the shards over a Dask cluster that shares the storage. Pass tcp://HOST:8786 or the scheduler "
        "file.",
    ),
]
Part = Annotated[
    Any,
    typer.Option(
        metavar="I/N", parser=_part, help="Convert only the I-th of N parts of the list: one for each job of an array."
    ),
]
Picture = Annotated[Path | None, typer.Option(metavar="FILE.png", help="With --device: plot the GEMM error per layer.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write what was compared and found to one HTML page."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object to standard output, and everything else to standard error."),
]
