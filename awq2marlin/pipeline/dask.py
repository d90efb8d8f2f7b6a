"""An existing Dask cluster as an executor: joined, checked early, and its ways to fail told in words.

Whether workers have this package, in this version, and see the same files, is asked before any work begins.
Workers that join later are asked by each task they get (`shard.rewrite_shard`).
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from awq2marlin._version import __version__
from awq2marlin.errors import CheckpointError, ExecutorError, Problem, printable, some_of
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.hub.name import HubName
from awq2marlin.hub.repository import hub_cache
from awq2marlin.installing import how_to_install
from awq2marlin.io.strict_json import parse_json
from awq2marlin.pipeline.journal import WORK_DIRECTORY
from awq2marlin.pipeline.output import PARTIAL_SUFFIX
from awq2marlin.progress import Progress, Silence

#: Seconds until a scheduler that does not answer is given up.
CONNECT_SECONDS = 10.0

#: Seconds until a cluster without workers is given up; some start their first when somebody joins.
WORKERS_SECONDS = 120.0

#: Seconds between two looks at whether there are still workers.
WATCH_SECONDS = 5.0

#: What is an address rather than a file: it names a protocol, or ends with a port.
_ADDRESS = re.compile(r"^[a-z]+://|:[0-9]+$")

_SILENT = (
    f"no Dask scheduler answers within {CONNECT_SECONDS:.0f} s; check the address, that it runs, and that "
    "no firewall blocks it"
)

#: What every worker must see: paths with the bytes that are there.
Probe = tuple[str, bytes]


@contextmanager
def dask_executor(
    address: str, sources: Iterable[Path | HubName], outputs: Iterable[Path], progress: Progress | None = None
) -> Iterator[Executor]:
    """Joins a Dask cluster for as long as the context lasts.

    Args:
        address: of the scheduler, ``tcp://HOST:PORT``, or the path of its scheduler file.
        sources: what will be read; repositories come by way of the client's cache.
        outputs: folders that will be written; need not exist.
        progress: told what is waited for.

    Yields:
        An executor that runs on the cluster.

    Raises:
        ExecutorError: if the cluster cannot be joined, has no workers, or these cannot do the work.
    """
    client, progress = _connect(address), progress or Silence()
    try:
        _wait_for_workers(client, address, progress)
        _check_versions(_ask(client, address, eval, "__import__('awq2marlin').__version__"))
        with _probes(sources, outputs) as probes:
            _check_shared(_ask(client, address, unseen, probes))
        with _told_without_workers(client, address, progress):
            yield client.get_executor(pure=False)
    finally:
        client.close()


def _failed(code: str, address: str, message: str) -> ExecutorError:
    return ExecutorError(Problem(address, "", code, message))


def _connect(address: str) -> Any:
    try:
        import distributed
        import distributed.comm.addressing as comm
    except ImportError:
        raise _failed("no-dask", "", f"--dask needs Dask: {how_to_install('dask')}") from None
    client: Any = distributed.Client  # its own signature has no types
    is_file = Path(address).is_file()
    if not is_file and not _ADDRESS.search(address):
        message = "no such scheduler file, and not an address like tcp://HOST:8786"
        raise _failed("no-cluster", address, message)
    found = _address_in(Path(address)) if is_file else address
    if not found:
        message = "this is not a scheduler file: it has no address; 'dask scheduler --scheduler-file FILE' writes one"
        raise _failed("no-cluster", address, message)
    try:
        host, port = comm.get_address_host_port(found)
    except ValueError as error:
        message = f"it is neither the address of a Dask scheduler (tcp://HOST:8786) nor its scheduler file ({error})"
        raise _failed("no-cluster", address, message) from None
    _knock(address, host, port)
    return _within_time(partial(client, found, timeout=CONNECT_SECONDS, set_as_default=False), address)


def _within_time(join: Callable[[], Any], address: str) -> Any:
    """Returns what ``join`` returns; Dask's own limit does not end the wait for a service that is none of Dask's."""
    joined: Future[Any] = Future()

    def run() -> None:
        try:
            joined.set_result(join())
        except BaseException as error:
            joined.set_exception(error)

    threading.Thread(target=run, name="join", daemon=True).start()
    try:
        return joined.result(2 * CONNECT_SECONDS)
    except (OSError, TimeoutError, FutureTimeoutError):
        raise _failed("no-cluster", address, _SILENT) from None


def _address_in(file: Path) -> str:
    """Returns what a scheduler file (JSON, as ``dask scheduler --scheduler-file`` writes it) says; "" if it is none."""
    with suppress(CheckpointError, AttributeError):
        return str(parse_json(file.read_bytes(), str(file)).get("address", ""))
    return ""


def _knock(address: str, host: str, port: int) -> None:
    """Refuses an address where nothing listens at once; Dask itself would try for long, and not say why."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        message = "nothing listens at this address; check it, or start a scheduler there ('dask scheduler')"
        raise _failed("no-cluster", address, message) from None
    except socket.gaierror:
        raise _failed("no-cluster", address, "no such host") from None
    except OSError:
        raise _failed("no-cluster", address, _SILENT) from None


def _wait_for_workers(client: Any, address: str, progress: Progress) -> None:
    if client.scheduler_info()["workers"]:
        return
    progress.note(f"{address} has no workers yet; waiting for one")
    try:
        client.wait_for_workers(1, timeout=WORKERS_SECONDS)
    except TimeoutError:
        place = f"--scheduler-file {address}" if Path(address).is_file() else address
        message = f"the cluster has had no workers for {WORKERS_SECONDS:.0f} s; start some ('dask worker {place}')"
        raise _failed("no-workers", address, message) from None


@contextmanager
def _told_without_workers(client: Any, address: str, progress: Progress) -> Iterator[None]:
    """Tells when the last worker has gone, as jobs of a batch system do: Dask waits for new ones, without a word."""
    ended = threading.Event()

    def watch() -> None:
        had_some = True
        while not ended.wait(WATCH_SECONDS):
            has_some = bool(client.scheduler_info()["workers"])
            if had_some and not has_some:
                progress.note(
                    f"{address} has no workers any more; waiting for new ones (Ctrl-C stops; a later run continues)"
                )
            had_some = has_some

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(WATCH_SECONDS)


def _ask(client: Any, address: str, function: Any, *arguments: Any) -> Mapping[str, Any]:
    """Returns by worker what a function returned there, or what it raised."""
    try:
        answers: Mapping[str, Any] = client.run(function, *arguments, on_error="return")
    except OSError as error:
        raise _failed("no-cluster", address, f"the connection was lost ({error})") from None
    return answers


def _check_versions(versions: Mapping[str, Any]) -> None:
    """Refuses workers without this package, or with another version of it."""
    problems = []
    for worker, version in sorted(versions.items()):
        if isinstance(version, ModuleNotFoundError):
            found = "this worker has no awq2marlin"
        elif version != __version__:
            found = f"this worker has awq2marlin {printable(str(version))}"
        else:
            continue
        problems.append(
            Problem(worker, "", "other-version", f"{found}; install {__version__}, the version here, on all of them")
        )
    if problems:
        raise ExecutorError(problems)


@contextmanager
def _probes(sources: Iterable[Path | HubName], outputs: Iterable[Path]) -> Iterator[list[Probe]]:
    """Yields what workers must see: the configs of the sources, and new files where the outputs go.

    New files, because a folder of the same name can exist on every machine.
    """
    probes: list[Probe] = []
    folders = {_probe_folder(Path(os.path.realpath(output))) for output in outputs}
    for source in sources:
        if isinstance(source, HubName):
            folders.add(_probe_folder(hub_cache()))
            continue
        with suppress(OSError):  # a source that cannot be read is told by its conversion
            path = Path(os.path.realpath(source)) / CONFIG_FILENAME
            probes.append((str(path), path.read_bytes()))
    made: list[Path] = []
    try:
        for folder in folders:
            token = secrets.token_hex(16)
            path = folder / f".awq2marlin-{token}{PARTIAL_SUFFIX}"
            with suppress(PermissionError):  # what may not be written is told by the conversion
                path.write_text(token)
                made.append(path)
                probes.append((str(path), token.encode()))
        yield probes
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _probe_folder(output: Path) -> Path:
    """Returns where a file does not disturb: an unfinished output's own folder, else the nearest one above it."""
    work = output / WORK_DIRECTORY
    return work if work.is_dir() else next(each for each in output.parents if each.is_dir())


def unseen(probes: Sequence[Probe]) -> list[str]:
    """Returns the folders of those files that this process does not see as they are; runs on the workers.

    Args:
        probes: paths with the bytes that are there.
    """
    missing = []
    for path, content in probes:
        try:
            seen = Path(path).read_bytes() == content
        except OSError:
            seen = False
        if not seen:
            missing.append(str(Path(path).parent))
    return missing


def _check_shared(answers: Mapping[str, Any]) -> None:
    """Refuses workers that do not see the same files."""
    problems = []
    for worker, missing in sorted(answers.items()):
        if isinstance(missing, BaseException):
            problems.append(Problem(worker, "", "no-cluster", f"this worker does not answer ({missing})"))
        elif missing:
            message = (
                f"this worker does not see {some_of(missing, 3)} as it is here; source and output must be on storage "
                "that all workers share, under the same path"
            )
            problems.append(Problem(worker, "", "not-shared", message))
    if problems:
        raise ExecutorError(problems)
