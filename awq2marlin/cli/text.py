"""What a person sees of a result, on standard output, and of an error, on standard error.

Everything that came from a file is escaped before it is printed, and nothing is read as markup.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import zip_longest
from typing import TYPE_CHECKING

from awq2marlin.cli.by_type import ByType
from awq2marlin.cli.terminal import coloured, print_error, width_of
from awq2marlin.errors import EXIT_DONE, escaped, pattern, printable, size_text, some_of

if TYPE_CHECKING:
    from awq2marlin.batch.record import ItemResult
    from awq2marlin.batch.run import BatchResult
    from awq2marlin.commands.convert import ConvertResult
    from awq2marlin.commands.demo import DemoResult
    from awq2marlin.commands.doctor import DoctorResult
    from awq2marlin.commands.inspect import InspectResult
    from awq2marlin.commands.revert import RevertResult
    from awq2marlin.commands.verify import VerifyResult
    from awq2marlin.formats.serving import Serving
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.hub.identity import PushResult

#: Columns of tables that hold numbers, flush right.
_NUMBERS = {"K", "N", "modules", "size", "max error", "mean error", "of bound"}


#: Prints a result for people.
show: ByType[None] = ByType()


def print_failures(result: BatchResult) -> None:
    """Prints on standard error what failed."""
    for item in result.failed:
        print_error(outcome_text(item))


def _counted(items: Sized, thing: str = "module") -> str:
    """Returns how many things there are, in words: one module, or several modules."""
    return f"{len(items)} {thing}{'' if len(items) == 1 else 's'}"


def _say(text: str = "") -> None:
    print(text, flush=True)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from awq2marlin.cli.table import table_lines  # which most commands do without

    escaped_rows = ([printable(cell) for cell in row] for row in rows)
    for line in table_lines(headers, escaped_rows, numbers=_NUMBERS, width=width_of(sys.stdout)):
        _say(line)


def _of_alike(reason: str) -> str:
    """Returns a reason that holds for many modules alike: without the number of a layer, and without K and N."""
    numberless = re.sub(r"(?<=\.)\d+(?=\.)", "*", reason)
    return re.sub(r"\b([KN])=\d+", r"\1", re.sub(r"\bK=\d+, N=\d+", "(K, N)", numberless))


def _noted(word: str, reasons: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Lets a table say only that something is so, and gives the reasons below it, each once.

    Args:
        word: what the table says.
        reasons: of each row; empty where there is none.

    Returns:
        The cell of each reason, numbered if there are several, and the lines below the table.
    """
    different = [*dict.fromkeys(filter(None, reasons))]
    cells = {each: f"{word} ({at})" if len(different) > 1 else word for at, each in enumerate(different, 1)}
    return cells, [*(f"{cell}: {printable(reason)}" for reason, cell in cells.items()), *([""] if cells else [])]


def _show_lists(left_behind: Mapping[str, str], warnings: Sequence[str]) -> None:
    for warning in warnings:
        _say(f"{coloured('warning', 'yellow', sys.stdout)}    {escaped(warning)}")
    if left_behind:
        names = (f"{printable(name)} ({printable(reason)})" for name, reason in left_behind.items())
        _say(f"not carried over: {some_of(names)}")


def _unmentioned(left_behind: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the files of which no warning speaks."""
    from awq2marlin.checkpoint.files import unmentioned  # loaded long ago, where there is a result

    return unmentioned(left_behind)


@show.register
def _conversion(result: ConvertResult) -> None:
    _show_plan(result) if result.dry_run else _show_conversion(result)


def _show_plan(result: ConvertResult) -> None:
    """Prints a dry run: what is done with every module, alike ones together, and the bytes."""
    groups: Counter[tuple[str, ...]] = Counter()
    for module in result.modules:
        action = "convert" if module.converted else "keep"
        if module.is_padded:
            action = f"pad to {module.padded_k}x{module.padded_n}"
        reason = _of_alike(module.reason)
        groups[pattern(module.name), str(module.size_k), str(module.size_n), action, reason] += 1
    marked, notes = _noted("keep", (why for *_, why in groups))
    _table(
        ("module", "K", "N", "modules", "action"),
        ((*sizes, str(count), marked.get(why, action)) for (*sizes, action, why), count in groups.items()),
    )
    for note in notes:
        _say(note)
    _say(f"would read    {size_text(result.source_bytes)} from {printable(str(result.source))}")
    _say(f"would write   {size_text(result.output_bytes)} to {printable(str(result.output))}")
    kept = f", keep {len(result.kept)} in AWQ layout" if result.kept or result.to == "Marlin" else ""
    _say(f"would convert {_counted(result.converted)}{kept}")
    _show_lists(_unmentioned(result.left_behind), [*result.warnings, *result.hindrances])
    for note in _conversion_notes(result):
        _say(f"note       {note}")
    _show_serving(result.serving, "to serve it afterwards")


def _show_serving(serving: Sequence[Serving], title: str) -> None:
    """Prints what serves a checkpoint: a command of each engine to be copied, or why one cannot."""
    installs = {each.install: f"{each.install}{each.where and f'  # {each.where}'}" for each in serving if each.install}
    if serving:
        _say(title)
    for each in serving:
        lines = [f"cannot: {each.reason}"] if each.reason else each.command.splitlines()
        for label, line in zip_longest([each.engine], filter(None, [*lines, each.note]), fillvalue=""):
            _say(f"  {label:<13} {escaped(line)}")
    if installs:
        _say("to install what they need")
    for install, line in installs.items():
        engines = ", ".join(each.engine for each in serving if each.install == install)
        _say(f"  {engines:<13} {line}")


def _show_conversion(result: ConvertResult) -> None:
    """Prints what a conversion did."""
    _say(f"converted  {_counted(result.converted)} to the {result.to} layout")
    if result.kept:
        reasons = Counter(re.split(r":| with ", module.reason)[0] for module in result.kept)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        _say(f"kept       {_counted(result.kept)} in AWQ layout ({why}); --dry-run lists them")
    padded = [module for module in result.converted if module.is_padded]
    if padded:
        _say(f"padded     {_counted(padded)} with zeros")
    if result.converted:
        _say(f"verified   {_verified_text(result)}")
    if result.gemm is not None:
        show(result.gemm)
    rate = f", {size_text(result.written_bytes / result.seconds)}/s" if result.written_bytes and result.seconds else ""
    before = f"; {len(result.resumed)} of {len(result.shards)} shards were already there" if result.resumed else ""
    _say(f"wrote      {size_text(result.written_bytes)} in {result.seconds:.1f} s{rate}{before}")
    if result.pushed is not None:
        _say(f"pushed     {printable(result.pushed.url)}")
    if result.output.exists():
        _say(f"output     {printable(str(result.output))}")
    _show_lists(_unmentioned(result.left_behind), result.warnings)
    for note in _conversion_notes(result):
        _say(f"note       {note}")
    _show_serving(result.serving, "to serve it")


def _verified_text(result: ConvertResult) -> str:
    """Returns how much was compared with the source, and what compares the rest."""
    if not result.verified:
        return "nothing (--verify none); 'awq2marlin verify' compares everything"
    some = "; 'awq2marlin verify' compares everything" if len(result.verified) < len(result.converted) else ""
    return f"{_counted(result.verified)} value for value{some}"


def _conversion_notes(result: ConvertResult) -> Iterator[str]:
    """Yields what a user should know of an output before he serves it."""
    if not result.converted:
        helps = any(module.reason.startswith("unaligned:") for module in result.kept)
        advice = "; --unaligned pad converts what does not fit" if helps else ""
        yield f"no module could be converted, so this checkpoint gains nothing{advice}"


@show.register
def _batch(result: BatchResult) -> None:
    """Prints the summary of a batch."""
    earlier = [item for item in result.items if item.earlier]
    done, failed = len(result.done), result.failed
    verb = "could be done" if result.dry_run else "done"
    before = sum(item.exit_code == EXIT_DONE for item in earlier)
    by_earlier = f" ({before} of them by earlier runs)" if before else ""
    _say(f"{_counted(result.items, 'item')}: {done} {verb}{by_earlier}, {len(failed)} failed")
    for item in failed:
        if item.earlier:  # of the others it was told when they ended
            _say(outcome_text(item))
    untried = [item for item in earlier if item.exit_code != EXIT_DONE]
    if untried:
        _say(f"not retried: {_counted(untried, 'item')} that failed in an earlier run; use --retry-failed")
    elif failed and not result.dry_run:
        how = "with --retry-failed" if result.record else "again"  # without a record nobody knows what failed
        _say(f"run the same command {how} to retry what failed")
    wrote = sum(item.written for item in result.items if not item.earlier)
    took = "" if result.dry_run else f" in {result.seconds:.1f} s"
    _say(f"{'would write' if result.dry_run else 'wrote'} {size_text(wrote)}{took}")
    for disk in result.disks:
        enough = "" if disk.needed <= disk.free else ": not enough"
        _say(
            f"would need {size_text(disk.needed)} on the disk of {printable(str(disk.folder))}, "
            f"which has {size_text(disk.free)} free{enough}"
        )
    if result.record is not None and not result.dry_run:
        _say(f"record     {printable(str(result.record))}")


def outcome_text(result: ItemResult) -> str:
    """Returns one line on what became of an item; of its problems only the first."""
    place = f"{printable(result.source)} -> {printable(result.output)}"
    if result.exit_code != EXIT_DONE:
        more = f" (and {len(result.errors) - 1} more)" if len(result.errors) > 1 else ""
        why = f": {result.errors[0]}{more}" if result.errors else ""
        return f"{result.status} {place}{why}"
    verified = f", {result.verified} verified" if result.verified else ""
    return (
        f"{result.status} {place}: {result.converted} converted, {result.kept} kept{verified}, "
        f"{size_text(result.bytes)} in {result.seconds:.1f} s"
    )


@show.register
def _verification(result: VerifyResult) -> None:
    """Prints what a verification compared, and what it took the two checkpoints for."""
    kind = "converted modules" if result.kind == "conversion" else "modules"
    equal = coloured("equal:", "green", sys.stdout)
    _say(f"{equal} {len(result.modules)} of {result.modules_total} {kind}, value for value")
    tensors, files = _counted(range(result.tensors), "other tensor"), _counted(range(result.files), "file")
    _say(f"       {tensors} and {files}, byte for byte")
    if result.kind == "conversion":
        _say(f"{printable(str(result.output))} is the conversion of {printable(str(result.source))}")
    else:
        from awq2marlin.cli.differences import not_compared_text, sides_text

        _say("two checkpoints of the same model, compared by values:")
        for line in (*sides_text(result), not_compared_text(result), *(f"note: {note}" for note in result.notes)):
            _say(line)
    if result.kind == "conversion":
        _show_lists({}, result.notes)
    _say(f"compared {size_text(result.bytes)} in {result.seconds:.1f} s")
    if result.gemm is not None:
        show(result.gemm)


@show.register
def _gemm(run: GemmRun) -> None:
    """Prints what the Marlin GEMM said of each module."""
    tokens = ", ".join(map(str, run.checks[0].sizes_m)) if run.checks else ""
    exact = coloured("exact:", "green", sys.stdout)
    _say(f"run on {printable(run.device_name)}, {exact} identity inputs reproduced every weight bit for bit;")
    _say(f"random inputs, M = {tokens}, against float64:")
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


@show.register
def _doctor(result: DoctorResult) -> None:
    """Prints what the machine has and what is missing."""
    machine = result.machine
    _say(f"PyTorch    {result.torch_version} (CUDA {result.torch_cuda or 'none'})")
    _say(f"driver     {'supports CUDA ' + machine.driver_version if machine.driver_version else 'none'}")
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
    _say(f"{verdict} (convert, verify and revert don't need a GPU)")


@show.register
def _reversion(result: RevertResult) -> None:
    """Prints every restored file with its digest, in the form of ``sha256sum``; in a dry run with its size."""
    for file in result.files:
        _say(f"{size_text(file.size) if result.dry_run else file.sha256}  {printable(file.name)}")
    before = f" ({_counted(result.resumed, 'shard')} by an earlier run)" if result.resumed else ""
    files = f"{_counted(result.files, 'file')}{before}, {size_text(result.bytes)}"
    if result.dry_run:
        _say(f"would restore {files} to {printable(str(result.output))}")
    else:
        by_files = result.restores == "files"
        told = "all digests match" if by_files else "the original tensors; the original files are not known"
        _say(f"restored {files} in {result.seconds:.1f} s, {told}")
        _say(f"output   {printable(str(result.output))}")
    _show_lists(result.left_behind, ())


@show.register
def _push(result: PushResult) -> None:
    """Prints what was sent where."""
    sent = [file for file in result.files if file.uploaded]
    there = len(result.files) - len(sent)
    would = "would upload" if result.dry_run else "uploaded"
    _say(f"checked    {_counted(result.files, 'file')}; all are as the conversion wrote them")
    _say(
        f"{would:<10} {_counted(sent, 'file')}, {size_text(result.uploaded_bytes)}"
        + (f"; {there} already there" if there else "")
    )
    if result.removed:
        removed = "would remove" if result.dry_run else "removed"
        _say(f"{removed:<10} {_counted(result.removed, 'file')} of an earlier checkpoint")
    if not sent and not result.removed:
        _say("nothing to commit")
    elif not result.dry_run:
        _say(f"committed  {result.commit} in {result.seconds:.1f} s")
    _say(f"see        {printable(result.url)}")
    _show_lists(result.left_behind, ())


@show.register
def _inspection(result: InspectResult) -> None:
    """Prints what a checkpoint is."""
    if not result.is_convertible:
        _description(result)
        return
    name = printable(result.title)
    zero_points = "with" if result.zero_point else "without"
    model = f", {printable(result.model_type)}" if result.model_type else ""
    _say(f"{name} checkpoint, {result.bits} bits, group size {result.group_size}, {zero_points} zero points{model}")
    content = f"{_counted(result.shards, 'shard')}, {result.tensors} tensors, {size_text(result.bytes)}"
    _say(f"{printable(str(result.path))}: {content}")
    groups: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    for module in result.modules:
        padded = f" padded to {module.padded[0]}x{module.padded[1]}" if module.padded else ""
        key = (
            pattern(module.name),
            str(module.size_k),
            str(module.size_n),
            module.layout + padded,
            "" if module.aligned else _of_alike(module.reason),
        )
        groups[key] += 1
        sizes[key] += module.bytes
    marked, notes = _noted("no", (key[-1] for key in groups))
    _table(
        ("module", "K", "N", "layout", "modules", "size", "aligned"),
        ((*key[:4], str(count), size_text(sizes[key]), marked.get(key[4], "yes")) for key, count in groups.items()),
    )
    for note in notes:
        _say(note)
    _say(f"{_counted(result.modules, 'quantized module')}, {len(result.unquantized_modules)} in full precision")
    for line in _ranks_lines(result):
        _say(line)
    _show_lists(_unmentioned(result.left_behind), result.warnings)
    if result.format == _own_format():
        _show_serving(result.serving, "to serve it")


def _own_format() -> str:
    from awq2marlin.formats.registry import DEFAULT_TARGET  # loaded long ago, where there is a result

    return DEFAULT_TARGET.name


def _description(result: InspectResult) -> None:
    """Prints what a checkpoint is that cannot be converted, and why it cannot."""
    known = [f"{result.bits:g} bits" if result.bits else "", result.model_type]
    known.insert(1, f"group size {result.group_size}" if result.group_size else "")
    _say(", ".join(printable(each) for each in (result.title, *known) if each))
    content = f"{_counted(result.shards, 'file')} of weights, {result.tensors} tensors, {size_text(result.bytes)}"
    _say(f"{printable(str(result.path))}: {content}")
    if result.dtypes:
        _say(f"types      {', '.join(f'{count} {printable(dtype)}' for dtype, count in result.dtypes.items())}")
    _say(f"it cannot be converted: {result.reason}")


def _ranks_lines(result: InspectResult) -> Iterator[str]:
    """Yields over how many GPUs vLLM can cut a checkpoint, and why not over more."""
    found = result.parallel_sizes
    where = f" ({printable(pattern(found.limit.module))})" if found.limit.module else ""
    once = "" if result.format == _own_format() else "once converted, "
    if not found.sizes:
        yield f"{once}vLLM cannot load it: {found.limit.reason}{where}"
        return
    yield f"{once}tensor-parallel sizes in vLLM: {', '.join(map(str, found.sizes))}"
    yield f"not {found.limit.size}: {found.limit.reason}{where}"
    if found.with_expert_parallel and found.with_expert_parallel != found.sizes:
        yield f"with --enable-expert-parallel: {', '.join(map(str, found.with_expert_parallel))}"


@show.register
def _demonstration(result: DemoResult) -> None:
    """Prints what the demonstration did, step by step."""
    conversion, verification, reversion = result.conversion, result.verification, result.reversion
    made = f"{_counted(conversion.modules)}, {size_text(conversion.source_bytes)}"
    _say(f"1. made      an AWQ checkpoint of random weights: {made}")
    _say(f"2. converted {_counted(conversion.converted)} to the Marlin layout in {conversion.seconds:.2f} s")
    _say(f"             and kept {len(conversion.kept)} that Marlin cannot take (attention 576 wide)")
    _say(f"3. verified  {_counted(verification.modules)} value for value in {verification.seconds:.2f} s")
    _say(f"4. reverted  to AWQ in {reversion.seconds:.2f} s:")
    for file in reversion.files:
        _say(f"     {file.sha256}  {printable(file.name)}")
    _say(f"5. compared  all {result.identical} files with the first checkpoint: identical, byte for byte")
    if result.kept:
        _say(f"kept in {printable(str(result.folder))}: awq/, marlin/, reverted/")
    else:
        _say("the files were removed; 'awq2marlin demo FOLDER' keeps them")
