"""The options that commands share, as they are written and described on the command line.

What an option may be and goes with is stated in `commands.options`; `made` puts a refusal from there into the spelling
of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from awq2marlin.arguments import MAX_WORKERS, ArgumentError, Checked
from awq2marlin.commands.options import ConvertOptions, VerifyOptions
from awq2marlin.errors import printable
from awq2marlin.layout.modules import Unaligned
from awq2marlin.verification.sampling import Device

_Options = TypeVar("_Options", bound=Checked)
_Function = TypeVar("_Function", bound=Callable[..., Any])

#: What gives a command an option.
Decorator = Callable[[_Function], _Function]


def option_of(name: str) -> str:
    """Returns how the command line spells an argument."""
    return "--" + name.replace("_", "-")


def made(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Returns the options of a command.

    Args:
        kind: their class.
        given: the command's arguments by name; what is no option of the class is left aside.

    Raises:
        click.BadParameter: if they are wrong, or do not go together.
    """
    try:
        return kind.of(given)
    except ArgumentError as error:
        raise click.BadParameter(error.spelled(option_of)) from None


def path(value: str) -> Path:
    """Returns the path that an argument names; an empty one, which would be the working directory, is refused."""
    if not value:
        raise click.BadParameter("the name is empty")
    return Path(value)


def flag(name: str, help: str) -> Decorator[Any]:
    """Gives a command an option that is there or not."""
    return click.option(name, is_flag=True, help=help)


def together(*options: Decorator[Any]) -> Decorator[Any]:
    """Gives a command several options, which its help shows in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def _number_or(*words: str) -> Callable[[object], int | str]:
    def parse(value: object) -> int | str:
        text = str(value)
        if text in words:
            return text
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        raise click.BadParameter(f"{printable(text)!r} is neither a number nor {' nor '.join(map(repr, words))}")

    return parse


def _part(value: str) -> tuple[int, int]:
    number, _, count = value.partition("/")
    if number.isdecimal() and count.isdecimal() and len(value) < 20 and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise click.BadParameter(f"{printable(value)!r} is not of the form 3/20, with a number from 1 to the count")


source = click.argument(
    "source",
    help="Folder of the checkpoint, or a repository of the Hub: org/name[@revision], where there is no such "
    "folder, hf://org/name[@revision], or its address, https://huggingface.co/org/name.",
)
workers = click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, MAX_WORKERS),
    help="Number of threads (default: one per CPU, at most 8).",
)
follow_links = flag(
    "--follow-links",
    "Also follow links that lead out of the folder, to regular files only. Prints each with its end first.",
)
modules = click.option(
    "--modules",
    metavar="N|all",
    type=_number_or("all"),
    help="Converted modules to compare value for value, by default all; everything else is always compared.",
)
layers = click.option(
    "--layers",
    metavar="N|all",
    type=_number_or("all"),
    default=VerifyOptions.layers,
    help="The earlier name of --modules.",
)
device = click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    help="Also run the compared modules through the Marlin GEMM: on a GPU, or the exact CPU reference.",
)
dask = click.option(
    "--dask",
    metavar="ADDRESS",
    help="Spread the shards over a Dask cluster that shares the storage: tcp://HOST:8786, or its scheduler file.",
)
part = click.option(
    "--part", metavar="I/N", type=_part, help="Take only the I-th of N parts, one for each job of an array."
)
#: What every command takes.
telling = together(
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on standard output, all else on standard error."
    ),
)


def conversion(push_to: Decorator[Any]) -> Decorator[Any]:
    """Gives a command all that one conversion, or each of many, may be told.

    Args:
        push_to: the option that names where on the Hub the result goes.
    """
    return together(
        click.option(
            "--to",
            metavar="FORMAT",
            default=ConvertOptions.to,
            help="Format to write: marlin, awq or compressed-tensors.",
        ),
        click.option(
            "--unaligned",
            type=click.Choice(get_args(Unaligned)),
            default=ConvertOptions.unaligned,
            help="Modules whose shapes Marlin cannot take: keep them in AWQ layout, pad them with zeros, or stop.",
        ),
        workers,
        flag("--overwrite", "Replace an earlier conversion; only files that it wrote are removed."),
        click.option(
            "--verify",
            metavar="N|all|none",
            type=_number_or("all", "none"),
            default=ConvertOptions.verify,
            help="Modules to compare with the source before the output becomes loadable.",
        ),
        device,
        flag(
            "--low-disk",
            "Hub sources only: delete each source shard once it is converted and checked. Needs space for the output "
            "plus two shards. With --push-to, for local sources too: send each finished shard at once and keep "
            "nothing. Not with --device.",
        ),
        click.option(
            "--carry",
            metavar="GLOB",
            multiple=True,
            help="Carry these files over, unopened, though they would be left behind; may be repeated.",
        ),
        click.option(
            "--leave",
            metavar="GLOB",
            multiple=True,
            help="Leave these files behind, as if they were not there; may be repeated.",
        ),
        follow_links,
        push_to,
        flag("--private", "With --push-to: create the repository as private; refuse one that exists and is public."),
        click.option(
            "--revision",
            metavar="BRANCH",
            help="With --push-to: branch to commit to, made if needed; by default main.",
        ),
        flag("--create-pr", "With --push-to: open a pull request instead of changing the branch."),
        click.option("--commit-message", metavar="TEXT", help="With --push-to: first line of the commits' messages."),
        dask,
    )
