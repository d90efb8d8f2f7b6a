"""From checked tensors to the dense kernels, on the current stream of the tensors' device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from awq2marlin.gemm.checks import GemmTensors, LayerShape, check_addresses, check_gemm
from awq2marlin.gemm.driver import Blocks, Device, PreparedKernel, device_of, load_kernels, tensor_map
from awq2marlin.gemm.families.base import SUM_THREADS, Dtype, GemmConfig, GemmProblem
from awq2marlin.gemm.select import sources_up_to
from awq2marlin.gemm.source import repack_source
from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N

DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "fp16", torch.bfloat16: "bf16"}

#: Of these a kernel of the GEMM is given the addresses: the first of ``MARLIN_GEMM_PARAMETERS`` of
#: ``kernels/gemm_base.cuh``, in order.
_ADDRESSES = ("a", "qweight", "scales", "qzeros", "bias", "out", "workspace")


def describe(shape: LayerShape, size_m: int, dtype: torch.dtype, num_bits: int, device: Device) -> GemmProblem:
    """Returns the product of a layer with ``size_m`` tokens of type ``dtype``, on a device."""
    return GemmProblem(
        size_m,
        shape.size_n,
        shape.size_k,
        shape.group_size,
        num_bits,
        DTYPES[dtype],
        device.capability,
        device.multiprocessors,
    )


def problem_of(tensors: GemmTensors) -> GemmProblem:
    """Checks CUDA tensors and describes their product, for `select.pick_config` and `GemmCall`.

    Raises:
        TypeError: as `checks.check_gemm` does.
        ValueError: as `checks.check_gemm` does.
    """
    a = tensors.a
    problem = describe(check_gemm(tensors), a.shape[0], a.dtype, tensors.num_bits, device_of(a.device.index))
    return replace(problem, rows_overlap=a.shape[0] > 1 and a.stride(0) < a.shape[1])


class GemmCall:
    """A product of tensors of one kind, checked, picked and prepared: each call says only where they are."""

    def __init__(self, config: GemmConfig, problem: GemmProblem, tensors: GemmTensors) -> None:
        """Compiles and loads the kernels, if that has not been done.

        Args:
            config: any that serves the problem; `select.pick_config` gives the one for everyday use.
            problem: what the tensors' shapes say.
            tensors: checked, on a CUDA device; those of a call have their types, shapes, strides and device.

        Raises:
            KernelUnavailableError: a kernel cannot be compiled or loaded now.
        """
        a, qweight, scales, qzeros, _, _ = tensors
        device, overlaps, count = device_of(a.device.index), problem.has_clusters, len(_ADDRESSES)
        numbers = (  # the rest of MARLIN_GEMM_PARAMETERS
            problem.size_m,
            problem.size_n,
            problem.size_k,
            problem.group_size,
            config.splits_argument(problem),
            a.stride(0),
            qweight.stride(0),
            scales.stride(0),
            0 if qzeros is None else qzeros.stride(0),
        )
        blocks = Blocks(config.grid(problem), config.threads, config.cluster, config.shared_bytes, overlaps)
        self._multiply = PreparedKernel(config.source, device, blocks, len(config.boxes), count, numbers)
        self._maps = []
        for box in config.boxes:
            matrix: torch.Tensor = getattr(tensors, box.tensor)
            map_at = partial(tensor_map, matrix.shape, matrix.stride(0), matrix.itemsize, box, device.index)
            self._maps.append((_ADDRESSES.index(box.tensor), map_at))
        self._out_shape = (problem.size_m, problem.size_n)
        self._workspace_size = 0
        if config.needs_workspace:
            self._workspace_size = config.workspace_bytes(problem) // 4
        if self._workspace_size:
            blocks = Blocks(
                config.sum_grid(problem), SUM_THREADS, shared_bytes=config.sum_shared_bytes, overlaps=overlaps
            )
            self._sum = PreparedKernel(config.sum_source, device, blocks, 0, count, numbers)

    def __call__(
        self,
        a: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        qzeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the product, formed on the current stream of the tensors' device.

        Args:
            a: as for `ops.marlin_gemm`, and so for the rest.
            qweight: the weights.
            scales: theirs.
            qzeros: theirs, or None.
            bias: what is added, or None.
            out: where the result goes, contiguous [M, N]; by default a new tensor.

        Raises:
            ValueError: a tensor begins where the widest load of a kernel may not.
        """
        a_at, qweight_at, scales_at = a.data_ptr(), qweight.data_ptr(), scales.data_ptr()
        qzeros_at = 0 if qzeros is None else qzeros.data_ptr()
        bias_at = 0 if bias is None else bias.data_ptr()
        if (a_at | qweight_at | scales_at | qzeros_at | bias_at) % 16:
            check_addresses(a=(a, 16), qweight=(qweight, 16), scales=(scales, 16), qzeros=(qzeros, 16), bias=(bias, 8))
        if out is None:
            out = a.new_empty(self._out_shape)
        workspace, workspace_at = None, 0
        if self._workspace_size:
            workspace = a.new_empty(self._workspace_size, dtype=torch.float32)
            workspace_at = workspace.data_ptr()
        addresses = (a_at, qweight_at, scales_at, qzeros_at, bias_at, out.data_ptr(), workspace_at)
        self._multiply(*[map_at(addresses[which]) for which, map_at in self._maps], *addresses)
        if workspace is not None:
            self._sum(*addresses)
        return out


def launch_gemm(
    config: GemmConfig, problem: GemmProblem, tensors: GemmTensors, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs one config on checked CUDA tensors, once; arguments, result and errors are those of `GemmCall`."""
    return GemmCall(config, problem, tensors)(*tensors[:5], out)


def launch_repack(qweight: torch.Tensor, out: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> None:
    """Repacks a checked CUDA tensor from AWQ to Marlin.

    Args:
        qweight: int32 [K, N/f], AWQ.
        out: int32 [K/16, N*16/f], contiguous.
        size_k: K.
        size_n: N.
        num_bits: 4 or 8.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or loaded now.
    """
    threads = size_k // GPTQ_MARLIN_TILE * (size_n // MARLIN_TILE_N) * 4
    blocks, numbers = Blocks((-(-threads // 256), 1, 1), 256), (size_k, size_n, qweight.stride(0))
    repack = PreparedKernel(repack_source(num_bits), device_of(qweight.device.index), blocks, 0, 2, numbers)
    repack(qweight.data_ptr(), out.data_ptr())


def load_up_to(largest: GemmProblem, device: Device) -> int:
    """Compiles and loads every kernel that a layer may need, and returns how many they are.

    Args:
        largest: the layer's product for the largest number of tokens to come.
        device: where.

    Raises:
        KernelUnavailableError: one cannot be compiled or loaded.
    """
    sources = sources_up_to(largest)
    load_kernels(sources, device)
    return len(sources)
