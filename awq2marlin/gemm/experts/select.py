"""Which kernels serve a layer of experts.

Nobody on the host knows how many rows an expert gets: that would take a wait for the router. What is known is their
mean, and that routers spread tokens about evenly. So the host chooses which heights of tiles a kernel has, and the GPU,
which counts the rows, which of them an expert gets. The shapes below were the fastest of a sweep on an H100
(2026-11-26) over five models' layers and 1 to 4096 tokens, or within a few percent of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple, get_args

from awq2marlin.gemm.experts.kernels import (
    ALIGN_BLOCKS,
    DIRECT_PAIRS,
    TILE_HEIGHTS,
    ExpertsConfig,
    HopperExpertsConfig,
    SmallExpertsConfig,
    align_source,
    sum_source,
)
from awq2marlin.gemm.experts.problem import Activation, ExpertProblem
from awq2marlin.gemm.families.base import DTYPES, HOPPER, MAX_SPLITS, Capability
from awq2marlin.gemm.source import KernelSource

#: Heights of tiles on Hopper, and on other GPUs.
_HOPPER_ROWS = (8, 16, 24, 32, 48, 64, 80, 112, 128, 144)
_OTHER_ROWS = (8, 16, 24, 32)

#: The largest height of `SmallExperts`; kernels with more rows have several heights.
_MAX_SMALL_ROWS = 32

#: The heights of a kernel by the one that nearly all experts' rows fit. The others are for experts that have fewer or
#: more.
_THREE_HEIGHTS = {48: (80, 48, 32), 64: (80, 64, 32), 80: (80, 64, 32)}
_TWO_HEIGHTS = {48: (48, 32), 64: (64, 48), 80: (80, 32)}

#: Beside taller ones there are these.
_BESIDE_TALL = (80, 48)

#: With so many rows of K, in all of a block's steps of 128 columns together, three heights are worth their code. With 8
#: bits, whose copies take twice as long, they always are; 80 and 32 rows alone would spill registers.
_MANY_ROWS = 1 << 14

#: With more rows a lane has no registers for two sets of sums; by how many blocks share a multiprocessor, and by bits.
_MAX_SCALED_ROWS = {1: {4: 80, 8: 80}, 2: {4: 24, 8: 16}}

#: Up to so many experts, a tile more is much.
_FEW_EXPERTS = 16

#: A Hopper kernel is worth it with so many blocks a multiprocessor, by how many that holds at once.
_ENOUGH_BLOCKS = {1: 0.9, 2: 1.0}

#: Columns of a result up to which an expert has few blocks.
_FEW_COLUMNS = 1024

#: 8-bit weights leave no registers for more sums.
_MAX_ROWS = {4: 144, 8: 128}

#: Nor does the error function.
_MAX_GELU_ROWS = 80


class Launch(NamedTuple):
    """A kernel, and how many blocks share K or a token's pairs."""

    config: ExpertsConfig
    num_splits: int = 1


class _Shape(NamedTuple):
    """Parameters of `SmallExpertsConfig` that were swept."""

    warps: int
    stages: int
    step_rows: int
    tiles: int
    resident_warps: int


# ---- the height of tiles -------------------------------------------------------------------------------------


def heights_for(problem: ExpertProblem) -> tuple[int, ...]:
    """Returns the heights that tiles may have, the tallest first.

    All tiles of an expert have the height with which they take the least time: `BestTiles` of ``kernels/experts.cuh``.
    """
    return _heights_with(problem, tile_rows_for(problem))


def _heights_with(problem: ExpertProblem, rows: int) -> tuple[int, ...]:
    """Returns the heights of a kernel for experts most of which fit a tile of so many rows."""
    if rows <= _MAX_SMALL_ROWS:
        return (rows,)
    if rows > _BESIDE_TALL[0]:
        return (rows, *_BESIDE_TALL)
    has_few_rows = (
        problem.num_experts * problem.out_columns * problem.size_k < 128 * _MANY_ROWS * problem.multiprocessors
    )
    return (_TWO_HEIGHTS if has_few_rows and problem.num_bits == 4 else _THREE_HEIGHTS)[rows]


def tile_rows_for(problem: ExpertProblem) -> int:
    """Returns how many rows of an expert are multiplied together, with even routing.

    The smallest height that nearly all experts' rows fit, as a second tile reads their weights again, and with few
    experts keeps all multiprocessors busy for another round; where there is none, the one whose tiles together take the
    least time. A product with one token has one row an expert.
    """
    if problem.num_pairs == problem.top_k:
        return 8
    mean = problem.mean_rows
    from_mean = 16 if problem.capability == HOPPER and _blocks_at_once(problem, 32) == 1 else 32
    is_for_all = problem.num_experts <= _FEW_EXPERTS and mean >= from_mean
    likely = mean + (3 if is_for_all else 2) * math.sqrt(mean)
    heights = _heights(problem)
    large = [rows for rows in heights if rows > _BESIDE_TALL[0]] or heights[-1:]
    best = min(large, key=lambda rows: _expected_tiles(mean, rows) * _stage_time(rows))
    return next((rows for rows in heights if rows >= likely), best)


def _heights(problem: ExpertProblem) -> tuple[int, ...]:
    heights = _HOPPER_ROWS if problem.capability == HOPPER else _OTHER_ROWS
    most = _MAX_ROWS[problem.num_bits] if problem.activation != "gelu" else _MAX_GELU_ROWS
    if problem.capability[0] == 10:
        most = (24 if problem.num_bits == 4 else 8) if _has_many_scales(problem) else 32
    if problem.capability[0] == 12:
        most = 8 if _has_many_scales(problem) else 24
    return tuple(rows for rows in heights if rows <= most)


def _has_many_scales(problem: ExpertProblem) -> bool:
    """Returns whether scales take many registers, too."""
    return problem.is_gated and problem.group_size == 32


def _expected_tiles(mean: float, rows: int) -> float:
    """Returns the mean number of tiles of an expert, with its rows normally distributed about their mean."""
    spread = 6 * math.sqrt(mean)  # hardly an expert is farther from the mean
    surely, last = max(0, int((mean - spread) / rows)), math.ceil((mean + spread) / rows)
    more = (math.erfc((tiles * rows - mean) / math.sqrt(2 * mean)) / 2 for tiles in range(surely, last + 1))
    return surely + sum(more)


def _stage_time(rows: int) -> float:
    """Returns the microseconds of a stage of 64 rows of K with tiles of that height, on an H100."""
    return 0.16 + 0.0055 * rows


# ---- the kernels ---------------------------------------------------------------------------------------------


def is_direct(problem: ExpertProblem, heights: tuple[int, ...]) -> bool:
    """Returns whether warps look at the choices themselves, so that no list of work is needed.

    Then there are blocks for every pair, of which those do nothing whose expert an earlier pair has chosen, too.
    """
    leading = problem.top_k if problem.num_pairs == problem.top_k else problem.chosen_experts
    return problem.num_pairs <= min(DIRECT_PAIRS, 2 * leading) and heights[0] <= _MAX_SMALL_ROWS


def sums_in_cluster(problem: ExpertProblem) -> bool:
    """Returns whether the cluster that multiplies a token's rows also sums them: one token only."""
    is_one_token = problem.num_pairs == problem.top_k
    return problem.sums_tokens and is_one_token and problem.capability >= HOPPER and 1 < problem.top_k <= MAX_SPLITS


@functools.lru_cache(maxsize=1 << 14)
def pick_launch(problem: ExpertProblem, heights: tuple[int, ...], *, has_list: bool) -> Launch:
    """Picks the kernel for a problem.

    Args:
        problem: what is multiplied.
        heights: of tiles, of which the products of a block have the same.
        has_list: whether there is a list of work, without which only few rows can be multiplied.
    """
    candidates = list(_candidates(problem, heights, is_one_token=problem.num_pairs == problem.top_k))
    small = [config for config in candidates if isinstance(config, SmallExpertsConfig)]
    large = next((config for config in candidates if isinstance(config, HopperExpertsConfig)), None)
    if has_list and large:
        enough = _ENOUGH_BLOCKS[large.blocks_at_once] * problem.multiprocessors
        if not small or large.blocks(problem) >= enough:
            return Launch(large)
    if has_list and problem.out_columns <= _FEW_COLUMNS:
        small = small[1:] or small  # smaller blocks: there are few of an expert
    config = _by_waves(small, problem)
    return Launch(config, problem.top_k if config.sums_pairs else _splits(config, problem))


def all_configs(*largest: ExpertProblem) -> list[ExpertsConfig]:
    """Returns every kernel that may be picked for a product, or for both of a block.

    Args:
        largest: the products for the largest number of tokens to come; all have the heights of the first.
    """
    found: dict[ExpertsConfig, None] = {}
    for problem in largest:
        one = replace(problem, num_pairs=problem.top_k)
        found.update(dict.fromkeys(_candidates(one, (8,), is_one_token=True)))
        for heights in _heights_up_to(largest[0]):
            found.update(dict.fromkeys(_candidates(problem, heights, is_one_token=False)))
    return list(found)


def _heights_up_to(largest: ExpertProblem) -> Iterator[tuple[int, ...]]:
    """Yields what `heights_for` may return for a product with so many tokens or fewer."""
    for rows in _heights(largest):
        yield _heights_with(largest, rows)
        if tile_rows_for(largest) <= rows <= _BESIDE_TALL[0]:
            return


def _candidates(problem: ExpertProblem, heights: tuple[int, ...], *, is_one_token: bool) -> Iterator[ExpertsConfig]:
    """Yields the configs of these heights. They depend on the layer, and of the tokens only on whether it is one."""
    rows = heights[0]
    if problem.capability == HOPPER and (rows > 16 or (rows == 16 and problem.size_k <= 512)):
        yield _hopper(problem, heights)
    has_few_registers = problem.num_bits == 8 and _has_many_scales(problem)
    most = 24 if problem.capability == HOPPER and has_few_registers else _MAX_SMALL_ROWS
    if rows <= most:
        for shape in _shapes(problem, rows, is_one_token=is_one_token):
            yield _small(problem, rows, shape, sums_pairs=is_one_token and sums_in_cluster(problem))


def _has_long_groups(problem: ExpertProblem) -> bool:
    """Returns whether scales may be applied to sums: a group is two stages of a Hopper kernel, or the only one."""
    return problem.size_k % 128 == 0 and problem.group_size in (128, problem.size_k)


def _blocks_at_once(problem: ExpertProblem, rows: int) -> int:
    """Returns how many blocks of a Hopper kernel share a multiprocessor: two where the sums are few."""
    return 2 if rows <= (24 if _has_long_groups(problem) else 32) else 1


def _hopper(problem: ExpertProblem, heights: tuple[int, ...]) -> HopperExpertsConfig:
    """Returns the config with as many stages as find room.

    Scales are applied to the sums of long groups, if there are registers for them.
    """
    blocks = _blocks_at_once(problem, heights[0])
    scales_sums = _has_long_groups(problem) and heights[0] <= _MAX_SCALED_ROWS[blocks][problem.num_bits]
    room = (113 if blocks == 2 else 227) << 10
    config = HopperExpertsConfig(
        dtype=problem.dtype,
        num_bits=problem.num_bits,
        activation=problem.activation,
        heights=heights,
        stages=8,
        blocks_at_once=blocks,
        scales_sums=scales_sums,
    )
    while config.shared_bytes > room:
        config = replace(config, stages=config.stages - (2 if scales_sums else 1))  # which takes stages in pairs
    return config


def _shapes(problem: ExpertProblem, rows: int, *, is_one_token: bool) -> tuple[_Shape, ...]:
    """Returns the swept shapes of a height: the first is picked, or the first later one that alone runs in one go."""
    size_k = problem.size_k
    warps = 8 if problem.capability[0] == 10 else 12  # with more there are too few registers for each
    if problem.is_gated and rows == 8:
        return _Shape(4, 2, 128, 2, 8), _Shape(2, 2, 128, 2, 8), _Shape(2, 2, 64, 2, warps)
    if problem.is_gated:
        return (_Shape(2, 2, 128 if rows == 16 else 64, 2, 8),)
    if rows == 8 and size_k >= 8192:
        return (_Shape(8, 3, 128, 1, 8) if is_one_token else _Shape(4, 2, 128, 1, 16),)
    if rows == 8 and is_one_token:
        return (_Shape(2, 3, 128, 1, 10) if size_k >= 1024 else _Shape(2, 3, 64, 1, 12),)
    if rows == 8:
        return (_Shape(2, 2, 128, 1, 16) if size_k >= 512 else _Shape(1, 2, 64, 2, warps),)
    if rows == 16 and problem.capability[0] == 12:
        return (_Shape(2, 2, 64, 1, 8),)
    return ({16: _Shape(2, 2, 128, 2, 8), 24: _Shape(4, 2, 64, 2, 8), 32: _Shape(2, 3, 64, 1, 8)}[rows],)


def _small(problem: ExpertProblem, rows: int, shape: _Shape, *, sums_pairs: bool) -> SmallExpertsConfig:
    """Returns the config of a shape, with shorter steps or fewer warps where the layer or the GPU wants them."""
    has_long_steps = problem.num_bits == 4 and problem.group_size >= 128 and problem.size_k % 128 == 0
    if problem.capability[0] == 12 and rows > 8:
        has_long_steps = False  # whose words take registers that 12.x does not have
    step_rows = shape.step_rows if has_long_steps else 64
    config = SmallExpertsConfig(
        dtype=problem.dtype,
        num_bits=problem.num_bits,
        activation=problem.activation,
        group_rows=step_rows if problem.group_size == problem.size_k else problem.group_size,
        token_tiles=rows // 8,
        sums_pairs=sums_pairs,
        **shape._replace(step_rows=step_rows)._asdict(),
    )
    while config.shared_bytes > problem.shared_limit:
        config = replace(config, stages=2) if config.stages > 2 else replace(config, warps=config.warps // 2)
    blocks = problem.multiprocessor_shared // (config.shared_bytes + 1024)
    return replace(config, resident_warps=min(config.resident_warps, config.warps * max(1, blocks)))


def _by_waves(configs: list[SmallExpertsConfig], problem: ExpertProblem) -> SmallExpertsConfig:
    """Returns the first config, or a later one if that alone runs all blocks at once."""
    for config in configs:
        if config.blocks(problem) <= problem.multiprocessors * config.resident_blocks:
            return config
    return configs[0]


def _splits(config: SmallExpertsConfig, problem: ExpertProblem) -> int:
    """Returns how many blocks share K: as many as find room at once, each with a step for every warp."""
    if problem.capability < HOPPER or config.token_tiles > 1:
        return 1
    # Clusters leave multiprocessors over; how many was found by timing: see GemmProblem.blocks_at_once.
    room = {1: 1.0, 2: 1.0, 3: 0.91}
    slots, steps = problem.multiprocessors * config.resident_blocks, problem.size_k // config.step_rows
    fitting = [
        splits
        for splits in range(1, MAX_SPLITS + 1)
        if config.blocks(problem) * splits <= slots * room.get(splits, 0.85) and splits * config.warps <= steps
    ]
    return max(fitting, default=1)


def align_sources(capability: Capability) -> list[KernelSource]:
    """Returns every kernel that writes a list of work on a GPU of that compute capability."""
    blocks = (1, ALIGN_BLOCKS) if capability >= HOPPER else (1,)
    heights = (1, TILE_HEIGHTS) if capability == HOPPER else (1,)
    return [align_source(*each) for each in product(blocks, heights)]


def all_sources(capability: Capability, *, full: bool = True) -> list[KernelSource]:
    """Returns every kernel that a GPU of that compute capability can be asked for.

    Args:
        capability: the GPU's compute capability.
        full: whether for every type, width and group size; or each kernel for the usual one, and few for the others.
    """
    sources = {*align_sources(capability), *map(sum_source, DTYPES)}
    kinds = product(DTYPES, (4, 8), (32, 64, 128), get_args(Activation))
    for dtype, num_bits, group_size, activation in kinds:
        is_usual_weight, is_usual_gate = (
            (dtype, num_bits, group_size) == ("fp16", 4, 128),
            activation in ("none", "silu"),
        )
        if not (full or is_usual_weight or is_usual_gate):
            continue
        is_usual = is_usual_weight and is_usual_gate
        sizes_k = (256, 1024, 8192) if full or is_usual else (256,)
        tokens = 1 << 20 if full or is_usual else 16
        many_and_few = (1, 132)  # tiles of a block, by multiprocessors
        for size_k, sums_tokens, multiprocessors in product(sizes_k, {False, activation == "none"}, many_and_few):
            problem = ExpertProblem(
                num_pairs=8 * tokens,
                top_k=8,
                num_experts=128,
                size_n=512,
                size_k=size_k,
                group_size=group_size,
                num_bits=num_bits,
                dtype=dtype,
                activation=activation,
                sums_tokens=sums_tokens,
                capability=capability,
                multiprocessors=multiprocessors,
            )
            configs = all_configs(problem)
            sources |= {config.source for config in (configs if full or is_usual else configs[-1:])}
    return sorted(sources, key=lambda source: source.name)
