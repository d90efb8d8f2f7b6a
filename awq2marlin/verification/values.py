"""Comparing the tensors of two checkpoints: quantized modules value for value, everything else byte for byte.

Both layouts are unpacked to plain values by their formats' own slow readers (`Format.values`), which share nothing
with the repack. The first difference is named with its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from awq2marlin.checkpoint.counterparts import Counterparts, Row
from awq2marlin.checkpoint.part_rows import PartRows
from awq2marlin.errors import difference
from awq2marlin.io.safetensors import TensorInfo
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.layout.derived import Made, Proven
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.progress import Progress
from awq2marlin.verification.sampling import Device

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun

#: Bytes that are compared at once.
BAND_BYTES = 1 << 20

#: One comparison; raises `DifferenceError`.
Job = Callable[[], None]

_WORDS = {"qweight": "value", "qzeros": "zero point", "scales": "scale (bits)"}


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints of the same model whose headers agree.

    Attributes:
        counterparts: which tensor is which.
        source: the source's tensors.
        output: the converted ones.
        progress: told of every byte of the source that was compared.
        advance: told of these bytes instead, where they are a part of another stage.
    """

    counterparts: Counterparts
    source: TensorFiles
    output: TensorFiles
    progress: Progress
    advance: Callable[[int], None] | None = None

    def _told(self, count: int) -> None:
        (self.advance or self.progress.advance)(count)

    def tensor_name(self, module: ModulePlan, part: str) -> str:
        """Returns the source's name of the tensor that holds a part of a module."""
        return self.counterparts.source_layout_of(module).tensor_name(module.name, part)

    def module_bytes(self, modules: Sequence[ModulePlan]) -> int:
        """Returns the bytes of the source that modules have."""
        return sum(self.source.info(self.tensor_name(each, part)).size for each in modules for part in each.parts)

    def module_job(self, module: ModulePlan) -> Job:
        """Returns the comparison of one module, value for value."""

        def job() -> None:
            for part in module.parts:
                for first, expected, found in self._bands(module, part):
                    self._compare_values(module, part, first, expected, found)
                self._told(self.source.info(self.tensor_name(module, part)).size)

        return job

    def part_job(self, name: str) -> Job:
        """Returns the comparison of one part of a module, value for value.

        Args:
            name: of the source's tensor that holds it.
        """
        parent, _, suffix = name.rpartition(".")
        module = self.counterparts.modules[parent]
        suffixes = self.counterparts.source_layout_of(module).suffixes
        return self.module_job(replace(module, parts=tuple(part for part in module.parts if suffixes[part] == suffix)))

    def tensor_job(self, name: str) -> Job:
        """Returns the comparison of a tensor that is the same in both, byte for byte."""

        def job() -> None:
            tensor = self.source.info(name)
            for begin in range(0, tensor.size, BAND_BYTES):
                end = min(begin + BAND_BYTES, tensor.size)
                expected, found = self.source.read(name, begin, end), self.output.read(name, begin, end)
                if not np.array_equal(expected, found):
                    at = int(np.argmax(expected != found))
                    raise difference(
                        "different-bytes",
                        f"{place_of(tensor, begin + at)}: "
                        f"the source has {expected[at]:#04x}, the output {found[at]:#04x}",
                        file=self.output.shard_of[name],
                        tensor=name,
                    )
                self._told(end - begin)

        return job

    def derived_job(self, row: Row) -> Job:
        """Returns the comparison of a tensor that only one of the two has with what follows from its module's shape."""
        files, tensor = (self.output, row.target) if row.source is None else (self.source, row.source)
        assert tensor is not None
        assert isinstance(row.rewrite, (Made, Proven))
        data = row.rewrite.data

        def job() -> None:
            found = files.read(tensor.name, 0, files.info(tensor.name).size)
            if found.tobytes() != data():
                message = "its content does not match its module's shape"
                raise difference("different-value", message, file=files.shard_of[tensor.name], tensor=tensor.name)

        return job

    def _bands(self, module: ModulePlan, part: str) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
        """Yields (first row, expected, found): bands of plain values of one part, padding included."""
        pair, scheme = self.counterparts, self.counterparts.scheme
        source, target = pair.source_layout_of(module), pair.layout_of(module)
        old = PartRows.of(source, self.source, module.name, part, pair.stored_sizes(module)[0], scheme)
        new = PartRows.of(target, self.output, module.name, part, module.padded_k, scheme)
        total = scheme.num_groups(module.padded_k) if part != "qweight" else module.padded_k
        band = total
        if old.step and new.step:
            band = math.lcm(old.step, new.step)
            band *= max(1, BAND_BYTES // max(1, new.bytes_of(band)))
        for first in range(0, total, band):
            found = new.read(first, band)
            yield first, _fitted(old.read(first, band), found), found

    def _compare_values(
        self,
        module: ModulePlan,
        part: str,
        first_row: int,
        expected: npt.NDArray[Any],
        found: npt.NDArray[Any],
    ) -> None:
        if np.array_equal(expected, found):
            return
        name = self.counterparts.layout_of(module).tensor_name(module.name, part)
        row, column = (int(index) for index in np.argwhere(expected != found)[0])
        raise difference(
            "different-value",
            f"{_WORDS[part]} at row {first_row + row}, column {column}: "
            f"the source has {expected[row, column]}, the output {found[row, column]}",
            file=self.output.shard_of[name],
            tensor=name,
        )


def _fitted(values: npt.NDArray[Any], like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns values with zeros where the other array is larger, which is what padding has to be."""
    if values.shape == like.shape:
        return values
    fitted = np.zeros(like.shape, like.dtype)
    fitted[: values.shape[0], : values.shape[1]] = values[: like.shape[0], : like.shape[1]]
    return fitted


def place_of(tensor: TensorInfo, offset: int) -> str:
    """Returns where a byte of a tensor lies, as row and column where that makes sense."""
    if len(tensor.shape) != 2 or not tensor.size:
        return f"byte {offset}"
    row, rest = divmod(offset, tensor.size // tensor.shape[0])
    return f"row {row}, column {rest * tensor.shape[1] // (tensor.size // tensor.shape[0])}, byte {offset}"


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Runs comparisons side by side; the error raised is that of the first job, in order, that found one."""
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def verify_modules(modules: Sequence[ModulePlan], comparison: Comparison, workers: int) -> None:
    """Compares modules value for value; the converter calls it before its output becomes loadable.

    Args:
        modules: which.
        comparison: of what with what.
        workers: threads.

    Raises:
        DifferenceError: naming the first difference.
    """
    comparison.progress.start("verify", comparison.module_bytes(modules))
    run_jobs([comparison.module_job(each) for each in modules], workers)
    comparison.progress.finish()


def run_gemm(modules: Sequence[ModulePlan], comparison: Comparison, device: Device | None) -> GemmRun | None:
    """Runs modules through the Marlin GEMM, if a device is named; see `gemm.check.check_modules`.

    Those that were rewritten to AWQ layout, as Marlin cannot take them, are passed over.
    """
    if device is None:
        return None
    from awq2marlin.gemm.check import check_modules  # brings torch along

    converted = [module for module in modules if module.converted]
    return check_modules(
        converted, comparison.counterparts, comparison.source, comparison.output, device, comparison.progress
    )
