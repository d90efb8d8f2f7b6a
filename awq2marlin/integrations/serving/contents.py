"""What a checkpoint holds, as far as it decides how a layer is loaded; knows nothing of engines' classes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.integrations.serving.inventory import Inventory
from awq2marlin.layout.modules import is_models_output_embedding
from awq2marlin.layout.scheme import Scheme

Layout = Literal["marlin", "awq", "none"]

_LAYOUT_NAMES = {"awq": "in AWQ layout", "none": "not quantized", "marlin": "in Marlin layout"}


@dataclass(frozen=True)
class Contents:
    """A checkpoint, by its config and headers.

    Attributes:
        quantization: what its config says, with the names that the engine gives the modules.
        inventory: what its headers say; None where they could not be read.
    """

    quantization: Quantization
    inventory: Inventory | None = None

    @property
    def bits(self) -> int:
        """4 or 8."""
        return self.quantization.bits

    @property
    def group_size(self) -> int:
        """Rows of K that share scales, -1 for all."""
        return self.quantization.group_size

    @property
    def scheme(self) -> Scheme:
        """Bits, groups and zero points."""
        return self.quantization.scheme

    @property
    def pack_factor(self) -> int:
        """Values per int32."""
        return self.scheme.pack_factor

    @property
    def has_quantized_head(self) -> bool:
        """Whether the model's output embedding is quantized; it is kept in AWQ layout then."""
        return any(map(is_models_output_embedding, self.quantization.awq_modules))

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> Contents:
        """Returns the same contents with other names of the modules.

        Args:
            rename: from names in the file to those in a model of the engine; leaves out what the model does not have.
        """

        def renamed(names: Collection[str]) -> frozenset[str]:
            return frozenset(rename(sorted(names)))

        old, inventory = self.quantization, self.inventory
        padded = {new: size for name, size in old.padded_modules.items() for new in rename([name])}
        return Contents(
            replace(
                old,
                awq_modules=renamed(old.awq_modules),
                unquantized_modules=renamed(old.unquantized_modules),
                padded_modules=padded,
            ),
            inventory
            and replace(
                inventory,
                zero_point_modules=renamed(inventory.zero_point_modules),
                modules=renamed(inventory.modules),
            ),
        )

    def is_listed(self, module: str) -> bool:
        """Returns whether the config's lists name a module.

        Args:
            module: its name.
        """
        lists = self.quantization
        return any(module in names for names in (lists.awq_modules, lists.unquantized_modules, lists.padded_modules))

    def layout(self, modules: Collection[str]) -> Layout:
        """Returns the layout of modules which become one layer; ``marlin`` if only some of them are in that.

        Args:
            modules: their names, at least one.

        Raises:
            CheckpointError: if some are quantized and some are not.
        """
        found = {self._layout(module): module for module in modules}
        if found.keys() == {"marlin", "awq"}:
            return "marlin"
        if len(found) > 1:
            said = ", ".join(
                f"{printable(module)} is {_LAYOUT_NAMES[layout]}" for layout, module in sorted(found.items())
            )
            raise refuse(
                "unsupported-engine",
                f"the engine puts these modules into one matrix, but {said}. Quantize all of them, or none",
                file=CONFIG_FILENAME,
            )
        return next(iter(found))

    def layout_of_experts(self, parent: str) -> Layout:
        """Returns the layout of the experts below a module; conversion gives all that are quantized the same.

        Args:
            parent: the experts' parent, such as ``model.layers.0.mlp.experts``.

        Raises:
            CheckpointError: if some of them are quantized and some are not.
        """
        if is_any_below(self.quantization.unquantized_modules, parent):
            self._refuse_mixed_experts(parent)
            return "none"
        return "awq" if is_any_below(self.quantization.awq_modules, parent) else "marlin"

    def _refuse_mixed_experts(self, parent: str) -> None:
        """Refuses experts of which some are quantized: engines would leave those out without a word."""
        known = self.inventory.modules if self.inventory else frozenset()
        quantized = _first_expert(self.quantization.awq_modules | known, parent)
        plain = _first_expert(self.quantization.unquantized_modules, parent)
        if quantized and plain:
            raise refuse(
                "unsupported-engine",
                f"the engine computes the experts of a layer together. Here {printable(plain)} is not quantized, but "
                f"{printable(quantized)} is. Quantize all experts of a layer, or none",
                file=CONFIG_FILENAME,
            )

    def has_zero_points(self, modules: Collection[str]) -> bool:
        """Returns whether modules have ``qzeros``.

        Args:
            modules: names of modules, or of the parents of experts.
        """
        if self.quantization.zero_point or self.inventory is None:
            return self.quantization.zero_point
        found = self.inventory.zero_point_modules
        return any(module in found or is_any_below(found, module) for module in modules)

    def tensor_parallel_advice(self) -> str:
        """Returns what to do about a layer that the number of ranks does not cut exactly, in a sentence."""
        if self.inventory is None:
            return "Serve it on fewer GPUs; 'awq2marlin inspect' reports the largest tensor-parallel size that works"
        size = self.inventory.largest_tensor_parallel_size
        if not size:
            return "No tensor-parallel size works"
        return f"The largest tensor-parallel size that works is {size}: serve it with --tensor-parallel-size {size}"

    def _layout(self, module: str) -> Layout:
        if module in self.quantization.awq_modules:
            return "awq"
        return "none" if module in self.quantization.unquantized_modules else "marlin"


def is_any_below(names: Collection[str], parent: str) -> bool:
    """Returns whether one of the names is a module inside a parent."""
    return any(name.startswith(f"{parent}.") for name in names)


def _first_expert(names: Collection[str], parent: str) -> str:
    """Returns the first of the names that is of a numbered expert inside a parent; empty if there is none."""
    experts = (name for name in names if name.startswith(f"{parent}.") and name[len(parent) + 1].isdecimal())
    return min(experts, default="")
