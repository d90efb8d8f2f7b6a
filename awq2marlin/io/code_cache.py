"""Where compiled code is kept between processes, and the rules by which it is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where each process compiles for itself
    fcntl = None  # type: ignore[assignment]

#: The environment variable that names the folder.
CACHE_VARIABLE = "AWQ2MARLIN_CACHE"

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Returns the folder for compiled code: ``AWQ2MARLIN_CACHE``, or ``awq2marlin`` in the user's cache folder.

    It need not exist yet. A user without a home, as in some containers, has it among the temporary folders.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "awq2marlin"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"awq2marlin-{os.getuid()}"


def is_private(path: Path) -> bool:
    """Returns whether a file or folder belongs to the user and nobody else can write it, where the system knows that.

    Compiled code is code that will run, so it is taken only from a private file in a private folder.

    Raises:
        OSError: if it is not there.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


class CodeCache:
    """Compiled code in a folder, one file each: its SHA-256, then the code.

    The key is a digest of everything that went into the code, so nothing in there is ever out of date. A file appears
    complete under its name or not at all, so any number of a user's processes may share a folder. A file that is
    damaged, or that others could have written, counts as absent and is replaced. Where nothing can be kept, the caller
    goes on without.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path, ending: str) -> None:
        """Uses a folder, which `put` creates when it must.

        Args:
            folder: may be shared with caches of other endings.
            ending: of the files' names, such as ``.cubin``.
        """
        self.folder = folder
        self._ending = ending

    def path_of(self, key: str) -> Path:
        """Returns the file of ``key``; it need not exist."""
        return self.folder / f"{key}{self._ending}"

    def get(self, key: str) -> bytes | None:
        """Returns the code under ``key``, or None if there is none that is whole and private."""
        path = self.path_of(key)
        try:
            if not (is_private(path) and is_private(self.folder)):
                return None
            content = path.read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return code if code and hashlib.sha256(code).digest() == digest else None

    def put(self, key: str, code: bytes) -> bool:
        """Keeps code under ``key``; returns whether that worked (a full disk is no reason to fail)."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
        except OSError:
            return False
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            partial.replace(self.path_of(key))
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # it is still there only if it did not get its name
        return True

    @contextlib.contextmanager
    def one_at_a_time(self, key: str) -> Iterator[None]:
        """Has the user's processes and threads come in one after the other, so that what takes long is done by one.

        Whoever was waiting should look again with `get`. A process that ends leaves, whatever became of it. Where the
        folder cannot be locked, nobody waits.

        Args:
            key: of the code that is to be made. Whoever makes other code does not wait, but for one key in 256.
        """
        name = f".lock-{hashlib.sha256(key.encode()).hexdigest()[:2]}"  # so that there are not as many as keys
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / name).open("ab"))
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def files(self) -> list[Path]:
        """Returns the files that are kept, whole or not."""
        return sorted(self.folder.glob(f"*{self._ending}"))
