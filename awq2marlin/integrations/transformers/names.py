"""From names in the checkpoint's files to places in the model, by the model's own renamings.

Transformers renames tensors while it loads, and fuses the experts of a layer into 3-D parameters under new names. What
it would do with a module's dense ``weight`` tells where a packed module belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.core_model_loading import rename_source_key as rename

from awq2marlin.errors import CheckpointError, Problem, printable
from awq2marlin.layout.modules import ModulePlan, module_name

#: An expert's number in a module's name: what stands before it, the number, the projection's name.
_EXPERT = re.compile(r"^(.*)\.(\d+)\.([^.]+)$")

#: Parameters of Transformers' fused experts, and the projections that they hold, in order.
_FUSED = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


@dataclass
class ExpertsPlan:
    """The packed experts of one layer.

    Attributes:
        members: module plan of every expert's projection, by expert number and name in the file.
        roles: ``gate``, ``up``, ``down``: the projection's name in the file.
    """

    members: dict[int, dict[str, ModulePlan]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where packed modules belong in the model.

    Attributes:
        linears: module plan by the name of the model's linear layer.
        experts: plan by the name of the model's experts module.
        absent: modules of the file that this model does not have.
    """

    linears: dict[str, ModulePlan]
    experts: dict[str, ExpertsPlan]
    absent: list[str]


class Renamings:
    """The renamings and conversions that Transformers applies to a checkpoint's names for one model."""

    def __init__(self, model: Any, transforms: Sequence[Any] | None = None) -> None:
        """Takes those of the model, or the ones that a load has settled on."""
        transforms = get_model_conversion_mapping(model) if transforms is None else transforms
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()

    def knows(self, name: str) -> bool:
        """Returns whether the model has a tensor of this name."""
        return name in self._known

    def apply(self, name: str) -> tuple[str, Any, int]:
        """Returns a tensor's name in the model; the converter that takes it, and as which of its sources.

        Args:
            name: the tensor's name in the file.
        """
        renamed, pattern = rename(name, self._renamings, self._converters, self._prefix, self._known)
        if renamed not in self._known and name in self._known:  # as Transformers does
            renamed, pattern = rename(name, [], [], self._prefix, self._known)
        if pattern is None:
            return renamed, None, 0
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        return renamed, converter, converter.source_patterns.index(pattern)

    def reached(self, names: Iterable[str]) -> set[str]:
        """Returns the model's tensors that a file with these names fills."""
        found = set()
        for name in names:
            renamed, converter, _ = self.apply(name)
            found.add(renamed)
            if converter is not None:
                first, *others = converter.target_patterns
                found |= {renamed.replace(first, other) for other in others}
        return found


def find_places(model: Any, modules: Mapping[str, ModulePlan]) -> Places:
    """Returns where in the model every packed module belongs.

    Args:
        model: as Transformers made it, before any module is replaced.
        modules: the quantized modules, by their names in the file.

    Raises:
        CheckpointError: naming the modules that the model joins or splits in a way that packed tensors cannot follow.
    """
    renamings, problems = Renamings(model), []
    places = Places({}, {}, [])
    for name, module in modules.items():
        target, converter, source = renamings.apply(module_name(name, "weight"))
        parent, _, parameter = target.rpartition(".")
        expert = _EXPERT.match(name)
        if not renamings.knows(target):
            places.absent.append(name)
        elif converter is None:
            places.linears[parent] = module
        elif expert and _merges_experts(converter) and source < len(_FUSED.get(parameter, ())):
            plan = places.experts.setdefault(parent, ExpertsPlan())
            plan.roles[_FUSED[parameter][source]] = expert[3]
            plan.members.setdefault(int(expert[2]), {})[expert[3]] = module
        else:
            problems.append(
                Problem(
                    "",
                    name,
                    "unsupported-model",
                    f"this model's code joins or splits it into {printable(target)}, which packed weights do not "
                    "support. 'awq2marlin revert' gives the AWQ checkpoint back",
                )
            )
    if problems:
        raise CheckpointError(problems)
    return places


def _merges_experts(converter: Any) -> bool:
    operations = {type(each) for each in converter.operations}
    return MergeModulelist in operations and operations <= {MergeModulelist, Concatenate}
