"""The compiled kernels: compiled once, loaded without Numba, never trusted when damaged or writable by others."""

import os
import subprocess
import sys

import numpy as np
import pytest

from awq2marlin.io.code_cache import cache_folder
from tests.skips import NO_MODES

#: Repacks one tile of 4-bit words and prints a checksum, and whether Numba had to be imported.
SCRIPT = """
import sys
import numpy as np
from awq2marlin.layout.repack import MarlinWeight, PartLayout, Repack
source = np.arange(512, dtype=np.uint8)
target = np.empty_like(source)
Repack(PartLayout("qweight", 4, 16, 64), MarlinWeight("qweight", 4, 16, 64)).rewrite(source, target)
print(int((target * np.arange(512)).sum()), "numba" in sys.modules)
"""


def run(cache, expect_numba):
    """Runs the script with its own cache folder; returns the checksum."""
    environment = {**os.environ, "AWQ2MARLIN_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    checksum, numba = done.stdout.split()
    assert numba == str(expect_numba)
    return int(checksum)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one process has filled, and the checksum it computed."""
    cache = tmp_path_factory.mktemp("cache") / "new" / "folder"
    checksum = run(cache, expect_numba=True)
    (file,) = cache.glob("*.o")
    return file, checksum


def test_the_second_process_loads_what_the_first_compiled(filled):
    file, checksum = filled
    assert run(file.parent, expect_numba=False) == checksum


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "not json", "no names"])
def test_a_damaged_file_counts_as_missing_and_is_replaced(filled, tmp_path, damage):
    file, checksum = filled
    data = bytearray(file.read_bytes())
    head, _, code = bytes(data).partition(b"\n")
    data[-100] ^= 1
    damaged = {
        "flip": bytes(data),
        "cut": file.read_bytes()[:-1000],
        "empty": b"",
        "not json": b"{" + code,
        "no names": b'{"sha256": "' + b"0" * 64 + b'"}\n' + code,
    }[damage]
    copy = tmp_path / file.name
    copy.write_bytes(damaged)
    assert run(tmp_path, expect_numba=True) == checksum
    assert copy.read_bytes().partition(b"\n")[0] == head
    assert run(tmp_path, expect_numba=False) == checksum


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason=NO_MODES)
def test_code_that_others_could_have_written_is_not_run(filled, tmp_path):
    file, checksum = filled
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    copy.chmod(0o666)
    assert run(tmp_path, expect_numba=True) == checksum
    copy.chmod(0o600)
    tmp_path.chmod(0o777)
    assert run(tmp_path, expect_numba=True) == checksum


def test_without_a_writable_cache_each_process_compiles(filled, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    assert run(blocked / "cache", expect_numba=True) == filled[1]
    assert blocked.read_text() == "a file where a folder should be"


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWQ2MARLIN_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("AWQ2MARLIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "awq2marlin"


def test_the_kernels_refuse_sizes_that_do_not_fit():
    """The machine code trusts its sizes, so that they are checked before it is called."""
    from awq2marlin.layout.repack import MarlinScales, PartLayout, Repack

    repack = Repack(PartLayout("scales", 4, 2, 64), MarlinScales("scales", 4, 2, 64))
    whole = np.zeros(256, np.uint8)
    with pytest.raises(ValueError, match="not whole rows of 128 bytes"):
        repack.rewrite(whole[:200], whole[:200].copy())
    with pytest.raises(ValueError, match="not whole rows of 128 bytes"):
        repack.rewrite(np.zeros(512, np.uint8)[::2], whole)
