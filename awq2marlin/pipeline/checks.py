"""Comparing a conversion with its source before its output becomes loadable: shard by shard, or all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from awq2marlin.io.folder import Folder
from awq2marlin.io.safetensors import TensorIndex
from awq2marlin.io.tensors import TensorFiles
from awq2marlin.io.workers import check_workers
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.pipeline.output import OutputFolder
from awq2marlin.pipeline.plan import Plan
from awq2marlin.pipeline.run import distrusted_after_a_difference
from awq2marlin.pipeline.transfer import ShardPlan
from awq2marlin.progress import Progress, Silence
from awq2marlin.verification.sampling import Device, Layers, sample_modules

if TYPE_CHECKING:
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.verification.values import Comparison


@dataclass(frozen=True)
class Checks:
    """What a conversion compares.

    Attributes:
        plan: the conversion's.
        root: the output folder.
        modules: how many converted modules to compare, or all.
        device: where to run them through the Marlin GEMM; None for nowhere.
        workers: threads; None for the default.
        progress: told of what is compared at the end.
    """

    plan: Plan
    root: Path
    modules: Layers
    device: Device | None
    workers: int | None
    progress: Progress

    @cached_property
    def chosen(self) -> list[ModulePlan]:
        """The modules that are compared."""
        return sample_modules(self.plan.counterparts.rewritten, self.modules) if self.modules else []

    @property
    def chosen_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(module.name for module in self.chosen)

    @property
    def name(self) -> str:
        """What the journal notes of a shard that was compared like this."""
        return f"verify {self.modules}"

    def compare_shard(self, shard: ShardPlan) -> None:
        """Compares those tensors of the chosen modules that lie in a shard, before its source goes.

        Raises:
            DifferenceError: naming the first difference.
        """
        from awq2marlin.verification.values import verify_modules

        index = self.plan.checkpoint.index
        if shard.name in index.copies:  # here its own tensors count, whatever the index says
            index = TensorIndex(index.headers, dict.fromkeys(shard.source.tensors, shard.name))
        comparison = self._comparison(index, [shard.name], Silence())
        here = [replace(module, parts=self._parts_in(shard, module, comparison)) for module in self.chosen]
        verify_modules(here, comparison, check_workers(self.workers))

    def _parts_in(self, shard: ShardPlan, module: ModulePlan, comparison: Comparison) -> tuple[str, ...]:
        there, is_part = shard.source.tensors, self.plan.counterparts.is_part
        names = {part: comparison.tensor_name(module, part) for part in module.parts}
        return tuple(part for part, name in names.items() if name in there and is_part(module, part, there[name]))

    def compare_output(self, out: OutputFolder, *, are_compared: bool) -> GemmRun | None:
        """Compares the chosen modules, from the disk.

        Args:
            out: the output folder; it forgets its shards after a difference.
            are_compared: whether all shards were compared as they came, so that only the GEMM is left to ask.

        Returns:
            What the GEMM said; None if it was not asked.

        Raises:
            DifferenceError: naming the first difference.
        """
        if not self.chosen or (are_compared and self.device is None):
            return None
        from awq2marlin.verification.values import run_gemm, verify_modules

        index = self.plan.checkpoint.index
        comparison = self._comparison(index, [*index.headers], self.progress)
        with distrusted_after_a_difference(out):
            if not are_compared:
                verify_modules(self.chosen, comparison, check_workers(self.workers))
            return run_gemm(self.chosen, comparison, self.device)

    def _comparison(self, source: TensorIndex, shards: Sequence[str], progress: Progress) -> Comparison:
        """Returns the comparison of the source with what was made of some shards, as it is on the disk."""
        from awq2marlin.verification.values import Comparison

        output = Folder.at(self.root)
        headers = output.read_headers(shards)
        made = self.plan.target_index(headers) if len(headers) > 1 else TensorIndex(headers)
        return Comparison(
            self.plan.counterparts,
            TensorFiles(self.plan.checkpoint.folder, source),
            TensorFiles(output, made),
            progress,
        )
