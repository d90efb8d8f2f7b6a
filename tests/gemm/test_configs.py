"""The families of kernels and the one place that picks: every problem is served, no candidate is there for nothing."""

import itertools
import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from awq2marlin.gemm import launch as launching
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families import FAMILIES
from awq2marlin.gemm.families import base as families
from awq2marlin.gemm.families.base import HOPPER, GemmConfig, GemmProblem
from awq2marlin.gemm.families.hopper import HopperConfig
from awq2marlin.gemm.families.portable import PortableConfig
from awq2marlin.gemm.families.small import SmallConfig
from awq2marlin.gemm.families.wide import WideConfig
from awq2marlin.gemm.select import (
    all_configs,
    all_sources,
    candidates_for,
    families_for,
    first_tokens,
    pick_config,
    sources_up_to,
)
from awq2marlin.gemm.source import kernels_dir
from tests.gemm.gemm_cases import random_layer

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
SIZES_M = [1, 2, 8, 9, 16, 17, 24, 25, 32, 33, 48, 64, 65, 96, 128, 129, 192, 512, 1000, 70_000]
SHAPES = [(128, 64), (64, 128), (192, 128), (4096, 4096), (14336, 4096), (28672, 8192), (8192, 57344), (1344, 1280)]
ROOT = Path(__file__).parents[2]
#: What was timed of the picks, the newest last.
RESULTS = [ROOT / "benchmarks" / "results" / name for name in ("gemm_h100.json", "gemm_stages_h100.json")]


def problems(capability):
    for size_m, (size_k, size_n), group_size, bits in itertools.product(SIZES_M, SHAPES, (32, 64, 128, -1), (4, 8)):
        if size_k % group_size == 0:
            group = size_k if group_size == -1 else group_size
            yield GemmProblem(size_m, size_n, size_k, group, bits, "fp16", capability)


# --- the families -----------------------------------------------------------------------------------------


def test_host_and_device_side_of_a_family_bear_one_name():
    headers = {path.name for path in kernels_dir().glob("gemm_*.cuh")}
    modules = {path.stem for path in Path(families.__file__).parent.glob("[!_]*.py")}
    assert headers == {f"gemm_{name}.cuh" for name in modules}
    for family in FAMILIES:
        assert family.header == f"gemm_{family.__module__.rpartition('.')[2]}.cuh"
        assert f"class {family.template} " in (kernels_dir() / family.header).read_text("utf-8")


def test_every_module_of_the_package_gives_a_family_and_specialists_come_first():
    assert (SmallConfig, HopperConfig, WideConfig, PortableConfig) == FAMILIES


def test_a_candidate_without_its_cost_cannot_be_made():
    class Forgetful(GemmConfig):
        candidates = tile = threads = shared_bytes = template_arguments = resident_blocks = None

    with pytest.raises(TypeError, match="cost"):
        Forgetful(dtype="fp16", num_bits=4, reduction="cluster")
    for family in FAMILIES:
        problem = GemmProblem(1, 256, 256, 128, 4, "fp16")
        candidate = next(iter(family.candidates(problem)))
        given = {field.name: getattr(candidate, field.name) for field in fields(candidate)}
        for cost in {"times"} & given.keys():
            with pytest.raises(TypeError, match=cost):
                family(**{name: value for name, value in given.items() if name != cost})


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_launch_of_every_candidate_has_a_cost(capability):
    for problem in problems(capability):
        for candidate in all_configs(problem):
            launches = list(candidate.launches(problem))
            assert launches
            for launch in launches:
                assert launch.with_splits(1, candidate.reduction) == candidate
                assert 0 <= launch.cost(problem) < math.inf


def row_of(config):
    """The candidate, whatever the problem was."""
    of_the_problem = {"num_splits": 1, "reduction": "cluster", "group_rows": 0, "is_alone": True}
    return replace(config, **{name: value for name, value in of_the_problem.items() if hasattr(config, name)})


def test_every_candidate_is_picked_by_some_problem():
    every = [problem for capability in CAPABILITIES for problem in problems(capability)]
    candidates = {row_of(config) for problem in every for config in candidates_for(problem)}
    assert {type(config) for config in candidates} == {*FAMILIES}
    cases = list(itertools.product(every, (16, 46, 108, 132)))
    random.Random(0).shuffle(cases)  # a tenth of them is enough then
    missing = set(candidates)
    while missing and cases:
        problem, multiprocessors = cases.pop()
        config = row_of(pick_config(replace(problem, multiprocessors=multiprocessors)))
        assert config in candidates
        missing.discard(config)
    assert not missing


def test_a_multiprocessor_has_no_room_for_more_small_blocks_than_are_counted():
    for problem in problems(HOPPER):
        for config in all_configs(problem):
            if isinstance(config, SmallConfig):
                assert config.kernel_bytes <= config.shared_bytes <= problem.shared_limit
                assert (config.resident_blocks + 1) * (config.shared_bytes + 1024) > families.SHARED_BYTES


def test_every_problem_has_a_portable_kernel():
    for problem in problems((9, 0)):
        assert any(type(config) is PortableConfig for config in all_configs(problem))


def test_warpgroup_instructions_are_for_hopper_alone():
    problem = GemmProblem(256, 4096, 4096, 128, 4, "bf16", (10, 0))
    assert not any(type(config) in (HopperConfig, WideConfig) for config in all_configs(problem))


def test_the_boxes_of_a_stage_are_copies_that_the_hardware_can_make():
    candidates = {config for problem in problems((9, 0)) for config in candidates_for(problem) if config.boxes}
    assert {type(config) for config in candidates} == {HopperConfig, WideConfig}
    for config in candidates:
        columns, tokens = config.tile
        tokens_box, *weights_boxes = config.boxes
        assert tokens_box.tensor == "a"
        assert tokens_box.numbers * tokens_box.number_bytes == 128, "a swizzled row"
        assert tokens_box.rows == tokens
        for weights_box in weights_boxes:
            assert weights_box.tensor == "qweight"
            assert weights_box.rows * 16 == 64
            assert columns % (weights_box.numbers * 64 // config.num_bits // 16) == 0
        for box in config.boxes:
            assert max(box.rows, box.numbers) <= 256
            assert box.numbers * box.number_bytes % 16 == 0


def test_maps_are_made_for_the_hardware_and_not_where_warps_copy():
    candidates = {config for problem in problems((9, 0)) for config in candidates_for(problem)}
    hopper = {config for config in candidates if type(config) is HopperConfig}
    copied_by_warps = {config for config in hopper if not config.boxes}
    assert copied_by_warps == {config for config in hopper if config.num_bits == 8 and config.scales_sums} != set()
    for config in candidates:
        family = {HopperConfig: "MARLIN_HOPPER_GEMM", WideConfig: "MARLIN_WIDE_GEMM"}.get(type(config))
        assert f"({family if config.boxes else 'MARLIN_GEMM'}_PARAMETERS)" in config.source.text


def test_with_splits_changes_nothing_else():
    problem = GemmProblem(1, 4096, 4096, 128, 4, "fp16")
    for config in all_configs(problem):
        changed = config.with_splits(3, "workspace")
        assert (changed.num_splits, changed.reduction) == (3, "workspace")
        assert changed.source == config.source
        assert changed.with_splits(1, config.reduction) == config


def test_tiles_that_would_fill_a_last_wave_in_part_are_split():
    problem = GemmProblem(1024, 10240, 8192, 128, 4, "fp16")
    whole = next(config for config in all_configs(problem) if type(config) is WideConfig and config.tokens == 256)
    halves, parts = whole.with_splits(2, "cluster"), whole.with_splits(3, "workspace")
    assert whole.split_tiles(problem) == 0
    assert halves.split_tiles(problem) == parts.split_tiles(problem) == 4 * 80 % 132
    assert (halves.cluster, parts.cluster) == (2, 1)
    assert parts.workspace_bytes(problem) == 3 * 56 * 128 * 256 * 4
    assert parts.sum_grid(problem) == (56, 16, 1)

    narrow = replace(problem, size_n=12288)  # 384 tiles, 120 of them in the last wave: no two blocks for each
    assert (halves.split_tiles(narrow), parts.split_tiles(narrow)) == (0, 120)
    full = replace(problem, size_n=132 * 128)
    assert halves.split_tiles(full) == parts.split_tiles(full) == parts.workspace_bytes(full) == 0
    assert halves.grid(replace(problem, multiprocessors=7)) == (6, 1, 1)


# --- the one place that picks -----------------------------------------------------------------------------


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
        blocks, tiles_n, tiles_m = config.grid(problem)
        columns, tokens = config.tile
        if type(config) is WideConfig or config.reduction == "runs":  # blocks walk over the tiles
            assert (0 < blocks <= problem.multiprocessors * config.resident_blocks, tiles_n, tiles_m) == (True, 1, 1)
        else:
            assert blocks == config.num_splits
            assert tiles_n * columns >= problem.size_n
            assert tiles_m * tokens >= problem.size_m
        assert max(tiles_n, tiles_m) < 65536, "the second and third dimension of a grid"
        assert 1 <= config.num_splits <= families.MAX_SPLITS
        assert config.shared_bytes <= shared_limit
        assert config.reduction == "workspace" or problem.has_clusters
        if config.needs_workspace:
            assert config.workspace_bytes(problem) <= families.MAX_WORKSPACE_BYTES


def test_the_picks_are_those_that_the_benchmark_timed():
    usual = {"dtype": "fp16", "bits": 4, "group_size": 128}
    timed: dict[GemmProblem, dict] = {}
    for row in itertools.chain.from_iterable(json.loads(result.read_text("utf-8"))["rows"] for result in RESULTS):
        dtype, bits, group = ({**usual, **row}[name] for name in usual)
        group = row["K"] if group == -1 else group
        timed[GemmProblem(row["M"], row["N"], row["K"], group, bits, dtype, (9, 0), 132)] = row
    for problem, row in timed.items():
        config = pick_config(problem)
        picked = config.source.name, config.num_splits, config.reduction
        assert picked == (row["kernel"], row["splits"], row["reduction"]), row


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 9])
def test_a_part_of_a_gpu_is_given_no_more_splits_than_it_runs_at_once(capability, multiprocessors):
    for size_m in (1, 16, 64):
        problem = GemmProblem(size_m, 4096, 4096, 128, 4, "fp16", capability, multiprocessors)
        config = pick_config(problem)
        assert config.num_splits <= multiprocessors * config.resident_blocks


# --- the thresholds ---------------------------------------------------------------------------------------


def test_candidates_change_at_the_first_tokens_only():
    for problem in problems((9, 0)):
        first = max(tokens for tokens in first_tokens() if tokens <= problem.size_m)
        fewest = replace(problem, size_m=first)
        assert families_for(problem) == families_for(fewest)
        assert candidates_for(problem) == candidates_for(fewest)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_warm_up_knows_whatever_may_be_picked(capability):
    for problem in problems(capability):
        known = sources_up_to(problem)
        for rows_overlap in (False, True):
            picked = pick_config(replace(problem, rows_overlap=rows_overlap))
            assert known[picked.source] == picked.shared_bytes


def test_a_warm_up_for_few_tokens_leaves_out_the_rest():
    problem = GemmProblem(70_000, 4096, 4096, 128, 4, "fp16")
    few, all_of_them = (sources_up_to(replace(problem, size_m=size_m)) for size_m in (8, 70_000))
    assert few.keys() < all_of_them.keys()


def test_tokens_that_share_memory_have_kernels_without_maps(monkeypatch):
    monkeypatch.setattr(launching, "device_of", lambda index: launching.Device(index, HOPPER, 132))
    layer = random_layer(256, 384, 64)
    tokens = torch.zeros(3000, 512, dtype=torch.float16)
    apart, same, sliding = tokens[:, :256], tokens[:1, :256].expand(3000, -1), tokens.as_strided((3000, 256), (8, 1))
    for a, overlap in ((apart, False), (same, True), (sliding, True), (same[:1], False)):
        problem = launching.problem_of(GemmTensors(a, layer.qweight, layer.scales, layer.qzeros))
        assert problem.rows_overlap is overlap
        assert not (overlap and any(config.boxes for config in all_configs(problem)))
        assert bool(pick_config(problem).boxes) is (a is apart)
