"""Content hashes of large files, read once on each machine and not by every replica at every load.

A bundle of ten million products is gigabytes, and hashing them takes seconds of a processor. Small
files are hashed every time. A large one is known again by device, inode, size and time of last
change; who changes it in place and sets its time back is not noticed before the next machine reads
it. The notes lie beside the bundles, a file for each machine; whoever could forge them could as
well replace a bundle and the pointer to it.
"""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from driftline.platform.artefacts import hash_file, read_json, write_json
from driftline.platform.errors import DriftlineError

logger = logging.getLogger(__name__)

FOLDER: Final = ".verified"
LARGE_BYTES: Final = 16 << 20
"""Smaller files are read every time: that takes some hundredths of a second."""
SETTLED_SECONDS: Final = 2.0
"""A file that was written so recently might be written again within one tick of its clock."""
MAX_NOTES: Final = 200
LOCK_SECONDS: Final = 120


class VerifiedFiles:
    """Hashes of files below a folder of bundles. Replicas of one machine wait for one another.

    Args:
        bundles: Where the notes are kept, in a hidden folder; nowhere if it cannot be written.
    """

    def __init__(self, bundles: Path) -> None:
        self._notes = bundles / FOLDER / f"{socket.gethostname()}.json"
        self.num_bytes_read = 0
        """Bytes that had to be read so far."""

    def hash(self, path: Path) -> str:
        """SHA-256 of the bytes, in hex."""
        if path.stat().st_size < LARGE_BYTES:
            return self._read(path)
        known = self._known(path)
        if known is not None:
            return known
        with self._turn():
            return self._known(path) or self._note(path)

    def hash_all(self, root: Path) -> dict[str, str]:
        """Hash of each file below ``root`` by relative path, in order of path."""
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): self.hash(path) for path in files}

    def _read(self, path: Path) -> str:
        self.num_bytes_read += path.stat().st_size
        return hash_file(path)

    def _known(self, path: Path) -> str | None:
        found = self._read_notes().get(_identity(path))
        return found if isinstance(found, str) else None

    def _read_notes(self) -> dict[str, Any]:
        try:
            return read_json(self._notes)
        except (OSError, ValueError, DriftlineError):
            return {}  # none yet, or damaged: files are read anew

    def _note(self, path: Path) -> str:
        before = _identity(path)
        started = time.monotonic()
        content = self._read(path)
        seconds = time.monotonic() - started
        logger.info("hashed %s, %d MB, in %.2f s", path, path.stat().st_size >> 20, seconds)
        is_settled = time.time() - path.stat().st_mtime > SETTLED_SECONDS
        if _identity(path) == before and is_settled:
            newest = dict([*self._read_notes().items(), (before, content)][-MAX_NOTES:])
            try:
                write_json(self._notes, newest)
            except OSError as error:
                logger.debug("cannot note %s: %s", path, error)
        return content

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process of the machine at a time; without a turn rather than never."""
        lock = FileLock(self._notes.with_suffix(".lock"), timeout=LOCK_SECONDS)
        try:
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, Timeout) as error:
            logger.debug("no turn at %s: %s", self._notes, error)
        try:
            yield
        finally:
            lock.release()


def _identity(path: Path) -> str:
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
