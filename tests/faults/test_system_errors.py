"""A full disk, a read error, a folder that cannot be written: one clear message, and a rerun completes."""

import errno
import io
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from awq2marlin.io import folder, stream
from awq2marlin.pipeline import output as output_module
from tests.skips import IS_ROOT, NO_MOUNT

from .helpers import (
    ENVIRONMENT,
    MANIFEST,
    WORK,
    Outcome,
    check_rerun,
    command,
    contents,
    digests,
    finished_shards,
    refused,
    run_process,
)

MESSAGES = {
    "ENOSPC": ("disk-full", "the disk is full; free some space and run the same command again; it resumes"),
    "EIO": ("io-error", "the device reported an input/output error"),
    "EACCES": ("no-permission", "permission denied"),
    "EROFS": ("read-only", "the file system is mounted read-only"),
    "EDQUOT": ("disk-full", "your disk quota is used up"),
}


@pytest.fixture
def small_disk(tmp_path):
    """Makes file systems of a few hundred kilobytes."""
    mounted = []

    def mount(size, *options):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(path)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(NO_MOUNT)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("what", MESSAGES)
def test_an_error_at_any_step_is_told_once_and_a_rerun_completes(source, expected, stepped, run, tmp_path, what):
    """Shards, side files, manifest, journal: wherever it strikes, the same holds."""
    out = tmp_path / "out"
    arguments = ("convert", source, out, "--workers", 1, "--json")
    assert stepped.run(*arguments, root=out).code == 0
    steps = stepped.trace
    commit = steps.index("os.rename config.json")
    code, message = MESSAGES[what]
    for at in range(list(MESSAGES).index(what), len(steps), len(MESSAGES)):  # between them, they strike at every step
        shutil.rmtree(out, ignore_errors=True)
        outcome = stepped.run(*arguments, root=out, at=at, do=what)
        step = stepped.trace[at]
        if outcome.code == 0:
            # only tidying up may fail silently, and making a folder that is there already
            assert at > commit or step.startswith("os.mkdir"), step
            continue
        error = refused(outcome)
        assert message in error["message"], step
        assert error["code"] == code
        assert error["file"].startswith(str(out)), step
        assert at > commit or not (out / "config.json").exists()
        check_rerun(run(*arguments[:-1]), out, expected)


@pytest.mark.parametrize("victim", ["model-00002-of-00002.safetensors", "generation_config.json"])
def test_a_write_that_fails_halfway_is_told_and_a_rerun_completes(source, expected, run, tmp_path, monkeypatch, victim):
    out = tmp_path / "out"
    size, write = len(expected[victim]), stream._write_exactly

    def write_half(target, offset, buffer):
        if offset + buffer.size == size:
            write(target, offset, buffer[: buffer.size // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(target, offset, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write_exactly", write_half)
        error = refused(run("convert", source, out))
    check_full_and_completed_by_a_rerun(error, source, out, expected, run)


@pytest.mark.parametrize(("victim", "sign"), [("manifest", b'"left_behind"'), ("journal", b'"source_digest"')])
def test_a_sync_that_fails_after_half_the_bytes_is_told_and_a_rerun_completes(
    source, expected, run, tmp_path, monkeypatch, victim, sign
):
    out = tmp_path / "out"

    def lose_half(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file() and sign in path.read_bytes():
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose_half)
        error = refused(run("convert", source, out))
    assert (out / MANIFEST).exists() is False, victim
    check_full_and_completed_by_a_rerun(error, source, out, expected, run)


def test_a_disk_that_fails_behind_what_is_written_is_told_and_a_rerun_completes(
    source, expected, run, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(stream, "WRITE_BACK_BYTES", 64)
        patch.setattr(stream, "WRITE_BEHIND_BYTES", 128)
        patch.setattr(stream, "finish_writing_back", fail)
        error = refused(run("convert", source, out))
    assert (error["code"], error["file"]) == ("io-error", str(out))
    assert not [*out.glob("*.safetensors"), *out.glob("config.json")]
    assert run("convert", source, out).code == 0
    assert contents(out) == expected


def check_full_and_completed_by_a_rerun(error, source, out, expected, run):
    assert (error["code"], error["file"]) == ("disk-full", str(out))
    assert not (out / "config.json").exists()
    assert run("convert", source, out).code == 0
    assert contents(out) == expected
    assert not (out / WORK).exists()


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(large, run, small_disk):
    disk = small_disk("1m")
    error = refused(run("convert", large / "source", disk / "out"))
    assert error["code"] == "disk-full"
    assert error["file"] == str(disk / "out")
    found = re.match(r"the conversion needs (\S+) MB, (\S+) (?:MB|kB) more than the disk has free; ", error["message"])
    assert 1 <= float(found[1]) < 100, error["message"]
    assert not (disk / "out").exists()
    planned = run("convert", large / "source", disk / "out", "--dry-run")
    assert planned.code == 0
    assert planned.report["warnings"] == [f"a run would stop: {disk / 'out'}: {error['message']}"]
    back = run("revert", large / "marlin", disk / "back", "--dry-run")
    assert (back.code, len(back.report["warnings"])) == (0, 1)
    assert f"a run would stop: {disk / 'back'}: the revert needs " in back.report["warnings"][0]
    assert [*disk.iterdir()] == []


def test_a_disk_that_fills_up_on_the_way_is_told_and_a_rerun_completes(large, run, small_disk, monkeypatch):
    expected = contents(large / "marlin")
    size = sum(map(len, expected.values()))
    disk = small_disk(size + (1 << 20))
    ballast = disk / "ballast"
    remember = output_module.OutputFolder.remember

    def remember_and_fill(self, *arguments):
        remember(self, *arguments)
        ballast.write_bytes(bytes(2 << 20))  # somebody else needs the disk, too

    with monkeypatch.context() as patch:
        patch.setattr(output_module.OutputFolder, "remember", remember_and_fill)
        error = refused(run("convert", large / "source", disk / "out", "--workers", 2))
    assert error["code"] == "disk-full"
    assert "it resumes" in error["message"]
    assert not (disk / "out" / "config.json").exists()
    error = refused(run("convert", large / "source", disk / "out"))
    assert error["code"] == "disk-full"
    finished = finished_shards(disk / "out")
    assert finished
    ballast.unlink()
    outcome = run("convert", large / "source", disk / "out")
    assert outcome.report["details"]["resumed"] == finished
    assert contents(disk / "out") == expected


def test_a_limit_on_file_sizes_is_told(large, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        command("convert", large / "source", out, "--json"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    error = refused(Outcome(done.returncode, done.stdout, done.stderr))
    assert (error["code"], error["file"]) == ("file-too-large", str(out))
    assert "ulimit -f" in error["message"]
    assert run_process("convert", large / "source", out, "--json").code == 0
    assert contents(out) == contents(large / "marlin")


def test_a_full_disk_is_told_with_the_file_that_does_not_fit(source, run, small_disk, tmp_path):
    disk = small_disk("64k")
    (disk / "rest").write_bytes(bytes(64 << 10))
    assert run("convert", source, tmp_path / "out").code == 0
    told = "the disk is full; free some space and run the same command again"
    page, record, folder = disk / "page.html", disk / "record.jsonl", disk / "demo"
    (tmp_path / "list.txt").write_text(f"{source}\n")
    for file, *arguments in (
        (page, "verify", source, tmp_path / "out", "--report", page),
        (record, "batch", tmp_path / "list.txt", "--out-dir", tmp_path / "batch", "--record", record),
        (folder / "awq", "demo", folder),
    ):
        error = refused(run(*arguments))
        assert (error["file"], error["message"]) == (str(file), told)
    assert sorted(path.name for path in disk.iterdir()) == ["demo", "record.jsonl", "rest"]


def test_a_read_only_file_system_is_told(source, run, small_disk):
    disk = small_disk("1m", "ro")
    error = refused(run("convert", source, disk / "out"))
    assert (error["code"], error["file"]) == ("read-only", str(disk / "out"))


def test_a_folder_without_write_permission_is_told(source, run, tmp_path):
    """Mode bits do not bind root; the attribute 'immutable' does."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    as_root = os.geteuid() == 0
    if as_root and subprocess.run(["chattr", "+i", str(closed)], capture_output=True, check=False).returncode:
        pytest.skip(IS_ROOT)
    try:
        error = refused(run("convert", source, closed / "out"))
    finally:
        if as_root:
            subprocess.run(["chattr", "-i", str(closed)], check=True)
    assert (error["code"], error["file"]) == ("no-permission", str(closed / "out"))


def break_reads_of(patch, path, after):
    """Lets reads of one file fail that begin at byte ``after`` or later: a bad sector."""

    class BadDisk(io.FileIO):
        def readinto(self, buffer):
            self._fail()
            return super().readinto(buffer)

        def read(self, size=-1):
            self._fail()
            return super().read(size)

        def _fail(self):
            if path.samefile(f"/proc/self/fd/{self.fileno()}") and self.tell() >= after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    class NamedFile(folder.NamedFile, BadDisk):
        pass

    patch.setattr(folder, "NamedFile", NamedFile)


def test_output_that_is_a_file_is_refused(source, run, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    error = refused(run("convert", source, out))
    assert (error["code"], error["file"]) == ("not-a-folder", str(out))
    assert "a file of this name exists" in error["message"]
    assert out.read_text() == "mine"


def test_output_below_a_file_is_refused(source, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    error = refused(run("convert", source, tmp_path / "file" / "out"))
    assert error["code"] == "not-a-folder"
    assert error["file"].startswith(str(tmp_path / "file"))
    assert "a part of this path is a file, not a folder" in error["message"]


def test_an_output_name_too_long_for_the_file_system_is_refused(source, run, tmp_path):
    assert refused(run("convert", source, tmp_path / ("x" * 300)))["code"] == "name-too-long"


def test_an_output_in_a_loop_of_links_is_refused(source, run, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / "loop" / "out"):
        assert refused(run("convert", source, out))["code"] in ("unsafe-link", "not-a-folder")


def test_a_side_file_with_a_name_as_long_as_file_systems_take_is_carried_over(source, run, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / ("n" * 255)).write_text("long")
    deep = copy / ("a" * 200) / ("b" * 200)
    deep.mkdir(parents=True)
    (deep / "c.txt").write_text("deep")
    assert run("convert", copy, tmp_path / "out").code == 0
    assert (tmp_path / "out" / ("n" * 255)).read_text() == "long"
    assert (tmp_path / "out" / ("a" * 200) / ("b" * 200) / "c.txt").read_text() == "deep"
    assert digests(tmp_path / "out").keys() >= digests(copy).keys()
    assert not (tmp_path / "out" / WORK).exists()
