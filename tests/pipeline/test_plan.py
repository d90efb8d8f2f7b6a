"""The plan: every module's fate with its reason, every byte of every shard, and what makes two plans different."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import write_checkpoint
from awq2marlin.layout.marlin import fusion_group, padded_shapes
from awq2marlin.layout.modules import ModulePlan
from awq2marlin.pipeline import plan
from awq2marlin.pipeline.plan import Plan, plan_conversion
from tests.e2e import oracle
from tests.e2e.inputs import (
    CASES,
    SINGLE,
    edit_json,
    join_file,
    old_config,
    plain,
    reword_header,
    split_file,
    write_files,
)

ATTENTION = "model.layers.0.self_attn"


def plan_of(folder: Path, modules: dict[str, tuple[int, int]], unaligned: Any = "keep", **options: Any) -> Plan:
    write_checkpoint(folder, plain(modules, options.pop("weights", {}), **options))
    return plan_conversion(open_checkpoint(folder), unaligned)


def fates(found: Plan) -> dict[str, str]:
    return {module.name: "converted" if module.converted else module.reason for module in found.modules.values()}


# --- reasons -------------------------------------------------------------------------------------------------------


def test_every_reason_to_keep_a_module(tmp_path: Path) -> None:
    modules = {
        "lm_head": (128, 128),
        "model.aligned": (128, 64),
        "model.narrow": (128, 32),
        "model.shallow": (64, 64),
        "model.mlp.gate_proj": (128, 64),
        "model.mlp.up_proj": (128, 96),
        f"{ATTENTION}.k_proj": (128, 64),
        f"{ATTENTION}.v_proj": (128, 64),
    }
    found = plan_of(tmp_path, modules, weights={f"{ATTENTION}.q_proj.weight": (128, 128)})
    assert fates(found) == {
        "lm_head": "output embedding",
        "model.aligned": "converted",
        "model.narrow": "unaligned: K=128, N=32 is neither a multiple of (128, 64) nor of (64, 128)",
        "model.shallow": "unaligned: K=64, N=64 is neither a multiple of (128, 64) nor of (64, 128)",
        "model.mlp.gate_proj": "fused with model.mlp.up_proj, which is kept",
        "model.mlp.up_proj": "unaligned: K=128, N=96 is neither a multiple of (128, 64) nor of (64, 128)",
        f"{ATTENTION}.k_proj": f"fused with {ATTENTION}.q_proj, which is not quantized",
        f"{ATTENTION}.v_proj": f"fused with {ATTENTION}.q_proj, which is not quantized",
    }
    assert [module.name for module in found.converted] == ["model.aligned"]
    assert sorted(module.name for module in found.kept) == sorted(set(modules) - {"model.aligned"})
    assert found.config()["quantization_config"]["awq_modules"] == sorted(set(modules) - {"model.aligned"})


def test_k_that_the_group_size_does_not_divide(tmp_path: Path) -> None:
    found = plan_of(tmp_path, {"model.a": (192, 128), "model.b": (64, 128)}, group_size=128)
    assert fates(found) == {
        "model.a": "unaligned: K=192 is not a multiple of the group size 128",
        "model.b": "unaligned: K=64 is not a multiple of the group size 128",
    }


@pytest.mark.parametrize("family", oracle.SIBLINGS, ids="-".join)
def test_siblings_are_kept_together(family: tuple[str, ...], tmp_path: Path) -> None:
    *others, last = family
    modules = {f"model.layers.0.x.{name}": (128, 64) for name in others} | {f"model.layers.0.x.{last}": (128, 96)}
    modules |= {f"model.layers.1.x.{name}": (128, 64) for name in family}
    found = fates(plan_of(tmp_path, modules))
    kept = f"fused with model.layers.0.x.{last}, which is kept"
    assert {name.rpartition(".")[2]: fate for name, fate in found.items() if ".0." in name and last not in name} == (
        dict.fromkeys((name for name in others if last not in name), kept)
    )
    assert {fate for name, fate in found.items() if ".1." in name} == {"converted"}


def test_siblings_are_those_under_one_parent() -> None:
    names = [
        f"model.layers.{n}.{parent}.{name}" for n in (0, 1) for parent in ("a", "b") for name in ("q_proj", "k_proj")
    ]
    assert len({fusion_group(name) for name in names}) == 4
    assert fusion_group("q_proj") == fusion_group("v_proj") != fusion_group("o_proj")


def test_all_experts_of_a_layer_are_one_group() -> None:
    experts = [
        f"model.layers.3.mlp.experts.{n}.{name}" for n in (0, 11) for name in ("w1", "w2", "w3", "down_proj", "x.y")
    ]
    assert {fusion_group(name) for name in experts} == {"model.layers.3.mlp.experts.*"}
    others = [
        "model.layers.4.mlp.experts.0.w1",
        "model.layers.3.mlp.shared_experts.w1",
        "model.layers.3.mlp.experts.w1",
    ]
    assert len({fusion_group(name) for name in [*experts, *others]}) == 4


def test_error_names_every_unaligned_module_and_its_file(tmp_path: Path) -> None:
    modules = {
        "lm_head": (128, 64),
        "model.a": (128, 32),
        "model.b": (128, 64),
        "model.gate": (64, 64),
        "model.up": (128, 64),
    }
    with pytest.raises(CheckpointError) as caught:
        plan_of(tmp_path, modules, "error")
    assert [(problem.file, problem.tensor, problem.code) for problem in caught.value.problems] == [
        (SINGLE, "model.a", "unaligned"),
        (SINGLE, "model.gate", "unaligned"),
    ]
    assert caught.value.problems[0].message == (
        "unaligned: K=128, N=32 is neither a multiple of (128, 64) nor of (64, 128); use --unaligned keep or pad"
    )


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unaligned must be one of 'keep', 'pad', 'error', found 'padd'"):
        plan_of(tmp_path, {"model.a": (128, 64)}, "padd")


# --- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "group_size", "padded"),
    [
        ([(576, 576)], 64, [(640, 576)]),  # 640 * 576 = 576 * 640, equal sums: the first
        ([(576, 192)], 64, [(640, 192)]),  # 122880 against 576 * 256 = 147456
        ([(576, 576), (576, 192), (576, 192)], 64, [(640, 576), (640, 192), (640, 192)]),
        ([(64, 64)], 32, [(128, 64)]),  # 128 * 64 = 64 * 128
        ([(64, 48), (64, 128)], 64, [(64, 128), (64, 128)]),  # 128 * (64 + 128) = 24576 against 64 * 256 = 16384
        ([(64, 48)], 128, [(128, 64)]),  # 64 is no multiple of the group size
        ([(1, 8)], -1, [(128, 64)]),  # equal products and sums
        ([(192, 128)], -1, [(192, 128)]),
        ([(320, 96)], 64, [(320, 128)]),  # 384 * 128 = 49152 against 320 * 128 = 40960
        ([(128, 96), (96, 128)], 32, [(128, 128), (128, 128)]),
    ],
)
def test_padded_shapes(sizes: list[tuple[int, int]], group_size: int, padded: list[tuple[int, int]]) -> None:
    assert padded_shapes(sizes, group_size) == padded == oracle.padded_sizes(sizes, group_size)


def test_padding_never_touches_a_group_that_is_aligned(tmp_path: Path) -> None:
    found = plan_of(tmp_path, {"model.q_proj": (128, 64), "model.k_proj": (128, 128), "model.o": (64, 64)}, "pad")
    assert {name: (m.padded_k, m.padded_n, m.is_padded) for name, m in found.modules.items()} == {
        "model.q_proj": (128, 64, False),
        "model.k_proj": (128, 128, False),
        "model.o": (128, 64, True),
    }
    assert found.config()["quantization_config"]["padded_modules"] == {"model.o": [64, 64]}


def test_an_aligned_sibling_is_padded_with_the_others(tmp_path: Path) -> None:
    """64 x 128 alone is aligned, but the cheaper choice for both is K = 128."""
    found = plan_of(tmp_path, {"model.q_proj": (64, 128), "model.k_proj": (64, 64), "model.v_proj": (64, 64)}, "pad")
    sizes = {name: (module.padded_k, module.padded_n) for name, module in found.modules.items()}
    # 128 * (128 + 64 + 64) = 32768 against 64 * (128 + 128 + 128) = 24576
    assert sizes == {"model.q_proj": (64, 128), "model.k_proj": (64, 128), "model.v_proj": (64, 128)}
    assert found.config()["quantization_config"]["padded_modules"] == {
        "model.k_proj": [64, 64],
        "model.v_proj": [64, 64],
    }


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_spans_cover_source_and_target_without_a_hole(case: Any, unaligned: Any, tmp_path: Path) -> None:
    found = plan_conversion(open_checkpoint(case.write(tmp_path / "source")), unaligned)
    for shard in found.shards:
        at = (0, 0)
        for span in shard.spans:
            assert (span.source[0], span.target[0]) == at
            if span.rewrite is None or unaligned == "keep":
                assert span.source[1] - span.source[0] == span.target[1] - span.target[0]
            at = (span.source[1], span.target[1])
        assert at == (shard.source.data_size, shard.target.data_size)
        copies = [span.rewrite is None for span in shard.spans]
        assert not any(left and right for left, right in itertools.pairwise(copies)), "copies are joined"
    assert found.source_bytes == sum(shard.source.file_size for shard in found.shards)
    assert unaligned == "pad" or found.source_data_bytes == found.target_data_bytes


def test_a_module_plan_knows_whether_it_is_padded() -> None:
    one = ModulePlan("m", 64, 64, 128, 64, ("qweight",), converted=True)
    assert one.is_padded
    assert not ModulePlan("m", 64, 64, 64, 64, ("qweight",), converted=False, reason="x").is_padded


# --- the digest ----------------------------------------------------------------------------------------------------

MODULES = {"model.a": (128, 64), "model.b": (128, 128)}


def digest_of(folder: Path, unaligned: Any = "keep") -> str:
    return plan_conversion(open_checkpoint(folder), unaligned).digest


def test_the_digest_depends_on_neither_path_nor_time_nor_data(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "elsewhere" / "b"
    write_checkpoint(first, plain(MODULES))
    write_checkpoint(second, plain(MODULES, seed=1))
    assert digest_of(first) == digest_of(second)
    assert digest_of(first).startswith("sha256:")
    assert len(digest_of(first)) == len("sha256:") + 64


def retype(folder: Path) -> None:
    header, data = split_file(folder / SINGLE)
    header["model.norm.weight"]["dtype"] = "BF16"
    join_file(folder / SINGLE, json.dumps(header, separators=(",", ":")).encode(), data)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "metadata": reword_header(metadata={"format": "tf"}),
    "white_space": reword_header(metadata={"format": "pt"}, spaced=True),
    "the_order_of_names": reword_header(metadata={"format": "pt"}, shuffled=True),
    "a_type": retype,
    "a_key_of_the_config": edit_json("config.json", lambda config: config.update(x=1)),
    "white_space_in_the_config": lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
    "the_zero_point": edit_json("config.json", lambda c: c["quantization_config"].update(zero_point=False)),
    "a_side_file_more": write_files({"vocab.txt": b"a"}),
    "a_side_file_less": lambda f: (f / "README.md").unlink(),
    "a_side_file_longer": write_files({"generation_config.json": b"{ }" * 50}),
    "a_side_file_of_another_name": lambda f: (f / "README.md").rename(f / "readme.md"),
    "the_shard_of_another_name": lambda f: (f / SINGLE).rename(f / "other.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_changes_with_headers_config_and_side_files(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, plain(MODULES))
    before = digest_of(tmp_path)
    CHANGES[name](tmp_path)
    assert digest_of(tmp_path) != before


def test_the_digest_changes_with_options_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, plain(MODULES))
    digests = {digest_of(tmp_path, unaligned) for unaligned in ("keep", "pad", "error")}
    monkeypatch.setattr(plan, "__version__", "99.0")
    digests.add(digest_of(tmp_path))
    assert len(digests) == 4


def test_the_digest_changes_with_an_old_quantization_config(tmp_path: Path) -> None:
    """Its text goes into the manifest, and zero_point into the config, so it decides over the output's bytes."""
    write_checkpoint(tmp_path, plain(MODULES))
    old_config("quant_config.json")(tmp_path)
    before = digest_of(tmp_path)
    old_config("quant_config.json", only=False, zero_point=False)(tmp_path)
    assert digest_of(tmp_path) != before


def test_the_digest_changes_with_the_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, plain(MODULES, shards=2))
    before = digest_of(tmp_path)
    edit_json("model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1, x="y"))(tmp_path)
    assert digest_of(tmp_path) != before
