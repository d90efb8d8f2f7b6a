"""One description of the problem, one table, one place that picks."""

import itertools
from dataclasses import replace

import pytest

from awq2marlin.gemm import kernel_configs as configs
from awq2marlin.gemm import ops
from awq2marlin.gemm.kernel_configs import GemmProblem, all_configs, all_sources, grid_of, pick_config, with_splits

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
SIZES_M = [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 1000, 70_000]
SHAPES = [(128, 64), (64, 128), (192, 128), (4096, 4096), (28672, 8192), (8192, 57344), (1344, 1280)]


def problems(capability):
    for size_m, (size_k, size_n), group_size, bits in itertools.product(SIZES_M, SHAPES, (32, 64, 128, -1), (4, 8)):
        if size_k % group_size == 0:
            group = size_k if group_size == -1 else group_size
            yield GemmProblem(size_m, size_n, size_k, group, bits, "fp16", capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_whatever_is_picked_is_in_the_compiled_matrix(capability):
    sources = set(all_sources(capability))
    for problem in problems(capability):
        assert pick_config(problem).source in sources


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_whatever_is_picked_covers_the_output_and_fits_the_gpu(capability):
    shared_limit = 227 * 1024 if capability in ((9, 0), (10, 0)) else 99 * 1024 if capability != (8, 0) else 163 * 1024
    for problem in problems(capability):
        config = pick_config(problem)
        splits, tiles_n, tiles_m = grid_of(config, problem)
        columns, tokens = config.tile
        assert tiles_n * columns >= problem.size_n
        assert tiles_m * tokens >= problem.size_m
        assert max(tiles_n, tiles_m) < 65536, "the second and third dimension of a grid"
        assert 1 <= splits <= configs.MAX_SPLITS
        assert config.shared_bytes <= shared_limit
        assert config.reduction == ("cluster" if problem.has_clusters else "workspace")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_warm_up_knows_whatever_may_be_picked(capability):
    for problem in problems(capability):
        assert ops._sources_of(problem)[pick_config(problem).source] == pick_config(problem).shared_bytes


def test_a_warm_up_for_few_tokens_leaves_out_the_rest():
    problem = GemmProblem(70_000, 4096, 4096, 128, 4, "fp16")
    few, all_of_them = (ops._sources_of(replace(problem, size_m=size_m)) for size_m in (8, 70_000))
    assert few.keys() < all_of_them.keys()


def test_every_problem_has_a_portable_kernel():
    for problem in problems((9, 0)):
        assert any(type(config) is configs.PortableConfig for config in all_configs(problem))


def test_warpgroup_instructions_are_for_hopper_alone():
    problem = GemmProblem(256, 4096, 4096, 128, 4, "bf16", (10, 0))
    assert not any(type(config) is configs.HopperConfig for config in all_configs(problem))


def test_with_splits_changes_nothing_else():
    problem = GemmProblem(1, 4096, 4096, 128, 4, "fp16")
    for config in all_configs(problem):
        changed = with_splits(config, 3, "workspace")
        assert (changed.num_splits, changed.reduction) == (3, "workspace")
        assert changed.source == config.source
        assert with_splits(changed, 1, config.reduction) == config
