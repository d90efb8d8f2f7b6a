"""What all layouts of AWQ have in common: a config that names the layout as its version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Format, Quantization
from awq2marlin.formats.config import first_of, method_of, scheme_of, word

#: The keys under which tools name the layout of an AWQ checkpoint; where none is there, it is "gemm".
LAYOUT_KEYS = ("version", "format", "checkpoint_format")

#: Keys that only configs of GPTQ have, for one that does not name its method.
GPTQ_KEYS = ("desc_act", "damp_percent")


def is_llm_awq(document: Mapping[str, Any], place: str) -> bool:
    """Returns whether a config is of the llm-awq repository, whose layout is another."""
    return word(document, "backend", place) in ("llm-awq", "llm_awq")


def awq_layout(document: Mapping[str, Any], place: str) -> str | None:
    """Returns the layout that a config of AWQ names, in small letters; None if it is no config of AWQ.

    Raises:
        CheckpointError: if it names two.
    """
    method = method_of(document, place)
    if method not in ("awq", "") or (not method and any(key in document for key in GPTQ_KEYS)):
        return None
    if is_llm_awq(document, place):
        return None
    named = {key: word(document, key, place) for key in LAYOUT_KEYS}
    layouts = {layout for layout in named.values() if layout}
    if len(layouts) > 1:
        said = ", ".join(f"{key} {printable(layout)!r}" for key, layout in named.items() if layout)
        raise refuse("contradiction", f"it names several AWQ layouts: {said}", file=place)
    return next(iter(layouts), "gemm")


class Awq(Format):
    """A layout of AWQ."""

    #: What configs call it.
    versions: ClassVar[tuple[str, ...]]

    #: The bits that it holds; any, if empty.
    only_bits: ClassVar[tuple[int, ...]] = (4,)

    #: What a config means that does not say whether there are zero points: what tools do that leave it out.
    zero_point_if_unsaid: ClassVar[bool] = True

    #: Whether its kernels read zero points whatever a config says.
    has_always_zero_points: ClassVar[bool] = False

    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether a config names AWQ, or no method, and this layout."""
        return awq_layout(document, place) in self.versions

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns bits, group size and zero points, under the names of any tool."""
        bits = first_of(document, ("bits", "w_bit"), place)
        group_size = first_of(document, ("group_size", "q_group_size"), place)
        zero_point = document.get("zero_point")
        scheme = scheme_of(bits, group_size, self.zero_point_if_unsaid if zero_point is None else zero_point, place)
        if self.only_bits and scheme.bits not in self.only_bits:
            message = (
                f"it is quantized to {scheme.bits} bits, but {self.title} supports 4 bits only; correct a copy of the "
                "config, or look for another version of this model"
            )
            raise refuse("unsupported-bits", message, file=place)
        if self.has_always_zero_points:
            scheme = replace(scheme, zero_point=True)
        return Quantization(scheme, document.get("modules_to_not_convert"), place)
