"""How long work tells what it is doing. The command line draws it; a library call is silent."""

from __future__ import annotations

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


class Silence:
    """Says nothing."""

    def start(self, what: str, total: int) -> None:
        """Does nothing."""

    def advance(self, count: int) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""
