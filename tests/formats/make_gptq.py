"""Made everything in ``data/gptq/`` and ``data/auto_round/``: small checkpoints by the libraries that write them.

Three environments made them, each the part of the library that is installed there:

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 datasets    # in all
    pip install --no-deps auto-gptq==0.7.1                  # data/gptq/autogptq_*, data/gptq/old_config
    pip install --no-deps gptqmodel==7.7.0                  # data/gptq/gptqmodel_*; it asks for a newer torch, for
    pip install --no-deps pypcre logbar tokenicer device-smi defuser threadpoolctl pillow ninja   # its kernels
    pip install --no-deps auto-round==0.16.0                # data/auto_round/*, data/gptq/auto_round_*
    python tests/formats/make_gptq.py                       # in each of them

(numpy 2.4.6, safetensors 0.8.0, Python 3.11, a CPU.) Nothing of this project is imported.

- GPTQModel: its own packing class, its own change from version 2 to version 1, and its own config in both of its
  places. Codes, zero points and scales are random, zero points over their whole range, so that those of version 1
  borrow from one another.
- AutoGPTQ: as a whole it does not import beside a current Transformers, but the file of its packing class does, alone.
  The config has the keys that release 0.7.1 writes; ``old_config`` has those of older ones, which stood in a
  ``quantize_config.json`` only and named no method. No zero point is 0: of those its class makes other words.
- AutoRound: whole exports of a Llama of one layer whose weights are random and off centre, rounded to nearest, in every
  packing that it has: whatever is in those folders is its doing. ``old_name`` is one of them as it was called once,
  ``intel/auto-round``.

Each folder has ``checkpoint``, and ``library.npz``: the dense weight [N, K] of every quantized module as the library
itself makes it of the file, as ``dense_sha256``; and ``dense`` (bits of fp16, as uint16) of the smallest module.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

DATA = Path(__file__).resolve().parent / "data"
LAYER = "model.layers.0"
VOCABULARY = 8

os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # it would be compiled, and does the same
os.environ["AR_ALLOW_W8_ASYM"] = "1"  # older releases of AutoRound wrote it without being asked twice


def main():
    """Makes the part of the library that is here."""
    if find_spec("gptqmodel"):
        make_gptqmodel()
    elif find_spec("auto_gptq"):
        make_autogptq()
    elif find_spec("auto_round"):
        make_auto_round()
    else:
        raise SystemExit(__doc__)


def checkpoint(kind, name):
    """Returns the folder of a checkpoint, empty."""
    folder = DATA / kind / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoint").mkdir(parents=True)
    (DATA / kind / ".gitattributes").write_text("* -text\n")
    return folder / "checkpoint"


def store(folder, dense):
    """Writes ``library.npz``: ``dense`` is fp16 [N, K] by module."""
    smallest = min(sorted(dense), key=lambda module: dense[module].numel())
    arrays = {}
    for module, weight in sorted(dense.items()):
        bits = (weight + 0).contiguous().view(torch.uint16).numpy()  # 0 has no sign: a scale may be below zero
        arrays[f"{module}.dense_sha256"] = np.array(hashlib.sha256(bits.tobytes()).hexdigest())
        if module == smallest:
            arrays[f"{module}.dense"] = bits
    np.savez_compressed(folder.parent / "library.npz", **arrays)


# --- GPTQModel ------------------------------------------------------------------------------------------------------


def make_gptqmodel():
    """Makes both versions by GPTQModel."""
    both = {"self_attn.o_proj": (64, 128), "mlp.down_proj": (32, 128)}
    write_gptqmodel("gptqmodel_v1_w4_asym_g32", both, 4, 32, sym=False)
    write_gptqmodel("gptqmodel_v1_w4_sym_g128", {**both, "self_attn.o_proj": (64, 256)}, 4, 128, sym=True)
    write_gptqmodel("gptqmodel_v1_w8_asym_g64", both, 8, 64, sym=False)
    write_gptqmodel("gptqmodel_v1_w8_sym_channel", both, 8, -1, sym=True)
    write_gptqmodel("gptqmodel_v2_w4_asym_g64", both, 4, 64, sym=False, layout="gptq_v2")
    write_gptqmodel("gptqmodel_v2_w8_asym_channel", both, 8, -1, sym=False, layout="gptq_v2")
    write_gptqmodel("gptqmodel_v2_w4_sym_g32", both, 4, 32, sym=True, layout="gptq_v2")


def write_gptqmodel(name, modules, bits, group_size, sym, layout="gptq"):
    """Writes a checkpoint of single modules, and what the library reads in it."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.config import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
    from gptqmodel.version import __version__

    folder, generator = checkpoint("gptq", name), torch.Generator().manual_seed(len(name))
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, desc_act=False, format=FORMAT(layout))
    tensors, dense = {"model.norm.weight": torch.ones(16, dtype=torch.float16)}, {}
    for module, (size_n, size_k) in modules.items():
        packed = packed_by_gptqmodel(size_n, size_k, bits, group_size, sym, generator)
        if layout == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, config)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{LAYER}.{module}.{part}"] = getattr(packed, part).clone()
        if layout == "gptq":
            convert_gptq_v1_to_v2_format_module(packed, bits, torch.int32)
        packed.post_init()
        dense[f"{LAYER}.{module}"] = packed.dequantize_weight().T.to(torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.offload_to_disk_path = None  # a temporary folder of this machine
    config.meta_set_versionable(key="quantizer", value=[f"gptqmodel:{__version__}"])  # as its writer does
    config.save_pretrained(folder)
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(document, indent=2), "utf-8")
    store(folder, dense)


def packed_by_gptqmodel(size_n, size_k, bits, group_size, sym, generator):
    """Returns a module of random codes that GPTQModel has packed, in version 2."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    smallest = None if sym else 0
    linear, scales, zeros, group_of = random_module(size_n, size_k, bits, group_size, smallest, generator)
    packed = TorchLinear(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, in_features=size_k, out_features=size_n
    )
    packed.pack_block(linear, scales, zeros, group_of.to(torch.int32))
    return packed


def random_module(size_n, size_k, bits, group_size, smallest, generator):
    """Returns a linear module of random codes, with its scales and zero points [N, G] and the group of every row.

    ``smallest`` is the smallest zero point; None puts all of them in the middle.
    """
    step = size_k if group_size == -1 else group_size
    groups, largest = size_k // step, 2**bits
    codes = torch.randint(0, largest, (size_n, size_k), generator=generator)
    zeros = torch.full((size_n, groups), largest // 2)
    if smallest is not None:
        zeros = torch.randint(smallest, largest, (size_n, groups), generator=generator)
    scales = (torch.rand(size_n, groups, generator=generator) / 8 + 0.01).to(torch.float16).float()
    linear = nn.Linear(size_k, size_n, bias=False)
    group_of = torch.arange(size_k) // step
    linear.weight.data = (codes - zeros[:, group_of]).float() * scales[:, group_of]
    return linear, scales, zeros, group_of


# --- AutoGPTQ -------------------------------------------------------------------------------------------------------


def make_autogptq():
    """Makes a checkpoint by AutoGPTQ's class, with the config of a late release and with that of an early one."""
    root = Path(find_spec("auto_gptq").submodule_search_locations[0])
    spec = spec_from_file_location("qlinear", root / "nn_modules" / "qlinear" / "qlinear_cuda_old.py")
    qlinear = module_from_spec(spec)
    spec.loader.exec_module(qlinear)
    folder, generator = checkpoint("gptq", "autogptq_w4_asym_g32"), torch.Generator().manual_seed(7)
    tensors, dense = {"model.norm.weight": torch.ones(16, dtype=torch.float16)}, {}
    for module, (size_n, size_k) in {"self_attn.o_proj": (64, 128), "mlp.down_proj": (32, 128)}.items():
        linear, scales, zeros, _ = random_module(size_n, size_k, 4, 32, 1, generator)
        packed = qlinear.QuantLinear(4, 32, size_k, size_n, bias=False)
        packed.pack(linear, scales, zeros, None)
        packed.scales = packed.scales.half()
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{LAYER}.{module}.{part}"] = getattr(packed, part).clone()
        dense[f"{LAYER}.{module}"] = packed(torch.eye(size_k, dtype=torch.float16)).T.to(torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    store(folder, dense)
    config = {
        "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": False,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None, "is_marlin_format": False,
        "quant_method": "gptq",
    }  # fmt: skip
    write_autogptq_configs(folder, config, is_in_both=True)
    del config["is_marlin_format"], config["quant_method"]
    write_autogptq_configs(copied("gptq", "autogptq_w4_asym_g32", "gptq", "old_config"), config, is_in_both=False)


def write_autogptq_configs(folder, config, is_in_both):
    """Writes the config where AutoGPTQ did."""
    (folder / "quantize_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    document |= {"quantization_config": config} if is_in_both else {}
    (folder / "config.json").write_text(json.dumps(document, indent=2), "utf-8")


# --- AutoRound ------------------------------------------------------------------------------------------------------


def make_auto_round():
    """Makes every packing that AutoRound has."""
    for name, packing, bits, group_size, sym in (
        ("gptq_w4_sym_g32", "auto_round", 4, 32, True),
        ("gptq_w4_asym_g64", "auto_round:auto_gptq", 4, 64, False),
        ("gptq_w8_sym_channel", "auto_round", 8, -1, True),
        ("v2_w8_asym_g32", "auto_round", 8, 32, False),
        ("v2_w4_asym_g64", "auto_round:gptqmodel", 4, 64, False),
        ("awq_w4_asym_g32", "auto_round:auto_awq", 4, 32, False),
        ("awq_w4_sym_g64", "auto_round:auto_awq", 4, 64, True),
        ("as_awq_sym", "auto_awq", 4, 64, True),
        ("as_awq_asym", "auto_awq", 4, 32, False),
    ):
        export("auto_round", name, packing, bits, group_size, sym)
    export("gptq", "auto_round_w4_asym_g32", "auto_gptq", 4, 32, sym=False)
    export("gptq", "auto_round_w8_sym_channel", "auto_gptq", 8, -1, sym=True)
    folder = copied("auto_round", "v2_w4_asym_g64", "auto_round", "old_name")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_method"] = "intel/auto-round"
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


def copied(kind, name, new_kind, new_name):
    """Returns a copy of a checkpoint, with what the library said of it."""
    shutil.rmtree(DATA / new_kind / new_name, ignore_errors=True)
    shutil.copytree(DATA / kind / name, DATA / new_kind / new_name)
    return DATA / new_kind / new_name / "checkpoint"


def llama():
    """Returns a Llama of one layer, of whose modules Marlin takes three; its weights lie off centre, each row's own."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data += torch.randn(parameter.shape[0], 1) / 6
    return model.to(torch.float16)


def export(kind, name, packing, bits, group_size, sym):
    """Writes a checkpoint as AutoRound exports it, and what its own classes read in it."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    folder = checkpoint(kind, name)
    with tempfile.TemporaryDirectory() as made:
        rounding = AutoRound(
            llama(), tokenizer=tokenizer, bits=bits, group_size=group_size, sym=sym, iters=0, disable_opt_rtn=True,
            device_map="cpu",
        )  # fmt: skip
        rounding.quantize_and_save(made, format=packing)
        (inner,) = (path for path in Path(made).iterdir() if path.is_dir())
        shutil.copytree(inner, folder, dirs_exist_ok=True)
    quantization = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    store(folder, read_by_auto_round(load_file(folder / "model.safetensors"), quantization))


def read_by_auto_round(tensors, quantization):
    """Returns the dense weight [N, K] of every module, as AutoRound's classes make it."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    bits, group_size = quantization["bits"], quantization["group_size"]
    packing = quantization.get("packing_format", quantization["quant_method"])
    dense = {}
    for module in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        part = {each: tensors[f"{module}.{each}"] for each in ("qweight", "qzeros", "scales")}
        size_n = part["scales"].shape[1]
        if "awq" in packing:
            size_k = part["qweight"].shape[0]
            step = size_k if group_size == -1 else group_size
            dense[module] = dequantize_gemm(**part, bits=bits, group_size=step).T.to(torch.float16)
            continue
        is_first = packing in ("gptq", "auto_round:auto_gptq")
        size_k = part["qweight"].shape[0] * 32 // bits
        kind = qlinear_torch_zp if is_first else qlinear_torch
        layer = kind.QuantLinear(bits, group_size, size_k, size_n, bias=False)
        for each, tensor in part.items():
            setattr(layer, each, tensor)
        dense[module] = layer(torch.eye(size_k, dtype=torch.float16)).T.to(torch.float16)
    return dense


if __name__ == "__main__":
    main()
