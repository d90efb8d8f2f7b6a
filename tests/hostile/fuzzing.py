"""What random files look like and what must hold for them: a little in test_hostile_fuzz.py, much in tests/fuzz.py.

The one law: whatever a file holds, reading it gives a result or a `CheckpointError` that a terminal can show. For
headers the official library is the judge: what we take, it takes, and sees the same in it.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import deserialize

from awq2marlin import convert, inspect
from awq2marlin.checkpoint.config import read_config, read_quantization
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.errors import Awq2MarlinError, CheckpointError
from awq2marlin.io.folder import Folder
from awq2marlin.io.safetensors import DTYPE_BITS, encode_header, parse_header, read_header
from awq2marlin.pipeline.plan import plan_conversion
from tests.hostile.hostile_files import (
    INDEX,
    MANIFEST,
    NASTY,
    SHARD,
    at,
    entry,
    pack_header,
    pack_tensors,
    raw_file,
    replaced,
    unpack_header,
    walk,
    write_awq,
    zeros,
)

NAMES = st.one_of(
    st.sampled_from(["a", "b", "m.qweight", "m.scales", "m.weight", "__metadata__", "../x", "", "\ud800", NASTY]),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([1 << 31, 1 << 32, 1 << 61, 1 << 62, 1 << 63, 1 << 64, 10**30, -(10**30)])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), NAMES)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
DTYPES = st.sampled_from([*DTYPE_BITS, "F", "f32", "I4", ""])


@st.composite
def entries(draw: Any) -> Any:
    """An entry of a header, right in parts."""
    sizes = st.lists(NUMBERS, max_size=4)
    good = entry(draw(DTYPES), draw(sizes), [draw(NUMBERS), draw(NUMBERS)])
    return draw(st.sampled_from([good, good, good, {**good, "x": 1}, draw(JSON)]))


@st.composite
def sound_headers(draw: Any) -> tuple[dict[str, Any], int]:
    """A header that is right, and the length of its data."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(NAMES.filter(lambda name: "\ud800" not in name), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=3)), 8]
        size = DTYPE_BITS[dtype]
        for side in shape[:-1]:
            size *= side
        if name != "__metadata__":
            header[name] = entry(dtype, shape, [position, position + size])
            position += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3))
    order = draw(st.permutations(list(header)))
    return {name: header[name] for name in order}, position


@st.composite
def mutated(draw: Any, document: Any, times: int = 2) -> Any:
    """A document with up to ``times`` values replaced, removed or copied to another place."""
    for _ in range(draw(st.integers(0, times))):
        paths = list(walk(document))
        path = draw(st.sampled_from(paths))
        what = draw(st.sampled_from(["replace", "replace", "number", "copy", "remove"]))
        value = at(document, path)
        if what == "number":
            document = replaced(document, path, draw(NUMBERS))
        elif what == "copy":
            document = replaced(document, path, at(document, draw(st.sampled_from(paths))))
        elif what == "remove" and path:
            parent = at(document, path[:-1])
            rest = (
                {key: each for key, each in parent.items() if key != path[-1]}
                if isinstance(parent, dict)
                else parent[: path[-1]] + parent[path[-1] + 1 :]
            )
            document = replaced(document, path[:-1], rest)
        elif what == "replace":
            document = replaced(document, path, draw(JSON))
        else:
            document = replaced(document, path, value)
    return document


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes with a few of them changed, removed or added."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(found)))
        what = draw(st.sampled_from(["change", "remove", "insert", "cut", "repeat"]))
        if what == "change" and place < len(found):
            found[place] = draw(st.integers(0, 255))
        elif what == "remove":
            del found[place : place + draw(st.integers(1, 8))]
        elif what == "insert":
            found[place:place] = draw(
                st.sampled_from([b"0", b"-", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b" "])
            )
        elif what == "cut":
            del found[place:]
        else:
            found[place:place] = found[place : place + draw(st.integers(1, 40))]
    return bytes(found)


@st.composite
def safetensors_files(draw: Any) -> bytes:
    """A safetensors file with something wrong, or nothing."""
    header, size = draw(sound_headers())
    if draw(st.booleans()):
        header = draw(mutated(header))
    if draw(st.integers(0, 3)) == 0 and isinstance(header, dict):
        header = {**header, draw(NAMES): draw(entries())}
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text = text + b" " * draw(st.integers(0, 9))
    if draw(st.booleans()):
        text = draw(damaged(text))
    length = draw(st.sampled_from([len(text)] * 6 + [0, len(text) - 1, len(text) + 1, 1 << 40, (1 << 64) - 1]))
    content = raw_file(text, bytes(max(0, size + draw(st.sampled_from([0] * 6 + [-1, 1])))), max(length, 0))
    return content[: draw(st.sampled_from([len(content)] * 6 + [0, 7, 8, 9, len(content) - 1]))]


def clean(error: Awq2MarlinError) -> None:
    """Asserts that an error can be shown to somebody."""
    assert error.problems
    for line in str(error).splitlines():
        assert line.isprintable()
        assert len(line) < 2500


def refused(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Returns whether a call refused, else its result; anything but a `CheckpointError` passes through."""
    try:
        return False, call()
    except CheckpointError as error:
        clean(error)
        return True, None


def check_header(content: bytes) -> None:
    """Reads a file as a safetensors file; the official library must see the same in what is taken."""
    is_refused, header = refused(lambda: read_header(io.BytesIO(content), len(content), "f"))
    if is_refused:
        return
    expected = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in deserialize(content)}
    data = content[header.data_start :]
    assert expected == {
        name: (each.dtype, list(each.shape), data[each.start : each.end]) for name, each in header.tensors.items()
    }
    assert header.prefix + data == content
    assert header.file_size == len(content)
    again = encode_header(header, {name: [tensor] for name, tensor in header.tensors.items()})
    assert read_header(io.BytesIO(again.prefix + data), again.file_size, "f").tensors == header.tensors


def check_header_text(text: bytes, data_size: int) -> None:
    """Parses the JSON of a header alone."""
    refused(lambda: parse_header(text, data_size, "f"))


@functools.cache
def _sound() -> tuple[Path, Path]:
    """Returns a small AWQ checkpoint and its conversion, to copy; made once, removed at the end."""
    import atexit

    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_awq(root / "awq", shards=2)
    convert(root / "awq", root / "marlin", workers=1)
    return root / "awq", root / "marlin"


def sound_document(which: str, name: str) -> Any:
    """Returns a JSON document of the AWQ or the converted checkpoint."""
    awq, marlin = _sound()
    return json.loads(((awq if which == "awq" else marlin) / name).read_text("utf-8"))


class _Changed:
    """One of the checkpoints with one file replaced, for as long as the context lasts."""

    def __init__(self, which: str, name: str, content: bytes) -> None:
        self.folder = _sound()[which == "marlin"]
        self.path = self.folder / name
        self.content = content

    def __enter__(self) -> Path:
        self.before = self.path.read_bytes() if self.path.exists() else None
        self.path.write_bytes(self.content)
        return self.folder

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            self.path.unlink()
        else:
            self.path.write_bytes(self.before)


def check_index(content: bytes) -> None:
    """Opens a checkpoint with this index."""
    with _Changed("awq", INDEX, content) as folder:
        is_refused, checkpoint = refused(lambda: open_checkpoint(folder))
        if not is_refused:
            assert {path.parent for path in map(checkpoint.folder.path, checkpoint.shards)} == {folder}


def check_config(content: bytes, name: str = "config.json") -> None:
    """Plans a conversion of a checkpoint with this config, which must then be one of those that exist."""
    with _Changed("awq", name, content) as folder:
        is_refused, found = refused(lambda: read_quantization(Folder.at(folder), read_config(Folder.at(folder))))
        if not is_refused:
            assert found[1].bits in (4, 8)
            assert found[1].group_size in (-1, 32, 64, 128)
        is_refused, plan = refused(lambda: plan_conversion(open_checkpoint(folder)))
        if not is_refused:
            json.dumps(plan.config(), indent=2)
            assert plan.digest


def check_manifest(content: bytes) -> None:
    """Inspects a converted checkpoint with this manifest, and reads it."""
    with _Changed("marlin", MANIFEST, content) as folder:
        refused(lambda: inspect(folder))
        is_refused, manifest = refused(lambda: read_manifest(Folder.at(folder)))
        if not is_refused:
            for name in manifest.names():
                assert (folder / name).resolve().is_relative_to(folder.resolve())
            for text in manifest.texts.values():
                text.encode("utf-8")
            json.loads(manifest.encode())


def check_marlin_config(content: bytes) -> None:
    """Inspects a converted checkpoint with this config."""
    with _Changed("marlin", "config.json", content) as folder:
        refused(lambda: inspect(folder))


def check_tensors(tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Plans a conversion of a single file of these tensors."""
    content = pack_tensors({name: zeros(dtype, *shape) for name, (dtype, shape) in tensors.items()})
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / SHARD).write_bytes(content)
        quantization = {"quant_method": "awq", "bits": 4, "group_size": 32}
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        for unaligned in ("keep", "pad", "error"):
            is_refused, plan = refused(lambda unaligned=unaligned: plan_conversion(open_checkpoint(folder), unaligned))
            if not is_refused:
                for shard in plan.shards:
                    parse_header(shard.target.text, shard.target.data_size, "target")


@st.composite
def documents(draw: Any, which: str, name: str) -> bytes:
    """A JSON file of a checkpoint with something wrong."""
    document = draw(mutated(sound_document(which, name)))
    content = json.dumps(document).encode()
    return draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def manifests(draw: Any) -> bytes:
    """A manifest with something wrong, in itself or in the headers that it holds."""
    document = sound_document("marlin", MANIFEST)
    if draw(st.booleans()):
        shard = document["shards"][draw(st.sampled_from(sorted(document["shards"])))]
        header = draw(mutated(json.loads(unpack_header(shard["source_header"]))))
        text = json.dumps(header).encode()
        text = draw(damaged(text)) if draw(st.booleans()) else text
        shard["source"]["size"] += len(text) - len(unpack_header(shard["source_header"]))
        shard["source_header"] = pack_header(text)
    return json.dumps(draw(mutated(document))).encode()


TENSORS = st.dictionaries(
    st.builds(
        "{}.{}".format,
        st.sampled_from(["m", "m.q_proj", "m.k_proj", "x.experts.0.w1", "x.experts.1.w2", "lm_head", ""]),
        st.sampled_from(["qweight", "qzeros", "scales", "bias", "weight", "g_idx"]),
    ),
    st.one_of(
        st.sampled_from([("I32", [64, 16]), ("I32", [2, 16]), ("F16", [2, 128]), ("I32", [128, 8]), ("BF16", [4, 64])]),
        st.tuples(
            st.sampled_from(["I32", "F16", "F32", "F4"]), st.lists(st.sampled_from([0, 1, 2, 8, 64]), max_size=3)
        ),
    ).filter(lambda tensor: tensor[0] != "F4" or 0 in tensor[1] or any(side % 2 == 0 for side in tensor[1])),
    max_size=7,
)

#: name: (what to draw, what must hold for it)
TARGETS: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Callable[[Any], None]]] = {
    "header": (safetensors_files, check_header),
    "header-bytes": (lambda: st.binary(max_size=64).map(lambda text: raw_file(b"{" + text)), check_header),
    "header-json": (
        lambda: st.tuples(st.dictionaries(NAMES, entries() | JSON, max_size=4), st.integers(0, 40)),
        lambda drawn: check_header_text(json.dumps(drawn[0]).encode(), drawn[1]),
    ),
    "index": (lambda: documents("awq", INDEX), check_index),
    "config": (lambda: documents("awq", "config.json"), check_config),
    "legacy-config": (
        lambda: mutated({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}).map(
            lambda document: json.dumps(document).encode()
        ),
        lambda content: check_config(content, "quant_config.json"),
    ),
    "manifest": (manifests, check_manifest),
    "marlin-config": (lambda: documents("marlin", "config.json"), check_marlin_config),
    "tensors": (lambda: TENSORS, check_tensors),
}
