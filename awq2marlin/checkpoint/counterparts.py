"""The same model in two formats: which tensor of one file is which tensor of the other, and how it is rewritten.

Planning a conversion, taking it back, comparing two checkpoints and checking that their headers agree are all walks
over the rows of this one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

from awq2marlin.formats.base import DerivedTensor, Format, StoredModule
from awq2marlin.formats.registry import KEPT
from awq2marlin.io.safetensors import Header, TensorIndex, TensorInfo, encode_header
from awq2marlin.layout.derived import Made, Proven, middle_zero_points
from awq2marlin.layout.modules import ModulePlan, module_name
from awq2marlin.layout.repack import Companion, Holder, PartLayout, Repack, Rewrite
from awq2marlin.layout.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor and its counterpart; one of them is missing where it follows from the module's shape.

    Attributes:
        source: the tensor of the source, or None.
        target: the tensor of the target, or None; its offsets are those of a target that holds the rows one after the
            other.
        rewrite: how the first becomes the second; None copies it.
    """

    source: TensorInfo | None
    target: TensorInfo | None
    rewrite: Rewrite | None

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are, be it under another name."""
        return self.rewrite is None or (isinstance(self.rewrite, Repack) and self.rewrite.is_copy)


@dataclass(frozen=True)
class Counterparts:
    """What becomes of a source's modules in a target, tensor by tensor.

    Attributes:
        source: the source's format.
        target: the target's.
        scheme: bits, groups and zero points of the source.
        modules: every quantized module's fate, by name.
        stored: how the source's files hold the modules, where that is not the source's own layout without padding.
    """

    source: Format
    target: Format
    scheme: Scheme
    modules: Mapping[str, ModulePlan]
    stored: Mapping[str, StoredModule] = field(default_factory=dict)

    @cached_property
    def target_scheme(self) -> Scheme:
        """Bits, groups and zero points of the target."""
        return self.target.target_scheme(self.scheme)

    def source_layout_of(self, module: ModulePlan) -> Format:
        """Returns the format whose layout a module has in the source."""
        return self.stored[module.name].layout if module.name in self.stored else self.source

    def stored_sizes(self, module: ModulePlan) -> tuple[int, int]:
        """Returns K and N of a module in the source, padding included."""
        stored = self.stored.get(module.name)
        return (stored.stored_k, stored.stored_n) if stored else (module.size_k, module.size_n)

    def layout_of(self, module: ModulePlan) -> Format:
        """Returns the format whose layout a module has in the target: the target's own, or that of kept modules."""
        return self.target if module.converted else KEPT

    def is_rewritten(self, module: ModulePlan) -> bool:
        """Returns whether a module's tensors are other ones in the target."""
        same_layout = self.layout_of(module) is self.source_layout_of(module)
        same_sizes = self.stored_sizes(module) == (module.padded_k, module.padded_n)
        lacks_zeros = self.target_scheme.zero_point and "qzeros" not in module.parts
        return not same_layout or not same_sizes or lacks_zeros

    @cached_property
    def rewritten(self) -> list[ModulePlan]:
        """The modules whose tensors are other ones in the target."""
        return [module for module in self.modules.values() if self.is_rewritten(module)]

    @cached_property
    def _rewritten_names(self) -> frozenset[str]:
        return frozenset(module.name for module in self.rewritten)

    def repack(self, module: ModulePlan, part: str, file: str = "", name: str = "") -> Repack:
        """Returns how the tensor that holds a part of a rewritten module becomes its counterpart.

        Args:
            module: a rewritten one.
            part: ``qweight``, ``qzeros`` or ``scales``.
            file: where the tensor is read, for messages.
            name: its full name, for messages.
        """
        source, target = self._holders(module, part)
        repack = Repack(source.layout, target.layout, file, name)
        return replace(repack, companion=Companion(*self._holders(module, "scales"))) if repack.needs_scales else repack

    def _holders(self, module: ModulePlan, part: str) -> tuple[Holder, Holder]:
        """Returns the tensors that hold a part of a module, in the source and in the target."""
        formats = self.source_layout_of(module), self.layout_of(module)
        sizes = self.stored_sizes(module), (module.padded_k, module.padded_n)
        source, target = (
            Holder(format.tensor_name(module.name, part), _layout(format, part, *size, self.scheme))
            for format, size in zip(formats, sizes, strict=True)
        )
        return source, target

    def rows(self, file: str, header: Header) -> list[Row]:
        """Returns the rows of one file, in the order of its data.

        Args:
            file: the source's file, for messages.
            header: its header.
        """
        rows: list[Row] = []
        position = 0
        for tensor in header.by_offset:
            source: TensorInfo | None = tensor
            for target, rewrite in self._targets_of(file, tensor, position):
                rows.append(Row(source, target, rewrite))
                source, position = None, target.end if target else position  # what follows is made of nothing
        return rows

    def names(self, file: str, header: Header) -> Iterator[tuple[str, str]]:
        """Yields for every tensor of a target's file the tensor of the source that it stands for, or follows.

        Args:
            file: the source's file, for messages.
            header: its header.
        """
        place = ""
        for row in self.rows(file, header):
            place = row.source.name if row.source else place
            if row.target is not None:
                yield place, row.target.name

    def telling(self, index: TensorIndex) -> Iterator[tuple[str, TensorInfo, Proven]]:
        """Yields the source's tensors that say what the headers leave open, each with its file and what it must say.

        Args:
            index: of the source's tensors.
        """
        for module in self.rewritten:
            for derived in _derived(self.source_layout_of(module), *self.stored_sizes(module), self.scheme).values():
                tensor = index.tensors.get(module_name(module.name, derived.suffix)) if derived.is_telling else None
                if tensor is not None and _is_as_derived(tensor, derived):
                    file = index.shard_of[tensor.name]
                    yield file, tensor, _proven(file, tensor, derived)

    def is_part(self, module: ModulePlan, part: str, tensor: TensorInfo) -> bool:
        """Returns whether a tensor of a part's name is one: a copy that does not count may be of another shape.

        Args:
            module: of the source.
            part: ``qweight``, ``qzeros`` or ``scales``.
            tensor: of the source.
        """
        layout = self.source_layout_of(module)
        shape = layout.shape(part, *self.stored_sizes(module), self.scheme)
        return tensor.shape == shape and tensor.dtype in layout.dtypes[part]

    def target_header(self, header: Header, rows: Iterable[Row]) -> Header:
        """Returns the header of a file of the target.

        Args:
            header: of the source's file.
            rows: its rows.
        """
        targets: dict[str, list[TensorInfo]] = {name: [] for name in header.tensors}
        place = ""
        for row in rows:
            place = row.source.name if row.source else place
            if row.target is not None:
                targets[place].append(row.target)
        return encode_header(header, targets)

    def _targets_of(
        self, file: str, tensor: TensorInfo, position: int
    ) -> Iterator[tuple[TensorInfo | None, Rewrite | None]]:
        """Yields what stands in the place of a tensor, and how it is made: first of the tensor, then of nothing."""
        name, _, suffix = tensor.name.rpartition(".")
        module = self.modules.get(name)
        if module is None or name not in self._rewritten_names:
            yield TensorInfo(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.size), None
            return
        layout = self.source_layout_of(module)
        part = next((part for part in module.parts if layout.suffixes[part] == suffix), None)
        if part is None or not self.is_part(module, part, tensor):
            derived = _derived(layout, *self.stored_sizes(module), self.scheme).get(suffix)
            if derived is None or not _is_as_derived(tensor, derived):  # a bias, or a copy
                yield TensorInfo(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.size), None
            else:
                yield None, _proven(file, tensor, derived)
            return
        layout, repack = self.layout_of(module), self.repack(module, part, file, tensor.name)
        shape = _shape(layout, part, module.padded_k, module.padded_n, self.scheme)
        end = position + repack.target.size
        dtype = tensor.dtype if part == "scales" else layout.dtypes[part][0]
        yield TensorInfo(layout.tensor_name(name, part), dtype, shape, position, end), repack
        if part == "qweight":
            yield from self._made(name, module, layout, end)

    def _made(
        self, name: str, module: ModulePlan, layout: Format, position: int
    ) -> Iterator[tuple[TensorInfo, Rewrite]]:
        """Yields the tensors of a module that only the target has: they follow its weight."""
        if self.target_scheme.zero_point and "qzeros" not in module.parts:
            part = layout.layout("qzeros", module.padded_k, module.padded_n, self.scheme)
            shape = layout.shape("qzeros", module.padded_k, module.padded_n, self.scheme)
            groups = self.scheme.num_groups(module.size_k)
            made = Made(part.size, partial(middle_zero_points, part, groups, module.size_n))
            name_of_part, dtype = layout.tensor_name(name, "qzeros"), layout.dtypes["qzeros"][0]
            yield TensorInfo(name_of_part, dtype, shape, position, position + part.size), made
            position += part.size
        for suffix, derived in _derived(layout, module.padded_k, module.padded_n, self.target_scheme).items():
            if derived.is_optional:
                continue
            size = len(derived.data())
            yield (
                TensorInfo(module_name(name, suffix), derived.dtype, derived.shape, position, position + size),
                Made(size, derived.data),
            )
            position += size


@lru_cache(1024)  # most modules of a model are shaped alike
def _layout(format: Format, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
    return format.layout(part, size_k, size_n, scheme)


@lru_cache(1024)
def _shape(format: Format, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
    return format.shape(part, size_k, size_n, scheme)


def _derived(format: Format, size_k: int, size_n: int, scheme: Scheme) -> dict[str, DerivedTensor]:
    return {derived.suffix: derived for derived in format.derived(size_k, size_n, scheme)}


def _is_as_derived(tensor: TensorInfo, derived: DerivedTensor) -> bool:
    return (tensor.dtype, tensor.shape) == (derived.dtype, derived.shape)


def _proven(file: str, tensor: TensorInfo, derived: DerivedTensor) -> Proven:
    return Proven(file, tensor.name, tensor.size, derived.data, derived.meaning)


def inverse_row(row: Row, file: str) -> Row:
    """Returns the way back of a row: what was made is proven, what was proven is made.

    Args:
        row: of the way there.
        file: the target's file, for messages.
    """
    rewrite = row.rewrite
    if isinstance(rewrite, Made):
        assert row.target is not None
        rewrite = Proven(file, row.target.name, rewrite.size, rewrite.data)
    elif isinstance(rewrite, Proven):
        rewrite = Made(rewrite.size, rewrite.data)
    elif isinstance(rewrite, Repack):
        assert row.target is not None
        rewrite = replace(rewrite.inverse, file=file, name=row.target.name)
    return Row(row.target, row.source, rewrite)
