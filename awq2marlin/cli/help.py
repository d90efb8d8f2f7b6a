"""The help of the commands: how it is laid out, the examples, and where to read on.

Typer's own layout breaks names at their hyphens, shows types that tell a user nothing, and differs from version to
version. This one never breaks a word.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from textwrap import TextWrapper
from typing import Any

from typer.core import TyperCommand, TyperGroup

from awq2marlin.installing import where_to_read

#: The widest that help is written, in columns: longer lines are hard to read.
_MAX_WIDTH = 100
_MIN_WIDTH = 40

#: What the help of the whole program says at its end.
_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed or refused, 2 usage, 3 a difference was found, 130 interrupted, 143 terminated."
)

#: What the commands do, a string for each paragraph, and under the empty name what the program does. Of docstrings
#: ``python -OO`` would leave nothing.
DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "": ("Convert quantized checkpoints to the Marlin layout: offline, streamed, verified, reversible byte for byte.",),
    "convert": (
        "Convert a checkpoint to Marlin's layout, or to another format.",
        "Reads AWQ, GPTQ, AutoRound, compressed-tensors and Marlin-native checkpoints. Writes AWQ, compressed-tensors "
        "and Marlin-native ones.",
        "If interrupted, run it again to continue.",
    ),
    "batch": (
        "Convert many checkpoints. If one fails, the others go on.",
        "If interrupted, run it again to continue: finished items are not repeated.",
    ),
    "verify": (
        "Compare a conversion with its source, or any two checkpoints.",
        "Compares all values one by one. The exit code is 3 if any differ.",
    ),
    "revert": (
        "Restore the source of a conversion, byte for byte.",
        "Prints the SHA-256 of each file. If interrupted, run it again to continue.",
    ),
    "push": (
        "Upload a converted checkpoint to the Hub, in one commit.",
        "Checks every file first. If interrupted, run it again to continue.",
    ),
    "inspect": (
        "Show what a checkpoint is, and which of its modules Marlin can take.",
        "Prints format, bits, group size, and all modules with their shapes. Downloads no weights.",
    ),
    "demo": (
        "Convert, verify and revert a small checkpoint of random weights.",
        "Needs no model, no network and no GPU.",
    ),
    "doctor": (
        "Show what this machine has for running the Marlin GEMM.",
        "Reports what is missing and how to install it. convert, verify and revert need no GPU.",
    ),
}

#: Examples, by command: what one does, and its command line.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("See it work, without a model", "awq2marlin demo"),
        ("What is this checkpoint, and which of its modules can Marlin take?", "awq2marlin inspect ./Llama-3-8B-AWQ"),
        ("Convert it to ./Llama-3-8B-AWQ-marlin", "awq2marlin convert ./Llama-3-8B-AWQ"),
    ),
    "convert": (
        ("Show the plan and write nothing", "awq2marlin convert ./Llama-3-8B-AWQ --dry-run"),
        (
            "Convert to ./Llama-3-8B-AWQ-marlin and compare every module",
            "awq2marlin convert ./Llama-3-8B-AWQ --verify all",
        ),
        ("Write an AWQ checkpoint, to ./Qwen3-8B-W4A16-awq", "awq2marlin convert ./Qwen3-8B-W4A16 --to awq"),
        (
            "From the Hub to the Hub, with room for a few shards only",
            "awq2marlin convert org/Llama-3-8B-AWQ --low-disk --push-to org/Llama-3-8B-AWQ-marlin",
        ),
    ),
    "batch": (
        ("Convert every source in models.txt, two at a time", "awq2marlin batch models.txt --jobs 2 --out-dir ./out"),
        ("Check that all of them can be converted and fit on the disk", "awq2marlin batch models.txt --dry-run"),
        ("Job 3 of an array of 20", "awq2marlin batch models.txt --part 3/20"),
        ("A list from another program", "ls -d ./models/* | awq2marlin batch - --record done.jsonl"),
    ),
    "verify": (
        ("Compare everything", "awq2marlin verify ./Llama-3-8B-AWQ ./Llama-3-8B-AWQ-marlin"),
        (
            "Compare the values of eight modules only, and run them on the GPU",
            "awq2marlin verify ./Llama-3-8B-AWQ ./Llama-3-8B-AWQ-marlin --modules 8 --device cuda",
        ),
        (
            "Two quantizations of one model, with a page to share",
            "awq2marlin verify org/one org/other --report page.html",
        ),
    ),
    "revert": (
        ("Restore the source in ./back", "awq2marlin revert ./Llama-3-8B-AWQ-marlin ./back"),
        ("List what would be restored", "awq2marlin revert ./Llama-3-8B-AWQ-marlin --dry-run"),
    ),
    "push": (
        ("Check the folder and upload it", "awq2marlin push ./Llama-3-8B-AWQ-marlin org/Llama-3-8B-AWQ-marlin"),
        (
            "See what would be uploaded, as a private repository",
            "awq2marlin push ./Llama-3-8B-AWQ-marlin org/Llama-3-8B-AWQ-marlin --private --dry-run",
        ),
    ),
    "inspect": (
        ("A folder", "awq2marlin inspect ./Llama-3-8B-AWQ"),
        ("A repository, of which only the headers are fetched", "awq2marlin inspect org/Llama-3-8B-AWQ@main --json"),
    ),
    "demo": (("Keep the three checkpoints to look at", "awq2marlin demo ./shown"),),
    "doctor": (("For a bug report", "awq2marlin doctor --json"),),
}

#: The pages that say more, by command.
PAGES: dict[str, tuple[str, ...]] = {
    "": ("README.md", "docs/"),
    "convert": ("README.md", "docs/marlin-native.md", "docs/hub.md", "docs/json.md"),
    "batch": ("docs/clusters.md", "docs/json.md"),
    "verify": ("README.md", "docs/json.md"),
    "revert": ("README.md", "docs/hub.md", "docs/json.md"),
    "push": ("docs/hub.md", "docs/json.md"),
    "inspect": ("docs/vllm.md", "docs/sglang.md", "docs/json.md"),
    "demo": ("README.md",),
    "doctor": ("docs/vllm.md", "docs/sglang.md", "docs/transformers.md", "docs/json.md"),
}


def description(command: str) -> str:
    """Returns what a command does, as one text: Typer takes it so, and passes it on to shells that complete."""
    return "\n\n".join(DESCRIPTIONS[command])


class Command(TyperCommand):
    """A command whose help is laid out here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help; the name is the parser's."""
        formatter.write("\n".join(_page(self, ctx, self.name or "")))


class Group(TyperGroup):
    """The program itself, whose help is laid out here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help; the name is the parser's."""
        formatter.write("\n".join(_page(self, ctx, "")))


def _page(command: Any, context: Any, name: str) -> Iterator[str]:
    """Yields the lines of a command's help."""
    width = max(_MIN_WIDTH, min(shutil.get_terminal_size().columns, _MAX_WIDTH))
    parameters = command.get_params(context)
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    options = [each for each in parameters if each.param_type_name == "option"]
    commands = getattr(command, "commands", {})
    usage = [f"Usage: {context.command_path}", "[OPTIONS]", *map(_argument_in_usage, arguments)]
    yield from _wrapped(" ".join([*usage, "COMMAND [ARGS]..."] if commands else usage), width, later=6)
    for paragraph in DESCRIPTIONS[name]:
        yield ""
        yield from _wrapped(paragraph, width, first=2)
    yield from _list("Arguments", [(each.metavar, each.help or "") for each in arguments], width)
    yield from _list("Commands", [(each, _summary(each)) for each in commands], width)
    yield from _list("Options", [(_spelled(each), _described(each)) for each in options], width)
    yield from ("", "Examples:")
    for what, line in EXAMPLES[name]:
        yield from _wrapped(what if what.endswith("?") else f"{what}:", width, first=2)
        yield from _command_line(line, width, indent=4)
    yield ""
    if commands:
        yield from _wrapped(_EXIT_CODES, width)
    yield from _wrapped(f"See also: {where_to_read(*PAGES[name])}.", width)


def _list(title: str, rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Yields a headed list of names and what they are; a long name has its line for itself."""
    if not rows:
        return
    yield from ("", f"{title}:")
    column = min(max(len(name) for name, _ in rows), width // 3) + 4
    for name, text in rows:
        lines = list(_wrapped(text, width, first=column))
        head = f"  {name}"
        if len(head) > column - 2:
            yield head
        else:
            lines[0] = head.ljust(column) + lines[0].lstrip()
        yield from lines


def _wrapped(text: str, width: int, first: int = 0, later: int | None = None) -> list[str]:
    """Returns the lines of a paragraph, behind so many blanks; no word is broken, nor a name at its hyphens."""
    wrapper = TextWrapper(
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * (first if later is None else later),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(text) or [""]


def _command_line(line: str, width: int, indent: int) -> Iterator[str]:
    """Yields a command line; cut over several, it can still be copied into a shell."""
    *before, last = _wrapped(line, width - 2, first=indent, later=indent + 2)
    yield from (f"{each} \\" for each in before)
    yield last


def _argument_in_usage(argument: Any) -> str:
    return str(argument.metavar if argument.required else f"[{argument.metavar}]")


def _spelled(option: Any) -> str:
    """Returns how an option is written, with its value if it takes one."""
    names = ", ".join(sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} {option.metavar}"


def _described(option: Any) -> str:
    default = None if option.is_flag or callable(option.default) else option.default
    default = option.show_default if isinstance(option.show_default, str) else default
    shown = f" [default: {default}]" if default not in (None, (), []) else ""
    return f"{option.help or ''}{shown}"


def _summary(command: str) -> str:
    """Returns the first sentence of what a command does."""
    return DESCRIPTIONS[command][0].partition(". ")[0].rstrip(".") + "."
