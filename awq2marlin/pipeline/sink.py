"""Where finished files go: they stay in the output folder, or are passed on to the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from awq2marlin.pipeline.journal import FinishedFile, Pinned
from awq2marlin.pipeline.output import OutputFolder, Owned, as_output_errors, claim
from awq2marlin.pipeline.transfer import ShardPlan, Transfer
from awq2marlin.progress import Progress

if TYPE_CHECKING:
    from awq2marlin.pipeline.departures import Relay


class Sink(Protocol):
    """What a run hands its finished files to; `Stay` and `departures.Relay`."""

    @property
    def out(self) -> OutputFolder:
        """The folder in which files grow."""

    def steps(self, shards: Sequence[ShardPlan]) -> dict[str, int]:
        """Returns what is going to be done with finished shards, in words, and the bytes of it."""

    def has(self, name: str, entry: FinishedFile) -> bool:
        """Returns whether a shard that was sent away is still there."""

    def begin(self, advance: Callable[[int], None]) -> None:
        """The first shard is about to be made; what earlier runs finished is there.

        Args:
            advance: told of the bytes that `steps` announced.
        """

    def finished(self, name: str) -> None:
        """A shard is complete and remembered."""

    def wait(self) -> None:
        """All shards are complete; returns when they are where they go."""

    def commit(self, config: bytes) -> None:
        """All other files are complete; ``config.json`` makes the checkpoint whole."""


@dataclass(frozen=True)
class Stay:
    """Files stay in the output folder."""

    out: OutputFolder

    def steps(self, shards: Sequence[ShardPlan]) -> dict[str, int]:
        """Returns nothing: finished shards are where they belong."""
        del shards
        return {}

    def has(self, name: str, entry: FinishedFile) -> bool:
        """Returns False: nobody knows of any other place."""
        del name, entry
        return False

    def begin(self, advance: Callable[[int], None]) -> None:
        pass

    def finished(self, name: str) -> None:
        """The shard is where it belongs."""

    def wait(self) -> None:
        pass

    def commit(self, config: bytes) -> None:
        """Writes ``config.json`` once all else is durable."""
        self.out.commit(config)


@contextmanager
def open_sink(
    transfer: Transfer,
    root: Path,
    owned: Owned,
    pinned: Pinned | None,
    progress: Progress,
    relay: Callable[[OutputFolder], Relay] | None = None,
) -> Iterator[Sink]:
    """Claims the output folder for a transfer; see `output.claim`.

    Args:
        transfer: what will be written.
        root: the folder.
        owned: which files of it may be removed.
        pinned: what a later run has to know of the source.
        progress: told what the folder's file system cannot do.
        relay: makes what passes finished files on to the Hub; None if they stay.

    Yields:
        Where finished files go.
    """
    with as_output_errors(root):
        with claim(root, transfer.digest, transfer.names, owned=owned, pinned=pinned) as out:
            for lack in out.lacks:
                progress.note(lack)
            if relay is None:
                yield Stay(out)
            else:
                passing = relay(out)
                try:
                    yield passing
                finally:
                    passing.close()
        if relay is not None:
            with suppress(OSError):  # not empty: there is something that is not ours
                root.rmdir()
