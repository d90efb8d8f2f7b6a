"""Which kernel serves which problem. Nothing here knows a family by its name."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product

from awq2marlin.gemm.families import FAMILIES
from awq2marlin.gemm.families.base import ANY_NUMBER, DTYPES, Capability, GemmConfig, GemmProblem
from awq2marlin.gemm.source import KernelSource, repack_source


def families_for(problem: GemmProblem) -> list[type[GemmConfig]]:
    """Returns the families among whose configs one is picked for a problem."""
    serving = [family for family in FAMILIES if family.serves(problem)]
    return [family for family in serving if not family.is_fallback] or serving


def candidates_for(problem: GemmProblem) -> list[GemmConfig]:
    """Returns the unsplit configs among which one is picked for a problem."""
    return [candidate for family in families_for(problem) for candidate in family.candidates(problem)]


@functools.lru_cache(maxsize=1 << 14)
def pick_config(problem: GemmProblem) -> GemmConfig:
    """Picks the kernel and its parameters for a problem: of all launches the one with the least cost."""
    launches = (launch for candidate in candidates_for(problem) for launch in candidate.launches(problem))
    return min(launches, key=lambda config: config.cost(problem))


def all_configs(problem: GemmProblem) -> list[GemmConfig]:
    """Returns every unsplit config that serves a problem, of every family."""
    return [config for family in FAMILIES if family.serves(problem) for config in family.candidates(problem)]


@functools.cache
def first_tokens() -> tuple[int, ...]:
    """Returns the numbers of tokens from which on other configs may be picked, from 1 upwards."""
    edges = {edge for family in FAMILIES for tokens in family.token_ranges for edge in (tokens.start, tokens.stop)}
    return tuple(sorted(edges - {ANY_NUMBER}))


def sources_up_to(largest: GemmProblem) -> dict[KernelSource, int]:
    """Returns every kernel that a layer may need, with its shared memory in bytes.

    Args:
        largest: the layer's product for the largest number of tokens to come.
    """
    sources: dict[KernelSource, int] = {}
    # Whether tokens share memory is not known before they come, and such tokens have other kernels.
    tokens = [size_m for size_m in first_tokens() if size_m <= largest.size_m]
    for size_m, rows_overlap in product(tokens, (False, True)):
        for config in candidates_for(replace(largest, size_m=size_m, rows_overlap=rows_overlap)):
            sources |= {config.source: config.shared_bytes, config.sum_source: config.sum_shared_bytes}
    return sources


def all_sources(capability: Capability) -> list[KernelSource]:
    """Returns every kernel that a GPU of that compute capability can be asked for."""
    sources = {repack_source(4), repack_source(8)}
    sizes_k = (256, 192)  # a multiple of 128, and one of 64 only
    for dtype, bits, group, size_m, size_k in product(DTYPES, (4, 8), (32, 64, 128), first_tokens(), sizes_k):
        if size_k % group == 0:
            problem = GemmProblem(size_m, 256, size_k, group, bits, dtype, capability)
            for config in all_configs(problem):
                sources |= {config.source, config.sum_source}
    return sorted(sources, key=lambda source: source.name)
