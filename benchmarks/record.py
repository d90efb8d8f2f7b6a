"""What results of benchmarks say of where, when and on which kernels they were measured; how they are kept."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Returns the commit of this package, or what the file ``commit`` beside it says; empty if unknown."""
    packed = ROOT / "commit"  # on a machine without git
    if packed.exists():
        return packed.read_text("utf-8").strip()
    return _answer(["git", "-C", str(ROOT), "rev-parse", "HEAD"])


@functools.cache
def driver() -> str:
    """Returns the version of the GPU's driver; empty if there is none."""
    return _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def processor() -> str:
    """Returns what the processor is called, or its kind where the system does not say it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def origin(of_commit: str | None = None) -> dict[str, Any]:
    """Returns driver, date and commit of a result.

    Args:
        of_commit: the commit that is timed; found out if not given.
    """
    return {"driver": driver(), "date": datetime.date.today().isoformat(), "commit": of_commit or commit()}


def environment(of_commit: str | None = None) -> dict[str, Any]:
    """Returns what `origin` does, and the GPU, PyTorch and the kernels' compiler.

    Args:
        of_commit: the commit that is timed; found out if not given.
    """
    import torch

    from awq2marlin.gemm import jit

    versions = {"torch": torch.__version__, "nvrtc": jit.compiler_version()}
    return {"gpu": torch.cuda.get_device_name(), **versions, **origin(of_commit)}


def kinds_of_layers(model: Any) -> dict[str, int]:
    """Returns how many layers each method of an engine serves, with the kernel, experts or scheme that it names.

    Args:
        model: the engine's, vLLM's or SGLang's.
    """
    layers = (module for module in model.modules() if getattr(module, "quant_method", None) is not None)
    return dict(Counter(map(_kind_of_layer, layers)))


def _kind_of_layer(layer: Any) -> str:
    method = layer.quant_method
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    named = (getattr(method, "kernel", None), getattr(method, "experts_cls", None), getattr(layer, "scheme", None))
    what_serves = next((each for each in (experts, *named) if each is not None), None)
    classes = (each if isinstance(each, type) else type(each) for each in (method, what_serves) if each is not None)
    return " ".join(each.__name__ for each in classes)


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result whole, or leaves what was there; does nothing if nobody wants a file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    partial.replace(path)


def earlier(path: Path) -> dict[str, Any]:
    """Returns the result that a file holds, for rows to be added to; one without rows if there is no file."""
    if not path.exists():
        return {"rows": []}
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def _answer(command: list[str]) -> str:
    """Returns the first line that a command prints; empty if there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0].strip()
