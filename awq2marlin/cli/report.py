"""What a verification found, as one HTML file that needs no network: for people who were not there.

Everything that came from a checkpoint is escaped, and no script is in the file.
"""

from __future__ import annotations

import platform
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin._version import __version__
from awq2marlin.cli.differences import format_text, not_compared_text
from awq2marlin.errors import DifferenceError, Problem, printable, refuse, size_text
from awq2marlin.io.durable import replacement
from awq2marlin.progress import Progress, Silence

if TYPE_CHECKING:
    from awq2marlin.commands.verify import RecordedFile, VerifyResult
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.verification.sampling import Device, Modules

_ENDINGS = (".html", ".htm")
_ROLES = {"conversion": ("source", "conversion"), "checkpoints": ("A", "B")}
_CHECKED = "Every file was read, and has the size and the digests that the manifest records."
_RECORDED = "As the manifest records them. Only verify without --modules reads the files and compares the digests."


@dataclass(frozen=True)
class Asked:
    """What the user asked for: what there is to tell where a verification ends without a result, and how to repeat it.

    Attributes:
        source: the first checkpoint, as the user wrote it.
        output: the second.
        modules: how many modules were to be compared.
        device: where they were to run; None for nowhere.
    """

    source: str
    output: str
    modules: Modules
    device: Device | None


@dataclass(frozen=True)
class _Side:
    role: str
    name: str
    format: str


@dataclass(frozen=True)
class _Module:
    name: str
    size_k: int
    size_n: int
    equal: bool
    error: str
    of_bound: str

    @property
    def values(self) -> str:
        return "equal" if self.equal else "differ"


@dataclass(frozen=True)
class _Report:
    """What the page shows; see report.html."""

    sides: Sequence[_Side]
    summary: str
    problems: Sequence[Problem]
    modules: Sequence[_Module]
    gemm: str
    picture: str
    notes: Sequence[str]
    files: Sequence[RecordedFile]
    command: str
    versions: str

    @property
    def verdict(self) -> str:
        return "different" if self.problems else "equal"

    @property
    def title(self) -> str:
        return " and ".join(side.name for side in self.sides)

    @property
    def files_note(self) -> str:
        return _CHECKED if all(file.is_checked for file in self.files) else _RECORDED


def check_report(file: Path, folders: Sequence[str], device: Device | None) -> None:
    """Refuses a report that could not be written, before the work that it would show.

    Args:
        file: where the report shall go.
        folders: the two checkpoints, as the user wrote them.
        device: where modules are to run; then there is a picture.

    Raises:
        UnavailableError: if there is a picture to draw, and Matplotlib is not installed.
        CheckpointError: if the file's ending is not that of a page, or it would be inside one of the checkpoints.
        OSError: if there is no folder for the file.
    """
    if file.suffix.lower() not in _ENDINGS:
        raise refuse("unknown-report", f"a report's name must end in {_ENDINGS[0]}", file=str(file))
    file.parent.stat()
    inside = next((folder for folder in folders if file.parent.resolve().is_relative_to(Path(folder).resolve())), None)
    if inside is not None:
        message = (
            f"it would be inside {printable(inside)} and become a part of that checkpoint; write it elsewhere. "
            "'awq2marlin push --report FILE.html' uploads it with the checkpoint"
        )
        raise refuse("unknown-report", message, file=str(file))
    if device is not None:
        from awq2marlin.verification.error_plot import check_matplotlib

        check_matplotlib("--report with --device")


def reported(
    file: Path, asked: Asked, verify: Callable[[], VerifyResult], progress: Progress | None = None
) -> VerifyResult:
    """Returns what a verification returns, after writing its report; also where it finds a difference.

    Args:
        file: where the report goes.
        asked: what the user asked for.
        verify: the verification.
        progress: is told where the report is; None tells nobody.

    Raises:
        DifferenceError: as the verification does.
        UnavailableError: as `check_report`.
        CheckpointError: as `check_report` and the verification.
        OSError: if the file cannot be written.
    """
    check_report(file, (asked.source, asked.output), asked.device)
    progress = progress or Silence()
    try:
        result = verify()
    except DifferenceError as error:
        write_report(file, asked, error.result, error.problems)
        progress.note(f"the report is in {printable(str(file))}")
        raise
    write_report(file, asked, result)
    progress.note(f"the report is in {printable(str(file))}")
    return result


def write_report(file: Path, asked: Asked, result: VerifyResult | None, problems: Sequence[Problem] = ()) -> None:
    """Writes the report of a verification.

    Args:
        file: where it goes, complete or not at all.
        asked: what the user asked for.
        result: what was looked at; None if the verification ended with the first difference.
        problems: what differs; none if everything is equal.

    Raises:
        OSError: if the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader("awq2marlin.cli", "."), autoescape=True)
    pages.filters["shown"] = printable
    page = pages.get_template("report.html").render(report=_report(asked, result, problems))
    with replacement(file) as partial:
        partial.write_text(page + "\n", encoding="utf-8")


def _report(asked: Asked, result: VerifyResult | None, problems: Sequence[Problem]) -> _Report:
    names = [_shown_name(each) for each in (asked.source, asked.output)]
    common = {"problems": problems, "command": _command(asked, names), "versions": _versions(result)}
    if result is None:
        sides = [_Side(role, name, "") for role, name in zip(("source", "conversion"), names, strict=True)]
        summary = "The verification stopped at the first difference."
        return _Report(sides, summary, modules=(), gemm="", picture="", notes=(), files=(), **common)  # type: ignore[arg-type]
    roles = _ROLES[result.kind]
    sides = [
        _Side(role, _shown_name(str(where)), format_text(format))
        for role, where, format in zip(roles, (result.source, result.output), result.formats, strict=True)
    ]
    notes = [*result.notes, *([not_compared_text(result)] if result.kind == "checkpoints" else [])]
    return _Report(
        sides,
        _summary(result),
        modules=[*_modules(result)],
        gemm=_gemm(result.gemm),
        picture=_picture(result.gemm),
        notes=notes,
        files=result.recorded,
        **common,  # type: ignore[arg-type]
    )


def _shown_name(where: str) -> str:
    """Returns the name of a folder without the path to it, which is nobody's business; a repository as it is."""
    folder = Path(where)
    return printable(folder.absolute().name or where if folder.exists() else where)


def _summary(result: VerifyResult) -> str:
    chosen, total = len(result.modules), result.modules_total
    which = f"all {total:,}" if chosen == total else f"{chosen:,} of {total:,}"
    return (
        f"Compared value for value: {which} quantized modules. Compared byte for byte: {result.tensors:,} other "
        f"tensors and {result.files:,} files. {size_text(result.bytes)} in {result.seconds:.1f} s."
    )


def _modules(result: VerifyResult) -> Iterator[_Module]:
    differing = {each.name for each in result.differences.modules} if result.differences else set()
    checks = {check.name: check for check in result.gemm.checks} if result.gemm else {}
    for module in result.modules:
        check = checks.get(module.name)
        error, of_bound = (f"{check.max_error:.3g}", f"{check.max_relative:.0%}") if check else ("", "")
        yield _Module(module.name, module.size_k, module.size_n, module.name not in differing, error, of_bound)


def _gemm(run: GemmRun | None) -> str:
    if run is None:
        return ""
    return (
        f"{len(run.checks):,} modules ran through the Marlin GEMM ({run.device_name}): with identity activations the "
        "weights came back bit for bit; with random ones the output was compared with a float64 product."
    )


def _picture(run: GemmRun | None) -> str:
    if run is None:
        return ""
    from awq2marlin.verification.error_plot import errors_as_svg

    return f"data:image/svg+xml;base64,{b64encode(errors_as_svg(run)).decode()}"


def _command(asked: Asked, names: Sequence[str]) -> str:
    options = ["--modules", str(asked.modules)] if asked.modules != "all" else []
    options += ["--device", asked.device] if asked.device else []
    return shlex.join(["awq2marlin", "verify", *names, *options])


def _versions(result: VerifyResult | None) -> str:
    run = result.gemm if result else None
    parts = [f"awq2marlin {__version__}", f"Python {platform.python_version()}", f"NumPy {version('numpy')}"]
    parts += [f"PyTorch {version('torch')}", run.device_name] if run else []
    return ", ".join([*parts, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"])
