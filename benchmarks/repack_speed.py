"""How fast one core repacks a weight between layouts: piece by piece in memory, and as a pass over a file.

    python benchmarks/repack_speed.py --place /dev/shm
    python benchmarks/repack_speed.py --place /dev/shm --bits 8 --shapes 8192x28672

For every pair of layouts, GB of the tensor per second of processor time, the best of several runs (other work on the
machine disturbs it least): first the codes from memory to memory, as the pieces of a pass take them; then
`rewrite_file` with digests of both files, on a file of six such weights with scales and zero points.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from awq2marlin.io.digest import Xxh3
from awq2marlin.io.stream import NamedPath, Piece, pages, rewrite_file
from awq2marlin.layout.repack import MarlinScales, MarlinWeight, MarlinZeroPoints, PartLayout, Repack
from awq2marlin.layout.transposed import TransposedCodes, TransposedScales, TransposedZeroPoints

GROUP_SIZE = 128

LAYOUTS = {
    "rows": (PartLayout, PartLayout, PartLayout),
    "marlin": (MarlinWeight, MarlinZeroPoints, MarlinScales),
    "columns": (TransposedCodes, TransposedZeroPoints, TransposedScales),
}
PAIRS = [("rows", "marlin"), ("marlin", "rows"), ("columns", "rows"), ("rows", "columns"), ("columns", "marlin"),
         ("marlin", "columns")]  # fmt: skip


def repacks(source: str, target: str, bits: int, size_k: int, size_n: int) -> list[Repack]:
    """Returns how the three parts of a module go from one layout to the other."""
    parts = ("qweight", size_k), ("qzeros", size_k // GROUP_SIZE), ("scales", size_k // GROUP_SIZE)
    kinds = zip(parts, LAYOUTS[source], LAYOUTS[target], strict=True)
    return [Repack(old(part, bits, rows, size_n), new(part, bits, rows, size_n)) for (part, rows), old, new in kinds]


def best(runs: int, run: Callable[[], None]) -> float:
    """Returns the fewest seconds of this process's processor time that a run took."""
    seconds = []
    for _ in range(runs):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


def in_memory(repack: Repack, runs: int) -> float:
    """Returns GB/s of the pieces that repack, from memory to memory."""
    source, target = pages(repack.source.size), pages(repack.target.size)
    source[:] = np.random.default_rng(0).integers(0, 256, source.size, np.uint8)
    target[:] = 0
    pieces = [piece for piece in repack.pieces(0, 0) if piece.rewrite]

    def part(of: npt.NDArray[np.uint8], offset: int, length: int) -> npt.NDArray[np.uint8]:
        return of[offset : offset + length] if length else of  # nothing is read or written: the buffer has all of it

    def run() -> None:
        for piece in pieces:
            assert piece.rewrite is not None
            piece.rewrite(part(source, *piece.read), part(target, *piece.write))

    return source.nbytes / best(runs, run) / 1e9


def of_a_file(parts: list[Repack], place: Path, runs: int) -> float:
    """Returns GB/s of a pass over a file with one thread."""
    source, target = place / "awq2marlin-bench-in", place / "awq2marlin-bench-out"
    size = sum(each.source.size for each in parts)
    source.write_bytes(np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes())

    def pieces() -> Iterator[Piece]:
        read_at = write_at = 0
        for each in parts:
            yield from each.pieces(read_at, write_at)
            read_at, write_at = read_at + each.source.size, write_at + each.target.size

    def run() -> None:
        rewrite_file(NamedPath(source, "source"), target, pieces(), source_hashes=[Xxh3()], target_hashes=[Xxh3()])

    try:
        return size / best(runs, run) / 1e9
    finally:
        source.unlink()
        target.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, required=True, help="a folder on a RAM disk")
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "14336x4096"], help="KxN, multiples of 256")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    print(f"{'':34} memory   file   (GB/s)")
    for shape in options.shapes:
        size_k, size_n = (int(size) for size in shape.split("x"))
        for source, target in PAIRS:
            parts = repacks(source, target, options.bits, size_k, size_n)
            memory = in_memory(parts[0], options.runs)
            file = of_a_file(6 * parts, options.place, options.runs)
            name = f"{shape}, {options.bits} bits, {source} to {target}"
            print(f"{name:34} {memory:6.2f} {file:6.2f}", flush=True)


if __name__ == "__main__":
    main()
