"""Finished shards, sent to the Hub while others are converted, and removed here once the Hub has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from awq2marlin.checkpoint.manifest import decode_manifest
from awq2marlin.checkpoint.names import CARD_FILENAME, CONFIG_FILENAME
from awq2marlin.errors import CheckpointError
from awq2marlin.hub.identity import PushedFile, identify
from awq2marlin.hub.publication import Content, FileIdentity, Publication
from awq2marlin.pipeline.model_card import addressed
from awq2marlin.pipeline.output import OutputFolder
from awq2marlin.pipeline.plan import Plan
from awq2marlin.progress import Progress


def is_conversion_of(plan: Plan, manifest: bytes) -> bool:
    """Returns whether a manifest can be that of this very conversion, as far as headers and texts tell.

    Args:
        plan: the conversion's.
        manifest: its bytes, from the Hub.
    """
    try:
        found = decode_manifest(manifest)
    except CheckpointError:
        return False
    folder = plan.checkpoint.folder
    shards = {name: (shard.source_header.text, shard.target_size) for name, shard in found.shards.items()}
    return (
        (found.repo_id, found.revision) == (folder.origin or (None, None))
        and shards == {shard.name: (shard.source.text, shard.target.file_size) for shard in plan.shards}
        and found.texts.get(CONFIG_FILENAME, "").encode("utf-8") == folder.read(CONFIG_FILENAME)
    )


class Departures:
    """Sends files of an output folder to a repository, in the order in which they are given. Made by `departing`."""

    def __init__(self, publication: Publication, out: OutputFolder, message: str, progress: Progress) -> None:
        """Takes what `departing` takes."""
        self._publication, self._out, self._message, self._progress = publication, out, message, progress
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._under_way: deque[tuple[str, Future[PushedFile]]] = deque()
        self.files: list[PushedFile] = []

    def send(self, name: str) -> None:
        """Begins to send a finished shard, unless an earlier run sent it; first waits for the one before.

        Raises:
            HubError: if that one could not be sent.
        """
        entry = self._out.finished[name]
        if entry.sent:
            self.files.append(PushedFile(name, entry.target_size, entry.sent, uploaded=False))
            return
        self.wait()
        self._under_way.append((name, self._pool.submit(self._send_shard, name)))

    def wait(self) -> None:
        """Waits until what was begun is on the Hub, and removes it here.

        Raises:
            HubError: if it could not be sent.
        """
        while self._under_way:
            name, future = self._under_way.popleft()
            file = future.result()
            self.files.append(file)
            self.note_pull_request()
            self._out.sent(name, file.sha256)

    def note_pull_request(self) -> None:
        """Lets the journal remember the pull request, once one is open."""
        publication = self._publication
        if publication.pull_request is not None:
            self._out.note_pull_request((publication.revision, publication.pull_request))

    def send_rest(self, names: Sequence[str], config: bytes) -> None:
        """Sends all other files in one commit and ``config.json`` in the last.

        Args:
            names: of files in the output folder; the card gets the repository's name in its commands.
            config: the config.
        """
        self.wait()
        contents: dict[str, Content] = {name: self._out.final(name) for name in names}
        if CARD_FILENAME in contents:
            card = self._out.final(CARD_FILENAME).read_bytes()
            contents[CARD_FILENAME] = addressed(card, self._publication.repo_id)
        self._commit(contents, f"{self._message}: side files")
        self._commit({CONFIG_FILENAME: config}, f"{self._message}: {CONFIG_FILENAME}")

    def _send_shard(self, name: str) -> PushedFile:
        path = self._out.final(name)
        identity, _ = identify(path, name)
        missing = not self._publication.has(name, identity)
        if missing:
            self._publication.commit({name: path}, f"{self._message}: {name}", {name: identity})
        self._progress.advance(identity.size)
        return PushedFile(name, identity.size, identity.sha256, missing)

    def _commit(self, contents: Mapping[str, Content], message: str) -> None:
        identities = {
            name: FileIdentity.of(content) if isinstance(content, bytes) else identify(content, name)[0]
            for name, content in contents.items()
        }
        missing = {name: each for name, each in contents.items() if not self._publication.has(name, identities[name])}
        self._publication.commit(missing, message, identities)
        self.files += [
            PushedFile(name, identity.size, identity.sha256, name in missing) for name, identity in identities.items()
        ]

    def close(self) -> None:
        """Sends nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def departing(publication: Publication, out: OutputFolder, message: str, progress: Progress) -> Iterator[Departures]:
    """Makes the repository ready, and sends shards while the context lasts.

    Args:
        publication: where to; it is made if needed, and no checkpoint is loadable there from here on.
        out: where the shards are; one that was sent is removed there.
        message: what the commits' messages begin with.
        progress: told of the bytes that were sent.
    """
    publication.create()
    publication.clear(f"{message}: remove the earlier one")
    departures = Departures(publication, out, message, progress)
    departures.note_pull_request()
    try:
        yield departures
    finally:
        departures.close()
