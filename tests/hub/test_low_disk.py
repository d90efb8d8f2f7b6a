"""One shard is fetched while another is converted; with little disk never more than two are there."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from awq2marlin import DifferenceError, convert
from awq2marlin.pipeline import run as pipeline
from awq2marlin.pipeline.shard import rewrite_shard

from ..faults.helpers import WORK, contents, finished_shards
from .conftest import REPO, SHARDS, shard_names

pytestmark = pytest.mark.usefixtures("no_waiting", "repository")

#: Journal, lock, and what the client notes of each file it fetches.
NOTES = 40_000


def bytes_below(*folders):
    """Returns the bytes of all files below the folders; those that vanish meanwhile count nothing."""
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(Path(parent, name)).st_size
                except FileNotFoundError:
                    continue
    return total


class Watch:
    """Measures the peak of the bytes below folders, again and again in a thread of its own and when asked."""

    def __init__(self, *folders):
        self.folders, self.peak, self._stop = folders, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def look(self):
        self.peak = max(self.peak, bytes_below(*self.folders))

    def _run(self):
        while not self._stop.wait(0.001):
            self.look()


class Steps:
    """Lets each conversion of a shard begin and end when told; notes when it did."""

    def __init__(self, monkeypatch, before_end):
        self.begun, self.ended, self._before_end = {}, {}, before_end
        monkeypatch.setattr(pipeline, "rewrite_shard", self)

    def __call__(self, task, progress=None):
        number = int(task.plan.name[6:11])
        self.begun[number] = time.monotonic()
        done = rewrite_shard(task, progress)
        self._before_end(number)
        self.ended[number] = time.monotonic()
        return done


def fetches(hub):
    """The download of each shard, by its number."""
    return {
        int(each.path.split("/")[-1][6:11]): each
        for each in hub.requests("GET", "/cdn/*.safetensors")
        if not each.range
    }


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "this never happens"
        time.sleep(0.001)


@pytest.mark.parametrize("low_disk", [False, True])
def test_the_next_shard_is_fetched_while_one_is_converted(hub, tmp_path, monkeypatch, low_disk):
    """No conversion ends before the download of the next shard has begun: it waits forever if there is no overlap."""
    steps = Steps(monkeypatch, lambda number: wait_for(lambda: number == SHARDS or number + 1 in fetches(hub)))
    convert(REPO, tmp_path / "out", workers=1, low_disk=low_disk)
    loads = fetches(hub)
    for number in range(1, SHARDS):
        assert loads[number + 1].begun < steps.ended[number]
    assert list(loads) == sorted(loads)
    for number in range(1, SHARDS + 1):
        assert loads[number].ended < steps.begun[number]


def test_with_little_disk_a_third_shard_waits_until_the_first_is_gone(hub, tmp_path, monkeypatch):
    place = tmp_path / "out" / WORK / "source"

    def second_is_here(number):
        wait_for(lambda: number == SHARDS or (number + 1 in fetches(hub) and fetches(hub)[number + 1].ended))
        time.sleep(0.05)
        assert number + 2 not in fetches(hub)
        assert len(list(place.glob("*.safetensors"))) <= 2

    Steps(monkeypatch, second_is_here)
    convert(REPO, tmp_path / "out", low_disk=True)


@pytest.mark.parametrize("verify", [8, "all", "none"])
def test_little_disk_needs_the_output_and_two_shards(hub, tmp_path, monkeypatch, source, verify):
    out, home = tmp_path / "out", Path(os.environ["HF_HOME"])

    def look_when_the_next_is_here(number):
        wait_for(lambda: number == SHARDS or (number + 1 in fetches(hub) and fetches(hub)[number + 1].ended))
        time.sleep(0.02)
        watch.look()

    with Watch(out, home) as watch:
        Steps(monkeypatch, look_when_the_next_is_here)
        result = convert(REPO, out, low_disk=True, verify=verify)
    sizes = sorted((source / name).stat().st_size for name in shard_names(source))
    output = bytes_below(out)
    assert output + sizes[0] < watch.peak <= output + sum(sizes[-2:]) + NOTES
    assert watch.peak < output + sum(sizes) - NOTES, "a run that kept all of them would be seen"
    assert not (out / WORK).exists()
    assert not list(home.rglob("*.safetensors"))
    assert len(result.verified) == {8: 8, "all": 28, "none": 0}[verify]


def spoiling(name):
    """Returns a `rewrite_shard` that puts a wrong value into the first quantized weight of one shard."""

    def wrong(task, progress=None):
        done = rewrite_shard(task, progress)
        if task.plan.name == name:
            data = bytearray(done.partial.read_bytes())
            tensor = next(each for each in task.plan.target.tensors.values() if each.name.endswith(".qweight"))
            data[task.plan.target.data_start + tensor.start] ^= 1
            done.partial.write_bytes(data)
        return done

    return wrong


def test_a_shard_is_compared_before_its_source_goes(tmp_path, monkeypatch, source):
    """A wrong value is found while the source is still there; then nothing that is finished is trusted any more."""
    name = shard_names(source)[2]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "rewrite_shard", spoiling(name))
        with pytest.raises(DifferenceError, match="value at row 0, column 0"):
            convert(REPO, out, low_disk=True, verify="all")
    assert (out / WORK / "source" / name).exists()
    assert not (out / "config.json").exists()
    assert finished_shards(out) == []
    assert convert(REPO, out, low_disk=True, verify="all").resumed == ()
    convert(REPO, tmp_path / "expected", verify="all")
    assert contents(out) == contents(tmp_path / "expected")


def fail_at(hub, number):
    """Lets the download of one shard fail until the hub behaves; its header comes."""
    return hub.misbehave(f"/cdn/*0000{number}-of*", method="GET", after=1, times=None, status=403)


def test_a_shard_that_was_compared_otherwise_is_made_again(hub, tmp_path):
    out = tmp_path / "out"
    fail_at(hub, 3)
    with pytest.raises(Exception, match="may not"):
        convert(REPO, out, low_disk=True, verify="none")
    assert len(finished_shards(out)) == 2
    hub.behave()
    assert convert(REPO, out, low_disk=True, verify="all").resumed == ()


def test_a_run_with_little_disk_can_be_finished_by_one_without_and_the_other_way(hub, tmp_path):
    convert(REPO, tmp_path / "expected")
    shutil.rmtree(os.environ["HF_HOME"])
    for first, second in ((True, False), (False, True)):
        out = tmp_path / f"out{first}"
        fault = fail_at(hub, 3)
        with pytest.raises(Exception, match="may not"):
            convert(REPO, out, low_disk=first, workers=1)  # more would be stopped in the middle of the first two
        assert fault.struck
        hub.behave()
        assert len(convert(REPO, out, low_disk=second).resumed) == 2
        assert contents(out) == contents(tmp_path / "expected")
        shutil.rmtree(os.environ["HF_HOME"])


def test_half_a_download_of_a_killed_run_is_removed(hub, tmp_path):
    out = tmp_path / "out"
    fail_at(hub, 3)
    with pytest.raises(Exception, match="may not"):
        convert(REPO, out, low_disk=True)
    left = out / WORK / "source" / ".cache" / "huggingface" / "download" / "x.1234.incomplete"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    hub.behave()
    fail_at(hub, 3)
    with pytest.raises(Exception, match="may not"):
        convert(REPO, out, low_disk=True)
    assert not left.exists()
    hub.behave()
    assert len(convert(REPO, out, low_disk=True).resumed) == 2
    assert not (out / WORK).exists()


def test_a_place_that_is_a_link_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / "source").symlink_to(elsewhere)
    with pytest.raises(Exception, match="needs this name for its own folder"):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert list(elsewhere.iterdir()) == []


def test_a_source_shard_that_was_here_already_is_not_fetched_again(hub, tmp_path):
    """The run stops after the second shard came and before it is converted."""
    out = tmp_path / "out"

    def stop(task, progress=None):
        if "00002" in task.plan.name:
            raise KeyboardInterrupt
        return rewrite_shard(task, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "rewrite_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(REPO, out, low_disk=True)
    assert finished_shards(out) == [f"model-00001-of-0000{SHARDS}.safetensors"]
    hub.forget_requests()
    convert(REPO, out, low_disk=True)
    assert not {1, 2} & set(fetches(hub))


def test_a_local_source_is_never_removed(tmp_path, source):
    before = contents(source)
    convert(source, tmp_path / "out", low_disk=True)
    convert(source, tmp_path / "expected")
    assert contents(source) == before
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_low_disk_and_a_device_are_refused_together(tmp_path, run):
    with pytest.raises(ValueError, match="low_disk removes"):
        convert(REPO, tmp_path / "out", low_disk=True, device="cpu")
    outcome = run("convert", REPO, "--low-disk", "--device", "cpu")
    assert outcome.code == 2
    assert "use 'verify' afterwards" in json.loads(outcome.out)["errors"][0]["message"]
