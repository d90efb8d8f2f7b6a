"""What the plugin uses of vLLM, which is internal there: looked up by name before a checkpoint is read.

So a vLLM is judged by what it has, not by its number. What is missing is named; a version that nobody has tried gives
one warning.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from awq2marlin.errors import printable

#: Versions on which the plugin's tests ran; docs/vllm.md says on which of them it ran on a GPU, and when.
TRIED = ((0, 25), (0, 29), (0, 33))


@dataclass(frozen=True)
class Need:
    """A name that the plugin uses.

    Attributes:
        module: where it is, below ``vllm``.
        name: what it is called there, with dots for what is inside.
        arguments: what it is called with, by name.
        attributes: what must be in it.
        optional: further arguments, which it gets where it takes them.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def lacks(self) -> list[str]:
        """Returns what of it is not there, as a reader of vLLM's source would write it."""
        place = f"vllm.{self.module}.{self.name}"
        try:
            found: Any = import_module(f"vllm.{self.module}")
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return [place]
        lost = [f"{place}.{each}" for each in self.attributes if not hasattr(found, each)]
        return lost + [f"{place}({each})" for each in self._misfits(found)] if self.arguments else lost

    def _misfits(self, found: Any) -> Iterator[str]:
        """Yields the arguments that it does not take, and those that it needs and does not get."""
        takes = inspect.signature(found).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in takes):
            yield from (f"{name}=" for name in self.arguments if name not in {each.name for each in takes})
        given = {*self.arguments, *self.optional}
        for each in takes:
            is_needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            if is_needed and each.name not in given:
                yield f"without {each.name}="


_LAYERS = "model_executor.layers"
_PACKED = ("data", "output_dim", "packed_dim", "packed_factor", "weight_loader")

#: What every checkpoint needs.
ALWAYS = (
    Need("envs", "environment_variables"),
    Need("platforms", "current_platform", (), ("is_cuda", "get_device_capability")),
    Need("config", "get_current_vllm_config_or_none"),
    Need("transformers_utils.config", "get_safetensors_params_metadata", ("model", "revision")),
    Need("scalar_type", "scalar_types", (), ("uint4", "uint4b8", "uint8b128")),
    Need(f"{_LAYERS}.linear", "LinearMethodBase", (), ("create_weights", "process_weights_after_loading", "apply")),
    Need(f"{_LAYERS}.linear", "LinearBase"),
    Need(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    Need(f"{_LAYERS}.linear", "register_weight_loader_v2_supported_method"),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead"),
    Need("model_executor.parameter", "BasevLLMParameter"),
    Need("model_executor.parameter", "ChannelQuantScaleParameter", ("data", "output_dim", "weight_loader")),
    Need("model_executor.parameter", "GroupQuantScaleParameter", ("data", "input_dim", "output_dim", "weight_loader")),
    Need("model_executor.parameter", "PackedColumnParameter", _PACKED),
    Need("model_executor.parameter", "PackedvLLMParameter", (*_PACKED, "input_dim", "marlin_tile_size")),
    Need(
        f"{_LAYERS}.quantization.utils.marlin_utils",
        "apply_gptq_marlin_linear",
        (
            "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
            "input_size_per_partition", "bias",
        ),
        optional=("g_idx", "g_idx_sort_indices", "is_k_full"),  # before 0.33
    ),
    Need(f"{_LAYERS}.quantization.auto_awq", "AutoAWQConfig", (), ("from_config", "get_quant_method")),
)  # fmt: skip

#: What mixtures of experts need besides.
EXPERTS = (
    Need(f"{_LAYERS}.fused_moe", "RoutedExperts", (), ("_map_global_expert_id_to_local_expert_id",)),
    Need(f"{_LAYERS}.fused_moe", "UnquantizedFusedMoEMethod", ("moe",)),
    Need(f"{_LAYERS}.fused_moe", "FusedMoeWeightScaleSupported.GROUP"),
    Need(f"{_LAYERS}.fused_moe.fused_moe_method_base", "FusedMoEMethodBase", ("moe",)),
    Need(f"{_LAYERS}.fused_moe.oracle.int_wna16", "WNA16MoEBackend", (), ("MARLIN", "BATCHED_MARLIN")),
    Need(f"{_LAYERS}.fused_moe.oracle.int_wna16", "backend_to_kernel_cls", ("backend",)),
    Need(f"{_LAYERS}.quantization.auto_awq", "AutoAWQMoEMethod", (), ("_setup_kernel", "apply")),
    Need(f"{_LAYERS}.quantization.utils.quant_utils", "kInt4Static"),
    Need(f"{_LAYERS}.quantization.utils.quant_utils", "kInt8Static"),
    Need("model_executor.utils", "set_weight_attrs", ("weight", "weight_attrs")),
)


@cache
def missing_reason(needs: tuple[Need, ...], version: str) -> str | None:
    """Returns why the plugin does not run on this vLLM, in words, or None if all that it needs is there.

    Args:
        needs: what is looked up.
        version: as ``vllm.__version__`` says.
    """
    lost = [each for need in needs for each in need.lacks()]
    if not lost:
        return None
    return (
        f"vLLM {printable(version)} lacks what this awq2marlin uses of it: {', '.join(lost)}. It was tried with "
        f"{_tried()}; install one of those, or a newer awq2marlin, or take the AWQ checkpoint back with "
        "'awq2marlin revert'"
    )


def untried_warning(version: str) -> str | None:
    """Returns what to say of a version that nobody has tried; None for the others.

    Args:
        version: as ``vllm.__version__`` says.
    """
    if minor_version(version) in TRIED:
        return None
    return (
        f"vLLM {printable(version)} was never tried with this awq2marlin; {_tried()} were. All that it uses of vLLM is "
        "there; compare some answers with those of the AWQ checkpoint"
    )


def minor_version(version: str) -> tuple[int, int] | None:
    """Returns (0, 25) for ``0.25.0``, ``0.25.1+cu130`` or ``0.25.0rc1``; None for what is no version."""
    found = re.match(r"(\d+)\.(\d+)(?:[.+a-z]|$)", version)
    return (int(found[1]), int(found[2])) if found else None


def _tried() -> str:
    *others, last = (f"{major}.{minor}" for major, minor in TRIED)
    return f"{', '.join(others)} and {last}"
