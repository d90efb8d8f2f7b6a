"""What can go wrong, said for people: what was found, where, what was needed, what to do.

Every refusal is a list of problems, so that a user sees all of them at once. Text that came from a
file or the network is escaped here, at the one place where it enters a message.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq2marlin.error_codes import ERROR_CODES

#: Process exit codes of the command line.
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DIFFERENCE = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

#: What each is called, in ``--json`` and in the record of a batch.
STATUS = {
    EXIT_DONE: "done",
    EXIT_FAILED: "failed",
    EXIT_USAGE: "usage",
    EXIT_DIFFERENCE: "difference",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_TERMINATED: "interrupted",
}

#: How many problems a message spells out before it only counts them.
MAX_PROBLEMS_SHOWN = 20

#: How much of one foreign name a message repeats.
MAX_NAME_LENGTH = 300


def printable(text: str) -> str:
    r"""Returns ``text`` with everything escaped that a terminal could act on, and cut if very long.

    Tensor and file names come from files that anyone can write: control characters, terminal escapes,
    bidirectional overrides and lone surrogates become ``\xNN`` or ``\uNNNN``.

    Args:
        text: any string, trusted or not.
    """
    if len(text) > MAX_NAME_LENGTH:
        text = f"{text[:MAX_NAME_LENGTH]}… ({len(text)} characters)"
    return escaped(text)


def size_text(count: float) -> str:
    """Returns a number of bytes for people, in powers of 1000."""
    if count < 1000:
        return f"{count:.0f} B"
    power = next((power for power in (1, 2, 3) if count < 999.95 * 1000**power), 4)  # 1000.0 kB is 1.0 MB
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}B"


def pattern(name: str) -> str:
    """Returns a module's or tensor's name with its numbers as ``*``, so that what 80 layers share is said once."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def article(noun: str) -> str:
    """Returns a noun behind its indefinite article."""
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def enumerated(names: Sequence[str]) -> str:
    """Returns names as a sentence lists them: ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def some_of(names: Iterable[str], most: int = 8) -> str:
    """Returns names as a sentence lists them, of many only the first: ``a, b and 3 more``.

    Args:
        names: as they are printed, at least one.
        most: how many are printed.
    """
    known = [*names]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"{', '.join(known[:most])}{more}"


def escaped(text: str) -> str:
    """Returns ``text`` as `printable` does, but whole: a sentence of ours, whose foreign names are cut already."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode("ascii")
        for char in text
    )


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: the file it was found in, relative to its folder where that is known; may be empty.
        tensor: the tensor or module it is about; may be empty.
        code: a short stable name, for scripts; one of `ERROR_CODES`.
        message: a sentence or two: what was found, what is needed, what to do.
    """

    file: str
    tensor: str
    code: str
    message: str

    def __post_init__(self) -> None:
        """Makes sure that scripts find the code in docs/json.md."""
        assert self.code in ERROR_CODES, f"no error code {self.code!r} is in error_codes.py"

    def __str__(self) -> str:
        """Returns ``file: tensor: message`` without the parts that are empty, escaped."""
        places = [printable(place) for place in (self.file, self.tensor) if place]
        return ": ".join([*places, escaped(self.message)])


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM: the work stops as if the user had interrupted it."""


class Awq2MarlinError(Exception):
    """Something that stops the work; carries every problem found, sorted by file and tensor.

    Attributes:
        problems: the problems, at least one.
    """

    exit_code = EXIT_FAILED

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = (problems,) if isinstance(problems, Problem) else tuple(sorted(problems))
        self.problems: tuple[Problem, ...] = found
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Returns one line a problem, capped with a count."""
        lines = [str(problem) for problem in self.problems[:MAX_PROBLEMS_SHOWN]]
        hidden = len(self.problems) - len(lines)
        if hidden > 0:
            lines.append(f"... and {hidden} more of this kind")
        return "\n".join(lines)


class CheckpointError(Awq2MarlinError):
    """The input is malformed, unsafe, of another format, or contradicts itself."""


class OutputError(Awq2MarlinError):
    """The output folder cannot be used: foreign, in use, unwritable, full, or of another conversion."""


class BatchError(Awq2MarlinError):
    """The list of a batch, or its record, cannot be used; the problems stand in the list's order."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        in_order = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(in_order)
        self.problems = in_order
        self.args = (in_order,)  # what a copy is made from


class ExecutorError(Awq2MarlinError):
    """The executor that was handed in cannot do the work: a worker died, or sees other files than this process."""


class HubError(Awq2MarlinError):
    """The Hub, its client or the network refused: not found, no access, no connection, too many requests."""


class UnavailableError(Awq2MarlinError):
    """This machine lacks what was asked for: a GPU, the kernels' compiler, Matplotlib, memory on the GPU."""


class KernelUnavailableError(UnavailableError, RuntimeError):
    """A kernel cannot be compiled, loaded or used here; the message says why and what mends it."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        """Takes a message, whose code is ``no-kernel``, or problems as its kin do."""
        super().__init__(Problem("", "", "no-kernel", problems) if isinstance(problems, str) else problems)
        if isinstance(problems, str):
            self.args = (problems,)  # what a copy is made from

    def __str__(self) -> str:
        """Returns a message as it is: a compiler's words have lines of their own."""
        return self.args[0] if isinstance(self.args[0], str) else super().__str__()


class DifferenceError(Awq2MarlinError):
    """A comparison found a difference.

    Attributes:
        result: where the comparison went on to the end, what it looked at and found: a `VerifyResult`; else None.
    """

    exit_code = EXIT_DIFFERENCE

    def __init__(self, problems: Problem | Iterable[Problem], result: Any = None) -> None:
        super().__init__(problems)
        self.result = result


def refuse(code: str, message: str, *, file: str = "", tensor: str = "") -> CheckpointError:
    """Returns a `CheckpointError` of one problem, to be raised by the caller."""
    return CheckpointError(Problem(file, tensor, code, message))


def difference(code: str, message: str, *, file: str = "", tensor: str = "") -> DifferenceError:
    """Returns a `DifferenceError` of one problem, to be raised by the caller."""
    return DifferenceError(Problem(file, tensor, code, message))


_ADVICE = {
    errno.ENOSPC: (
        "disk-full",
        "the disk is full; free some space and run the same command again",
    ),
    errno.EDQUOT: (
        "disk-full",
        "your disk quota is used up; free some space and run the same command again",
    ),
    errno.EFBIG: (
        "file-too-large",
        "the file system or a limit (ulimit -f) does not allow a file this large; raise the limit or choose another "
        "disk",
    ),
    errno.EACCES: ("no-permission", "permission denied; check who owns it and its mode"),
    errno.EPERM: ("no-permission", "the operation is not permitted; check who owns it and its mode"),
    errno.EROFS: ("read-only", "the file system is mounted read-only; choose another place"),
    errno.EIO: (
        "io-error",
        "the device reported an input/output error; check the disk, then run the command again",
    ),
    errno.ENOENT: ("not-found", "no such file or folder; check the path"),
    errno.ENOTDIR: ("not-a-folder", "a part of this path is a file, not a folder; check the path"),
    errno.EISDIR: ("not-a-file", "it is a folder where a file is needed; check the path"),
    errno.ELOOP: ("unsafe-link", "too many symbolic links, or a link where a plain file is needed; replace the link"),
    errno.ENAMETOOLONG: ("name-too-long", "the file system does not allow a name this long; choose a shorter one"),
    errno.EMFILE: (
        "too-many-files",
        "too many open files; raise the limit (ulimit -n) or use fewer --workers",
    ),
    errno.ESTALE: ("io-error", "the network file system lost this file; run the command again"),
}


def internal_error(error: BaseException, evidence: str, code: str) -> Problem:
    """Returns what an error means that no input may cause.

    Args:
        error: whatever was raised.
        evidence: what to report it with.
        code: which of the error codes for a fault of ours.
    """
    what = f"{type(error).__name__}: {error}"
    return Problem("", "", code, f"a bug in awq2marlin; please report it with {evidence}: {what}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has system errors name a file: those of writing name none.

    Args:
        path: what is being written.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _is_nowhere() -> bool:
    """Returns whether this process's working directory was removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def problem_from_os_error(error: OSError) -> Problem:
    """Returns what an operating system error means for a user and what to do about it.

    Args:
        error: as raised by a system call; its ``filename`` is named if it has one.
    """
    code, advice = _ADVICE.get(error.errno or 0, ("os-error", error.strerror.lower() if error.strerror else str(error)))
    name = error.filename
    file = name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name or "")
    if error.errno == errno.ENOENT and not Path(file).is_absolute() and _is_nowhere():
        advice = "the working directory was removed; change to another one and run the command again"
    return Problem(file, "", code, advice)
