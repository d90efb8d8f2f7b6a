"""What the hub does wrong on demand."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


class Link:
    """A line that carries so many bytes a second, for all that share it."""

    def __init__(self, bytes_per_second):
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def carry(self, count):
        """Returns when ``count`` bytes have passed."""
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + count / self.bytes_per_second
        time.sleep(max(0.0, self._free_at - time.monotonic()))


@dataclass
class Fault:
    """Something that goes wrong with chosen requests, a chosen number of times.

    Attributes:
        path: shell pattern of the decoded path, such as ``/cdn/*`` or ``*/commit/main``.
        method: shell pattern of the method.
        times: how many matching requests it strikes; None for all.
        after: how many matching requests pass first.
        status: answered instead of doing anything.
        code: ``X-Error-Code`` of that answer.
        message: ``X-Error-Message`` of that answer.
        headers: further headers: of that answer, or over those of the right one.
        drop_after: the connection is closed after so many bytes of the body, sent or received; -1: after the request
            was carried out, without an answer.
        short_by: so many bytes are missing from the end of the body, with a ``Content-Length`` that hides it.
        corrupt: the first byte of the body is another one.
        bytes_per_second: bodies pass no faster, sent or received, all that this fault strikes together.
        hold: the request waits until this event is set.
    """

    path: str = "*"
    method: str = "*"
    times: int | None = 1
    after: int = 0
    status: int | None = None
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    short_by: int = 0
    corrupt: bool = False
    bytes_per_second: float | None = None
    hold: threading.Event | None = None

    def __post_init__(self):
        self.struck = 0
        self._lock = threading.Lock()
        self.link = Link(self.bytes_per_second) if self.bytes_per_second else None

    def strikes(self, method, path):
        """Returns whether this request is one that it strikes, and counts it."""
        if not (fnmatchcase(method, self.method) and fnmatchcase(path, self.path)):
            return False
        with self._lock:
            if self.after > 0:
                self.after -= 1
                return False
            if self.times is not None and self.struck >= self.times:
                return False
            self.struck += 1
            return True
