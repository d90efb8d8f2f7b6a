"""AutoRound checkpoints, in all the packings that it exports integers in.

It has no layout of its own: ``packing_format`` names the one of another tool, that of AWQ "gemm", or of GPTQ's first or
second version, mostly without ``g_idx``. Zero points are always written, also where ``sym`` says that they are all in
the middle. Modules that ``extra_config`` gives 16 bits are not quantized, as their tensors say. What AutoRound exports
as plain AWQ or GPTQ is read as these are. Source: AutoRound 0.16, ``auto_round/export``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from awq2marlin.errors import CheckpointError, Problem, printable, refuse
from awq2marlin.formats.awq_gemm import AWQ_GEMM
from awq2marlin.formats.base import Format, Quantization, StoredModule
from awq2marlin.formats.config import first_of, flag, method_of, scheme_of, word
from awq2marlin.formats.gptq import GPTQ, GPTQ_V2, Gptq
from awq2marlin.formats.overrides import overrides_of
from awq2marlin.io.safetensors import TensorInfo

_METHODS = ("auto-round", "intel/auto-round")

#: The layouts that `packing_format` names. What AutoRound calls simply ``auto_round`` is GPTQ's second version.
_LAYOUTS: dict[str, Format] = {
    "auto_round:auto_awq": AWQ_GEMM,
    "auto_round:awq": AWQ_GEMM,
    "auto_round:auto_gptq": GPTQ,
    "auto_round:gptq": GPTQ,
    "auto_round:gptqmodel": GPTQ_V2,
    "auto_round": GPTQ_V2,
}


class AutoRound(Gptq):
    """AutoRound; its modules have the layouts of others, mostly GPTQ's."""

    has_own_layout = False
    name = layout_name = "auto-round"
    title = layout_title = "AutoRound"

    def claims(self, document: Mapping[str, Any], place: str) -> bool:
        """Returns whether the config names the method."""
        return method_of(document, place) in _METHODS

    def read_config(self, document: Mapping[str, Any], place: str) -> Quantization:
        """Returns bits, group size, whether there are zero points, and whose layout the modules have.

        Raises:
            CheckpointError: if a value is missing, wrong or not supported; naming the packing or what else is not
                converted.
        """
        packing = word(document, "packing_format", place)
        data_type = word(document, "data_type", place) or "int"
        act_bits = document.get("act_bits")
        for wrong, what in (
            (not packing, "its config has no packing_format"),
            (packing not in _LAYOUTS, f"its packing_format is {printable(packing)!r}"),
            (not data_type.startswith("int"), f"its data_type is {printable(data_type)!r}"),
            (act_bits not in (None, 16, 32), f"its activations have act_bits {printable(repr(act_bits))}"),
            (bool(document.get("rotation_config")), "its weights are rotated (rotation_config)"),
        ):
            if wrong:
                raise _unsupported(what, place)
        bits, group_size = (first_of(document, (key,), place) for key in ("bits", "group_size"))
        scheme = scheme_of(bits, group_size, not flag(document, "sym", place), place)
        return Quantization(scheme, origin=place, overrides=overrides_of(document), layout=_LAYOUTS[packing])

    def title_of(self, quantization: Quantization) -> str:
        del quantization
        return self.title

    def _find(
        self, tensors: Mapping[str, TensorInfo], quantization: Quantization, shard_of: Mapping[str, str]
    ) -> tuple[dict[str, StoredModule], list[Problem]]:
        if quantization.layout is AWQ_GEMM:
            return AWQ_GEMM.find(tensors, replace(quantization, layout=None), shard_of)
        return super()._find(tensors, quantization, shard_of)


AUTO_ROUND = AutoRound()


def _unsupported(what: str, place: str) -> CheckpointError:
    known = ", ".join(map(repr, _LAYOUTS))
    message = (
        f"this is an AutoRound checkpoint, but {what}. Only 4-bit and 8-bit integers in the packings {known} are "
        "converted; look for another version of this model"
    )
    return refuse("foreign-format", message, file=place)
