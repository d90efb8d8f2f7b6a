"""Random experts and routings, their exact results, and how far from them a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from awq2marlin.gemm import ops as dense
from awq2marlin.gemm.experts import ops
from tests.gemm.gemm_cases import UNIT

ACTIVATE = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

#: An activation's slope at most, over all numbers.
SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}


@dataclass
class Experts:
    """Marlin tensors of random experts [E, K, N]. Every bit pattern is a valid weight, so they are drawn packed."""

    size_k: int
    size_n: int
    num_bits: int
    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def number(self) -> int:
        return self.qweight.shape[0]

    @property
    def weights(self):
        return self.qweight, self.scales, self.qzeros

    def weight(self, expert: int) -> torch.Tensor:
        """The exact weight of one, float64 [K, N]."""
        qzeros = None if self.qzeros is None else self.qzeros[expert]
        return dense.dequantize(self.qweight[expert], self.scales[expert], qzeros, num_bits=self.num_bits)

    def of(self, first: int, last: int) -> Experts:
        """Those of a rank."""
        rows = slice(first, last)
        parts = {name: getattr(self, name) for name in ("qweight", "scales", "qzeros", "bias")}
        return replace(self, **{name: part if part is None else part[rows] for name, part in parts.items()})

    def __call__(self, a, ids, shares=None):
        return ops.marlin_moe_gemm(a, *self.weights, ids, shares, self.bias, num_bits=self.num_bits)


@dataclass
class Block:
    """The two layers of a block of experts."""

    w13: Experts
    w2: Experts
    activation: str = "silu"

    @property
    def arguments(self):
        return (*self.w13.weights, *self.w2.weights)

    @property
    def options(self):
        return {"activation": self.activation, "num_bits": self.w13.num_bits}

    def of(self, first: int, last: int) -> Block:
        return replace(self, w13=self.w13.of(first, last), w2=self.w2.of(first, last))

    def __call__(self, hidden, ids, shares):
        biases = {"w13_bias": self.w13.bias, "w2_bias": self.w2.bias}
        return ops.marlin_experts(hidden, *self.arguments, ids, shares, **biases, **self.options)


def random_experts(
    number,
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
    """Weights come to about 1/sqrt(K), so that results do to 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    groups, factor = 1 if group_size == -1 else size_k // group_size, 32 // num_bits

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)

    scales = torch.rand(number, groups, size_n, device=device, generator=generator) + 0.5
    return Experts(
        size_k,
        size_n,
        num_bits,
        words(number, size_k // 16, size_n * 16 // factor),
        (scales * 3.5 / 2**num_bits / size_k**0.5).to(dtype),
        words(number, groups, size_n // factor) if has_zeros else None,
        torch.randn(number, size_n, device=device, generator=generator).to(dtype) if has_bias else None,
    )


def random_block(number, hidden, inner, group_sizes, *, activation="silu", seed=0, **options):
    first, second = group_sizes
    w13 = random_experts(number, hidden, 2 * inner, first, seed=seed, **options)
    return Block(w13, random_experts(number, inner, hidden, second, seed=seed + 1, **options), activation)


def random_rows(count, experts, *, seed=1):
    generator = torch.Generator(device=experts.scales.device).manual_seed(seed)
    shape = (count, experts.size_k)
    return torch.randn(shape, device=experts.scales.device, generator=generator).to(experts.scales.dtype)


ROUTINGS = ("uniform", "zipf", "one", "few", "foreign", "nobody", "twice")


def random_routing(tokens, top_k, number, kind="uniform", *, dtype=torch.int32, device="cpu", seed=2):
    """Chosen experts [M, k] and their weights, fp32 [M, k], that sum to 1.

    Kinds: ``uniform``; ``zipf``, where an expert's chance falls with its rank; ``one``, where all rows go to the last
    expert; ``few``, where only every fifth has rows; ``foreign``, where about half of the ids are -1 or E or far off,
    as far as the type goes;
    ``nobody``, where all are; ``twice``, where a token has the same expert for all its choices.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    favour = torch.zeros(number, device=device)
    if kind == "zipf":
        favour = -torch.arange(1, number + 1, device=device).float().log()
    if kind == "few":
        favour[torch.arange(number, device=device) % 5 != 0] = -torch.inf
    draws = torch.rand(tokens, top_k, number, **options).clamp(1e-9, 1 - 1e-7)
    ids = (favour - (-draws.log()).log()).argmax(-1)
    if kind == "one":
        ids.fill_(number - 1)
    if kind == "twice":
        ids = ids[:, :1].expand(-1, top_k)
    if kind in ("foreign", "nobody"):
        far = [2**31 - 1, -(2**31)] if dtype == torch.int32 else [2**32, number - 1 - 2**32, 2**63 - 1, -(2**63)]
        strangers = torch.tensor([-1, number, *far], device=device)  # in 64 bits also such as end like a known one
        which = torch.randint(0, len(strangers), ids.shape, **options)
        is_stranger = torch.rand(ids.shape, **options) < (1 if kind == "nobody" else 0.5)
        ids = torch.where(is_stranger, strangers[which], ids)
    shares = torch.rand(tokens, top_k, **options) + 0.1
    return ids.to(dtype).contiguous(), shares / shares.sum(1, keepdim=True)


def listed_items(ids, number, heights):
    """The items of the list of work, (expert, rows of its tiles, first row, count), in their order.

    All tiles of an expert have the height that takes the least time, the taller one of two: a tile takes as long as its
    rows and 64 more. Tall tiles come first.
    """
    known = ids[(ids >= 0) & (ids < number)].long()
    counts = torch.bincount(known, minlength=number).tolist()
    items, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            rows = min(heights, key=lambda rows: -(-count // rows) * (rows + 64))
            starts = range(0, count, rows)
            items += [(expert, rows, first + start, min(rows, count - start)) for start in starts]
        first += count
    return sorted(items, key=lambda item: -item[1])


#: How far results may be off on the whole, in units of their type: products come to 0.5 to 0.8, blocks to 2.
UNITS_OF_PRODUCT, UNITS_OF_BLOCK = 2, 4


def assert_within(out, expected, bound, units, what):
    """Compares [..., N] with float64: within a bound for each element, and within a few units on the whole.

    NaN is wrong, too.
    """
    assert out.shape == expected.shape
    error = (out.double() - expected).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} results are off; the first at {place}: "
            f"{out[place].item()} for {expected[place].item()}, bound {bound[place].item():.2e}"
        )
    share = (error.norm() / expected.norm().clamp(min=1e-30)).item()
    assert share <= units * UNIT[out.dtype], f"{what}: on the whole off by {share:.1e} of the result"


class Known:
    """Decodes each expert's weight once: float64, and its magnitudes."""

    def __init__(self, experts):
        self._experts, self._weights = experts, {}

    def __call__(self, expert):
        if expert not in self._weights:
            self._weights[expert] = self._experts.weight(expert)
        return self._weights[expert]


def products(rows, experts, chosen, known, error):
    """The exact rows [r, N] of chosen experts [r] with their bias, and how far a product in fp32 may be from them.

    A kernel may round each weight to the activations' type (one unit, relative) and sums in fp32 (one unit of fp32 per
    addition, doubled as tensor cores truncate); ``error`` [r, K] is how far each input may be from ``rows``.
    """
    unit = UNIT[experts.scales.dtype]
    out = torch.zeros(len(rows), experts.size_n, dtype=torch.float64, device=rows.device)
    bound = torch.zeros_like(out)
    for expert in chosen.unique().tolist():
        mine = (chosen == expert).nonzero().reshape(-1)
        if not 0 <= expert < experts.number:
            continue
        weight = known(expert)
        magnitude = weight.abs()
        out[mine] = rows[mine] @ weight
        bound[mine] = (unit + experts.size_k * 2.0**-23) * (rows[mine].abs() @ magnitude) + error[mine] @ magnitude
        if experts.bias is not None:
            out[mine] += experts.bias[expert].double()
    return out, bound


def assert_products(out, a, experts, ids, shares=None, *, tokens=None, known=None):
    """Compares a grouped product [M, k, N] with float64, within what the arithmetic implies.

    Args:
        tokens: which are compared; all of them by default.
        known: the decoded weights.
    """
    tokens = torch.arange(len(ids), device=ids.device) if tokens is None else torch.tensor(tokens, device=ids.device)
    top_k, chosen = ids.shape[1], ids[tokens].reshape(-1)
    pairs = (tokens[:, None] * top_k + torch.arange(top_k, device=ids.device)).reshape(-1)
    rows = a[pairs // top_k if len(a) == len(ids) else pairs].double()
    exact, bound = products(rows, experts, chosen, known or Known(experts), torch.zeros_like(rows))
    if shares is not None:
        exact, bound = (each * shares[tokens].double().reshape(-1, 1) for each in (exact, bound))
    unit = UNIT[a.dtype]
    bound = bound + 1.01 * unit * exact.abs() + 2.0**-22 * exact.abs() + 1e-7
    is_foreign = ((chosen < 0) | (chosen >= experts.number))[:, None]
    bound = torch.where(is_foreign, 0.0, bound)  # exactly zero
    shape = (len(tokens), top_k, experts.size_n)
    what = f"experts {tuple(experts.qweight.shape)}"
    assert_within(out[tokens], exact.reshape(shape), bound.reshape(shape), UNITS_OF_PRODUCT, what)


def assert_block(out, hidden, block, ids, shares, *, tokens=None, known=None):
    """Compares a block's result [M, H] with float64, within what the arithmetic implies.

    A kernel may round gate and up, and their product, to the activations' type, each expert's weighted row too, and
    then the sum once; all sums are of fp32.

    Args:
        tokens: which are compared; all of them by default.
        known: the decoded weights of w13 and w2.
    """
    first, second = known or (Known(block.w13), Known(block.w2))
    unit = UNIT[hidden.dtype]
    tokens = torch.arange(len(ids), device=ids.device) if tokens is None else torch.tensor(tokens, device=ids.device)
    top_k, chosen = ids.shape[1], ids[tokens].reshape(-1)
    rows = hidden[tokens].double().repeat_interleave(top_k, 0)
    sums, error = products(rows, block.w13, chosen, first, torch.zeros_like(rows))
    (gate, up), (gate_error, up_error) = sums.chunk(2, 1), (error + unit * sums.abs()).chunk(2, 1)
    acted = ACTIVATE[block.activation](gate)
    inner = acted * up
    acted_error = SLOPE[block.activation] * gate_error + 2.0**-20 * acted.abs()
    inner_error = acted_error * (up.abs() + up_error) + acted.abs() * up_error
    inner_error = inner_error + unit * (inner.abs() + inner_error) + 1e-7
    exact, bound = products(inner, block.w2, chosen, second, inner_error)
    weights = shares[tokens].double().reshape(-1, 1)
    exact, bound = exact * weights, bound * weights
    bound = bound + 1.01 * unit * (exact.abs() + bound)  # the row's rounding before the sum
    shape = (len(tokens), top_k, block.w2.size_n)
    total, magnitude = exact.reshape(shape).sum(1), exact.abs().reshape(shape).sum(1)
    bound = bound.reshape(shape).sum(1) + 1.01 * unit * total.abs() + top_k * 2.0**-23 * magnitude + 1e-7
    assert_within(out[tokens], total, bound, UNITS_OF_BLOCK, f"block {tuple(block.w13.qweight.shape)}")
