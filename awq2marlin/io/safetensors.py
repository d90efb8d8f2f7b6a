"""Reading and writing safetensors headers, strictly: the file is hostile until checked.

A safetensors file is eight bytes of header length (little endian), a JSON header, and the data. The
checks follow the format's own rules (https://huggingface.co/docs/safetensors, "Format"): no duplicate
keys, and tensors that cover the data exactly, without holes or overlaps. Nothing here knows of AWQ or
Marlin.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NoReturn

from awq2marlin.errors import enumerated, printable, refuse
from awq2marlin.io.impostors import HEAD_BYTES, text_in_place_of
from awq2marlin.io.strict_json import parse_json

#: The format's own limit on the header's length, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: Bytes that hold the header's length.
LENGTH_BYTES = 8

#: Bits per element of every data type of the format.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_ELEMENTS = 1 << 60
_MAX_SIZE = 1 << 62

#: The order in which nearly every writer puts what describes a tensor.
_ENTRY_ORDER = ["dtype", "shape", "data_offsets"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, as its header describes it.

    Attributes:
        name: full name.
        dtype: the format's name of the type, e.g. ``F16``.
        shape: sizes, outermost first; empty for a scalar.
        start: offset of its first byte in the data, in bytes.
        end: offset past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Length of the data in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        text: its exact JSON bytes, padding included, without the eight bytes of length.
        tensors: by name, in the header's order.
    """

    text: bytes
    tensors: Mapping[str, TensorInfo]

    @property
    def prefix(self) -> bytes:
        """The file's bytes before the data: length and JSON."""
        return len(self.text).to_bytes(LENGTH_BYTES, "little") + self.text

    @property
    def data_start(self) -> int:
        """Offset of the data in the file, in bytes."""
        return LENGTH_BYTES + len(self.text)

    @property
    def data_size(self) -> int:
        """Length of the data in bytes."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)

    @property
    def file_size(self) -> int:
        """Length of the whole file in bytes."""
        return self.data_start + self.data_size

    @cached_property
    def by_offset(self) -> list[TensorInfo]:
        """The tensors in the order of their data."""
        return sorted(self.tensors.values(), key=lambda tensor: (tensor.start, tensor.end))


def read_header(stream: BinaryIO, file_size: int, file: str) -> Header:
    """Reads and checks the header of a safetensors file.

    Args:
        stream: the file, at its beginning.
        file_size: its length in bytes.
        file: its name, for messages.

    Returns:
        The header. Nothing beyond it has been read, and no more than it was allocated.

    Raises:
        CheckpointError: if anything about it breaks the format's rules.
    """
    length_bytes = stream.read(LENGTH_BYTES)
    if len(length_bytes) < LENGTH_BYTES:
        raise refuse(
            "truncated", f"it has {file_size} bytes, too few for a safetensors file; download it again", file=file
        )
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        text_there = text_in_place_of(length_bytes + stream.read(HEAD_BYTES - LENGTH_BYTES), file)
        if text_there is not None:
            raise text_there
        raise refuse(
            "header-too-long",
            f"the header's length reads {length} bytes, above the format's limit of {MAX_HEADER_BYTES}; "
            "this is not a safetensors file, or a damaged one",
            file=file,
        )
    if length > file_size - LENGTH_BYTES:
        raise refuse(
            "truncated",
            f"the header's length reads {length} bytes, past the end of the file ({file_size} bytes); "
            "download it again",
            file=file,
        )
    text = stream.read(length)
    if len(text) != length:
        raise refuse("truncated", "the file ends inside its header; download it again", file=file)
    return parse_header(text, file_size - LENGTH_BYTES - length, file)


def parse_header(text: bytes, data_size: int, file: str) -> Header:
    """Checks the JSON of a header against the length of the data it describes.

    Args:
        text: exact JSON bytes, padding included.
        data_size: how many bytes of data the file has.
        file: the file's name, for messages.

    Raises:
        CheckpointError: if anything about it breaks the format's rules.
    """
    if not text.startswith(b"{"):
        message = "the header does not begin with '{': this is not a safetensors file; download it again"
        raise refuse("bad-header", message, file=file)
    document = parse_json(text, file)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("bad-header", "__metadata__ must map strings to strings", file=file)
    for string in (*document, *metadata, *metadata.values()):
        if not string.isascii() and any("\ud800" <= char <= "\udfff" for char in string):
            raise refuse("bad-header", f"{printable(string)!r} holds half of a surrogate pair", file=file)
    tensors = {name: _tensor_info(name, entry, file) for name, entry in document.items()}
    header = Header(text, tensors)
    _check_coverage(header, data_size, file)
    return header


def _tensor_info(name: str, entry: Any, file: str) -> TensorInfo:
    def bad(code: str, message: str) -> NoReturn:
        raise refuse(code, message, file=file, tensor=name)

    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        bad("bad-header", f"its entry must have exactly the keys {enumerated(sorted(_ENTRY_KEYS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        bad("unknown-dtype", f"the data type {printable(str(dtype))!r} is not one of the format's")
    if not _are_sizes(shape):
        bad("bad-header", "its shape must be a list of whole numbers, none negative or beyond 2^62")
    if not _are_sizes(offsets) or len(offsets) != 2:
        bad("bad-header", "its data_offsets must be two whole numbers, none negative or beyond 2^62")
    start, end = offsets
    elements = 1
    for size in shape:  # one by one: a zero at the end does not make good an overflow before it
        elements *= size
        if elements > _MAX_ELEMENTS:
            bad("shape-overflow", f"its shape {printable(str(shape))} has more elements than any file can hold")
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        bad(
            "size-mismatch",
            f"its shape {printable(str(shape))} of {dtype} needs {bits / 8:.0f} bytes, "
            f"its data_offsets {[start, end]} hold {end - start}",
        )
    return TensorInfo(name, dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - three times as fast as a generator, for some million numbers
        if type(item) is not int or not 0 <= item < _MAX_SIZE:
            return False
    return True


def _check_coverage(header: Header, data_size: int, file: str) -> None:
    position = 0
    for tensor in header.by_offset:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise refuse(
                "bad-offsets",
                f"its data begins at {tensor.start} and {kind} (expected {position})",
                file=file,
                tensor=tensor.name,
            )
        position = tensor.end
    if position != data_size:
        what = "is cut short; download it again" if position > data_size else "has bytes that no tensor owns"
        raise refuse(
            "truncated" if position > data_size else "trailing-data",
            f"the header describes {position} bytes of data, the file holds {data_size}: it {what}",
            file=file,
        )


def encode_header(source: Header, tensors: Mapping[str, Sequence[TensorInfo]]) -> Header:
    """Returns the header of a file that is made from another one.

    Everything else of the source's header stays: its metadata, the order of its keys and of their entries. The JSON is
    compact and padded with spaces, so that the data begins on a multiple of eight bytes.

    Args:
        source: the header to follow.
        tensors: what stands in the place of every tensor of ``source``, by its name there: mostly one tensor, or
            none, or several.
    """
    document: dict[str, Any] = {}
    for name, entry in json.loads(source.text).items():
        if name == "__metadata__":
            document[name] = entry
            continue
        for tensor in tensors[name]:
            described = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (tensor.start, tensor.end)}
            document[tensor.name] = described if [*entry] == _ENTRY_ORDER else {key: described[key] for key in entry}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return Header(text, {tensor.name: tensor for name in source.tensors for tensor in tensors[name]})


class TensorIndex:
    """Every tensor of several files, by name: of those that several files hold, the one that counts.

    Attributes:
        headers: by file name.
        weight_map: the file of each tensor, as somebody says who knows which one counts; may be empty.
        tensors: by name.
        shard_of: the file that holds each tensor.
        copies: the tensors of each file that do not count; files without any are left out.
    """

    def __init__(
        self,
        headers: Mapping[str, Header],
        weight_map: Mapping[str, str] | None = None,
        aside: Collection[str] = frozenset(),
    ) -> None:
        """Takes the files' headers.

        Args:
            headers: by file name.
            weight_map: which file counts; of a tensor that it does not name, the last one that holds it.
            aside: names of tensors that do not count, wherever they lie.
        """
        self.headers, self.weight_map = headers, weight_map or {}
        self.shard_of: dict[str, str] = {}
        for shard, header in headers.items():
            for name in header.tensors:
                if name not in self.shard_of or self.weight_map.get(name, shard) == shard:
                    self.shard_of[name] = shard
        for name in aside:
            self.shard_of.pop(name, None)
        self.tensors = {name: headers[shard].tensors[name] for name, shard in self.shard_of.items()}

    def counts(self, shard: str, name: str) -> bool:
        """Returns whether a tensor of a file is the one that counts."""
        return self.shard_of.get(name) == shard

    @cached_property
    def copies(self) -> Mapping[str, tuple[str, ...]]:
        """The tensors of each file that do not count; files without any are left out."""
        if len(self.tensors) == sum(len(header.tensors) for header in self.headers.values()):
            return {}
        found = {
            shard: tuple(name for name in header.tensors if not self.counts(shard, name))
            for shard, header in self.headers.items()
        }
        return {shard: names for shard, names in found.items() if names}
