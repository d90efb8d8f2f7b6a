"""`verify --report`: one page for people, from which nothing can break out."""

import base64
import errno
import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.cli.app import main
from awq2marlin.io.digest import digest_of_file
from awq2marlin.io.stream import NamedPath

MODULES = {f"model.layers.{layer}.mlp.{name}": (128, 64) for layer in range(2) for name in ("up_proj", "down_proj")}


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.sources: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def made(folder: Path, modules: dict[str, tuple[int, int]] = MODULES, **recipe: object) -> Path:
    write_checkpoint(folder, Recipe(modules=modules, weights={"lm_head.weight": (8, 8)}, **recipe))  # type: ignore[arg-type]
    return folder


def converted(folder: Path) -> Path:
    output = folder.with_name(f"{folder.name}-marlin")
    assert main(["convert", str(folder), str(output), "--quiet"]) == 0
    return output


def test_the_page_tells_modules_digests_errors_and_how_to_repeat_it(tmp_path: Path) -> None:
    source = made(tmp_path / "llama")
    output, file = converted(source), tmp_path / "report.html"
    assert main(["verify", str(source), str(output), "--device", "cpu", "--report", str(file), "--quiet"]) == 0
    page = Page(file)
    assert "equal" in page.text
    assert all(f"{module}" in page.text for module in MODULES)
    assert "all 4 quantized modules" in page.text
    assert "awq2marlin verify llama llama-marlin --device cpu" in page.text
    for folder in (source, output):
        digest = digest_of_file(NamedPath(folder / "model.safetensors", "model.safetensors"))
        assert digest.xxh3 in page.text
    assert "Every file was read" in page.text
    (picture,) = page.sources
    assert base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")


def test_the_page_says_nothing_of_where_the_folders_lie(tmp_path: Path) -> None:
    source = made(tmp_path / "llama")
    output, file = converted(source), tmp_path / "report.html"
    assert main(["verify", str(source), str(output), "--modules", "1", "--report", str(file), "--quiet"]) == 0
    assert str(tmp_path) not in file.read_text()
    assert "1 of 4 quantized modules" in Page(file).text
    assert "awq2marlin verify llama llama-marlin --modules 1" in Page(file).text
    assert "Only verify without --modules" in Page(file).text


def test_a_difference_of_a_conversion_is_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path / "llama")
    output, file = converted(source), tmp_path / "report.html"
    shard = output / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(source), str(output), "--report", str(file), "--json"]) == 3
    (problem,) = json.loads(capsys.readouterr().out)["errors"]
    page = Page(file)
    assert "different" in page.text
    assert problem["message"] in page.text
    assert problem["tensor"] in page.text


def test_two_checkpoints_that_differ_are_summed_up(tmp_path: Path) -> None:
    one, other, file = made(tmp_path / "one"), made(tmp_path / "other", seed=7), tmp_path / "report.html"
    assert main(["verify", str(one), str(other), "--report", str(file), "--quiet"]) == 3
    page = Page(file)
    assert page.text.count("differ\n") + page.text.count("differ") >= len(MODULES)
    assert "one and other" in page.text
    assert "AWQ, 4 bits, groups of 128, with zero points" in page.text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e"


def test_no_name_breaks_out_of_the_page(tmp_path: Path) -> None:
    source = made(tmp_path / 'a<b>"&', {f"model.layers.0.{HOSTILE}": (128, 64)})
    output, file = converted(source), tmp_path / "report.html"
    assert main(["verify", str(source), str(output), "--device", "cpu", "--report", str(file), "--quiet"]) == 0
    page = Page(file)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "\u202e" not in page.text
    assert 'a<b>"&' in page.text
    assert "default-src 'none'" in html.unescape(file.read_text())


def test_an_ending_that_is_no_page_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "one", "other", "--report", str(tmp_path / "report.pdf"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "unknown-report"


def test_a_report_stays_out_of_the_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path / "llama")
    output = converted(source)
    before = sorted(output.iterdir())
    assert main(["verify", str(source), str(output), "--report", str(output / "report.html"), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["errors"]
    assert problem["code"] == "unknown-report"
    assert "push --report" in problem["message"]
    assert sorted(output.iterdir()) == before


def test_a_folder_that_is_not_there_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "one", "other", "--report", str(tmp_path / "no" / "report.html"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "not-found"


def test_a_picture_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["verify", "one", "other", "--device", "cpu", "--report", str(tmp_path / "r.html"), "--json"]
    assert main(arguments) == 1
    (problem,) = json.loads(capsys.readouterr().out)["errors"]
    assert problem["code"] == "no-matplotlib"
    assert "--report" in problem["message"]


def test_a_page_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "llama")
    output, file = converted(source), tmp_path / "report.html"
    file.write_text("the earlier one")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["verify", str(source), str(output), "--report", str(file), "--quiet"]) == 1
    assert file.read_text() == "the earlier one"
    assert sorted(each.name for each in tmp_path.iterdir() if re.match(r"\.report", each.name)) == []


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_an_error_names_the_page_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    source = made(tmp_path / "llama")
    output, file = converted(source), tmp_path / "report.html"

    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, step, read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    capsys.readouterr()
    assert main(["verify", str(source), str(output), "--report", str(file), "--json"]) == 1
    problem = json.loads(capsys.readouterr().out)["errors"][0]
    assert (problem["file"], problem["code"]) == (str(file), "read-only")


def test_it_is_told_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path / "source")
    output, file = converted(source), tmp_path / "report.html"
    assert main(["verify", str(source), str(output), "--report", str(file)]) == 0
    assert f"the report is in {file}" in capsys.readouterr().err.replace("\n", "")
