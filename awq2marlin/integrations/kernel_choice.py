"""Which kernels serve an engine's layers: ours, or the engine's own Marlin. The same rule for every engine.

Linear layers and experts each have a choice of their own, by the same rule and the same variable.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from logging import Logger
from typing import Literal

from awq2marlin.errors import KernelUnavailableError, printable, refuse
from awq2marlin.gemm.families.base import HOPPER, MIN_CAPABILITY, Capability

Kernel = Literal["own", "engine"]

#: The environment variable that decides instead of the measurements.
KERNEL_VARIABLE = "AWQ2MARLIN_KERNEL"
SETTINGS = ("auto", "own", "engine")

#: Where ours was measured faster than the engines' Marlin (docs/vllm.md has the figures).
MEASURED = frozenset({HOPPER})

#: Seconds from which on a wait for another process that compiles is worth a line.
_NOTICEABLE_SECONDS = 1.0


@dataclass(frozen=True)
class Choice:
    """A kernel, and why."""

    kernel: Kernel
    reason: str


def setting() -> str:
    """Returns what the user asks for: ``auto``, ``own`` or ``engine``.

    Raises:
        CheckpointError: if the variable says something else.
    """
    value = os.environ.get(KERNEL_VARIABLE) or "auto"
    if value not in SETTINGS:
        message = f"{KERNEL_VARIABLE} is {printable(repr(value))}, but must be one of {', '.join(SETTINGS)}"
        raise refuse("unsupported-engine", message)
    return value


def choose(capability: Capability | None) -> Choice:
    """Returns which kernel serves layers that both can serve.

    Args:
        capability: the GPU's compute capability; None on a CPU.

    Raises:
        CheckpointError: if the variable says something else than it may.
    """
    wanted = setting()
    if wanted == "engine":
        return Choice("engine", f"{KERNEL_VARIABLE}=engine")
    if wanted == "own":
        return Choice("own", f"{KERNEL_VARIABLE}=own")
    if capability is None:
        return Choice("engine", "there is no GPU")
    place = f"compute capability {_dotted(capability)}"
    if capability in MEASURED:
        return Choice("own", f"measured faster on {place}; {KERNEL_VARIABLE}=engine takes the engine's")
    if capability < MIN_CAPABILITY:
        return Choice("engine", f"awq2marlin's needs compute capability {_dotted(MIN_CAPABILITY)}, this GPU has less")
    return Choice("engine", f"awq2marlin's was not measured on {place}; {KERNEL_VARIABLE}=own takes it")


def reason_without_own(capability: Capability | None) -> str | None:
    """Returns why a layer that only ours can serve is refused, in words; None if it is not.

    Args:
        capability: the GPU's compute capability; None if it is not known.

    Raises:
        CheckpointError: if the variable says something else than it may.
    """
    if setting() == "engine":
        return f"{KERNEL_VARIABLE}=engine leaves it to the engine's kernels, which do not know it; unset the variable"
    if capability is not None and capability < MIN_CAPABILITY:
        needed, found = _dotted(MIN_CAPABILITY), _dotted(capability)
        return f"only awq2marlin's kernels support it, and they need compute capability {needed}; this GPU has {found}"
    return None


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


class KernelChoice:
    """The choice of one process for one kind of layers: made with the first, and said in one line of its log."""

    def __init__(
        self, engine_s: str, logger: Logger, *, layers: str = "linear layers", own: str = "awq2marlin's GEMM"
    ) -> None:
        """Has chosen nothing yet.

        Args:
            engine_s: what the engine's own kernel is called, such as ``vLLM's Marlin``.
            logger: the engine's.
            layers: what the layers are called.
            own: what our kernel is called.
        """
        self._layers = layers
        self._names = {"own": own, "engine": engine_s}
        self._log = logger
        self._made: Choice | None = None
        self._taken: Counter[Kernel] = Counter()
        self._left: set[str] = set()

    @classmethod
    def of_experts(cls, engine_s: str, logger: Logger) -> KernelChoice:
        """Returns the choice for layers of experts; arguments as for the constructor."""
        return cls(engine_s, logger, layers="experts", own="awq2marlin's grouped GEMM")

    @property
    def kernel(self) -> Kernel | None:
        """What was chosen; None before the first layer."""
        return self._made.kernel if self._made else None

    @property
    def taken(self) -> str:
        """What layers were given, for a key of graphs that hold them: one kernel, or how many layers have each."""
        counts = sorted(self._taken.items())
        return counts[0][0] if len(counts) == 1 else ", ".join(f"{kernel} {count}" for kernel, count in counts)

    def kernel_for(
        self, capability: Capability | None, get_ready: Callable[[], object], *, only_own: bool = False
    ) -> Kernel:
        """Returns which kernel serves a layer. If it is ours, it is compiled and loaded.

        Args:
            capability: the GPU's compute capability; None on a CPU.
            get_ready: compiles and loads what the layer needs of ours.
            only_own: whether the engine's kernel does not know such layers.

        Raises:
            KernelUnavailableError: if ours must serve it, by the setting or because no other can, and cannot.
        """
        kernel = self._kernel_for(capability, get_ready, only_own=only_own)
        self._taken[kernel] += 1
        return kernel

    def _kernel_for(self, capability: Capability | None, get_ready: Callable[[], object], *, only_own: bool) -> Kernel:
        choice = self._made or self._choose(capability)
        if choice.kernel == "engine" and not only_own:
            return "engine"
        try:
            self._report(get_ready)
        except KernelUnavailableError as error:
            if only_own or setting() == "own":
                raise
            self._made = Choice("engine", f"{self._names['own']} is unavailable")
            self._log.warning("%s is used instead of %s: %s", self._names["engine"], self._names["own"], error)
            return "engine"
        return "own"

    def leave(self, reason: str) -> Kernel:
        """Leaves a layer that ours cannot serve to the engine's kernel, and says so once for every reason.

        Args:
            reason: why ours cannot, in words.
        """
        if reason not in self._left:
            self._left.add(reason)
            say = self._log.warning if setting() == "own" else self._log.info
            say("%s in Marlin layout run on %s: %s", self._layers, self._names["engine"], reason)
        return "engine"

    def _choose(self, capability: Capability | None) -> Choice:
        self._made = choose(capability)
        name = self._names[self._made.kernel]
        self._log.info("%s in Marlin layout run on %s: %s", self._layers, name, self._made.reason)
        return self._made

    def _report(self, get_ready: Callable[[], object]) -> None:
        """Gets ready and says how long it took, if that is anything to speak of."""
        from awq2marlin.gemm.jit import kernel_cache, on_compile

        compiled: list[str] = []
        begin = time.perf_counter()
        with on_compile(compiled.append):
            get_ready()
        seconds = time.perf_counter() - begin
        if compiled:
            folder, count = kernel_cache().folder, "a kernel" if len(compiled) == 1 else f"{len(compiled)} kernels"
            is_kept = os.access(folder, os.W_OK)
            later = f"later starts look in {folder}" if is_kept else f"every start will, as {folder} cannot be written"
            self._log.info("compiled %s in %.1f s; %s", count, seconds, later)
        elif seconds > _NOTICEABLE_SECONDS:
            self._log.info("the kernels were ready after %.1f s", seconds)
