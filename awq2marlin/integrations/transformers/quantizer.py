"""The quantization config and quantizer of ``marlin_native``, registered with Transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from awq2marlin.errors import KernelUnavailableError, Problem, UnavailableError, refuse
from awq2marlin.formats.marlin_native import MARLIN_QUANT_METHOD
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.formats.plain_transformers import WEIGHTS_KEY, is_stop, without_stop
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.gemm.machine import machine_facts
from awq2marlin.gemm.module_repack import awq_to_marlin, marlin_to_awq
from awq2marlin.integrations.transformers.saving import save_format_with
from awq2marlin.integrations.transformers.skeleton import Skeleton, read_headers
from awq2marlin.io.safetensors import TensorIndex
from awq2marlin.layout.modules import ModulePlan

logger = logging.getLogger(__name__)

_SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@register_quantization_config(MARLIN_QUANT_METHOD)
class MarlinNativeConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a Marlin-native checkpoint.

    Attributes:
        quant_method: ``marlin_native``.
        document: the whole config, as it stands in config.json.
    """

    quant_method: Any = MARLIN_QUANT_METHOD  # Transformers' own are members of an enumeration

    def __init__(self, **document: Any) -> None:
        """Takes the keys of docs/marlin-native.md.

        Raises:
            CheckpointError: if a value is missing or of the wrong kind, or the format is newer than this package.
        """
        self.document = {**document, "quant_method": MARLIN_QUANT_METHOD}
        self.quantization = MARLIN_NATIVE.read_config(self.document, CONFIG_FILENAME)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys that config.json holds."""
        return dict(self.document)


@register_quantizer(MARLIN_QUANT_METHOD)
class MarlinNativeQuantizer(HfQuantizer):
    """Builds the model with packed layers, and loads and saves what the files hold."""

    requires_calibration = True  # a model is converted by `awq2marlin convert`, not while it is loaded
    quantization_config: MarlinNativeConfig

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Checks that the kernels run where the model is to go.

        Raises:
            UnavailableError: for a device that is neither a CPU nor a CUDA GPU.
            KernelUnavailableError: for a GPU that the kernels cannot be compiled for or run on, naming what is missing.
        """
        kinds = {str(place).partition(":")[0] for place in _places(device_map)}
        others = sorted(kinds & {"hpu", "mlu", "mps", "musa", "neuron", "npu", "sdaa", "tpu", "xla", "xpu"})
        if others:
            message = f"device_map names {others[0]}; Marlin kernels run on CUDA GPUs and, slowly, on a CPU"
            raise UnavailableError(Problem("", "", "unsupported-device", message))
        if any(kind == "cuda" or kind.isdigit() for kind in kinds):
            lacks = machine_facts().lacks
            if lacks:
                told = "\n".join(f"{lack.what} {lack.remedy}" for lack in lacks)
                raise KernelUnavailableError(f"Marlin kernels cannot run on a GPU here:\n{told}")

    def update_attn_implementation(self, config: Any) -> Any:
        """Returns the model's config without what stops Transformers where this loader is not there.

        Transformers hands a quantizer the config here, before it looks for the files; about attention we say nothing.
        """
        said = getattr(config, WEIGHTS_KEY, None)
        if is_stop(said):
            delattr(config, WEIGHTS_KEY)
            vars(config).update(without_stop({WEIGHTS_KEY: said}))  # a name that the source's config gives
        return config

    update_tp_plan = update_attn_implementation  # what 5.17 calls in that place

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype that was asked for, if the kernels take it.

        Raises:
            CheckpointError: for another than fp16 and bf16.
        """
        if dtype not in _SCALE_DTYPES.values():
            message = f"the model's dtype would be {dtype}, but Marlin kernels take float16 and bfloat16; pass dtype"
            raise refuse("unsupported-dtype", message, file=CONFIG_FILENAME)
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> Any:
        if getattr(model.config, "distributed_config", None) is not None:
            message = "packed weights cannot be cut for tensor parallelism here; use device_map, or serve with vLLM"
            raise refuse("unsupported-parallelism", message)
        headers = read_headers(_safetensors(checkpoint_files))
        self._warn_of_rounding(headers)
        self._skeleton = Skeleton(model, headers, self.quantization_config.quantization, self._dtype)
        self._skeleton.build()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        self._skeleton.finish()
        save_format_with(model, self._skeleton.padded)
        del self._skeleton  # it holds the headers
        return model

    def _warn_of_rounding(self, headers: TensorIndex) -> None:
        found = {each.dtype for name, each in headers.tensors.items() if name.endswith(".scales")}
        others = sorted(name for name in found if _SCALE_DTYPES.get(name, self._dtype) != self._dtype)
        if others:
            logger.warning(
                "the scales are %s in the files and are rounded to %s; for the exact weights pass dtype=%s",
                _SCALE_DTYPES[others[0]], self._dtype, _SCALE_DTYPES[others[0]],
            )  # fmt: skip

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:  # noqa: ARG002
        """Adds the repack of the modules kept in AWQ layout, after a check that no tensor is missing.

        Raises:
            CheckpointError: naming every tensor of the model that no file holds.
        """
        transforms = [*weight_conversions, *self._repacks()]
        self._skeleton.refuse_missing(transforms)
        return transforms

    def _repacks(self) -> list[WeightConverter]:
        if not self._skeleton.kept:
            return []  # a conversion that converts nothing still costs a copy for every tensor
        quantization = self.quantization_config.quantization
        arguments = (self._skeleton.kept, quantization.bits, quantization.group_size, self._dtype)
        parts = ("qweight", "qzeros", "scales")
        return [WeightConverter(rf"\.{part}", rf"\.{part}", [Repack(part, *arguments)]) for part in parts]

    def is_serializable(self) -> bool:
        """Returns True: a loaded model can be saved, in the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: it cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model by itself: yes, the kernels are operators of torch."""
        return True


def _places(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]


def _safetensors(checkpoint_files: list[str] | None) -> list[str]:
    """Returns the files to load, after a check that they are safetensors."""
    files = checkpoint_files or []
    if not files or not all(file.endswith(".safetensors") for file in files):
        message = "it is loaded from safetensors files only, not from a state dict or pickled weights"
        raise refuse("no-weights", message, file=Path(files[0]).name if files else "")
    return files


class Repack(ConversionOps):
    """Repacks a tensor of a module that the files keep in AWQ layout; others pass through."""

    inverse = False

    def __init__(
        self, part: str, kept: Mapping[str, ModulePlan], num_bits: int, group_size: int, dtype: torch.dtype
    ) -> None:
        """Takes what all modules share.

        Args:
            part: ``qweight``, ``qzeros`` or ``scales``.
            kept: the modules in AWQ layout, by their names in the model.
            num_bits: 4 or 8.
            group_size: rows of K that share scales, -1 for all.
            dtype: of the scales in the model.
        """
        self._arguments = (part, kept, num_bits, group_size, dtype)

    def __deepcopy__(self, memo: Any) -> Repack:
        """Returns itself: Transformers copies a conversion for every tensor, and this one holds no state."""
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002
        target_patterns: list[str],  # noqa: ARG002
        full_layer_name: str = "",
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Returns the tensor under its full name, in the layout of the model, or of the file if inverse."""
        part, kept, num_bits, group_size, dtype = self._arguments
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        module = kept.get(full_layer_name.removesuffix(f".{part}"))
        if module is not None:
            function = marlin_to_awq if self.inverse else awq_to_marlin
            tensor = function(part, tensor, module, num_bits=num_bits, group_size=group_size)
        return {full_layer_name: tensor.to(dtype) if part == "scales" else tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving applies."""
        return _Unpack(*self._arguments)


class _Unpack(Repack):
    """Undoes `Repack`."""

    inverse = True

    @property
    def reverse_op(self) -> ConversionOps:
        return Repack(*self._arguments)
