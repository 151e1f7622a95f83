"""Whose turn it is on a processor, and on which: requests first.

Ray starts its workers with niceness 15, so that they yield to everything else on their machine. For
a replica that answers within milliseconds this is wrong: any busy process beside it makes its
slowest answers tens of times slower. On a Ray of ours workers begin at 0, and those that train step
back by themselves.
"""

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final

from filelock import FileLock, Timeout

FOREGROUND: Final = {"RAY_worker_niceness": "0"}
"""Environment of the process that starts a Ray on which requests are answered."""
BACKGROUND_NICENESS: Final = 10
CROWDED_SECONDS: Final = 0.1
"""Shorter waits between two looks do not matter."""


def step_back() -> None:
    """Let this process yield to those that answer requests; for good."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(now, BACKGROUND_NICENESS))


class OwnCore:
    """Keeps one thread to a core that no other process keeps to, as far as ours go.

    A thread that answers within a millisecond and sleeps in between is moved from core to core, and
    finds cold caches and somebody else's work on each. Which cores are kept stands in lock files of
    this user's, which end with their process. Containers do not see each other's, and may begin
    with the same core; so a thread that waits for its core longer than it runs there takes another.

    Args:
        folder: Of the lock files; the same for all processes.
        chooser: Draws the core that follows a crowded one.
    """

    def __init__(self, folder: Path | None = None, *, chooser: Random | None = None) -> None:
        self._thread = threading.get_native_id()
        self._folder = folder or Path(tempfile.gettempdir()) / f"driftline-cores-{os.getuid()}"
        self._chooser = chooser or Random()
        self._lock: FileLock | None = None
        self._before: set[int] = set()
        self._ran_waited = (0.0, 0.0)
        self.core: int | None = None
        """Which it is; ``None`` while none is free, or this system knows no such thing."""

    def look(self) -> None:
        """Take a core, if one is free; another one if this one was crowded since the last look."""
        if not hasattr(os, "sched_setaffinity"):
            return
        left = None
        if self.core is not None:
            if not self._is_crowded():
                return
            left = self.core
            self.give_back()
        every = os.sched_getaffinity(self._thread)
        cores = sorted(every, reverse=True)  # the first serves devices
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(cores) == 1 or self._folder.stat().st_uid != os.getuid():
            return
        if left is not None:
            cores.remove(left)
            self._chooser.shuffle(cores)
        for core in cores:
            lock = FileLock(self._folder / f"{core}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            os.sched_setaffinity(self._thread, {core})
            self.core, self._lock, self._before = core, lock, every
            self._ran_waited = self._read_times()
            return

    def give_back(self) -> None:
        """Let others have it; the thread may run wherever it might before."""
        if self._lock is not None:
            with suppress(OSError):  # the thread has ended
                os.sched_setaffinity(self._thread, self._before)
            self._lock.release()
            self._lock = self.core = None

    def _is_crowded(self) -> bool:
        before, self._ran_waited = self._ran_waited, self._read_times()
        ran, waited = (now - then for now, then in zip(self._ran_waited, before, strict=True))
        return waited > max(ran, CROWDED_SECONDS)

    def _read_times(self) -> tuple[float, float]:
        """Seconds that the thread has run, and that it wanted to and did not; 0 where unknown."""
        try:
            found = Path(f"/proc/self/task/{self._thread}/schedstat").read_text().split()
        except OSError:
            return 0.0, 0.0
        return int(found[0]) / 1e9, int(found[1]) / 1e9


def roam() -> None:
    """Let the calling thread run wherever the main thread may; it began where its maker was."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
