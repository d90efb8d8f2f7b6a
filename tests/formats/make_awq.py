"""Made everything in ``data/awq/``: small checkpoints by AutoAWQ's own linear layers, of all its layouts but "gemm".

    pip download autoawq==0.2.9 --no-deps && tar xzf autoawq-0.2.9.tar.gz
    pip install torch==2.13.0 transformers==5.23.0
    python tests/formats/make_awq.py autoawq-0.2.9

(numpy 2.4.6, safetensors 0.8.0, Python 3.11, a CPU.) Run again it writes the same bytes. AutoAWQ as a whole does not
import any more, but the files of its layers and of its config do, alone: their kernels are optional. What a file holds
is their doing. The numbers are ours: random codes, zero points and scales, from which the layer gets its weight.

Each folder has ``checkpoint``, and ``numbers.npz``: of every quantized module the ``codes`` uint8 [K, N], ``zeros``
uint8 [G, N] and ``scales`` float16 [G, N] that the layer was given. Names are the version and the group size; one
module is taken by Marlin, one is not.
"""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

DATA = Path(__file__).resolve().parent / "data" / "awq"
LAYER = "model.layers.0"
CLASSES = {"gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast", "marlin": "WQLinear_Marlin"}

#: (K, N) of each module, by group size.
SIZES = {
    32: {"self_attn.o_proj": (128, 64), "mlp.down_proj": (192, 72)},
    64: {"self_attn.o_proj": (128, 64), "mlp.down_proj": (192, 72)},
    128: {"self_attn.o_proj": (128, 64), "mlp.down_proj": (256, 72)},  # the first has one group
}
#: Marlin's tiles hold whole blocks of 64 columns.
MARLIN_SIZES = {
    32: {"self_attn.o_proj": (128, 64), "mlp.down_proj": (192, 64)},
    64: {"self_attn.o_proj": (256, 64), "mlp.down_proj": (64, 64)},  # the second has one group
    128: {"self_attn.o_proj": (128, 64), "mlp.down_proj": (256, 128)},
}


def load(root, name):
    """Imports one file of AutoAWQ without the rest of it."""
    if "awq" not in sys.modules:
        for package in ("awq", "awq.utils", "awq.utils.module"):
            sys.modules[package] = types.ModuleType(package)
        sys.modules["awq.utils.module"].try_import = lambda _name: (None, "")  # the kernels are not there
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), root / "awq" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(root):
    """Makes every checkpoint anew."""
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    (DATA / ".gitattributes").write_text("* -text\n")
    config = load(root, "models/_config").AwqConfig
    for version, name in CLASSES.items():
        layer = getattr(load(root, f"modules/linear/{version}"), name)
        for group_size, sizes in (MARLIN_SIZES if version == "marlin" else SIZES).items():
            write(layer, version, group_size, sizes, config)


def write(layer, version, group_size, sizes, config):
    """Writes one checkpoint."""
    folder, with_zeros = DATA / f"{version}_g{group_size}", version != "marlin"
    (folder / "checkpoint").mkdir(parents=True)
    torch.manual_seed(group_size)
    tensors = {
        "model.embed_tokens.weight": torch.randn(4, 16).half(),
        "model.norm.weight": torch.ones(16).half(),
        "lm_head.weight": torch.randn(4, 16).half(),
    }
    stored = {}
    for module, (size_k, size_n) in sizes.items():
        codes = torch.randint(0, 16, (size_n, size_k))
        zeros = torch.randint(0, 16, (size_n, size_k // group_size)) if with_zeros else None
        scales = (torch.rand(size_n, size_k // group_size) / 50 + 0.001).half()
        steps = codes - (zeros.repeat_interleave(group_size, 1) if with_zeros else 8)
        linear = nn.Linear(size_k, size_n, bias=module.startswith("mlp")).half()
        linear.weight.data = (steps * scales.float().repeat_interleave(group_size, 1)).half()
        packed = layer.from_linear(linear, 4, group_size, scales=scales, zeros=zeros.float() if with_zeros else None)
        name = f"{LAYER}.{module}"
        tensors |= {f"{name}.{part}": tensor.detach() for part, tensor in packed.state_dict().items()}
        zeros = zeros if with_zeros else torch.full(scales.shape, 8)
        numbers = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": scales}
        stored |= {f"{name}.{part}": tensor.T.contiguous().numpy() for part, tensor in numbers.items()}
    save_file(tensors, folder / "checkpoint" / "model.safetensors", {"format": "pt"})
    said = {"zero_point": with_zeros, "q_group_size": group_size, "w_bit": 4, "version": version}
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": config(**said).to_transformers_dict(),
    }
    (folder / "checkpoint" / "config.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    np.savez_compressed(folder / "numbers.npz", **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
