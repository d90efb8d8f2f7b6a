"""The fixtures that real libraries wrote, and a slow decoder of their format that shares nothing with the package.

Each rule of the format is one sentence here and one line of NumPy. Floats are kept as their bits, uint16, beside the
name of their type, for NumPy has no bfloat16.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ALL_DATA = Path(__file__).resolve().parent / "data"
DATA = ALL_DATA / "compressed_tensors"
NAMES = sorted(folder.name for folder in DATA.glob("*/"))

#: Those whose columns are not in the order of their groups.
PERMUTED = {"old_g_idx"}

#: Those whose config says that there are zero points where a module has none: all are in the middle.
WITHOUT_ZEROS = {"old_w4_asym_g32"}

#: Those that AWQ cannot hold, since a word of it has no part of a column.
ODD_COLUMNS = {"odd_n_w4", "odd_n_w8"}

#: Those whose K ends inside a word, which only ``weight_shape`` tells.
ODD_ROWS = {"odd_k_w4", "odd_k_w8"}

#: Those that are refused by name, if nothing is padded.
REFUSED = PERMUTED | ODD_COLUMNS | ODD_ROWS

_TYPES = {"F16": "<u2", "BF16": "<u2", "F32": "<f4", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_AWQ_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def checkpoint(name):
    """Returns the folder of a fixture's checkpoint."""
    return DATA / name / "checkpoint"


# --- files ----------------------------------------------------------------------------------------------------------


def read_tensors(folder):
    """Returns (type, array) of every tensor of a checkpoint, by name."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                array = np.frombuffer(data[begin:end], _TYPES[entry["dtype"]]).reshape(entry["shape"])
                found[name] = entry["dtype"], array
    return found


def write_tensors(path, tensors):
    """Writes one safetensors file of (type, array) by name."""
    header, chunks, position = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, array) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        data = np.ascontiguousarray(array).astype(_TYPES[dtype], copy=False).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
        chunks.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_config(folder):
    """Returns ``config.json``."""
    return json.loads((Path(folder) / "config.json").read_text("utf-8"))


# --- the numbers of a module ----------------------------------------------------------------------------------------


@dataclass
class Module:
    """One quantized module: w[k, n] = (codes[k, n] - zeros[g, n]) * scales[g, n] with g = groups[k].

    Attributes:
        bits: 4 or 8.
        codes: uint8 [K, N].
        zeros: uint8 [G, N].
        scales: bits of floats, uint16 [G, N].
        dtype: of the scales, ``F16`` or ``BF16``.
        groups: the group of each row, int [K].
    """

    bits: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    dtype: str
    groups: np.ndarray

    @property
    def exact(self):
        """The dense weight [N, K], exact in float32."""
        scales = floats(self.scales, self.dtype)
        steps = self.codes.astype(np.int32) - self.zeros[self.groups].astype(np.int32)
        return np.ascontiguousarray((steps.astype(np.float32) * scales[self.groups]).T)

    @property
    def rounded(self):
        """The bits of the dense weight [N, K] in the type of the scales: each product is rounded once."""
        return rounded(self.exact, self.dtype)


def floats(bits, dtype):
    """Returns the float32 values of 16-bit floats."""
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values, dtype):
    """Returns the bits of the 16-bit floats nearest to float32 values, ties to even."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def fields(words, bits):
    """Returns the fields of 32-bit words along a new last axis, lowest bits first."""
    words = words.view(np.uint32)
    return np.stack([words >> np.uint32(shift) & np.uint32(2**bits - 1) for shift in range(0, 32, bits)], -1)


def weight_args(folder):
    """Returns what a compressed-tensors config says of the weights."""
    (group,) = read_config(folder)["quantization_config"]["config_groups"].values()
    return group["weights"]


def quantized_modules(tensors):
    """Returns the names of the quantized modules of a compressed-tensors checkpoint."""
    return sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed"))


def decode(tensors, module, bits):
    """Returns a module of a compressed-tensors checkpoint, by the sentences of the format."""
    part = {
        each: tensors[f"{module}.weight_{each}"][1]
        for each in ("packed", "scale", "shape", "zero_point", "g_idx")
        if f"{module}.weight_{each}" in tensors
    }
    size_n, size_k = map(int, part["shape"])
    factor, middle = 32 // bits, 2 ** (bits - 1)
    # The codes of a row lie along K, the first in the lowest bits; what the last word has too much is 0.
    assert part["packed"].shape == (size_n, -(-size_k // factor))
    codes = fields(part["packed"], bits).reshape(size_n, -1)
    assert not codes[:, size_k:].any()
    codes = codes[:, :size_k].T.astype(np.uint8)
    # Scales are [N, G].
    scales = np.ascontiguousarray(part["scale"].T)
    groups = len(scales)
    zeros = np.full((groups, size_n), middle, np.uint8)
    if "zero_point" in part:
        stored = part["zero_point"]
        if stored.dtype == np.int8:  # Old ones are [N, G], signed.
            assert stored.shape == (size_n, groups)
            zeros = (stored.T.astype(np.int16) + middle).astype(np.uint8)
        else:  # Zero points of a group lie along N, the first in the lowest bits.
            assert stored.shape == (-(-size_n // factor), groups)
            columns = fields(np.ascontiguousarray(stored.T), bits).reshape(groups, -1)
            assert not columns[:, size_n:].any()
            zeros = columns[:, :size_n].astype(np.uint8)
    in_order = np.arange(size_k) // (size_k // groups)
    return Module(
        bits, codes, zeros, scales, tensors[f"{module}.weight_scale"][0], part.get("g_idx", in_order).astype(np.intp)
    )


def decode_all(folder):
    """Returns every module of a compressed-tensors checkpoint by name."""
    tensors, bits = read_tensors(folder), weight_args(folder)["num_bits"]
    return {module: decode(tensors, module, bits) for module in quantized_modules(tensors)}


# --- a module of any format -----------------------------------------------------------------------------------------


def decode_gptq(tensors, module, bits, stored):
    """Returns a module of a GPTQ checkpoint.

    Args:
        tensors: of the checkpoint.
        module: its name.
        bits: 4 or 8.
        stored: how zero points are: ``as they are``, each ``1 less``, or ``1 less in all fields`` of a word at once.
    """
    dtype, scales = tensors[f"{module}.scales"]
    groups, size_n = scales.shape
    # A word of codes holds those of one column, the first row in the lowest bits.
    codes = fields(tensors[f"{module}.qweight"][1], bits).transpose(0, 2, 1).reshape(-1, size_n).astype(np.uint8)
    # A word of zero points holds those of one group, the first column in the lowest bits.
    words = tensors[f"{module}.qzeros"][1].view(np.uint32)
    if stored == "1 less in all fields":
        words = words + np.uint32({4: 0x11111111, 8: 0x01010101}[bits])
    zeros = fields(words, bits).reshape(groups, size_n).astype(np.uint8)
    if stored == "1 less":
        zeros = zeros + np.uint8(1)
    in_order = np.arange(len(codes)) // (len(codes) // groups)
    _, group_of = tensors.get(f"{module}.g_idx", ("I32", in_order))
    return Module(bits, codes, zeros, scales, dtype, group_of.astype(np.intp))


def quantization_of(folder):
    """Returns the quantization config of a checkpoint, wherever it stands."""
    older = Path(folder) / "quantize_config.json"
    return read_config(folder).get("quantization_config") or json.loads(older.read_text("utf-8"))


def layout_of(config):
    """Returns the key of `READERS` that a quantization config means."""
    method = config.get("quant_method", "gptq").rpartition("/")[2]
    if method == "auto-round":
        return {
            "auto_round:auto_awq": "awq",
            "auto_round:auto_gptq": "gptq",
            "auto_round:gptqmodel": "gptq_v2",
            "auto_round": "gptq_v2",
        }[config["packing_format"]]
    if method == "gptq" and "meta" in config and config["checkpoint_format"] == "gptq":
        return "gptq by GPTQModel"
    return config.get("checkpoint_format", method)


#: A slow reader of each layout.
READERS = {
    "awq": lambda tensors, module, bits: decode_awq(tensors, module, bits),
    "compressed-tensors": lambda tensors, module, bits: decode(tensors, module, bits),
    "gptq": lambda tensors, module, bits: decode_gptq(tensors, module, bits, "1 less"),
    "gptq by GPTQModel": lambda tensors, module, bits: decode_gptq(tensors, module, bits, "1 less in all fields"),
    "gptq_v2": lambda tensors, module, bits: decode_gptq(tensors, module, bits, "as they are"),
}


def numbers_of(folder):
    """Returns every quantized module of a fixture of any format, by name: as it was given, or as a reader says."""
    given = Path(folder).parent / "numbers.npz"
    if given.exists():
        return _given(given)
    tensors, config = read_tensors(folder), quantization_of(folder)
    reader = READERS[layout_of(config)]
    suffixes = (".qweight", ".weight_packed")
    modules = sorted(name.rpartition(".")[0] for name in tensors if name.endswith(suffixes))
    bits = config["bits"] if "bits" in config else weight_args(folder)["num_bits"]
    return {module: reader(tensors, module, bits) for module in modules}


def _given(path):
    """Returns the modules that a library was given, of 4 bits and with fp16 scales."""
    with np.load(path) as stored:
        found = {}
        for module in sorted({key.rpartition(".")[0] for key in stored}):
            codes, zeros, scales = (stored[f"{module}.{part}"] for part in ("codes", "zeros", "scales"))
            groups = np.arange(len(codes)) // (len(codes) // len(scales))
            found[module] = Module(4, codes, zeros, scales.view(np.uint16), "F16", groups)
        return found


# --- the same numbers in other formats -------------------------------------------------------------------------------


def awq_words(values, bits):
    """Returns rows of values packed as AWQ packs them."""
    order = _AWQ_ORDER[bits]
    words = np.zeros((values.shape[0], values.shape[1] // len(order)), np.uint32)
    for field, column in enumerate(order):
        words |= values[:, column :: len(order)].astype(np.uint32) << np.uint32(bits * field)
    return words.view(np.int32)


def decode_awq(tensors, module, bits):
    """Returns a module of an AWQ checkpoint."""
    order, (dtype, scales) = _AWQ_ORDER[bits], tensors[f"{module}.scales"]

    def unpack(part):
        words = tensors[f"{module}.{part}"][1]
        split = fields(words, bits)
        values = np.empty_like(split)
        values[..., order] = split
        return values.reshape(len(words), -1).astype(np.uint8)

    codes = unpack("qweight")
    zeros = unpack("qzeros") if f"{module}.qzeros" in tensors else np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    return Module(bits, codes, zeros, scales, dtype, np.arange(len(codes)) // (len(codes) // len(scales)))


def write_awq(folder, source):
    """Writes the AWQ checkpoint that holds the numbers of a compressed-tensors one, without zero points if it has none.

    Other tensors and other keys of the config are the same.
    """
    folder.mkdir(parents=True)
    tensors, config, args = read_tensors(source), read_config(source), weight_args(source)
    written = {name: tensor for name, tensor in tensors.items() if ".weight_" not in name}
    for name, module in decode_all(source).items():
        written[f"{name}.qweight"] = "I32", awq_words(module.codes, module.bits)
        written[f"{name}.scales"] = module.dtype, module.scales
        if not args["symmetric"]:
            written[f"{name}.qzeros"] = "I32", awq_words(module.zeros, module.bits)
    write_tensors(folder / "model.safetensors", written)
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": args["num_bits"],
        "group_size": args["group_size"] or -1,
        "zero_point": not args["symmetric"],
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def write_dense(folder, source, exact=False):
    """Writes the dense checkpoint that a quantized one means: in float32, or in the type of its scales."""
    folder.mkdir(parents=True)
    tensors, config, modules = read_tensors(source), read_config(source), numbers_of(source)
    written = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] not in modules or name.endswith(".bias")
    }
    if exact:
        written = {name: ("F32", floats(array, dtype)) for name, (dtype, array) in written.items()}
    for name, module in modules.items():
        written[f"{name}.weight"] = ("F32", module.exact) if exact else (module.dtype, module.rounded)
    del config["quantization_config"]
    if exact:
        config["dtype"] = "float32"
    write_tensors(folder / "model.safetensors", written)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


# --- what the library said ------------------------------------------------------------------------------------------


def library(name):
    """Returns what was stored of the library's own reading of a fixture of compressed-tensors."""
    return said_of(checkpoint(name))


def said_of(folder):
    """Returns what was stored of the library's own reading of a checkpoint: arrays and SHA-256 by name."""
    with np.load(Path(folder).parent / "library.npz") as stored:
        return {key: stored[key] if stored[key].shape else str(stored[key]) for key in stored}


def digest(array):
    """Returns the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
