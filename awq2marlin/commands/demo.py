"""A round trip on a machine with no model at hand: make, convert, verify, revert, compare."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.commands.convert import ConvertResult, convert
from awq2marlin.commands.revert import RevertResult, revert
from awq2marlin.commands.verify import VerifyResult, verify
from awq2marlin.errors import OutputError, Problem, difference, naming
from awq2marlin.progress import Progress, Silence

#: What a loader needs to know besides sizes, so that the checkpoints that are kept can be tried in Transformers.
_LOADABLE = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration did.

    Attributes:
        folder: where the three checkpoints lie, or lay.
        kept: whether they are still there.
        conversion: of the checkpoint made on the spot.
        verification: of all its modules.
        reversion: of the converted one.
        identical: files that came back byte for byte.
        seconds: wall time.
    """

    folder: Path
    kept: bool
    conversion: ConvertResult
    verification: VerifyResult
    reversion: RevertResult
    identical: int
    seconds: float


def demo(folder: str | os.PathLike[str] | None = None, *, progress: Progress | None = None) -> DemoResult:
    """Makes a small AWQ checkpoint of random weights, then converts, verifies and reverts it.

    Its attention is as wide as that of SmolLM2-135M, which Marlin cannot take, so some modules are converted and some
    are kept.

    Args:
        folder: where to keep ``awq/``, ``marlin/`` and ``reverted/``; if None, they are removed at the end.
        progress: receives what is being done.

    Raises:
        OutputError: if ``folder`` exists and is not empty.
        DifferenceError: if the round trip is not exact.
    """
    started = time.perf_counter()
    progress = progress or Silence()
    with ExitStack() as stack:
        if folder is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="awq2marlin-demo-")))
        else:
            root = Path(folder)
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                raise OutputError(Problem(str(root), "", "not-empty", "the folder is not empty; choose another"))
        source, marlin, back = root / "awq", root / "marlin", root / "reverted"
        with naming(source):
            recipe = llama_recipe(576, 1536, 4, 192, 4096, group_size=64, shards=2, config=_LOADABLE)
            write_checkpoint(source, recipe)
        progress.note(f"made an AWQ checkpoint of random weights in {source}")
        conversion = convert(source, marlin, verify="none", progress=progress)
        verification = verify(source, marlin, progress=progress)
        reversion = revert(marlin, back, progress=progress)
        identical = _count_identical(source, back)
        return DemoResult(
            root,
            folder is not None,
            conversion,
            verification,
            reversion,
            identical,
            time.perf_counter() - started,
        )


def _count_identical(source: Path, back: Path) -> int:
    names = {path.name for folder in (source, back) for path in folder.iterdir()}
    for name in sorted(names):
        if not (back / name).is_file() or (source / name).read_bytes() != (back / name).read_bytes():
            raise difference("different-bytes", "the restored file differs from the original", file=name)
    return len(names)
