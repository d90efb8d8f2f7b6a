"""Checking a converted module by running it: through the Marlin GEMM, against the source's own weight.

Two checks a module. Exact: identity activations must give back the decoded source weight, bit for bit in the
activation type. Numeric: random activations at several M, against a float64 product of the same weight. The
weight is decoded from the source's tensors here, without a look at the Marlin ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.part_rows import PartRows
from awq2marlin.errors import KernelUnavailableError, Problem, UnavailableError, difference
from awq2marlin.gemm.jit import on_compile
from awq2marlin.gemm.ops import marlin_gemm
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.layout.modules import ModulePlan, module_name
from awq2marlin.progress import Progress

#: Numbers of tokens that the numeric check runs: one, a tail, and what the larger kernels serve.
SIZES_M = (1, 7, 16, 64, 300, 1024)

#: On a CPU the exact implementation is slow; a few tokens show as much.
SIZES_M_CPU = (1, 7, 16)

_IDENTITY_ROWS = 1024
_COLUMNS_AT_ONCE = 4096
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GemmCheck:
    """What the GEMM said of one module. It was exact under identity activations, or an error was raised.

    Attributes:
        name: the module.
        size_k: in features K, padding included.
        size_n: out features N, padding included.
        dtype: activation type, ``float16`` or ``bfloat16``.
        sizes_m: numbers of tokens of the numeric check.
        max_error: largest |out - reference| of all of them.
        mean_error: its mean.
        max_relative: largest |out - reference| / bound; below 1 where the bound holds.
        bound: the bound at the place of the largest relative error.
    """

    name: str
    size_k: int
    size_n: int
    dtype: str
    sizes_m: tuple[int, ...]
    max_error: float
    mean_error: float
    max_relative: float
    bound: float


@dataclass(frozen=True)
class GemmRun:
    """What the GEMM said of several modules.

    Attributes:
        device: ``cuda``, or ``cpu`` for the exact reference.
        device_name: the GPU's name, or ``CPU reference``.
        checks: one of each module.
    """

    device: str
    device_name: str
    checks: tuple[GemmCheck, ...]


def pick_device(device: str) -> str:
    """Returns ``cuda`` or ``cpu``.

    Args:
        device: ``cuda``, ``cpu``, or ``auto`` for the GPU if there is one.

    Raises:
        UnavailableError: if a GPU is asked for that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        message = (
            "--device cuda needs a GPU that PyTorch can use; 'awq2marlin doctor' reports what is missing, "
            "and --device cpu uses the exact CPU reference"
        )
        raise UnavailableError(Problem("", "", "no-gpu", message))
    return device


def check_modules(
    modules: Sequence[ModulePlan],
    counterparts: Counterparts,
    source: TensorFiles,
    output: TensorFiles,
    device: str,
    progress: Progress,
) -> GemmRun:
    """Runs modules through the GEMM.

    Args:
        modules: converted ones.
        counterparts: what became of the source's modules.
        source: the AWQ tensors.
        output: the Marlin tensors.
        device: ``cuda``, ``cpu``, or ``auto``.
        progress: told of every module, in bytes of its ``qweight``, of the device if it was to be chosen, and of
            kernels that had to be compiled.

    Raises:
        DifferenceError: naming the first module, row and column that differ.
        UnavailableError: if the device is not there or has not enough memory, or the kernel cannot be compiled or run
            on it.
    """
    chosen = pick_device(device)
    name = torch.cuda.get_device_name() if chosen == "cuda" else "CPU reference"
    if device == "auto":
        progress.note(f"running modules on {name}" + ("" if chosen == "cuda" else ": there is no GPU here"))
    progress.start(f"run on {chosen}", sum(_qweight_bytes(module, counterparts, source) for module in modules))
    checks = []
    for module in modules:
        try:
            with on_compile(progress.note):
                checks.append(_check_module(module, counterparts, source, output, chosen))
        except KernelUnavailableError as error:
            raise UnavailableError(Problem("", module.name, "no-kernel", str(error))) from None
        except torch.cuda.OutOfMemoryError as error:
            message = f"{name} does not have enough memory to run it: {str(error).splitlines()[0]}"
            raise UnavailableError(Problem("", module.name, "out-of-memory", message)) from None
        progress.advance(_qweight_bytes(module, counterparts, source))
    progress.finish()
    return GemmRun(chosen, name, tuple(checks))


def _qweight_bytes(module: ModulePlan, counterparts: Counterparts, source: TensorFiles) -> int:
    return source.info(counterparts.source_layout_of(module).tensor_name(module.name, "qweight")).size


def _check_module(
    module: ModulePlan, counterparts: Counterparts, source: TensorFiles, output: TensorFiles, device: str
) -> GemmCheck:
    dtype = _TYPES[source.info(counterparts.source_layout_of(module).tensor_name(module.name, "scales")).dtype]
    weight = _SourceWeight(module, counterparts, source, dtype, device)
    marlin = _MarlinModule(module, counterparts.scheme.bits, output, dtype, device)
    _check_exact(module, weight, marlin, output)
    sizes_m = SIZES_M if device == "cuda" else SIZES_M_CPU
    errors = [_numeric_errors(size_m, weight, marlin, seed) for seed, size_m in enumerate(sizes_m)]
    worst = max(errors, key=lambda each: each.max_relative)
    if worst.max_relative > 1:
        raise difference(
            "gemm-error",
            f"the GEMM's error is {worst.max_relative:.3g} times the bound that K={module.padded_k} and {dtype} imply",
            file=output.shard_of[module_name(module.name, "qweight")],
            tensor=module.name,
        )
    return GemmCheck(
        module.name,
        module.padded_k,
        module.padded_n,
        str(dtype).removeprefix("torch."),
        tuple(sizes_m),
        max(each.max_error for each in errors),
        sum(each.mean_error for each in errors) / len(errors),
        worst.max_relative,
        worst.bound,
    )


def _tensor(files: TensorFiles, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    info = files.info(name)
    data = torch.from_numpy(files.read(name, 0, info.size).copy())
    return data.view(dtype).reshape(info.shape).to(device)


class _SourceWeight:
    """The source's weight, decoded by columns: [padded K, padded N].

    q, z and s are zero in the padding, so the weight is too, but for padded rows of a group that begins before
    them: there it is -z s, and activations must be zero.
    """

    def __init__(
        self, module: ModulePlan, counterparts: Counterparts, files: TensorFiles, dtype: torch.dtype, device: str
    ) -> None:
        scheme = counterparts.scheme
        self.size_k, self.size_n = module.padded_k, module.padded_n
        groups = scheme.num_groups(module.padded_k)
        self._group_size = module.padded_k if groups == 1 else scheme.group_size

        def plain(part: str) -> torch.Tensor:
            layout, (stored_k, _) = counterparts.source_layout_of(module), counterparts.stored_sizes(module)
            rows = PartRows.of(layout, files, module.name, part, stored_k, scheme)
            values = rows.read(0, stored_k if part == "qweight" else scheme.num_groups(stored_k))
            return torch.from_numpy(values if values.flags.writeable else values.copy())

        self._values = self._padded(plain("qweight"), self.size_k, device)
        if "qzeros" in module.parts:
            self._zeros = self._padded(plain("qzeros"), groups, device)
        else:
            self._zeros = torch.full((groups, self.size_n), scheme.middle, dtype=torch.uint8, device=device)
        self._scales = self._padded(plain("scales").view(dtype), groups, device)

    def _padded(self, tensor: torch.Tensor, rows: int, device: str) -> torch.Tensor:
        columns, missing = self.size_n - tensor.shape[1], rows - tensor.shape[0]
        return torch.nn.functional.pad(tensor, (0, columns, 0, missing)).to(device)

    def columns(self, first: int, last: int) -> torch.Tensor:
        """Returns columns ``first`` to ``last``, exact in fp32: an integer below 2^8 times a scale."""
        scales = self._scales[:, first:last].float().repeat_interleave(self._group_size, 0)
        zeros = self._zeros[:, first:last].float().repeat_interleave(self._group_size, 0)
        return (self._values[:, first:last].float() - zeros) * scales

    def column_blocks(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of columns that fit in memory as float64."""
        for first in range(0, self.size_n, _COLUMNS_AT_ONCE):
            yield first, min(first + _COLUMNS_AT_ONCE, self.size_n)


class _MarlinModule:
    """A converted module on the device."""

    def __init__(self, module: ModulePlan, bits: int, files: TensorFiles, dtype: torch.dtype, device: str) -> None:
        types = {"qweight": torch.int32, "qzeros": torch.int32, "scales": dtype}
        parts = {part: _tensor(files, module_name(module.name, part), types[part], device) for part in module.parts}
        self._arguments: tuple[Any, ...] = (parts["qweight"], parts["scales"], parts.get("qzeros"))
        self._bits = bits
        self.dtype, self.device, self.size_k = dtype, device, module.padded_k

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        return marlin_gemm(activations, *self._arguments, num_bits=self._bits)


def _check_exact(module: ModulePlan, weight: _SourceWeight, marlin: _MarlinModule, output: TensorFiles) -> None:
    for begin in range(0, weight.size_k, _IDENTITY_ROWS):
        end = min(begin + _IDENTITY_ROWS, weight.size_k)
        identity = torch.zeros(end - begin, weight.size_k, dtype=marlin.dtype, device=marlin.device)
        identity[:, begin:end].fill_diagonal_(1)
        found = marlin(identity)
        for first, last in weight.column_blocks():
            expected = weight.columns(first, last)[begin:end].to(marlin.dtype)  # rounded once
            unequal = found[:, first:last] != expected  # zeros of either sign are equal
            if bool(unequal.any()):
                row, column = (int(index) for index in unequal.nonzero()[0])
                raise difference(
                    "gemm-difference",
                    f"through the GEMM on {marlin.device}, weight at row {begin + row}, column {first + column}: "
                    f"the source has {expected[row, column].item()}, "
                    f"the GEMM gives {found[row, first + column].item()}",
                    file=output.shard_of[module_name(module.name, "qweight")],
                    tensor=module_name(module.name, "qweight"),
                )


@dataclass(frozen=True)
class _Errors:
    max_error: float
    mean_error: float
    max_relative: float
    bound: float


def _numeric_errors(size_m: int, weight: _SourceWeight, marlin: _MarlinModule, seed: int) -> _Errors:
    """Compares one product with float64, element by element, against the bound of its own element.

    A weight may be rounded once to the activation type before it is multiplied. The sum over K is formed in fp32
    in some order: its error is at most gamma = K u / (1 - K u) times the sum of the magnitudes, u = 2^-24 (Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; doubled for the products' and the
    scales' own rounding). The result is rounded once to the activation type.
    """
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(size_m, weight.size_k, generator=generator).to(marlin.dtype).to(marlin.device)
    found = marlin(activations).double()
    wide = activations.double()
    unit = weight.size_k * 2.0**-24
    gamma, rounding = 2 * unit / (1 - unit), torch.finfo(marlin.dtype).eps / 2
    largest, total, relative, bound_there = 0.0, 0.0, 0.0, math.nan
    for first, last in weight.column_blocks():
        block = weight.columns(first, last).double()
        reference, magnitude = wide @ block, wide.abs() @ block.abs()
        error = (found[:, first:last] - reference).abs()
        before = (gamma + rounding) * magnitude
        bound = before + rounding * (reference.abs() + before) + torch.finfo(marlin.dtype).tiny
        ratio = torch.nan_to_num(
            error / bound, nan=math.inf
        )  # a NaN is as wrong as can be, and unlike NaN inf compares
        at = int(ratio.argmax())
        if float(ratio.flatten()[at]) >= relative:
            relative, bound_there = float(ratio.flatten()[at]), float(bound.flatten()[at])
        largest, total = max(largest, float(error.max())), total + float(error.sum())
    return _Errors(largest, total / found.numel(), relative, bound_there)
