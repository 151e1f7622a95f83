"""Whose turn it is on a processor, and on which: requests first.

Ray starts its workers with niceness 15, so that they yield to everything else on their machine. For
a replica that answers within milliseconds this is wrong: any busy process beside it makes its
slowest answers tens of times slower. On a Ray of ours workers begin at 0, and those that train step
back by themselves.
"""

import os
import tempfile
import threading
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

FOREGROUND: Final = {"RAY_worker_niceness": "0"}
"""Environment of the process that starts a Ray on which requests are answered."""
BACKGROUND_NICENESS: Final = 10


def step_back() -> None:
    """Let this process yield to those that answer requests; for good."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(now, BACKGROUND_NICENESS))


class OwnCore:
    """Keeps one thread to a core that no other process keeps to, as far as ours go.

    A thread that answers within a millisecond and sleeps in between is moved from core to core, and
    finds cold caches and somebody else's work on each. Which cores are kept stands in lock files of
    this user's, which end with their process. Containers do not see each other's.

    Args:
        folder: Of the lock files; the same for all processes.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._thread = threading.get_native_id()
        self._folder = folder or Path(tempfile.gettempdir()) / f"driftline-cores-{os.getuid()}"
        self._lock: FileLock | None = None
        self.core: int | None = None
        """Which it is; ``None`` while none is free, or this system knows no such thing."""

    def take(self) -> None:
        """Take a core for the thread that made this, if one is free; harmless to call again."""
        if self.core is not None or not hasattr(os, "sched_setaffinity"):
            return
        cores = sorted(os.sched_getaffinity(self._thread), reverse=True)  # the first serves devices
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(cores) == 1 or self._folder.stat().st_uid != os.getuid():
            return
        for core in cores:
            lock = FileLock(self._folder / f"{core}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            os.sched_setaffinity(self._thread, {core})
            self.core, self._lock = core, lock
            return

    def give_back(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = self.core = None


def roam() -> None:
    """Let the calling thread run wherever the main thread may; it began where its maker was."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
