"""Converted checkpoints from a stranger: the manifest and the config are lies until they agree with the files."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, DifferenceError, convert, inspect, revert, verify
from awq2marlin.checkpoint.manifest import read_manifest
from awq2marlin.io.folder import Folder
from tests.hostile.hostile_files import (
    INDEX,
    MANIFEST,
    MODULE,
    NASTY,
    SHARD,
    at,
    edit_json,
    entry,
    pack_header,
    pack_tensors,
    replaced,
    tree,
    unpack_header,
    unpack_tensors,
    walk,
    zeros,
)

QWEIGHT = f"{MODULE}.qweight"
KEPT = "model.layers.0.self_attn.o_proj"


def document_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def set_manifest(folder: Path, document: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(document), "utf-8")


@pytest.fixture
def refused(marlin, tmp_path, run):
    """Asserts that revert, inspect and convert --overwrite refuse the checkpoint, and that nothing is written."""

    def check(code: str, *parts: str, file: str = MANIFEST, commands: str = "revert inspect", **place: str) -> None:
        before = tree(tmp_path)
        for command in commands.split():
            arguments = [command, marlin, *([tmp_path / "back"] if command == "revert" else [])]
            run(*arguments).refused(code, *parts, file=file, **place)
        assert tree(tmp_path) == before

    return check


MALFORMED = {
    "empty": (b"", "bad-json"),
    "a list": (b"[]", "bad-manifest"),
    "null": (b"null", "bad-manifest"),
    "an empty object": (b"{}", "bad-manifest"),
    "cut": (b'{"format_version": 1', "bad-json"),
    "binary": (bytes(range(256)), "bad-json"),
    "deep": (b'{"shards":' * 100_000, "bad-json"),
    "deep enough to be parsed": (b'{"format_version":' + b"[" * 400 + b"]" * 400 + b"}", "bad-json"),
    "duplicate": (b'{"format_version": 1, "format_version": 1}', "duplicate-key"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_manifest_is_refused(marlin, refused, name: str) -> None:
    content, code = MALFORMED[name]
    (marlin / MANIFEST).write_bytes(content)
    refused(code)


def test_a_missing_or_huge_manifest_is_refused(marlin, refused) -> None:
    (marlin / MANIFEST).unlink()
    refused("no-manifest", "download the complete checkpoint")
    with (marlin / MANIFEST).open("wb") as stream:
        stream.truncate(256_000_001)
    refused("too-large", "it has 256000001 bytes, more than the 256000000 that are read; download it again")


@pytest.mark.parametrize("version", [0, 3, -1, 10**30])
def test_an_unknown_version_is_refused_with_advice(marlin, refused, version: int) -> None:
    set_manifest(marlin, {**document_of(marlin), "format_version": version})
    refused("bad-manifest", "format_version is not 1 or 2; install a newer awq2marlin")


UNSAFE = [
    "../x",
    "/etc/x",
    "a/../../x",
    "a\\..\\x",
    "C:/x",
    "x:y",
    "",
    ".",
    "..",
    "a//b",
    ".ssh/x",
    "\x1b[31m",
    "\ud800",
    NASTY,
]


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
@pytest.mark.parametrize("key", ["shards", "files", "texts"])
def test_only_plain_relative_names_are_taken(marlin, refused, key: str, name: str) -> None:
    document = document_of(marlin)
    document[key][name] = next(iter(document[key].values()))
    set_manifest(marlin, document)
    refused("unsafe-name", "only plain relative paths inside the folder")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("files", SHARD),
        ("files", "config.json"),
        ("files", "Config.JSON"),
        ("files", MANIFEST),
        ("files", "Marlin_Manifest.json"),
        ("files", "readme.MD"),
        ("shards", "README.md"),
        ("shards", "MODEL.safetensors"),
        ("files", "README.md/x"),
        ("files", "readme.md/a/b"),
        ("shards", "config.json/model.safetensors"),
    ],
)
def test_no_file_is_named_twice_or_inside_another(marlin, refused, key: str, name: str) -> None:
    document = document_of(marlin)
    document[key][name] = next(iter(document[key].values()))
    set_manifest(marlin, document)
    refused("bad-manifest", "twice, or both as a file and as a folder")


@pytest.mark.parametrize(
    "name",
    ["evil/x.sh", "modeling_x.py", "README.md", "CONFIG.json", SHARD.upper(), "model.safetensors/x", f"{MANIFEST}/x"],
)
def test_no_text_is_restored_but_of_configs_and_index(marlin, refused, name: str) -> None:
    document = document_of(marlin)
    for key in ("texts", "text_digests"):
        document[key][name] = document[key]["config.json"]
    set_manifest(marlin, document)
    refused("bad-manifest", f"texts holds '{name}'; only config.json, quant_config.json")


# --- Every value, replaced by every other kind ------------------------------------------------------------------------

WRONG: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", NASTY, [], [None], {}, {"x": None}]


def _may_stay(path: tuple[Any, ...], value: Any, document: dict[str, Any]) -> bool:
    """Returns whether a replaced value is another sound one: a name, a reason, or one that nobody reads."""
    before = at(document, path)
    if path[:1] == ("tool",):
        return True
    if path == ("source_card",) and value is None:
        return True  # a source without a card
    if path == ("source", "repo_id") or path == ("source", "revision"):
        return value is None or isinstance(value, str)
    if path[:1] == ("texts",) and len(path) == 2:
        return isinstance(value, str) and value != NASTY  # the text itself, which has no digest
    if path[:1] == ("left_behind",) and len(path) == 2:
        return isinstance(value, str)  # a reason, which is only shown
    if path in (("left_behind",), ("made",)) or (path == ("source",) and isinstance(value, dict)):
        return value == {}
    return type(value) is type(before) and value == before


def refusal_of(folder: Path) -> CheckpointError | None:
    try:
        read_manifest(Folder.at(folder))
    except CheckpointError as error:
        return error
    return None


def test_every_value_of_the_manifest_is_checked(marlin, tmp_path) -> None:
    """Each is replaced by each wrong kind, and refused."""
    sound = document_of(marlin)
    sound["left_behind"] = {"stray.bin": "pickled weights"}
    sound["made"] = {INDEX: {"size": 1, "digests": ["xxh3_128:" + "0" * 32]}}
    missed = []
    for path in walk(sound):
        for value in WRONG:
            if _may_stay(path, value, sound) or (path == ("source",) and value == {"x": None}):
                continue
            set_manifest(marlin, replaced(sound, path, value))
            error = refusal_of(marlin)
            if error is None:
                missed.append((path, value))
                continue
            assert len(error.problems) == 1
            assert MANIFEST in error.problems[0].file
            assert str(error).isprintable()
            assert len(str(error)) < 1500
    assert missed == [(("files",), {})]
    assert not (tmp_path / "back").exists()


def test_every_key_of_the_manifest_is_needed(marlin) -> None:
    sound = document_of(marlin)
    for path in walk(sound):
        if not path or path[0] in ("tool", "left_behind", "files") or (path[0] == "source" and len(path) == 2):
            continue
        if isinstance(path[-1], int) or (path[0] == "texts" and len(path) == 2 and path[1] != "config.json"):
            continue
        document = copy.deepcopy(sound)
        del at(document, path[:-1])[path[-1]]
        set_manifest(marlin, document)
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(Folder.at(marlin))


def test_every_value_of_the_config_is_checked(sound_awq, marlin, tmp_path, run) -> None:
    """Each value of quantization_config is replaced by each wrong kind."""
    config = json.loads((marlin / "config.json").read_text("utf-8"))
    before = tree(tmp_path)
    for path in walk(config["quantization_config"]):
        if path[:1] == ("modules_to_not_convert",):
            continue  # informative only: `verify` compares it, `revert` has the source's own text
        for value in WRONG:
            if type(at(config["quantization_config"], path)) is type(value) and value in (True,):
                continue
            changed = replaced(config, ("quantization_config", *path), value)
            (marlin / "config.json").write_text(json.dumps(changed), "utf-8")
            for call in (
                lambda: revert(marlin, tmp_path / "back", workers=1),
                lambda: verify(sound_awq, marlin, workers=1),
                lambda: inspect(marlin),
            ):
                with pytest.raises((CheckpointError, DifferenceError)) as caught:
                    call()
                assert caught.value.problems[0].file, (path, value)
                assert all(char.isprintable() or char == "\n" for char in str(caught.value))
    (marlin / "config.json").write_text(json.dumps(config), "utf-8")
    before[f"{marlin.name}/config.json"] = json.dumps(config).encode()
    assert tree(tmp_path) == before
    assert run("revert", marlin, tmp_path / "back").code == 0


# --- Headers ----------------------------------------------------------------------------------------------------------


def _bomb(size: int) -> str:
    return base64.b64encode(zlib.compress(b"{" + b" " * size, 9)).decode()


def _set_header(document: dict[str, Any], packed: object) -> None:
    document["shards"][SHARD]["source_header"] = packed


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda packed: packed[:-8], "cut"),
        (lambda packed: packed[: len(packed) // 8 * 4], "cut"),
        (lambda packed: base64.b64encode(base64.b64decode(packed) + b"x").decode(), "cut"),
        (lambda packed: packed + "\n", "not zlib in base64"),
        (lambda packed: " " + packed, "not zlib in base64"),
        (lambda packed: "é" + packed, "not zlib in base64"),
        (lambda _: "", "cut"),
        (lambda _: "====", "not zlib in base64"),
        (lambda _: base64.b64encode(b"{}").decode(), "not zlib in base64"),
        (lambda _: _bomb(100_000_001), "inflates beyond 100000000 bytes"),
    ],
)
def test_a_header_that_is_cut_or_trailing_or_too_long_is_refused(marlin, refused, change: Any, part: str) -> None:
    document = document_of(marlin)
    _set_header(document, change(document["shards"][SHARD]["source_header"]))
    set_manifest(marlin, document)
    refused("bad-manifest", repr(SHARD), part)


def test_bombs_inflate_to_the_limit_all_together(marlin) -> None:
    """Ten headers of 60 MB each, from 600 kB: the fifth one is refused, whatever it would become."""
    document = document_of(marlin)
    shard = document["shards"].pop(SHARD)
    text = b'{"__metadata__":{}}' + b" " * 60_000_000
    packed = pack_header(text)
    for number in range(10):
        name = f"model-{number}.safetensors"
        document["shards"][name] = {
            **shard,
            "source_header": packed,
            "source": {**shard["source"], "size": 8 + len(text)},
        }
    set_manifest(marlin, document)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"'model-4\.safetensors' inflates beyond 15999924 bytes"):
            read_manifest(Folder.at(marlin))
        assert tracemalloc.get_traced_memory()[1] < 600_000_000
    finally:
        tracemalloc.stop()


def test_very_many_shards_are_read_in_linear_time(marlin) -> None:
    document = document_of(marlin)
    shard = {**document["shards"].pop(SHARD), "source_header": pack_header(b"{}")}
    shard["source"] = {**shard["source"], "size": 10}

    def calls(count: int) -> int:
        document["shards"] = {f"{number}.safetensors": shard for number in range(count)}
        set_manifest(marlin, document)
        seen, before = itertools.count(), sys.getprofile()
        sys.setprofile(lambda frame, event, argument: next(seen))  # noqa: ARG005
        try:
            assert len(read_manifest(Folder.at(marlin)).shards) == count
        finally:
            sys.setprofile(before)
        return next(seen)

    few, twice, thrice = calls(100), calls(200), calls(300)
    assert thrice - twice == pytest.approx(twice - few, rel=0.01)  # it was more when every shard summed all before it


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"[]", "bad-header"),
        (b'{"a":1}', "bad-header"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "trailing-data"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "bad-json"),
        (json.dumps({"a\x1b[31m": entry(shape=[1 << 61, 1 << 61])}).encode(), "shape-overflow"),
    ],
)
def test_a_header_in_the_manifest_is_checked_as_a_files(marlin, refused, header: bytes, code: str) -> None:
    document = document_of(marlin)
    _set_header(document, pack_header(header))
    set_manifest(marlin, document)
    refused(code, file=f"{MANIFEST} (header of {SHARD})")


def _edit_header(folder: Path, change: Any) -> None:
    document = document_of(folder)
    header = json.loads(unpack_header(document["shards"][SHARD]["source_header"]))
    header = change(header) or header
    text = json.dumps(header).encode()
    _set_header(document, pack_header(text))
    data = max(each["data_offsets"][1] for each in header.values() if "data_offsets" in each)
    document["shards"][SHARD]["source"]["size"] = 8 + len(text) + data
    set_manifest(folder, document)


def _rename(old: str, new: str) -> Any:
    return lambda header: {new if name == old else name: each for name, each in header.items()}


def _reshape(name: str, dtype: str, *shape: int) -> Any:
    return lambda header: header[name].update(dtype=dtype, shape=list(shape))


@pytest.mark.parametrize(
    ("change", "code", "tensor"),
    [
        (_rename("model.norm.weight", "model.norm.bias"), "missing-tensor", "model.norm.bias"),
        (_rename("model.norm.weight", "a\x1b[31m"), "missing-tensor", "a\x1b[31m"),
        (_reshape("model.norm.weight", "F16", 4, 4), "wrong-shape", "model.norm.weight"),
        (_reshape("model.norm.weight", "BF16", 16), "wrong-shape", "model.norm.weight"),
        (_reshape("model.norm.weight", "I32", 8), "wrong-shape", "model.norm.weight"),
        (_reshape(QWEIGHT, "I32", 64, 16), "foreign-format", f"{MODULE}.qweight"),
        (_reshape(QWEIGHT, "I32", 32, 32), "contradiction", f"{MODULE}.scales"),
        (_reshape(QWEIGHT, "U32", 128, 8), "wrong-dtype", QWEIGHT),
        (_reshape(f"{KEPT}.qweight", "F32", 64, 6), "wrong-dtype", f"{KEPT}.qweight"),
    ],
)
def test_source_headers_that_disagree_with_the_files_are_refused(marlin, refused, change, code, tensor) -> None:
    _edit_header(marlin, change)
    refused(code, file=SHARD, tensor=tensor)


def test_tensors_in_another_order_are_refused(marlin, refused) -> None:
    def swap(header: dict[str, Any]) -> None:
        first, second = f"{MODULE}.qzeros", f"{KEPT}.qzeros"
        header[first]["data_offsets"], header[second]["data_offsets"] = [0, 0], [0, 0]
        position = 0
        order = [name for name in header if name != "__metadata__"]
        for name in reversed(order):
            size = {"I32": 4, "F16": 2}[header[name]["dtype"]]
            for side in header[name]["shape"]:
                size *= side
            header[name]["data_offsets"] = [position, position + size]
            position += size

    _edit_header(marlin, swap)
    refused("moved-tensor", "a different order", file=SHARD)


def test_shards_that_are_not_there_or_not_named_are_refused(marlin, refused) -> None:
    document = document_of(marlin)
    document["shards"]["other.safetensors"] = document["shards"].pop(SHARD)
    set_manifest(marlin, document)
    refused("moved-tensor", "other.safetensors", file=SHARD)
    empty = {**document["shards"]["other.safetensors"], "source_header": pack_header(b"{}")}
    document["shards"] = {SHARD: document["shards"]["other.safetensors"], "empty.safetensors": empty}
    empty["source"] = {**empty["source"], "size": 10}
    set_manifest(marlin, document)
    refused("missing-file", file="empty.safetensors")


def test_a_file_that_the_manifest_names_must_be_there(marlin, refused) -> None:
    document = document_of(marlin)
    document["files"]["gone.txt"] = document["files"]["generation_config.json"]
    set_manifest(marlin, document)
    refused("missing-file", "the manifest lists this file", "download it", file="gone.txt", commands="revert")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{", "bad-json", "not valid JSON"),
        ("[" * 5000 + "]" * 5000, "bad-json", "nested too deeply"),
        ('{"a": 1, "a": 2}', "duplicate-key", "'a'"),
        ("[]", "bad-manifest", "has no quantization config"),
        ("{}", "bad-manifest", "has no quantization config"),
        ('{"quantization_config": 3}', "bad-config", "quantization_config must be a JSON object, found a number"),
        ('{"quantization_config": {"quant_method": "fp8"}}', "foreign-format", "FP8"),
        ('{"quantization_config": {"quant_method": "marlin_native"}}', "bad-manifest", "it belongs to another"),
    ],
)
def test_the_source_s_config_in_the_manifest_must_name_a_format_that_is_read(marlin, tmp_path, text, code, said):
    document = document_of(marlin)
    document["texts"]["config.json"] = text
    set_manifest(marlin, document)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        revert(marlin, tmp_path / "back")
    assert caught.value.problems[0].code == code
    assert caught.value.problems[0].file.startswith(MANIFEST)
    assert tree(tmp_path) == before


def test_a_text_with_half_a_character_is_refused(marlin, refused) -> None:
    document = document_of(marlin)
    document["texts"]["config.json"] += "\ud800"
    set_manifest(marlin, document)
    refused("bad-manifest", "'config.json'")


# --- Digests and sizes: differences, exit code 3 ----------------------------------------------------------------------


def _no_config(folder: Path) -> bool:
    return not (folder / "config.json").exists()


@pytest.mark.parametrize(
    ("path", "file"),
    [
        (("shards", SHARD, "output", "digests", 0), SHARD),
        (("shards", SHARD, "source", "digests", 0), SHARD),
        (("files", "generation_config.json", "digests", 0), "generation_config.json"),
    ],
)
def test_a_wrong_digest_is_a_difference(marlin, tmp_path, run, path: tuple[Any, ...], file: str) -> None:
    set_manifest(marlin, replaced(document_of(marlin), path, "xxh3_128:" + "0" * 32))
    run("revert", marlin, tmp_path / "back").differs("wrong-digest", "xxh3_128:000", "recorded", file=file)
    assert _no_config(tmp_path / "back")


def test_a_wrong_sha256_is_a_difference(marlin, tmp_path, run) -> None:
    document = document_of(marlin)
    document["shards"][SHARD]["source"]["digests"].append("sha256:" + "0" * 64)
    set_manifest(marlin, document)
    run("revert", marlin, tmp_path / "back").differs(
        "wrong-digest", "the restored file differs from the original", "sha256:000", file=SHARD
    )
    assert _no_config(tmp_path / "back")


@pytest.mark.parametrize(
    ("path", "file"),
    [
        (("shards", SHARD, "output", "size"), SHARD),
        (("files", "generation_config.json", "size"), "generation_config.json"),
    ],
)
@pytest.mark.parametrize("size", [0, 1, (1 << 62) - 1])
def test_a_wrong_size_is_a_difference(marlin, tmp_path, run, path: tuple[Any, ...], file: str, size: int) -> None:
    set_manifest(marlin, replaced(document_of(marlin), path, size))
    run("revert", marlin, tmp_path / "back").differs("wrong-digest", f"recorded {size} bytes", file=file)
    assert _no_config(tmp_path / "back")


@pytest.mark.parametrize("size", [0, 7, 100, (1 << 62) - 1])
def test_a_wrong_size_of_the_source_contradicts_its_header(marlin, refused, size: int) -> None:
    set_manifest(marlin, replaced(document_of(marlin), ("shards", SHARD, "source", "size"), size))
    place = f"{MANIFEST} (header of {SHARD})"
    refused("truncated" if size < 1000 else "trailing-data", "the header describes", file=place)


@pytest.mark.parametrize(
    "digest", ["", "xxh3_128:", "md5:0", "xxh3_128:" + "0" * 31, "xxh3_128:" + "G" * 32, "sha256:" + "0" * 64]
)
def test_a_malformed_digest_is_refused(marlin, refused, digest: str) -> None:
    for path in (("shards", SHARD, "source", "digests", 0), ("files", "generation_config.json", "digests", 0)):
        set_manifest(marlin, replaced(document_of(marlin), path, digest))
        refused("bad-manifest", "digests must begin with one 'xxh3_128:...'")
        set_manifest(marlin, replaced(document_of(marlin), path, "xxh3_128:" + "0" * 32))


def test_changed_data_is_a_difference(sound_awq, marlin, tmp_path, run) -> None:
    content = bytearray((marlin / SHARD).read_bytes())
    content[-1] ^= 1
    (marlin / SHARD).write_bytes(content)
    run("revert", marlin, tmp_path / "back").differs("wrong-digest", "changed or damaged afterwards", file=SHARD)
    assert _no_config(tmp_path / "back")
    run("verify", sound_awq, marlin).differs("different-bytes", file=SHARD)


# --- The config's lists -----------------------------------------------------------------------------------------------


def _quantization(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(changes))


@pytest.mark.parametrize("key", ["awq_modules", "unquantized_modules"])
def test_unknown_modules_in_the_lists_are_refused(sound_awq, marlin, refused, run, key: str) -> None:
    listed = json.loads((marlin / "config.json").read_text("utf-8"))["quantization_config"][key]
    _quantization(marlin, **{key: [*listed, "model.gone\x1b[31m"]})
    refused("unknown-module", f"{key} lists", file="config.json", tensor="model.gone\x1b[31m")
    run("verify", sound_awq, marlin).differs("unknown-module", file="config.json")
    _quantization(marlin, **{key: [*listed, *listed]})
    refused("bad-config", f"{key} names a module twice", file="config.json")


def test_a_list_that_leaves_a_module_out_is_refused(marlin, refused) -> None:
    _quantization(marlin, unquantized_modules=[])
    refused("contradiction", "unquantized_modules", file="config.json", tensor="model.embed_tokens")
    _quantization(marlin, unquantized_modules=["model.embed_tokens"], awq_modules=[])
    refused("unaligned", "cannot be Marlin", file=SHARD, tensor=KEPT)


def test_a_converted_module_called_kept_is_refused(marlin, refused) -> None:
    _quantization(marlin, awq_modules=[MODULE, KEPT])
    refused("wrong-shape", "expected I32 [128, 8], found I32 [8, 128]", file=SHARD, tensor=QWEIGHT)


@pytest.mark.parametrize(
    ("padded_modules", "code", "part"),
    [
        ({"model.gone": [64, 64]}, "unknown-module", "padded_modules lists model.gone"),
        ({MODULE: [128, 65]}, "contradiction", "padded_modules says [128, 65], the source has [128, 64]"),
        ({MODULE: [64, 128]}, "contradiction", "padded_modules says"),
        ({KEPT: [64, 48]}, "contradiction", "both awq_modules and padded_modules"),
        ({MODULE: [128]}, "bad-config", "must map module names to [K, N]"),
        ({MODULE: [128, 64, 1]}, "bad-config", "must map"),
        ({MODULE: [0, 64]}, "bad-config", "must map"),
        ({MODULE: [-128, 64]}, "bad-config", "must map"),
        ({MODULE: [True, 64]}, "bad-config", "must map"),
        ({MODULE: "x"}, "bad-config", "must map"),
        ([], "bad-config", "must map"),
        (None, "bad-config", "must map"),
    ],
)
def test_false_padded_modules_are_refused(marlin, refused, padded_modules: Any, code: str, part: str) -> None:
    _quantization(marlin, padded_modules=padded_modules)
    refused(code, part, file="config.json")


@pytest.mark.parametrize(("size_k", "size_n"), [(128, 128), (256, 64), (64, 1 << 21), (128, 1 << 20), (1024, 1024)])
def test_a_module_is_padded_as_little_as_can_be(padded, tmp_path, run, size_k: int, size_n: int) -> None:
    """The source is 64 x 48; more padding than 128 x 64 or 64 x 128 only fills memory and disk."""
    tensors = unpack_tensors(padded / SHARD)
    groups = size_k // 64
    tensors[f"{KEPT}.qweight"] = zeros("I32", size_k // 16, size_n * 2)
    tensors[f"{KEPT}.qzeros"] = zeros("I32", groups, size_n // 8)
    tensors[f"{KEPT}.scales"] = zeros("F16", groups, size_n)
    (padded / SHARD).write_bytes(pack_tensors(tensors))
    run("revert", padded, tmp_path / "back").refused(
        "unaligned", f"K={size_k}, N={size_n} is not how a source of K=64, N=48 is padded", file=SHARD, tensor=KEPT
    )
    assert not (tmp_path / "back").exists()


def test_a_padded_module_that_is_called_unpadded_is_refused(padded, tmp_path, run) -> None:
    edit_json(padded / "config.json", lambda config: config["quantization_config"].pop("padded_modules") and None)
    run("revert", padded, tmp_path / "back").refused("unaligned", file=SHARD, tensor=KEPT)


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_an_unknown_version_of_the_config_is_refused(marlin, refused, version: object) -> None:
    _quantization(marlin, format_version=version)
    refused("unsupported-format", f"format_version is {version!r}", "Install a newer", file="config.json")


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "other.json", 1, None])
def test_the_manifest_has_one_name(marlin, refused, name: object) -> None:
    _quantization(marlin, manifest=name)
    refused("bad-config", "manifest must be", file="config.json")


@pytest.mark.parametrize("changed", [True, 1.0])
def test_true_and_one_are_different(awq, tmp_path, run, changed: object) -> None:
    edit_json(awq / "config.json", lambda config: config.update(pretraining_tp=1))
    convert(awq, tmp_path / "out", workers=1)
    edit_json(tmp_path / "out/config.json", lambda config: config.update(pretraining_tp=changed))
    run("verify", awq, tmp_path / "out").differs("config", file="config.json")


# --- Overwriting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../victim", "a/../../victim", "/victim", ".hidden"])
def test_overwriting_a_hostile_manifest_removes_nothing(awq, marlin, tmp_path, run, name: str) -> None:
    (tmp_path / "victim").write_text("mine")
    document = document_of(marlin)
    document["files"][str(tmp_path / "victim") if name == "/victim" else name] = document["files"][
        "generation_config.json"
    ]
    set_manifest(marlin, document)
    before = tree(tmp_path)
    run("convert", awq, marlin, "--overwrite").refused("unsafe-name", file=MANIFEST)
    assert tree(tmp_path) == before


def test_overwriting_removes_only_what_the_manifest_names(awq, marlin, run) -> None:
    (marlin / "notes.txt").write_text("mine")
    (marlin / "sub").mkdir()
    (marlin / "sub/notes.txt").write_text("mine too")
    before = tree(marlin)
    assert run("convert", awq, marlin, "--overwrite").code == 0
    assert tree(marlin) == before


# --- What is shown ----------------------------------------------------------------------------------------------------


def test_nothing_in_a_manifest_reaches_the_terminal_raw(marlin, tmp_path, run, say) -> None:
    document = document_of(marlin)
    document["left_behind"] = {NASTY: NASTY, "a": "b" * 100_000}
    document["source"] = {"repo_id": NASTY, "revision": NASTY}
    set_manifest(marlin, document)
    code, text = say("revert", marlin, tmp_path / "back")
    assert code == 0
    assert r"x1b[31m" in text
    assert len(text) < 5000
    assert run("revert", marlin, tmp_path / "again").report["left_behind"][NASTY] == NASTY
    assert say("inspect", marlin)[0] == 0
