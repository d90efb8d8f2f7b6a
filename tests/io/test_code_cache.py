"""The cache of compiled code: whole and private files only, and no reason to fail when nothing can be kept."""

import multiprocessing
import os
import tempfile
import threading
from pathlib import Path

import pytest

from awq2marlin.io.code_cache import CACHE_VARIABLE, CodeCache, cache_folder
from tests.skips import NO_MODES


@pytest.fixture
def cache(tmp_path):
    return CodeCache(tmp_path / "cache", ".code")


def test_cache_returns_what_was_put(cache):
    assert cache.get("key") is None
    assert cache.put("key", b"machine code")
    assert cache.get("key") == b"machine code"
    assert [path.name for path in cache.folder.iterdir()] == ["key.code"], "no partial file stays"


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 32, b"\0" * 100])
def test_a_damaged_entry_counts_as_absent(cache, damage):
    cache.put("key", b"machine code")
    (cache.folder / "key.code").write_bytes(damage)
    assert cache.get("key") is None


def test_a_truncated_entry_counts_as_absent(cache):
    cache.put("key", b"machine code")
    path = cache.folder / "key.code"
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get("key") is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason=NO_MODES)
def test_code_that_others_could_have_written_counts_as_absent(cache):
    cache.put("key", b"machine code")
    path = cache.folder / "key.code"
    for place in (path, cache.folder):
        mode = place.stat().st_mode
        place.chmod(mode | 0o020)
        assert cache.get("key") is None, place
        place.chmod(mode)
    assert cache.get("key") == b"machine code"


def test_without_a_home_the_cache_is_a_temporary_folder_of_the_users_own(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for variable in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"awq2marlin-{os.getuid()}"


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").write_text("")
    assert not CodeCache(tmp_path / "file" / "cache", ".code").put("key", b"machine code")


def test_a_write_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def full(_self, _target):
        raise OSError(28, "No space left on device")

    cache.put("key", b"machine code")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert not cache.put("key", b"other code")
    assert [path.name for path in cache.folder.iterdir()] == ["key.code"]
    assert cache.get("key") == b"machine code"


def test_caches_of_other_endings_may_share_a_folder(cache):
    other = CodeCache(cache.folder, ".other")
    cache.put("key", b"machine code")
    assert other.get("key") is None
    assert other.files() == []
    assert [path.name for path in cache.files()] == ["key.code"]


def _hold(folder, entered, leave):
    with CodeCache(folder, ".code").one_at_a_time("key"):
        entered.set()
        leave.wait(60)


@pytest.mark.skipif(os.name == "nt", reason="Nothing is locked on Windows.")
@pytest.mark.parametrize("is_killed", [False, True])
def test_processes_come_in_one_after_the_other_and_a_dead_one_is_gone(cache, is_killed):
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(cache.folder, entered, leave))
    first.start()
    assert entered.wait(60)
    inside = []

    def come_in():
        with cache.one_at_a_time("key"):
            inside.append(True)

    second = threading.Thread(target=come_in)
    second.start()
    second.join(0.2)
    assert not inside
    first.kill() if is_killed else leave.set()
    second.join(60)
    first.join(60)
    assert inside
    assert cache.files() == [], "the lock is no entry"


@pytest.mark.skipif(os.name == "nt", reason="Nothing is locked on Windows.")
def test_other_code_is_not_waited_for(cache):
    def come_in():
        with cache.one_at_a_time("another key"):
            pass

    with cache.one_at_a_time("key"):
        other = threading.Thread(target=come_in, daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()


def test_where_nothing_can_be_locked_nobody_waits(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with CodeCache(tmp_path / "file" / "cache", ".code").one_at_a_time("key"):
        pass
