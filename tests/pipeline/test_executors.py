"""Shards done by an executor: threads, processes, one that dies, one that gives up, one that sees other files."""

import inspect
import os
import pickle
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from awq2marlin import convert, errors
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.errors import Awq2MarlinError, CheckpointError, ExecutorError, Problem
from awq2marlin.io.workers import run_on_executor
from awq2marlin.pipeline import run as pipeline
from awq2marlin.pipeline.plan import plan_conversion
from awq2marlin.pipeline.shard import ShardTask, rewrite_shard

from ..faults.helpers import WORK, contents, finished_shards

SHARDS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of four shards and its conversion by threads of this process."""
    folder = tmp_path_factory.mktemp("executors")
    write_checkpoint(folder / "source", replace(llama_recipe(128, 256, 4, 64, 32, group_size=64), shards=SHARDS))
    convert(folder / "source", folder / "marlin")
    return folder


@pytest.fixture(scope="module")
def processes():
    """Two processes that were started anew, so that all that crosses is pickled."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


class Told:
    """Notes what progress is told."""

    def __init__(self):
        self.total, self.steps = {}, []

    def start(self, what, total):
        self.total[what] = total

    def advance(self, count):
        self.steps.append((count, threading.current_thread()))

    def finish(self):
        pass

    def note(self, text):
        raise AssertionError(text)


# --- the same bytes by any executor -----------------------------------------------------------------------


def test_threads_of_the_caller_give_the_same_bytes(made, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        result = convert(made / "source", tmp_path / "out", executor=pool)
        assert pool.submit(int, "7").result() == 7, "the executor stays open"
    assert contents(tmp_path / "out") == contents(made / "marlin")
    assert len(result.verified) == 8


def test_processes_give_the_same_bytes_also_where_the_output_is_relative(made, tmp_path, processes, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the processes stay where they were started
    convert(made / "source", "out", executor=processes, workers=2)
    assert contents(tmp_path / "out") == contents(made / "marlin")


def test_progress_comes_back_to_the_calling_thread_and_adds_up(made, tmp_path, processes):
    told = Told()
    convert(made / "source", tmp_path / "out", executor=processes, verify="none", progress=told)
    assert sum(count for count, _ in told.steps) == told.total["convert"]
    assert {thread for _, thread in told.steps} == {threading.current_thread()}
    assert len(told.steps) == SHARDS


def test_a_task_is_picklable_and_pure(made, tmp_path):
    shard = plan_conversion(open_checkpoint(made / "source")).shards[0]
    task = pickle.loads(pickle.dumps(ShardTask(shard, made / "source" / shard.name, tmp_path / "x.partial", 1)))
    once, again = rewrite_shard(task), pickle.loads(pickle.dumps(rewrite_shard(task)))
    assert once.partial != again.partial, "two attempts never write one file"
    for done in (once, again):
        assert done.partial.read_bytes() == (made / "marlin" / shard.name).read_bytes()
    assert replace(once, partial=again.partial) == again


# --- what goes wrong --------------------------------------------------------------------------------------


def test_an_error_in_a_process_comes_back_as_it_is(made, tmp_path, processes, monkeypatch):
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_convert_a_changed_file, tmp_path))
    with pytest.raises(CheckpointError) as caught:
        convert(made / "source", tmp_path / "out", executor=processes)
    assert caught.value.problems[0].code == "changed"
    assert caught.value.problems[0].file.startswith("model-0000")
    assert not (tmp_path / "out" / "config.json").exists()


def _convert_a_changed_file(folder, task):
    copy = folder / task.plan.name
    copy.write_bytes(task.source.read_bytes() + b"x")
    return rewrite_shard(replace(task, source=copy))


def _die_on(name, marker, task):
    """Converts a shard, but kills the process at one of them, the first time."""
    if task.plan.name == name and not marker.exists():
        marker.touch()
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    return rewrite_shard(task)


def test_a_killed_process_is_told_in_words_and_the_same_call_resumes(made, tmp_path, monkeypatch):
    name = sorted(path.name for path in (made / "source").glob("*.safetensors"))[-1]
    monkeypatch.setattr(pipeline, "rewrite_shard", partial(_die_on, name, tmp_path / "died"))
    out = tmp_path / "out"
    with (
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
        pytest.raises(ExecutorError, match="run the same command again to continue") as caught,
    ):
        convert(made / "source", out, executor=pool)
    assert caught.value.problems[0].code == "broken-executor"
    assert not (out / "config.json").exists()
    finished = finished_shards(out)
    assert 0 < len(finished) < SHARDS
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert sorted(convert(made / "source", out, executor=pool).resumed) == finished
    assert contents(out) == contents(made / "marlin")
    assert not (out / WORK).exists()


def test_an_executor_that_gives_up_is_told_in_words(made, tmp_path):
    class GivesUp(Executor):
        def submit(self, _function, *_args, **_kwargs):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(ExecutorError, match="CancelledError"):
        convert(made / "source", tmp_path / "out", executor=GivesUp())


def test_a_worker_that_sees_other_files_is_told(made, tmp_path, monkeypatch):
    def elsewhere(task):
        done = rewrite_shard(task)
        done.partial.unlink()
        return done

    monkeypatch.setattr(pipeline, "rewrite_shard", elsewhere)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError, match="storage that all workers share"):
        convert(made / "source", tmp_path / "out", executor=pool)


def test_a_worker_of_another_version_is_told(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ShardTask", partial(ShardTask, version="0.0.1"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError, match=r"started with 0\.0\.1"):
        convert(made / "source", tmp_path / "out", executor=pool)


ERRORS = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Awq2MarlinError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    problems = [Problem("file", "tensor", "changed", "message"), Problem("a", "", "changed", "other")]
    error = kind(problems)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.problems, str(copy), copy.exit_code) == (error.problems, str(error), error.exit_code)


# --- taking tasks -----------------------------------------------------------------------------------------


def test_tasks_are_taken_when_there_is_room_for_them():
    release = threading.Semaphore(0)
    taken, done = [], []

    def tasks():
        for number in range(6):
            taken.append(number)
            yield number

    def work(number):
        release.acquire()
        return number

    with ThreadPoolExecutor(6) as pool:
        run = threading.Thread(target=run_on_executor, args=(pool, work, tasks(), 2, done.append))
        run.start()
        for finished in range(6):
            deadline = time.monotonic() + 10
            while len(taken) < min(finished + 2, 6):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(taken) == min(finished + 2, 6)
            release.release()
        run.join()
    assert sorted(done) == list(range(6))


def test_waiting_for_a_task_holds_up_no_result():
    """The second task comes only after the first result was taken up."""
    finished = threading.Event()

    def tasks():
        yield 1
        assert finished.wait(10)
        yield 2

    done = []

    def finish(number):
        done.append(number)
        finished.set()

    with ThreadPoolExecutor(2) as pool:
        run_on_executor(pool, abs, tasks(), 2, finish)
    assert done == [1, 2]


def test_after_a_failure_nothing_is_begun_or_taken_any_more():
    begun, taken = [], []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield number

    def work(number):
        begun.append(number)
        if number == 2:
            raise KeyError("this one")
        time.sleep(0.05)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyError, match="this one"):
            run_on_executor(pool, work, tasks(), 8, lambda _: None)
        time.sleep(0.2)
    assert begun[:3] == [0, 1, 2]
    assert len(begun) <= 4, "those that had not begun were cancelled"
    assert len(taken) <= 12


def test_an_error_of_the_tasks_themselves_is_raised():
    def tasks():
        yield 1
        raise Awq2MarlinError(Problem("", "", "changed", "no more"))

    with ThreadPoolExecutor(1) as pool, pytest.raises(Awq2MarlinError, match="no more"):
        run_on_executor(pool, abs, tasks(), 1, lambda _: None)


def test_an_error_of_the_last_step_is_raised_and_the_rest_cancelled():
    def finish(_):
        raise OSError(28, "no space")

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="no space"):
        run_on_executor(pool, abs, range(100), 4, finish)


def test_nothing_to_do_is_done():
    with ThreadPoolExecutor(1) as pool:
        run_on_executor(pool, abs, [], 1, Path.unlink)
