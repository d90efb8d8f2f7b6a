"""A repository on the Hub that receives a converted checkpoint, in one commit or in several.

    publication = Publication.open(target, names, is_ours)   # looks, refuses what is foreign, changes nothing
    publication.create()                                     # the repository and its branch, if they are not there
    publication.clear(message)                               # several commits: what must go, goes first
    publication.commit(files, message)                       # once, or shard by shard with config.json last

Only public calls of ``huggingface_hub`` are used, so that its xet transfer serves where it is installed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from awq2marlin._version import __version__
from awq2marlin.checkpoint.manifest import decode_manifest
from awq2marlin.errors import CheckpointError, HubError, Problem, printable, some_of
from awq2marlin.formats.names import CONFIG_FILENAME, INDEX_FILENAME, MANIFEST_FILENAME, REPORT_FILENAME
from awq2marlin.hub.errors import as_hub_errors, hub_url
from awq2marlin.hub.target import DEFAULT_BRANCH
from awq2marlin.hub.target import PushTarget as PushTarget
from awq2marlin.io.source import MAX_JSON_BYTES
from awq2marlin.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: What a commit is called.
DEFAULT_MESSAGE = "Add Marlin-native checkpoint"

#: Bytes from which on a file is uploaded by itself.
_LARGE = 10_000_000


@dataclass(frozen=True)
class FileIdentity:
    """What tells whether the Hub holds a file already.

    Attributes:
        size: bytes.
        sha256: 64 hexadecimal digits.
        git_sha1: git's name of it, by which small files are known; None if it is not known.
    """

    size: int
    sha256: str
    git_sha1: str | None = None

    @classmethod
    def of(cls, data: bytes) -> FileIdentity:
        """Returns the identity of a small file's bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), _git_sha1(data))


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


#: What a commit adds: bytes, or the path of a file, by name in the repository.
Content = bytes | Path


class Publication:
    """A repository that was looked at and found fit to receive a checkpoint. Made by `open`.

    Attributes:
        target: what was asked for.
        repo_id: the repository's name; another than asked for if it was renamed.
        exists: whether it is there.
        commits: the commits made, in order.
        pull_request: address of the pull request that they belong to, or None.
        stale: files there that are of an earlier checkpoint and that ours does not replace.
    """

    def __init__(self, target: PushTarget, names: Collection[str]) -> None:
        """Takes a target that nobody has looked at; see `open`."""
        from huggingface_hub import HfApi

        self.target, self.repo_id = target, target.repo_id
        self.exists = False
        self.commits: list[str] = []
        self.pull_request: str | None = None
        self.stale: tuple[str, ...] = ()
        self._api: HfApi = HfApi(library_name="awq2marlin", library_version=__version__)
        self._names = frozenset(names)
        self._revision = target.branch
        self._has_branch = False
        self._holds_ours = False
        self._head: str | None = None
        self._files: dict[str, FileIdentity] = {}

    @classmethod
    def open(
        cls, target: PushTarget, names: Collection[str], is_ours: Callable[[bytes], bool] = lambda _manifest: False
    ) -> Publication:
        """Looks at a target and refuses it unless it may receive the checkpoint; changes nothing.

        Args:
            target: where.
            names: every file of the checkpoint.
            is_ours: answers whether the manifest of a checkpoint that is there, in bytes, is that of this very
                checkpoint, so that the rest of it may follow.

        Raises:
            HubError: if there is no token, no access or no connection; if it holds another checkpoint and neither
                ``overwrite`` nor ``create_pr`` allows that; if it is public and must not be.
        """
        self = cls(target, names)
        self._refuse_no_token()
        self._look()
        self._refuse_foreign(is_ours)
        return self

    @property
    def url(self) -> str:
        """The address of the pull request, if there is one, or of the repository or its branch."""
        if self.pull_request:
            return self.pull_request
        branch = "" if self._revision == DEFAULT_BRANCH else f"/tree/{self._revision}"
        return f"{hub_url()}/{self.repo_id}{branch}"

    @property
    def is_loadable(self) -> bool:
        """Whether a ``config.json`` is there, the mark of a whole checkpoint."""
        return CONFIG_FILENAME in self._files

    @property
    def revision(self) -> str:
        """Where the next commit goes: the branch, or ``refs/pr/N`` once a pull request is open."""
        return self._revision

    def has(self, name: str, identity: FileIdentity) -> bool:
        """Returns whether the repository holds a file with these very contents."""
        found = self._files.get(name)
        if found is None or found.size != identity.size:
            return False
        return identity.sha256 == found.sha256 if found.sha256 else identity.git_sha1 == found.git_sha1

    def create(self) -> None:
        """Makes the repository and the branch if they are not there.

        What was there is as `open` has seen it, or the first commit is refused: it names the one that it follows.

        Raises:
            HubError: if that is not allowed, or if somebody else has made them meanwhile.
        """
        if self._has_branch:
            return
        with self._told():
            if not self.exists:
                self._api.create_repo(self.repo_id, private=self.target.private or None)
                self.exists = True
            if self._revision != DEFAULT_BRANCH:
                self._api.create_branch(self.repo_id, branch=self._revision, revision=self._head)
        self._has_branch = True
        self._list(self._revision)

    def clear(self, message: str) -> None:
        """Removes, in a commit of its own, the earlier checkpoint's ``config.json`` and what ours does not replace.

        Where a checkpoint goes up in several commits this comes first, so that nobody loads a mixture of both. A
        checkpoint that is there and ours already stays.

        Raises:
            HubError: as `commit`.
        """
        gone = {*self.stale, *({CONFIG_FILENAME} & self._files.keys())}
        if gone and not self._holds_ours and (self.target.overwrite or self.target.create_pr):
            self._commit({}, sorted(gone), message)
            self.stale = ()

    def commit(
        self,
        files: Mapping[str, Content],
        message: str,
        identities: Mapping[str, FileIdentity],
        progress: Progress | None = None,
    ) -> None:
        """Uploads files and commits them, with the removal of what is stale; then asks whether they are there.

        Args:
            files: what to add or replace; without any, and with nothing stale, there is no commit.
            message: of the commit.
            identities: what the Hub must say of each of them afterwards.
            progress: told of every file's bytes, once the Hub has them.

        Raises:
            HubError: if that is not allowed, the connection fails, somebody else has committed meanwhile, or the
                Hub does not hold afterwards what was sent.
        """
        may_remove = self.target.overwrite or self.target.create_pr
        gone = self.stale if may_remove else ()
        if files or gone:
            self._commit(files, gone, message, progress)
            self._refuse_lost(files, identities)
            self.stale = ()

    def _commit(
        self,
        files: Mapping[str, Content],
        deleted: Collection[str],
        message: str,
        progress: Progress | None = None,
    ) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = {name: CommitOperationAdd(name, content) for name, content in sorted(files.items())}
        deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(deleted)]
        opens_pr = self.target.create_pr and self.pull_request is None
        with self._told(), _quiet_client():
            for group in _upload_groups(files):
                uploads = [additions[name] for name in group]
                self._api.preupload_lfs_files(
                    self.repo_id, uploads, revision=self._revision, create_pr=opens_pr, free_memory=False
                )
                if progress is not None:
                    progress.advance(sum(_size(files[name]) for name in group))
            done = self._api.create_commit(
                self.repo_id,
                [*additions.values(), *deletions],
                commit_message=message,
                revision=self._revision,
                parent_commit=self._head,
                create_pr=opens_pr,
            )
        if opens_pr:
            self.pull_request, self._revision = str(done.pr_url), str(done.pr_revision)
        self.commits.append(str(done.oid))
        self._list(self._revision)

    def _refuse_no_token(self) -> None:
        from huggingface_hub import get_token

        if get_token() is None:
            raise _refused(
                self.repo_id,
                "hub-unauthorized",
                "pushing needs a token with write access: create one at "
                f"{hub_url()}/settings/tokens, then log in with 'hf auth login' or set HF_TOKEN",
            )

    def _look(self) -> None:
        """Finds out whether the repository is there, whether it is private, and what is in it."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._told():
            try:
                info = self._api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                if self.target.create_pr:
                    raise _refused(
                        self.repo_id,
                        "hub-not-found",
                        "a pull request needs an existing repository, but there is none of this name, or your token "
                        "may not see it: check the name, or drop --create-pr to create the repository",
                    ) from None
                return
        self.exists, self.repo_id = True, info.id
        if self.target.private and not info.private:
            raise _refused(
                self.repo_id,
                "target-public",
                "the repository exists and is public, though --private was asked for; nothing was "
                "uploaded: make it private in its settings, or choose another",
            )
        with self._told():
            try:
                self._api.model_info(self.repo_id, revision=self._revision)
                self._has_branch = True
            except RevisionNotFoundError:
                if self._revision.startswith("refs/"):
                    raise
        self._list(self._revision if self._has_branch else DEFAULT_BRANCH)  # of which a new branch will be a copy

    def _list(self, revision: str) -> None:
        """Reads what is in the repository, and at which commit."""
        with self._told():
            self._head = self._api.model_info(self.repo_id, revision=revision).sha
            entries: list[Any] = list(self._api.list_repo_tree(self.repo_id, recursive=True, revision=self._head))
        self._files = {
            entry.path: FileIdentity(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
            for entry in entries
            if hasattr(entry, "blob_id")  # folders have none
        }

    def _refuse_foreign(self, is_ours: Callable[[bytes], bool]) -> None:
        """Refuses a checkpoint that is there and not ours, or notes what of it has to go."""
        manifest = self._fetch(MANIFEST_FILENAME)
        may_remove = self.target.overwrite or self.target.create_pr
        is_there = CONFIG_FILENAME in self._files
        self._holds_ours = is_there and manifest is not None and is_ours(manifest)
        if is_there and not may_remove and not self._holds_ours:
            raise _refused(
                self.repo_id,
                "target-taken",
                "the repository holds a checkpoint of another model or run: use --overwrite to replace it, "
                "--create-pr to propose that, or choose another",
            )
        known = {*_names_in(manifest), *(() if self._holds_ours else (REPORT_FILENAME,))}
        left = {name for name in self._files if _is_weights(name)} | (known & self._files.keys())
        self.stale = tuple(sorted(left - self._names - {CONFIG_FILENAME}))
        if self.stale and not is_there and not may_remove:
            shown = some_of(map(printable, self.stale), 5)
            raise _refused(
                self.repo_id,
                "target-taken",
                f"the repository holds {len(self.stale)} files of another checkpoint ({shown}): use --overwrite to "
                "replace them, or choose another",
            )

    def _fetch(self, name: str) -> bytes | None:
        """Returns a small file's bytes, or None if it is not there or not small; leaves nothing on the disk."""
        if name not in self._files or self._files[name].size > MAX_JSON_BYTES:
            return None
        with TemporaryDirectory(prefix="awq2marlin-") as folder, self._told(), _quiet_client():
            path = self._api.hf_hub_download(self.repo_id, name, revision=self._head, local_dir=folder)
            return Path(path).read_bytes()

    def _refuse_lost(self, files: Mapping[str, Content], identities: Mapping[str, FileIdentity]) -> None:
        lost = [name for name in sorted(files) if not self.has(name, identities[name])]
        if lost:
            raise _refused(
                self.repo_id,
                "hub-incomplete",
                f"after the commit the repository does not hold {len(lost)} files as they were sent, the first is "
                f"{printable(lost[0])}: check whether its .gitignore lists them, or whether somebody else writes to it",
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        revision = None if self._revision == DEFAULT_BRANCH else self._revision
        with as_hub_errors(self.repo_id, revision):
            yield


def _refused(repo_id: str, code: str, message: str) -> HubError:
    return HubError(Problem(repo_id, "", code, message))


def _upload_groups(files: Mapping[str, Content]) -> Iterator[list[str]]:
    """Yields the small files together and the large ones one by one, so that progress is told between two of them."""
    large = [name for name in sorted(files) if _size(files[name]) >= _LARGE]
    small = [name for name in sorted(files) if name not in large]
    if small:
        yield small
    yield from ([name] for name in large)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _is_weights(name: str) -> bool:
    """Returns whether an engine could take a file of the repository for a part of the checkpoint."""
    return "/" not in name and (name.endswith(".safetensors") or name == INDEX_FILENAME)


def _names_in(manifest: bytes | None) -> list[str]:
    """Returns the files that an earlier conversion wrote, as its manifest says; none if that is no manifest."""
    if manifest is None:
        return []
    try:
        return decode_manifest(manifest).names()
    except CheckpointError:
        return []


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keeps the client from drawing its own progress bars, which would run into ours."""
    from huggingface_hub import utils

    public: Any = utils  # which says nothing of its types, though its documents name these functions
    were_disabled = public.are_progress_bars_disabled()
    public.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            public.enable_progress_bars()
