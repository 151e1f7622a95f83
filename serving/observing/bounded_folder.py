"""A folder of finished files that never grows beyond a time and a size; the oldest files go."""

import time
from pathlib import Path
from typing import Final

ABANDONED_SECONDS: Final = 3_600.0
"""A half-written file, or an empty folder, this old belongs to nobody who still lives."""


def bound_folder(
    root: Path, *, suffix: str, keep_seconds: float, max_bytes: int, now: float | None = None
) -> int:
    """Delete files below ``root`` that are too old or do not fit; gives the bytes that are left.

    Age is the time since a file was written. What a killed process left half-written is deleted
    after an hour, and so are empty folders. Several processes may do this at once.

    Args:
        root: Need not exist.
        suffix: Of the files that count, e.g. ``.parquet``.
        keep_seconds: Older files are deleted.
        max_bytes: Room for all of them.
        now: Seconds since the epoch; the wall clock when not given.
    """
    now = time.time() if now is None else now
    found: list[tuple[float, int, Path]] = []
    for path in root.rglob("*"):
        try:
            status = path.stat()
            age = now - status.st_mtime
            if path.is_dir():
                if age > ABANDONED_SECONDS and not any(path.iterdir()):
                    path.rmdir()
            elif path.name.endswith(".partial"):
                if age > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
            elif path.suffix == suffix:
                found.append((status.st_mtime, status.st_size, path))
        except OSError:  # gone meanwhile, or filled meanwhile
            continue
    left = 0
    for written_at, size, path in sorted(found, reverse=True):
        if now - written_at > keep_seconds or left + size > max_bytes:
            max_bytes = min(max_bytes, left)  # what is older goes, too, however small
            path.unlink(missing_ok=True)
        else:
            left += size
    return left
