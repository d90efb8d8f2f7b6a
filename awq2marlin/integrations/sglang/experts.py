"""SGLang's layers of experts: what is SGLang's about them."""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.moe_runner import MoeRunner
from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from awq2marlin.integrations.serving.experts import GROUPS, MarlinExperts
from awq2marlin.integrations.serving.kernels import ExpertsTask, chosen_experts_kernel, expert_weights, run_experts
from awq2marlin.integrations.serving.record import LoadRecord
from awq2marlin.integrations.sglang import kernels
from awq2marlin.integrations.sglang.kernels import RECUT_NOTE, weight_type

#: What files call the matrices of an expert; without a gate ``w1`` is the one of the way up.
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "w1": ("gate_proj", "w1"),
    "w3": ("up_proj", "w3"),
    "w2": ("down_proj", "w2"),
}
_WITHOUT_GATE = {**_PROJECTIONS, "w1": ("up_proj", "w1", "w3")}

#: What SGLang's Marlin experts can compute between the two products, with a gate and without.
_ACTIVATIONS = {True: ("silu", "situ"), False: ("silu", "relu2")}

#: Tiles of SGLang's Marlin experts: K of 64 and N of 128.
_TILE_K, _TILE_N = 64, 128


class ExpertsKernel(Protocol):
    """Runs tokens through the Marlin experts of a layer."""

    def __call__(self, layer: Any, dispatch_output: Any) -> Any:
        """Returns what the experts of this rank make of the tokens that are sent to them."""


def kernel_of(layer: Any, num_bits: int, runner: Any) -> ExpertsKernel:
    """Returns what multiplies with the finished experts of a layer. If it is ours, it is ready for CUDA graphs.

    Args:
        layer: holds the weights.
        num_bits: 4 or 8.
        runner: SGLang's, of Marlin experts.

    Raises:
        KernelUnavailableError: if ours must serve them and cannot.
    """
    task = _task_of(layer.moe_runner_config, len(layer.w13_qweight))
    only_own = weight_type(num_bits, hasattr(layer, "w13_qzeros")) is None
    if chosen_experts_kernel(kernels.EXPERTS_CHOICE, layer, num_bits, task, only_own=only_own) == "own":
        return OwnExperts(layer.moe_runner_config, num_bits)
    return SglangMarlinExperts(layer, num_bits, runner)


def _task_of(wanted: Any, num_experts: int) -> ExpertsTask:
    """Returns what a model of SGLang asks of its experts."""
    factors = (wanted.swiglu_limit, wanted.gemm1_alpha, wanted.gemm1_beta, wanted.gemm1_clamp_limit)
    return ExpertsTask(
        activation=wanted.activation,
        is_gated=wanted.is_gated,
        has_limits=any(factor is not None for factor in factors),
        top_k=wanted.top_k,
        num_experts=num_experts,
        is_summed=not wanted.no_combine,
    )


class OwnExperts:
    """``awq2marlin::marlin_experts``: SGLang says the experts by this rank's numbers already, -1 for others'."""

    def __init__(self, wanted: Any, num_bits: int) -> None:
        """Serves a layer.

        Args:
            wanted: SGLang's config of how the model's experts are computed.
            num_bits: 4 or 8.
        """
        self._wanted, self._num_bits = wanted, num_bits

    def __call__(self, layer: Any, dispatch_output: Any) -> Any:
        """Returns what the experts of this rank make of the tokens that are sent to them."""
        topk_ids, topk_weights = _choices(dispatch_output.topk_output)
        factor = self._wanted.routed_scaling_factor
        if factor is not None:  # SGLang's Marlin experts multiply by it, too
            topk_weights = topk_weights * factor
        out = run_experts(
            expert_weights(layer), dispatch_output.hidden_states, topk_ids, topk_weights,
            activation=self._wanted.activation, num_bits=self._num_bits,
        )  # fmt: skip
        return StandardCombineInput(hidden_states=out)


def _choices(chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the experts of each token and their weights, which SGLang may have packed into one number."""
    if hasattr(chosen, "topk_weights"):
        return chosen.topk_ids, chosen.topk_weights
    packed = chosen.packed_topk_ids
    return packed >> 16, (packed & 0xFFFF).to(torch.int16).view(torch.bfloat16)


class SglangMarlinExperts:
    """SGLang's ``fused_marlin_moe``, behind the runner that knows how its models compute experts."""

    def __init__(self, layer: Any, num_bits: int, runner: Any) -> None:
        """Serves a layer; arguments as for `kernel_of`."""
        self._num_bits, self._runner = num_bits, runner
        # SGLang's kernel wants an order of rows, of which there is none.
        weight = layer.w13_qweight
        self._no_order = torch.empty((len(weight), 0), dtype=torch.int32, device=weight.device)

    def __call__(self, layer: Any, dispatch_output: Any) -> Any:
        """Returns what the experts of this rank make of the tokens that are sent to them."""
        # Under expert parallelism, which experts are on this rank.
        local = getattr(layer.dispatcher, "local_expert_mapping", None)
        weights = MarlinMoeQuantInfo(
            w13_qweight=layer.w13_qweight,
            w2_qweight=layer.w2_qweight,
            w13_scales=layer.w13_scales,
            w2_scales=layer.w2_scales,
            w13_g_idx_sort_indices=self._no_order,
            w2_g_idx_sort_indices=self._no_order,
            weight_bits=self._num_bits,
            w13_qzeros=getattr(layer, "w13_qzeros", None),
            w2_qzeros=getattr(layer, "w2_qzeros", None),
            expert_map=local,
            global_num_experts=-1 if local is None else layer.dispatcher.num_experts,
        )
        return self._runner.run(dispatch_output, weights)


class MarlinNativeMoEMethod(MarlinExperts, FusedMoEMethodBase):  # type: ignore[misc]
    """Loads, finishes and applies the experts of one layer."""

    engine = "SGLang"
    note = RECUT_NOTE

    def __init__(self, config: Any, layer: Any, prefix: str) -> None:
        """Serves the experts of a layer.

        Args:
            config: the checkpoint's `MarlinNativeConfig`; SGLang's models look for it here.
            layer: SGLang's, not yet built.
            prefix: the experts' parent in the checkpoint.

        Raises:
            CheckpointError: if SGLang's Marlin experts do not run in this configuration.
        """
        self.hold(config.contents, prefix, LoadRecord(sees_everything=config.by_weight_loaders))
        self.quant_config = config
        #: What multiplies; chosen when the weights are there.
        self.kernel: ExpertsKernel | None = None
        self._refuse_unserved(layer.moe_runner_config)

    def _refuse_unserved(self, wanted: Any) -> None:
        if weight_type(self.contents.bits, "qzeros" in self.parts) is None:
            self.refuse_without_own(_task_of(wanted, 1))
        backend, between_gpus = get_moe_runner_backend(), get_moe_a2a_backend()
        if not (backend.is_auto() or backend.is_marlin()):
            self.refuse(
                f"--moe-runner-backend is {backend.value}, but the experts are laid out for Marlin kernels. Leave it "
                "out"
            )
        if not between_gpus.is_none():
            self.refuse(
                f"--moe-a2a-backend is {between_gpus.value}, which SGLang's Marlin experts do not work with. Leave it "
                "out"
            )
        if wanted.activation not in _ACTIVATIONS[wanted.is_gated]:
            self.refuse(f"SGLang's Marlin experts do not compute the activation {wanted.activation!r}")
        if wanted.apply_router_weight_on_input:
            self.refuse(
                "the model applies router weights to expert inputs, which SGLang's Marlin experts do not support"
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer empty parameters for all experts of this rank; see `MarlinExperts.register_parameters`.

        Args:
            layer: SGLang's container of the experts.
            num_experts: E on this rank.
            hidden_size: H.
            intermediate_size_per_partition: I on this rank.
            params_dtype: fp16 or bf16.
            with_bias: whether the experts have biases.
            extra_weight_attrs: holds SGLang's ``weight_loader``.

        Raises:
            CheckpointError: if this rank's part cuts a group in two, or words of the source, or SGLang's Marlin
                experts do not take the shapes.
        """
        if with_bias:
            self.refuse("its experts have biases, which this plugin does not load")
        inner, shards = intermediate_size_per_partition, 2 if layer.moe_runner_config.is_gated else 1
        self.plan(num_experts, hidden_size, inner, shards, inner * int(layer.moe_tp_size))
        if self.padded_inner() is None:
            self.refuse(f"hidden size {hidden_size} is not a multiple of {_TILE_N}, which SGLang's Marlin experts need")
        attributes = {
            "weight_loader": extra_weight_attrs["weight_loader"],
            "is_transposed": True,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
        }
        self.register_parameters(layer, params_dtype, attributes)
        # Below SGLang's way from experts of the model to those of this rank, of which there are several.
        layer._weight_loader_impl = self._watch(layer, layer._weight_loader_impl)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the loaded tensors what Marlin experts take, once, and chooses whose.

        Args:
            layer: one whose weights were loaded.

        Raises:
            CheckpointError: naming every tensor that was never loaded.
            KernelUnavailableError: if only ours can serve the experts, and it cannot be compiled or run here.
        """
        if self.is_loaded(layer):
            self.require_complete(layer, layer.num_experts, self._module)
            self.finish(layer)
        if self.kernel is None:
            self.kernel = kernel_of(layer, self.contents.bits, self.runner)

    def restore_weights_before_loading(self, layer: Any) -> None:  # noqa: ARG002 - SGLang's interface
        """Refuses to load other weights into a running engine.

        Raises:
            CheckpointError: always.
        """
        self.refuse("weights in Marlin layout cannot be replaced while SGLang runs; start it with the new checkpoint")

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:  # noqa: ARG002 - SGLang's interface
        """Makes SGLang's runner of Marlin experts, by which it knows how tokens are to be sent to them.

        Args:
            layer: SGLang's container of the experts.
            moe_runner_config: how the model's experts are computed.
        """
        self.runner = MoeRunner(MoeRunnerBackend.MARLIN, moe_runner_config)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """Returns what the experts of this rank make of the tokens that are sent to them.

        Args:
            layer: one whose weights are processed.
            dispatch_output: tokens, and the experts of each.
        """
        assert self.kernel is not None, "process_weights_after_loading has chosen it"
        return self.kernel(layer, dispatch_output)

    def padded_inner(self) -> int | None:
        """Returns the inner size that SGLang's Marlin experts can take, at least the own; None if there is none."""
        hidden, inner, shards = self.sizes
        multiple = max(_TILE_K, _TILE_N // shards, self.contents.group_size)
        return None if hidden % _TILE_N else -(-inner // multiple) * multiple

    def _watch(self, layer: Any, loader: Any) -> Any:
        """Returns SGLang's loader of one tensor of one local expert, which keeps account of it.

        It copies what no rank may cut, and, where experts are to be repacked, brings what lies in tiles to plain order.
        """

        @wraps(loader)
        def recording_loader(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
        ) -> None:
            name = next((name for name in self._names() if getattr(layer, name) is param), "")
            left: torch.Tensor | None = loaded_weight
            if name:
                shard = "w1" if shard_id == "w3" and self.sizes[2] == 1 else shard_id
                left = self.take(param, name, loaded_weight, self._padded_module(shard), expert_id, shard)
            if left is not None:
                loader(param=param, loaded_weight=left, weight_name=weight_name, shard_id=shard_id, expert_id=expert_id)

        return recording_loader

    def _names(self) -> list[str]:
        return [f"{group}_{part}" for group in GROUPS for part in self.parts]

    def _module(self, expert: int, shard: str) -> str:
        """Returns the name of an expert's module in the file, as far as it is known."""
        candidates = [f"{self.prefix}.{expert}.{name}" for name in self._projections[shard]]
        return next((name for name in candidates if self.quant_config.names.find(name)), candidates[0])

    def _padded_module(self, shard: str) -> str:
        """Returns a padded module of the experts; all of a kind are padded alike."""
        padded = self.contents.quantization.padded_modules
        ends = tuple(f".{name}" for name in self._projections[shard])
        found = (name for name in padded if name.startswith(f"{self.prefix}.") and name.endswith(ends))
        return next(found, "")

    @property
    def _projections(self) -> dict[str, tuple[str, ...]]:
        return _PROJECTIONS if self.sizes[2] == 2 else _WITHOUT_GATE
