"""What a person sees: progress on standard error, results on standard output.

Everything that came from a file is escaped before it is printed, and nothing is read as markup.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from awq2marlin.errors import Problem, printable

if TYPE_CHECKING:
    from awq2marlin.commands.convert import ConvertResult
    from awq2marlin.commands.demo import DemoResult
    from awq2marlin.commands.doctor import DoctorResult
    from awq2marlin.commands.inspect import InspectResult
    from awq2marlin.commands.revert import RevertResult
    from awq2marlin.commands.verify import VerifyResult
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.hub.identity import PushResult

#: Seconds between two plain progress lines, where there is no terminal.
PLAIN_INTERVAL = 5.0
_MAX_NAMES_SHOWN = 8

#: Columns of tables that hold numbers, flush right.
_NUMBERS = {"K", "N", "modules", "size", "max error", "mean error", "of bound"}


def size_text(count: float) -> str:
    """Returns a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


class ConsoleProgress:
    """Shows progress on standard error: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Draws on ``stream``, by default standard error."""
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._bar: Any = None
        self._plain: PlainLines | None = None

    def start(self, what: str, total: int) -> None:
        """A stage begins."""
        with self._lock:
            if self._stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total,
                    desc=what,
                    unit="B",
                    unit_scale=True,
                    file=self._stream,
                    leave=False,
                    dynamic_ncols=True,
                )
            else:
                self._plain = PlainLines(self._say, what, total)

    def advance(self, count: int) -> None:
        """So many bytes are done."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)
            if self._plain is not None:
                self._plain.update(count)

    def finish(self) -> None:
        """The stage is done."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._plain = None

    def note(self, text: str) -> None:
        """Something worth a line."""
        with self._lock:
            self._say(printable(text))

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class PlainLines:
    """A line every few seconds: share, bytes, rate, time left."""

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        """Prints with ``say`` on a stage: its name, and its length in bytes."""
        self._say, self._what, self._total = say, what, total
        self._done = 0
        self._started = self._told = time.monotonic()

    def update(self, count: int) -> None:
        """So many bytes are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told < PLAIN_INTERVAL:
            return
        self._told = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate if rate else 0
        self._say(
            f"{self._what}: {self._done * 100 // max(self._total, 1)} %, {size_text(self._done)} of "
            f"{size_text(self._total)}, {size_text(rate)}/s, {left:.0f} s left"
        )


def print_problems(problems: Sequence[Problem], text: str) -> None:
    """Prints what went wrong on standard error.

    Args:
        problems: all of them; their number heads the list if there are several.
        text: one line each, already escaped and capped.
    """
    head = "error: " if len(problems) == 1 else f"error: {len(problems)} problems:\n"
    print(f"{head}{text}", file=sys.stderr, flush=True)


def _say(text: str = "") -> None:
    print(text, flush=True)


def _pattern(name: str) -> str:
    """Returns a module's name with its numbers as ``*``, so that a plan of 80 layers fits a screen."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(
            header,
            overflow="fold",
            justify="right" if header in _NUMBERS else "left",
        )
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, emoji=False, width=160)
    console.print(table)


def _print_lists(left_behind: dict[str, str], warnings: Sequence[str]) -> None:
    for warning in warnings:
        _say(f"note       {printable(warning)}")
    shown = list(left_behind.items())[:_MAX_NAMES_SHOWN]
    names = [f"{printable(name)} ({printable(reason)})" for name, reason in shown]
    if names:
        more = f", and {len(left_behind) - len(names)} more" if len(left_behind) > len(names) else ""
        _say(f"not carried over: {', '.join(names)}{more}")


def print_plan(result: ConvertResult) -> None:
    """Prints a dry run: every module's fate, alike ones together, and the bytes."""
    groups: Counter[tuple[str, ...]] = Counter()
    for module in result.modules:
        fate = "convert" if module.converted else "keep"
        if module.is_padded:
            fate = f"pad to {module.padded_k}x{module.padded_n}"
        reason = re.sub(r"(?<=\.)\d+(?=\.)", "*", module.reason)
        groups[_pattern(module.name), str(module.size_k), str(module.size_n), fate, reason] += 1
    _table(
        ("module", "K", "N", "modules", "fate", "why"),
        ((name, size_k, size_n, str(count), fate, why) for (name, size_k, size_n, fate, why), count in groups.items()),
    )
    _say(f"would read    {size_text(result.source_bytes)} from {printable(str(result.source))}")
    _say(f"would write   {size_text(result.output_bytes)} to {printable(str(result.output))}")
    _say(f"would convert {len(result.converted)} modules, keep {len(result.kept)} in AWQ layout")
    _print_lists(dict(result.left_behind), result.warnings)


def print_conversion(result: ConvertResult) -> None:
    """Prints what a conversion did."""
    rate = f", {size_text(result.source_bytes / result.seconds)}/s" if result.seconds else ""
    _say(f"converted  {len(result.converted)} modules to the Marlin layout")
    if result.kept:
        reasons = Counter(re.split(r":| with ", module.reason)[0] for module in result.kept)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        _say(f"kept       {len(result.kept)} modules in AWQ layout ({why}); --dry-run lists them")
    padded = sum(module.is_padded for module in result.converted)
    if padded:
        _say(f"padded     {padded} modules with zeros")
    if result.verified:
        _say(f"verified   {len(result.verified)} modules value for value; 'awq2marlin verify' compares everything")
    print_gemm(result.gemm)
    _say(f"wrote      {size_text(result.output_bytes)} in {result.seconds:.1f} s{rate}")
    if result.pushed is not None:
        _say(f"pushed     {printable(result.pushed.url)}")
    if result.output.exists():
        _say(f"output     {printable(str(result.output))}")
    _print_lists(dict(result.left_behind), result.warnings)
    if not result.converted:
        _say("note       no module could be converted, so this checkpoint gains nothing; see --unaligned pad")


def print_verification(result: VerifyResult) -> None:
    """Prints what a verification compared."""
    _say(f"equal: {len(result.modules)} of {result.modules_total} converted modules, value for value")
    _say(f"       {result.tensors} other tensors and {result.files} files, byte for byte")
    _say(f"compared {size_text(result.bytes)} in {result.seconds:.1f} s")
    print_gemm(result.gemm)


def print_gemm(run: GemmRun | None) -> None:
    """Prints what the Marlin GEMM said of each module, if it was asked."""
    if run is None:
        return
    tokens = ", ".join(map(str, run.checks[0].sizes_m)) if run.checks else ""
    _say(f"run on {printable(run.device_name)}: identity activations gave back every weight bit for bit;")
    _say(f"random ones, M = {tokens}, against float64:")
    _table(
        ("module", "K", "N", "type", "max error", "mean error", "of bound"),
        (
            (
                check.name,
                str(check.size_k),
                str(check.size_n),
                check.dtype,
                f"{check.max_error:.2e}",
                f"{check.mean_error:.2e}",
                f"{check.max_relative:.3f} x {check.bound:.2e}",
            )
            for check in run.checks
        ),
    )


def print_doctor(result: DoctorResult) -> None:
    """Prints what the machine has and what is missing."""
    machine = result.machine
    _say(f"PyTorch    {result.torch_version} (CUDA {result.torch_cuda or 'none'})")
    _say(f"driver     {'serves CUDA ' + machine.driver_version if machine.driver_version else 'none'}")
    for device in machine.devices:
        capability = ".".join(map(str, device.capability))
        fit = "" if device.is_supported else ", too old: 8.0 is needed"
        memory = size_text(device.memory_bytes)
        _say(f"device {device.index}   {printable(device.name)}, compute capability {capability}, {memory}{fit}")
    _say(f"NVRTC      {machine.nvrtc_version or 'none'} (cuda-core {machine.cuda_core_version or 'none'})")
    _say(f"kernels    {machine.kernels_dir or 'none'}")
    _say(f"cache      {machine.cache_dir}: {machine.cached_kernels} kernels, {size_text(machine.cached_bytes)}")
    for lack in machine.lacks:
        _say(f"missing    {printable(lack.what)}")
        _say(f"           {printable(lack.remedy)}")
    verdict = "the Marlin GEMM runs on the GPU here" if result.ready else "the Marlin GEMM does not run on a GPU here"
    _say(f"{verdict}; convert, verify and revert need none")


def print_reversion(result: RevertResult) -> None:
    """Prints every restored file with its digest, in the form of ``sha256sum``."""
    for file in result.files:
        _say(f"{file.sha256}  {printable(file.name)}")
    told = "all as recorded" if result.restores == "files" else "the tensors of the original; its files are not known"
    _say(f"restored {len(result.files)} files, {size_text(result.bytes)} in {result.seconds:.1f} s, {told}")
    _print_lists(dict(result.left_behind), ())


def print_push(result: PushResult) -> None:
    """Prints what was sent where."""
    sent = [file for file in result.files if file.uploaded]
    there = len(result.files) - len(sent)
    would = "would upload" if result.dry_run else "uploaded"
    _say(f"checked    {len(result.files)} files; all are as the conversion wrote them")
    _say(
        f"{would:<10} {len(sent)} files, {size_text(result.uploaded_bytes)}" + (f"; {there} are there" if there else "")
    )
    if result.removed:
        removed = "would remove" if result.dry_run else "removed"
        _say(f"{removed:<10} {len(result.removed)} files of an earlier checkpoint")
    if not sent and not result.removed:
        _say("nothing had to be committed")
    elif not result.dry_run:
        _say(f"committed  {result.commit} in {result.seconds:.1f} s")
    _say(f"see        {printable(result.url)}")
    _print_lists(dict(result.left_behind), ())


def print_inspection(result: InspectResult) -> None:
    """Prints what a checkpoint is."""
    name = "Marlin-native" if result.format == "marlin_native" else "AWQ"
    zero_points = "with" if result.zero_point else "without"
    model = f", {printable(result.model_type)}" if result.model_type else ""
    _say(f"{name} checkpoint, {result.bits} bits, group size {result.group_size}, {zero_points} zero points{model}")
    content = f"{len(result.shards)} shard(s), {result.tensors} tensors, {size_text(result.bytes)}"
    _say(f"{printable(str(result.path))}: {content}")
    groups: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    for module in result.modules:
        padded = f" padded to {module.padded[0]}x{module.padded[1]}" if module.padded else ""
        aligned = "yes" if module.aligned else f"no: {module.reason}"
        key = (
            _pattern(module.name),
            str(module.size_k),
            str(module.size_n),
            str(module.group_size),
            module.layout + padded,
            aligned,
        )
        groups[key] += 1
        sizes[key] += module.bytes
    _table(
        ("module", "K", "N", "g", "layout", "modules", "size", "aligned"),
        ((*key[:5], str(count), size_text(sizes[key]), key[5]) for key, count in groups.items()),
    )
    _say(f"{len(result.modules)} quantized modules, {len(result.unquantized_modules)} in full precision")
    _say(_ranks_text(result))
    _print_lists(dict(result.left_behind), result.warnings)


def _ranks_text(result: InspectResult) -> str:
    """Returns over how many GPUs vLLM can cut a checkpoint, in a sentence."""
    size = result.largest_tensor_parallel_size
    if not size and result.bits == 8 and any("qzeros" in module.parts for module in result.modules):
        return "vLLM cannot load it: it has no kernel for 8 bits with zero points"
    if not size:
        return "vLLM cannot load it: modules that it fuses are padded; convert with --unaligned keep"
    once = "" if result.format == "marlin_native" else "once converted, "
    return f"{once}the largest tensor-parallel size in vLLM is {size}"


def print_demonstration(result: DemoResult) -> None:
    """Prints what the demonstration did, step by step."""
    conversion, verification, reversion = result.conversion, result.verification, result.reversion
    made = f"{len(conversion.modules)} modules, {size_text(conversion.source_bytes)}"
    _say(f"1. made      an AWQ checkpoint of random weights: {made}")
    _say(f"2. converted {len(conversion.converted)} modules to the Marlin layout in {conversion.seconds:.2f} s")
    _say(f"             and kept {len(conversion.kept)} that it cannot take (attention 576 wide)")
    _say(f"3. verified  {len(verification.modules)} modules value for value in {verification.seconds:.2f} s")
    _say(f"4. reverted  to AWQ in {reversion.seconds:.2f} s:")
    for file in reversion.files:
        _say(f"     {file.sha256}  {printable(file.name)}")
    _say(f"5. compared  all {result.identical} files with the first checkpoint: identical, byte for byte")
    if result.kept:
        _say(f"left in {printable(str(result.folder))}: awq/, marlin/, reverted/")
    else:
        _say("the files are gone again; 'awq2marlin demo FOLDER' keeps them")
