"""Random layers, their exact product, and how far from it a kernel may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from awq2marlin.gemm import ops

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

#: The rounding unit of a type: half the distance from 1 to the next number.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

#: (K, N): every alignment that the layout knows, and a few widths that no tile of a kernel divides.
SMALL_SHAPES = [
    (128, 64),  # the smallest with N = 64
    (64, 128),  # the smallest with K = 64; one group at g = 64
    (192, 128),  # K a multiple of 64 only
    (256, 192),  # N no multiple of 128
    (640, 320),  # N past one block of 256 columns, five steps of 128 rows
    (512, 1088),  # N past four blocks; more splits than some blocks have steps
]


@dataclass
class Layer:
    """Marlin tensors of a random layer. Every bit pattern is a valid weight, so they are drawn packed."""

    size_k: int
    size_n: int
    num_bits: int
    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        """The exact weight, float64 [K, N]."""
        return ops.dequantize(self.qweight, self.scales, self.qzeros, num_bits=self.num_bits)

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        return ops.marlin_gemm(a, self.qweight, self.scales, self.qzeros, self.bias, num_bits=self.num_bits)


def random_layer(
    size_k,
    size_n,
    group_size,
    *,
    num_bits=4,
    dtype=torch.float16,
    has_zeros=True,
    has_bias=False,
    device="cpu",
    seed=0,
):
    generator = torch.Generator(device=device).manual_seed(seed)
    groups = 1 if group_size == -1 else size_k // group_size
    factor = 32 // num_bits

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)

    scales = torch.rand(groups, size_n, device=device, generator=generator) * 0.02 + 0.001
    return Layer(
        size_k,
        size_n,
        num_bits,
        words(size_k // 16, size_n * 16 // factor),
        scales.to(dtype),
        words(groups, size_n // factor) if has_zeros else None,
        torch.randn(size_n, device=device, generator=generator).to(dtype) if has_bias else None,
    )


def random_tokens(size_m, layer, *, seed=1):
    generator = torch.Generator(device=layer.scales.device).manual_seed(seed)
    shape = (size_m, layer.size_k)
    return torch.randn(shape, device=layer.scales.device, generator=generator).to(layer.scales.dtype)


def assert_product(out, a, layer):
    """Compares with float64, within what the arithmetic implies.

    A kernel may round each weight to the activations' type (one unit, relative), sums in fp32 (one unit of fp32 per
    addition, doubled as tensor cores truncate), adds the bias in fp32 and rounds the result once.
    """
    weight, wide = layer.weight, a.double()
    expected = wide @ weight
    if layer.bias is not None:
        expected += layer.bias.double()
    magnitude = wide.abs() @ weight.abs()
    unit = UNIT[a.dtype]
    bound = 1.01 * unit * expected.abs() + (unit + layer.size_k * 2.0**-23) * magnitude + 1e-7
    error = (out.double() - expected).abs()
    wrong = ~(error <= bound)  # NaN is wrong, too
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} results are off; the first at token {row}, column {column}: "
            f"{out[row, column].item()} for {expected[row, column].item()}, bound {bound[row, column].item():.2e}"
        )


def from_both_devices(there: Callable[[], torch.Tensor], here: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Calls a kernel on the second GPU, then from four threads at once: there, there on a side stream, and here.

    Returns:
        what the calls gave, nine times on the second GPU and four times on the first one, once it is there.
    """
    outs = [there()]

    def compute() -> None:  # the thread's device is the first one
        outs.append(there())
        with torch.cuda.stream(torch.cuda.Stream(1)):
            outs.append(there())
            torch.cuda.current_stream().synchronize()
        outs.append(here())

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    torch.cuda.synchronize(0)
    return outs
