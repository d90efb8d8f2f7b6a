"""What a conversion must give, computed from the specification's sentences alone.

Nothing here imports the package under test: files are read by the safetensors library, and every rule (fields of
a word, order of a tile, permutations, which modules are converted, what they are padded to) is written out once
more, slowly. docs/marlin-native.md is the text; its names are used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import deserialize

ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
GROUP_SIZES = (-1, 32, 64, 128)
OUTPUT_EMBEDDINGS = ("lm_head", "output", "embed_out")
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
INDEX = "model.safetensors.index.json"


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor as the header tells it, with its bytes as the safetensors library gives them."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    data: bytes


def read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Returns a shard's header: exact bytes and document."""
    with path.open("rb") as stream:
        text = stream.read(int.from_bytes(stream.read(8), "little"))
    return text, json.loads(text)


def read_shard(path: Path) -> dict[str, Entry]:
    """Returns a shard's tensors in its header's order; the library checks the file, we only put both together."""
    _, header = read_header(path)
    data = {name: bytes(entry["data"]) for name, entry in deserialize(path.read_bytes())}
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"], data[name])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def shard_names(folder: Path) -> list[str]:
    """Returns the files that hold the weights: those that the index names, or the only one."""
    index = folder / INDEX
    if index.exists():
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    return ["model.safetensors"] if "model.safetensors" in found else found


def file_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of a folder, links followed, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def xxh3(data: bytes) -> str:
    """Returns a digest in the manifest's form."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"


# --- layouts -------------------------------------------------------------------------------------------------------


def unpack_awq(data: bytes, rows: int, bits: int) -> np.ndarray:
    """Field i of a word (bits b*i upward) holds column ``order[i]`` of the word's f columns."""
    order = ORDER[bits]
    words = np.frombuffer(data, "<u4").reshape(rows, -1)
    values = np.zeros((rows, words.shape[1] * len(order)), np.uint32)
    for i, column in enumerate(order):
        values[:, column :: len(order)] = (words >> np.uint32(bits * i)) & np.uint32(2**bits - 1)
    return values


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Packs [..., words, f] fields, the first in the lowest bits, to [..., words]."""
    words = np.zeros(fields.shape[:-1], np.uint32)
    for i in range(32 // bits):
        words |= fields[..., i].astype(np.uint32) << np.uint32(bits * i)
    return words


def tile_order(bits: int) -> list[tuple[int, int]]:
    """Returns (row, column) of the value in each field of a tile, from the first word's lowest bits on."""
    fields = []
    for lane in range(32):
        for j in range(4):
            r, c = 2 * (lane % 4), 16 * j + lane // 4
            owned = [(row, c) for row in (r, r + 1, r + 8, r + 9)] + [(row, c + 8) for row in (r, r + 1, r + 8, r + 9)]
            for first in range(0, 8, 32 // bits):
                fields += [owned[first + value] for value in ORDER[bits]]
    return fields


def marlin_qweight(q: np.ndarray, bits: int) -> bytes:
    """Cuts [K, N] values into tiles of 16 rows by 64 columns and packs each in the order of lanes."""
    size_k, size_n = q.shape
    tiles = q.reshape(size_k // 16, 16, size_n // 64, 64).transpose(0, 2, 1, 3)
    rows, columns = zip(*tile_order(bits), strict=True)
    fields = tiles[:, :, list(rows), list(columns)].reshape(size_k // 16, -1, 32 // bits)
    return pack_fields(fields, bits).astype("<u4").tobytes()


def permute_columns(values: np.ndarray, single_group: bool) -> np.ndarray:
    """Target position 8*i + m takes source column i + 8*m in blocks of 64; 32-wide where one group spans all of K."""
    if single_group:
        taken = {8 * i + at: 2 * i + offset for i in range(4) for at, offset in enumerate((0, 1, 8, 9, 16, 17, 24, 25))}
    else:
        taken = {8 * i + m: i + 8 * m for i in range(8) for m in range(8)}
    result = np.empty_like(values)
    for position, column in taken.items():
        result[:, position :: len(taken)] = values[:, column :: len(taken)]
    return result


def marlin_qzeros(z: np.ndarray, bits: int) -> bytes:
    """Permuted as grouped scales always are, reordered by ``order`` in every f columns, packed in ascending fields."""
    permuted = permute_columns(z, single_group=False).reshape(len(z), -1, 32 // bits)
    return pack_fields(permuted[..., list(ORDER[bits])], bits).astype("<u4").tobytes()


def pad(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Adds rows and columns of zeros."""
    result = np.zeros((rows, columns), values.dtype)
    result[: values.shape[0], : values.shape[1]] = values
    return result


def marlin_part(
    part: str, entry: Entry, true: tuple[int, int], padded: tuple[int, int], bits: int, group: int
) -> Entry:
    """Returns the tensor that one part of a converted module becomes; its offsets are left at zero."""
    (size_k, _), (padded_k, padded_n) = true, padded
    groups = groups_of(size_k, group)
    padded_groups = groups_of(padded_k, group)
    if part == "qweight":
        data = marlin_qweight(pad(unpack_awq(entry.data, size_k, bits), padded_k, padded_n), bits)
        shape: tuple[int, ...] = (padded_k // 16, padded_n * 16 * bits // 32)
    elif part == "qzeros":
        data = marlin_qzeros(pad(unpack_awq(entry.data, groups, bits), padded_groups, padded_n), bits)
        shape = (padded_groups, padded_n * bits // 32)
    else:
        scales = np.frombuffer(entry.data, "<u2").reshape(groups, -1)
        data = permute_columns(
            pad(scales, padded_groups, padded_n), single_group=group == -1 or group >= padded_k
        ).tobytes()
        shape = (padded_groups, padded_n)
    return Entry(entry.dtype, shape, 0, 0, data)


def groups_of(size_k: int, group: int) -> int:
    """Returns G: one for g = -1, else K / g (1 where g is above K)."""
    return 1 if group == -1 else max(1, size_k // group)


# --- which modules -------------------------------------------------------------------------------------------------


def is_aligned(size_k: int, size_n: int, bits: int, group: int) -> bool:
    """N % 64 = 0 and K % 128 = 0, or N % 128 = 0 and K % 64 = 0; b in {4, 8}, g supported, K % g = 0."""
    wide = size_n % 64 == 0 and size_k % 128 == 0
    deep = size_n % 128 == 0 and size_k % 64 == 0
    return (wide or deep) and bits in (4, 8) and group in GROUP_SIZES and (group == -1 or size_k % group == 0)


def sibling_key(module: str) -> str:
    """Returns what a module shares with those that runtimes fuse with it."""
    names = module.split(".")
    for at, name in enumerate(names[:-2]):
        if name.endswith("experts") and names[at + 1].isdigit():
            return ".".join(names[: at + 1]) + " (all experts)"
    for number, family in enumerate(SIBLINGS):
        if names[-1] in family:
            return ".".join(names[:-1]) + f" (family {number})"
    return module


def up(value: int, multiple: int) -> int:
    """Rounds up."""
    return math.ceil(value / multiple) * multiple


def padded_sizes(sizes: list[tuple[int, int]], group: int) -> list[tuple[int, int]]:
    """Siblings of equal K share one padded K: the choice with the smallest total, then sum, then the first."""
    result = []
    for size_k, size_n in sizes:
        widths = [n for k, n in sizes if k == size_k]
        choices = [(128, 64), (64, 128)]
        if group != -1:
            choices = [choice for choice in choices if up(size_k, choice[0]) % group == 0]
        costs = [
            (
                sum(up(size_k, k_multiple) * up(n, n_multiple) for n in widths),
                sum(up(size_k, k_multiple) + up(n, n_multiple) for n in widths),
            )
            for k_multiple, n_multiple in choices
        ]
        k_multiple, n_multiple = choices[costs.index(min(costs))]
        result.append((up(size_k, k_multiple), up(size_n, n_multiple)))
    return result


def target_sizes(
    modules: dict[str, tuple[int, int]], unquantized: list[str], bits: int, group: int, unaligned: str
) -> dict[str, tuple[int, int]]:
    """Returns (K, N) in the output of every module that is converted; siblings together or not at all."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        families[sibling_key(name)].append(name)
    whole = {sibling_key(name) for name in unquantized}
    converted: dict[str, tuple[int, int]] = {}
    for key, names in families.items():
        if key in whole or any(name.rpartition(".")[2] in OUTPUT_EMBEDDINGS for name in names):
            continue
        sizes = [modules[name] for name in names]
        if all(is_aligned(*size, bits, group) for size in sizes):
            converted |= dict(zip(names, sizes, strict=True))
        elif unaligned == "pad":
            converted |= dict(zip(names, padded_sizes(sizes, group), strict=True))
    return converted


# --- a whole checkpoint --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the conversion of a checkpoint must give.

    Attributes:
        shards: by file name, the tensors by name with their new offsets.
        quantization: the ``quantization_config``.
        converted: the modules that become Marlin, with (K, N) in the output.
        kept: the quantized modules that do not.
        unaligned: those of them whose own shape is not aligned.
    """

    shards: dict[str, dict[str, Entry]]
    quantization: dict[str, Any]
    converted: dict[str, tuple[int, int]]
    kept: list[str]
    unaligned: list[str]


def expect(source: Path, quantization: dict[str, Any], unaligned: str) -> Expected:
    """Returns what must come out.

    Args:
        source: the AWQ checkpoint.
        quantization: what the test says of it: bits, group_size, zero_point, modules_to_not_convert.
        unaligned: keep or pad.
    """
    bits, group = quantization["bits"], quantization["group_size"]
    shards = {name: read_shard(source / name) for name in shard_names(source)}
    tensors = {name: entry for shard in shards.values() for name, entry in shard.items()}
    modules = {
        name.removesuffix(".qweight"): (entry.shape[0], entry.shape[1] * 32 // bits)
        for name, entry in sorted(tensors.items())
        if name.endswith(".qweight")
    }
    unquantized = sorted(
        name.removesuffix(".weight")
        for name, entry in tensors.items()
        if name.endswith(".weight") and len(entry.shape) >= 2 and entry.dtype in ("F16", "BF16", "F32", "F64")
    )
    converted = target_sizes(modules, unquantized, bits, group, unaligned)
    kept = sorted(set(modules) - set(converted))
    document = {
        "quant_method": "marlin_native",
        "format_version": 1,
        "bits": bits,
        "group_size": group,
        "zero_point": quantization["zero_point"],
        "awq_modules": kept,
        "unquantized_modules": unquantized,
        "modules_to_not_convert": quantization["modules_to_not_convert"],
        "manifest": "marlin_manifest.json",
    }
    padded = {name: list(modules[name]) for name in sorted(converted) if converted[name] != modules[name]}
    if padded:
        document["padded_modules"] = padded
    new = {name: _expected_shard(shard, modules, converted, bits, group) for name, shard in shards.items()}
    unaligned_modules = [name for name in kept if not is_aligned(*modules[name], bits, group)]
    return Expected(new, document, converted, kept, unaligned_modules)


def _expected_shard(
    shard: dict[str, Entry],
    modules: dict[str, tuple[int, int]],
    converted: dict[str, tuple[int, int]],
    bits: int,
    group: int,
) -> dict[str, Entry]:
    result, position = {}, 0
    for name, entry in sorted(shard.items(), key=lambda item: (item[1].start, item[1].end)):
        module, _, part = name.rpartition(".")
        made = entry
        if module in converted and part in ("qweight", "qzeros", "scales"):
            made = marlin_part(part, entry, modules[module], converted[module], bits, group)
        end = position + len(made.data)
        result[name] = Entry(made.dtype, made.shape, position, end, made.data)
        position = end
    return {name: result[name] for name in shard}


def check_output(source: Path, output: Path, expected: Expected) -> None:
    """Asserts that an output folder holds exactly the expected shards, header by header and byte by byte."""
    assert shard_names(output) == sorted(expected.shards)
    for shard, wanted in expected.shards.items():
        found = read_shard(output / shard)
        assert list(found) == list(wanted), f"{shard}: the tensors stand in the order of the source's header"
        for name, entry in wanted.items():
            place = f"{shard}: {name}"
            got = found[name]
            assert (got.dtype, got.shape, got.start, got.end) == (entry.dtype, entry.shape, entry.start, entry.end), (
                place
            )
            assert got.data == entry.data, place
        (_, old_header), (text, new_header) = read_header(source / shard), read_header(output / shard)
        assert new_header.get("__metadata__") == old_header.get("__metadata__"), shard
        assert list(new_header) == list(old_header), shard
        assert (8 + len(text)) % 8 == 0, f"{shard}: the data is aligned"
        data_length = max((entry.end for entry in wanted.values()), default=0)
        assert (output / shard).stat().st_size == 8 + len(text) + data_length, shard
    check_config(source, output, expected)


def check_config(source: Path, output: Path, expected: Expected) -> None:
    """Asserts that ``config.json`` holds the new quantization config at the top level and is otherwise unchanged."""
    old, new = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (source, output))
    assert new["quantization_config"] == expected.quantization
    del new["quantization_config"]
    if "transformers_weights" not in old:  # stops a Transformers that has no loader
        assert new.pop("transformers_weights").startswith("marlin_native: ")
        new = without_stops(new)
    old = json.loads((source / "config.json").read_text("utf-8"), object_hook=without_quantization)
    assert json.dumps(new) == json.dumps(old)  # as text: NaN is not equal to itself, and False is equal to 0


def without_stops(part: Any) -> Any:
    """Returns a config without the sentence in the parts of it that a language model can be built from."""
    if not isinstance(part, dict):
        return part
    return {
        key: without_stops(value)
        for key, value in part.items()
        if not (key == "transformers_weights" and str(value).startswith("marlin_native: "))
    }


def without_quantization(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "quantization_config"}


def check_manifest(
    source: Path, output: Path, carried: list[str], rewritten: list[str], left_behind: list[str]
) -> None:
    """Asserts that the manifest holds what is needed to give every file back.

    Args:
        source: the AWQ checkpoint.
        output: the converted one.
        carried: files that both hold, byte for byte.
        rewritten: files of the source whose text the manifest keeps, beside its model card.
        left_behind: files and folders of the source that it only names.
    """
    document = json.loads((output / "marlin_manifest.json").read_text("utf-8"))
    assert document["format_version"] == 1
    assert document["tool"]["name"] == "awq2marlin"
    assert sorted(document["shards"]) == shard_names(source)
    for name, entry in document["shards"].items():
        old, new = (source / name).read_bytes(), (output / name).read_bytes()
        assert zlib.decompress(base64.b64decode(entry["source_header"])) == read_header(source / name)[0]
        assert entry["source"]["size"] == len(old)
        assert entry["source"]["digests"][0] == xxh3(old)
        assert entry["output"] == {"size": len(new), "digests": [xxh3(new)]}
    texts = {name: text.encode() for name, text in document["texts"].items()}
    assert texts == {name: (source / name).read_bytes() for name in rewritten}
    assert sorted(document["files"]) == sorted(carried)
    for name, entry in document["files"].items():
        data = (source / name).read_bytes()
        assert entry == {"size": len(data), "digests": [xxh3(data)]}, name
        assert (output / name).read_bytes() == data, name
    card = (source / "README.md").read_bytes()
    kept = document["source_card"]
    assert zlib.decompress(base64.b64decode(kept.pop("data"))) == card
    assert kept == {"name": "README.md", "size": len(card), "digests": [xxh3(card)]}
    assert sorted(document["left_behind"]) == sorted(left_behind)
