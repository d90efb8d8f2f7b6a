"""Layers of vLLM, built as one rank of several, loaded from real converted files, and read back value for value."""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.parameter as vllm_parameter
from safetensors.torch import load_file

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.integrations.serving.inventory import read_inventory
from awq2marlin.integrations.vllm.config import MarlinNativeConfig
from awq2marlin.layout import reference
from tests.equality import assert_identical

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Model:
    """An AWQ checkpoint and what the converter makes of it.

    Attributes:
        awq: the source's tensors.
        marlin: the converted ones.
        config: the plugin's, as vLLM makes it.
    """

    def __init__(
        self, folder, modules, *, heads=(4, 4), unaligned="keep", weights=None, with_inventory=True, **options
    ):
        source, output = folder / "awq", folder / "marlin"
        config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        self.recipe = Recipe(modules=modules, weights=weights or {}, config=config, **options)
        write_checkpoint(source, self.recipe)
        convert(source, output, unaligned=unaligned, verify="none")
        self.folder = output
        self.awq = load_file(source / "model.safetensors")
        self.marlin = load_file(output / "model.safetensors")
        document = json.loads((output / "config.json").read_text())
        self.config = MarlinNativeConfig.from_config(document["quantization_config"])
        self.config.packed_modules_mapping = PACKED
        if with_inventory:
            inventory = read_inventory(output, self.config.contents.quantization)
            self.config.contents = replace(self.config.contents, inventory=inventory)

    def values(self, module):
        """Returns q [K, N], z [G, N] (None without zero points) and s [G, N] of an AWQ module, as NumPy arrays."""
        bits = self.recipe.bits
        unpack = lambda name: reference.unpack_awq(words(self.awq[f"{module}.{name}"]), bits)  # noqa: E731
        zeros = unpack("qzeros") if self.recipe.has_qzeros else None
        return unpack("qweight"), zeros, self.awq[f"{module}.scales"].numpy()


def words(tensor):
    return tensor.contiguous().numpy().view(np.uint32)


@contextmanager
def as_rank(rank, ranks):
    """Makes vLLM's linear layers and parameters believe that they are one rank of several."""
    with ExitStack() as stack:
        for module in (vllm_linear, vllm_parameter):
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_rank", return_value=rank))
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_world_size", return_value=ranks))
        stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def load_format(name):
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


def load(layer, model, parts, leave_out=()):
    """Hands a layer the tensors of its modules as the models of vLLM do.

    Args:
        layer: of vLLM.
        model: where the tensors are.
        parts: the module of each part by vLLM's name of the part; None is the name of the whole.
        leave_out: names of tensors that the checkpoint lacks.
    """
    parameters = dict(layer.named_parameters())
    for part, module in parts.items():
        for name, parameter in parameters.items():
            tensor = f"{module}.{name}"
            if tensor not in leave_out:
                parameter.weight_loader(parameter, model.marlin[tensor], *([] if part is None else [part]))


def finish(layer):
    """Runs what follows loading."""
    layer.quant_method.process_weights_after_loading(layer)


def tensors(layer):
    """Returns copies of a layer's parameters by name."""
    return {name: parameter.data.clone() for name, parameter in layer.named_parameters()}


def assert_same(found, expected):
    """Fails unless two dictionaries hold the same tensors."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_identical(tensor.numpy(), expected[name].numpy(), name)


def loaded_values(layer, bits, group_size):
    """Returns q, z and s that a layer's tensors stand for to vLLM's kernel, with padding, in plain order."""
    q = reference.unpack_marlin_qweight(words(layer.qweight.data), bits)
    z = reference.unpack_marlin_qzeros(words(layer.qzeros.data), bits) if hasattr(layer, "qzeros") else None
    scales = layer.scales.data.numpy()
    # The kernel goes by the number of groups alone.
    s = reference.unpermute_columns(scales, single_group=len(scales) == 1)
    assert group_size == -1 or len(q) == len(scales) * group_size or len(scales) == 1
    return q, z, s


def assert_holds(layer, model, expected):
    """Fails unless a layer holds ``expected`` (q, z, s), and zeros everywhere else."""
    recipe = model.recipe
    for name, found, wanted in zip("qzs", loaded_values(layer, recipe.bits, recipe.group_size), expected, strict=True):
        if wanted is None:
            assert found is None
            continue
        padded = np.zeros_like(found)
        padded[: wanted.shape[0], : wanted.shape[1]] = wanted
        assert_identical(found, padded, name)


def rows(values, group_size, rank, ranks):
    """Returns one rank's share of (q, z, s) cut by rows; one group over all of K is whole on every rank."""
    q, z, s = values
    cut = lambda array: None if array is None else np.split(array, ranks)[rank]  # noqa: E731
    return (cut(q), z, s) if group_size == -1 else (cut(q), cut(z), cut(s))


def columns(values, rank, ranks):
    """Returns one rank's share of (q, z, s) cut by columns."""
    return tuple(None if array is None else np.split(array, ranks, axis=1)[rank] for array in values)


def apart(values, widths):
    """Returns (q, z, s) of each of the matrices that lie side by side in one module."""
    ends = np.cumsum(widths)[:-1]
    cut = [None if array is None else np.split(array, ends, axis=1) for array in values]
    return [tuple(None if array is None else array[part] for array in cut) for part in range(len(widths))]


def side_by_side(*parts):
    """Returns (q, z, s) of modules fused into one matrix."""
    return tuple(None if arrays[0] is None else np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
