"""What a download left behind: Git LFS pointers, pages of servers, files that are not finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import CheckpointError, convert, inspect, revert, verify
from awq2marlin.cli.app import main
from awq2marlin.io.impostors import impostor
from tests.checkpoint.test_files import add, files_of
from tests.hostile.hostile_files import INDEX, write_awq

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4967215360\n"
PAGES = {
    "an HTML page": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
    "an XML document": b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
    "JSON": b'{"error": "Repository not found"}',
    "text that begins with 'Entry not found'": b"Entry not found\n",
}


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return write_awq(tmp_path / "awq", shards=2)


def problems(folder: Path) -> list[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        convert(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()
    return [(each.code, each.file) for each in caught.value.problems]


def message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect(folder)
    return caught.value.problems[0].message


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_pointers_in_place_of_shards_are_all_named(awq: Path) -> None:
    for name in shards(awq):
        (awq / name).write_bytes(POINTER)
    assert problems(awq) == [("lfs-pointer", name) for name in shards(awq)]
    assert message(awq).startswith(
        "it is a Git LFS pointer, not the file itself; run 'git lfs install' once and 'git lfs pull'"
    )


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(("data", "code"), [(POINTER, "lfs-pointer"), (PAGES["an HTML page"], "error-page")])
def test_a_document_that_must_be_read_is_called_what_it_is(awq: Path, name: str, data: bytes, code: str) -> None:
    (awq / name).write_bytes(data)
    assert problems(awq) == [(code, name)]


@pytest.mark.parametrize("what", PAGES)
def test_a_page_in_place_of_a_shard_is_called_what_it_is(awq: Path, what: str) -> None:
    (awq / shards(awq)[1]).write_bytes(PAGES[what])
    assert problems(awq) == [("error-page", shards(awq)[1])]
    assert message(awq).startswith(f"it is {what}, not the file itself; ")


def test_a_pointer_without_an_index_is_called_what_it_is_too(tmp_path: Path) -> None:
    awq = write_awq(tmp_path / "awq")
    (awq / "mtp.safetensors").write_bytes(POINTER)
    assert problems(awq) == [("lfs-pointer", "mtp.safetensors")]


def test_other_pointers_and_pages_are_carried_over_and_told_of_everywhere(
    awq: Path, tmp_path: Path, capsys: Any
) -> None:
    found = {
        "tokenizer.json": POINTER,
        "a/b.bin": POINTER,
        "spk.pt": PAGES["an HTML page"],
        "x.png": PAGES["JSON"],
        "README.md": POINTER,
    }
    sound = {"page.html": PAGES["an HTML page"], "vocab.json": b'{"a": 1}', "b.bin": bytes(range(9)), "empty.bin": b"",
             "chat.xml": PAGES["an XML document"], "notes.md": b"# {\"a\": 1}"}  # fmt: skip
    add(awq, {**found, **sound, "page.json": PAGES["an HTML page"]})
    assert main(["convert", str(awq), str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert [each.partition("; ")[0] for each in told] == [
        "an HTML page instead of the file itself, carried over as it is: page.json, spk.pt",
        "a Git LFS pointer instead of the file itself, carried over as it is: tokenizer.json, a/b.bin, README.md",
        "JSON instead of the file itself, carried over as it is: x.png",
    ]
    assert "'git lfs pull'" in told[1]
    assert all(f"* {each}" in (tmp_path / "out" / "README.md").read_text() for each in told)
    assert main(["convert", str(awq), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(f"warning    {each}" in out for each in told)
    assert verify(awq, tmp_path / "out").kind == "conversion"
    revert(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(awq)


@pytest.mark.parametrize("mark", [".aria2", ".part", ".incomplete", ".partial", ".crdownload", ".abc123.incomplete"])
def test_a_shard_whose_download_is_not_finished_is_refused(awq: Path, tmp_path: Path, mark: str) -> None:
    shard = shards(awq)[0]
    name = shard + mark
    (awq / name).write_bytes(b"x")
    assert problems(awq) == [("unfinished-download", name)]
    assert f"the download of {shard} is not finished" in message(awq)
    (awq / shard).rename(tmp_path / "away")  # it never came under its own name
    assert problems(awq) == [("unfinished-download", name)]
    (tmp_path / "away").rename(awq / shard)
    assert convert(awq, tmp_path / "out", leave=["*" + mark]).left_behind == {name: "as --leave says"}
    assert verify(awq, tmp_path / "out").kind == "conversion"


def test_without_an_index_any_unfinished_shard_counts(tmp_path: Path) -> None:
    awq = write_awq(tmp_path / "awq")
    (awq / "mtp.safetensors.part").write_bytes(b"x")
    assert problems(awq) == [("unfinished-download", "mtp.safetensors.part")]


def test_other_unfinished_downloads_are_told_of(awq: Path, tmp_path: Path) -> None:
    add(awq, {"tokenizer.json.part": b"{", "old/model.safetensors.aria2": b"x", "part": b"", "a.partial.txt": b""})
    (warning,) = convert(awq, tmp_path / "out").warnings
    assert warning.endswith(": tokenizer.json.part, old/model.safetensors.aria2; finish or remove them")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x00" * 8,
        b"{not json",
        b"<svg>",
        b"version 2",
        b"PK\x03\x04",
        b"\x93NUMPY",
        b"{\x01\x00\x00\x00\x00\x00\x00",
    ],
)
def test_what_is_something_else_is_not_taken_for_a_page(head: bytes) -> None:
    assert impostor(head) is None


def test_pages_are_known_whatever_stands_before_them() -> None:
    for head in (b"\xef\xbb\xbf\r\n <HTML>", b"\n<!doctype HTML>", b"{ \n}", b'{"a"'):
        found = impostor(head)
        assert found is not None
        assert found.code == "error-page"
