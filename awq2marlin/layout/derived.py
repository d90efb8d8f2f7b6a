"""Tensors that only one of two formats has, because they follow from their module's shape.

The target's are made; the source's are proven to hold what follows, so that `revert` can make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from awq2marlin.errors import refuse
from awq2marlin.io.stream import Piece
from awq2marlin.layout.packing import AWQ_PACK_ORDER, pack_factor
from awq2marlin.layout.repack import Bytes, PartLayout, Reader


@dataclass(frozen=True)
class Made:
    """A tensor that only the target has, because it follows from its module's shape.

    Attributes:
        size: its bytes.
        data: returns them; picklable.
    """

    size: int
    data: Callable[[], bytes]

    beside: ClassVar[None] = None

    def pieces(self, read_at: int, write_at: int, _read: Reader | None = None) -> Iterator[Piece]:
        """Yields one piece that reads nothing."""
        yield Piece((read_at, 0), (write_at, self.size), self.rewrite)

    def rewrite(self, found: Bytes, made: Bytes) -> None:
        """Writes the tensor's bytes."""
        del found  # nothing
        made[:] = np.frombuffer(self.data(), np.uint8)


@dataclass(frozen=True)
class Proven:
    """A tensor that only the source has: proven to follow from its module's shape, so that `revert` can make it again.

    Attributes:
        file: where it lies, for messages.
        name: full name, for messages.
        size: its bytes.
        data: returns the bytes that follow; picklable.
        meaning: what it means if they do not, for messages.
    """

    file: str
    name: str
    size: int
    data: Callable[[], bytes]
    meaning: str = ""

    beside: ClassVar[None] = None

    def pieces(self, read_at: int, write_at: int, _read: Reader | None = None) -> Iterator[Piece]:
        """Yields one piece that writes nothing."""
        yield Piece((read_at, self.size), (write_at, 0), self.rewrite)

    def rewrite(self, found: Bytes, made: Bytes) -> None:
        """Compares what was read with what follows.

        Raises:
            CheckpointError: if they differ.
        """
        del made  # nothing
        expected = np.frombuffer(self.data(), np.uint8)
        if not np.array_equal(found, expected):
            at = int(np.argmax(found != expected)) if found.size == expected.size else min(found.size, expected.size)
            message = (
                f"{self.meaning or 'the checkpoint is damaged or of another format'} (from byte {at} on, it is not "
                "what the module's shape and the config call for, so the conversion could not be undone)"
            )
            raise refuse("contradiction", message, file=self.file, tensor=self.name)


def middle_zero_points(layout: PartLayout, rows: int, columns: int) -> bytes:
    """Returns the bytes of a tensor of zero points that are all 2^(bits-1), with zeros in the padding.

    Args:
        layout: how the tensor holds them.
        rows: groups G without padding.
        columns: N without padding.
    """
    factor = pack_factor(layout.bits)
    first = factor * np.arange(-(-layout.columns // factor))[:, None]
    fields = first + np.array(AWQ_PACK_ORDER[layout.bits]) < columns
    words = (fields.astype(np.uint32) << np.uint32(layout.bits) * np.arange(factor, dtype=np.uint32)).sum(1, np.uint32)
    plain = np.zeros((layout.rows, len(words)), np.uint32)
    plain[:rows] = words << np.uint32(layout.bits - 1)
    data = np.empty(layout.size, np.uint8)
    layout.pack(plain.view(np.uint8).reshape(-1), data)
    return data.tobytes()
