"""Repacking one tensor, piece by piece: which bytes of the source make which bytes of the target.

Between two formats stands one plain form of each part of a module, rows of K (or G) one after the other:

    codes and zero points   uint32 [rows, N / f], packed in AWQ's order; what N leaves free of the last word is zero
    scales                  16 bits each [rows, N]

A `PartLayout` says how a tensor of a format holds such rows, and turns its bytes into them and back. AWQ's tensors hold
them as they are. A `Repack` goes from one layout to another, by bands of rows that repack independently: sixteen rows
of codes make one row of Marlin tiles. Unpadded, a piece keeps its length, so a file is rewritten in one pass with two
small buffers.

Zero points that are stored as products with the scales (`products`) need the bytes of another tensor, their
`Companion`. It may lie in another file; whoever asks for the pieces says how it is read.

A layout that comes straight to Marlin's tiles from its own bytes, and back, says so, and plain rows are left out.

A tensor that lies the other way round (`transposed`) holds columns one after the other, so no part of it holds whole
rows. It is read into a buffer as it stands, or written from one, and rows are taken out of it, or put in, in runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import refuse
from awq2marlin.io.stream import PIECE_BYTES, Piece, Step
from awq2marlin.layout.machine_code import address, kernel
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_INTERLEAVE, SCALE_PERM, SCALE_PERM_SINGLE
from awq2marlin.layout.modules import SCALE_BYTES
from awq2marlin.layout.packing import AWQ_PACK_ORDER, inverse_order, pack_factor

Bytes = npt.NDArray[np.uint8]

#: Bits of plain scales, uint16 [rows, columns].
Scales = npt.NDArray[np.uint16]

#: What a kernel of ``qweight`` needs to stage one tile.
_SCRATCH_BYTES = 512


class StrayBitsError(ValueError):
    """A tensor says what the plain rows have no place for, so that it could not be made again from them."""


class UnclearBitsError(ValueError):
    """A tensor holds a value whose meaning is not known; its message says all that there is to say."""


class Place(NamedTuple):
    """Where some bytes lie.

    Attributes:
        file: name of the file.
        begin: offset in it, in bytes.
        end: offset past the last byte.
    """

    file: str
    begin: int
    end: int


#: Returns the bytes of a place, uint8.
Reader = Callable[[Place], Bytes]


class Rewrite(Protocol):
    """What becomes of one tensor while a file is rewritten. Small and picklable."""

    @property
    def beside(self) -> Place | None:
        """Where another tensor lies that has to be read besides; None for nearly all."""

    def pieces(self, read_at: int, write_at: int, read: Reader) -> Iterator[Piece]:
        """Yields the pieces of the tensor, which are rewritten one by one, in any order but for their steps.

        Args:
            read_at: where the tensor begins in the file that is read, in bytes.
            write_at: where it begins in the file that is written.
            read: returns the bytes that are `beside`.
        """


@dataclass(frozen=True)
class PartLayout:
    """How one tensor holds one part of a module; this one as plain rows, which is AWQ's way.

    Attributes:
        part: ``qweight``, ``qzeros`` or ``scales``.
        bits: bits per code, 4 or 8.
        rows: rows of the part: K for codes, G for zero points and scales.
        columns: N.
    """

    part: str
    bits: int
    rows: int
    columns: int

    #: Whether the tensor's bytes are the plain rows.
    is_plain: ClassVar[bool] = True

    #: Whether the tensor's bytes are Marlin's tiles.
    is_tiles: ClassVar[bool] = False

    #: Whether there is a way from the tensor's bytes to tiles, and back, that does without plain rows.
    turns_to_tiles: ClassVar[bool] = False

    #: Whether the tensor holds columns one after the other, so that its one band is all of it.
    is_transposed: ClassVar[bool] = False

    #: Whether it holds the part only together with the module's scales; see `beside`.
    needs_scales: ClassVar[bool] = False

    @property
    def band(self) -> int:
        """Rows that lie together: a piece of the tensor holds whole bands of them."""
        return 1

    @property
    def column_unit(self) -> int:
        """Columns are a multiple of this: the kernels trust it."""
        return 64

    @property
    def word_rows(self) -> int:
        """Of a transposed tensor: how many rows share a word, so that a run of rows is a multiple of it."""
        return 1

    @property
    def line_rows(self) -> int:
        """Of a transposed tensor: how many rows share a cache line of a column; it is best cut there."""
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        """Bytes of one plain row."""
        if self.part == "scales":
            return self.columns * SCALE_BYTES
        return -(-self.columns // pack_factor(self.bits)) * 4

    @property
    def band_bytes(self) -> int:
        """Bytes of the tensor that hold one band."""
        return self.band * self.row_bytes

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return -(-self.rows // self.band) * self.band_bytes

    def bands(self, first: int, last: int) -> tuple[int, int]:
        """Returns the bands, first and past the last, that hold rows ``first`` to ``last``, as far as there are any."""
        return min(first, self.rows) // self.band, -(-min(last, self.rows) // self.band)

    @property
    def plain_scales(self) -> PartLayout:
        """What the scales are as plain rows, where they are needed."""
        raise NotImplementedError

    def beside(self, scales: Scales) -> PartLayout:  # noqa: ARG002
        """Returns the layout of some rows or columns that have these scales; itself, where it needs none."""
        return self

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns whole bands of the tensor into plain rows.

        Args:
            data: uint8, contiguous, aligned to 4 bytes: the bands.
            plain: uint8, likewise, as long as their rows; written in full.

        Raises:
            StrayBitsError: if `pack` would not give back the very bytes.
            UnclearBitsError: if it is not known what the tensor says.
        """
        plain[:] = data

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Undoes `unpack`."""
        data[:] = plain

    def held(self, data: Bytes, first: int, last: int) -> int:
        """Returns how many plain rows there are in bands, which are those of rows ``first`` to ``last``."""
        del first, last
        return data.size // self.band_bytes * self.band

    def unpack_rows(self, data: Bytes, first: int, plain: Bytes) -> None:
        """Turns some rows of the tensor into plain rows.

        Args:
            data: the bands that hold them; of a transposed tensor, all of it.
            first: the first row's number.
            plain: as long as the rows; written in full.

        Raises:
            StrayBitsError: as `unpack` does.
            UnclearBitsError: as `unpack` does.
        """
        del first  # the bands are theirs
        self.unpack(data, plain)

    def pack_rows(self, plain: Bytes, first: int, data: Bytes) -> None:
        """Undoes `unpack_rows`; of a transposed tensor, only these rows are written."""
        del first
        self.pack(plain, data)

    def unpack_tiles(self, data: Bytes, first: int, tiles: Bytes) -> None:
        """Does what `unpack_rows` does, but makes tiles of whole rows of them: where the layout `turns_to_tiles`."""
        raise NotImplementedError

    def pack_tiles(self, tiles: Bytes, first: int, data: Bytes) -> None:
        """Undoes `unpack_tiles`."""
        raise NotImplementedError

    def _check(self, plain: Bytes, data: Bytes) -> None:
        """Refuses what is not whole bands: the kernels trust their sizes."""
        fits = plain.size == data.size and data.size % self.band_bytes == 0 and self.columns % self.column_unit == 0
        if not (fits and plain.flags.c_contiguous and data.flags.c_contiguous):
            raise ValueError(
                f"pieces of {plain.size} and {data.size} bytes are not whole rows of {self.band_bytes} bytes"
            )


class MarlinWeight(PartLayout):
    """Codes in Marlin's tiles of 16 rows by 64 columns; pictured in kernels/README.md."""

    is_plain: ClassVar[bool] = False
    is_tiles: ClassVar[bool] = True

    @property
    def band(self) -> int:
        """A row of tiles is sixteen rows."""
        return GPTQ_MARLIN_TILE

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns rows of tiles into plain rows."""
        self._apply("unpack", data, plain)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns plain rows, sixteen a row of tiles, into tiles."""
        self._apply("repack", plain, data)

    def _apply(self, verb: str, source: Bytes, target: Bytes) -> None:
        self._check(source, target)
        scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        tile_rows, row_words = target.size // self.band_bytes, self.columns // pack_factor(self.bits)
        name = f"{verb}_qweight_{self.bits}bit"
        kernel(name)(address(source), address(target), address(scratch), tile_rows, row_words)


class _Permuted(PartLayout):
    """Rows whose columns stand in another order."""

    is_plain: ClassVar[bool] = False

    def unpack(self, data: Bytes, plain: Bytes) -> None:
        """Turns permuted rows into plain ones."""
        self._check(plain, data)
        self._gather(data, plain, inverse=True)

    def pack(self, plain: Bytes, data: Bytes) -> None:
        """Turns plain rows into permuted ones."""
        self._check(plain, data)
        self._gather(plain, data, inverse=False)

    def _gather(self, source: Bytes, target: Bytes, *, inverse: bool) -> None:
        raise NotImplementedError


class MarlinZeroPoints(_Permuted):
    """Zero points in Marlin's order: columns permuted in blocks of 64, then interleaved in each word."""

    def _gather(self, source: Bytes, target: Bytes, *, inverse: bool) -> None:
        table = _zero_point_fields(self.bits, inverse)
        blocks = source.size * 8 // self.bits // table.size
        kernel(f"gather_fields_{self.bits}bit")(address(source), address(target), address(table), blocks)


@dataclass(frozen=True)
class MarlinScales(_Permuted):
    """Scales in Marlin's order: columns permuted in blocks of 64, or of 32 where one group spans all of K.

    Attributes:
        single_group: whether one group does.
    """

    single_group: bool = False

    def _gather(self, source: Bytes, target: Bytes, *, inverse: bool) -> None:
        table = _scale_columns(self.single_group, inverse)
        blocks = source.size // SCALE_BYTES // table.size
        kernel("gather_columns")(address(source), address(target), address(table), blocks, table.size)


@cache
def _scale_columns(single_group: bool, inverse: bool) -> npt.NDArray[np.uint8]:
    perm = SCALE_PERM_SINGLE if single_group else SCALE_PERM
    return np.array(inverse_order(perm) if inverse else perm, np.uint8)


@cache
def _zero_point_fields(num_bits: int, inverse: bool) -> npt.NDArray[np.uint8]:
    """Returns the table of `gather_fields`: target field to source field, in a block of 64 columns."""
    factor = pack_factor(num_bits)
    field_of_column = inverse_order(AWQ_PACK_ORDER[num_bits])
    fields = []
    for position in range(len(SCALE_PERM)):
        word, field = divmod(position, factor)
        column = SCALE_PERM[word * factor + MARLIN_INTERLEAVE[num_bits][field]]
        fields.append(column // factor * factor + field_of_column[column % factor])
    return np.array(inverse_order(tuple(fields)) if inverse else fields, np.uint8)


class Holder(NamedTuple):
    """A tensor that holds a part of a module.

    Attributes:
        name: full name.
        layout: how it holds it.
    """

    name: str
    layout: PartLayout


@dataclass(frozen=True)
class Companion:
    """The scales of a module, beside zero points that are stored as products with them.

    Attributes:
        source: the tensor among those that are read.
        target: the tensor among those that are written.
        place: where the first one lies; None before that is known.
    """

    source: Holder
    target: Holder
    place: Place | None = None

    @property
    def inverse(self) -> Companion:
        """The same on the way back."""
        return Companion(self.target, self.source)


@dataclass(frozen=True, slots=True)
class Repack:
    """How one tensor becomes its counterpart in another layout; where that is larger, padded with zeros.

    Attributes:
        source: how the tensor that is read holds the part.
        target: how the tensor that is written does.
        file: where it is read, for messages.
        name: full name of what is read, for messages.
        companion: the module's scales, where one of the two layouts needs them.
    """

    source: PartLayout
    target: PartLayout
    file: str = ""
    name: str = ""
    companion: Companion | None = None

    @property
    def inverse(self) -> Repack:
        """The way back; padding goes, and the names, which were those of what is read."""
        return Repack(self.target, self.source, companion=self.companion and self.companion.inverse)

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.source == self.target

    @property
    def needs_scales(self) -> bool:
        """Whether one of the two layouts does."""
        return self.source.needs_scales or self.target.needs_scales

    @property
    def beside(self) -> Place | None:
        """Where the scales lie that are read besides."""
        return self.companion.place if self.companion else None

    def pieces(self, read_at: int, write_at: int, read: Reader | None = None) -> Iterator[Piece]:
        """Yields the pieces of the tensor; see `Rewrite.pieces`."""
        scales = self._scales(read) if self.needs_scales else None
        if self._is_turned and max(self.source.size, self.target.size) > PIECE_BYTES:
            turn = self._columns_to_rows if self.source.is_transposed else self._rows_to_columns
            yield from turn(read_at, write_at, scales)
            return
        step = self._rows_at_once()
        for first in range(0, self._rows, step):
            source, target = (_bytes_of(each, first, first + step) for each in (self.source, self.target))
            rewrite = self._of_rows(first, first + step, scales)
            yield Piece((read_at + source[0], source[1]), (write_at + target[0], target[1]), rewrite)

    def _scales(self, read: Reader | None) -> Scales:
        """Returns the plain scales that one of the two layouts needs."""
        companion = self.companion
        assert companion is not None
        assert companion.place is not None
        assert read is not None
        plain = next(each.plain_scales for each in (self.source, self.target) if each.needs_scales)
        scales = np.empty(plain.size, np.uint8)
        to_plain = Repack(companion.source.layout, plain, companion.place.file, companion.source.name)
        to_plain.rewrite(read(companion.place), scales)
        return scales.view(np.uint16).reshape(plain.rows, plain.columns)

    def _of_rows(self, first: int, last: int, scales: Scales | None) -> Callable[[Bytes, Bytes], None]:
        """Returns what repacks some rows."""
        cut = self
        if scales is not None:
            theirs = scales[first:last]
            cut = replace(self, source=self.source.beside(theirs), target=self.target.beside(theirs))
        return partial(cut.rewrite_rows, first, last)

    def rewrite(self, found: Bytes, made: Bytes) -> None:
        """Turns bands of the source into the bands of the target that hold the same rows.

        Args:
            found: uint8, contiguous, aligned to 4 bytes: whole bands of the source.
            made: uint8, likewise: whole bands of the target; written in full.

        Raises:
            CheckpointError: if the way back would not give back the very bytes, or they have no one meaning.
        """
        sides = (self.source, found), (self.target, made)
        self.rewrite_rows(0, max(-(-data.size // each.band_bytes) * each.band for each, data in sides), found, made)

    def rewrite_rows(self, first: int, last: int, found: Bytes, made: Bytes) -> None:
        """Turns rows of the source into the same rows of the target.

        Args:
            first: the first row's number.
            last: past the last; beyond the end there is nothing to turn.
            found: the source's bands that hold them, or all of it if it is transposed.
            made: the target's, likewise; of a transposed tensor, only these rows are written.

        Raises:
            CheckpointError: as `rewrite` does.
        """
        try:
            self._rewrite(first, last, found, made)
        except UnclearBitsError as error:
            raise refuse("contradiction", str(error), file=self.file, tensor=self.name) from None
        except StrayBitsError as error:
            message = f"{error}, so the conversion could not be undone; the checkpoint is damaged or of another format"
            raise refuse("contradiction", message, file=self.file, tensor=self.name) from None

    def _rewrite(self, first: int, last: int, found: Bytes, made: Bytes) -> None:
        source, target = self.source, self.target
        rows = source.held(found, first, last), target.held(made, first, last)
        is_same = rows[0] == rows[1] and source.columns == target.columns
        if is_same and source.turns_to_tiles and target.is_tiles:
            source.unpack_tiles(found, first, made)
        elif is_same and source.is_tiles and target.turns_to_tiles:
            target.pack_tiles(found, first, made)
        elif is_same and target.is_plain:
            source.unpack_rows(found, first, made)
        else:
            plain = found
            if not source.is_plain:
                plain = np.empty(rows[0] * source.row_bytes, np.uint8)
                source.unpack_rows(found, first, plain)
            if not is_same:
                plain = _fitted(plain, source.row_bytes, rows[1], target.row_bytes)
            target.pack_rows(plain, first, made)

    @property
    def _rows(self) -> int:
        return max(self.source.rows, self.target.rows)

    def _rows_at_once(self) -> int:
        """Returns how many rows a piece has: whole bands of both sides, about `PIECE_BYTES`."""
        if self.source.is_transposed or self.target.is_transposed:
            return self._rows
        band = math.lcm(self.source.band, self.target.band)
        return band * max(1, PIECE_BYTES // (band * max(self.source.row_bytes, self.target.row_bytes)))

    # --- between a tensor of columns and a tensor of rows

    @property
    def _is_turned(self) -> bool:
        """Whether one side holds columns and the other rows."""
        return self.source.is_transposed != self.target.is_transposed

    def _columns_to_rows(self, read_at: int, write_at: int, scales: Scales | None) -> Iterator[Piece]:
        """Yields pieces that read the source into the buffer, then a piece for every run of the target's rows."""
        size = self.source.size
        for place, (begin, length) in enumerate(_pieces_of(size)):
            yield Piece((read_at + begin, length), (write_at, 0), None, Step(place, size, begin))
        for place, (first, last) in enumerate(self._runs(self.source, self.target)):
            begin, length = _bytes_of(self.target, first, last)
            write = write_at + begin, length
            yield Piece((read_at + size, 0), write, self._of_rows(first, last, scales), Step(place, size))

    def _rows_to_columns(self, read_at: int, write_at: int, scales: Scales | None) -> Iterator[Piece]:
        """Yields a piece for every run of the source's rows, then pieces that write the target from the buffer."""
        size = self.target.size
        for place, (first, last) in enumerate(self._runs(self.target, self.source)):
            begin, length = _bytes_of(self.source, first, last)
            read = read_at + begin, length
            yield Piece(read, (write_at, 0), self._of_rows(first, last, scales), Step(place, size))
        for place, (begin, length) in enumerate(_pieces_of(size)):
            yield Piece((read_at + self.source.size, 0), (write_at + begin, length), None, Step(place, size, begin))

    def _runs(self, columns: PartLayout, rows: PartLayout) -> Iterator[tuple[int, int]]:
        """Yields rows, first and past the last, that make up about `PIECE_BYTES`, until all are.

        They are whole cache lines of every column, if that is not much more.
        """
        fewest = math.lcm(columns.word_rows, rows.band)
        count, row_bytes = math.lcm(columns.line_rows, fewest), rows.band_bytes // rows.band
        count *= max(1, PIECE_BYTES // (count * row_bytes))
        while count * row_bytes > 2 * PIECE_BYTES and count % (2 * fewest) == 0:
            count //= 2
        for first in range(0, self._rows, count):
            yield first, min(first + count, self._rows)


def _bytes_of(layout: PartLayout, first: int, last: int) -> tuple[int, int]:
    """Returns offset and length of the bands that hold some rows."""
    begin, end = layout.bands(first, last)
    return begin * layout.band_bytes, (end - begin) * layout.band_bytes


def _pieces_of(size: int) -> Iterator[tuple[int, int]]:
    """Yields offset and length of pieces of a tensor."""
    for begin in range(0, size, PIECE_BYTES):
        yield begin, min(PIECE_BYTES, size - begin)


def _fitted(plain: Bytes, row_bytes: int, target_rows: int, target_row_bytes: int) -> Bytes:
    """Returns plain rows in another size: cut, where there is nothing but zeros, or filled up with zeros."""
    rows, columns = plain.reshape(-1, row_bytes), min(row_bytes, target_row_bytes)
    count = min(len(rows), target_rows)
    if rows[count:].any() or rows[:count, columns:].any():
        raise StrayBitsError("its padding is not zero")
    if row_bytes == target_row_bytes and count == target_rows:  # only rows go: nothing is copied
        return plain[: count * row_bytes]
    fitted = np.zeros((target_rows, target_row_bytes), np.uint8)
    fitted[:count, :columns] = rows[:count, :columns]
    return fitted.reshape(-1)
