"""What the loader uses of Transformers, and whether the version that is installed has it.

These interfaces change between versions, so they are asked for by name, with the parameters that are passed. The number
of a version newer than those that were tried decides nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from awq2marlin.installing import how_to_install

logger = logging.getLogger(__name__)

#: The first and the last version that the tests ran with.
FIRST_TRIED, LAST_TRIED = (5, 17), (5, 24)

#: Module, name in it, and the parameters that are passed, in their order.
NEEDED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("conversion_mapping", "get_model_conversion_mapping", ("model",)),
    ("core_model_loading", "Concatenate", ()),
    ("core_model_loading", "ConversionOps.convert", ("input_dict", "source_patterns", "target_patterns")),
    ("core_model_loading", "ConversionOps.reverse_op", ()),
    ("core_model_loading", "MergeModulelist", ()),
    ("core_model_loading", "WeightConverter", ("source_patterns", "target_patterns", "operations")),
    ("core_model_loading", "WeightRenaming", ()),
    (
        "core_model_loading",
        "rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    ("core_model_loading", "revert_weight_conversion", ("model", "state_dict")),
    (
        "modeling_utils",
        "PreTrainedModel.save_pretrained",
        ("save_directory", "is_main_process", "push_to_hub", "max_shard_size", "token", "save_original_format"),
    ),
    ("quantizers.auto", "register_quantization_config", ("method",)),
    ("quantizers.auto", "register_quantizer", ("name",)),
    ("quantizers.base", "HfQuantizer._process_model_after_weight_loading", ("model",)),
    ("quantizers.base", "HfQuantizer._process_model_before_weight_loading", ("model",)),
    ("quantizers.base", "HfQuantizer.is_compileable", ()),
    ("quantizers.base", "HfQuantizer.is_serializable", ()),
    ("quantizers.base", "HfQuantizer.is_trainable", ()),
    ("quantizers.base", "HfQuantizer.update_dtype", ("dtype",)),
    ("quantizers.base", "HfQuantizer.update_weight_conversions", ("weight_conversions",)),
    ("quantizers.base", "HfQuantizer.validate_environment", ()),
    ("utils.quantization_config", "QuantizationConfigMixin", ()),
)

#: Either will do, with the model's config: 5.17 has the second, later versions the first.
CONFIG_HOOKS = ("HfQuantizer.update_attn_implementation", "HfQuantizer.update_tp_plan")


def check_version() -> None:
    """Checks that the installed Transformers has what this loader uses; warns of a version that was never tried.

    Raises:
        ImportError: if there is none, or naming what it lacks.
    """
    tried = ".".join(map(str, FIRST_TRIED)), ".".join(map(str, LAST_TRIED))
    advice = f"{how_to_install('transformers')} brings one"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        message = f"Transformers is not installed; this loader was tried with {' to '.join(tried)}: {advice}"
        raise ImportError(message) from None
    numbers = tuple(int(part) if part.isdigit() else -1 for part in found.split(".")[:2])
    is_old = numbers < FIRST_TRIED
    lacks = [f"a version from {tried[0]} on"] if is_old else list(_all_lacks())
    if lacks:
        raise ImportError(
            f"Transformers {found} is installed, but this loader needs {', '.join(dict.fromkeys(lacks))}. Versions "
            f"{' to '.join(tried)} have all of it: {advice}"
        )
    if numbers > LAST_TRIED:
        logger.warning(
            "Transformers %s has all that this loader uses, but it was never tried with it; %s to %s were",
            found, *tried,
        )  # fmt: skip


def _all_lacks() -> Iterator[str]:
    for each in NEEDED:
        yield from lacks_of(*each)
    hooks = [list(lacks_of("quantizers.base", name, ("config",))) for name in CONFIG_HOOKS]
    if all(hooks):
        yield hooks[0][0]


def lacks_of(module: str, name: str, parameters: tuple[str, ...]) -> Iterator[str]:
    """Yields what Transformers lacks of one interface, by its full name.

    Args:
        module: of Transformers.
        name: in the module, with a dot before a method's.
        parameters: that are passed, in their order.
    """
    place = f"transformers.{module}"
    try:
        found: Any = import_module(place)
    except ImportError:
        yield place
        return
    for part in name.split("."):
        place, found = f"{place}.{part}", getattr(found, part, None)
        if found is None:
            yield place
            return
    if parameters:
        known = list(inspect.signature(found).parameters)
        missing = [each for each in parameters if each not in known]
        if missing:
            yield f"{place}({', '.join(missing)})"
        elif sorted(parameters, key=known.index) != list(parameters):
            yield f"{place}({', '.join(parameters)}), in this order"
