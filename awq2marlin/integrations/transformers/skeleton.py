"""Prepares a model that holds no weights yet: packed layers in the place of those that the checkpoint quantizes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from awq2marlin.checkpoint.converted import converted_modules
from awq2marlin.checkpoint.index import index_of, read_index
from awq2marlin.errors import CheckpointError, Problem, refuse
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.names import INDEX_FILENAME
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.gemm.linear import MarlinLinear
from awq2marlin.integrations.transformers.experts import MarlinExperts, activation_of
from awq2marlin.integrations.transformers.names import ExpertsPlan, Renamings, find_places
from awq2marlin.io.folder import Folder, read_header_of
from awq2marlin.io.safetensors import TensorIndex
from awq2marlin.layout.marlin import padded_shapes
from awq2marlin.layout.modules import ModulePlan, module_name

logger = logging.getLogger(__name__)

#: The parameters of a module of Transformers' experts that are packed.
_PROJECTIONS = {"gate_up_proj", "up_proj", "down_proj"}


def read_headers(paths: Iterable[str]) -> TensorIndex:
    """Reads the headers of a checkpoint's files.

    Args:
        paths: safetensors files.

    Raises:
        CheckpointError: if a file is no sound safetensors file, or two hold a tensor of one name and no index beside
            them says which counts.
    """
    found = list(map(Path, paths))
    headers = {path.name: read_header_of(path, path.name) for path in found}
    names = [name for header in headers.values() for name in header.tensors]
    place = found[0].parent / INDEX_FILENAME if found else None
    if len(found) > 1 and place is not None and place.is_file():
        weight_map = read_index(Folder.at(place.parent))
        if weight_map.keys() >= {name for name, count in Counter(names).items() if count > 1}:
            return index_of(headers, weight_map, MARLIN_NATIVE)
    index = TensorIndex(headers)
    for file, header in headers.items():
        for name in header.tensors:
            if index.shard_of[name] != file:
                message = f"{index.shard_of[name]} also holds a tensor of this name"
                raise refuse("duplicate-tensor", message, file=file, tensor=name)
    return index


class Skeleton:
    """Replaces a model's modules by packed ones.

    Attributes:
        kept: plans of the modules that the files hold in AWQ layout, by their names in the model.
        padded: plans of the modules that the files hold padded, likewise.
    """

    def __init__(self, model: Any, headers: TensorIndex, quantization: Quantization, dtype: torch.dtype) -> None:
        """Takes what is known before any tensor is read.

        Args:
            model: as Transformers made it, without weights.
            headers: of the checkpoint's files.
            quantization: what its config says.
            dtype: of scales and activations.
        """
        self._model, self._headers = model, headers
        self._quantization, self._dtype = quantization, dtype
        self._dtypes: dict[str, torch.dtype] = {}
        self.kept: dict[str, ModulePlan] = {}
        self.padded: dict[str, ModulePlan] = {}

    def build(self) -> None:
        """Replaces every module that the files quantize.

        Raises:
            CheckpointError: naming what is missing from the files, or does not fit the model.
        """
        modules = converted_modules(MARLIN_NATIVE, self._headers.tensors, self._quantization, self._headers.shard_of)
        places = find_places(self._model, modules)
        problems: list[Problem] = []
        for name, plan in places.linears.items():
            problems += self._replace_linear(name, plan)
        for name, experts in places.experts.items():
            problems += self._replace_experts(name, experts)
        if problems:
            raise CheckpointError(problems)
        self._dtypes = {name: parameter.dtype for name, parameter in self._model.named_parameters()}

    def finish(self) -> None:
        """Brings the loaded model to the types it was built with, freezes packed layers and moves experts together.

        Some versions of Transformers load a tensor that was renamed in the type of the file.
        """
        wide = [re.compile(pattern.replace("*", ".*")) for pattern in self._model._get_dtype_plan(self._dtype)]
        for name, parameter in self._model.named_parameters():
            if parameter.dtype != self._dtypes[name] and not any(pattern.search(name) for pattern in wide):
                parameter.data = parameter.data.to(self._dtypes[name])
        apart: set[str] = set()
        for module in self._model.modules():
            if isinstance(module, MarlinLinear):
                module.requires_grad_(False)
            if isinstance(module, MarlinExperts):
                module.stack()
                apart |= {module.reason_apart()} - {""}
        if apart:
            logger.warning("experts are computed one after the other, which is slower: %s", "; ".join(sorted(apart)))

    def _replace_linear(self, name: str, plan: ModulePlan) -> list[Problem]:
        old = self._model.get_submodule(name)
        if not isinstance(old, torch.nn.Linear):
            return [self._unfit(plan, f"the model's {name} is a {type(old).__name__}, not a linear layer")]
        unfit = self._size_problems(plan, name, old.in_features, old.out_features)
        if unfit:
            return unfit
        new = self._packed(name, plan, with_bias=old.bias is not None)
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, new)
        self._untie(name)
        return []

    def _untie(self, name: str) -> None:
        """Has a packed layer keep weights of its own where the model's config ties them to another's.

        Transformers does the same if the files hold both, and they differ.
        """
        tied, weight = self._model.all_tied_weights_keys, f"{name}.weight"
        apart = [target for target, source in tied.items() if weight in (target, source)]
        for target in apart:
            del tied[target]
        if apart:
            for config in (self._model.config, self._model.config.get_text_config()):
                config.tie_word_embeddings = False
            logger.warning(
                "config.json says tie_word_embeddings, but the checkpoint has a quantized %s, which is used", name
            )

    def _size_problems(self, plan: ModulePlan, name: str, size_k: int, size_n: int) -> list[Problem]:
        """Returns what is wrong with a module that the model wants of this size, under this name."""
        if (plan.size_k, plan.size_n) == (size_k, size_n):
            return []
        there = f"the model's {name} has K={size_k}, N={size_n}"
        return [self._unfit(plan, f"the file has K={plan.size_k}, N={plan.size_n}, {there}")]

    def _unfit(self, plan: ModulePlan, message: str) -> Problem:
        shard = self._headers.shard_of[module_name(plan.name, "qweight")]
        return Problem(shard, plan.name, "contradiction", message)

    def _packed(self, name: str, plan: ModulePlan, *, with_bias: bool = False) -> MarlinLinear:
        """Returns the empty layer for a module of the file; remembers those that saving treats specially."""
        bits, group_size = self._quantization.bits, self._quantization.group_size
        if not plan.converted:
            padded_k, padded_n = padded_shapes([(plan.size_k, plan.size_n)], group_size)[0]
            plan = self.kept[name] = replace(plan, padded_k=padded_k, padded_n=padded_n)
        elif plan.is_padded:
            self.padded[name] = plan
        return MarlinLinear(
            plan.size_k,
            plan.size_n,
            num_bits=bits,
            group_size=group_size,
            zero_points="qzeros" in plan.parts,
            bias=with_bias or module_name(plan.name, "bias") in self._headers.tensors,
            padded=(plan.padded_k, plan.padded_n),
            dtype=self._dtype,
        )

    def _replace_experts(self, name: str, plan: ExpertsPlan) -> list[Problem]:
        old = self._model.get_submodule(name)
        some = next(member for members in plan.members.values() for member in members.values())
        if not _is_replaceable(old):
            return [self._unfit(some, f"the experts of {type(old).__name__} are not supported packed")]
        if besides := _tensors_besides(old):
            message = (
                f"the experts of {type(old).__name__} also have {', '.join(besides)}; experts with tensors besides "
                "their projections, such as an activation that was learned, are not supported packed"
            )
            return [self._unfit(some, message)]
        needed = {"up", "down", *(["gate"] if old.has_gate else [])}
        problems = [*_missing_experts(plan, old.num_experts, needed), *self._expert_problems(name, plan)]
        if problems:
            return problems
        roles = {role: plan.roles[role] for role in needed}
        layers = {
            number: {each: self._packed(f"{name}.{number}.{each}", members[each]) for each in roles.values()}
            for number, members in plan.members.items()
        }
        parent, _, child = name.rpartition(".")
        activate = old._apply_gate if old.has_gate else old.act_fn
        for parameter in list(old._parameters):  # only its activation lives on
            delattr(old, parameter)
        new = MarlinExperts(layers, roles, activate, activation_of(old))
        setattr(self._model.get_submodule(parent), child, new)
        return []

    def _expert_problems(self, name: str, plan: ExpertsPlan) -> Iterator[Problem]:
        """Yields what is wrong with the experts that are there: their numbers and sizes."""
        old = self._model.get_submodule(name)
        sizes = old.down_proj.shape[1:]
        hidden, inner = reversed(sizes) if getattr(old, "is_transposed", False) else sizes
        for number, members in sorted(plan.members.items()):
            for member in members.values():
                if number >= old.num_experts:
                    message = f"the model's {name} has {old.num_experts} experts, numbered from 0"
                    yield self._unfit(member, message)
                elif member.name.rpartition(".")[2] == plan.roles.get("down"):
                    yield from self._size_problems(member, name, inner, hidden)
                else:
                    yield from self._size_problems(member, name, hidden, inner)

    def refuse_missing(self, transforms: list[Any]) -> None:
        """Compares the prepared model with the files, by the renamings that the load will use.

        Args:
            transforms: Transformers' renamings and conversions.

        Raises:
            CheckpointError: naming every tensor of the model that no file holds.
        """
        model = self._model
        reached = Renamings(model, transforms).reached(self._headers.tensors)
        tied = model.all_tied_weights_keys
        reached |= {target for target, source in tied.items() if source in reached}
        reached |= {source for target, source in tied.items() if target in reached}
        optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        missing = [
            name
            for name in model.state_dict()
            if name not in reached and not any(pattern.search(name) for pattern in optional)
        ]
        if missing:
            message = "the model needs it, but no file of the checkpoint holds it; download the complete checkpoint"
            raise CheckpointError(Problem("", name, "missing-tensor", message) for name in missing)


def _missing_experts(plan: ExpertsPlan, num_experts: int, needed: Iterable[str]) -> list[Problem]:
    """Returns a problem for every projection of an expert that is not there packed."""
    some = next(member for members in plan.members.values() for member in members.values())
    parent_in_file = some.name.rsplit(".", 2)[0]
    message = "the other experts of its layer are packed, but this one is not; all of them must be"
    return [
        Problem("", f"{parent_in_file}.{number}.{projection}", "missing-tensor", message)
        for number in range(num_experts)
        for projection in sorted(plan.roles.get(role, role) for role in needed)
        if projection not in plan.members.get(number, {})
    ]


def _tensors_besides(experts: torch.nn.Module) -> list[str]:
    """Returns the names of an experts module's tensors that are no projections, which nobody would load."""
    names = {name for name, _ in chain(experts.named_parameters(), experts.named_buffers())}
    return sorted(names - _PROJECTIONS)


def _is_replaceable(experts: Any) -> bool:
    """Returns whether an experts module is of the kind whose parts and activation are known."""
    return (
        hasattr(experts, "has_gate")
        and not experts.has_bias
        and not getattr(experts, "has_post_expert_norm", False)
        and getattr(experts, "is_concatenated", True)
        and (hasattr(experts, "_apply_gate") if experts.has_gate else hasattr(experts, "act_fn"))
    )
