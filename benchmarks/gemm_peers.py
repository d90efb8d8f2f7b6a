"""Other W4A16 GEMMs for ``benchmarks/gemm.py``: whatever of vLLM's Marlin and Machete, and of Humming, is installed.

A peer is made from a layer in plain numbers. It has the tensors of its own format (``tensors``, which the benchmark
copies to rotate through them), and ``launcher(copies, a)``, which gives a function that runs the i-th copy. Every peer
takes what its makers' heuristics choose.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

GROUP_SIZE = 128
Tensors = tuple[torch.Tensor, ...]
Launch = Callable[[int], torch.Tensor]


def pack_words(numbers: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Packs as many neighbours along ``dim`` into an int32 as ``order`` has; the lowest bits hold ``order[0]``."""
    factor, bits = len(order), 32 // len(order)
    fields = numbers.to(torch.int32).unflatten(dim, (-1, factor))
    words = sum(fields.select(dim + 1, which) << (bits * i) for i, which in enumerate(order))
    return words.to(torch.int32).contiguous()


class LayerNumbers(NamedTuple):
    """A layer in plain numbers, and what it will be asked.

    Attributes:
        q: 0..15 [K, N].
        z: zero points [K/128, N].
        s: scales [K/128, N].
        marlin: the same as Marlin's qweight, scales and qzeros.
        sizes_m: the numbers of tokens to come.
    """

    q: torch.Tensor
    z: torch.Tensor
    s: torch.Tensor
    marlin: Tensors
    sizes_m: tuple[int, ...]


class Peer(ABC):
    """A layer in a peer's own format."""

    tensors: Tensors

    @abstractmethod
    def launcher(self, copies: list[Tensors], a: torch.Tensor) -> Launch:
        """Returns what multiplies ``a`` by the i-th copy of the tensors."""


class Marlin(Peer):
    """vLLM's Marlin, on the very tensors that ours takes."""

    def __init__(self, layer: LayerNumbers) -> None:
        """Takes Marlin's tensors as they are."""
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

        self.tensors = layer.marlin
        self.size_k, self.size_n = layer.q.shape
        self.workspace = marlin_make_workspace_new(layer.q.device)
        self.empty = torch.empty(0, dtype=torch.int32, device=layer.q.device)

    def launcher(self, copies: list[Tensors], a: torch.Tensor) -> Launch:
        """Returns what multiplies ``a`` by the i-th copy of the tensors."""
        from vllm import _custom_ops
        from vllm.scalar_type import scalar_types

        def launch(i: int) -> torch.Tensor:
            qweight, scales, qzeros = copies[i % len(copies)]
            return _custom_ops.marlin_gemm(
                *(a, None, qweight, None, scales, None, None, qzeros, self.empty, self.empty, self.workspace),
                scalar_types.uint4,
                size_m=a.shape[0],
                size_n=self.size_n,
                size_k=self.size_k,
                is_k_full=True,
                use_atomic_add=False,
                use_fp32_reduce=True,
                is_zp_float=False,
            )

        return launch


class Machete(Peer):
    """vLLM's Machete, which only Hopper has."""

    def __init__(self, layer: LayerNumbers) -> None:
        """Packs the layer for Machete."""
        from vllm import _custom_ops
        from vllm.scalar_type import scalar_types

        self.type = scalar_types.uint4
        q, z, s = layer.q, layer.z, layer.s
        column_major = pack_words(q, 0).t().contiguous().t()
        packed = _custom_ops.machete_prepack_B(
            column_major, a_type=s.dtype, b_type=self.type, group_scales_type=s.dtype
        )
        self.tensors = packed, s.contiguous(), -s * z.to(s.dtype)

    def launcher(self, copies: list[Tensors], a: torch.Tensor) -> Launch:
        """Returns what multiplies ``a`` by the i-th copy of the tensors."""
        from vllm import _custom_ops

        def launch(i: int) -> torch.Tensor:
            packed, scales, zeros = copies[i % len(copies)]
            return _custom_ops.machete_mm(
                a=a,
                b_q=packed,
                b_type=self.type,
                b_group_zeros=zeros,
                b_group_scales=scales,
                b_group_size=GROUP_SIZE,
            )

        return launch


class Humming(Peer):
    """The package humming-kernels; it compiles what it needs at run time."""

    COMPUTE: ClassVar = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}

    def __init__(self, layer: LayerNumbers) -> None:
        """Packs the layer for Humming."""
        from humming.schema import BaseWeightSchema, HummingInputSchema
        from humming.transform import prepare_and_transform_humming_tensors
        from humming.tune import get_heuristics_config

        q, z, s = layer.q, layer.z, layer.s
        size_k, size_n = q.shape
        facts = {"quant_method": "humming", "dtype": "int4", "group_size": GROUP_SIZE, "has_zero_point": True}
        schema, tensors = BaseWeightSchema.from_config(facts).convert_humming(
            tensors={
                "weight": pack_words(q, 0).t().contiguous(),
                "weight_scale": s.t().contiguous(),
                "zero_point": pack_words(z, 1).t().contiguous(),
            },
            shape_n_stacks=[size_n],
            shape_k_stacks=[size_k],
            param_dtype=s.dtype,
        )
        self.layer, tensors = prepare_and_transform_humming_tensors(
            tensors=tensors,
            shape_n=size_n,
            shape_k=size_k,
            weight_schema=schema,
            input_schema=HummingInputSchema(),
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            has_bias=False,
            torch_dtype=s.dtype,
            device=q.device,
        )
        self.tensors = tensors["weight"], tensors["weight_scale"], tensors["zero_point"]
        blocks = 8 * torch.cuda.get_device_properties(q.device).multi_processor_count
        self.locks = torch.zeros(blocks, dtype=torch.int32, device=q.device)
        chosen = [get_heuristics_config(self.layer, size_m, **self.COMPUTE, device=0) for size_m in layer.sizes_m]
        sizes = zip(layer.sizes_m, chosen, strict=True)
        self.tuning = json.dumps([[size_m - 1, size_m, config] for size_m, config in sizes])

    def launcher(self, copies: list[Tensors], a: torch.Tensor) -> Launch:
        """Returns what multiplies ``a`` by the i-th copy of the tensors."""
        from humming.forward import humming_forward

        compute = json.dumps(self.COMPUTE)

        def launch(i: int) -> torch.Tensor:
            weight, scale, zero = copies[i % len(copies)]
            return humming_forward(
                self.layer,
                inputs=a,
                weight=weight,
                weight_scale=scale,
                zero_point=zero,
                locks=self.locks,
                compute_config=compute,
                tuning_config=self.tuning,
            )

        return launch


PEERS: dict[str, Callable[[LayerNumbers], Peer]] = {
    "marlin": Marlin,
    "machete": Machete,
    "humming": Humming,
}
