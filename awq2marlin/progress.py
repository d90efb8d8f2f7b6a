"""How long work tells what it is doing. The command line draws it; a library call is silent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives what a long operation has done. Methods may be called by any thread."""

    def start(self, what: str, total: int) -> None:
        """A stage begins: its name and its length in bytes."""

    def advance(self, count: int) -> None:
        """So many bytes of the stage are done."""

    def finish(self) -> None:
        """The stage is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Stage:
    """A stage whose bytes are gone through in several steps, fetched and converted say; each step is a part of them.

    So a stage is as long as its bytes are many, however often they are touched. May be told by any thread.
    """

    def __init__(self, progress: Progress, what: str, total: int, steps: Mapping[str, int]) -> None:
        """Begins the stage.

        Args:
            progress: told of it.
            what: its name.
            total: its length in bytes.
            steps: what is done, and how many bytes that will count; what counts none is left out.
        """
        self._progress, self._total = progress, total
        self._steps = {name: size for name, size in steps.items() if size}
        self._done = dict.fromkeys(self._steps, 0)
        self._told = 0
        self._lock = threading.Lock()
        progress.start(what, total)

    def step(self, name: str) -> Callable[[int], None]:
        """Returns where a step tells of its bytes."""
        return partial(self._advance, name) if name in self._steps else lambda _count: None

    def _advance(self, name: str, count: int) -> None:
        with self._lock:
            self._done[name] += count
            parts = [min(1.0, done / self._steps[each]) for each, done in self._done.items()]
            done = int(self._total * sum(parts) / len(parts))
            step, self._told = done - self._told, done
        self._progress.advance(step)


class Silence:
    """Says nothing."""

    def start(self, what: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass
