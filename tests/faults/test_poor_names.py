"""Names that the output's file system cannot hold: these files are left behind with a warning, all others are there."""

import errno
import json
import os
from pathlib import Path

import pytest

from awq2marlin import convert
from awq2marlin.pipeline.output import OutputFolder

from .helpers import MANIFEST, WORK, contents, make_source, run_here

REASON = "the output's file system cannot hold its name"


@pytest.fixture
def named(tmp_path):
    """A source with files of odd names; and its conversion, made where they can be held."""
    source = make_source(tmp_path / "named")
    for name in ("fig:1.txt", "LICENSE", "license", "x" * 200, "parts: 2/d.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    convert(source, tmp_path / "named-marlin")
    return source


@pytest.fixture
def strange_disk(monkeypatch, named):
    """A file system that takes no colon and no name above 150 letters, and does not tell the case of letters apart."""
    del named  # which comes first
    replace, mkdir, final = Path.replace, Path.mkdir, OutputFolder.final

    def check(path):
        if ":" in path.name or len(path.name) > 150:
            number = errno.EINVAL if ":" in path.name else errno.ENAMETOOLONG
            raise OSError(number, os.strerror(number), str(path))

    def strange_replace(self, target):
        check(Path(target))
        return replace(self, target)

    def strange_mkdir(self, *arguments, **options):
        check(self)
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "replace", strange_replace)
    monkeypatch.setattr(Path, "mkdir", strange_mkdir)
    monkeypatch.setattr(OutputFolder, "final", lambda self, name: final(self, "LICENSE" if name == "license" else name))


@pytest.mark.usefixtures("strange_disk")
def test_a_conversion_leaves_them_behind_and_says_so_everywhere(named, tmp_path, capsys):
    out = tmp_path / "out"
    outcome = run_here(capsys, "convert", named, out, "--json")
    assert outcome.code == 0, outcome.err
    left = {"fig:1.txt", "license", "x" * 200, "parts: 2/d.txt"}
    report = outcome.report
    assert report["left_behind"] == dict.fromkeys(left, REASON)
    assert not left & {*report["details"]["side_files"], *(each["name"] for each in report["files"])}
    (warning,) = report["warnings"]
    assert warning.startswith("left behind, so 'revert' cannot restore it: ")
    assert f"fig:1.txt (9 B, {REASON})" in warning
    assert warning.endswith("rename it in a copy of the source")
    assert f"* `license`: 7 B, {REASON}" in (out / "README.md").read_text()
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["left_behind"] == dict.fromkeys(left, REASON)
    assert not left & {*manifest["files"]}
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert not (out / WORK).exists()
    assert run_here(capsys, "verify", named, out, "--json").code == 0


def test_the_way_back_leaves_them_behind_and_says_so(named, tmp_path, capsys, strange_disk):
    del strange_disk
    outcome = run_here(capsys, "revert", tmp_path / "named-marlin", tmp_path / "back", "--json")
    assert outcome.code == 0, outcome.err
    left = {"fig:1.txt", "license", "x" * 200, "parts: 2/d.txt"}
    assert outcome.report["left_behind"] == dict.fromkeys(left, REASON)
    (warning,) = outcome.report["warnings"]
    assert warning.startswith("the output's file system does not allow some names, so these files were not restored: ")
    back = {name: data for name, data in contents(named).items() if name not in left}
    assert contents(tmp_path / "back") == back
    assert {each["name"] for each in outcome.report["files"]} == back.keys()


def test_where_they_can_be_held_all_come_back(named, tmp_path, capsys):
    assert json.loads((tmp_path / "named-marlin" / MANIFEST).read_text())["format_version"] == 2  # 0.1 refuses them
    assert run_here(capsys, "revert", tmp_path / "named-marlin", tmp_path / "back", "--json").code == 0
    assert contents(tmp_path / "back") == contents(named)
