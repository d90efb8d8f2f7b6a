"""Shards on a Dask cluster of processes: the same bytes, also where a worker is killed in mid-file."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from awq2marlin import convert, convert_many
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.errors import ExecutorError, Problem
from awq2marlin.io.workers import run_on_executor
from awq2marlin.pipeline import dask as cluster
from awq2marlin.pipeline import run as pipeline
from awq2marlin.pipeline.dask import dask_executor, unseen
from awq2marlin.pipeline.shard import rewrite_shard
from awq2marlin.progress import Silence
from tests.skips import NO_DASK

from ..faults.helpers import WORK, contents, run_here

distributed = pytest.importorskip("distributed", reason=NO_DASK)


@pytest.fixture(scope="module")
def two_processes():
    """A cluster of two processes on loopback."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as running:
        yield running


@pytest.fixture
def dask(two_processes):
    """That cluster, with both of its workers: those that an earlier test has killed are started again."""
    deadline = time.monotonic() + 60
    while len(two_processes.scheduler.workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return two_processes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of four shards of several pieces each, and its conversion in this process."""
    folder = tmp_path_factory.mktemp("dask")
    modules = {f"model.layers.{layer}.mlp.down_proj": (1024, 4096) for layer in range(4)}
    write_checkpoint(folder / "source", Recipe(modules, shards=4))
    convert(folder / "source", folder / "marlin")
    return folder


@pytest.fixture
def run(capsys):
    return lambda *arguments: run_here(capsys, *arguments, "--json")


def test_convert_and_batch_on_a_cluster_give_the_same_bytes(dask, made, models, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = dask.scheduler_address
    outcome = run("convert", made / "source", "out", "--dask", address)
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "out") == contents(made / "marlin")
    (tmp_path / "list").write_text("".join(f"{source}\n" for source in models.sources[:6]))
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": address}))
    outcome = run("batch", "list", "--out-dir", "many", "--jobs", 3, "--dask", "scheduler.json")
    assert (outcome.code, outcome.report["details"]["done"]) == (1, 5), outcome.err
    for path in (tmp_path / "many").iterdir():
        assert contents(path) == models.expected[path.name.removesuffix("-marlin")]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def _die_in_mid_file(marker, task):
    """Converts a shard; the first to come this far kills its process when half of the file is written."""

    def die(_count):
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return rewrite_shard(task, die)


def test_a_worker_killed_in_mid_file_loses_nothing(dask, made, tmp_path, monkeypatch):
    marker = tmp_path / "died"
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_die_in_mid_file, marker))
    out = tmp_path / "out"
    with dask_executor(dask.scheduler_address, [made / "source"], [out]) as executor:
        result = convert(made / "source", out, executor=executor)
    assert marker.exists(), "no worker died"
    assert result.resumed == ()
    assert contents(out) == contents(made / "marlin")
    assert not (out / WORK).exists()


def test_a_shard_that_kills_every_worker_fails_its_item_and_no_other(dask, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_always_die, "model-01"))
    with dask_executor(dask.scheduler_address, [], [tmp_path]) as executor:
        result = convert_many(models.sources[:3], executor=executor, record="record")
    assert [item.status for item in result.items] == ["done", "failed", "done"]
    assert result.items[1].errors[0].code == "killed-workers"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert convert_many(models.sources[:3], record="record", retry_failed=True).exit_code == 0
    assert contents(Path("model-01-marlin")) == models.expected["model-01"]


def _always_die(name, task):
    if task.source.parent.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return rewrite_shard(task)


def test_an_equal_task_of_a_later_run_is_done_again(dask, models, tmp_path):
    """Dask takes equal tasks for one while anybody holds the first one's result."""
    client = distributed.Client(dask.scheduler_address, set_as_default=False)
    kept = []

    class Keeping(Executor):
        def submit(self, function, *arguments):
            kept.append(client.submit(function, *arguments))
            future = Future()
            kept[-1].add_done_callback(lambda done: future.set_result(done.result()))
            return future

    try:
        for _ in range(2):
            convert(models.sources[0], tmp_path / "out", executor=Keeping())
            assert contents(tmp_path / "out") == models.expected["model-00"]
            shutil.rmtree(tmp_path / "out")
    finally:
        client.close()
    assert len({future.key for future in kept}) == len(kept) == 4


# --- what is checked before any work ----------------------------------------------------------------------


def refused(run, made, tmp_path, address):
    outcome = run("convert", made / "source", tmp_path / "out", "--dask", address)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".awq2marlin*"))
    return outcome.error


def test_an_address_where_nobody_listens_is_refused_at_once(run, made, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    error = refused(run, made, tmp_path, f"tcp://127.0.0.1:{port}")
    assert time.monotonic() - started < 5
    assert (error["code"], error["file"]) == ("no-cluster", f"tcp://127.0.0.1:{port}")
    assert "nothing listens at this address" in error["message"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "no such scheduler file, and not an address like tcp://HOST:8786"),
        ("/shared/dask.json", "no such scheduler file"),
        ("tcp://host", "neither the address of a Dask scheduler"),
        ("file", "this is not a scheduler file: it has no address"),
    ],
)
def test_what_is_no_address_is_refused(run, made, tmp_path, address, said):
    if address == "file":
        address = tmp_path / "scheduler.json"
        address.write_text("[]")
    error = refused(run, made, tmp_path, address)
    assert (error["code"], error["file"]) == ("no-cluster", str(address))
    assert said in error["message"]


def test_a_service_that_is_no_scheduler_is_given_up(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        error = refused(run, made, tmp_path, f"tcp://127.0.0.1:{server.getsockname()[1]}")
        assert (error["code"], "no Dask scheduler answers" in error["message"]) == ("no-cluster", True)


def test_a_cluster_without_workers_is_given_up(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.5)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as empty:
        error = refused(run, made, tmp_path, empty.scheduler_address)
        file = tmp_path / "dask.json"
        file.write_text(json.dumps({"address": empty.scheduler_address}))
        by_file = refused(run, made, tmp_path, file)
    assert (error["code"], "has had no workers" in error["message"]) == ("no-workers", True)
    assert f"('dask worker {empty.scheduler_address}')" in error["message"]
    assert f"('dask worker --scheduler-file {file}')" in by_file["message"]


def test_a_cluster_whose_workers_have_all_gone_is_told_and_goes_on_with_new_ones(made, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 0.1)
    notes = []

    class Told(Silence):
        def note(self, text):
            notes.append(text)
            running.scale(1)

    with distributed.LocalCluster(n_workers=1, dashboard_address=":0", silence_logs=50, processes=False) as running:
        monkeypatch.setattr(cluster, "_connect", lambda _: distributed.Client(running, set_as_default=False))
        with dask_executor("tcp://0", [], [], Told()) as executor:
            running.scale(0)
            convert(made / "source", tmp_path / "out", executor=executor)
    assert notes == ["tcp://0 has no workers any more; waiting for new ones (Ctrl-C stops; a later run continues)"]
    assert contents(tmp_path / "out") == contents(made / "marlin")


def test_a_worker_of_another_version_or_without_the_package_is_refused(dask, run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "__version__", "0.0.7")
    outcome = run("convert", made / "source", tmp_path / "out", "--dask", dask.scheduler_address)
    assert [error["code"] for error in outcome.report["errors"]] == ["other-version"] * 2
    assert "install 0.0.7, the version here, on all of them" in outcome.err
    with pytest.raises(ExecutorError, match="this worker has no awq2marlin"):
        cluster._check_versions({"tcp://a:1": ModuleNotFoundError("No module named 'awq2marlin'")})
    assert not (tmp_path / "out").exists()


def test_workers_that_see_other_files_are_refused(dask, run, made, tmp_path, monkeypatch):
    path = tmp_path / "here"
    path.write_text("one")
    assert unseen([(str(path), b"one"), (str(path), b"other"), (str(tmp_path / "not" / "there"), b"")]) == [
        str(tmp_path),
        str(tmp_path / "not"),
    ]
    monkeypatch.setattr(cluster, "unseen", _sees_nothing)
    outcome = run("convert", made / "source", tmp_path / "out", "--dask", dask.scheduler_address)
    assert [error["code"] for error in outcome.report["errors"]] == ["not-shared"] * 2
    assert "must be on storage that all workers share, under the same path" in outcome.err
    assert sorted(tmp_path.iterdir()) == [path]


def _sees_nothing(probes):
    return [str(Path(path).parent) for path, _ in probes]


def test_a_worker_that_joins_later_and_sees_other_files_is_told(made, tmp_path, monkeypatch):
    def elsewhere(task):
        shutil.move(tmp_path / "out" / WORK, tmp_path / "gone")
        try:
            return rewrite_shard(task)
        finally:
            shutil.move(tmp_path / "gone", tmp_path / "out" / WORK)

    monkeypatch.setattr(pipeline, "rewrite_shard", elsewhere)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError, match="be on storage that all workers") as caught:
        convert(made / "source", tmp_path / "out", executor=pool)
    assert caught.value.problems[0].code == "not-shared"


def test_dask_that_is_not_installed_is_told(run, made, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    error = refused(run, made, tmp_path, "tcp://127.0.0.1:1")
    assert (error["code"], "pip install '.[dask]'" in error["message"]) == ("no-dask", True)


# --- done twice -------------------------------------------------------------------------------------------


class Twice(Executor):
    """Gives every task to two threads, and takes what the first returns; the other may end much later."""

    def __init__(self, pool):
        self.pool, self.all = pool, []

    def submit(self, function, *arguments):
        first = Future()

        def offer(done):
            with lock:
                if not first.done():
                    first.set_result(done.result())

        lock = threading.Lock()
        for _ in range(2):
            self.all.append(self.pool.submit(function, *arguments))
            self.all[-1].add_done_callback(offer)
        return first


def _late(barrier, task):
    """Two at once; the second ends only when the whole conversion has."""
    if barrier.wait() == 1:
        return rewrite_shard(task)

    def wait(_count):
        late.wait(10)

    return rewrite_shard(task, wait)


late = threading.Event()


def test_tasks_done_twice_at_the_same_time_and_finished_late_harm_nothing(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_late, threading.Barrier(2)))
    late.clear()
    with ThreadPoolExecutor(4) as pool:
        executor = Twice(pool)
        convert(models.sources[0], out, executor=executor)
        assert contents(out) == models.expected["model-00"]
        late.set()
    assert [task.exception() for task in executor.all] == [None] * 4
    assert contents(out) == models.expected["model-00"]
    assert not (out / WORK).exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CancelledError(), "broken-executor"),
        (type("KilledWorker", (Exception,), {})("x"), "killed-workers"),
        (ModuleNotFoundError("No module named 'awq2marlin'", name="awq2marlin"), "other-version"),
    ],
)
def test_what_executors_raise_is_told_in_words(error, code):
    def fail(_):
        raise error

    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError) as caught:
        run_on_executor(pool, fail, [1], 1, lambda _: None)
    assert isinstance(caught.value.problems[0], Problem)
    assert caught.value.problems[0].code == code
