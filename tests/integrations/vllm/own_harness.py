"""vLLM's own methods for AWQ and compressed-tensors, loaded from files on a CPU, and read back value for value.

vLLM is made to believe that it is on a GPU of some compute capability: it then chooses its methods and kernels as it
would there, and creates and loads their parameters. Only what follows loading needs a GPU, and is left out.
"""

import json
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import vllm.model_executor.kernels.linear.mixed_precision.humming as vllm_humming
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 as vllm_scheme
from safetensors.torch import load_file
from vllm.model_executor.kernels.linear import MarlinLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.scalar_type import scalar_types

from tests.equality import assert_identical
from tests.formats import peers
from tests.integrations.vllm import harness
from tests.integrations.vllm.harness import PACKED, as_rank, build
from tests.integrations.vllm.harness import columns as cut_columns
from tests.integrations.vllm.harness import rows as cut_rows

get_quantization_config("awq")  # imports what cannot be imported where a GPU is only pretended

A100, HOPPER = (8, 0), (9, 0)
TYPES = {"F16": torch.half, "BF16": torch.bfloat16}
WEIGHT_TYPES = {
    (4, True): scalar_types.uint4b8,
    (4, False): scalar_types.uint4,
    (8, True): scalar_types.uint8b128,
    (8, False): scalar_types.uint8,
}


@contextmanager
def on(capability):
    """Makes vLLM believe that it is on a CUDA GPU of this compute capability."""
    number = capability[0] * 10 + capability[1]

    def wanted(value):
        return value if isinstance(value, int) else value[0] * 10 + value[1]

    with mock.patch.multiple(
        type(current_platform),
        _enum=PlatformEnum.CUDA,
        is_cuda=lambda _: True,
        is_cuda_alike=lambda _: True,
        get_device_capability=classmethod(lambda *_, **__: DeviceCapability(*capability)),
        is_device_capability=classmethod(lambda _, value, **__: wanted(value) == number),
        has_device_capability=classmethod(lambda _, value, **__: wanted(value) <= number),
        num_compute_units=classmethod(lambda *_, **__: 108),
    ):
        yield


def kernel(bits, symmetric, group_size, capability=A100, with_humming=False):
    """Returns the name of the kernel that vLLM chooses for a layer, or its refusal; Humming is a package of its own."""
    sizes = (4096, 4096)
    config = MPLinearLayerConfig(sizes, sizes, WEIGHT_TYPES[bits, symmetric], torch.half, group_size, not symmetric)
    with on(capability), mock.patch.object(vllm_humming, "has_humming", return_value=with_humming):
        try:
            return choose_mp_linear_kernel(config).__name__
        except ValueError as error:
            return str(error)


class Own:
    """A checkpoint in a format that vLLM knows itself.

    Attributes:
        folder: of the checkpoint.
        tensors: its tensors by name.
        config: vLLM's, as it is made of the checkpoint's.
    """

    def __init__(self, folder):
        self.folder = folder
        self.tensors = {
            name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()
        }
        self.document = peers.read_config(folder)["quantization_config"]
        self.method = self.document["quant_method"]
        self.config = get_quantization_config(self.method).from_config(json.loads(json.dumps(self.document)))
        self.config.packed_modules_mapping = PACKED
        with on(A100):
            override = self.config.override_quantization_method(self.document, None)
        # The class that would be chosen is the one that is tested.
        chosen = override or self.method
        assert type(self.config) is get_quantization_config(chosen)

    @property
    def dtype(self):
        """The type of the scales, which the model is served in."""
        return next(each.dtype for name, each in self.tensors.items() if name.endswith(("weight_scale", ".scales")))


def layer(kind, own, prefix, *sizes, any_kernel=False, **options):
    """Returns an empty layer of vLLM as one rank holds it; arguments as for `harness.build`.

    With ``any_kernel`` it has one for every combination, as where one is installed that is not here.
    """
    with on(A100), ExitStack() as stack:
        if any_kernel:
            stack.enter_context(
                mock.patch.object(vllm_scheme, "choose_mp_linear_kernel", return_value=MarlinLinearKernel)
            )
        return build(kind, own, prefix, *sizes, params_dtype=own.dtype, **options)


def output_embedding(own, rows, columns):
    """Returns vLLM's output embedding, empty."""
    with on(A100):
        return harness.output_embedding(own, rows, columns, dtype=own.dtype)


def load(layer, own, parts):
    """Hands a layer every tensor of its modules, none left over; ``parts`` as for `harness.load`."""
    parameters = dict(layer.named_parameters())
    for part, module in parts.items():
        names = {name.removeprefix(f"{module}.") for name in own.tensors if name.startswith(f"{module}.")}
        assert names == parameters.keys()
        for name in names:
            parameter = parameters[name]
            parameter.weight_loader(parameter, own.tensors[f"{module}.{name}"], *([] if part is None else [part]))


def finish_as_awq(layer):
    """Runs what follows loading in vLLM's AWQ method, up to the kernel: it gives the layout of GPTQ."""
    nothing = mock.patch.object(MarlinLinearKernel, "process_weights_after_loading")
    with on(A100), as_rank(0, 1), nothing:
        layer.quant_method.process_weights_after_loading(layer)


# --- values ---------------------------------------------------------------------------------------------------------


def values(module):
    """Returns (codes [K, N], zeros [G, N], bits of scales [G, N]) of a module of `peers`."""
    return module.codes, module.zeros, module.scales


def rows(module, rank, ranks):
    """Returns one rank's share of a module cut by rows."""
    return cut_rows(values(module), -1 if len(module.scales) == 1 else 0, rank, ranks)


def columns(module, rank, ranks):
    """Returns one rank's share of a module cut by columns."""
    return cut_columns(values(module), rank, ranks)


def as_numpy(tensor):
    """Returns a parameter as `peers` reads files: words as int32, floats as their bits."""
    return (tensor.view(torch.int16) if tensor.is_floating_point() else tensor).numpy()


def held(parameters, bits):
    """Returns what parameters of vLLM hold, by their names in either format."""
    dtype = next(name for name, each in TYPES.items() if each in {tensor.dtype for tensor in parameters.values()})
    arrays = {name: as_numpy(tensor) for name, tensor in parameters.items()}
    for name in ("scales", "weight_scale"):
        if name in arrays:
            arrays[name] = arrays[name].view(np.uint16)
    if "qweight" in arrays:
        return values(peers.decode_awq({f"m.{name}": (dtype, each) for name, each in arrays.items()}, "m", bits))
    size_n, words = arrays["weight_packed"].shape
    arrays["weight_shape"] = np.array([size_n, words * 32 // bits])  # of a fused layer, vLLM keeps its last part's
    return values(peers.decode({f"m.{name}": (dtype, each) for name, each in arrays.items()}, "m", bits))


def parameters(layer):
    """Returns a layer's parameters by name."""
    return {name: each.data for name, each in layer.named_parameters()}


def assert_holds(layer, bits, expected):
    """Fails unless a layer holds ``expected`` (codes, zeros, scales)."""
    for name, found, wanted in zip(("codes", "zeros", "scales"), held(parameters(layer), bits), expected, strict=True):
        assert_identical(found, wanted, name)


def held_as_gptq(layer, bits):
    """Returns (codes, zeros) that a layer holds in the layout of GPTQ, which `finish_as_awq` gives."""
    codes = peers.fields(layer.qweight.data.numpy(), bits)  # [K/f, N, f]
    zeros = peers.fields(layer.qzeros.data.numpy(), bits)  # [N/f, G, f]
    return (
        codes.transpose(0, 2, 1).reshape(-1, codes.shape[1]).astype(np.uint8),
        zeros.transpose(1, 0, 2).reshape(zeros.shape[1], -1).astype(np.uint8),
    )
