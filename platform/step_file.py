"""Steps done, handed from a training process to the command by a small file."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from driftline.platform.artefacts import whole_file
from driftline.platform.training import Progress

PERIOD_SECONDS: Final = 0.3


@dataclass
class StepFile:
    """Written by the worker of rank 0 a few times a second, read by whoever shows a bar."""

    path: Path
    _written: float = 0.0

    @classmethod
    def of(cls, checkpoints: Path) -> "StepFile":
        """The file that goes with a stage, beside its checkpoints."""
        return cls(checkpoints.with_name(f".{checkpoints.name}.progress"))

    def write(self, done: int, total: int) -> None:
        """Note the step, unless that was done a moment ago."""
        now = time.monotonic()
        if done == total or now - self._written > PERIOD_SECONDS:
            self._written = now
            with whole_file(self.path) as scratch:
                scratch.write_text(f"{done} {total}")

    def read(self) -> tuple[int, int] | None:
        """Steps done and steps in all; None before the first."""
        try:
            done, total = self.path.read_text().split()
        except FileNotFoundError:
            return None
        return int(done), int(total)


@contextmanager
def followed(file: StepFile, progress: Progress | None) -> Iterator[None]:
    """Call ``progress`` from a thread while the block runs; remove the file at its end."""
    ended = threading.Event()
    threads = []
    if progress is not None:
        threads = [threading.Thread(target=_follow, args=(file, progress, ended), daemon=True)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        file.path.unlink(missing_ok=True)


def _follow(file: StepFile, progress: Progress, ended: threading.Event) -> None:
    last = None
    while True:
        stop = ended.wait(PERIOD_SECONDS)
        if (now := file.read()) is not None and now != last:
            progress(*now)
            last = now
        if stop:
            return
