"""Watches the CUDA graphs that an engine in this process replays: what they cost the host, and what the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Replay:
    """One replay of a graph.

    Attributes:
        begin: seconds by the host's clock when it was asked for.
        end: the same when the host was free again.
        before: event on the GPU before its kernels.
        after: event on the GPU after them.
    """

    begin: float
    end: float
    before: torch.cuda.Event
    after: torch.cuda.Event


class Replays:
    """Watches every replay of a CUDA graph in this process, while it is asked to."""

    def __init__(self) -> None:
        """Watches nothing yet."""
        self._is_on = False
        self._last: torch.cuda.CUDAGraph | None = None
        self._seen: list[Replay] = []
        original, watch = torch.cuda.CUDAGraph.replay, self
        self._replay = original

        def replay(graph: torch.cuda.CUDAGraph) -> None:
            if not watch._is_on:
                return original(graph)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            begin = time.perf_counter()
            original(graph)
            end = time.perf_counter()
            after.record()
            watch._seen.append(Replay(begin, end, before, after))
            watch._last = graph
            return None

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches what is replayed meanwhile, and forgets what was replayed before."""
        self._seen, self._is_on = [], True
        try:
            yield
        finally:
            self._is_on = False

    def summary(self, steps: int) -> dict[str, float]:
        """Returns what the watched replays cost, in microseconds.

        Args:
            steps: of the engine, meanwhile.

        Returns:
            ``replays_a_step``; means of a step, ``host_us`` (the calls) and ``gpu_us`` (from the launch to the end);
            and medians from the end of one graph to the start of the next, ``host_between_us`` and
            ``gpu_between_us``. Kernels outside of graphs are part of the latter, and so is all waiting for the host.
        """
        torch.cuda.synchronize()
        seen, pairs = self._seen, list(zip(self._seen, self._seen[1:], strict=False))
        found = {
            "replays_a_step": len(seen) / steps,
            "host_us": sum(each.end - each.begin for each in seen) * 1e6 / steps,
            "gpu_us": sum(each.before.elapsed_time(each.after) for each in seen) * 1e3 / steps,
            "host_between_us": statistics.median(second.begin - first.end for first, second in pairs) * 1e6,
            "gpu_between_us": statistics.median(one.after.elapsed_time(other.before) for one, other in pairs) * 1e3,
        }
        return {name: round(value, 2) for name, value in found.items()}

    def over_and_over(self, count: int = 400) -> dict[str, float]:
        """Returns the microseconds of a replay of the last graph, one after another: by the clock, and on the host.

        Args:
            count: of replays.
        """
        graph: Any = self._last
        for _ in range(20):
            self._replay(graph)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            self._replay(graph)
        called = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        single = []
        for _ in range(50):  # the host's part when the GPU has nothing to do
            torch.cuda.synchronize()
            one = time.perf_counter()
            self._replay(graph)
            single.append(time.perf_counter() - one)
        torch.cuda.synchronize()
        found = {"clock_us": ended - begin, "host_us": called - begin}
        rounded = {name: round(value / count * 1e6, 2) for name, value in found.items()}
        return {**rounded, "host_us_when_idle": round(statistics.median(single) * 1e6, 2)}
