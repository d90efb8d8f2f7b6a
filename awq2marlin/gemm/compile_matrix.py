"""Compiles every kernel for every kind of GPU, without one: ``python -m awq2marlin.gemm.compile_matrix``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit
from awq2marlin.gemm.experts import select as experts
from awq2marlin.gemm.jit import Resources
from awq2marlin.gemm.select import all_sources
from awq2marlin.gemm.source import KernelSource

#: What the help says: of the docstring ``python -OO`` would leave nothing.
DESCRIPTION = (
    "Compiles every kernel for every kind of GPU, without one. Every instantiation of the dense kernels for compute "
    "capability 8.0 and 9.0, those of the experts' for the usual type and some of the others, and one of each kernel "
    "for 8.6, 8.9, 10.0 and 12.0 (--full: every one for all). A register spilled to memory, a stack frame, or matrix "
    "instructions that the assembler had to serialize are failures: each would cost more than any tuning gains."
)

COMPLETE = ((8, 0), (9, 0))
SAMPLED = ((8, 6), (8, 9), (10, 0), (12, 0))


def matrix(*, full: bool = False) -> list[tuple[KernelSource, str]]:
    """Returns what there is to compile: sources and architectures."""
    jobs = [
        (source, jit.arch_of(capability))
        for capability in COMPLETE
        for source in (*all_sources(capability), *experts.all_sources(capability, full=full))
    ]
    for capability in SAMPLED:
        sources = all_sources(capability) + experts.all_sources(capability, full=full)
        chosen = sources if full else _one_of_each(sources)
        jobs += [(source, jit.arch_of(capability)) for source in chosen]
    return jobs


def _one_of_each(sources: Iterable[KernelSource]) -> list[KernelSource]:
    kernels: dict[str, KernelSource] = {}
    for source in sources:
        kernels.setdefault(source.name.split("<")[0], source)
    return list(kernels.values())


def faults_of(resources: Resources) -> list[str]:
    """Returns what is wrong with a kernel's use of resources; nothing, as a rule."""
    faults = []
    if resources.spill_bytes:
        faults.append(f"{resources.spill_bytes} bytes of registers are spilled")
    if resources.stack_bytes:
        faults.append(f"a stack frame of {resources.stack_bytes} bytes")
    if resources.is_serialized:
        faults.append("matrix instructions are serialized")
    return faults


def _compile(job: tuple[KernelSource, str]) -> tuple[str, str, list[str], int]:
    source, arch = job
    try:
        resources = jit.compile_kernel(source, arch).resources
    except KernelUnavailableError as exc:
        return source.name, arch, [str(exc)], 0
    return source.name, arch, faults_of(resources), resources.registers


def main(arguments: list[str] | None = None) -> int:
    """Compiles the matrix and prints what is wrong; returns the exit code, 1 also where there is no compiler."""
    parser = argparse.ArgumentParser(prog="python -m awq2marlin.gemm.compile_matrix", description=DESCRIPTION)
    parser.add_argument("--full", action="store_true", help="every instantiation for every architecture")
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
    options = parser.parse_args(arguments)

    try:
        jit.check_compiler()
    except KernelUnavailableError as exc:
        print(exc, file=sys.stderr)
        return 1
    start = time.perf_counter()
    jobs = matrix(full=options.full)
    failed = 0
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for name, arch, faults, registers in pool.map(_compile, jobs):
            if faults:
                failed += 1
                print(f"{arch:8} {name}: {'; '.join(faults)}", file=sys.stderr)
            elif options.verbose:
                print(f"{arch:8} {name}: {registers} registers")
    seconds = time.perf_counter() - start
    print(f"{len(jobs) - failed} kernels compiled, {failed} failed, NVRTC {jit.compiler_version()}, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
