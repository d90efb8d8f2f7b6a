"""`AWQMarlinConfig`: the quantization config as serving engines know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from awq2marlin.formats.names import LEGACY_CONFIG_FILENAMES
from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES, SCALAR_TYPES
from awq2marlin.layout.modules import is_output_embedding
from awq2marlin.layout.packing import AWQ_SUPPORTED_BITS, pack_factor

if TYPE_CHECKING:
    import torch

    from awq2marlin.gemm.linear import AWQMarlinLinearMethod


class AWQMarlinConfig:
    """How an AWQ layer runs on Marlin kernels. Making one imports no torch and probes no GPU.

    Attributes:
        weight_bits: 4 or 8.
        group_size: 32, 64, 128, or -1 for one group over all of K.
        zero_point: whether layers have ``qzeros``.
        pack_factor: values per int32, 8 or 4.
        quant_type: `SCALAR_TYPE_UINT4` or `SCALAR_TYPE_UINT8`.
        modules_to_not_convert: parts of names; modules whose name has one of them are not quantized.
    """

    def __init__(
        self, weight_bits: int, group_size: int, zero_point: bool, modules_to_not_convert: Sequence[str] = ()
    ) -> None:
        """Checks and keeps what it is given.

        Args:
            weight_bits: 4 or 8.
            group_size: 32, 64, 128 or -1.
            zero_point: whether layers have ``qzeros``.
            modules_to_not_convert: parts of the names of modules that were left unquantized.

        Raises:
            ValueError: naming what was found and what is supported.
        """
        if type(weight_bits) is not int or weight_bits not in SCALAR_TYPES:
            raise ValueError(f"weight_bits must be one of {list(AWQ_SUPPORTED_BITS)}, found {weight_bits!r}")
        if type(group_size) is not int or group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
            raise ValueError(f"group_size must be one of {MARLIN_SUPPORTED_GROUP_SIZES}, found {group_size!r}")
        if not isinstance(zero_point, bool):
            raise ValueError(f"zero_point must be True or False, found {zero_point!r}")  # noqa: TRY004 - one type for all
        if isinstance(modules_to_not_convert, str) or not all(isinstance(part, str) for part in modules_to_not_convert):
            raise ValueError(f"modules_to_not_convert must be a list of names, found {modules_to_not_convert!r}")
        self.weight_bits = weight_bits
        self.group_size = group_size
        self.zero_point = zero_point
        self.pack_factor = pack_factor(weight_bits)
        self.quant_type = SCALAR_TYPES[weight_bits]
        self.modules_to_not_convert = tuple(modules_to_not_convert)

    def __repr__(self) -> str:
        """Returns the call that makes one like it."""
        arguments = f"weight_bits={self.weight_bits}, group_size={self.group_size}, zero_point={self.zero_point}"
        if self.modules_to_not_convert:
            arguments += f", modules_to_not_convert={list(self.modules_to_not_convert)}"
        return f"AWQMarlinConfig({arguments})"

    @classmethod
    def get_name(cls) -> str:
        """Returns the method's name in engines: ``awq_marlin``."""
        return "awq_marlin"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the activation types that the kernels take: fp16 and bf16."""
        import torch

        return [torch.half, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability, times ten: 80."""
        return 80

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Returns the files beside ``config.json`` in which older tools kept the quantization config."""
        return list(LEGACY_CONFIG_FILENAMES)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str = "") -> AWQMarlinLinearMethod | None:
        """Returns how a layer keeps and applies its weights, or None for one that is not quantized.

        Args:
            layer: of the engine: a ``torch.nn.Linear`` or a class derived from one called ``LinearBase``.
            prefix: its full name, as far as the engine tells it; the output embedding and `modules_to_not_convert`
                are left alone.
        """
        import torch

        from awq2marlin.gemm.linear import AWQMarlinLinearMethod

        bases = {each.__name__ for each in type(layer).__mro__}
        is_linear = isinstance(layer, torch.nn.Linear) or "LinearBase" in bases
        is_left_alone = is_output_embedding(prefix) or any(part in prefix for part in self.modules_to_not_convert)
        return AWQMarlinLinearMethod(self) if is_linear and not is_left_alone else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQMarlinConfig:
        """Returns the config that a ``quantization_config`` describes.

        Args:
            config: with ``bits`` or ``w_bit``, ``group_size`` or ``q_group_size``, ``zero_point`` (True
                if absent) and ``modules_to_not_convert``; other keys are ignored.

        Raises:
            ValueError: if a key is missing or its value unsupported, or the method or version is another.
        """
        for key, supported in (("quant_method", ("awq", "awq_marlin")), ("version", ("gemm",))):
            found = config.get(key)
            if found is not None and str(found).lower() not in supported:
                raise ValueError(f"{key} must be one of {list(supported)}, found {found!r}")
        zero_point = config.get("zero_point")
        return cls(
            _either(config, "bits", "w_bit"),
            _either(config, "group_size", "q_group_size"),
            True if zero_point is None else zero_point,
            config.get("modules_to_not_convert") or (),
        )


def _either(config: Mapping[str, Any], name: str, old_name: str) -> Any:
    found = {key: config[key] for key in (name, old_name) if config.get(key) is not None}
    if not found:
        raise ValueError(f"the quantization config has neither {name!r} nor {old_name!r}; found {sorted(config)}")
    if len(set(map(repr, found.values()))) > 1:
        raise ValueError(f"the quantization config contradicts itself: {found}")
    return next(iter(found.values()))
