"""Safetensors headers: what the format forbids is refused, by name; the official library is the judge."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import string
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from awq2marlin.errors import CheckpointError
from awq2marlin.io.safetensors import DTYPE_BITS, Header, encode_header, read_header
from tests.hostile.conftest import Outcome
from tests.hostile.hostile_files import (
    INDEX,
    MANIFEST,
    MODULE,
    NASTY,
    SHARD,
    edit_json,
    entry,
    raw_file,
    split_file,
    write_awq,
)


def read(content: bytes) -> Header:
    return read_header(io.BytesIO(content), len(content), "f.safetensors")


def library_takes(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def refusal(content: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    problem = caught.value.problems[0]
    assert len(caught.value.problems) == 1
    assert problem.file == "f.safetensors"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    return caught.value


def one(**changes: object) -> bytes:
    return raw_file({"t": entry(**changes)}, b"1234")  # type: ignore[arg-type]


def two(first: object, second: object, data: bytes = b"12345678") -> bytes:
    return raw_file({"a": entry(offsets=first), "b": entry(offsets=second)}, data)


DEEP = b"[" * 100_000 + b"]" * 100_000

#: name: (file, code, part of the message, tensor)
REFUSED_BY_BOTH = {
    "empty file": (b"", "truncated", "0 bytes", ""),
    "seven bytes": (b"\2\0\0\0\0\0\0", "truncated", "7 bytes", ""),
    "eight bytes": (b"\2\0\0\0\0\0\0\0", "truncated", "past the end", ""),
    "length past the end": (raw_file({}, length=3), "truncated", "reads 3 bytes", ""),
    "length above the limit": (raw_file({}, length=100_000_001), "header-too-long", "100000001", ""),
    "length of all ones": (b"\xff" * 8 + b"{}", "header-too-long", "18446744073709551615", ""),
    "length zero": (raw_file(b""), "bad-header", "does not begin with '{'", ""),
    "no object": (raw_file([]), "bad-header", "does not begin with '{'", ""),
    "a pickle": (b"\x80\x04}q\x00." + bytes(100), "header-too-long", "not a safetensors file", ""),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "bad-json", "not UTF-8 (byte 2)", ""),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "bad-header", "does not begin with '{'", ""),
    "bytes after the JSON": (raw_file(b"{}\0\0"), "bad-json", "not valid JSON", ""),
    "cut JSON": (raw_file(b'{"t":{"dtype":'), "bad-json", "not valid JSON", ""),
    "raw control character": (raw_file(b'{"a\nb":1}'), "bad-json", "not valid JSON", ""),
    "NaN": (raw_file(b'{"t":NaN}'), "bad-json", "NaN", ""),
    "deep nesting": (raw_file(b'{"t":' + DEEP + b"}"), "bad-json", "nested too deeply", ""),
    "deep nesting in a field": (
        raw_file(b'{"t":{"dtype":' + DEEP[:500] + DEEP[-500:] + b',"shape":[4],"data_offsets":[0,4]}}', b"1234"),
        "bad-json",
        "nested too deeply",
        "",
    ),
    "moderate nesting in a field": (
        raw_file(b'{"t":{"dtype":"U8","shape":' + DEEP[:130] + DEEP[-130:] + b',"data_offsets":[0,4]}}', b"1234"),
        "bad-json",
        "nested too deeply",
        "",
    ),
    "duplicate metadata": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate-key", "__metadata__", ""),
    "duplicate field": (
        raw_file(b'{"t":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "duplicate-key",
        "'dtype'",
        "",
    ),
    "metadata a list": (raw_file({"__metadata__": ["format"]}), "bad-header", "strings to strings", ""),
    "metadata a string": (raw_file({"__metadata__": "pt"}), "bad-header", "strings to strings", ""),
    "metadata a number": (raw_file({"__metadata__": 0}), "bad-header", "strings to strings", ""),
    "metadata false": (raw_file({"__metadata__": False}), "bad-header", "strings to strings", ""),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "bad-header", "strings to strings", ""),
    "metadata of null": (raw_file({"__metadata__": {"a": None}}), "bad-header", "strings to strings", ""),
    "metadata nested": (raw_file({"__metadata__": {"a": {}}}), "bad-header", "strings to strings", ""),
    "surrogate in a name": (raw_file({"a\ud800": entry()}, b"1234"), "bad-header", r"\ud800", ""),
    "surrogate in the metadata": (raw_file({"__metadata__": {"a": "\udfff"}}), "bad-header", r"\udfff", ""),
    "entry a number": (raw_file({"t": 1}), "bad-header", "exactly the keys", "t"),
    "entry null": (raw_file({"t": None}), "bad-header", "exactly the keys", "t"),
    "entry empty": (raw_file({"t": {}}), "bad-header", "exactly the keys", "t"),
    "no shape": (raw_file({"t": {"dtype": "U8", "data_offsets": [0, 0]}}), "bad-header", "exactly the keys", "t"),
    "unknown dtype": (one(dtype="I4"), "unknown-dtype", "'I4'", "t"),
    "dtype in small letters": (one(dtype="u8"), "unknown-dtype", "'u8'", "t"),
    "dtype a number": (one(dtype=8), "unknown-dtype", "'8'", "t"),
    "dtype null": (one(dtype=None), "unknown-dtype", "'None'", "t"),
    "dtype with escapes": (one(dtype=NASTY.replace("\ud800", "")), "unknown-dtype", r"x1b[31m", "t"),
    "shape null": (one(shape=None), "bad-header", "its shape must be", "t"),
    "shape a number": (one(shape=4), "bad-header", "its shape must be", "t"),
    "shape of strings": (one(shape=["4"]), "bad-header", "its shape must be", "t"),
    "shape of lists": (one(shape=[[4]]), "bad-header", "its shape must be", "t"),
    "shape of booleans": (one(shape=[4, True]), "bad-header", "its shape must be", "t"),
    "shape of floats": (one(shape=[4.0]), "bad-header", "its shape must be", "t"),
    "shape negative": (one(shape=[-2, -2]), "bad-header", "its shape must be", "t"),
    "shape minus zero": (
        raw_file(b'{"t":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "bad-json",
        "-0",
        "",
    ),
    "shape of huge numbers": (one(shape=[1 << 64, 4]), "bad-header", "its shape must be", "t"),
    "shape of 4000 digits": (one(shape=[10**4000]), "bad-header", "its shape must be", "t"),
    "shape of 5000 digits": (
        raw_file(b'{"t":{"dtype":"U8","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,4]}}', b"1234"),
        "bad-json",
        "not valid JSON",
        "",
    ),
    "shape overflows": (one(shape=[1 << 32, 1 << 32]), "shape-overflow", "more elements", "t"),
    "shape overflows to the right size": (one(shape=[(1 << 32) + 1, 1 << 32, 4]), "shape-overflow", "elements", "t"),
    "shape overflows before its zero": (
        one(shape=[1 << 61, 1 << 61, 0], offsets=[0, 0]),
        "shape-overflow",
        "more elements",
        "t",
    ),
    "size smaller than shape": (one(shape=[5]), "size-mismatch", "needs 5 bytes, its data_offsets [0, 4] hold 4", "t"),
    "size larger than shape": (one(dtype="F16", shape=[1]), "size-mismatch", "needs 2 bytes", "t"),
    "half a byte": (one(dtype="F4", shape=[7]), "size-mismatch", "F4", "t"),
    "offsets null": (one(offsets=None), "bad-header", "data_offsets must be two", "t"),
    "one offset": (one(offsets=[4]), "bad-header", "data_offsets must be two", "t"),
    "three offsets": (one(offsets=[0, 4, 4]), "bad-header", "data_offsets must be two", "t"),
    "offsets negative": (one(offsets=[-4, 0]), "bad-header", "data_offsets must be two", "t"),
    "offsets boolean": (one(shape=[1], offsets=[False, True]), "bad-header", "data_offsets must be two", "t"),
    "offsets float": (one(offsets=[0.0, 4.0]), "bad-header", "data_offsets must be two", "t"),
    "offsets strings": (one(offsets=["0", "4"]), "bad-header", "data_offsets must be two", "t"),
    "offsets huge": (one(offsets=[1 << 64, (1 << 64) + 4]), "bad-header", "data_offsets must be two", "t"),
    "offsets backwards": (one(offsets=[4, 0]), "size-mismatch", "hold -4", "t"),
    "offsets out of range": (one(offsets=[4, 8]), "bad-offsets", "leaves a hole", "t"),
    "offsets far out of range": (
        one(shape=[1 << 50], offsets=[0, 1 << 50]),
        "truncated",
        "describes 1125899906842624 bytes of data, the file holds 4",
        "",
    ),
    "overlap": (two([0, 4], [2, 6]), "bad-offsets", "begins at 2 and overlaps the tensor before it", "b"),
    "the same data twice": (two([0, 4], [0, 4], b"1234"), "bad-offsets", "overlaps", "b"),
    "hole in the middle": (two([0, 4], [5, 9], b"123456789"), "bad-offsets", "hole before it (expected 4)", "b"),
    "hole at the beginning": (two([1, 5], [5, 9], b"123456789"), "bad-offsets", "hole before it (expected 0)", "a"),
    "empty tensor inside another": (
        raw_file({"a": entry(), "b": entry(shape=(0,), offsets=(2, 2))}, b"1234"),
        "bad-offsets",
        "overlaps",
        "b",
    ),
    "data cut": (raw_file({"t": entry()}, b"123"), "truncated", "4 bytes of data, the file holds 3", ""),
    "trailing bytes": (raw_file({"t": entry()}, b"12345"), "trailing-data", "no tensor owns", ""),
    "data without tensors": (raw_file({}, b"1"), "trailing-data", "no tensor owns", ""),
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_a_malformed_header_is_refused_by_us_and_by_the_official_library(name: str) -> None:
    content, code, part, tensor = REFUSED_BY_BOTH[name]
    assert not library_takes(content)
    error = refusal(content)
    assert error.problems[0].code == code
    assert part in str(error)
    assert error.problems[0].tensor == tensor


#: What the library lets pass and we refuse: the format forbids it, or two readers may see two things.
REFUSED_BY_US = {
    "duplicate tensor": (
        raw_file(
            b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "duplicate-key",
    ),
    "duplicate tensor by escape": (
        raw_file(
            b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0074":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "duplicate-key",
    ),
    "duplicate metadata key": (raw_file(b'{"__metadata__":{"a":"1","a":"2"}}'), "duplicate-key"),
    "space before the object": (raw_file(b" {}"), "bad-header"),
    "unknown field": (one(stride=[1]), "bad-header"),
    "entry as a list": (raw_file({"t": ["U8", [4], [0, 4]]}, b"1234"), "bad-header"),
    "dtype as an object": (one(dtype={"U8": None}), "unknown-dtype"),
    "an empty tensor of impossible size": (one(shape=[0, 1 << 63], offsets=[0, 0]), "bad-header"),
}


@pytest.mark.parametrize("name", REFUSED_BY_US)
def test_what_the_library_lets_pass_although_it_is_ambiguous_is_refused(name: str) -> None:
    content, code = REFUSED_BY_US[name]
    assert refusal(content).problems[0].code == code


TAKEN = {
    "nothing": raw_file({}),
    "white space": raw_file(b'{ "t" :\r\n\t{"shape": [ 4 ],"data_offsets":[0, 4],"dtype":"U8"} }  \n\t ', b"1234"),
    "a scalar": raw_file({"t": entry(shape=[], offsets=[0, 1])}, b"1"),
    "an empty tensor": raw_file({"t": entry(shape=[0, 7], offsets=[0, 0])}),
    "an empty tensor with a huge side": raw_file({"t": entry(shape=[0, 1 << 61, 1 << 61], offsets=[0, 0])}),
    "empty tensors between others": two([0, 4], [4, 8])[:0]
    + raw_file({"a": entry(), "z": entry(shape=[0], offsets=[4, 4]), "b": entry(offsets=[4, 8])}, b"12345678"),
    "order of data not of names": two([4, 8], [0, 4]),
    "a hundred dimensions": one(shape=[1] * 99 + [4]),
    "metadata null": raw_file({"__metadata__": None, "t": entry()}, b"1234"),
    "metadata of strings": raw_file({"__metadata__": {"format": "pt", "": "", "\U0001f600": "\x00"}}),
    "any name": raw_file({NASTY.replace("\ud800", ""): entry()}, b"1234"),
    "an empty name": raw_file({"": entry()}, b"1234"),
    "a name as a path": raw_file({"../../etc/passwd": entry()}, b"1234"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_library_takes_is_taken_with_equal_content(name: str) -> None:
    content = TAKEN[name]
    expected = {each: (info["dtype"], info["shape"], bytes(info["data"])) for each, info in deserialize(content)}
    header = read(content)
    found = {
        each.name: (each.dtype, list(each.shape), content[header.data_start :][each.start : each.end])
        for each in header.tensors.values()
    }
    assert found == expected
    assert header.file_size == len(content)
    assert (
        read(
            encode_header(header, {name: [tensor] for name, tensor in header.tensors.items()}).prefix
            + content[header.data_start :]
        ).tensors
        == header.tensors
    )


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_data_type_has_the_librarys_size(dtype: str) -> None:
    size = DTYPE_BITS[dtype]
    assert library_takes(raw_file({"t": entry(dtype, [8], [0, size])}, bytes(size)))
    assert read(raw_file({"t": entry(dtype, [8], [0, size])}, bytes(size))).data_size == size
    refusal(raw_file({"t": entry(dtype, [8], [0, size + 1])}, bytes(size + 1)))


def test_a_file_cut_anywhere_is_refused() -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}} '
    )
    whole = raw_file(header, b"12345678")
    read(whole)
    for length in range(len(whole)):
        error = refusal(whole[:length])
        assert error.problems[0].code == "truncated", length
        assert "download it again" in str(error) or length < 8


def test_a_long_shape_makes_a_short_message() -> None:
    assert "…" in str(refusal(one(shape=[1] * 100_000)))
    assert "…" in str(refusal(one(shape=[9] * 100_000)))
    assert len(str(refusal(one(dtype="U" * 100_000)))) < 1000
    assert len(str(refusal(raw_file({"n" * 100_000: 1})))) < 1000


@pytest.mark.parametrize("length", [1 << 40, 99_999_999_999, 100_000_001])
def test_a_sparse_giant_costs_no_memory(tmp_path, length: int) -> None:
    path = tmp_path / SHARD
    with path.open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(min(length + 8, 1 << 42))
    tracemalloc.start()
    try:
        with path.open("rb", buffering=0) as stream, pytest.raises(CheckpointError, match="above the format's limit"):
            read_header(stream, path.stat().st_size, SHARD)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


#: How a message about a file of too many bytes ends.
LIMIT = "more than the 256000000 that are read; download it again, or shorten it in a copy\n"


def test_giants_are_refused_in_little_memory(awq) -> None:
    """The whole command under a limit of address space: a header, an index and a config that claim to be huge."""
    script = (
        "import resource, sys\n"
        "from awq2marlin import inspect, CheckpointError\n"
        "import awq2marlin.commands.inspect\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try: inspect(sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )

    def refused() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, awq], capture_output=True, text=True, timeout=60, check=False
        )
        assert not done.stderr
        return done.stdout

    for name in (INDEX, "config.json"):
        with (awq / name).open("ab") as stream:
            stream.truncate(1 << 40)
    assert refused() == f"config.json: it has 1099511627776 bytes, {LIMIT}"
    (awq / "config.json").write_text('{"quantization_config": {"bits": 4, "group_size": 64}}')
    by_files = f"if the checkpoint was published like this, ignore the index: --leave {INDEX}"
    assert refused() == f"{INDEX}: it has 1099511627776 bytes, {LIMIT.rstrip()}; {by_files}\n"
    (awq / INDEX).unlink()
    with (awq / SHARD).open("r+b") as stream:
        stream.write((1 << 39).to_bytes(8, "little"))
        stream.truncate(1 << 40)
    assert "model.safetensors: the header's length reads 549755813888 bytes" in refused()


def test_a_damaged_shard_is_named_and_nothing_is_written(awq, tmp_path, run) -> None:
    header, data = split_file(awq / SHARD)
    header[f"{MODULE}.qweight"]["shape"][0] += 1
    (awq / SHARD).write_bytes(raw_file(header, data))
    for command in ("convert", "inspect"):
        arguments = [command, awq, *([tmp_path / "out"] if command == "convert" else [])]
        run(*arguments).refused("size-mismatch", "needs 4128 bytes", file=SHARD, tensor=f"{MODULE}.qweight")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "quant_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    awq, tmp_path, run, name: str, kind: str, monkeypatch
) -> None:
    (awq / name).unlink(missing_ok=True)
    if kind == "folder":
        (awq / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(awq / name)
    elif kind == "socket":
        monkeypatch.chdir(awq)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    else:
        (awq / name).symlink_to("/dev/zero")
    if (kind, name) == ("folder", "tokenizer.json"):
        return  # a folder of any name is entered, as every other
    outcome = run("convert", awq, tmp_path / "out")
    if kind == "device":
        outcome.refused("unsafe-link", "leads out of the checkpoint's folder", file=name)
    else:
        outcome.refused("not-a-file", "not a regular file", file=name)
    assert not (tmp_path / "out").exists()


def _random_text(size: int) -> str:
    """Returns text of 6 bits a letter: zlib and base64 together leave its length as it is."""
    letters = (string.ascii_letters + string.digits + "-_").encode()
    return random.Random(5).randbytes(size).translate(letters * 4).decode()


def _with_metadata(file: Path, notes: str) -> None:
    header, data = split_file(file)
    header["__metadata__"] = {"notes": notes}
    file.write_bytes(raw_file(header, data))


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the limits of what is written be an eighth of what they are, so that it takes less time to reach them."""
    for module in ("awq2marlin.checkpoint.manifest", "awq2marlin.pipeline.record"):
        for name in ("MAX_JSON_BYTES", "MAX_HEADERS_BYTES"):
            monkeypatch.setattr(f"{module}.{name}", 32_000_000)


def _refused_unwritten(awq: Path, tmp_path: Path, run: Callable[..., Outcome], file: str, part: str):
    for more in ([], ["--dry-run"]):
        run("convert", awq, tmp_path / "out", *more).refused("too-large", part, file=file)
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_limits")
def test_a_header_that_the_manifest_could_not_hold_is_refused_before_anything_is_written(awq, tmp_path, run) -> None:
    _with_metadata(awq / SHARD, _random_text(31_999_000 - 4_000))
    _refused_unwritten(awq, tmp_path, run, MANIFEST, "'revert' could not read it")


def test_a_long_header_that_fits_comes_back(awq, tmp_path, run) -> None:
    _with_metadata(awq / SHARD, _random_text(30_000_000))
    assert run("convert", awq, tmp_path / "out").code == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / SHARD).read_bytes() == (awq / SHARD).read_bytes()


@pytest.mark.usefixtures("small_limits")
def test_headers_that_are_too_long_all_together_are_refused(tmp_path, run) -> None:
    awq = write_awq(tmp_path / "awq", shards=2)
    for file in awq.glob("*.safetensors"):
        _with_metadata(file, "a" * 17_000_000)
    _refused_unwritten(awq, tmp_path, run, MANIFEST, "the headers of all shards together have 34")


def test_a_header_that_grows_beyond_the_formats_limit_is_refused(tmp_path, run) -> None:
    modules = {f"model.layers.{index}.mlp.down_proj": (1664, 512) for index in range(8)}  # (1664, 64) to (104, 1024)
    awq = write_awq(tmp_path / "awq", modules=modules)
    header, data = split_file(awq / SHARD)
    short = len(json.dumps({**header, "__metadata__": {"notes": ""}}, separators=(",", ":")))
    header["__metadata__"] = {"notes": "a" * (99_999_997 - short)}
    (awq / SHARD).write_bytes(raw_file(json.dumps(header, separators=(",", ":")).encode(), data))
    _refused_unwritten(awq, tmp_path, run, SHARD, "the header would have")


@pytest.mark.usefixtures("small_limits")
def test_a_config_that_grows_beyond_what_is_read_is_refused(awq, tmp_path, run) -> None:
    notes: list[Any] = [1] * 400_000
    for _ in range(50):  # each is indented twice as far
        notes = [notes]
    edit_json(awq / "config.json", lambda config: config.update(notes=notes))
    _refused_unwritten(awq, tmp_path, run, "config.json", "the file would have")


@pytest.mark.parametrize("json_text", ["", "{", "[]", "null", "1"])
def test_the_report_of_a_failure_is_one_json_object(awq, run, json_text: str) -> None:
    (awq / "config.json").write_text(json_text)
    report = run("inspect", awq).report
    assert report["status"] == "failed"
    assert set(report["errors"][0]) == {"file", "tensor", "code", "message"}
    assert json.loads(json.dumps(report)) == report
