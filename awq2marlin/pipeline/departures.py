"""Finished shards, sent to the Hub while others are converted, and removed here once the Hub has them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from awq2marlin.formats.names import CARD_FILENAME, CONFIG_FILENAME
from awq2marlin.hub.identity import PushedFile, PushResult, identify
from awq2marlin.hub.publication import DEFAULT_MESSAGE, Content, FileIdentity, Publication
from awq2marlin.io.stream import NamedPath
from awq2marlin.pipeline.journal import FinishedFile, PullRequest
from awq2marlin.pipeline.model_card import addressed
from awq2marlin.pipeline.output import OutputFolder
from awq2marlin.pipeline.transfer import ShardPlan, Transfer


class Departures:
    """Sends files of an output folder to a repository, in the order in which they are given.

    Attributes:
        files: what was sent, or was there.
        advance: told of the bytes that were sent.
    """

    def __init__(self, publication: Publication, out: OutputFolder, message: str) -> None:
        """Takes what a `Relay` knows."""
        self._publication, self._out, self._message = publication, out, message
        self.advance: Callable[[int], None] = lambda _count: None
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
            self.files.append(PushedFile(name, entry.target.size, entry.sent, uploaded=False))
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
            self._out.note_pull_request(PullRequest(publication.revision, publication.pull_request))

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
        identity, _ = identify(NamedPath(path, name))
        missing = not self._publication.has(name, identity)
        if missing:
            self._publication.commit({name: path}, f"{self._message}: {name}", {name: identity})
        self.advance(identity.size)
        return PushedFile(name, identity.size, identity.sha256, missing)

    def _commit(self, contents: Mapping[str, Content], message: str) -> None:
        identities = {
            name: FileIdentity.of(content) if isinstance(content, bytes) else identify(NamedPath(content, name))[0]
            for name, content in contents.items()
        }
        missing = {name: each for name, each in contents.items() if not self._publication.has(name, identities[name])}
        self._publication.commit(missing, message, identities)
        self.files += [
            PushedFile(name, identity.size, identity.sha256, name in missing) for name, identity in identities.items()
        ]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Relay:
    """Files are passed on to the Hub, where the checkpoint becomes whole; nothing of it stays here.

    Attributes:
        out: the folder in which files grow.
    """

    def __init__(self, out: OutputFolder, publication: Publication, message: str | None, transfer: Transfer) -> None:
        """Takes a repository that was found fit, and changes nothing there yet.

        Args:
            out: the folder in which files grow.
            publication: where they go.
            message: what the commits' messages begin with; None for the default.
            transfer: what is made.
        """
        self.out = out
        self._publication, self._message, self._transfer = publication, message or DEFAULT_MESSAGE, transfer
        self._created, self._removed = not publication.exists, publication.stale
        self._departures = Departures(publication, out, self._message)
        self._started = time.perf_counter()

    def has(self, name: str, entry: FinishedFile) -> bool:
        """Returns whether the repository has a shard that an earlier run sent."""
        return self._publication.has(name, FileIdentity(entry.target.size, entry.sent))

    def steps(self, shards: Sequence[ShardPlan]) -> dict[str, int]:
        """Returns what has to be sent yet."""
        finished = self.out.finished
        unsent = [each for each in shards if each.name not in finished or not finished[each.name].sent]
        return {"push": sum(shard.target.file_size for shard in unsent)}

    def begin(self, advance: Callable[[int], None]) -> None:
        """Makes the repository ready, so that no checkpoint is loadable there, and sends what is finished."""
        self._departures.advance = advance
        self._publication.create()
        self._publication.clear(f"{self._message}: remove the earlier one")
        self._departures.note_pull_request()
        for name in [*self.out.finished]:
            self._departures.send(name)

    def finished(self, name: str) -> None:
        """Begins to send a shard."""
        self._departures.send(name)

    def wait(self) -> None:
        """Waits until all shards are on the Hub."""
        self._departures.wait()

    def commit(self, config: bytes) -> None:
        """Sends all other files, ``config.json`` last, and removes everything here."""
        shards = {shard.name for shard in self._transfer.shards}
        others = {*shards, *self.out.left, CONFIG_FILENAME}
        rest = [name for name in self._transfer.names if name not in others]
        self._departures.send_rest(rest, config)
        self.out.discard()

    def close(self) -> None:
        self._departures.close()

    def result(self) -> PushResult:
        """Returns what was sent where, once all is there."""
        return PushResult.of(
            self._publication,
            self.out.root,
            self._departures.files,
            created=self._created,
            removed=self._removed,
            started=self._started,
        )
