"""Layers and models of SGLang, built as one rank of several; only their kernels are not, which need a GPU."""

import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import sglang.srt.layers.linear as sglang_linear
import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel

from awq2marlin.integrations.sglang import hooks, kernels  # noqa: F401 - registers the method, as an SGLang process does
from awq2marlin.integrations.sglang.config import MarlinNativeConfig
from tests.integrations.serving import harness
from tests.integrations.serving.harness import *  # noqa: F403 - what is the same for every engine

HookRegistry.apply_hooks()


#: The plugin's class of the engine's own kernel.
ENGINE_KERNEL = "SglangMarlinKernel"


class Model(harness.Model):
    """A checkpoint with SGLang's config of it."""

    config_class = MarlinNativeConfig


@contextmanager
def running():
    """Makes SGLang believe that it was started, for as long as the block lasts."""
    workspace = mock.patch(
        "awq2marlin.integrations.sglang.kernels.marlin_make_workspace",
        lambda device: torch.zeros(1, dtype=torch.int32, device=device),
    )
    with get_context().override_server_args(device="cpu"), workspace:
        yield


@contextmanager
def as_rank(rank, ranks, *, with_experts_apart=False):
    """Makes SGLang's layers believe that they are one rank of several.

    With ``with_experts_apart`` every rank has whole experts, some of them.
    """
    alone = mock.Mock(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    group = mock.Mock(world_size=ranks, rank_in_group=rank)
    apart, cut = (ranks, 1) if with_experts_apart else (1, ranks)
    values = {
        "tp_size": ranks, "tp_rank": rank, "attn_tp_size": ranks, "attn_tp_rank": rank, "moe_tp_size": cut,
        "moe_tp_rank": rank % cut, "moe_ep_size": apart, "moe_ep_rank": rank % apart, "pp_group": alone, "pp_rank": 0,
        "tp_group": group, "attn_tp_group": group,
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(get_parallel().override(**values))
        stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def load_format(name, model):
    """Makes SGLang's layers believe that their model is loaded in some way."""
    before = model.config.by_weight_loaders
    model.config.by_weight_loaders = name == "auto"
    yield
    model.config.by_weight_loaders = before


def kernel_sizes(layer):
    """Returns K and N as the kernel of a finished layer takes them."""
    kernel = layer.quant_method.kernel
    return kernel._size_k, kernel._size_n


def plain_bias(layer):
    """Returns the bias that SGLang's kernel adds, padding included."""
    return layer.ordered_bias.numpy()


def build(kind, model, prefix, *sizes, rank=0, ranks=1, **options):
    """Returns an empty layer of SGLang as one rank of several holds it; see `vllm.harness.build`."""
    options = {"bias": False, "params_dtype": torch.half, **options}
    with as_rank(rank, ranks):
        return getattr(sglang_linear, kind)(*sizes, quant_config=model.config, prefix=prefix, **options)


def output_embedding(model, rows, columns, rank=0, ranks=1, prefix="lm_head"):
    """Returns SGLang's output embedding, empty, as one rank of several holds it."""
    with as_rank(rank, ranks):
        return ParallelLMHead(rows, columns, quant_config=model.config, prefix=prefix, params_dtype=torch.half)


def experts_layer(model, prefix, experts, hidden, inner, rank=0, ranks=1, apart=1, dtype=torch.half, **options):
    """Returns an empty `FusedMoE` of one rank; with ``apart`` above 1, as of so many that share out whole experts."""
    number, count = (rank, ranks) if apart == 1 else (rank, apart)
    with as_rank(number, count, with_experts_apart=apart > 1):
        return FusedMoE(
            num_experts=experts, hidden_size=hidden, intermediate_size=inner, layer_id=0, top_k=2, params_dtype=dtype,
            quant_config=model.config, prefix=prefix, **options,
        )  # fmt: skip


def load_experts(layer, model, prefix, leave_out=()):
    """Hands the layer every tensor of its experts as the models of SGLang do."""
    parameters = dict(layer.named_parameters())
    names = {"experts.w13_": ("gate_proj", "up_proj"), "experts.w2_": ("down_proj",)}
    shards = {projection: shard for shard, projection in harness.SHARDS.items()}
    for expert in range(layer.num_experts):
        for group, projections in names.items():
            for projection in projections:
                for part in ("qweight", "qzeros", "scales"):
                    name = f"{prefix}.{expert}.{projection}.{part}"
                    if name in model.marlin and name not in leave_out:
                        target = f"{prefix.rpartition('.')[0]}.{group}{part}"
                        parameter = parameters[target.rpartition(".")[2]]
                        parameter.weight_loader(
                            parameter, model.marlin[name], target, shard_id=shards[projection], expert_id=expert
                        )


def finish_experts(layer):
    """Runs what follows loading."""
    harness.finish(layer)


def experts_kernel(layer):
    """Returns which kernel serves a finished layer: ``own`` or ``engine``."""
    return "own" if type(layer.quant_method.kernel).__name__ == "OwnExperts" else "engine"


def run_experts(layer, hidden, topk_ids, topk_weights):
    """Returns what a finished layer makes of tokens; the experts are numbers of the model's."""
    chosen = StandardTopKOutput(topk_weights=topk_weights, topk_ids=topk_ids, router_logits=None)
    with mock.patch("sglang.srt.layers.moe.token_dispatcher.standard.get_device", return_value="cpu"):
        return layer.run_moe_core(layer.dispatcher.dispatch(hidden, chosen)).hidden_states


def load_model(folder, rank=0, ranks=1, dtype="float16", **options):
    """Returns a model that SGLang's own loader has built and filled, as one rank of several.

    The options are those of SGLang's `LoadConfig`.
    """
    gatherer = mock.patch("sglang.srt.layers.logits_processor.triton_symm_mem_ag.MultimemAllGatherer")
    rotation = mock.patch.dict(sys.modules, {"vllm._custom_ops": mock.Mock()})  # of positions, where there is no GPU
    with as_rank(rank, ranks), on_a_gpu(), gatherer, rotation:
        model_config = ModelConfig(str(folder), dtype=dtype)
        load_config = LoadConfig(**options)
        loader = get_model_loader(load_config, model_config)
        return loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))


@contextmanager
def on_a_gpu(capability=(9, 0)):
    """Makes the plugin believe that SGLang has GPUs."""
    place = "awq2marlin.integrations.sglang.config"
    gpu = mock.patch(f"{place}.get_device_capability", return_value=capability)
    with mock.patch(f"{place}.is_cuda", return_value=True), gpu:
        yield
