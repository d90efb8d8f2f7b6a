"""Whole models: built and filled by SGLang's own loader from a converted folder, each tensor at its place.

So the names that SGLang's models give their layers, what they join and how they call weight loaders are SGLang's.
"""

from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
from safetensors.torch import load_file

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.errors import CheckpointError
from tests.equality import assert_identical

HIDDEN, INNER, VOCABULARY = 256, 512, 128
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass
class Kind:
    """A model of one layer of SGLang's."""

    architecture: str
    config: dict
    modules: dict
    weights: dict = field(default_factory=dict)

    def recipe(self, **options):
        config = {
            "architectures": [self.architecture], "hidden_size": HIDDEN, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "intermediate_size": INNER,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float16",
            "tie_word_embeddings": False, **self.config,
        }  # fmt: skip
        layer = "model.layers.0"
        weights = {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,), **{f"{layer}.{name}.weight": (HIDDEN,) for name in NORMS},
            **{f"{layer}.{name}": shape for name, shape in self.weights.items()},
        }  # fmt: skip
        modules = {f"{layer}.{name}": size for name, size in self.modules.items()}
        return Recipe(modules, weights, config=config, **{"group_size": 64, **options})


ATTENTION = {
    "self_attn.q_proj": (HIDDEN, 256), "self_attn.k_proj": (HIDDEN, 128), "self_attn.v_proj": (HIDDEN, 128),
    "self_attn.o_proj": (256, HIDDEN),
}  # fmt: skip
MLP = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}


def experts(count, parent, names=("gate_proj", "up_proj", "down_proj")):
    sizes = (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)
    return {f"{parent}.{i}.{name}": size for i in range(count) for name, size in zip(names, sizes, strict=True)}


LLAMA = Kind("LlamaForCausalLM", {"model_type": "llama"}, {**ATTENTION, **{f"mlp.{n}": s for n, s in MLP.items()}})
QWEN2 = Kind(
    "Qwen2ForCausalLM", {"model_type": "qwen2"}, LLAMA.modules,
    {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", 256), ("k", 128), ("v", 128))},
)  # fmt: skip
QWEN3_MOE = Kind(
    "Qwen3MoeForCausalLM",
    {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER,
        "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "head_dim": 64,
    },
    {**ATTENTION, **experts(4, "mlp.experts")},
    {"mlp.gate.weight": (4, HIDDEN), "self_attn.q_norm.weight": (64,), "self_attn.k_norm.weight": (64,)},
)  # fmt: skip
QWEN2_MOE = Kind(
    "Qwen2MoeForCausalLM",
    {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": INNER, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    {**ATTENTION, **experts(4, "mlp.experts"), **{f"mlp.shared_expert.{n}": s for n, s in MLP.items()}},
    {"mlp.gate.weight": (4, HIDDEN), "mlp.shared_expert_gate.weight": (1, HIDDEN), **QWEN2.weights},
)  # fmt: skip
MIXTRAL = Kind(
    "MixtralForCausalLM", {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {**ATTENTION, **experts(4, "block_sparse_moe.experts", ("w1", "w3", "w2"))},
    {"block_sparse_moe.gate.weight": (4, HIDDEN)},
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
DEEPSEEK = Kind(
    "DeepseekV2ForCausalLM",
    {
        "model_type": "deepseek_v2", "num_key_value_heads": 4, "q_lora_rank": 192, "kv_lora_rank": 128,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "rope_scaling": YARN, "head_dim": 64,
    },
    {
        "self_attn.q_a_proj": (HIDDEN, 192), "self_attn.kv_a_proj_with_mqa": (HIDDEN, 192),
        "self_attn.q_b_proj": (192, 4 * 128), "self_attn.kv_b_proj": (128, 4 * 128), "self_attn.o_proj": (256, HIDDEN),
        **experts(4, "mlp.experts"), **{f"mlp.shared_experts.{n}": s for n, s in MLP.items()},
    },
    {
        "mlp.gate.weight": (4, HIDDEN), "self_attn.q_a_layernorm.weight": (192,),
        "self_attn.kv_a_layernorm.weight": (128,),
    },
)  # fmt: skip
PHI3 = Kind(
    "Phi3ForCausalLM", {"model_type": "phi3", "pad_token_id": 0},
    {
        "self_attn.qkv_proj": (HIDDEN, 512), "self_attn.o_proj": (256, HIDDEN), "mlp.gate_up_proj": (HIDDEN, 2 * INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    },
)  # fmt: skip
KINDS = {
    "llama": LLAMA, "qwen2": QWEN2, "qwen3_moe": QWEN3_MOE, "qwen2_moe": QWEN2_MOE, "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK, "phi3": PHI3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_kernel(monkeypatch):
    """SGLang's needs a GPU."""
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")


@pytest.fixture(autouse=True)
def dequantized(harness):  # noqa: ARG001 - it decides whether SGLang is there
    """What SGLang's models have dequantized themselves: (qweight, scales, qzeros) of each; its kernel needs a GPU."""
    from sglang.srt.models.deepseek_common import deepseek_weight_loader

    seen = []

    def awq_dequantize(qweight, scales, qzeros):
        seen.append([tensor.data.clone() for tensor in (qweight, scales, qzeros)])
        return scales.new_zeros(len(qweight), scales.shape[1])

    with mock.patch.object(deepseek_weight_loader, "awq_dequantize_func", return_value=awq_dequantize):
        yield seen


@dataclass
class Made:
    """A converted folder, and what its source holds, as `harness.Model` has it."""

    folder: object
    recipe: object
    awq: dict


def make(kind, folder, **options):
    return make_of(kind.recipe(**options), folder)


def make_of(recipe, folder):
    write_checkpoint(folder / "awq", recipe)
    convert(folder / "awq", folder / "marlin", verify="none")
    return Made(folder / "marlin", recipe, load_file(folder / "awq" / "model.safetensors"))


def held_layers(model):
    """Yields (name, layer) of a model's layers that hold Marlin weights."""
    for name, layer in model.named_modules():
        if type(getattr(layer, "quant_method", None)).__module__.startswith("awq2marlin"):
            yield name, layer


def shares(harness, made, layer, rank, ranks):
    """Returns a rank's part of (q, z, s) of each of the modules that make up a linear layer of SGLang."""
    whole = [harness.Model.values(made, module) for module in layer.quant_method.modules]
    kind, widths = type(layer).__name__, getattr(layer, "output_sizes", ())
    if kind == "ReplicatedLinear":
        return whole
    if kind == "RowParallelLinear":
        return [harness.rows(values, 64, rank, ranks) for values in whole]
    if len(whole) < len(widths):  # joined in the file
        whole = harness.apart(whole[0], widths)
    return [harness.columns(values, rank, ranks) for values in whole]


def projections(made, layer, expert):
    """Returns the names of the modules of an expert: gate, up and down."""
    parent = f"{layer.quant_method.prefix}.{expert}."
    if expert >= layer.num_experts - layer.num_fused_shared_experts:
        parent = f"{layer.quant_method.prefix.rpartition('.')[0]}.shared_experts."
    return [module for module in made.recipe.modules if module.startswith(parent)]


def assert_expert_holds(harness, made, layer, expert, rank, ranks):
    gate, up, down = (harness.Model.values(made, module) for module in projections(made, layer, expert))
    halves = (harness.columns(half, rank, ranks) for half in (gate, up))
    for group, wanted in (("w13", harness.side_by_side(*halves)), ("w2", harness.rows(down, 64, rank, ranks))):
        found = harness.expert_values(layer, group, expert, made.recipe.bits)
        for part, one, other in zip("qzs", found, wanted, strict=True):
            assert_identical(one, other, f"{group} {part} of expert {expert}")


def assert_model_holds(harness, model, made, rank=0, ranks=1):
    """Fails unless every layer holds the source's values, and every quantized module is in some layer."""
    seen = set()
    for _, layer in held_layers(model):
        if hasattr(layer, "w13_qweight"):
            for expert in range(layer.num_experts):
                assert_expert_holds(harness, made, layer, expert, rank, ranks)
                seen |= {*projections(made, layer, expert)}
        else:
            harness.assert_holds(layer, made, harness.side_by_side(*shares(harness, made, layer, rank, ranks)))
            seen |= {*layer.quant_method.modules}
    assert seen == made.recipe.modules.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_every_module_comes_to_its_place(harness, tmp_path, kind, rank, ranks):
    made = make(KINDS[kind], tmp_path)
    model = harness.load_model(made.folder, rank, ranks)
    assert type(model).__name__ == KINDS[kind].architecture
    assert_model_holds(harness, model, made, rank, ranks)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_quantized_output_embedding_is_loaded_though_the_config_says_that_there_is_none(harness, tmp_path, kind):
    tied = replace(KINDS[kind], config={**KINDS[kind].config, "tie_word_embeddings": True})
    recipe = tied.recipe()
    weights = {name: shape for name, shape in recipe.weights.items() if not name.startswith("lm_head")}
    recipe = replace(recipe, modules={**recipe.modules, "lm_head": (HIDDEN, VOCABULARY)}, weights=weights)
    made = make_of(recipe, tmp_path)
    model = harness.load_model(made.folder)
    assert model.lm_head is not model.model.embed_tokens
    assert_model_holds(harness, model, made)


def test_experts_that_are_not_all_quantized_are_refused(harness, tmp_path):
    """SGLang would leave out, without a word, the tensors of those that are."""
    recipe, plain = QWEN3_MOE.recipe(), "model.layers.0.mlp.experts.3.up_proj"
    modules = {name: size for name, size in recipe.modules.items() if name != plain}
    made = make_of(
        replace(recipe, modules=modules, weights={**recipe.weights, f"{plain}.weight": (INNER, HIDDEN)}), tmp_path
    )
    with pytest.raises(CheckpointError, match=f"{plain} is not quantized, but model.layers.0.mlp.experts.0.down_proj"):
        harness.load_model(made.folder)


def test_shared_experts_are_put_among_the_others_where_sglang_does_that(harness, tmp_path):
    """For DeepSeek-V3's 256 experts, and on a GPU; here SGLang is told that it may."""
    from sglang.srt.models.deepseek_common.utils import quant_blocks_shared_experts_fusion
    from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM

    made = make(DEEPSEEK, tmp_path)

    def reason(_cls, _config, quant_config):
        return "kept" if quant_blocks_shared_experts_fusion(quant_config) else None

    with mock.patch.object(DeepseekV2ForCausalLM, "shared_experts_fusion_disable_reason", classmethod(reason)):
        model = harness.load_model(made.folder)
    assert model.model.layers[0].mlp.experts.num_experts == 5
    assert_model_holds(harness, model, made)


def test_what_is_lost_on_the_way_is_named(harness, tmp_path):
    """The headers have all, but SGLang's loader does not hand a tensor on."""
    made = make(QWEN3_MOE, tmp_path)
    lost = ("model.layers.0.mlp.experts.2.up_proj.scales", "model.layers.0.self_attn.k_proj.qzeros")
    from sglang.srt.model_loader.loader import DefaultModelLoader

    whole = DefaultModelLoader._get_weights_iterator

    def without(self, *arguments):
        return ((name, tensor) for name, tensor in whole(self, *arguments) if name not in lost)

    changed = mock.patch.object(DefaultModelLoader, "_get_weights_iterator", without)
    with changed, pytest.raises(CheckpointError) as refused:
        harness.load_model(made.folder)
    assert [problem.tensor for problem in refused.value.problems] == [lost[1]], "the first layer that is finished"


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_what_sglang_s_models_dequantize_themselves_is_in_awq_layout_then(harness, tmp_path, dequantized, rank, ranks):
    made = make(DEEPSEEK, tmp_path)
    harness.load_model(made.folder, rank, ranks)
    ((qweight, scales, qzeros),) = dequantized
    for part, found in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros)):
        whole = made.awq[f"model.layers.0.self_attn.kv_b_proj.{part}"]
        assert_identical(found.numpy(), whole.chunk(ranks, dim=1)[rank].numpy(), part)
