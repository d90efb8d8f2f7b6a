"""What is compiled: a kernel's source, and the headers in ``kernels/`` that it includes."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from awq2marlin.errors import KernelUnavailableError

#: The name of the one entry point of every source.
ENTRY_POINT = "awq2marlin_kernel"


@dataclass(frozen=True)
class KernelSource:
    """A complete CUDA C++ source with one entry point.

    Attributes:
        name: what messages call it.
        text: the source; its entry point is ``extern "C"`` and bears the name `ENTRY_POINT`.
    """

    name: str
    text: str


def instantiation(
    implementation: str, header: str, parameters: str, *, threads: int, resident_blocks: int, shared_bytes: int
) -> KernelSource:
    """Returns a source that runs one instantiation of a kernel class, and that asserts what a launch counts.

    Args:
        implementation: the class with its template arguments.
        header: where it is, in ``kernels/``.
        parameters: what the macros of its parameters and arguments begin with, such as ``MARLIN_GEMM``.
        threads: of a block.
        resident_blocks: that a multiprocessor holds at once: the compiler's limit on registers follows.
        shared_bytes: dynamic shared memory of a block.
    """
    return KernelSource(
        implementation,
        f"""\
#include "{header}"
using namespace marlin;
using Implementation = {implementation};
static_assert(Implementation::kThreads == {threads}, "the launch counts threads otherwise");
static_assert(Implementation::kSharedBytes == {shared_bytes}, "the launch counts shared memory otherwise");
extern "C" __global__ void __launch_bounds__({threads}, {resident_blocks}) {ENTRY_POINT}({parameters}_PARAMETERS) {{
  Implementation::run({parameters}_ARGUMENTS);
}}
""",
    )


@functools.cache
def kernels_dir() -> Path:
    """Returns the folder of the headers: inside an installed package, or beside it in the repository.

    Raises:
        KernelUnavailableError: if it is in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "marlin_layout.cuh").is_file():
            return folder
    raise KernelUnavailableError(
        f"The CUDA sources are missing: no marlin_layout.cuh in {package / 'kernels'}. Reinstall awq2marlin."
    )


@functools.cache
def headers_digest() -> bytes:
    """Returns a SHA-256 over every header's name and content."""
    digest = hashlib.sha256()
    for path in sorted(kernels_dir().glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


@functools.cache
def repack_source(num_bits: int) -> KernelSource:
    """Returns the kernel that turns AWQ weights into Marlin ones: ``kernels/repack.cuh``.

    Args:
        num_bits: 4 or 8.
    """
    return KernelSource(
        f"Repack<{num_bits}>",
        f"""\
#include "repack.cuh"
using namespace marlin;
extern "C" __global__ void __launch_bounds__(256)
    {ENTRY_POINT}(const u32* awq, u32* marlin, int size_k, int size_n, i64 awq_stride) {{
  Repack<{num_bits}>::run(awq, marlin, size_k, size_n, awq_stride);
}}
""",
    )
