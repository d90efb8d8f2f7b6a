"""Marlin's constants and rules, against a restatement of the specification that shares nothing with the code."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from awq2marlin.layout import marlin
from awq2marlin.layout import packing as awq
from awq2marlin.layout import torch_functions as layout
from awq2marlin.layout.modules import is_models_output_embedding, is_output_embedding
from tests.shapes import MODEL_SHAPES, SMALL_SHAPES, UNALIGNED_SHAPES

# --- constants --------------------------------------------------------------------------------------------


def test_constants_have_the_field_s_values():
    assert marlin.MARLIN_SUPPORTED_GROUP_SIZES == [-1, 32, 64, 128]
    assert marlin.GPTQ_MARLIN_MIN_THREAD_N == 64
    assert marlin.GPTQ_MARLIN_MIN_THREAD_K == 128
    assert marlin.GPTQ_MARLIN_TILE == 16


def test_scalar_types_name_their_bits_and_compare_by_value():
    assert (marlin.SCALAR_TYPE_UINT4.name, marlin.SCALAR_TYPE_UINT4.size_bits) == ("uint4", 4)
    assert (marlin.SCALAR_TYPE_UINT8.name, marlin.SCALAR_TYPE_UINT8.size_bits) == ("uint8", 8)
    assert str(marlin.SCALAR_TYPE_UINT4) == "uint4"
    assert marlin.ScalarType("uint4", 4) == marlin.SCALAR_TYPE_UINT4 != marlin.SCALAR_TYPE_UINT8
    assert len({marlin.SCALAR_TYPE_UINT4, marlin.ScalarType("uint4", 4)}) == 1


def test_pack_orders_are_evens_then_odds_and_their_inverse_is_derived():
    assert awq.AWQ_PACK_ORDER == {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
    assert awq.inverse_order(awq.AWQ_PACK_ORDER[4]) == (0, 4, 1, 5, 2, 6, 3, 7)
    assert awq.inverse_order(awq.AWQ_PACK_ORDER[8]) == (0, 2, 1, 3)
    assert marlin.MARLIN_INTERLEAVE == {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


@given(st.permutations(range(64)))
def test_inverse_order_undoes_any_permutation(order):
    inverse = awq.inverse_order(tuple(order))
    assert [inverse[column] for column in order] == list(range(64))


def test_pack_factor_is_values_per_word():
    assert (awq.pack_factor(4), awq.pack_factor(8)) == (8, 4)


@pytest.mark.parametrize("num_bits", [0, 2, 3, 16, None, "4"])
def test_pack_factor_refuses_other_bits_by_name(num_bits):
    with pytest.raises(ValueError, match="must be one of") as raised:
        awq.pack_factor(num_bits)
    assert str(raised.value) == f"num_bits must be one of (4, 8), found {num_bits!r}"


def test_qweight_shape_is_tiles_by_words():
    assert marlin.qweight_shape(256, 128, 4) == (16, 256)
    assert marlin.qweight_shape(256, 128, 8) == (16, 512)
    assert marlin.qweight_shape(10944, 2048, 4) == (684, 4096)


@pytest.mark.parametrize(
    ("size_k", "group_size", "groups", "single"),
    [
        (4096, -1, 1, True),
        (4096, 128, 32, False),
        (128, 128, 1, True),
        (128, 64, 2, False),
        (64, 128, 1, True),
        (160, 64, 3, False),
        (16, 32, 1, True),
        (33, 32, 2, False),
    ],
)
def test_one_group_is_minus_one_or_a_group_of_all_rows_and_more(size_k, group_size, groups, single):
    assert marlin.num_groups(size_k, group_size) == groups
    assert marlin.is_single_group(size_k, group_size) is single


# --- what is converted ------------------------------------------------------------------------------------


def spec_is_aligned(size_k, size_n, bits, group_size):
    """The specification's sentence, word by word."""
    sizes = (size_n % 64 == 0 and size_k % 128 == 0) or (size_n % 128 == 0 and size_k % 64 == 0)
    divides = group_size == -1 or (group_size > 0 and size_k % group_size == 0)
    return sizes and bits in {4, 8} and group_size in {-1, 32, 64, 128} and divides


def test_is_aligned_is_the_specification_s_rule_for_every_small_shape():
    sizes = [*range(16, 400, 16), 48, 96, 576, 1000, 10944]
    for size_k, size_n in itertools.product(sizes, sizes):
        for bits, group_size in itertools.product((2, 3, 4, 8), (-1, 16, 32, 64, 128, 256)):
            found = marlin.is_aligned(size_k, size_n, bits, group_size)
            expected = spec_is_aligned(size_k, size_n, bits, group_size)
            assert found is expected, f"K={size_k}, N={size_n}, {bits} bits, g={group_size}: {found}"


@pytest.mark.parametrize(
    ("size_k", "size_n", "group_size", "aligned"),
    [
        (1024, 48, 128, False),
        (1024, 96, 128, False),
        (576, 576, 64, False),
        (1536, 576, 64, True),
        (576, 1536, 64, True),
        (576, 1536, 128, False),
        (576, 192, 64, False),
        (10944, 2048, 64, True),
        (10944, 2048, 32, True),
        (10944, 2048, 128, False),
        (10944, 576, 64, False),
        (2048, 10944, 128, True),
        (10944, 10944, 64, False),
        (128, 64, 128, True),
        (64, 128, 128, False),
        (64, 64, 64, False),
        (0, 64, 64, False),
        (128, 0, 64, False),
        (-128, 64, 64, False),
    ],
)
def test_is_aligned_on_sizes_that_models_have(size_k, size_n, group_size, aligned):
    assert marlin.is_aligned(size_k, size_n, 4, group_size) is aligned
    assert marlin.is_aligned(size_k, size_n, 8, group_size) is aligned


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_listed_models_are_aligned(shape):
    assert marlin.unaligned_reason(shape.size_k, shape.size_n, shape.bits, shape.group_size) is None


@pytest.mark.parametrize("shape", UNALIGNED_SHAPES, ids=str)
def test_listed_unaligned_shapes_are_not_aligned(shape):
    assert not marlin.is_aligned(shape.size_k, shape.size_n, shape.bits, shape.group_size)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((128, 64, 3, 128), ["3 bits", "(4, 8)"]),
        ((128, 64, 4, 16), ["group size 16", "[-1, 32, 64, 128]"]),
        ((128, 64, 4, 0), ["group size 0", "[-1, 32, 64, 128]"]),
        ((0, 64, 4, 64), ["K=0", "empty"]),
        ((10944, 2048, 4, 128), ["K=10944", "group size 128"]),
        ((576, 48, 4, 64), ["K=576", "N=48", "(128, 64)", "(64, 128)"]),
    ],
)
def test_unaligned_reason_names_what_was_found_and_what_is_needed(arguments, said):
    reason = marlin.unaligned_reason(*arguments)
    assert reason is not None
    for words in said:
        assert words in reason, f"{reason!r} does not say {words!r}"


@given(
    st.integers(-64, 2048), st.integers(-64, 2048), st.sampled_from([3, 4, 8]), st.sampled_from([-1, 0, 32, 64, 128])
)
def test_a_reason_is_given_exactly_for_what_is_not_aligned(size_k, size_n, bits, group_size):
    reason = marlin.unaligned_reason(size_k, size_n, bits, group_size)
    assert marlin.is_aligned(size_k, size_n, bits, group_size) is (reason is None)


# --- padding ----------------------------------------------------------------------------------------------


def up(value, multiple):
    while value % multiple:
        value += 1
    return value


def spec_padded(sizes, group_size):
    """The specification's choice, by trying both: smaller product, then smaller sum, then the first."""
    padded = {}
    for size_k in {k for k, _ in sizes}:
        siblings = [n for k, n in sizes if k == size_k]
        choices = []
        for number, (multiple_k, multiple_n) in enumerate([(128, 64), (64, 128)]):
            shapes = [(up(size_k, multiple_k), up(n, multiple_n)) for n in siblings]
            if all(spec_is_aligned(k, n, 4, group_size) for k, n in shapes):
                choices.append((sum(k * n for k, n in shapes), sum(k + n for k, n in shapes), number, shapes))
        padded[size_k] = dict(zip(siblings, min(choices)[3], strict=True))
    return [padded[k][n] for k, n in sizes]


GROUPS = st.sampled_from([-1, 32, 64, 128])


@given(st.integers(1, 700), st.lists(st.integers(1, 700), min_size=1, max_size=4), GROUPS)
@example(576, [576, 192, 192], 64)  # SmolLM2's q, k, v
@example(192, [64, 64, 256], 64)  # the products tie, the sums do not
@example(576, [576], 128)  # the group does not divide K to 64
def test_siblings_are_padded_as_the_specification_chooses(size_k, widths, group_size):
    sizes = [(size_k, size_n) for size_n in widths]
    assert marlin.padded_shapes(sizes, group_size) == spec_padded(sizes, group_size)


@given(st.lists(st.tuples(st.sampled_from([96, 192, 576, 640]), st.integers(1, 400)), min_size=1, max_size=6), GROUPS)
def test_experts_of_two_depths_are_padded_each_with_those_of_its_own(sizes, group_size):
    # gate and up of all experts share one K, down another.
    assert marlin.padded_shapes(sizes, group_size) == spec_padded(sizes, group_size)


@given(st.lists(st.tuples(st.integers(1, 2048), st.integers(1, 2048)), min_size=1, max_size=4), GROUPS)
def test_padded_shapes_are_aligned_no_smaller_and_keep_what_is_aligned(sizes, group_size):
    padded = marlin.padded_shapes(sizes, group_size)
    for (size_k, size_n), (padded_k, padded_n) in zip(sizes, padded, strict=True):
        assert spec_is_aligned(padded_k, padded_n, 4, group_size)
        assert 0 <= padded_k - size_k < 128
        assert 0 <= padded_n - size_n < 128
    assert marlin.padded_shapes(padded, group_size) == spec_padded(padded, group_size)
    for size in padded:
        assert marlin.padded_shapes([size], group_size) == [size]


@pytest.mark.parametrize(
    ("sizes", "group_size", "expected"),
    [
        # 640 * 576 = 576 * 640, the sums tie too: the first choice.
        ([(576, 576)], 64, [(640, 576)]),
        # 256 * 128 > 192 * 128: the second.
        ([(192, 96)], 64, [(192, 128)]),
        # 640 * 192 = 122880 < 576 * 256 = 147456.
        ([(576, 192)], 64, [(640, 192)]),
        # 640 * 960 < 576 * 1152: one K for q, k and v.
        ([(576, 576), (576, 192), (576, 192)], 64, [(640, 576), (640, 192), (640, 192)]),
        # Alone the first would be (192, 128): 24576 < 32768. With its siblings 256 * 320 < 192 * 512.
        ([(192, 96), (192, 64), (192, 64), (192, 64)], 64, [(256, 128), (256, 64), (256, 64), (256, 64)]),
        # 256 * 384 = 192 * 512, but 3 * 256 + 384 > 3 * 192 + 512: the second, by the sums.
        ([(192, 64), (192, 64), (192, 256)], 64, [(192, 128), (192, 128), (192, 256)]),
        # 192 is no multiple of 128: the only choice is the first.
        ([(192, 96)], 128, [(256, 128)]),
        ([(1024, 48)], 128, [(1024, 64)]),
        ([(10944, 576)], 64, [(11008, 576)]),
        ([(10944, 2048)], 128, [(11008, 2048)]),
        ([(1, 1)], -1, [(128, 64)]),
    ],
)
def test_padding_worked_out_by_hand(sizes, group_size, expected):
    assert marlin.padded_shapes(sizes, group_size) == expected


def test_padded_shapes_takes_any_iterable():
    assert marlin.padded_shapes(((k, 96) for k in (192, 192)), 64) == [(192, 128), (192, 128)]
    assert marlin.padded_shapes([], 64) == []


# --- fusing -----------------------------------------------------------------------------------------------

#: The families of the specification, each with the names that checkpoints give its members.
FAMILIES = [
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
]


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
@pytest.mark.parametrize("parent", ["", "model.layers.3.self_attn.", "transformer.h.0.mlp."])
def test_members_of_a_family_under_one_parent_fuse(family, parent):
    assert len({marlin.fusion_group(parent + name) for name in family}) == 1


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_members_under_different_parents_do_not_fuse(family):
    parents = ["", "a.", "a.b.", "model.layers.0.x.", "model.layers.1.x.", "model.layers.10.x."]
    assert len({marlin.fusion_group(parent + family[0]) for parent in parents}) == len(parents)
    assert marlin.fusion_group(f"model.layers.1.x.{family[0]}") != marlin.fusion_group(f"model.layers.0.x.{family[1]}")


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
@pytest.mark.parametrize("parent", ["", "model.layers.3.self_attn."])
def test_siblings_are_a_whole_family_under_the_same_parent(family, parent):
    for name in family:
        assert marlin.fused_siblings(parent + name) == [parent + each for each in family]


@pytest.mark.parametrize("module", ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts.3.w1"])
def test_other_modules_and_experts_have_no_siblings_but_themselves(module):
    assert marlin.fused_siblings(module) == [module]


def test_the_table_holds_no_name_twice():
    names = [name for family in marlin.FUSED_SIBLINGS for name in family]
    assert len(set(names)) == len(names)


def test_families_do_not_fuse_with_each_other():
    keys = {marlin.fusion_group(f"layer.{family[0]}") for family in FAMILIES}
    assert len(keys) == len(FAMILIES)


LOOK_ALIKES = [
    "o_proj",
    "out_proj",
    "down_proj",
    "w2",
    "qkv_proj",
    "query_key_value",
    "gate_up_proj",
    "c_fc",
    "c_fc_2",
    "c_proj",
    "q_b_proj",
    "kv_b_proj",
    "kv_a_proj",
    "in_proj",
    "in_proj_ba",
    "q_proj_2",
    "my_q_proj",
    "Q_proj",
    "gate_projection",
    "w11",
    "lm_head",
    "q_proj.linear",
]


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_fuse_with_nothing(name):
    others = [f"layer.{member}" for family in FAMILIES for member in family]
    others += [f"layer.{other}" for other in LOOK_ALIKES if other != name]
    assert marlin.fusion_group(f"layer.{name}") not in {marlin.fusion_group(other) for other in others}


EXPERTS = [
    "model.layers.1.mlp.experts.0.gate_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.layers.1.mlp.experts.63.up_proj",
    "model.layers.1.mlp.experts.7.w2",
]


@pytest.mark.parametrize("experts", ["experts", "local_experts"])
@pytest.mark.parametrize("parent", ["", "model.layers.0.block_sparse_moe."])
def test_all_experts_of_a_layer_with_all_their_projections_fuse(parent, experts):
    names = [f"{parent}{experts}.{number}.{name}" for number in (0, 1, 127) for name in ("w1", "w2", "w3")]
    assert len({marlin.fusion_group(name) for name in names}) == 1


@pytest.mark.parametrize(
    "other",
    [
        "model.layers.2.mlp.experts.0.gate_proj",  # another layer
        "model.layers.11.mlp.experts.0.gate_proj",  # a number that begins with the same digit
        "model.layers.1.mlp.shared_expert.gate_proj",
        "model.layers.1.mlp.shared_experts.gate_proj",
        "model.layers.1.mlp.shared_experts.0.gate_proj",
        "model.layers.1.mlp.gate",  # the router
        "model.layers.1.mlp.router.gate",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.experts.gate_proj",  # no number
        "model.layers.1.mlp.experts.first.gate_proj",
        "model.layers.1.mlp.experts_0.gate_proj",
    ],
)
def test_experts_do_not_fuse_with_look_alikes(other):
    assert len({marlin.fusion_group(name) for name in EXPERTS}) == 1
    assert marlin.fusion_group(other) != marlin.fusion_group(EXPERTS[0])


def test_shared_experts_fuse_among_themselves_as_any_mlp_does():
    key = marlin.fusion_group("model.layers.1.mlp.shared_experts.gate_proj")
    assert key == marlin.fusion_group("model.layers.1.mlp.shared_experts.up_proj")
    assert key != marlin.fusion_group("model.layers.1.mlp.shared_experts.down_proj")


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head", "transformer.output", "embed_out"])
def test_the_output_embedding_is_known_by_its_last_name_component(name):
    assert is_output_embedding(name)


@pytest.mark.parametrize("name", ["", "lm_head.linear", "layers.0.attn.output_proj", "output.dense", "my_lm_head"])
def test_other_modules_are_no_output_embedding(name):
    assert not is_output_embedding(name)


@pytest.mark.parametrize(
    ("name", "is_models"),
    [
        ("lm_head", True),
        ("language_model.lm_head", True),
        ("output", True),
        ("language_model.output", True),
        ("model.layers.0.attn.output", False),
        ("visual.output", False),
        ("output.dense", False),
    ],
)
def test_what_a_layer_calls_its_output_is_not_the_models(name, is_models):
    assert is_models_output_embedding(name) == is_models


# --- the field's checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_zp", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("quant_type", [marlin.SCALAR_TYPE_UINT4, marlin.SCALAR_TYPE_UINT8], ids=str)
def test_both_types_and_all_group_sizes_are_supported(quant_type, group_size, has_zp):
    assert layout.verify_marlin_supported(quant_type, group_size, has_zp) is None


@pytest.mark.parametrize(
    ("quant_type", "group_size", "said"),
    [
        (marlin.ScalarType("uint3", 3), 128, ["uint3", "uint4", "uint8"]),
        (marlin.ScalarType("int4", 4), 128, ["int4", "uint4", "uint8"]),
        (None, 128, ["None", "uint4"]),
        (marlin.SCALAR_TYPE_UINT4, 16, ["found 16", "[-1, 32, 64, 128]"]),
        (marlin.SCALAR_TYPE_UINT4, 0, ["found 0", "[-1, 32, 64, 128]"]),
        (marlin.SCALAR_TYPE_UINT8, 256, ["found 256", "[-1, 32, 64, 128]"]),
        (marlin.SCALAR_TYPE_UINT8, None, ["found None", "[-1, 32, 64, 128]"]),
    ],
)
def test_other_types_and_group_sizes_are_refused_by_name(quant_type, group_size, said):
    with pytest.raises(ValueError, match="must be one of") as raised:
        layout.verify_marlin_supported(quant_type, group_size, True)
    for words in said:
        assert words in str(raised.value), f"{raised.value!s} does not say {words!r}"


def strict_rule(partition_n, partition_k, size_k, group_size):
    """The rule of the field's engines: N of the partition % 64, its K % 128, and the group divides it."""
    if partition_n % 64 or partition_k % 128:
        return False
    return group_size == -1 or group_size >= size_k or partition_k % group_size == 0


def supports_shape(*arguments):
    try:
        layout.verify_marlin_supports_shape(*arguments)
    except ValueError:
        return False
    return True


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.sampled_from([-1, 32, 64, 128, 256, 512]))
@example(2, 6, 1, 512)  # one group over the whole layer: it need not divide
@example(2, 6, 2, 512)  # one group over a partition only: it must
def test_verify_marlin_supports_shape_is_the_strict_rule(n_32s, k_64s, partitions, group_size):
    partition_k = 64 * k_64s
    arguments = (32 * n_32s, partition_k, partition_k * partitions, group_size)
    assert supports_shape(*arguments) is strict_rule(*arguments), f"{arguments}"


@pytest.mark.parametrize("shape", [*SMALL_SHAPES, *MODEL_SHAPES, *UNALIGNED_SHAPES], ids=str)
def test_the_strict_rule_allows_nothing_that_is_not_aligned(shape):
    k, n, g, bits = shape[:4]
    strict = supports_shape(n, k, k, g)
    assert strict is (n % 64 == 0 and k % 128 == 0 and (g in (-1, k) or k % g == 0))
    assert not strict or marlin.is_aligned(k, n, bits, g)


def test_one_group_over_the_whole_layer_need_not_divide_it():
    assert supports_shape(64, 384, 384, 512)
    assert not supports_shape(64, 384, 768, 512)


def test_the_strict_rule_refuses_some_of_what_is_converted():
    assert marlin.is_aligned(576, 1536, 4, 64)
    with pytest.raises(ValueError, match="576"):
        layout.verify_marlin_supports_shape(1536, 576, 576, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((48, 1024, 1024, 128), ["output_size_per_partition must be a positive multiple of 64", "found 48"]),
        ((96, 1024, 1024, 128), ["output_size_per_partition must be a positive multiple of 64", "found 96"]),
        ((0, 1024, 1024, 128), ["output_size_per_partition must be a positive multiple of 64", "found 0"]),
        ((2048, 10944, 10944, 64), ["input_size_per_partition must be a positive multiple of 128", "found 10944"]),
        ((576, 576, 576, 64), ["input_size_per_partition must be a positive multiple of 128", "found 576"]),
        ((64, 0, 128, 64), ["input_size_per_partition must be a positive multiple of 128", "found 0"]),
        ((64, -128, 128, 64), ["input_size_per_partition must be a positive multiple of 128", "found -128"]),
        ((64, 384, 1536, 256), ["group_size must be -1 or divide input_size_per_partition = 384", "found 256"]),
        ((64, 128, 1024, 0), ["group_size must be -1 or divide input_size_per_partition = 128", "found 0"]),
    ],
)
def test_a_shape_is_refused_naming_the_size_and_what_it_must_be(arguments, said):
    with pytest.raises(ValueError, match="must be") as raised:
        layout.verify_marlin_supports_shape(*arguments)
    for words in said:
        assert words in str(raised.value), f"{raised.value!s} does not say {words!r}"
