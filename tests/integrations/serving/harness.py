"""What layers of any engine hold: loaded from real converted files, and read back value for value."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.errors import CheckpointError
from awq2marlin.integrations.serving.inventory import read_inventory
from awq2marlin.layout import reference
from tests.equality import assert_identical

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Model:
    """An AWQ checkpoint and what the converter makes of it.

    Attributes:
        awq: the source's tensors.
        marlin: the converted ones.
        config: the plugin's, as the engine makes it.
    """

    #: The engine's, with `from_config`.
    config_class = None

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
        self.config = self.config_class.from_config(document["quantization_config"])
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


def refusal(call, *arguments, **options):
    """Returns the problems with which a call refuses its arguments."""
    with pytest.raises(CheckpointError) as refused:
        call(*arguments, **options)
    return refused.value.problems


def load(layer, model, parts, leave_out=()):
    """Hands a layer the tensors of its modules as the models of an engine do.

    Args:
        layer: of an engine.
        model: where the tensors are.
        parts: the module of each part by the engine's name of the part; None is the name of the whole.
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
    """Returns q, z and s that a layer's tensors stand for to a kernel, with padding, in plain order."""
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


def expert_values(layer, group, expert, bits):
    """Returns (q, z, s) that one expert's ``w13`` or ``w2`` stands for to a kernel, in plain order."""
    q = reference.unpack_marlin_qweight(words(getattr(layer, f"{group}_qweight").data[expert]), bits)
    zeros = getattr(layer, f"{group}_qzeros", None)
    z = None if zeros is None else reference.unpack_marlin_qzeros(words(zeros.data[expert]), bits)
    scales = getattr(layer, f"{group}_scales").data[expert].numpy()
    return q, z, reference.unpermute_columns(np.ascontiguousarray(scales), single_group=len(scales) == 1)
