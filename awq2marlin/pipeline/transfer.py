"""Files in, files out: everything that is decided before a byte is written.

A conversion and the way back are both a `Transfer`: headers in, headers out, and spans of bytes between them. What runs
it (`pipeline.run`) knows neither formats nor directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from awq2marlin.checkpoint.counterparts import Row
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.io.digest import FileDigest
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo
from awq2marlin.io.source import Source
from awq2marlin.layout.repack import Place, Repack, Rewrite


class Span(NamedTuple):
    """A run of a shard's data and what is done with it; offsets are into the data, in bytes.

    Attributes:
        source: (start, end) in the source; empty for what is made of nothing.
        target: (start, end) in the target; empty for what is only looked at.
        rewrite: how it is rewritten; None copies it.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    rewrite: Rewrite | None


@dataclass(frozen=True)
class ShardPlan:
    """How one file becomes one file. Picklable.

    Attributes:
        name: the file's name, the same in source and output.
        source: the source's header.
        target: the output's header.
        spans: runs that cover the data of both, in order.
    """

    name: str
    source: Header
    target: Header
    spans: tuple[Span, ...]

    @property
    def beside(self) -> list[Place]:
        """What has to be read of other files: tensors of modules that lie in several."""
        places = (span.rewrite.beside for span in self.spans if span.rewrite is not None)
        return [place for place in places if place is not None and place.file != self.name]


class Expected(NamedTuple):
    """What a shard has to be: digests that were recorded when it was converted.

    Attributes:
        source: what is read.
        target: what is written; None if it is not known.
    """

    source: FileDigest
    target: FileDigest | None


@dataclass(frozen=True)
class Transfer:
    """All that one run reads and writes.

    Attributes:
        verb: what progress calls it.
        source: where it is read from.
        shards: every safetensors file, sorted by name.
        carried: files that are copied as they are, with what they must be where that was recorded.
        texts: files that are written as they stand here.
        later: names of files that the run makes when all others are there.
        config: bytes of ``config.json``, which comes last.
        digest: of everything that decides the output's bytes; a journal of another is refused.
        expected: what shards must be, by name; empty where nobody knows it yet.
        kept: names of files that its output has already; see `keeping`.
    """

    verb: Literal["convert", "revert"]
    source: Source
    shards: tuple[ShardPlan, ...]
    carried: Mapping[str, FileDigest | None]
    texts: Mapping[str, bytes]
    later: tuple[str, ...]
    config: bytes
    digest: str
    expected: Mapping[str, Expected] = field(default_factory=dict)
    kept: Set[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Every file that the run writes, sorted."""
        shards = [shard.name for shard in self.shards]
        return sorted({*shards, *self.carried, *self.texts, *self.later, CONFIG_FILENAME} - self.kept)

    def keeping(self, names: Set[str]) -> Transfer:
        """Returns what is left to do where the output has some of the files already: nobody writes or removes them.

        Args:
            names: of these files; ``config.json`` may be one of them.
        """
        return replace(
            self,
            shards=tuple(shard for shard in self.shards if shard.name not in names),
            carried={name: file for name, file in self.carried.items() if name not in names},
            texts={name: data for name, data in self.texts.items() if name not in names},
            kept=names,
        )


def spans_of(rows: Iterable[Row], index: TensorIndex) -> tuple[Span, ...]:
    """Returns the spans of a shard; neighbours that are only copied are joined, so that small tensors cost nothing.

    Args:
        rows: of the shard, in the order of both files; with the offsets of both.
        index: all files that are read.
    """
    spans: list[Span] = []
    read, written = 0, 0
    for row in rows:
        rewrite = None if row.is_copy else _placed(row.rewrite, index)
        span = Span(_range(row.source, read), _range(row.target, written), rewrite)
        read, written = span.source[1], span.target[1]
        if span.rewrite is None and spans and spans[-1].rewrite is None:
            before = spans.pop()
            span = Span((before.source[0], read), (before.target[0], written), None)
        spans.append(span)
    return tuple(spans)


def _placed(rewrite: Rewrite | None, index: TensorIndex) -> Rewrite | None:
    """Returns a rewrite that knows where the tensor lies that it reads besides, if it does."""
    if not isinstance(rewrite, Repack) or rewrite.companion is None:
        return rewrite
    name = rewrite.companion.source.name
    tensor, file = index.tensors[name], index.shard_of[name]
    start = index.headers[file].data_start
    place = Place(file, start + tensor.start, start + tensor.end)
    return replace(rewrite, companion=replace(rewrite.companion, place=place))


def _range(tensor: TensorInfo | None, position: int) -> tuple[int, int]:
    return (position, position) if tensor is None else (tensor.start, tensor.end)
