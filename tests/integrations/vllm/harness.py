"""Layers of vLLM, built as one rank of several."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_embedding
import vllm.model_executor.parameter as vllm_parameter

from awq2marlin.integrations.vllm import kernels  # noqa: F401 - the tests of every engine look for it here
from awq2marlin.integrations.vllm.config import MarlinNativeConfig
from awq2marlin.layout import reference
from tests.integrations.serving import harness
from tests.integrations.serving.harness import *  # noqa: F403 - what is the same for every engine

#: The plugin's class of the engine's own kernel.
ENGINE_KERNEL = "VllmMarlinKernel"


class Model(harness.Model):
    """A checkpoint with vLLM's config of it."""

    config_class = MarlinNativeConfig


def kernel_sizes(layer):
    """Returns K and N as the kernel of a finished layer takes them."""
    facts = layer.quant_method.kernel._facts
    return facts["input_size_per_partition"], facts["output_size_per_partition"]


def plain_bias(layer):
    """Returns the bias that vLLM's kernel adds, padding included, in plain order."""
    return reference.unpermute_columns(layer.ordered_bias.numpy()[None], single_group=True)[0]


@contextmanager
def as_rank(rank, ranks):
    """Makes vLLM's linear layers and parameters believe that they are one rank of several."""
    with ExitStack() as stack:
        for module in (vllm_linear, vllm_embedding, vllm_parameter):
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_rank", return_value=rank))
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_world_size", return_value=ranks))
        stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def load_format(name, model=None):  # noqa: ARG001 - other engines have it in the model's config
    """Makes vLLM's layers believe that their model is loaded in some way."""
    config = mock.Mock()
    config.load_config.load_format = name
    with mock.patch("awq2marlin.integrations.vllm.state.get_current_vllm_config_or_none", return_value=config):
        yield


def build(kind, model, prefix, *sizes, rank=0, ranks=1, **options):
    """Returns an empty layer of vLLM as one rank of several holds it.

    Args:
        kind: name of vLLM's class.
        model: whose config the layer gets.
        prefix: its full name.
        sizes: what the class takes: K and N, say.
        rank: this rank.
        ranks: how many there are.
        **options: of the class.
    """
    options = {"bias": False, "params_dtype": torch.half, **options}
    with as_rank(rank, ranks):
        return getattr(vllm_linear, kind)(*sizes, quant_config=model.config, prefix=prefix, **options)


def output_embedding(model, rows, columns, rank=0, ranks=1, dtype=torch.half):
    """Returns vLLM's output embedding, empty, as one rank of several holds it."""
    with as_rank(rank, ranks):
        return vllm_embedding.ParallelLMHead(
            rows, columns, quant_config=model.config, prefix="lm_head", params_dtype=dtype
        )  # fmt: skip
