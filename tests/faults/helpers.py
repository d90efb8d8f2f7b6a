"""What the fault tests share: small checkpoints, running the command line, comparing folders."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import awq2marlin
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.cli.app import main

WORK = ".awq2marlin"
MANIFEST = "marlin_manifest.json"
PATHS = {"PYTHONPATH": str(Path(awq2marlin.__file__).parents[1])}
ENVIRONMENT = {**os.environ, **PATHS}
REPORT_KEYS = {
    "schema_version",
    "command",
    "status",
    "exit_code",
    "source",
    "output",
    "files",
    "modules",
    "bytes",
    "seconds",
    "warnings",
    "left_behind",
    "details",
    "errors",
}
STATUS = {0: "done", 1: "failed", 2: "usage", 3: "difference", 130: "interrupted", 143: "interrupted"}


def make_source(folder, *, size_k=128, size_n=64, layers=1, shards=2, seed=0, **options):
    """Writes a checkpoint whose side files include one in a subfolder."""
    modules = {
        f"model.layers.{layer}.mlp.{name}": (size_k, size_n)
        for layer in range(layers)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    weights = {"model.embed_tokens.weight": (8, size_k), "model.norm.weight": (size_k,)}
    write_checkpoint(folder, Recipe(modules, weights, shards=shards, seed=seed, **{"group_size": 64, **options}))
    (folder / "code" / "deep").mkdir(parents=True)
    (folder / "code" / "deep" / "modeling.py").write_text("# the model's code\n")
    return folder


def contents(folder):
    """Returns every file's bytes by name; empty if there is no such folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def digests(folder):
    """Returns every file's SHA-256, length and modification time: shows that a folder was not touched."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Outcome:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def report(self):
        """The JSON object, checked to be one, complete, and to agree with the exit code."""
        document = json.loads(self.out)
        assert set(document) == REPORT_KEYS
        assert (document["schema_version"], document["exit_code"]) == (1, self.code)
        assert document["status"] == STATUS[self.code]
        assert bool(document["errors"]) == (self.code != 0)
        for error in document["errors"]:
            assert set(error) == {"file", "tensor", "code", "message"}
            assert error["code"]
            assert error["message"]
        return document

    @property
    def error(self):
        """The one error of the JSON object."""
        (error,) = self.report["errors"]
        return error


def refused(outcome, code=1):
    """Checks that a run failed with one clear message and no traceback; returns its one error."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, outcome.err
    assert outcome.error["message"] in messages[0]
    return outcome.error


def run_process(*arguments, **options):
    """Runs the command line in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env={**os.environ, **PATHS}, timeout=60, **options
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def command(*arguments):
    return [sys.executable, "-m", "awq2marlin", *map(str, arguments)]


def start(*arguments):
    """Starts the command line; `stop_when` or `finish` ends it."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **PATHS},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored, where the tests run in the background
    )


def stop_when(process, condition, number=signal.SIGKILL):
    """Sends a signal as soon as ``condition()`` holds, or not at all if the process ends before."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the process neither ended nor did what was waited for"
        time.sleep(0.0005)
    process.send_signal(number)
    return finish(process)


def finish(process):
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


class Stepped:
    """Runs the command line in children of one warm process; see `stepper`."""

    def __init__(self, folder, **environment):
        make_source(folder / "source")
        self._folder = folder
        script = Path(__file__).with_name("stepper.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
        )

    def run(self, *arguments, root, at=None, do="kill"):
        """Runs one command, disturbed at step ``at`` of those below ``root``."""
        files = {name: self._folder / name for name in ("stdout", "stderr", "trace")}
        request = {"arguments": list(map(str, arguments)), "root": str(root), "at": at, "do": do}
        self._server.stdin.write(json.dumps(request | {name: str(path) for name, path in files.items()}) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Outcome(code, files["stdout"].read_text(), files["stderr"].read_text())

    @property
    def trace(self):
        """The steps of the last run."""
        return (self._folder / "trace").read_text().splitlines()

    def close(self):
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


def run_here(capsys, *arguments):
    """Runs the command line in this process."""
    capsys.readouterr()
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def finished_shards(out):
    """Returns the shards that the journal of an unfinished folder remembers."""
    journal = out / WORK / "journal.json"
    return sorted(json.loads(journal.read_text())["finished"]) if journal.exists() else []


#: After a disturbance in the last instant the work is done; a rerun must then say so and touch nothing.
FINISHED = {
    "convert": "the folder holds a finished conversion",
    "revert": "the folder is not empty",
}


def check_rerun(outcome, out, expected, command="convert"):
    """The same command completed the folder, or found it complete."""
    if outcome.code:
        assert outcome.code == 1
        assert FINISHED[command] in outcome.error["message"]
    assert contents(out) == expected
    assert not (out / WORK).exists()


def check_not_loadable_unless_whole(out, *wholes):
    """A config.json promises a whole checkpoint: one of those given."""
    if (out / "config.json").exists():
        found = contents(out)
        assert any(found.items() >= whole.items() for whole in wholes)
