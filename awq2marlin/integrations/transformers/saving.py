"""``save_pretrained`` of a loaded model: the same format, with a manifest from which `revert` restores tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from awq2marlin.integrations.saved import complete_saved
from awq2marlin.integrations.transformers.experts import separate_experts
from awq2marlin.layout.modules import ModulePlan

#: Options of ``push_to_hub`` that ``save_pretrained`` passes on.
_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision", "tags")


def save_format_with(model: Any, padded: Mapping[str, ModulePlan]) -> None:
    """Lets a model's ``save_pretrained`` complete what Transformers writes.

    Transformers gives a quantizer no say once the files are written, and a manifest needs their digests; so this one
    model gets a method of its own. Modules kept in AWQ layout are already written so: loading repacked them by a
    conversion, and saving reverses those.

    Args:
        model: a loaded one.
        padded: the modules that the files hold padded, by their names in the model.
    """
    model._marlin_padded_modules = dict(padded)
    model.save_pretrained = MethodType(save_pretrained, model)


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    """Saves a model as Transformers does, then its lists of modules and the manifest.

    Args:
        model: a loaded one.
        args: those of Transformers' ``save_pretrained``.
        kwargs: likewise; ``save_original_format=False`` is refused, because the format has the file's names.

    Raises:
        ValueError: if ``save_original_format`` is False.
    """
    original = type(model).save_pretrained
    if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved
        original(model, *args, **kwargs)
        return
    call = inspect.signature(original).bind(model, *args, **kwargs)
    given = call.arguments
    if not given.get("save_original_format", True):
        raise ValueError("save_original_format=False is not supported: the format keeps the names of the checkpoint")
    push = given.pop("push_to_hub", False)
    extra = given.get("kwargs", {})
    to_hub = {name: extra.pop(name) for name in _HUB_OPTIONS if name in extra}
    to_hub |= {name: given[name] for name in ("token", "max_shard_size") if name in given}
    with separate_experts(model):
        original(*call.args, **call.kwargs)
    if not given.get("is_main_process", True):
        return
    root = Path(given["save_directory"])
    complete_saved(root, _padded_sizes(model, model._marlin_padded_modules))
    if push:  # after the manifest is there, which Transformers' own upload would leave out
        model.push_to_hub(to_hub.pop("repo_id", root.name), **to_hub)


def _padded_sizes(model: Any, padded: Mapping[str, ModulePlan]) -> dict[str, tuple[int, int]]:
    """Returns the true sizes of padded modules, by the names that saving gave them."""
    markers = {f"{name}.qweight": torch.empty(0) for name in padded}
    owner = {id(marker): name.removesuffix(".qweight") for name, marker in markers.items()}
    saved = revert_weight_conversion(model, markers) if markers else {}
    return {
        name.removesuffix(".qweight"): (padded[owner[id(marker)]].size_k, padded[owner[id(marker)]].size_n)
        for name, marker in saved.items()
    }
