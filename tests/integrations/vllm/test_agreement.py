"""`inspect`, the model card and the plugin say the same of the numbers of ranks: what one offers, the other loads."""

import pytest

from awq2marlin import inspect
from awq2marlin.arguments import one_of
from awq2marlin.errors import CheckpointError
from tests.integrations.serving.mixtures import layer_of, make_model

#: Group size, hidden size, heads, key and value heads, size of a head, inner size: aligned, padded, cut within
#: tiles, and the last with rows that end within a group.
MODELS = [
    (128, 512, 8, 2, 64, 1024),
    (64, 576, 9, 3, 64, 1536),
    (32, 256, 8, 4, 32, 11 * 32),
    (-1, 192, 12, 12, 16, 264),
    (64, 256, 6, 6, 24, 640),
]


@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_ranks_that_are_offered_load_and_others_do_not(harness, tmp_path, shape, unaligned):
    group_size, hidden, heads, key_value, head, inner = shape
    modules = {
        "attn.q_proj": (hidden, heads * head),
        "attn.k_proj": (hidden, key_value * head),
        "attn.v_proj": (hidden, key_value * head),
        "attn.o_proj": (heads * head, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    model = harness.Model(tmp_path, modules, group_size=group_size, heads=(heads, key_value), unaligned=unaligned)

    def is_served(ranks):
        layers = [
            ("QKVParallelLinear", "attn.qkv_proj", (hidden, head, heads, key_value)),
            ("RowParallelLinear", "attn.o_proj", (heads * head, hidden)),
            ("MergedColumnParallelLinear", "mlp.gate_up_proj", (hidden, [inner, inner])),
            ("RowParallelLinear", "mlp.down_proj", (inner, hidden)),
        ]
        try:
            for kind, prefix, sizes in layers:
                harness.build(kind, model, prefix, *sizes, rank=ranks - 1, ranks=ranks)
        except (CheckpointError, AssertionError):  # ours, or vLLM's own where heads or columns cannot be shared out
            return False
        return True

    offered = inspect(model.folder).parallel_sizes.sizes
    assert list(offered) == [ranks for ranks in range(1, heads + 1) if is_served(ranks)]
    card = (model.folder / "README.md").read_text("utf-8")
    several = [ranks for ranks in offered if ranks > 1]
    assert (f"Over several GPUs: --tensor-parallel-size {one_of(several)}." in card) == bool(several)
    assert ("It cannot be split over several GPUs" in card) == (offered == (1,))
    assert ("vLLM cannot serve this checkpoint" in card) == (not offered)


#: Hidden and inner size of experts, bits, zero points: aligned, cut within tiles, padded, and of a refused size.
EXPERTS = [
    (128, 256, 4, True),
    (256, 384, 4, False),
    (192, 96, 4, True),
    (192, 192, 8, True),
    (96, 128, 4, True),
    (96, 128, 8, False),
]


@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("kind", EXPERTS, ids=str)
def test_ranks_that_are_offered_load_experts_and_others_do_not(harness, experts, tmp_path, kind, unaligned):
    hidden, inner, bits, has_qzeros = kind
    options = {"bits": bits, "group_size": 32, "has_qzeros": has_qzeros, "heads": (8, 8), "unaligned": unaligned}
    extra = {"attn.o_proj": (256, 64)}
    model = make_model(harness, tmp_path, sizes=(hidden, inner), extra=extra, **options)

    def is_served(ranks):
        try:
            layer_of(experts, model, ranks - 1, ranks, sizes=(hidden, inner))
        except (CheckpointError, AssertionError):
            return False
        return True

    offered = inspect(model.folder).parallel_sizes.sizes
    assert list(offered) == [ranks for ranks in (1, 2, 4, 8) if is_served(ranks)]
    card = (model.folder / "README.md").read_text("utf-8")
    assert ("vLLM cannot serve this checkpoint" in card) == (not offered)
