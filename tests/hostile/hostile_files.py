"""Files as an attacker would write them: safetensors byte for byte, and checkpoints with one thing wrong."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.errors import CheckpointError
from awq2marlin.io.safetensors import DTYPE_BITS

INDEX = "model.safetensors.index.json"
MANIFEST = "marlin_manifest.json"
SHARD = "model.safetensors"
MODULE = "model.layers.0.mlp.down_proj"

#: Terminal escapes (one- and two-byte), line breaks, a bidirectional override, markup, a lone surrogate.
NASTY = "x\x1b[31m\x9b2J\r\n\x00\x7f\u2028\u202e[bold red]:skull:[/]\ud800"


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file as given, right or wrong.

    ``header`` is the JSON's bytes, or a document; ``length`` is what the first eight bytes say, by default the truth.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    """Returns one tensor's entry of a header; a sound one by default."""
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
        **more,
    }


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns header document and data of a sound safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def pack_tensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """Returns a sound file of the given (dtype, shape, bytes), in their order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = entry(dtype, shape, [len(data), len(data) + len(content)])
        data += content
    return raw_file(header, data)


def unpack_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Returns (dtype, shape, bytes) of every tensor of a sound file."""
    header, data = split_file(path)
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])])
        for name, each in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def zeros(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    """Returns a tensor of zeros for `pack_tensors`."""
    count = 1
    for size in shape:
        count *= size
    return dtype, list(shape), bytes(count * DTYPE_BITS[dtype] // 8)


def write_awq(folder: Path, **options: Any) -> Path:
    """Writes the smallest AWQ checkpoint with a converted, a kept and a plain module."""
    defaults: dict[str, Any] = {
        "modules": {MODULE: (128, 64), "model.layers.0.self_attn.o_proj": (64, 48)},
        "weights": {"model.embed_tokens.weight": (8, 16), "model.norm.weight": (16,)},
        "group_size": 64,
        "config": {"model_type": "llama"},
    }
    write_checkpoint(folder, Recipe(**{**defaults, **options}))
    return folder


def edit_json(path: Path, change: Any) -> None:
    """Lets ``change`` alter the document in a file."""
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(document if (new := change(document)) is None else new), "utf-8")


def pack_header(text: bytes) -> str:
    """Returns a header as the manifest keeps it."""
    return base64.b64encode(zlib.compress(text, 9)).decode("ascii")


def unpack_header(packed: str) -> bytes:
    """Returns the header that the manifest keeps."""
    return zlib.decompress(base64.b64decode(packed))


def tree(folder: Path) -> dict[str, Any]:
    """Returns what a folder holds, recursively: bytes of files, targets of links, kinds of the rest."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def walk(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value in a JSON document, the document's own first."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from walk(value, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Returns a copy of a JSON document with another value at a path."""
    if not path:
        return value
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """Returns the value at a path."""
    for key in path:
        document = document[key]
    return document


def codes(error: CheckpointError) -> set[str]:
    """Returns the codes of an error's problems."""
    return {problem.code for problem in error.problems}
