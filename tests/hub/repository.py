"""What the hub stores: objects, repositories, commits. Knows no HTTP."""

import hashlib
import itertools
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".png")
LFS_FROM_BYTES = 10_000_000

#: What the Hub itself puts into a new repository.
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class RefusedError(Exception):
    """An answer other than success: status, error code and message."""

    def __init__(self, status, message, code=""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def git_hash(data):
    """Returns the name git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit.

    Attributes:
        size: bytes.
        sha256: of its bytes.
        blob_id: git's name of it; of its pointer, if it is an LFS file.
        is_lfs: whether it is one.
        path: where the bytes lie.
    """

    size: int
    sha256: str
    blob_id: str
    is_lfs: bool
    path: Path

    @property
    def etag(self):
        """What the Hub calls its ETag."""
        return self.sha256 if self.is_lfs else self.blob_id

    @property
    def pointer_size(self):
        """Bytes of the LFS pointer."""
        return len(_pointer(self.sha256, self.size))

    def read(self):
        """Returns its bytes."""
        return self.path.read_bytes()


def _pointer(sha256, size):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """One commit.

    Attributes:
        oid: 40 hexadecimal digits.
        parent: the commit before it, or None.
        title: first line of its message.
        description: the rest.
        files: all files, by name.
        added: names that it adds or changes.
        deleted: names that it removes.
        at: when it was made, in seconds of ``time.monotonic()``.
    """

    oid: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, StoredFile]
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    at: float


class Objects:
    """Contents by their SHA-256, as files in a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256):
        """Returns where the content lies, or would."""
        return self.folder / sha256

    def __contains__(self, sha256):
        return self.path(sha256).exists()

    def add(self, data):
        """Stores bytes; returns their SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self:
            self.path(sha256).write_bytes(data)
        return sha256

    def add_file(self, path):
        """Stores a copy of a file; returns its SHA-256."""
        sha256 = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                sha256.update(piece)
        if sha256.hexdigest() not in self:
            shutil.copyfile(path, self.path(sha256.hexdigest()))
        return sha256.hexdigest()

    def stored(self, sha256, is_lfs):
        """Returns the file that holds this content."""
        path = self.path(sha256)
        size = path.stat().st_size
        blob_id = git_hash(_pointer(sha256, size) if is_lfs else path.read_bytes())
        return StoredFile(size, sha256, blob_id, is_lfs, path)


def is_lfs(name, size):
    """Returns whether the Hub would store a file as LFS."""
    return name.endswith(LFS_SUFFIXES) or size >= LFS_FROM_BYTES


class Repository:
    """A repository with its refs and commits."""

    _numbers = itertools.count()

    def __init__(self, repo_id, objects, *, kind="model", private=False, gated=False):
        self.repo_id, self.kind, self.private, self.gated = repo_id, kind, private, gated
        self.granted = set()  # users who may read although it is gated
        self.objects = objects
        self.refs = {}
        self.commits = {}
        self.pull_requests = 0
        self.write("refs/heads/main", {".gitattributes": objects.stored(objects.add(GITATTRIBUTES), False)}, (), "init")

    @property
    def namespace(self):
        """The user or organization it belongs to."""
        return self.repo_id.partition("/")[0]

    def ref_of(self, revision):
        """Returns the full name of a branch, tag or pull request."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return ref
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, revision="main"):
        """Returns the commit of a revision."""
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        return self.commits[self.refs[self.ref_of(revision)]]

    def files(self, revision="main"):
        """Returns the files of a revision, by name."""
        return self.commit(revision).files

    def file(self, name, revision="main"):
        """Returns one of them."""
        commit = self.commit(revision)
        if name not in commit.files:
            raise RefusedError(404, f"Entry not found: {name}", "EntryNotFound")
        return commit.files[name]

    def history(self, revision="main"):
        """Returns the commits up to a revision, oldest first, without the one that the Hub made."""
        commits, oid = [], self.commit(revision).oid
        while oid is not None:
            commits.append(self.commits[oid])
            oid = self.commits[oid].parent
        return commits[-2::-1]

    def write(self, ref, added, deleted, title, description="", parent=None):
        """Makes a commit; ``added`` are files by name, ``deleted`` names, of folders with a slash at the end."""
        head = self.commits.get(parent or self.refs.get(ref))
        files = dict(head.files) if head else {}
        gone = []
        for name in deleted:
            found = [each for each in files if each == name or (name.endswith("/") and each.startswith(name))]
            if not found:
                raise RefusedError(404, f'A file with this name doesn\'t exist: "{name}"', "EntryNotFound")
            for each in found:
                del files[each]
            gone += found
        files.update(added)
        number = next(self._numbers)
        oid = hashlib.sha1(f"{self.repo_id} {ref} {number} {title} {sorted(files)}".encode()).hexdigest()
        commit = Commit(
            oid, head.oid if head else None, title, description, files, (*added,), (*gone,), time.monotonic()
        )
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def add(self, files, message="add files", revision="main"):
        """Commits files given as bytes or paths by name."""
        stored = {}
        for name, content in files.items():
            sha256 = self.objects.add(content) if isinstance(content, bytes) else self.objects.add_file(content)
            stored[name] = self.objects.stored(sha256, is_lfs(name, self.objects.path(sha256).stat().st_size))
        return self.write(self.ref_of(revision), stored, (), message)

    def open_pull_request(self, revision):
        """Makes the ref of a new pull request; returns its number."""
        self.pull_requests += 1
        self.refs[f"refs/pr/{self.pull_requests}"] = self.commit(revision).oid
        return self.pull_requests
