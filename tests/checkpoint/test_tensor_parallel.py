"""Which cuts of a module are exact, and over how many GPUs a checkpoint can be cut."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from awq2marlin import convert, inspect
from awq2marlin.checkpoint.synthetic import Recipe, llama_recipe, write_checkpoint
from awq2marlin.checkpoint.tensor_parallel import (
    Limit,
    inexact_awq_reason,
    inexact_reason,
    largest_tensor_parallel_size,
    parallel_sizes,
)
from awq2marlin.cli.app import main
from awq2marlin.layout import reference
from awq2marlin.layout.modules import ModulePlan
from tests.equality import assert_identical

GROUP_SIZES = (-1, 32, 64, 128)


def random_words(*shape):
    return np.random.default_rng(0).integers(0, 1 << 32, shape, np.uint32)


# --- exact cuts -------------------------------------------------------------------------------------------


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(GROUP_SIZES),
    st.integers(1, 24),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
)
def test_a_cut_by_rows_is_exact_or_refused(bits, group_size, row_tiles, column_tiles, ranks):
    size_k, size_n, factor = 16 * row_tiles, 64 * column_tiles, 32 // bits
    assume(size_k % ranks == 0 and (group_size == -1 or size_k % group_size == 0))
    share = size_k // ranks
    in_tiles = share % 16 == 0
    in_groups = group_size == -1 or share % group_size == 0
    reason = inexact_reason(share, [size_n], group_size)
    assert (reason is None) == (in_tiles and in_groups)
    if reason:
        assert f"{share} rows on one rank" in reason
        return
    qweight = random_words(size_k // 16, size_n * 16 // factor)
    q = reference.unpack_marlin_qweight(qweight, bits)
    for rank in range(ranks):
        part = np.split(qweight, ranks)[rank]
        assert_identical(reference.unpack_marlin_qweight(part, bits), np.split(q, ranks)[rank], f"rank {rank}")


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(GROUP_SIZES),
    st.integers(1, 48),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
)
def test_a_cut_by_columns_is_exact_or_refused(bits, group_size, column_tiles, ranks):
    size_k, size_n, factor = 128, 64 * column_tiles, 32 // bits
    assume(size_n % ranks == 0)
    share = size_n // ranks
    reason = inexact_reason(size_k, [share], group_size)
    assert (reason is None) == (share % 64 == 0)
    if reason:
        assert reason == f"{share} columns on one rank are not a multiple of 64"
        return
    qweight, qzeros = random_words(8, size_n * 16 // factor), random_words(2, size_n // factor)
    scales = random_words(2, size_n)
    q, z = reference.unpack_marlin_qweight(qweight, bits), reference.unpack_marlin_qzeros(qzeros, bits)
    plain = {single: reference.unpermute_columns(scales, single) for single in (False, True)}
    for rank in range(ranks):
        cut = lambda array: np.ascontiguousarray(np.split(array, ranks, axis=1)[rank])  # noqa: B023, E731
        assert_identical(reference.unpack_marlin_qweight(cut(qweight), bits), cut(q), "qweight")
        assert_identical(reference.unpack_marlin_qzeros(cut(qzeros), bits), cut(z), "qzeros")
        for single, values in plain.items():
            assert_identical(reference.unpermute_columns(cut(scales), single), cut(values), "scales")


@given(st.sampled_from([4, 8]), st.sampled_from(GROUP_SIZES), st.integers(1, 512), st.integers(1, 512))
def test_an_awq_slice_consists_of_whole_words_and_groups(bits, group_size, rows, columns):
    in_words, in_groups = columns % (32 // bits) == 0, group_size == -1 or rows % group_size == 0
    assert (inexact_awq_reason(rows, [columns], bits, group_size) is None) == (in_words and in_groups)


@pytest.mark.parametrize("reason", [inexact_reason(0, [64], 64), inexact_reason(64, [64, 0], 64)])
def test_an_empty_slice_is_not_exact(reason):
    assert reason.startswith("0 ")


# --- over how many GPUs -----------------------------------------------------------------------------------


def module(name, size_k, size_n, *, converted=True, padded=None, zeros=True):
    parts = ("qweight", "qzeros", "scales") if zeros else ("qweight", "scales")
    padded_k, padded_n = padded or (size_k, size_n)
    return ModulePlan(f"model.layers.0.{name}", size_k, size_n, padded_k, padded_n, parts, converted)


def largest(*modules, bits=4, group_size=128, heads=(32, 8), **config):
    if heads:
        config |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return largest_tensor_parallel_size(modules, bits, group_size, config)


def sizes_of(*modules, bits=4, group_size=128, heads=(32, 8)):
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return parallel_sizes(modules, bits, group_size, config)


LLAMA_8B = [
    module("self_attn.q_proj", 4096, 4096),
    module("self_attn.k_proj", 4096, 1024),
    module("self_attn.v_proj", 4096, 1024),
    module("self_attn.o_proj", 4096, 4096),
    module("mlp.gate_proj", 4096, 14336),
    module("mlp.up_proj", 4096, 14336),
    module("mlp.down_proj", 14336, 4096),
]


def test_llama_3_8b_can_be_cut_over_as_many_gpus_as_its_groups_and_tiles_allow():
    # 14336 rows of down_proj are 112 groups of 128: 16 ranks get 7 each, 32 ranks would cut one in half.
    assert largest(*LLAMA_8B) == 16
    assert largest(*LLAMA_8B, group_size=64) == 32
    assert largest(*LLAMA_8B, group_size=-1) == 32  # as many as heads; 448 columns and rows each
    assert largest(*LLAMA_8B, heads=(24, 8)) == 8  # 3, 6, 12 and 24 do not divide the columns
    assert largest(*LLAMA_8B, heads=None) == 16


def test_llama_7b_can_be_cut_over_8_gpus_only_where_groups_are_not_in_the_way():
    # 11008 rows at 8 ranks are 1376 = 86 tiles = 10.75 groups of 128 = 43 groups of 32.
    down, gate = module("mlp.down_proj", 11008, 4096), module("mlp.gate_proj", 4096, 11008)
    assert largest(down, heads=(32, 32)) == 2
    assert largest(down, heads=(32, 32), group_size=32) == 8
    assert largest(down, gate, heads=(32, 32), group_size=32) == 8  # 1376 columns end within a tile, which may be cut
    assert largest(down, heads=(32, 32), group_size=-1) == 32


def test_key_and_value_heads_are_shared_only_where_ranks_and_heads_divide_each_other():
    key = module("self_attn.k_proj", 2048, 256)
    assert largest(key, heads=(16, 4)) == 16  # 64 columns a head; four ranks share one
    assert largest(key, heads=(12, 4)) == 12
    assert largest(module("self_attn.k_proj", 2048, 768), heads=(12, 6)) == 12
    # Four ranks would each get 192 columns, but that is one and a half of six heads.
    assert largest(module("self_attn.k_proj", 2048, 768), heads=(4, 6)) == 2
    assert largest(module("self_attn.k_proj", 2048, 128), heads=(16, 4)) == 16  # 32 columns a head are half a tile


def test_modules_fused_in_the_file_are_cut_part_by_part():
    # 32 query and 8 key and value heads of 128: 16 ranks get 2 query heads and one shared key and value head.
    assert largest(module("self_attn.qkv_proj", 4096, 6144)) == 32
    assert largest(module("self_attn.qkv_proj", 4096, 6144 + 64)) == 0  # no whole number of columns a head
    assert largest(module("mlp.gate_up_proj", 4096, 2 * 1280)) == 32  # 40 columns each


def test_a_quantized_output_embedding_is_cut_as_vllm_pads_the_vocabulary():
    assert largest(module("lm_head", 4096, 1000, converted=False), heads=(32, 32)) == 32  # of 1024, 32 each
    layers_output = module("output", 4096, 1000, converted=False)
    models_output = replace(layers_output, name="model.output")
    assert largest(models_output, heads=(12, 12)) == 4  # 3 does not divide 1024
    assert largest(layers_output, heads=(32, 32)) == 1  # no vocabulary, so it is not padded; 500 columns cut words
    assert largest(module("lm_head", 4096, 32064, converted=False), heads=(64, 64)) == 8  # 16 ranks would cut words
    assert largest(module("lm_head", 4096, 32064, converted=False), heads=(64, 64), bits=8) == 16


def test_replicated_modules_are_not_cut_and_heads_of_the_text_part_count():
    assert largest(module("mlp.gate", 4096, 64)) == 32
    assert largest(LLAMA_8B[0], heads=None, text_config={"num_attention_heads": 4}) == 4
    deep = {"vision_config": {"num_attention_heads": 2}, "thinker_config": {"text_config": {"num_attention_heads": 8}}}
    assert largest(LLAMA_8B[0], heads=None, **deep) == 8
    assert largest(LLAMA_8B[0], heads=None, num_attention_heads=True) == 64  # no number: common sizes are tried


def test_modules_in_awq_layout_are_cut_at_words_and_groups():
    assert largest(module("self_attn.q_proj", 576, 576, converted=False), heads=(9, 3), group_size=64) == 9
    assert largest(module("self_attn.o_proj", 576, 576, converted=False), heads=(9, 3), group_size=64) == 9
    assert largest(module("self_attn.o_proj", 576, 576, converted=False), heads=(6, 3), group_size=64) == 3


def test_padded_modules_are_cut_by_their_true_size():
    assert largest(module("mlp.down_proj", 1000, 4096, padded=(1024, 4096)), group_size=-1) == 8  # 125 rows
    assert largest(module("mlp.down_proj", 1000, 4096, padded=(1024, 4096))) == 1  # whole, with a group cut short
    assert largest(module("mlp.gate_proj", 4096, 1000, padded=(4096, 1024))) == 1  # 500 columns are no whole words
    assert largest(module("mlp.experts.3.up_proj", 4096, 992, padded=(4096, 1024))) == 4


def test_experts_of_8_bits_are_served_with_zero_points_and_without():
    """The engines' own kernels know them only without, this package's also with."""
    for zeros in (True, False):
        assert largest(*LLAMA_8B, module("mlp.experts.0.up_proj", 4096, 4096, zeros=zeros), bits=8) == 16


# --- why not over more ------------------------------------------------------------------------------------

DOWN, GATE = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
EXPERT = "mlp.experts.7"


@pytest.mark.parametrize(
    ("modules", "heads", "sizes", "limit"),
    [
        (
            LLAMA_8B,
            (32, 8),
            (1, 2, 4, 8, 16),
            (32, DOWN, "448 rows on one rank are not a multiple of the group size 128"),
        ),
        (
            [module("mlp.down_proj", 29568, 8192)],  # Qwen2-72B: 231 groups
            (64, 8),
            (1,),
            (2, DOWN, "14784 rows on one rank are not a multiple of the group size 128"),
        ),
        (
            [module("mlp.down_proj", 1000, 64)],
            (16, 16),
            (),
            (1, DOWN, "1000 rows on one rank are not a multiple of the group size 128"),
        ),
        (
            [module("mlp.gate_proj", 4096, 176, padded=(4096, 192))],
            (4, 4),
            (1, 2),
            (4, GATE, "44 columns on one rank are not a multiple of 8"),
        ),
        ([module("mlp.gate_proj", 4096, 64)], (9, 3), (1,), (2, "", "9 attention heads cannot be split evenly")),
        (
            [module("mlp.gate_proj", 64, 96, padded=(128, 128))],
            (4, 4),
            (),
            (1, GATE, "64 rows on one rank are not a multiple of the group size 128"),
        ),
        (
            [module("mlp.down_proj", 64, 96, padded=(128, 128))],
            (4, 4),
            (1,),
            (2, DOWN, "32 rows on one rank are not a multiple of the group size 128"),
        ),
    ],
)
def test_the_next_size_is_told_with_the_module_that_stops_it(modules, heads, sizes, limit):
    found = sizes_of(*modules, heads=heads)
    assert (found.sizes, found.limit) == (sizes, Limit(*limit))
    assert found.unserved == ("" if sizes else limit[2])
    assert found.with_expert_parallel == ()


@pytest.mark.parametrize(
    ("inter", "cut", "limit"),
    [
        (768, (1, 2), "192 rows on one rank are not a multiple of the group size 128"),
        (1408, (1,), "704 rows on one rank are not a multiple of the group size 128"),
    ],
)
def test_experts_that_cannot_be_cut_can_be_given_out_whole(inter, cut, limit):
    attention = [module("self_attn.q_proj", 2048, 4096), module("self_attn.k_proj", 2048, 512)]
    expert = [module(f"{EXPERT}.down_proj", inter, 2048), module(f"{EXPERT}.up_proj", 2048, inter)]
    found = sizes_of(*attention, *expert, heads=(32, 4))
    assert found.sizes == cut
    assert found.limit == Limit(2 * cut[-1], f"model.layers.0.{EXPERT}.down_proj", limit)
    assert found.with_expert_parallel == (1, 2, 4, 8, 16, 32)
    shared = module("mlp.shared_expert.down_proj", 3 * 128, 2048)  # is cut in any case
    assert sizes_of(*expert, shared, heads=(32, 4)).with_expert_parallel == (1,)


def test_thousands_of_experts_are_looked_at_once():
    """Without it, 128 layers of 512 experts took seconds."""
    experts = [module(f"mlp.experts.{number}.down_proj", 768, 2048) for number in range(20_000)]
    begun = time.process_time()
    assert sizes_of(*experts).sizes == (1, 2)
    assert time.process_time() - begun < 2


@given(
    st.sampled_from(GROUP_SIZES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 16),
    st.sampled_from(["mlp.up_proj", "mlp.down_proj"]),
)
def test_the_size_found_cuts_no_group_and_no_word_and_every_larger_one_does(group_size, k_tiles, n_tiles, heads, name):
    size_k, size_n = 128 * k_tiles, 64 * n_tiles
    found = largest(module(name, size_k, size_n), heads=(heads, heads), group_size=group_size)

    def is_exact(ranks):
        is_row = name == "mlp.down_proj"
        if (size_k if is_row else size_n) % ranks:
            return False
        rows, columns = (size_k // ranks, size_n) if is_row else (size_k, size_n // ranks)
        return inexact_awq_reason(rows, [columns], 4, group_size) is None

    assert found == max(ranks for ranks in range(1, heads + 1) if heads % ranks == 0 and is_exact(ranks))


# --- inspect ----------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path, monkeypatch):
    """``awq``, ``marlin`` and ``padded`` in the working folder; gate and up of 96 columns are unaligned."""
    monkeypatch.chdir(tmp_path)
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    recipe = llama_recipe(512, 1024, 1, 128, 64, group_size=64, config=config)
    narrow = {name: (512, 96) for name in recipe.modules if "gate" in name or "up" in name}
    write_checkpoint(tmp_path / "awq", Recipe({**recipe.modules, **narrow}, config=recipe.config, group_size=64))
    convert("awq", "marlin", verify="none")
    convert("awq", "padded", unaligned="pad", verify="none")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "size", "line"),
    [
        ("awq", 4, "once converted, tensor-parallel sizes in vLLM: 1, 2, 4"),
        ("marlin", 4, "tensor-parallel sizes in vLLM: 1, 2, 4"),
        ("marlin", 4, "not 8: 12 columns on one rank are not a multiple of 8 (model.layers.*.mlp.gate_proj)"),
        ("padded", 4, "tensor-parallel sizes in vLLM: 1, 2, 4"),
    ],
)
def test_inspect_tells_the_sizes_and_what_stops_the_next(folder, size, line, made, capsys):
    """96 columns in AWQ layout are cut at words of 8: in 4 parts, not in 8 only because 12 is no such multiple."""
    assert inspect(made / folder).largest_tensor_parallel_size == size
    assert main(["inspect", folder]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert main(["inspect", folder, "--json"]) == 0
    details = json.loads(capsys.readouterr().out)["details"]
    assert details["largest_tensor_parallel_size"] == size == max(details["tensor_parallel_sizes"], default=0)
    assert details["tensor_parallel_limit"]["module"].endswith("mlp.gate_proj")
    assert details["tensor_parallel_limit"]["size"] == (2 * size or 1)
    assert details["expert_parallel_sizes"] == []


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("up_proj", (160, 128), "experts of hidden size 160; its kernel needs a multiple of 64"),
        ("down_proj", (128, 160), "experts of hidden size 160; its kernel needs a multiple of 64"),
    ],
)
def test_what_engines_refuse_is_told_by_the_plan_the_conversion_and_the_card(made, capsys, name, shape, why):
    config = {"num_attention_heads": 2}
    write_checkpoint(made / "experts", Recipe({f"a.experts.0.{name}": shape}, group_size=32, config=config))
    refusals = [f"  vLLM          cannot: {why}", f"  SGLang        cannot: {why}"]
    for arguments in (["convert", "experts", "--dry-run"], ["convert", "experts", "again"], ["inspect", "again"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert [line for line in said.splitlines() if "cannot: " in line] == refusals
        assert "\n  Transformers  import awq2marlin.integrations.transformers" in said
    assert main(["convert", "experts", "--dry-run", "--json"]) == 0
    details = json.loads(capsys.readouterr().out)["details"]
    assert details["unserved"] == why
    assert [(each["engine"], each["reason"]) for each in details["serving"]] == [
        ("vLLM", why), ("SGLang", why), ("Transformers", "")
    ]  # fmt: skip
    card = (made / "again/README.md").read_text()
    for engine in "vLLM", "SGLang":
        assert f"\n\n{engine} cannot serve this checkpoint: {why}.\n\n" in card
    assert "\n\nTransformers 5.17 or newer, after" in card
    assert "vllm serve" not in card
    assert main(["inspect", "experts"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"once converted, vLLM cannot load it: {why} (a.experts.*.{name})" in said
    for folder in ("marlin", "padded"):
        card = (made / folder / "README.md").read_text()
        assert "vllm serve THIS_MODEL\n```\n\nOver several GPUs: --tensor-parallel-size 2 or 4.\n" in card
        assert "--model-path THIS_MODEL\n```\n\nOver several GPUs: --tp-size 2 or 4. " in card


def test_what_only_sglang_refuses_is_told_of_sglang_alone(made, capsys):
    """Experts of hidden size 192: vLLM's kernel takes multiples of 64, SGLang's of 128."""
    recipe = Recipe({"a.experts.0.down_proj": (128, 192)}, group_size=64, config={"num_attention_heads": 2})
    write_checkpoint(made / "narrow", recipe)
    why = "experts of hidden size 192; its kernel needs a multiple of 128"
    for arguments in (["convert", "narrow", "--dry-run"], ["convert", "narrow", "thin"], ["inspect", "thin"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if "cannot: " in line] == [f"  SGLang        cannot: {why}"]
        assert any(line.startswith("  vLLM          vllm serve ") for line in said)
    card = (made / "thin/README.md").read_text()
    assert f"\n\nSGLang cannot serve this checkpoint: {why}.\n\n" in card
    assert "vllm serve THIS_MODEL" in card


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (
            Recipe({"a.kv_b_proj": (128, 128)}, bits=8),
            "kv_b_proj in 8 bits; its models read that module themselves, as 4 bits with zero points only",
        ),
        (
            Recipe({"a.kv_b_proj": (128, 128)}, has_qzeros=False, zero_point=False),
            "kv_b_proj without zero points; its models read that module themselves, as 4 bits with zero points only",
        ),
        (Recipe({"a.kv_b_proj": (128, 128)}), ""),
        (Recipe({"a.q_proj": (128, 128), "lm_head": (128, 1000)}), ""),
    ],
)
def test_modules_that_sglang_cannot_read_are_told_where_its_command_would_stand(tmp_path, capsys, recipe, why):
    write_checkpoint(tmp_path / "awq", recipe)
    out = str(tmp_path / "out")
    for arguments in (["convert", str(tmp_path / "awq"), out], ["inspect", out]):
        assert main(arguments) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  SGLang  ")]
        assert said == [f"  SGLang        cannot: {why}" if why else f"  SGLang        sglang serve --model-path {out}"]
    card = (tmp_path / "out/README.md").read_text()
    assert (f"\n\nSGLang cannot serve this checkpoint: {why}.\n\n" in card) == bool(why)
    assert ("sglang serve" in card) != bool(why)
    assert "vllm serve THIS_MODEL" in card


def lines_of(capsys, *arguments):
    """Returns how a command says that vLLM and SGLang serve a checkpoint, one line each."""
    assert main([str(each) for each in arguments]) == 0
    said = capsys.readouterr().out.partition("to install what they need")[0].splitlines()
    return [line.split(maxsplit=1)[1] for line in said if line.startswith(("  vLLM  ", "  SGLang  "))]


@pytest.mark.parametrize(
    ("quantized", "plain", "why"),
    [
        (["q_proj", "k_proj"], ["v_proj"], "q_proj and k_proj are quantized and v_proj is not"),
        (["q_proj"], ["k_proj", "v_proj"], "q_proj is quantized and k_proj and v_proj are not"),
        (["up_proj"], ["gate_proj"], "up_proj is quantized and gate_proj is not"),
        (["kv_a_proj_with_mqa"], ["q_a_proj"], "kv_a_proj_with_mqa is quantized and q_a_proj is not"),
        (["q_proj", "k_proj", "v_proj"], ["o_proj", "g_norm"], ""),
        (["q_proj", "kv_a_proj_with_mqa"], ["kv_b_proj"], ""),  # a DeepSeek whose queries have no low rank
    ],
)
def test_modules_quantized_beside_plain_ones_that_engines_join_with_them_are_told(
    tmp_path, capsys, quantized, plain, why
):
    weights = {f"model.layers.0.a.{name}.weight": (128, 128) for name in plain}
    modules = {f"model.layers.0.a.{name}": (128, 128) for name in quantized}
    write_checkpoint(tmp_path / "awq", Recipe(modules, weights, config={"num_attention_heads": 2}))
    out = tmp_path / "out"
    reason = f"cannot: {why}; its models join them in one matrix"
    for arguments in (["convert", tmp_path / "awq", out, "--dry-run"], ["convert", tmp_path / "awq", out]):
        vllm, sglang = lines_of(capsys, *arguments)
        assert (vllm == reason, sglang == reason) == (bool(why), bool(why))
        assert vllm.startswith("cannot: " if why else "vllm serve ")
    assert lines_of(capsys, "inspect", out) == [vllm, sglang]
    card = (out / "README.md").read_text()
    for engine in "vLLM", "SGLang":
        assert (f"\n\n{engine} cannot serve this checkpoint: {why}; its models" in card) == bool(why)


@pytest.mark.parametrize(("plain", "is_refused"), [("q_proj", True), ("o_proj", False), ("experts.1.up_proj", True)])
def test_modules_that_engines_join_are_told_of_formats_that_need_no_plugin_too(tmp_path, capsys, plain, is_refused):
    names = {"q_proj", "k_proj", "v_proj", "experts.0.up_proj"} - {plain}
    modules = {f"model.layers.0.a.{name}": (128, 128) for name in names}
    weights = {f"model.layers.0.a.{plain}.weight": (128, 128)}
    write_checkpoint(tmp_path / "source", Recipe(modules, weights, config={"num_attention_heads": 2}))
    source = tmp_path / "source"
    for target in "compressed-tensors", "awq":
        out = tmp_path / target
        for more in ["--dry-run"], []:
            vllm, sglang = lines_of(capsys, "convert", source, out, "--to", target, *more)
            assert (vllm.startswith("cannot: "), sglang.startswith("cannot: ")) == (is_refused, is_refused)
            assert vllm.startswith("vllm serve ") != is_refused
        card = (out / "README.md").read_text()
        assert ("vLLM cannot serve this checkpoint: " in card) == ("vllm serve" not in card) == is_refused
        assert "Transformers cannot" not in card
        source = out


@pytest.mark.parametrize(
    ("names", "config", "unaligned", "is_refused"),
    [
        (["q_a_proj", "kv_a_proj_with_mqa"], {"model_type": "deepseek_v3"}, "pad", True),
        (["q_a_proj", "kv_a_proj_with_mqa"], {"model_type": "deepseek_v3"}, "keep", False),
        (["q_a_proj", "kv_a_proj_with_mqa"], {"model_type": "minicpm3"}, "pad", False),
        (["q_a_proj", "kv_a_proj_with_mqa"], {"text_config": {"model_type": "minicpm3"}}, "pad", False),
        (["q_a_proj", "kv_a_proj_with_mqa"], {"model_type": "sarvam_mla"}, "pad", False),
        (["q_proj", "kv_a_proj_with_mqa"], {"model_type": "deepseek_v2"}, "pad", False),
    ],
)
def test_padded_modules_that_sglang_joins_before_it_loads_them_are_told(
    tmp_path, capsys, names, config, unaligned, is_refused
):
    modules = {f"model.layers.0.self_attn.{name}": (96, 96) for name in names}
    write_checkpoint(tmp_path / "awq", Recipe(modules, group_size=32, config=config))
    out = tmp_path / "out"
    vllm, sglang = lines_of(capsys, "convert", tmp_path / "awq", out, "--unaligned", unaligned)
    why = "q_a_proj and kv_a_proj_with_mqa are padded; its models join them before they are loaded"
    assert sglang == (f"cannot: {why}" if is_refused else f"sglang serve --model-path {out}")
    assert vllm == f"vllm serve {out}"
    assert lines_of(capsys, "inspect", out) == [vllm, sglang]
    assert (f"SGLang cannot serve this checkpoint: {why}." in (out / "README.md").read_text()) == is_refused


@pytest.mark.parametrize(
    ("plain", "is_refused"),
    [("experts.1.up_proj", True), ("experts.2.up_proj", True), ("experts.0.down_proj", True), ("gate", False),
     ("shared_experts.up_proj", False)],
)  # fmt: skip
def test_experts_quantized_beside_plain_ones_of_their_layer_are_told(tmp_path, capsys, plain, is_refused):
    layer = "model.layers.0.mlp"
    modules = {f"{layer}.experts.{number}.up_proj": (128, 128) for number in range(2)}
    modules.pop(f"{layer}.{plain}", None)
    weights = {f"{layer}.{plain}.weight": (128, 128), "model.layers.1.mlp.experts.0.up_proj.weight": (128, 128)}
    write_checkpoint(tmp_path / "awq", Recipe(modules, weights))
    out = tmp_path / "out"
    why = "experts of which some are quantized and some are not; it computes those of a layer together"
    for arguments in (["convert", tmp_path / "awq", out, "--dry-run"], ["convert", tmp_path / "awq", out]):
        vllm, sglang = lines_of(capsys, *arguments)
        assert (vllm == f"cannot: {why}", sglang == f"cannot: {why}") == (is_refused, is_refused)
    assert lines_of(capsys, "inspect", out) == [vllm, sglang]
    found = inspect(out).parallel_sizes
    assert (found.limit == Limit(1, f"{layer}.{plain}", why)) == is_refused
    for engine in "vLLM", "SGLang", "Transformers":
        assert (f"{engine} cannot serve this checkpoint: {why}." in (out / "README.md").read_text()) == is_refused
    (transformers,) = (each for each in inspect(out).serving if each.engine == "Transformers")
    assert (transformers.reason, bool(transformers.command)) == ((why, False) if is_refused else ("", True))


def test_biases_of_experts_are_told_before_an_engine_refuses_them(made, capsys):
    modules = {"a.experts.0.down_proj": (128, 128)}
    recipe = Recipe(
        modules, group_size=64, weights={"a.experts.0.down_proj.bias": (128,)}, config={"num_attention_heads": 2}
    )
    write_checkpoint(made / "biased", recipe)
    why = "experts with biases, which the plugin does not load"
    for arguments in (["convert", "biased", "--dry-run"], ["convert", "biased", "biases"], ["inspect", "biases"]):
        assert main(arguments) == 0
        refusals = [line for line in capsys.readouterr().out.splitlines() if "cannot: " in line]
        assert refusals == [f"  vLLM          cannot: {why}", f"  SGLang        cannot: {why}"]


WEIGHED = "experts whose inputs the model multiplies by router weights; its Marlin experts do not support that"


@pytest.mark.parametrize(
    ("config", "is_weighed"),
    [
        ({"model_type": "llama4_text"}, True),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, True),
        ({"model_type": "laguna", "moe_apply_router_weight_on_input": True}, True),
        ({"model_type": "laguna", "moe_apply_router_weight_on_input": False}, False),
        ({"model_type": ["llama4"]}, False),
        ({"model_type": "mixtral"}, False),
    ],
)
def test_models_that_weigh_the_inputs_of_experts_are_told_before_an_engine_refuses_them(config, is_weighed):
    config = {"num_attention_heads": 2, **config}
    expert = module("mlp.experts.0.down_proj", 128, 128)
    found = parallel_sizes([expert], 4, 64, config)
    assert found.unserved == (WEIGHED if is_weighed else "")
    assert found.limit.module == (expert.name if is_weighed else "")
    assert parallel_sizes([module("mlp.down_proj", 128, 128)], 4, 64, config).sizes == (1, 2)


def test_a_card_offers_one_gpu_where_nothing_can_be_cut(tmp_path):
    write_checkpoint(tmp_path / "awq", Recipe({"a.down_proj": (128, 128)}, config={"num_attention_heads": 2}))
    convert(tmp_path / "awq", tmp_path / "out")
    assert "\n\nIt cannot be split over several GPUs.\n" in (tmp_path / "out/README.md").read_text()


def test_padding_is_advised_only_where_it_helps(tmp_path, capsys):
    head = {"lm_head": (128, 128)}
    for number, (modules, advice) in enumerate(
        [
            (head, ""),  # an output embedding is never converted
            (
                {"a.q_proj": (128, 96)},
                "; --unaligned pad converts what does not fit",
            ),
        ]
    ):
        write_checkpoint(tmp_path / f"{number}", Recipe(modules))
        assert main(["convert", str(tmp_path / f"{number}"), str(tmp_path / "out"), "--dry-run"]) == 0
        note = "note       no module could be converted, so this checkpoint gains nothing"
        assert note + advice in capsys.readouterr().out.splitlines()
