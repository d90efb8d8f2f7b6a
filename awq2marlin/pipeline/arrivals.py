"""Source files, taken up as they arrive: while one is worked on, the next is fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue

from awq2marlin.io.source import Source
from awq2marlin.io.workers import StoppedError

#: How long to wait for a download to stop; where the client does not notice, it dies with the process.
_PATIENCE_SECONDS = 5


class Arrivals:
    """Files of a folder in the order in which they are wanted, each yielded once it is here. Made by `arriving`."""

    def __init__(
        self, folder: Source, sizes: Mapping[str, int], advance: Callable[[int], None], room: int | None
    ) -> None:
        """Takes what `arriving` takes."""
        self._folder, self._sizes, self._advance, self._room = folder, sizes, advance, room
        self._held: dict[str, int] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._arrived: SimpleQueue[str | BaseException] = SimpleQueue()

    def __iter__(self) -> Iterator[str]:
        """Yields the names as the files arrive; raises what fetching one raised."""
        for _ in self._sizes:
            arrived = self._arrived.get()
            if isinstance(arrived, BaseException):
                raise arrived
            yield arrived

    def release(self, name: str) -> None:
        """Says that a file is needed no more, so that there is room for another."""
        self._folder.release(name)
        with self._changed:
            self._held.pop(name, None)
            self._changed.notify_all()

    def fetch(self) -> None:
        """Fetches one file after the other as there is room; the body of the thread."""
        try:
            for name, size in self._sizes.items():
                self._wait_for_room(name, size)
                self._folder.fetch(name, self._advance_unless_stopped)
                self._arrived.put(name)
        except BaseException as error:
            self._arrived.put(error)

    def stop(self) -> None:
        """Ends fetching, in the middle of a file if need be."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait_for_room(self, name: str, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room(size))
            if self._stopped:
                raise StoppedError
            self._held[name] = size

    def _has_room(self, size: int) -> bool:
        return self._room is None or not self._held or sum(self._held.values()) + size <= self._room

    def _advance_unless_stopped(self, count: int) -> None:
        if self._stopped:
            raise StoppedError
        self._advance(count)


@contextmanager
def arriving(
    folder: Source, sizes: Mapping[str, int], advance: Callable[[int], None], room: int | None = None
) -> Iterator[Arrivals]:
    """Fetches files ahead, one at a time, while the context lasts.

    Args:
        folder: where they come from.
        sizes: bytes of each, in the order in which they are wanted.
        advance: told of the bytes that come, by another thread.
        room: how many bytes may be here and not released at the same time; None for any number.

    Yields:
        The files as they arrive.
    """
    arrivals = Arrivals(folder, sizes, advance, room)
    thread = threading.Thread(target=arrivals.fetch, name="fetch", daemon=True)
    thread.start()
    try:
        yield arrivals
    finally:
        arrivals.stop()
        thread.join(_PATIENCE_SECONDS)
