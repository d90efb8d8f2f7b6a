"""The Hub as a source: a repository as a folder whose files come when they are needed.

A repository is opened from its listing, its small files and the headers of its shards, a few kilobytes each, so
the whole plan stands before the first shard comes. Its commit is fixed when it is opened. What the Hub says is
hostile until checked, as files are: names by `io.folder` and `checkpoint.opening`, sizes and digests here.
"""

from __future__ import annotations

import inspect
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from awq2marlin._version import __version__
from awq2marlin.errors import CheckpointError, HubError, Problem, printable, refuse
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME
from awq2marlin.hub.errors import as_hub_errors
from awq2marlin.hub.name import HubName, folder_at, links_text, parse_source
from awq2marlin.io.folder import Folder, open_regular, read_all, read_header_of, read_range, read_small, too_large
from awq2marlin.io.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, Header, read_header
from awq2marlin.io.source import COMMIT, MAX_JSON_BYTES, RepoCommit, Source
from awq2marlin.io.strict_json import parse_json

#: What is asked of a shard first: nearly always the whole header.
_HEADER_BYTES = 32_768

#: The most that one request asks for.
_RANGE_BYTES = 16 << 20

#: A repository with more files than this is no checkpoint.
_MAX_FILES = 100_000

_MAX_FILE_BYTES = 1 << 50
_HEADERS_AT_ONCE = 8

#: Codes that mean that the Hub was not heard.
_WITHOUT_ANSWER = ("hub-unreachable", "hub-unavailable")
_TRIES = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as its listing describes it.

    Attributes:
        size: bytes.
        sha256: of its contents, 64 hexadecimal digits; None for small files outside LFS.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at one commit, as a folder whose files come when they are opened.

    Files go to the client's cache and stay there; or to `place`, from where `release` removes them.

    Attributes:
        root: where the client's cache has this commit, or would.
        name: as the user named it.
        commit: the commit's hash.
        files: its files, by name.
        place: a folder of our own for what is fetched; None for the client's cache.
    """

    root: Path
    name: HubName
    commit: str
    files: Mapping[str, RemoteFile]
    place: Path | None = None
    _texts: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    _here: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    @property
    def where(self) -> str:
        """What results and messages call it: repository and commit."""
        return f"{self.name.repo_id}@{self.commit}"

    @property
    def origin(self) -> RepoCommit:
        """Repository and commit; these fix the contents of every file."""
        return RepoCommit(self.name.repo_id, self.commit)

    def names(self) -> Iterator[str]:
        """Yields the name of every file, sorted; hidden ones too."""
        yield from sorted(self.files)

    def exists(self, name: str) -> bool:
        """Returns whether there is a file of that name."""
        return name in self.files

    def size(self, name: str) -> int:
        """Returns a file's length in bytes, as the listing says."""
        return self._file(name).size

    def sha256(self, name: str) -> str | None:
        """Returns a file's SHA-256, as the listing says; None for small files outside LFS."""
        return self._file(name).sha256

    def check(self, name: str) -> None:
        """Refuses a file that is not there; fetches nothing."""
        self._file(name)

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise refuse("missing-file", f"the repository {self.where} does not have it", file=name)
        return self.files[name]

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Returns a small file's bytes, by way of the client's cache if that is used."""
        if self.place is None:
            return read_small(self.path(name), name, limit)
        size = self.size(name)
        if size > limit:
            raise too_large(name, size, limit)
        if name not in self._texts:
            self._texts[name] = self._range(name, 0, size)
        return self._texts[name]

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading, unbuffered, once it is here."""
        return open_regular(self.path(name), name)

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Returns bytes ``begin`` to ``end`` of a file: of the file, if it is here, else by range requests."""
        if (name in self._here and self.place is None) or _is_offline():  # what is in a place of our own may go
            with self.open(name) as stream:
                return read_range(stream, begin, end, name)
        steps = range(begin, end, _RANGE_BYTES)
        return b"".join(self._range(name, each, min(each + _RANGE_BYTES, end)) for each in steps)

    def read_json(self, name: str, *, constants: bool = False) -> Any:
        """Returns the JSON document in a file; see `parse_json`."""
        return parse_json(self.read(name), name, constants=constants)

    def read_header(self, name: str) -> Header:
        """Returns the checked header of a safetensors file, fetched by a range request or two."""
        if _is_offline():
            return read_header_of(self.path(name), name)
        size = self.size(name)
        data = self._range(name, 0, min(size, _HEADER_BYTES))
        length = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        if len(data) < length <= min(size, LENGTH_BYTES + MAX_HEADER_BYTES):
            data += self._range(name, len(data), length)
        return read_header(BytesIO(data), size, name)

    def read_headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Returns the checked headers of safetensors files, by name; several are asked for at once."""
        with ThreadPoolExecutor(_HEADERS_AT_ONCE, thread_name_prefix="header") as pool:
            try:
                return read_all(pool.map, self.read_header, names)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def path(self, name: str) -> Path:
        """Returns where a file lies once it is here; see `fetch`."""
        return self._here.get(name) or self.fetch(name, lambda _: None)

    def fetch(self, name: str, advance: Callable[[int], None]) -> Path:
        """Fetches a file by the Hub's client, unless it is here already, and returns where it lies, links resolved.

        Args:
            name: safe relative path.
            advance: told of the bytes that come, of all of them in the end; what it raises stops the download.

        Raises:
            HubError: if the Hub or the network refuses.
            CheckpointError: if what came is not as long as the listing says.
            OSError: if it cannot be written.
        """
        from huggingface_hub import hf_hub_download

        size = self.size(name)
        counter = _ByteCounter(size, advance)
        with as_hub_errors(self.name.repo_id, self.name.revision):
            fetched = hf_hub_download(
                self.name.repo_id,
                name,
                revision=self.commit,
                local_dir=self.place,
                local_files_only=_is_offline(),
                library_name="awq2marlin",
                library_version=__version__,
                **_counted_by(hf_hub_download, counter),
            )
        path = self._here[name] = Path(fetched).resolve(strict=True)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            self.release(name)
            raise refuse("truncated", _not_as_promised(path, f"{found.st_size} bytes", f"{size}"), file=name)
        counter.rest()
        return path

    def disk_need(self, names: Iterable[str]) -> tuple[Path, int]:
        """Returns where files are going to be fetched to, and the bytes that are not there yet."""
        from huggingface_hub import constants, try_to_load_from_cache

        missing = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(self.name.repo_id, name, revision=self.commit), str)
        ]
        return self.place or Path(constants.HF_HUB_CACHE), sum(map(self.size, missing))

    def release(self, name: str) -> None:
        """Removes what was fetched of a file to a place of our own; the client's cache is left alone."""
        path = self._here.pop(name, None)
        if self.place is not None and path is not None:
            path.unlink(missing_ok=True)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Returns some bytes of a file; tries again if the connection breaks."""
        for left in reversed(range(_TRIES)):
            try:
                return self._range_once(name, begin, end)
            except HubError as error:
                if not left or error.problems[0].code not in ("hub-unreachable", "hub-short-answer"):
                    raise
        raise AssertionError("unreachable")

    def _range_once(self, name: str, begin: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url

        if begin == end:
            return b""
        url = hf_hub_url(self.name.repo_id, name, revision=self.commit)
        data = bytearray()
        with as_hub_errors(self.name.repo_id, self.name.revision), _answer(url, begin, end) as (status, pieces):
            skip = 0 if status == 206 else begin  # a whole file where a range was asked for
            for piece in pieces:
                data += piece
                if len(data) >= skip + end - begin or len(data) > MAX_JSON_BYTES:
                    break
        found = bytes(data[skip : skip + end - begin])
        if len(found) != end - begin:
            raise HubError(
                Problem(
                    str(self.where),
                    "",
                    "hub-short-answer",
                    f"asked for bytes {begin} to {end} of {printable(name)}, the Hub sent {len(found)}; "
                    "run the command again",
                )
            )
        return found


@contextmanager
def _answer(url: str, begin: int, end: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Asks for a range of a file; yields the answer's status and its body in pieces.

    What breaks while the body is read is tried again by the caller; the client's retries are for the status.
    """
    from huggingface_hub import utils

    client: Any = utils  # whose documents name these functions, but whose types do not
    headers = client.build_hf_headers(library_name="awq2marlin", library_version=__version__)
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {"headers": headers, "timeout": 30, "retry_on_exceptions": ()}
    if hasattr(client, "http_stream_backoff"):
        with client.http_stream_backoff("GET", url, follow_redirects=True, **options) as response:
            client.hf_raise_for_status(response)
            yield response.status_code, response.iter_bytes(_HEADER_BYTES)
    else:  # clients before 1.0 stand on another HTTP library
        with client.http_backoff("GET", url, stream=True, **options) as response:
            client.hf_raise_for_status(response)
            yield response.status_code, response.iter_content(_HEADER_BYTES)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _not_as_promised(path: Path, found: str, promised: str) -> str:
    return (
        f"the downloaded file has {found}, the Hub says {promised}; "
        f"remove {path} and run the command again to download it"
    )


class _ByteCounter:
    """Passes on how much of a file has come, never more than there is: some transfers count bytes twice."""

    def __init__(self, size: int, advance: Callable[[int], None]) -> None:
        self._left = size
        self._advance = advance

    def update(self, count: float) -> None:
        """So many bytes more have come; fewer, where a transfer begins again."""
        step = max(0, min(int(count), self._left))
        self._left -= step
        self._advance(step)

    def rest(self) -> None:
        """All have come."""
        self.update(self._left)


def _counted_by(download: Callable[..., str], counter: _ByteCounter) -> dict[str, Any]:
    """Returns the argument that lets a download tell of its bytes; clients before 1.1 draw bars of their own."""
    return {"tqdm_class": _counting_bar(counter)} if "tqdm_class" in inspect.signature(download).parameters else {}


def _counting_bar(counter: _ByteCounter) -> type[Any]:
    """Returns a class of progress bars that draw nothing and pass on what they are told."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            counter.update(n or 0)

    return Bar


def open_source(
    source: str | os.PathLike[str], *, follow_links: bool = False, note: Callable[[str], None] = lambda _text: None
) -> Source:
    """Opens a folder here or a repository on the Hub; see `parse_source` for how it is named.

    Args:
        source: as the user named it.
        follow_links: whether links are followed that lead out of a folder.
        note: told of each such link, before anything is read.

    Raises:
        HubError: if the Hub or the network refuses, in words.
        CheckpointError: if there is no such folder, or what the Hub says cannot be.
    """
    name = parse_source(source)
    if isinstance(name, HubName):
        return open_hub(name)
    folder = folder_at(source, follow_links=follow_links)
    for line in links_text(folder):
        note(line)
    return folder


def open_hub(name: HubName, *, commit: str | None = None, place: Path | None = None) -> Repository:
    """Opens a repository from its listing; no file is fetched.

    Args:
        name: as the user named it.
        commit: the commit to open instead of the one that the name stands for now.
        place: a folder of our own for what is fetched; by default the client's cache.

    Raises:
        HubError: if the Hub or the network refuses, in words.
        CheckpointError: if what the Hub says cannot be.
    """
    try:
        return _opened(name, commit, place)
    except HubError as error:
        unmet = "there is no such folder here, and " if name.is_bare else ""
        copy = error.problems[0].code in _WITHOUT_ANSWER and _is_cached(name, commit)
        hint = "; the cache has this repository: set HF_HUB_OFFLINE=1 to use that copy" if copy else ""
        raise HubError([replace(each, message=unmet + each.message + hint) for each in error.problems]) from None


def _opened(name: HubName, commit: str | None, place: Path | None) -> Repository:
    """Returns what `open_hub` does."""
    from huggingface_hub import HfApi

    if _is_offline():
        return _open_cached(name, commit)
    api = HfApi(library_name="awq2marlin", library_version=__version__)
    with as_hub_errors(name.repo_id, name.revision):
        found = api.model_info(name.repo_id, revision=commit or name.revision).sha
        if not isinstance(found, str) or not COMMIT.fullmatch(found) or (commit and commit != found):
            raise _impossible(name, f"its commit would be {found!r}")
        files = _checked_listing(name, api.list_repo_tree(name.repo_id, recursive=True, revision=found))
        if place is None and commit is None and CONFIG_FILENAME in files:
            # so that the cache knows what the name stood for, when it is used without the network
            api.hf_hub_download(
                name.repo_id,
                CONFIG_FILENAME,
                revision=name.revision,
                **_counted_by(api.hf_hub_download, _ByteCounter(0, lambda _: None)),
            )
    return Repository(_cached_snapshot(name.repo_id, found), name, found, files, place)


def _checked_listing(name: HubName, entries: Iterable[Any]) -> dict[str, RemoteFile]:
    files: dict[str, RemoteFile] = {}
    for entry in entries:
        path, size, lfs = entry.path, getattr(entry, "size", None), getattr(entry, "lfs", None)
        if size is None:  # a folder
            continue
        sha256 = None if lfs is None else lfs.sha256
        if not isinstance(path, str) or path in files or type(size) is not int or not 0 <= size < _MAX_FILE_BYTES:
            raise _impossible(name, f"its listing has {path!r} with {size!r} bytes, or has it twice")
        if lfs is not None and (lfs.size != size or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256)):
            raise _impossible(name, f"its listing contradicts itself about {path!r}")
        files[path] = RemoteFile(size, sha256)
        if len(files) > _MAX_FILES:
            raise _impossible(name, f"it has more than {_MAX_FILES} files")
    return files


def _impossible(name: HubName, what: str) -> CheckpointError:
    return refuse("hub-bad-answer", f"the Hub sent an invalid answer: {printable(what)}", file=str(name))


def hub_cache() -> Path:
    """Returns the folder of the client's cache; need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _cached_snapshot(repo_id: str, commit: str) -> Path:
    return hub_cache() / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit


def _open_cached(name: HubName, commit: str | None) -> Repository:
    """Opens what the client's cache has of a repository, without the network."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name.repo_id, CONFIG_FILENAME, revision=commit or name.revision)
    if not isinstance(cached, str):
        raise HubError(
            Problem(
                str(name),
                "",
                "hub-offline",
                "HF_HUB_OFFLINE is set, but the cache does not have this repository or this revision; "
                "unset it, or download it first where there is a network",
            )
        )
    root = Path(cached).parent
    there = {path: root / path for path in Folder(root).names()}
    files = {
        path: RemoteFile(each.stat().st_size, _sha256_of_cached(each)) for path, each in there.items() if each.is_file()
    }
    return Repository(root, name, root.name, files)


def _is_cached(name: HubName, commit: str | None) -> bool:
    """Returns whether the client's cache has all weights of a repository."""
    try:
        there = _open_cached(name, commit)
        index = Folder.at(there.root).read_json(INDEX_FILENAME) if there.exists(INDEX_FILENAME) else None
    except (HubError, CheckpointError, OSError):
        return False
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    needed = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return needed <= there.files.keys() and any(each.endswith(".safetensors") for each in there.files)


def _sha256_of_cached(path: Path) -> str | None:
    """Returns the SHA-256 of a cached file that came by LFS: the cache names its blob after it."""
    blob = path.readlink().name if path.is_symlink() else ""
    return blob if _SHA256.fullmatch(blob) else None
