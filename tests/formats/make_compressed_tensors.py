"""Made everything in ``data/compressed_tensors/``: checkpoints by the libraries that write them, small ones.

Three environments made them, each its own part, told by the versions that are installed; others are refused:

    pip install torch==2.13.0 compressed-tensors==0.20.0 transformers==5.23.0     # everything that is not named below
    pip install torch==2.13.0 compressed-tensors==0.9.2 transformers==4.57.6      # old_*
    pip install torch==2.13.0 llmcompressor==0.14.0.1                             # llm_compressor_*; it brings
                                                                                  # compressed-tensors 0.19.0
    python tests/formats/make_compressed_tensors.py                               # in each of them

(numpy 2.4.6, safetensors 0.8.0, Python 3.11, a CPU.) Run again it writes the same bytes. Nothing of this project is
imported, and what a file holds is the library's doing: its quantization parameters, its packing, its config. Two
things are ours: values are random, and scales and zero points are made a little rough, so that no byte follows from
another. llm-compressor's AWQ pins memory whether there is a GPU or not; without one that call is left out.

Each folder has ``checkpoint``, and ``library.npz``: what the library itself makes of the files. For every quantized
module that is ``dense_sha256`` (of its dense weight [N, K], floats of the type that the scales have), ``codes_sha256``
(of its signed codes, int8 [N, K]) and ``zeros`` (its signed zero points, int8 [N, G]; none where it is symmetric). Of
each checkpoint's smallest module there is also ``dense`` (the bits of the floats, as uint16) to say where they differ.

- ``w4_asym_g32`` and so on: bits, symmetric or not, group size; one module that Marlin takes and one that it does not.
- ``odd_k_*``: K that ends inside a word. ``odd_n_*``: N that does, so that zero points end inside one.
- ``llama``: a Llama saved by Transformers, in two shards with one module's tensors apart.
- ``tied``: a Qwen2 with biases whose output embedding is the input's, so that no file has a tensor of it.
- ``old_*``: zero points as int8, and ``weight_g_idx``, as before April 2025. A module all of whose zero points are 0
  has none there, though its config says ``symmetric: false``.
- ``llm_compressor_*``: recipes of llm-compressor: AWQ, GPTQ with an order of activations that leaves the columns where
  they are, and the experts of a Qwen3-MoE.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import compressed_tensors
import numpy as np
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn

DATA = Path(__file__).resolve().parent / "data" / "compressed_tensors"
LAYER = "model.layers.0"
VOCABULARY = 16

FP16, BF16 = torch.float16, torch.bfloat16

#: (bits, symmetric, group size or None for one scale a row): the type of scales and weights.
TYPES = {
    (4, True, 32): FP16,
    (4, True, 64): BF16,
    (4, True, 128): BF16,
    (4, True, None): FP16,
    (4, False, 32): BF16,
    (4, False, 64): FP16,
    (4, False, 128): BF16,
    (4, False, None): BF16,
    (8, True, 32): BF16,
    (8, True, 64): FP16,
    (8, True, 128): FP16,
    (8, True, None): BF16,
    (8, False, 32): FP16,
    (8, False, 64): BF16,
    (8, False, 128): FP16,
    (8, False, None): FP16,
}


def main():
    """Makes the fixtures that the installed versions make, anew."""
    transformers.utils.logging.disable_progress_bar()
    with suppress(PackageNotFoundError):
        return make("llm_compressor", {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0"})
    if compressed_tensors.__version__ == "0.9.2":
        return make("old", {"compressed-tensors": "0.9.2"})
    return make("", {"compressed-tensors": "0.20.0", "transformers": "5.23.0"})


def make(prefix, versions):
    """Makes the fixtures whose names begin so, or begin with no prefix of another part."""
    for name, wanted in {"torch": "2.13.0", **versions}.items():
        if (found := version(name).partition("+")[0]) != wanted:
            sys.exit(f"{name} {wanted} is needed, {found} is installed")
    for folder in DATA.glob("*/"):
        if folder.name.startswith(prefix) if prefix else not folder.name.startswith(("old", "llm_compressor")):
            shutil.rmtree(folder)
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / ".gitattributes").write_text("* -text\n")
    {"": make_current, "old": make_old, "llm_compressor": make_llm_compressor}[prefix]()


def checkpoint(name):
    """Returns the folder of a checkpoint, created."""
    folder = DATA / name / "checkpoint"
    folder.mkdir(parents=True)
    return folder


# --- compressed-tensors 0.20 ----------------------------------------------------------------------------------------


def make_current():
    """Makes what the newest release writes."""
    for (bits, symmetric, group), dtype in TYPES.items():
        size_k = 256 if (bits, symmetric, group) == (4, False, 128) else 128
        modules = {"self_attn.o_proj": (64, size_k), "mlp.down_proj": (16, 128)}
        name = f"w{bits}_{'sym' if symmetric else 'asym'}_{f'g{group}' if group else 'channel'}"
        write_modules(name, modules, weight_args(bits, symmetric, group), dtype)
    write_modules("odd_k_w4", {"self_attn.o_proj": (16, 131)}, weight_args(4, True, None), BF16)
    write_modules("odd_k_w8", {"self_attn.o_proj": (16, 130)}, weight_args(8, False, None), FP16)
    write_modules("odd_n_w4", {"self_attn.o_proj": (20, 128)}, weight_args(4, False, 64), FP16)
    write_modules("odd_n_w8", {"self_attn.o_proj": (18, 128)}, weight_args(8, False, 32), BF16)
    save_model("llama", llama(FP16), weight_args(4, False, 32), shard_bytes=50_000)
    save_model("tied", tied(BF16), weight_args(4, True, 32))


def weight_args(bits, symmetric, group, **others):
    """Returns what a recipe says of the weights."""
    groups = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **groups, **others}


def quantization(weights, ignore):
    """Returns a quantization config of the library."""
    return QuantizationConfig.model_validate(
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ignore}
    )


def llama(dtype, hidden=128):
    """Returns a Llama of one layer; Marlin takes every module of it if it has 128 features."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).to(dtype)


def tied(dtype):
    """Returns a Qwen2 of one layer with tied embeddings; Marlin takes its down_proj alone."""
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def tree(modules, dtype, seed=3):
    """Returns a bare model: linear modules of these (N, K) in a layer, and what is never quantized around them."""
    torch.manual_seed(seed)
    root = nn.Module()
    add(root, "model.embed_tokens", nn.Embedding(2, 16))
    for name, (size_n, size_k) in modules.items():
        add(root, f"{LAYER}.{name}", nn.Linear(size_k, size_n, bias=False))
    add(root, "model.norm", nn.RMSNorm(16))
    add(root, "lm_head", nn.Linear(16, 2, bias=False))
    return root.to(dtype)


def add(root, name, module):
    """Puts a module where its name says."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    root.add_module(last, module)


def calibrate(model, rough=True):
    """Gives every quantized module scales and zero points, as the library computes them of its weights."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args = scheme.weights
        rows = module.weight.float()
        groups = rows.unflatten(-1, (-1, args.group_size or rows.shape[-1]))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        if rough:  # of normal weights nearly all zero points would be the middle one
            scales *= 1 + torch.rand(scales.shape, generator=generator) / 4
            if not args.symmetric:
                limit = 2 ** (args.num_bits - 1)
                moved = zeros + torch.randint(-limit // 2, limit // 2, zeros.shape, generator=generator)
                zeros = moved.clamp(-limit, limit - 1).to(torch.int8)
        module.weight_scale.data = scales.to(module.weight.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zeros.to(torch.int8)


def write_modules(name, modules, weights, dtype):
    """Writes a checkpoint of single modules."""
    from compressed_tensors.compressors import ModelCompressor

    folder, model = checkpoint(name), tree(modules, dtype)
    apply_quantization_config(model, quantization(weights, ["lm_head"]), show_progress=False)
    calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    write_config(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    compressor.update_config(str(folder))
    decode(name)


def save_model(name, model, weights, shard_bytes=None):
    """Writes a checkpoint of a model as Transformers saves it."""
    from compressed_tensors.compressors import ModelCompressor

    folder = checkpoint(name)
    apply_quantization_config(model, quantization(weights, ["lm_head"]), show_progress=False)
    calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    compressor.update_config(str(folder))
    decode(name)


def write_config(folder, document):
    """Writes a config.json, to which the library adds its part."""
    (folder / "config.json").write_text(json.dumps(document), "utf-8")


def read_tensors(folder):
    """Returns every tensor of a checkpoint, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def decode(name):
    """Stores what the library itself makes of the files."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    folder = DATA / name / "checkpoint"
    tensors = read_tensors(folder)
    modules = sorted(each.removesuffix(".weight_packed") for each in tensors if each.endswith(".weight_packed"))
    dtype = tensors[f"{modules[0]}.weight_scale"].dtype
    dense = CompressedTensorsDequantizer(str(folder), dtype=dtype).process(dict(tensors))
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    args = config["config_groups"]["group_0"]["weights"]
    stored = {}
    for module in modules:
        part = {each: tensors.get(f"{module}.weight_{each}") for each in ("packed", "shape", "scale", "zero_point")}
        codes = unpack_from_int32(part["packed"], args["num_bits"], part["shape"])
        zeros = None
        if not args["symmetric"]:
            shape = torch.Size((int(part["shape"][0]), part["scale"].shape[1]))
            zeros = unpack_from_int32(part["zero_point"], args["num_bits"], shape, packed_dim=0)
        stored |= entry(module, dense[f"{module}.weight"], codes, zeros)
    store(name, stored)


def entry(module, dense, codes, zeros):
    """Returns what is known of a module."""
    found = {"dense": dense.contiguous().view(torch.uint16).numpy(), "codes": codes.contiguous().numpy()}
    if zeros is not None:
        found["zeros"] = zeros.contiguous().numpy()
    return {module: found}


def store(name, modules):
    """Writes ``library.npz``."""
    smallest = min(sorted(modules), key=lambda module: modules[module]["dense"].size)
    arrays = {}
    for module, found in sorted(modules.items()):
        for part, array in found.items():
            if part != "zeros":
                arrays[f"{module}.{part}_sha256"] = np.array(hashlib.sha256(array.tobytes()).hexdigest())
            if part == "zeros" or (part, module) == ("dense", smallest):
                arrays[f"{module}.{part}"] = array
    np.savez_compressed(DATA / name / "library.npz", **arrays)


# --- compressed-tensors 0.9.2 ---------------------------------------------------------------------------------------


def make_old():
    """Makes what a release before packed zero points wrote."""
    modules = {"self_attn.o_proj": (64, 128), "mlp.down_proj": (64, 128)}
    write_old("old_w4_asym_g32", modules, weight_args(4, False, 32), FP16, all_zero="mlp.down_proj")
    write_old("old_w8_asym_channel", {"self_attn.o_proj": (64, 128)}, weight_args(8, False, None), BF16)
    ordered = {"self_attn.o_proj": (16, 128)}
    write_old("old_g_idx_in_order", ordered, weight_args(4, True, 32, actorder="group"), FP16, order=torch.arange)
    write_old("old_g_idx", ordered, weight_args(4, True, 32, actorder="group"), FP16, order=shuffled)


def shuffled(size):
    """Returns an order of columns that is none."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(5))


def write_old(name, modules, weights, dtype, all_zero=None, order=None):
    """Writes a checkpoint as the old release does, and what it reads in it."""
    from compressed_tensors.compressors import ModelCompressor

    folder, model = checkpoint(name), tree(modules, dtype)
    apply_quantization_config(model, quantization(weights, ["lm_head"]))
    calibrate(model)
    for path, module in model.named_modules():
        if all_zero is not None and path.endswith(all_zero):
            module.weight_zero_point.data.zero_()
        if order is not None and hasattr(module, "weight_g_idx"):
            module.weight_g_idx.data = (order(module.in_features) // weights["group_size"]).to(torch.int32)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    save_file(compressor.compress(model), folder / "model.safetensors", {"format": "pt"})
    write_config(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    compressor.update_config(str(folder))
    decode_old(name, compressor, model)


def decode_old(name, compressor, model):
    """Stores what the old release makes of the files."""
    from compressed_tensors.compressors.model_compressors.model_compressor import map_modules_to_quant_args
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32

    folder = DATA / name / "checkpoint"
    tensors, args = read_tensors(folder), map_modules_to_quant_args(model)
    stored = {}
    for dense_name, dense in compressor.quantization_compressor.decompress(str(folder), names_to_scheme=args):
        module = dense_name.removesuffix(".weight")
        packed, shape = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"]
        codes = unpack_from_int32(packed, args[module].num_bits, torch.Size(shape))
        stored |= entry(module, dense, codes, tensors.get(f"{module}.weight_zero_point"))
    store(name, stored)


# --- llm-compressor -------------------------------------------------------------------------------------------------


def make_llm_compressor():
    """Makes what recipes of llm-compressor write."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None

    def recipe(symmetric, group, ignore=("lm_head",), **others):
        weights = weight_args(4, symmetric, group, **others)
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": list(ignore)}

    asymmetric = recipe(symmetric=False, group=64)
    save_recipe("llm_compressor_awq", llama(BF16, hidden=64), [AWQModifier(), QuantizationModifier(**asymmetric)])
    in_order = recipe(symmetric=True, group=64, actorder="static")
    save_recipe("llm_compressor_gptq", tied(FP16), [GPTQModifier(**in_order)])
    around = ("lm_head", "re:.*mlp.gate$", "re:.*self_attn.*")
    for name, symmetric, hidden, inner in (("experts", False, 128, 64), ("experts_sym", True, 64, 32)):
        groups = recipe(symmetric=symmetric, group=32, ignore=around)
        save_recipe(
            f"llm_compressor_{name}", mixture(hidden, inner), [QuantizationModifier(**groups)], calibrated=False
        )


def mixture(hidden, inner):
    """Returns a Qwen3-MoE of one layer and two experts."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=hidden, moe_intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=VOCABULARY, num_experts=2,
        num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(6)
    return transformers.Qwen3MoeForCausalLM(config).to(BF16)


def save_recipe(name, model, recipe, calibrated=True):
    """Runs a recipe over a model and writes the checkpoint."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from tokenizers import Tokenizer, models

    options = {}
    if calibrated:
        words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
        tokens = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(7)).tolist()
        options = {
            "dataset": Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 16] * 8}),
            "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0"),
            "num_calibration_samples": 8,
            "max_seq_length": 16,
        }
    folder = DATA / name / "checkpoint"
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)  # it reads the config from where the model came from
        loaded = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=model.dtype)
        oneshot(model=loaded, recipe=recipe, **options)
        loaded.save_pretrained(folder, save_compressed=True)
    decode(name)


if __name__ == "__main__":
    main()
