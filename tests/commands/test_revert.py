"""`revert` has what `convert` has: a dry run, a default output, an executor, and an overwrite that erases nothing."""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from awq2marlin import OutputError, convert, revert
from awq2marlin.pipeline import run as pipeline
from awq2marlin.pipeline.output import OutputFolder
from awq2marlin.pipeline.shard import rewrite_shard
from awq2marlin.progress import Silence
from tests.faults.helpers import MANIFEST, WORK, contents, digests, finished_shards, make_source

SHARD, OTHER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Recording(Silence):
    """Keeps, for every stage, its length and how much was done."""

    def __init__(self):
        self.stages = {}

    def start(self, what, total):
        self.stages[what] = self._stage = [total, 0]

    def advance(self, count):
        self._stage[1] += count


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, its conversion, and a reversion of that."""
    folder = tmp_path_factory.mktemp("made")
    make_source(folder / "model-awq")
    convert(folder / "model-awq", folder / "model-marlin", unaligned="pad")
    revert(folder / "model-marlin", folder / "back")
    return folder


@pytest.fixture
def original(made, tmp_path):
    """A copy of the checkpoint that was converted."""
    return shutil.copytree(made / "model-awq", tmp_path / "original")


def test_the_default_output_never_bears_the_name_of_the_source(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = revert(made / "model-marlin")
    assert str(result.output) == "model-marlin-reverted"
    assert contents(tmp_path / "model-marlin-reverted") == contents(made / "model-awq")


def test_a_dry_run_tells_every_file_and_writes_nothing(made, tmp_path):
    result = revert(made / "model-marlin", tmp_path / "out", dry_run=True)
    assert (result.dry_run, result.resumed) == (True, ())
    sizes = {name: len(data) for name, data in contents(made / "model-awq").items()}
    assert {file.name: (file.size, file.sha256) for file in result.files} == {
        name: (size, "") for name, size in sizes.items()
    }
    assert result.bytes == sum(sizes.values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_executor_gives_the_same_bytes_and_digests(made, tmp_path, kind):
    pool = ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    with pool:
        result = revert(made / "model-marlin", tmp_path / "out", executor=pool)
    assert contents(tmp_path / "out") == contents(made / "model-awq")
    assert result.files == revert(made / "model-marlin", tmp_path / "alone").files


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"the revert needs \d+\.\d kB, \d+\.\d kB more") as caught:
        revert(made / "model-marlin", tmp_path / "out")
    assert caught.value.problems[0].code == "disk-full"
    assert not (tmp_path / "out").exists()


def test_an_earlier_reversion_is_replaced_only_if_that_is_asked_for(made, tmp_path):
    out = shutil.copytree(made / "back", tmp_path / "out")
    with pytest.raises(OutputError, match=r"the folder is not empty \(\S+\); .* use --overwrite, which keeps files"):
        revert(made / "model-marlin", out)
    result = revert(made / "model-marlin", out, overwrite=True)
    assert contents(out) == contents(made / "model-awq")
    assert {file.name for file in result.files} == contents(out).keys()


def test_what_is_missing_of_an_earlier_reversion_is_made_again(made, tmp_path):
    out = shutil.copytree(made / "back", tmp_path / "out")
    for name in (SHARD, "config.json"):
        (out / name).unlink()
    (out / "notes.txt").write_text("not ours")
    revert(made / "model-marlin", out, overwrite=True)
    assert contents(out) == {**contents(made / "model-awq"), "notes.txt": b"not ours"}


@pytest.mark.parametrize("name", [SHARD, "config.json", "code/deep/modeling.py"])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_is_not_the_one_that_comes_back_is_never_replaced(made, original, name, same_size):
    data = bytearray((original / name).read_bytes())
    data[-1] ^= 1
    (original / name).write_bytes(data if same_size else data + b"x")
    before = digests(original)
    with pytest.raises(
        OutputError, match=("that differs from the one to be restored, and it is never replaced")
    ) as caught:
        revert(made / "model-marlin", original, overwrite=True)
    assert caught.value.problems[0].code == "not-empty"
    assert name in str(caught.value)
    assert digests(original) == before


def test_a_finished_conversion_is_never_replaced(made, tmp_path):
    out = tmp_path / "out"
    convert(made / "model-awq", out)
    before = digests(out)
    with pytest.raises(OutputError, match="never replaced"):
        revert(made / "model-marlin", out, overwrite=True)
    assert digests(out) == before


def states(folder):
    """Returns what `digests` does, and of every file mode, inode, links and where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            status = path.lstat()
            found[path.relative_to(folder).as_posix()] = (
                path.read_bytes(),
                status.st_mode,
                status.st_mtime_ns,
                status.st_ino,
                status.st_nlink,
                path.is_symlink() and path.readlink(),
            )
    return found


def stopped(made, folder, monkeypatch, *, after=1):
    """Reverts into a folder and stops as soon as some shards are finished; returns the names in the journal."""
    with monkeypatch.context() as patch:
        left, remember = [None] * after, OutputFolder.remember

        def stopping(out, name, finished):
            remember(out, name, finished)
            left.pop()
            if not left:
                raise KeyboardInterrupt

        patch.setattr(OutputFolder, "remember", stopping)
        with pytest.raises(KeyboardInterrupt):
            revert(made / "model-marlin", folder, overwrite=True, workers=1)
    return json.loads((folder / WORK / "journal.json").read_text())["names"]


def test_what_is_there_already_and_equal_stays_as_it_is(made, original, tmp_path):
    (original / "config.json").chmod(0o600)
    os.link(original / SHARD, tmp_path / "other name")
    elsewhere = shutil.copy(original / OTHER_SHARD, tmp_path / "elsewhere")
    (original / OTHER_SHARD).unlink()
    (original / OTHER_SHARD).symlink_to(elsewhere)
    before = states(original)
    progress = Recording()
    result = revert(made / "model-marlin", original, overwrite=True, progress=progress)
    assert states(original) == before
    assert result.files == revert(made / "model-marlin", tmp_path / "alone").files
    assert progress.stages["compare"] == [result.bytes, result.bytes]


def test_the_journal_names_only_what_is_new(made, original, monkeypatch):
    expected = contents(original)
    for name in (SHARD, "code/deep/modeling.py"):
        (original / name).unlink()
    before = states(original)
    assert stopped(made, original, monkeypatch) == ["code/deep/modeling.py", SHARD]
    found = states(original)
    assert {name: found[name] for name in before} == before
    (original / OTHER_SHARD).unlink()  # which the next run has to make too
    revert(made / "model-marlin", original)  # goes on, also where that is not said again
    assert contents(original) == expected


def test_a_stopped_overwrite_gives_no_later_run_a_file_of_the_user(made, original, tmp_path, monkeypatch):
    make_source(tmp_path / "other", seed=1)
    convert(tmp_path / "other", tmp_path / "other-marlin")
    (original / SHARD).unlink()
    stopped(made, original, monkeypatch)
    before = states(original)
    with pytest.raises(OutputError, match="which awq2marlin did not write"):
        convert(tmp_path / "other", original, overwrite=True)
    with pytest.raises(OutputError, match="differs from the one to be restored"):
        revert(tmp_path / "other-marlin", original, overwrite=True)
    assert states(original) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_user_edits_after_a_stopped_overwrite_is_not_replaced(made, original, monkeypatch, overwrite):
    (original / SHARD).unlink()
    stopped(made, original, monkeypatch)
    config = original / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    before = states(original)
    with pytest.raises(OutputError, match="differs from the one to be restored"):
        revert(made / "model-marlin", original, overwrite=overwrite)
    assert states(original) == before


def test_nothing_is_left_of_an_unfinished_conversion(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(made / "model-awq", out)
    assert {"README.md", MANIFEST} <= contents(out).keys()
    with pytest.raises(OutputError, match="unfinished run from another source"):
        revert(made / "model-marlin", out)
    revert(made / "model-marlin", out, overwrite=True)
    assert contents(out) == contents(made / "model-awq")
    convert(out, tmp_path / "again")


def test_a_stopped_run_goes_on_with_what_it_had_and_says_so(made, tmp_path, monkeypatch):
    left, out = [1], tmp_path / "out"

    def stop(task, progress):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return rewrite_shard(task, progress)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "rewrite_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            revert(made / "model-marlin", out, workers=1)
    assert finished_shards(out) == [SHARD]
    result = revert(made / "model-marlin", out)
    assert result.resumed == (SHARD,)
    assert contents(out) == contents(made / "model-awq")
    assert all(len(file.sha256) == 64 for file in result.files)
