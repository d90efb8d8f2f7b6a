"""Modules that an engine cuts elsewhere than at Marlin's tiles: brought back to plain order, where any cut is one.

An engine cuts and fuses modules as its number of GPUs and its models want. Where that is not at whole tiles of a
Marlin tensor, a loader gives the engine the module's tensors in AWQ's plain rows, without padding, lets the engine cut
them as it cuts a source, and repacks what is left of them. So whatever the source can be cut into, its converted form
can, too; only not without work at load.

The engine cuts first, and only the tiles that cover what is left are brought back: a rank reads and handles its part of
a module, not all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from logging import Logger
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from awq2marlin.formats.base import Quantization
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N
from awq2marlin.layout.modules import part_shape
from awq2marlin.layout.packing import pack_factor
from awq2marlin.layout.repack import Bytes, PartLayout

#: The first row or column, and the one past the last.
_Span = tuple[int, int]


def plain_part(part: str, tensor: torch.Tensor, module: str, size_k: int, quantization: Quantization) -> PlainPart:
    """Returns a tensor of a whole Marlin module in AWQ layout, without the module's padding.

    Args:
        part: ``qweight``, ``qzeros`` or ``scales``.
        tensor: as it lies in the file, on any device.
        module: its name, by which it is known whether it is padded.
        size_k: K of the module, without padding.
        quantization: what the checkpoint's config says.

    Returns:
        On the CPU: int32 [K, N/f], int32 [G, N/f], or [G, N].
    """
    scheme = quantization.scheme
    rows, columns = tensor.shape
    if part == "qweight":
        rows, columns = rows * GPTQ_MARLIN_TILE, columns // GPTQ_MARLIN_TILE
    size_n = columns if part == "scales" else columns * scheme.pack_factor
    padded_k = rows if part == "qweight" else size_k if scheme.group_size == -1 else rows * scheme.group_size
    layout = MARLIN_NATIVE.layout(part, padded_k, size_n, scheme)
    true_k, true_n = quantization.padded_modules.get(module, (size_k, size_n))
    true_rows, true_columns = part_shape(part, true_k, true_n, scheme)
    return PlainPart(tensor, layout, (0, true_rows), (0, true_columns))


class PlainPart(torch.Tensor):
    """A tensor of a Marlin module, or what was cut out of it, in plain order: a tensor to an engine's loaders.

    It holds the Marlin tensor. Cutting it notes where the cut is; whatever else is done with it is done with a plain
    tensor, which is made for that from the tiles that cover it.
    """

    #: The Marlin tensor, and how it holds the part.
    _tiled: torch.Tensor
    _layout: PartLayout
    #: What of the plain tensor this is.
    _rows: _Span
    _columns: _Span

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, tiled: torch.Tensor, layout: PartLayout, rows: _Span, columns: _Span) -> PlainPart:
        """Returns rows and columns of a tensor.

        Args:
            tiled: the whole Marlin tensor, on any device.
            layout: how it holds the part.
            rows: of the plain tensor.
            columns: of the plain tensor, as its words or scales count.
        """
        left, right = _covering(columns, _column_unit(layout))
        made: PlainPart = cls._make_wrapper_subclass(
            cls,
            (rows[1] - rows[0], columns[1] - columns[0]),
            strides=((right - left) * _column_unit(layout), 1),  # those of what `read` returns
            dtype=tiled.dtype,
            # It has no memory. As a tensor of the CPU it could be given to another one as its data, which would then
            # end the process when it is read; so torch takes it for one of this kind, and gets the CPU for an answer.
            device=torch.device("meta"),
            dispatch_device=True,
        )
        made._tiled, made._layout, made._rows, made._columns = tiled, layout, rows, columns
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Cuts without reading; does everything else with plain tensors.

        Raises:
            TypeError: if it would be written to, which the Marlin tensor would not know of, or become the data of
                another tensor, for which it has no memory.
        """
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:  # what torch asks before ``.data =``
            raise TypeError("a tensor in plain order has no memory that could be another's data; clone it first")
        is_cut = func is torch.ops.aten.slice.Tensor and len(args) <= 4  # the fifth would be a step
        if is_cut:
            return args[0]._cut(*args[1:])
        if any(isinstance(each, cls) for each in _written(func, args, kwargs or {})):
            raise TypeError(f"{func} would write to a tensor that is only read; clone it first")
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __dlpack__(self, **options: Any) -> Any:
        """Returns a plain tensor for another library; this one has no memory whose address it could take."""
        return self.read().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """Returns where that tensor is: on the CPU."""
        return torch.empty(0).__dlpack_device__()

    def read(self) -> torch.Tensor:
        """Returns a new plain tensor of the same values, on the CPU."""
        layout, unit = self._layout, _column_unit(self._layout)
        (top, bottom), (left, right) = _covering(self._rows, layout.band), _covering(self._columns, unit)
        tile = unit * layout.band  # columns of the Marlin tensor
        tiles = self._tiled.detach()[top:bottom, left * tile : right * tile].cpu().contiguous()
        shape = ((bottom - top) * layout.band, (right - left) * unit)
        plain = torch.empty(shape, dtype=self.dtype, device="cpu")
        covered = replace(layout, rows=shape[0], columns=(right - left) * MARLIN_TILE_N)
        covered.unpack(_bytes_of(tiles), _bytes_of(plain))
        rows, columns = (
            slice(span[0] - first, span[1] - first)
            for span, first in ((self._rows, top * layout.band), (self._columns, left * unit))
        )
        return plain[rows, columns]

    def _cut(self, dim: int = 0, start: int | None = None, end: int | None = None) -> PlainPart:
        spans = [self._rows, self._columns]
        first, last = spans[dim]
        begin, stop, _ = slice(start, end).indices(last - first)
        spans[dim] = (first + begin, first + max(begin, stop))
        return PlainPart(self._tiled, self._layout, *spans)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yields the arguments of an operator that it writes to, those in lists one by one."""
    for number, each in enumerate(func._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            yield from tree_leaves(args[number] if number < len(args) else kwargs.get(each.name))


def _column_unit(layout: PartLayout) -> int:
    """Returns how many words or scales of a row lie in one tile."""
    return MARLIN_TILE_N if layout.part == "scales" else MARLIN_TILE_N // pack_factor(layout.bits)


def _covering(span: _Span, unit: int) -> _Span:
    """Returns which whole units cover a span."""
    return span[0] // unit, -(-span[1] // unit)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """Returns the bytes of a contiguous tensor on the CPU, not copied."""
    found: Bytes = tensor.view(torch.uint8).flatten().numpy()
    return found


class Note:
    """A line in a process's log that says once that modules are cut within tiles."""

    def __init__(self, log: Logger) -> None:
        """Has said nothing yet.

        Args:
            log: the engine's.
        """
        self._log, self._is_said = log, False

    def say(self, module: str, reason: str) -> None:
        """Says it, with the first module as an example.

        Args:
            module: its name.
            reason: why it cannot be loaded as it lies in the file, in words.
        """
        if not self._is_said:
            self._is_said = True
            self._log.info(
                "modules are brought back to plain order, cut or joined, and repacked, which makes loading slower; "
                "the first is %s: %s",
                module,
                reason,
            )
