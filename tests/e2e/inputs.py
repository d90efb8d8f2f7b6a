"""Small checkpoints like those that are out there, one for each kind, and what is known of each in advance."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("generation_config.json",)
Modules = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes:
        name: what it shows.
        recipe: the plain checkpoint it starts from.
        keep: how many modules are converted and kept under "keep".
        pad: the same under "pad"; as under "keep" if None.
        change: makes the plain checkpoint the special one; returns the folder to convert if it is another.
        said: what the quantization config says beyond the recipe: zero_point, modules_to_not_convert.
        carried: side files beyond the usual ones.
        rewritten: files whose text the manifest keeps, beyond config.json.
        left_behind: what is not carried over.
    """

    name: str
    recipe: Recipe
    keep: tuple[int, int]
    pad: tuple[int, int] | None = None
    change: Callable[[Path], Path | None] | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Writes the checkpoint and returns the folder to convert."""
        write_checkpoint(folder, self.recipe)
        changed = self.change(folder) if self.change else None
        return changed or folder

    @property
    def quantization(self) -> dict[str, Any]:
        """What the source's config means."""
        zero_point = self.recipe.has_qzeros if self.recipe.zero_point is None else self.recipe.zero_point
        return {
            "bits": self.recipe.bits,
            "group_size": self.recipe.group_size,
            "zero_point": zero_point,
            "modules_to_not_convert": None,
            **self.said,
        }


# --- parts of models -----------------------------------------------------------------------------------------------


def layer(number: int = 0, hidden: int = 128, kv: int = 64, inter: int = 256, root: str = "model") -> Modules:
    """The seven linear modules of one Llama layer."""
    prefix = f"{root}.layers.{number}"
    attention = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    modules = {f"{prefix}.self_attn.{name}": (hidden, size_n) for name, size_n in attention.items()}
    modules |= {f"{prefix}.mlp.{name}": (hidden, inter) for name in ("gate_proj", "up_proj")}
    return {**modules, f"{prefix}.mlp.down_proj": (inter, hidden)}


def experts(parent: str, names: tuple[str, str, str], hidden: int, inter: int, count: int = 2) -> Modules:
    """Two projections in and one out, for each expert."""
    into, out, also_into = names
    modules: Modules = {}
    for number in range(count):
        prefix = f"{parent}.experts.{number}"
        modules |= {f"{prefix}.{into}": (hidden, inter), f"{prefix}.{also_into}": (hidden, inter)}
        modules[f"{prefix}.{out}"] = (inter, hidden)
    return modules


EMBEDDINGS = {"model.embed_tokens.weight": (256, 128), "lm_head.weight": (256, 128)}
NORMS = {"model.norm.weight": (128,), "model.layers.0.input_layernorm.weight": (128,)}
WHOLE = {**EMBEDDINGS, **NORMS}


def plain(
    modules: Modules | None = None, weights: Mapping[str, tuple[int, ...]] | None = None, **options: Any
) -> Recipe:
    """A recipe of one Llama layer with groups of 64, unless told otherwise."""
    options.setdefault("group_size", 64)
    options.setdefault("config", {"model_type": "llama", "tie_word_embeddings": False})
    return Recipe(modules or layer(), WHOLE if weights is None else weights, **options)


# --- changes to files ----------------------------------------------------------------------------------------------


def all_of(*changes: Callable[[Path], Path | None]) -> Callable[[Path], Path | None]:
    """Makes one change after the other."""

    def change(folder: Path) -> Path | None:
        for each in changes:
            folder = each(folder) or folder
        return folder

    return change


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes a JSON file in place."""

    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text("utf-8"))
        edit(document)
        (folder / name).write_text(json.dumps(document, indent=2), "utf-8")

    return change


def say(remove: tuple[str, ...] = (), **keys: Any) -> Callable[[Path], None]:
    """Adds keys to the quantization config, and removes some."""

    def edit(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        quantization |= keys
        for key in remove:
            del quantization[key]

    return edit_json("config.json", edit)


def nest(*under: str) -> Callable[[Path], None]:
    """Moves the quantization config into a part of the config, the way to which is ``under``."""

    def edit(config: dict[str, Any]) -> None:
        inner = {"hidden_size": 128, "quantization_config": config.pop("quantization_config"), "layers": 1}
        for name in reversed(under):
            inner = {name: inner, "kept": [{"depth": 1}]}
        config.update(inner)

    return edit_json("config.json", edit)


def old_config(name: str, *, only: bool = True, **keys: Any) -> Callable[[Path], None]:
    """Puts the quantization config of an older tool beside ``config.json``, in its place if ``only``."""

    def change(folder: Path) -> None:
        if only:
            edit_json("config.json", lambda config: config.pop("quantization_config"))(folder)
        document = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", **keys}
        text = json.dumps({key: value for key, value in document.items() if value is not None}, indent=4)
        (folder / name).write_text(text, "utf-8", newline="\n")

    return change


def write_files(files: Mapping[str, bytes]) -> Callable[[Path], None]:
    """Adds files of any name."""

    def change(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    return change


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns a shard's header and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, text: bytes, data: bytes) -> None:
    """Writes a shard of any header text."""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def reword_header(
    shard: str = SINGLE, *, metadata: dict[str, str] | None = None, shuffled: bool = False, spaced: bool = False
) -> Callable[[Path], None]:
    """Writes a shard's header anew: other metadata, its names in no order, with white space or without."""

    def change(folder: Path) -> None:
        header, data = split_file(folder / shard)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        if shuffled:
            random.Random(7).shuffle(entries)
        head = [] if metadata is None else [("__metadata__", metadata)]
        at = len(entries) // 2 if shuffled else 0
        document = dict([*entries[:at], *head, *entries[at:]])
        text = json.dumps(document, indent=3, ensure_ascii=False) + "\n \t\r\n" if spaced else json.dumps(document)
        join_file(folder / shard, text.encode("utf-8"), data)

    return change


def add_tensors(tensors: Mapping[str, tuple[str, list[int], bytes]], shard: str = SINGLE) -> Callable[[Path], None]:
    """Appends tensors of any type and shape to a shard."""

    def change(folder: Path) -> None:
        header, data = split_file(folder / shard)
        for name, (dtype, shape, content) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        join_file(folder / shard, json.dumps(header).encode(), data)

    return change


def name_all_in_index(folder: Path) -> None:
    """Gives a checkpoint of one file an index."""
    header, data = split_file(folder / SINGLE)
    names = [name for name in header if name != "__metadata__"]
    document = {"metadata": {"total_size": len(data), "made by": "hand"}, "weight_map": dict.fromkeys(names, SINGLE)}
    (folder / INDEX).write_text(json.dumps(document), "utf-8")


def part_by_part(folder: Path) -> None:
    """Spreads every module over three shards, one for each part, and the rest over a fourth."""
    header, data = split_file(folder / SINGLE)
    del header["__metadata__"]
    (folder / SINGLE).unlink()
    weight_map = {}
    for number, part in enumerate(("qweight", "qzeros", "scales", "weight"), 1):
        shard, entries, content = f"model-{number:05d}-of-00004.safetensors", {}, b""
        for name in [name for name in header if name.endswith(f".{part}")]:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
            weight_map[name] = shard
        join_file(folder / shard, json.dumps(entries).encode(), content)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": len(data)}, "weight_map": weight_map}), "utf-8")


def forget_in_index(folder: Path) -> None:
    """Removes an ordinary tensor from the index; its file still holds it."""
    edit_json(INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))(folder)


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_snapshot(folder: Path) -> Path:
    """Lays the files out as the Hub's cache does: blobs, and links to them; returns the snapshot."""
    repository = folder.parent / "hub" / "models--some-org--tiny-AWQ"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        link.symlink_to(Path("../" * len(link.relative_to(repository).parent.parts)) / "blobs" / blob.name)
    return snapshot


# --- the kinds -----------------------------------------------------------------------------------------------------

QKV_BIAS = {f"model.layers.0.self_attn.{name}_proj.bias": (size,) for name, size in (("q", 128), ("k", 64), ("v", 64))}
FUSED_ON_DISK = {
    "model.layers.0.self_attn.qkv_proj": (128, 256),
    "model.layers.0.self_attn.o_proj": (128, 128),
    "model.layers.0.mlp.gate_up_proj": (128, 512),
    "model.layers.0.mlp.down_proj": (256, 128),
    "transformer.h.0.attn.c_attn": (128, 384),
    "transformer.h.0.self_attention.query_key_value": (128, 192),
}
MIXTRAL = ("w1", "w2", "w3")
GPTQMODEL_KEYS = {
    "checkpoint_format": "gemm",
    "format": "gemm",
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "true_sequential": True,
    "dynamic": None,
    "meta": {"quantizer": ["gptqmodel:4.0.0"], "uri": "https://example.org", "damp_percent": 0.05},
    "do_fuse": False,
    "modules_to_fuse": None,
}
VISION = {
    "visual.patch_embed.proj.weight": (32, 3, 2, 14, 14),
    "visual.blocks.0.attn.qkv.weight": (96, 32),
    "visual.blocks.0.attn.qkv.bias": (96,),
    "visual.blocks.0.norm1.weight": (32,),
    "mtp.layers.0.self_attn.q_proj.weight": (128, 128),
    "mtp.layers.0.mlp.gate_proj.weight": (256, 128),
    "model.layers.1.eh_proj.weight": (128, 256),
}
ODD_TENSORS = {
    "model.rotary.inv_freq": ("F32", [4], b"\x00\x00\x80\x3f" * 4),
    "model.position_ids": ("I64", [1, 3], bytes(range(24))),
    "model.mask": ("BOOL", [2, 2], b"\x01\x00\x00\x01"),
    "model.scalar": ("F32", [], b"\x01\x02\x03\x04"),
    "model.nothing.weight": ("F16", [0, 4], b""),
    "model.layers.0.mlp.act_fn.scales": ("F16", [256], b"\x00\x3c" * 256),
    "model.layers.0.extra.scales": ("F32", [2, 2], bytes(16)),
    "model.layers.0.extra.bias": ("F16", [2], bytes(4)),
    "model.fp8.weight": ("F32", [2, 2], bytes(range(16))),
}
AWKWARD_SIZES = {
    "model.n48": (128, 48),
    "model.n96": (128, 96),
    "model.n576": (576, 576),
    "model.n576_k128": (128, 576),
    "model.layers.0.mlp.down_proj": (10944, 128),
    "model.k10944_n64": (10944, 64),
    "model.k64_n128": (64, 128),
    "model.k64_n64": (64, 64),
}
SMOLLM = layer(0, hidden=192, kv=64, inter=512)

CASES = [
    Case("one_file_without_an_index", plain(), (7, 0)),
    Case(
        "one_file_of_another_name",
        plain(),
        (7, 0),
        change=lambda f: (f / SINGLE).rename(f / "awq.safetensors") and None,
    ),
    Case("one_file_with_an_index", plain(), (7, 0), change=name_all_in_index, carried=(INDEX,)),
    Case("many_shards_that_cut_modules_apart", plain({**layer(0), **layer(1)}, shards=9), (14, 0), carried=(INDEX,)),
    Case(
        "modules_of_which_each_part_is_in_another_shard",
        plain(SMOLLM),
        (3, 4),
        (7, 0),
        change=part_by_part,
        carried=(INDEX,),
    ),
    Case("an_index_that_forgets_a_tensor", plain(shards=2), (7, 0), change=forget_in_index, carried=(INDEX,)),
    Case("fp16_scales_beside_bf16_tensors", plain(weight_dtype="BF16"), (7, 0)),
    Case("bf16_scales", plain(scale_dtype="BF16", weight_dtype="BF16"), (7, 0)),
    Case("fp32_norms_and_embeddings", plain(weight_dtype="F32"), (7, 0)),
    Case("eight_bits", plain(bits=8), (7, 0)),
    Case("eight_bits_one_group", plain(SMOLLM, bits=8, group_size=-1), (3, 4), (7, 0)),
    Case("one_group_over_all_of_k", plain(SMOLLM, group_size=-1), (3, 4), (7, 0)),
    Case("a_group_as_long_as_k", plain({"model.a": (128, 64), "model.b": (256, 64)}, group_size=128), (2, 0)),
    Case("groups_of_32", plain(SMOLLM, group_size=32), (3, 4), (7, 0)),
    Case("groups_of_128", plain(group_size=128), (7, 0)),
    Case(
        "headers_with_white_space",
        plain(),
        (7, 0),
        change=reword_header(spaced=True, metadata={"format": "pt", "größe": '\u2028 "quoted" \\'}),
    ),
    Case("headers_without_metadata_or_padding", plain(), (7, 0), change=reword_header()),
    Case(
        "headers_with_several_metadata_keys_and_unsorted_names",
        plain(SMOLLM),
        (3, 4),
        (7, 0),
        change=reword_header(shuffled=True, metadata={"z": "1", "format": "pt", "a": "{}", "total_size": "12"}),
    ),
    Case(
        "unsorted_names_with_white_space_in_eight_bits",
        plain(SMOLLM, bits=8),
        (3, 4),
        (7, 0),
        change=reword_header(shuffled=True, spaced=True, metadata={"format": "pt", "b": ""}),
    ),
    Case(
        "shapes_whose_digits_make_the_header_grow",
        plain({f"model.layers.{n}.k_proj": (3584, 512) for n in range(6)}, {}, group_size=128, shards=2),
        (6, 0),
        carried=(INDEX,),
    ),
    Case(
        "tied_embeddings",
        plain(weights={"model.embed_tokens.weight": (256, 128), **NORMS}, config={"tie_word_embeddings": True}),
        (7, 0),
        change=reword_header(metadata={"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}),
    ),
    Case("qkv_bias", plain(weights={**WHOLE, **QKV_BIAS}), (7, 0)),
    Case(
        "qkv_bias_where_it_is_padded",
        plain(SMOLLM, {**NORMS, "model.layers.0.self_attn.q_proj.bias": (192,)}),
        (3, 4),
        (7, 0),
    ),
    Case("qkv_and_gate_up_fused_on_disk", plain(FUSED_ON_DISK), (6, 0)),
    Case(
        "experts_w1_w2_w3_and_a_router_in_full_precision",
        plain(
            {**layer(), **experts("model.layers.0.block_sparse_moe", MIXTRAL, 128, 256)},
            {**WHOLE, "model.layers.0.block_sparse_moe.gate.weight": (2, 128)},
        ),
        (13, 0),
    ),
    Case(
        "experts_of_one_layer_are_kept_together",
        plain(
            {
                **experts("model.layers.0.block_sparse_moe", MIXTRAL, 128, 192),
                **experts("model.layers.1.block_sparse_moe", MIXTRAL, 192, 64),
                **experts("model.layers.2.block_sparse_moe", MIXTRAL, 128, 256),
            }
        ),
        (12, 6),
        (18, 0),
    ),
    Case(
        "experts_gate_up_down_with_shared_expert",
        plain(
            {
                **experts("model.layers.0.mlp", ("gate_proj", "down_proj", "up_proj"), 128, 256, count=3),
                **experts("model.layers.1.mlp", ("gate", "down", "up"), 128, 96),
                "model.layers.0.mlp.shared_expert.gate_proj": (128, 64),
                "model.layers.0.mlp.shared_expert.up_proj": (128, 64),
                "model.layers.0.mlp.shared_expert.down_proj": (64, 128),
            },
            {
                **WHOLE,
                "model.layers.0.mlp.gate.weight": (3, 128),
                "model.layers.1.mlp.gate.weight": (2, 128),
                "model.layers.0.mlp.shared_expert_gate.weight": (1, 128),
            },
            group_size=32,
        ),
        (12, 6),
        (18, 0),
    ),
    Case(
        "multi_head_latent_attention",
        plain(
            {
                "model.layers.0.self_attn.q_a_proj": (128, 128),
                "model.layers.0.self_attn.kv_a_proj_with_mqa": (128, 96),
                "model.layers.0.self_attn.q_b_proj": (128, 192),
                "model.layers.1.linear_attn.in_proj_qkv": (128, 256),
                "model.layers.1.linear_attn.in_proj_z": (128, 128),
                "model.layers.1.linear_attn.in_proj_b": (128, 8),
                "model.layers.1.linear_attn.in_proj_a": (128, 128),
            }
        ),
        (3, 4),
        (7, 0),
    ),
    Case(
        "vision_tower_and_mtp_layers_in_full_precision",
        plain(layer(root="language_model.model"), {**WHOLE, **VISION}, shards=3),
        (7, 0),
        change=nest("text_config"),
        carried=(INDEX,),
    ),
    Case(
        "siblings_of_which_one_is_not_quantized",
        plain(
            {name: size for name, size in layer().items() if not name.endswith(("q_proj", "up_proj"))},
            {
                **WHOLE,
                "model.layers.0.self_attn.q_proj.weight": (128, 128),
                "model.layers.0.mlp.up_proj.weight": (256, 128),
            },
        ),
        (2, 3),
    ),
    Case("modules_to_not_convert_absent", plain(), (7, 0), change=say(remove=("modules_to_not_convert",))),
    Case(
        "modules_to_not_convert_a_list",
        plain(),
        (7, 0),
        change=say(modules_to_not_convert=["visual", "lm_head"]),
        said={"modules_to_not_convert": ["visual", "lm_head"]},
    ),
    Case("config_under_text_config", plain(), (7, 0), change=nest("text_config")),
    Case("config_under_llm_config", plain(), (7, 0), change=nest("llm_config")),
    Case("config_under_thinker_config", plain(), (7, 0), change=nest("thinker_config")),
    Case("config_under_talker_config", plain(), (7, 0), change=nest("talker_config")),
    Case("config_under_language_config", plain(), (7, 0), change=nest("language_config")),
    Case("config_under_vision_config", plain(), (7, 0), change=nest("vision_config")),
    Case("config_deeper", plain(), (7, 0), change=nest("thinker_config", "audio", "text_config")),
    Case(
        "the_same_config_in_several_parts_and_in_a_list",
        plain(),
        (7, 0),
        change=edit_json(
            "config.json",
            lambda c: c.update(
                vision_config={"quantization_config": c["quantization_config"], "depth": 2},
                towers=[{"depth": 3}, {"inner": {"quantization_config": c["quantization_config"]}}],
                audio_config={"quantization_config": None},
            ),
        ),
    ),
    Case(
        "an_empty_quant_config_beside",
        plain(),
        (7, 0),
        change=write_files({"quant_config.json": b"", "quantize_config.json": b"{}"}),
        rewritten=("quant_config.json", "quantize_config.json"),
    ),
    Case(
        "a_foreign_quantize_config_beside",
        plain(SMOLLM),
        (3, 4),
        (7, 0),
        change=write_files({"quantize_config.json": b'{"bits": 4, "group_size": 128, "desc_act": true}'}),
        rewritten=("quantize_config.json",),
    ),
    Case(
        "config_at_the_top_and_under_text_config",
        plain(),
        (7, 0),
        change=edit_json(
            "config.json", lambda c: c.update(text_config={"quantization_config": c["quantization_config"]})
        ),
    ),
    Case("old_quant_config", plain(), (7, 0), change=old_config("quant_config.json"), rewritten=("quant_config.json",)),
    Case(
        "old_quantize_config",
        plain(),
        (7, 0),
        change=old_config("quantize_config.json", version=None, zero_point=None),
        rewritten=("quantize_config.json",),
    ),
    Case(
        "old_quant_config_beside_a_new_one",
        plain(SMOLLM),
        (3, 4),
        (7, 0),
        change=all_of(old_config("quant_config.json", only=False), old_config("quantize_config.json", only=False)),
        rewritten=("quant_config.json", "quantize_config.json"),
    ),
    *(Case(f"version_{version}", plain(), (7, 0), change=say(version=version)) for version in ("GEMM", "Gemm", "gemm")),
    Case("version_absent", plain(), (7, 0), change=say(remove=("version",))),
    Case("method_in_capitals", plain(), (7, 0), change=say(quant_method="AWQ")),
    Case("keys_of_gptqmodel", plain(), (7, 0), change=say(**GPTQMODEL_KEYS)),
    Case(
        "quantize_config_of_gptqmodel_beside",
        plain(),
        (7, 0),
        change=all_of(
            say(**GPTQMODEL_KEYS),
            old_config(
                "quantize_config.json",
                only=False,
                q_group_size=None,
                w_bit=None,
                zero_point=None,
                bits=4,
                group_size=64,
                quant_method="awq",
                **GPTQMODEL_KEYS,
            ),
        ),
        rewritten=("quantize_config.json",),
    ),
    Case("awkward_sizes", plain(AWKWARD_SIZES), (3, 5), (8, 0)),
    Case("a_quantized_lm_head", plain({**layer(), "lm_head": (128, 256)}, NORMS), (7, 1)),
    Case(
        "quantized_output_embeddings_of_other_names",
        plain({"model.output": (128, 128), "embed_out": (128, 96), "model.output_proj": (128, 128)}, NORMS),
        (1, 2),
    ),
    Case("no_zero_points_and_no_qzeros", plain(SMOLLM, has_qzeros=False), (3, 4), (7, 0)),
    Case("no_zero_points_in_eight_bits", plain(has_qzeros=False, bits=8, group_size=-1), (7, 0)),
    Case(
        "stray_safetensors_files",
        plain(shards=2),
        (7, 0),
        change=write_files({"consolidated.safetensors": b"not even one", "adapter/adapter.safetensors": b"x"}),
        carried=(INDEX, "adapter/adapter.safetensors"),
        left_behind=("consolidated.safetensors",),
    ),
    Case(
        "pickled_files_beside_safetensors",
        plain(shards=2),
        (7, 0),
        change=write_files({"pytorch_model.bin": b"\x80\x02", "pytorch_model.bin.index.json": b"{}", "x/a.pt": b""}),
        carried=(INDEX, "x/a.pt"),
        left_behind=("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ),
    Case(
        "sub_folders_and_hidden_files",
        plain(),
        (7, 0),
        change=write_files(
            {
                "assets/deep/logo.png": b"\x89PNG",
                "modeling.py": b"pass\r\n",
                "empty.txt": b"",
                "tokenizer.json": '{"ü": 1}'.encode(),
                "Ein Name mit Leerzeichen.md": b"# hi",
                ".gitattributes": b"*",
                ".git/HEAD": b"ref",
                ".cache/huggingface/x": b"",
                "assets/.DS_Store": b"",
            }
        ),
        carried=("assets/deep/logo.png", "modeling.py", "empty.txt", "tokenizer.json", "Ein Name mit Leerzeichen.md"),
        left_behind=(".gitattributes", ".git", ".cache", "assets/.DS_Store"),
    ),
    Case("odd_tensors_and_scaled_activations", plain(SMOLLM), (3, 4), (7, 0), change=add_tensors(ODD_TENSORS)),
    Case(
        "a_config_with_nan_infinity_and_escapes",
        plain(),
        (7, 0),
        change=write_files(
            {
                "config.json": '{"a": [1e-05, NaN, -Infinity, 12345678901234567890],\r\n "ü\\ud83d\\ude00": "\\u0000",'
                '"quantization_config":{"quant_method":"awq","w_bit":4,"bits":4,"group_size":64}, "z": null}'.encode()
            }
        ),
    ),
    Case(
        "a_hub_snapshot_of_links",
        plain(SMOLLM, shards=2),
        (3, 4),
        (7, 0),
        change=all_of(write_files({"sub/code.py": b"1", ".gitattributes": b"*"}), hub_snapshot),
        carried=(INDEX, "sub/code.py"),
        left_behind=(".gitattributes",),
    ),
]
