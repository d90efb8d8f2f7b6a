"""``marlin_manifest.json``: what `revert` and `verify` need to know of the source, and engines never read.

Its keys are documented in docs/marlin-native.md. A manifest that is read is hostile until checked.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

from awq2marlin._version import __version__
from awq2marlin.arguments import one_of
from awq2marlin.errors import CheckpointError, printable, refuse
from awq2marlin.formats.names import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    INDEX_FILENAME,
    LEGACY_CONFIG_FILENAMES,
    MANIFEST_FILENAME,
    MAX_CARD_BYTES,
)
from awq2marlin.io.digest import FileDigest, digest_of, is_digest
from awq2marlin.io.folder import check_name, find_clash
from awq2marlin.io.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, Header, parse_header
from awq2marlin.io.source import MAX_JSON_BYTES, Source
from awq2marlin.io.strict_json import parse_json

#: Versions of this file. Version 0.1 reads the first, which is that of an AWQ source and a Marlin-native output.
MANIFEST_VERSIONS = (1, 2)

#: How many bytes the headers of all shards may have together: about as many as the index, which has a limit too.
MAX_HEADERS_BYTES = 256_000_000

#: What `revert` gives back: the source's files, byte for byte, or an AWQ checkpoint of the same tensors.
Restores = Literal["files", "tensors"]


#: The only files whose text a conversion keeps in the manifest: of all others the output has the bytes.
_TEXT_NAMES = (CONFIG_FILENAME, *LEGACY_CONFIG_FILENAMES, INDEX_FILENAME, MANIFEST_FILENAME)


class ManifestShard(NamedTuple):
    """One safetensors file.

    Attributes:
        source_header: the source's header, exact; where only tensors are restored, that of the file to come.
        source: the source's size and digests; None where only tensors are restored.
        target: the output's.
    """

    source_header: Header
    source: FileDigest | None
    target: FileDigest


class SourceCard(NamedTuple):
    """The source's own model card, which need not be UTF-8; the output has one of ours.

    Attributes:
        name: its name in the source.
        data: its bytes.
        recorded: what they are known by, as the conversion saw them.
    """

    name: str
    data: bytes
    recorded: FileDigest

    @classmethod
    def of(cls, name: str, data: bytes) -> SourceCard:
        """Takes a card as it lies in the source."""
        return cls(name, data, digest_of(data))


@dataclass(frozen=True)
class Manifest:
    """What is known of the source of a converted checkpoint.

    Attributes:
        shards: by file name.
        texts: exact text of source files that are not in the output as they were.
        text_digests: what those texts are known by.
        files: the files carried over unchanged, and what they are known by.
        repo_id: repository on the Hub it came from, if any.
        revision: commit of that repository.
        left_behind: files of the source that were not carried over, with the reason.
        card: the source's model card, or None if it has none.
        restores: ``files``; or ``tensors``, if an engine saved the checkpoint and the source's files are not known.
        version: of the manifest: 1 where version 0.1 of this package can revert it, else 2.
        made: files of the output that the source does not have, but those that every output has: an index.
    """

    shards: Mapping[str, ManifestShard]
    texts: Mapping[str, str]
    text_digests: Mapping[str, FileDigest]
    files: Mapping[str, FileDigest]
    repo_id: str | None
    revision: str | None
    left_behind: Mapping[str, str]
    card: SourceCard | None = None
    restores: Restores = "files"
    version: int = 1
    made: Mapping[str, FileDigest] = field(default_factory=dict)

    @property
    def output_files(self) -> dict[str, FileDigest]:
        """What every shard of the output, every file carried over, and every one that was made is known by."""
        return {name: shard.target for name, shard in self.shards.items()} | {**self.files, **self.made}

    def names(self) -> list[str]:
        """Returns the files of the converted checkpoint that its conversion wrote."""
        index = {INDEX_FILENAME} & {*self.texts}  # padding changes it, so its original text is kept
        return sorted({*self.output_files, *index, CARD_FILENAME, CONFIG_FILENAME, MANIFEST_FILENAME})

    def encode(self) -> bytes:
        """Returns the file's bytes; equal manifests give equal bytes.

        Raises:
            CheckpointError: if it is so long that `read_manifest` would refuse it.
        """
        headers = sum(len(shard.source_header.text) for shard in self.shards.values())
        if headers > MAX_HEADERS_BYTES:
            raise _unreadable(f"the headers of all shards together have {headers} bytes, more than {MAX_HEADERS_BYTES}")
        document = {
            "format_version": self.version,
            "tool": {"name": "awq2marlin", "version": __version__},
            **({} if self.restores == "files" else {"restores": self.restores}),
            "source": {"repo_id": self.repo_id, "revision": self.revision},
            "shards": {
                name: {
                    "source": _recorded(shard.source) if shard.source else _unknown(shard.source_header),
                    "source_header": _pack(shard.source_header.text),
                    "output": _recorded(shard.target),
                }
                for name, shard in sorted(self.shards.items())
            },
            "texts": dict(sorted(self.texts.items())),
            "text_digests": _recorded_files(self.text_digests),
            "source_card": _recorded_card(self.card),
            "files": _recorded_files(self.files),
            **({"made": _recorded_files(self.made)} if self.made else {}),
            "left_behind": dict(sorted(self.left_behind.items())),
        }
        data = (json.dumps(document, indent=1, ensure_ascii=True) + "\n").encode("ascii")
        if len(data) > MAX_JSON_BYTES:
            raise _unreadable(f"it would have {len(data)} bytes, more than {MAX_JSON_BYTES}")
        return data


def _unreadable(what: str) -> CheckpointError:
    return refuse(
        "too-large",
        "the manifest must hold the headers of the shards, the config's text and the model card, but "
        f"{what}, and 'revert' could not read it; shorten the metadata of the shards, or the card",
        file=MANIFEST_FILENAME,
    )


def _recorded(file: FileDigest) -> dict[str, Any]:
    return {"size": file.size, "digests": list(file.digests)}


def _unknown(header: Header) -> dict[str, Any]:
    """Returns what stands in the place of a file that nobody has seen: its size will be that."""
    return {"size": header.file_size, "digests": []}


def _recorded_files(files: Mapping[str, FileDigest]) -> dict[str, dict[str, Any]]:
    return {name: _recorded(file) for name, file in sorted(files.items())}


def _recorded_card(card: SourceCard | None) -> dict[str, Any] | None:
    if card is None:
        return None
    return {"name": card.name, **_recorded(card.recorded), "data": _pack(card.data)}


def _pack(text: bytes) -> str:
    return base64.b64encode(zlib.compress(text, 9)).decode("ascii")


def read_manifest(folder: Source) -> Manifest:
    """Reads and checks the manifest of a converted checkpoint.

    Args:
        folder: the checkpoint's.

    Raises:
        CheckpointError: if it is missing, malformed, names files outside the folder or one file twice, or its
            headers are not what they claim to be.
    """
    if not folder.exists(MANIFEST_FILENAME):
        raise refuse(
            "no-manifest",
            "it is missing, and without it the original cannot be restored; download the complete checkpoint",
            file=MANIFEST_FILENAME,
        )
    return decode_manifest(folder.read(MANIFEST_FILENAME))


def decode_manifest(data: bytes) -> Manifest:
    """Checks the bytes of a manifest.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    document = _Checked(parse_json(data, MANIFEST_FILENAME), "the manifest")
    version: int = document.get("format_version", int)
    if version not in MANIFEST_VERSIONS:
        known = one_of(MANIFEST_VERSIONS)
        document.bad(f"format_version is not {known}; install a newer awq2marlin")
    restores = document.restores()
    source = document.sub("source")
    shards: dict[str, ManifestShard] = {}
    room = MAX_HEADERS_BYTES  # for all headers together
    for name, entry in document.entries("shards"):
        shards[check_name(name, MANIFEST_FILENAME)] = _shard(name, entry, min(room, MAX_HEADER_BYTES), restores)
        room -= len(shards[name].source_header.text)
    entries = document.entries("files")
    files = {check_name(name, MANIFEST_FILENAME, plain=False): entry.file() for name, entry in entries}
    made = {name: entry.file() for name, entry in document.entries_or_none("made")}
    if made.keys() - {INDEX_FILENAME}:
        document.bad(f"made may list {INDEX_FILENAME} only")
    texts: dict[str, str] = {}
    for name, text in document.get("texts", dict).items():
        if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
            document.bad(f"the text of {printable(name)!r} is not a valid string")
        if check_name(name, MANIFEST_FILENAME) not in _TEXT_NAMES:
            document.bad(f"texts holds {printable(name)!r}; only {', '.join(_TEXT_NAMES)} are restored from a text")
        texts[name] = text
    text_digests = {name: entry.file() for name, entry in document.entries("text_digests")}
    if text_digests.keys() != texts.keys():
        document.bad("texts and text_digests list different files")
    if CONFIG_FILENAME not in texts or not shards:
        document.bad("it lists no shards, or has no text of config.json")
    card = _card(document)
    clash = find_clash([*shards, *made, *{MANIFEST_FILENAME, *texts}, card.name if card else CARD_FILENAME], files)
    if clash:
        document.bad(f"it lists {printable(clash[0])!r} twice, or both as a file and as a folder")
    left_behind = document.get("left_behind", dict)
    if not all(isinstance(reason, str) for reason in left_behind.values()):
        document.bad("left_behind must map names to reasons")
    repo_id, revision = source.optional("repo_id"), source.optional("revision")
    return Manifest(
        shards,
        texts,
        text_digests,
        files,
        repo_id,
        revision,
        left_behind,
        card=card,
        restores=restores,
        version=version,
        made=made,
    )


def _shard(name: str, entry: _Checked, room: int, restores: Restores) -> ManifestShard:
    source, output = entry.sub("source"), entry.sub("output")
    text = _unpack(entry, "source_header", name, room)
    size = source.size()
    header = parse_header(text, size - LENGTH_BYTES - len(text), f"{MANIFEST_FILENAME} (header of {name})")
    return ManifestShard(header, source.file() if restores == "files" else None, output.file())


def _card(document: _Checked) -> SourceCard | None:
    entry = document.sub_or_none("source_card")
    if entry is None:
        return None
    name = check_name(entry.get("name", str), MANIFEST_FILENAME)
    data = _unpack(entry, "data", name, MAX_CARD_BYTES)
    if name.casefold() != CARD_FILENAME.casefold():
        document.bad(f"source_card is called {printable(name)!r}, which is not {CARD_FILENAME}")
    return SourceCard(name, data, entry.file())


def _unpack(entry: _Checked, key: str, name: str, room: int) -> bytes:
    """Inflates what was packed to at most ``room`` bytes, so that a small manifest cannot fill the memory."""
    try:
        packed = base64.b64decode(entry.get(key, str), validate=True)
        inflater = zlib.decompressobj()
        text = inflater.decompress(packed, room + 1)
    except (binascii.Error, ValueError, zlib.error):
        entry.bad(f"the {key} of {printable(name)!r} is not zlib in base64")
    if len(text) > room or not inflater.eof or inflater.unused_data:
        entry.bad(f"the {key} of {printable(name)!r} inflates beyond {room} bytes or is cut")
    return text


class _Checked:
    """A JSON object of the manifest whose values are checked as they are taken."""

    def __init__(self, value: Any, what: str) -> None:
        self._what = what
        if not isinstance(value, dict):
            self.bad("it is not an object")
        self._value: dict[str, Any] = value

    def bad(self, message: str) -> NoReturn:
        """Refuses the manifest."""
        raise refuse("bad-manifest", f"{self._what}: {message}", file=MANIFEST_FILENAME)

    def get(self, key: str, kind: type) -> Any:
        """Returns a value of exactly the given type."""
        value = self._value.get(key)
        if type(value) is not kind:
            self.bad(f"{key} must be of type {kind.__name__}")
        return value

    def optional(self, key: str) -> str | None:
        """Returns a string or None."""
        return None if self._value.get(key) is None else str(self.get(key, str))

    def sub(self, key: str) -> _Checked:
        """Returns the object under a key."""
        return _Checked(self._value.get(key), f"{self._what}, {key}")

    def sub_or_none(self, key: str) -> _Checked | None:
        """Returns the object under a key that must be there, or None if it is null."""
        return None if self._value.get(key, ...) is None else self.sub(key)

    def entries(self, key: str) -> list[tuple[str, _Checked]]:
        """Returns the objects under the keys of the object under a key."""
        return [(name, _Checked(value, f"{key}, {printable(name)!r}")) for name, value in self.get(key, dict).items()]

    def entries_or_none(self, key: str) -> list[tuple[str, _Checked]]:
        """Returns the objects under the keys of the object under a key, which need not be there."""
        return self.entries(key) if key in self._value else []

    def restores(self) -> Restores:
        """Returns ``restores``; what is absent means the files."""
        value = self._value.get("restores", "files")
        if value not in ("files", "tensors"):
            self.bad("restores must be 'files' or 'tensors'; install a newer awq2marlin")
        return "tensors" if value == "tensors" else "files"

    def size(self) -> int:
        """Returns ``size``, a number of bytes."""
        size: int = self.get("size", int)
        if not 0 <= size < 1 << 62:
            self.bad("size is out of range")
        return size

    def file(self) -> FileDigest:
        """Returns ``size`` and ``digests``: XXH3, and perhaps SHA-256."""
        digests = self.get("digests", list)
        if not digests or not all(map(is_digest, digests)) or not digests[0].startswith("xxh3_128:"):
            self.bad("digests must begin with one 'xxh3_128:...'")
        sha256 = [digest.removeprefix("sha256:") for digest in digests[1:] if digest.startswith("sha256:")]
        if len(sha256) != len(digests) - 1 or len(sha256) > 1:
            self.bad("digests may hold one 'sha256:...' after that, and nothing else")
        return FileDigest(self.size(), digests[0], sha256[0] if sha256 else None)
