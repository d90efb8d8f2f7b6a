"""Converts, verifies through the Marlin GEMM, and reverts checkpoints of every kind on one machine.

    python benchmarks/verify_on_gpu.py --device cuda --model MODEL_FOLDER --out benchmarks/results/verify_h200.json

Synthetic checkpoints cover bits, group sizes, types, zero points, padding and unequal shapes; MODEL_FOLDER is a
real one. Prints a line each; writes what each module's checks said.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import origin, save

from awq2marlin import __version__, convert, revert, verify
from awq2marlin.checkpoint.synthetic import Recipe, llama_recipe, write_checkpoint

SHAPES = {"a": (256, 192), "b": (128, 64), "c": (192, 128), "d": (576, 1536), "e": (3584, 512), "f": (4096, 4096)}
MODULES = {f"model.layers.{depth}.mlp.{name}": shape for depth, (name, shape) in enumerate(SHAPES.items())}

RECIPES: dict[str, tuple[Recipe, str]] = {
    f"{bits} bits, g {group_size}, {dtype}, {'zero points' if has_qzeros else 'none'}": (
        Recipe(MODULES, bits=bits, group_size=group_size, scale_dtype=dtype, weight_dtype=dtype, has_qzeros=has_qzeros),
        "keep",
    )
    for bits in (4, 8)
    for group_size in (32, 64, -1)
    for dtype in ("F16", "BF16")
    for has_qzeros in (True, False)
}
RECIPES["4 bits, g 128, 3584x512"] = (Recipe({"model.layers.0.mlp.up_proj": (3584, 512)}, shards=2), "keep")
RECIPES["padded, g 64"] = (llama_recipe(576, 1536, 2, 192, 512, group_size=64), "pad")
RECIPES["padded, g -1"] = (llama_recipe(576, 1536, 2, 192, 512, group_size=-1), "pad")
RECIPES["Llama-3-8B's layer"] = (llama_recipe(4096, 14336, 1, 1024, 512), "keep")


def check(source: Path, unaligned: Any, device: Any, work: Path, plot: Path | None) -> dict[str, Any]:
    """Returns what the GEMM said of one checkpoint, all modules; raises where anything differs."""
    convert(source, work / "marlin", unaligned=unaligned, verify="all", device=device)
    result = verify(source, work / "marlin", device=device)
    reverted = revert(work / "marlin", work / "back")
    same = all((source / file.name).read_bytes() == (work / "back" / file.name).read_bytes() for file in reverted.files)
    if not same:
        raise RuntimeError(f"{source} did not come back byte for byte")
    assert result.gemm is not None
    if plot is not None:
        from awq2marlin.verification.error_plot import plot_errors

        plot_errors(result.gemm, plot)
    return asdict(result.gemm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    parser.add_argument("--model", type=Path, help="a real AWQ checkpoint")
    parser.add_argument("--plot", type=Path, help="where to draw the real model's errors")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    results: dict[str, Any] = {
        **origin(),
        "version": __version__,
        "checkpoints": {},
    }
    cases: dict[str, tuple[Path | Recipe, str]] = {**RECIPES}
    if options.model:
        cases = {f"{options.model.name}, {how}": (options.model, how) for how in ("keep", "pad")} | cases
    for name, (what, unaligned) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            source = what if isinstance(what, Path) else work / "awq"
            if isinstance(what, Recipe):
                write_checkpoint(source, what)
            plot = options.plot if isinstance(what, Path) and unaligned == "pad" else None
            run = check(source, unaligned, options.device, work, plot)
        checks = run["checks"]
        worst = max(checks, key=lambda each: each["max_relative"])
        print(
            f"{name}: {len(checks)} modules exact on {run['device_name']}; largest error "
            f"{max(each['max_error'] for each in checks):.2e}, at most {worst['max_relative']:.3f} of the bound; "
            "reverted byte for byte",
            flush=True,
        )
        results["checkpoints"][name] = run
    save(options.out, results)


if __name__ == "__main__":
    main()
