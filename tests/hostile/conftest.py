"""A sound checkpoint to damage, and a command line that is watched while it reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from awq2marlin import convert
from awq2marlin.cli.app import main
from tests.hostile.hostile_files import write_awq


@dataclass(frozen=True)
class Outcome:
    """What a command said."""

    code: int
    out: str
    err: str
    report: dict[str, Any]

    @property
    def codes(self) -> set[str]:
        return {error["code"] for error in self.report["errors"]}

    def refused(self, code: str, *parts: str, file: str | None = None, tensor: str | None = None) -> None:
        """Asserts exit code 1, one problem of this code and place, and what its message says."""
        self.failed(1, code, *parts, file=file, tensor=tensor)

    def differs(self, code: str, *parts: str, file: str | None = None, tensor: str | None = None) -> None:
        """Asserts exit code 3, one problem of this code and place, and what its message says."""
        self.failed(3, code, *parts, file=file, tensor=tensor)

    def is_described(self, *parts: str) -> None:
        """Asserts that a checkpoint which cannot be converted was described, and what is said of why."""
        assert self.code == 0, (self.err, self.out)
        details = self.report["details"]
        assert (details["convertible"], self.report["modules"]) == (False, [])
        for part in parts:
            assert part in details["reason"], (part, details)

    def failed(self, exit_code: int, code: str, *parts: str, file: str | None, tensor: str | None) -> None:
        assert self.code == exit_code, (self.err, self.out)
        assert self.codes == {code}, self.err
        first = self.report["errors"][0]
        assert file is None or first["file"] == file, first
        assert tensor is None or first["tensor"] == tensor, first
        for part in parts:
            assert part in self.err, (part, self.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process, with --json, and checks what every command owes its reader."""

    def command(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert_clean(out, err)
        report = json.loads(out)
        assert report["exit_code"] == code
        assert bool(report["errors"]) == bool(code)
        return Outcome(code, out, err, report)

    return command


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command as a person would, without --json; returns its exit code and all it said."""

    def command(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert_clean(out, err)
        return code, out + err

    return command


def assert_clean(*texts: str) -> None:
    """Asserts that a terminal shows the texts as they are: nothing but printable characters and line ends."""
    for text in texts:
        bad = {char for char in text if char != "\n" and not char.isprintable()}
        assert not bad, (bad, text)
        assert "Traceback" not in text


@pytest.fixture(scope="session")
def sound_awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_awq(tmp_path_factory.mktemp("sound") / "awq")


@pytest.fixture(scope="session")
def sound_marlin(sound_awq: Path) -> Path:
    convert(sound_awq, sound_awq.with_name("marlin"), workers=1)
    return sound_awq.with_name("marlin")


@pytest.fixture(scope="session")
def sound_padded(sound_awq: Path) -> Path:
    convert(sound_awq, sound_awq.with_name("padded"), workers=1, unaligned="pad")
    return sound_awq.with_name("padded")


@pytest.fixture
def awq(sound_awq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_awq, tmp_path / "awq"))


@pytest.fixture
def marlin(sound_marlin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_marlin, tmp_path / "marlin"))


@pytest.fixture
def padded(sound_padded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_padded, tmp_path / "padded"))
