"""A warm process that runs ``awq2marlin`` in children and disturbs each at one chosen step.

Started as a script. Every line on standard input is a JSON object: ``arguments`` of the command line, ``root``
(changes below it are steps), ``trace``, ``stdout`` and ``stderr`` (files to write), and optionally ``at`` (which
step, from 0) with ``do``: ``kill``, ``interrupt``, or an errno by name. With AWQ2MARLIN_TEST_POOR in the
environment the file system is a poor one, see `poor_disk`. The answer is a line with the exit code, negative for a
signal. A step is a system call that changes the folder; the disturbance comes just before it.
"""

import errno
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import poor_disk

from awq2marlin.cli.app import main
from awq2marlin.io import stream

if os.environ.get("AWQ2MARLIN_TEST_TOY"):
    import tests.formats.toy  # noqa: F401 - registers itself

#: Linux's flag, which names a folder and opens a file without a name in it.
O_TMPFILE = getattr(os, "O_TMPFILE", -1)


class Stepper:
    """Counts the steps of this process, writes them down, and acts at one of them."""

    def __init__(self, request):
        self.root = str(Path(request["root"]).resolve())
        self.at, self.do = request.get("at"), request.get("do")
        self.trace = os.open(request["trace"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        self.count, self.lock = 0, threading.Lock()

    def install(self):
        write = stream._write_exactly

        def stepping_write(target, offset, buffer):
            self.step("write", target.name)
            write(target, offset, buffer)

        def stepping_fsync(descriptor):
            self.step(
                "fsync", Path(f"/proc/self/fd/{descriptor}").readlink()
            )  # a kill loses nothing that is not synced

        stream._write_exactly, os.fsync = stepping_write, stepping_fsync
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event == "open" and not isinstance(arguments[0], int):
            if arguments[2] & O_TMPFILE == O_TMPFILE or ".filelock-probe" in os.fsdecode(arguments[0]):
                return  # how the library of the lock asks what a folder can do; it leaves nothing, and may fail
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.step(event, arguments[0])
        elif event == "os.rename":
            self.step(event, arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            self.step(event, arguments[0])

    def step(self, event, path):
        path = str(Path(os.fsdecode(path)).absolute())
        if path != self.root and not path.startswith(self.root + os.sep):
            return
        with self.lock:
            now, self.count = self.count, self.count + 1
            os.write(self.trace, f"{event} {os.path.relpath(path, self.root)}\n".encode())
        if now == self.at:
            self.act()

    def act(self):
        if self.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.do == "interrupt":
            signal.raise_signal(signal.SIGINT)
        else:
            number = getattr(errno, self.do)
            raise OSError(number, os.strerror(number))


def child(request):
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Stepper(request).install()
    if poor := os.environ.get("AWQ2MARLIN_TEST_POOR"):
        poor_disk.make(*poor.split())
    code = main(request["arguments"])
    sys.stdout.flush()
    os._exit(code)  # without tidying up the parent's libraries, which takes longer than the run


def serve():
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    warm = Path(sys.argv[1])  # what a conversion imports and compiles is done once, before the first child
    for arguments in (["convert", warm / "source", warm / "out", "-q"], ["revert", warm / "out", warm / "back", "-q"]):
        if main([str(each) for each in arguments]) != 0:
            sys.exit("the warm-up failed")
    gc.freeze()  # a child that looks for cycles would copy every page that it looks at: half of its time
    serve()
