"""What a checkpoint format has to say of itself, and how its modules are found in the headers of files.

A format is one class in one file of this folder. It says how its config is recognised, what the tensors of a module
are called and how they are shaped, how each holds its part of the module (see `layout.repack`), how a reader decodes
it slowly and plainly (see `layout.reference`), and what its config looks like. Nothing outside this folder names one,
but loaders, the demonstration and documents.

Every format is a description of the same numbers: codes q [K, N], zero points z [G, N] and scales s [G, N] with
w[k, n] = (q[k, n] - z[k // g, n]) * s[k // g, n].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from awq2marlin.errors import CheckpointError, Problem, enumerated, printable, refuse
from awq2marlin.formats.overrides import NO_OVERRIDES, Overrides
from awq2marlin.formats.serving import Serving
from awq2marlin.io.safetensors import TensorIndex, TensorInfo
from awq2marlin.layout.derived import middle_zero_points
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES, MAX_SIZE_N, num_groups
from awq2marlin.layout.modules import QUANTIZED_PARTS, SCALE_DTYPES, Linear, module_name
from awq2marlin.layout.packing import AWQ_SUPPORTED_BITS
from awq2marlin.layout.repack import PartLayout
from awq2marlin.layout.scheme import Scheme

_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "embed_in", "wte")

#: (tensor, code, message): something that is wrong with one module.
Fault = tuple[str, str, str]


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized, as its config says.

    Attributes:
        scheme: bits, groups and zero points.
        modules_to_not_convert: what a config of AWQ says under this key, unchanged.
        origin: the file that said so.
        awq_modules: of a converted checkpoint, the quantized modules kept in AWQ layout.
        unquantized_modules: of a converted one, the modules with a floating-point weight of two or more dimensions.
        padded_modules: of a converted one, true (K, N) of the modules that were padded.
        quantized_modules: of one that is written, every quantized module.
        layout: the format whose layout the modules have, where a config says which of several; None for its own.
        overrides: what the config says of single modules; see `overrides.contradictions`.
    """

    scheme: Scheme
    modules_to_not_convert: Any = None
    origin: str = ""
    awq_modules: frozenset[str] = frozenset()
    unquantized_modules: frozenset[str] = frozenset()
    padded_modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quantized_modules: frozenset[str] = frozenset()
    layout: Format | None = None
    overrides: Overrides = NO_OVERRIDES

    @property
    def bits(self) -> int:
        """Bits per value, 4 or 8."""
        return self.scheme.bits

    @property
    def group_size(self) -> int:
        """Rows of K that share scales, -1 for all."""
        return self.scheme.group_size

    @property
    def zero_point(self) -> bool:
        """Whether modules have zero points of their own."""
        return self.scheme.zero_point


@dataclass(frozen=True, slots=True)
class StoredModule(Linear):
    """A quantized module, with how the files hold it.

    Attributes:
        layout: the format whose layout its tensors have: mostly the checkpoint's own.
        stored_k: K in the files, padding included.
        stored_n: N in the files, padding included.
    """

    layout: Format
    stored_k: int
    stored_n: int


class DerivedTensor(NamedTuple):
    """A tensor of a module that holds nothing but what follows from the module's shape.

    Attributes:
        suffix: last component of its name.
        dtype: as headers call it, e.g. ``I64``.
        shape: sizes.
        data: returns its bytes; picklable.
        is_optional: whether a source may lack it; a target never writes it then.
        meaning: what it means if it holds something else, for messages.
        is_telling: whether it says what the shapes of the other tensors leave open, so that it is looked at before
            anything is written.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes]
    is_optional: bool = False
    meaning: str = ""
    is_telling: bool = False


class Format(ABC):
    """One checkpoint format. Stateless: there is one instance of each, in `registry`."""

    #: What `inspect` calls it, and the key of the registry.
    name: ClassVar[str]

    #: What messages call it.
    title: ClassVar[str]

    #: What results call the layout of its modules, e.g. ``marlin``.
    layout_name: ClassVar[str]

    #: What people call that layout, if not by the format's title.
    layout_title: ClassVar[str]

    #: The version of the format that is written.
    version: ClassVar[int] = 1

    #: What the default name of an output ends with, e.g. ``-marlin``.
    output_suffix: ClassVar[str] = ""

    #: What a model card of an output says: a warning above all else, what the layout is for, and which library the Hub
    #: shall name.
    warning: ClassVar[str] = ""
    purpose: ClassVar[str] = ""
    library_name: ClassVar[str] = "transformers"

    #: Whether it can be converted from, and to.
    is_source: ClassVar[bool] = False
    is_target: ClassVar[bool] = False

    #: Whether only this package writes it.
    is_own: ClassVar[bool] = False

    #: Whether its modules have a layout that no other format has.
    has_own_layout: ClassVar[bool] = True

    #: Whether its config lists the modules that are kept, padded, or not quantized.
    has_module_lists: ClassVar[bool] = False

    #: The key of a config that says whether there are zero points, and how it says that there are.
    zero_point_key: ClassVar[str] = "zero_point"
    zero_points_said: ClassVar[str] = "zero_point is true"

    #: How a config says that there are no zero points, and what to do to it if there are some after all.
    denial: ClassVar[tuple[str, str]] = ("zero_point: false, or sym: true", "reverse that setting")

    #: The last name component of the tensor that holds each part of a module.
    suffixes: ClassVar[Mapping[str, str]] = {part: part for part in QUANTIZED_PARTS}

    #: The types that each part's tensor may have.
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"qweight": ("I32",), "qzeros": ("I32",), "scales": SCALE_DTYPES}

    #: Parts any of which makes a module a quantized one; `scales` alone may belong to a scaled activation.
    marks: ClassVar[tuple[str, ...]] = ("qweight", "qzeros")

    #: Whether zero points that a symmetric checkpoint stores are no parts, as all are 2^(bits-1), but `derived`.
    drops_middle_zeros: ClassVar[bool] = False

    #: Further tensors that only quantized modules have: one that is alone tells that its module's weight is missing.
    companions: ClassVar[tuple[str, ...]] = ()

    #: Parts whose tensors can be read only with those of another part beside them.
    read_beside: ClassVar[Mapping[str, str]] = {}

    #: What a quantized module must not have besides: last name components.
    foreign_suffixes: ClassVar[tuple[str, ...]] = ("g_idx", "weight")

    # --- the config

    @abstractmethod
    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether a quantization config is one of this format.

        Args:
            document: a quantization config; any object of a stranger's JSON.
            place: where it stands, for messages.

        Raises:
            CheckpointError: if a value that names the format is no string.
        """

    @abstractmethod
    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns what a quantization config says, checked.

        Args:
            document: the config, which the format claims.
            place: where it stands, for messages.

        Raises:
            CheckpointError: if a value is missing, wrong or not supported.
        """

    def write_config(self, quantization: Quantization) -> dict[str, Any]:
        """Returns the quantization config of a checkpoint of this format; one that is only read has none.

        Args:
            quantization: what it has to say.
        """
        raise NotImplementedError

    def title_of(self, quantization: Quantization) -> str:  # noqa: ARG002
        """Returns what messages call a checkpoint of this format, where its config tells several kinds apart."""
        return self.title

    # --- the tensors of a module

    def set_aside(self, names: Collection[str], listed: Collection[str]) -> set[str]:
        """Returns the tensors that do not count, where an index lists those that do.

        A module whose codes are listed is a quantized one, so a weight beside them does not count. Of one whose weight
        is listed, and the codes are not, nothing counts that quantized it.

        Args:
            names: of all tensors.
            listed: names in the index.
        """
        if "weight" not in self.foreign_suffixes:
            return set()
        aside, plain = set(), set()
        for name in names:
            if name == "weight" or name.endswith(".weight"):
                module = name.rpartition(".")[0]
                codes = self.tensor_name(module, "qweight")
                if codes in listed:
                    aside.add(name)
                elif name in listed and codes in names:
                    plain.add(module)
        for name in names if plain else ():
            module, _, suffix = name.rpartition(".")
            if module in plain and name not in listed and suffix not in ("weight", "bias"):
                aside.add(name)
        return aside

    def variant(self, index: TensorIndex) -> Format:  # noqa: ARG002
        """Returns the format that the tensors show, where a config does not tell several apart; mostly this one."""
        return self

    def parts(self, found: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[str, ...]:
        """Returns which of its tensors are parts of a module, in order."""
        is_without = self.drops_middle_zeros and not scheme.zero_point
        return tuple(part for part in QUANTIZED_PARTS if part in found and not (part == "qzeros" and is_without))

    def find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        """Returns the quantized modules of a checkpoint by name, sorted, and everything that is wrong with them.

        Args:
            tensors: every tensor of the checkpoint.
            quantization: what its config says.
            shard_of: the file of each tensor, for messages.
        """
        return find_modules(quantization.layout or self, tensors, quantization, shard_of)

    def as_recorded(self, quantization: Quantization, manifest_version: int) -> Quantization:  # noqa: ARG002
        """Returns how a conversion read a source that wrote a manifest of some version; mostly as it is read today."""
        return quantization

    @abstractmethod
    def sizes(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
        """Returns K and N of a module, padding included, as its tensors show them.

        Args:
            tensors: its tensors by part, ``qweight`` and ``scales`` among them, each of two dimensions.
            scheme: of the checkpoint.
        """

    @abstractmethod
    def shape(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> tuple[int, ...]:
        """Returns the shape of the tensor that holds a part of a module.

        Args:
            part: ``qweight``, ``qzeros`` or ``scales``.
            size_k: K, padding included.
            size_n: N, padding included.
            scheme: of the checkpoint.
        """

    @abstractmethod
    def layout(self, part: str, size_k: int, size_n: int, scheme: Scheme) -> PartLayout:
        """Returns how that tensor holds the part; arguments as for `shape`."""

    def shown(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[float, float, int] | None:  # noqa: ARG002
        """Returns bits, K and groups of a module as its shapes show them by themselves; None if they do not.

        Args:
            tensors: its tensors by part, of the right types and of two dimensions.
            scheme: of the checkpoint.
        """
        return None

    def target_scheme(self, scheme: Scheme) -> Scheme:
        """Returns the scheme that a target of this format has of a source's."""
        return scheme

    def has_zero_points(self, scheme: Scheme) -> bool:
        """Returns whether a module must have a tensor of zero points."""
        return scheme.zero_point

    def derived(self, size_k: int, size_n: int, scheme: Scheme) -> Sequence[DerivedTensor]:  # noqa: ARG002
        """Returns the further tensors that a module of a shape has; none, in most formats."""
        return ()

    def middle_zero_points(self, size_k: int, size_n: int, scheme: Scheme) -> DerivedTensor:
        """Returns the zero points of a symmetric checkpoint, where they may be stored all the same: all are 2^(bits-1).

        Args:
            size_k: K, padding included.
            size_n: N, padding included.
            scheme: of the checkpoint.
        """
        said, cure = self.denial
        meaning = (
            f"the config says that there are no zero points ({said}), but these are not all in the middle; if they "
            f"count, {cure} in a copy of the config"
        )
        layout, (dtype,) = self.layout("qzeros", size_k, size_n, scheme), self.dtypes["qzeros"]
        data = partial(middle_zero_points, layout, layout.rows, size_n)
        shape = self.shape("qzeros", size_k, size_n, scheme)
        return DerivedTensor(self.suffixes["qzeros"], dtype, shape, data, is_optional=True, meaning=meaning)

    def size_fault(self, size_k: int, size_n: int, scheme: Scheme) -> str:  # noqa: ARG002
        """Returns why no module of this format can be of a size, in words; empty if one can."""
        if size_k == 0 or size_n == 0 or size_n > MAX_SIZE_N:
            return f"K={size_k}, N={size_n} is empty or wider than {MAX_SIZE_N} columns"
        return ""

    def faults(
        self, module: str, tensors: Mapping[str, TensorInfo], size_k: int, size_n: int, quantization: Quantization
    ) -> Iterator[Fault]:
        """Yields what is wrong with the shapes of a module's tensors: a size that is none, or what contradicts it.

        Args:
            module: full name.
            tensors: its tensors by part, of the right types and of two dimensions; and ``bias``, if it has one.
            size_k: K as `sizes` says.
            size_n: N as `sizes` says.
            quantization: of the checkpoint.
        """
        del module
        scheme = quantization.scheme
        if reason := self.size_fault(size_k, size_n, scheme):
            yield tensors["qweight"].name, "wrong-shape", reason
            return
        shapes = {part: self.shape(part, size_k, size_n, scheme) for part in self.suffixes}
        for part, shape in {**shapes, "bias": (size_n,)}.items():
            tensor = tensors.get(part)
            if tensor is not None and tensor.shape != shape:
                why = " as the module's others say" if part == "bias" else self._why_that_shape(tensors, scheme)
                message = f"its shape is {list(tensor.shape)}, expected {list(shape)}{why}"
                yield tensor.name, "contradiction", message

    def _why_that_shape(self, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> str:
        """Returns who says what shape a tensor needs, and which bits and groups would fit instead."""
        fits = _fitting_scheme(self, tensors, scheme)
        advice = f"; {_kind(fits)} would fit them all" if fits else ""
        return f", as the config's {_kind(scheme)} and the module's other tensors mean{advice}"

    def serving(
        self,
        scheme: Scheme,  # noqa: ARG002
        place: str,  # noqa: ARG002
        ranks: Sequence[int] = (1,),  # noqa: ARG002
    ) -> tuple[Serving, ...]:
        """Returns how each engine serves an output, or why it cannot; nothing of a format that is only read.

        Args:
            scheme: of the output.
            place: its folder or repository.
            ranks: of an own format, the tensor-parallel sizes in which engines serve it.
        """
        return ()

    # --- which modules it can hold

    def refusal(self, module: str, size_k: int, size_n: int, scheme: Scheme) -> str:  # noqa: ARG002
        """Returns why a module cannot be of this format whatever is done with it, in words; empty if it can."""
        return ""

    def unaligned_reason(self, size_k: int, size_n: int, scheme: Scheme) -> str:  # noqa: ARG002
        """Returns why a module can be of this format only if it is padded, in words; empty if it can as it is."""
        return ""

    def padded_shapes(self, sizes: Sequence[tuple[int, int]], scheme: Scheme) -> list[tuple[int, int]]:  # noqa: ARG002
        """Returns the (K, N) to which modules that engines fuse are padded together."""
        return list(sizes)

    # --- reading it slowly, for comparison: shares nothing with `layout`

    @abstractmethod
    def rows_per_row(self, part: str, scheme: Scheme) -> int:
        """Returns how many rows of the plain values one row of a part's tensor holds.

        0 means that rows of the tensor hold no whole ones, as where it is transposed: it is read as a whole, and its
        columns are looked at, see `rows_per_column`.
        """

    def rows_per_column(self, part: str, scheme: Scheme) -> int:  # noqa: ARG002
        """Returns how many rows of the plain values one column of a part's tensor holds, where its rows hold none.

        0, the default, means that columns hold no whole ones either: `values` then gets all of the tensor.
        """
        return 0

    @abstractmethod
    def values(self, part: str, rows: npt.NDArray[Any], size_k: int, scheme: Scheme) -> npt.NDArray[Any]:
        """Returns the plain values that some rows of a part's tensor hold, or some columns of a transposed one.

        Args:
            part: ``qweight``, ``qzeros`` or ``scales``.
            rows: uint32 [R, words] or, of scales, uint16 [R, N]; of a transposed tensor all rows of some columns.
            size_k: K of the module, padding included.
            scheme: of the checkpoint.

        Returns:
            uint8 [R * rows_per_row, N], or the bits of scales uint16 [R, N]. Rows past the last are left out by the
            caller.
        """

    def values_beside(
        self, part: str, rows: npt.NDArray[Any], beside: npt.NDArray[Any], size_k: int, scheme: Scheme
    ) -> npt.NDArray[Any]:
        """Returns what `values` does for a part of `read_beside`.

        Args:
            part: which.
            rows: as for `values`.
            beside: the same rows of the other part's tensor.
            size_k: K of the module, padding included.
            scheme: of the checkpoint.
        """
        raise NotImplementedError

    def element_type(self, part: str) -> npt.DTypeLike:
        """Returns the type in which `values` takes a part's tensor: 32-bit words, or the 16 bits of a scale."""
        return np.uint16 if part == "scales" else np.uint32

    def tensor_name(self, module: str, part: str) -> str:
        """Returns the full name of the tensor that holds a part of a module."""
        return module_name(module, self.suffixes[part])


def find_modules(
    format: Format,
    tensors: Mapping[str, TensorInfo],
    quantization: Quantization,
    shard_of: Mapping[str, str],
    *,
    among: Callable[[str], bool] = lambda _module: True,
) -> tuple[dict[str, StoredModule], list[Problem]]:
    """Returns the quantized modules of one layout by name, sorted, and everything that is wrong with them.

    Args:
        format: the format that they are of.
        tensors: every tensor of the checkpoint.
        quantization: what its config says.
        shard_of: the file of each tensor, for messages.
        among: answers whether a module is looked at.
    """
    problems: list[Problem] = []
    modules = {}
    parts_of = {
        name: parts
        for name, parts in sorted(_parts_of_modules(format, tensors, shard_of, problems).items())
        if among(name) and any(format.suffixes[part] in parts for part in format.marks)
    }
    for name, parts in parts_of.items():
        faults = list(_module_faults(format, name, parts, tensors, quantization))
        if faults:
            first = module_name(name, min(parts))
            for tensor, code, message in faults:
                problems.append(Problem(shard_of.get(tensor, shard_of[first]), tensor, code, message))
            continue
        found = _tensors_of(format, name, parts, tensors)
        size_k, size_n = format.sizes(found, quantization.scheme)
        present = format.parts(found, quantization.scheme)
        modules[name] = StoredModule(name, size_k, size_n, present, format, size_k, size_n)
    problems += _lonely(format, parts_of, tensors, shard_of)
    if any(problem.code == "contradiction" for problem in problems):
        problems = _with_mixed(problems, format, parts_of, tensors, quantization.scheme, shard_of)
    return modules, problems


def _parts_of_modules(
    format: Format, tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, str], problems: list[Problem]
) -> dict[str, set[str]]:
    """Returns the last name components that every module has, as far as they matter here."""
    known = {*format.suffixes.values(), *format.foreign_suffixes}
    parts_of: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        if suffix not in known:
            continue
        if not name.startswith("."):
            parts_of[module].add(suffix)
        elif suffix != "weight":
            message = "its name begins with a dot, so its module has no name; rename it"
            problems.append(Problem(shard_of[name], name, "bad-name", message))
    return parts_of


def _tensors_of(
    format: Format, module: str, parts: set[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    found = {
        part: tensors[format.tensor_name(module, part)] for part, suffix in format.suffixes.items() if suffix in parts
    }
    bias = tensors.get(module_name(module, "bias"))
    return found if bias is None else {**found, "bias": bias}


def _module_faults(
    format: Format, module: str, parts: set[str], tensors: Mapping[str, TensorInfo], quantization: Quantization
) -> Iterator[Fault]:
    """Yields what is wrong with one module."""
    if "g_idx" in parts and "g_idx" in format.foreign_suffixes:
        yield module_name(module, "g_idx"), "foreign-format", f"this is a GPTQ module; {format.title} has no row order"
        return
    if "weight" in parts:
        if format.suffixes["qweight"] not in parts:
            message = f"beside {', '.join(sorted(parts - {'weight'}))}, it is not of {format.title}'s layout"
            yield module_name(module, "weight"), "foreign-format", message
            return
        message = f"the module has both a {format.suffixes['qweight']} and a weight"
        yield module_name(module, "weight"), "contradiction", message
    with_zeros = format.has_zero_points(quantization.scheme)
    required = ["qweight", "scales", *(["qzeros"] if with_zeros else [])]
    missing = [part for part in required if format.suffixes[part] not in parts]
    for part in missing:
        why = f" ({format.zero_points_said})" if part == "qzeros" else ""
        message = f"it is missing, but the module has {enumerated(sorted(parts))}{why}; download the file again"
        yield format.tensor_name(module, part), "missing-tensor", message
    found = _tensors_of(format, module, parts, tensors)
    unfit = list(_type_faults(format, found))
    yield from unfit
    if missing or unfit:
        return
    size_k, size_n = format.sizes(found, quantization.scheme)
    unfit = list(format.faults(module, found, size_k, size_n, quantization))
    yield from unfit
    if not unfit:
        yield from _derived_faults(module, format.derived(size_k, size_n, quantization.scheme), tensors)


def _derived_faults(
    module: str, derived: Sequence[DerivedTensor], tensors: Mapping[str, TensorInfo]
) -> Iterator[Fault]:
    for each in derived:
        name = module_name(module, each.suffix)
        tensor = tensors.get(name)
        if tensor is None:
            if not each.is_optional:
                yield name, "missing-tensor", "it is missing, but the module has its other tensors"
        elif (tensor.dtype, tensor.shape) != (each.dtype, each.shape):
            found, needed = (f"{one.dtype} {list(one.shape)}" for one in (tensor, each))
            yield name, "contradiction", f"it is {found}, expected {needed} like the module's other tensors"


def _lonely(
    format: Format, modules: Mapping[str, set[str]], tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, str]
) -> Iterator[Problem]:
    """Yields the weights that are missing of modules of which only a companion is there."""
    for name in sorted(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix in format.companions and module not in modules:
            message = f"it is missing, but the module has {suffix}; download the file again"
            yield Problem(shard_of[name], format.tensor_name(module, "qweight"), "missing-tensor", message)


def _with_mixed(
    problems: list[Problem],
    format: Format,
    modules: Mapping[str, set[str]],
    tensors: Mapping[str, TensorInfo],
    scheme: Scheme,
    shard_of: Mapping[str, str],
) -> list[Problem]:
    """Returns, in the place of all contradictions, the first two modules of different bits or groups, if there are."""
    kinds: dict[str, _Kind] = {}
    for name, parts in modules.items():
        found = _tensors_of(format, name, parts, tensors)
        if {"qweight", "scales"} <= found.keys() and not any(_type_faults(format, found)):
            kind = _Kind.of(format.shown(found, scheme))
            kinds |= {} if kind is None else {name: kind}
    if len({kind.bits for kind in kinds.values()}) == 1 and frozenset.intersection(
        *(kind.group_sizes for kind in kinds.values())
    ):
        return problems  # one kind fits them all: it is the config that is wrong
    said = _Kind(scheme.bits, frozenset({scheme.group_size}))
    usual = next((name for name, kind in kinds.items() if kind.agrees_with(said)), next(iter(kinds), ""))
    kinds |= {usual: said} if usual and kinds[usual].agrees_with(said) else {}
    odd = next((name for name, kind in kinds.items() if not kind.agrees_with(kinds[usual])), None)
    if odd is None:
        return problems
    tensor = format.tensor_name(odd, "qweight")
    message = (
        f"this module has {kinds[odd]}, but {printable(usual)} has {kinds[usual]}; only checkpoints with "
        "one kind of quantization for all modules are converted; look for another version of this model"
    )
    others = [problem for problem in problems if problem.code != "contradiction"]
    return [Problem(shard_of[tensor], tensor, "foreign-format", message), *others]


class _Kind(NamedTuple):
    """Bits and groups, as the shapes of a module show them.

    Attributes:
        bits: 4 or 8.
        group_sizes: those that are supported and fit its groups; several fit where there is one group.
    """

    bits: int
    group_sizes: frozenset[int]

    @classmethod
    def of(cls, shown: tuple[float, float, int] | None) -> _Kind | None:
        """Returns what bits, K and groups mean; None if they mean nothing."""
        bits, size_k, groups = shown or (0, 0, 0)
        if bits not in AWQ_SUPPORTED_BITS or size_k % 1:
            return None
        fit = frozenset(size for size in MARLIN_SUPPORTED_GROUP_SIZES if num_groups(int(size_k), size) == groups)
        return cls(int(bits), fit) if fit else None

    def agrees_with(self, other: _Kind) -> bool:
        """Returns whether a checkpoint of one kind may have modules of both."""
        return self.bits == other.bits and not self.group_sizes.isdisjoint(other.group_sizes)

    def __str__(self) -> str:
        """Returns it in words."""
        return _kind(Scheme(self.bits, min(self.group_sizes), zero_point=False))


def _kind(scheme: Scheme) -> str:
    """Returns bits and groups in words."""
    groups = "one group" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits in {groups}"


def _fitting_scheme(format: Format, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> Scheme | None:
    """Returns a scheme of other bits or groups that all shapes of a module agree with, if there is one.

    Where several do, it is the one of the smallest groups.
    """
    found = {part: tensors[part] for part in format.suffixes if part in tensors}
    for bits, group_size in product(AWQ_SUPPORTED_BITS, sorted(MARLIN_SUPPORTED_GROUP_SIZES, key=_rows_of_group)):
        other = replace(scheme, bits=bits, group_size=group_size)
        size_k, size_n = format.sizes(found, other)
        if all(tensor.shape == format.shape(part, size_k, size_n, other) for part, tensor in found.items()):
            return other
    return None


def _rows_of_group(group_size: int) -> float:
    return math.inf if group_size == -1 else group_size


def _type_faults(format: Format, found: Mapping[str, TensorInfo]) -> Iterator[Fault]:
    for part, dtypes in sorted(format.dtypes.items()):
        tensor = found.get(part)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            yield tensor.name, "wrong-dtype", f"its dtype is {tensor.dtype}, expected {' or '.join(dtypes)}"
        elif len(tensor.shape) != 2:
            yield tensor.name, "wrong-shape", f"expected a 2-D tensor, found shape {list(tensor.shape)}"


def group_bytes(size_k: int, group_size: int) -> bytes:
    """Returns the group of every row in plain order, as int32.

    Args:
        size_k: how many rows.
        group_size: rows of a group; -1 for all.
    """
    return (np.arange(size_k, dtype="<i4") // (size_k if group_size == -1 else group_size)).astype("<i4").tobytes()


#: What it means if rows are not in the order of their groups, and what to do.
ORDERED_BY_ACTIVATIONS = (
    "the rows of the weight are in another order (activation ordering), which is not converted; look for a version of "
    "this model that was quantized without it"
)


def embedding_faults(module: str, tensor: TensorInfo) -> Iterator[Fault]:
    """Yields that a module is an embedding, if it is: that is no linear layer.

    Args:
        module: full name.
        tensor: its weight.
    """
    if module.rpartition(".")[2] in _EMBEDDINGS:
        yield tensor.name, "foreign-format", "this is a quantized embedding; only linear layers are converted"


def require_modules(modules: Mapping[str, Linear], problems: Sequence[Problem], quantization: Quantization) -> None:
    """Refuses a source whose modules do not agree, or that has none.

    Raises:
        CheckpointError: naming every problem.
    """
    if problems:
        raise CheckpointError(problems)
    if not modules:
        raise refuse(
            "no-quantized-modules",
            "the config says that the checkpoint is quantized, but no tensor is; the config does not belong to these "
            "shards: download both again",
            file=quantization.origin,
        )
