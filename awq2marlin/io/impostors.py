"""What may lie in a file's place: a Git LFS pointer, or the page with which a server answered a download."""

from __future__ import annotations

from typing import NamedTuple

from awq2marlin.errors import CheckpointError, printable, refuse

#: So much of a file's beginning tells what it is; a Git LFS pointer is shorter.
HEAD_BYTES = 1024

_POINTERS = (b"version https://git-lfs", b"version https://hawser")
_PAGES = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML document"))
_JSON = "JSON"


class Impostor(NamedTuple):
    """What a file is, that should be another.

    Attributes:
        code: the error's, if it is refused.
        what: with its article.
        remedy: what to do, after a semicolon.
    """

    code: str
    what: str
    remedy: str

    @property
    def is_json(self) -> bool:
        """Whether it is JSON, which is right in some places."""
        return self.what == _JSON

    @property
    def is_pointer(self) -> bool:
        """Whether it is a Git LFS pointer, which is right in no place."""
        return self.code == "lfs-pointer"

    def refusal(self, file: str) -> CheckpointError:
        """Returns the refusal of a file that it lies in the place of, to be raised by the caller."""
        return refuse(self.code, f"it is {self.what}, not the file itself; {self.remedy}", file=file)


def impostor(head: bytes) -> Impostor | None:
    """Returns what a file is by its beginning; None if that is nothing of this kind.

    Args:
        head: the first `HEAD_BYTES` bytes, or all.
    """
    if head.startswith(_POINTERS):
        remedy = "run 'git lfs install' once and 'git lfs pull' in its folder, or download the file, and try again"
        return Impostor("lfs-pointer", "a Git LFS pointer", remedy)
    remedy = "a server sent this in its place, most often an error message; download the file again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for begin, what in _PAGES:
        if text[: len(begin)].lower() == begin:
            return Impostor("error-page", what, remedy)
    if text.startswith(b"{") and text[1:].lstrip()[:1] in (b'"', b"}"):
        return Impostor("error-page", _JSON, remedy)
    return None


def text_in_place_of(head: bytes, file: str) -> CheckpointError | None:
    """Returns the refusal of a binary file that begins with text; None if it does not.

    Args:
        head: the first `HEAD_BYTES` bytes, or all.
        file: its name.
    """
    found = impostor(head)
    if found is not None:
        return found.refusal(file)
    line = head.split(b"\n")[0].decode("ascii", "replace").strip()
    if len(line) < 8 or not (line.isascii() and line.isprintable()):
        return None
    remedy = "download the file again"
    return Impostor("error-page", f"text that begins with {printable(line[:60])!r}", remedy).refusal(file)
