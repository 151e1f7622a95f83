"""Child processes that can always be found again: each family carries a mark in its environment.

Ray detaches what it starts, and a supervisor may be killed before it can clean up. The mark is
inherited by every descendant, so a family is stopped as a whole, and nothing outside it is touched.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import psutil

from driftline.platform.errors import ResourceError

logger = logging.getLogger(__name__)

MARK: Final = "DRIFTLINE_FAMILY"
GONE: Final = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)
TOLERANCE_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 0.5


@dataclass(frozen=True)
class ProcessIdentity:
    """A process number together with its start, because numbers are used again."""

    pid: int
    started: float
    """Seconds since the epoch."""

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The process that has this number now."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except GONE:
            return None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ProcessIdentity":
        """Read what ``to_json`` gave."""
        return cls(pid=int(raw["pid"]), started=float(raw["started"]))

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < TOLERANCE_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except GONE:
            return False


def new_family() -> str:
    """A mark that nobody else has."""
    return uuid.uuid4().hex


def spawn_module(
    module: str,
    arguments: Sequence[str],
    *,
    family: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE`` in a session of its own, its output appended to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **(environment or {}), MARK: family},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def spawn_detached(
    module: str, arguments: Sequence[str], *, family: str, log: Path
) -> ProcessIdentity:
    """Like :func:`spawn_module`, for a process that is meant to outlive this one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", module, *arguments],
        {**os.environ, MARK: family},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    identity = ProcessIdentity.of(pid)
    return identity or ProcessIdentity(pid, started=0.0)


def family_members(family: str) -> list[psutil.Process]:
    """Every living process that carries the mark, this one excepted."""
    members = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK) == family
            if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except GONE:
            continue
    return members


def stop_family(
    family: str, *, first: Iterable[ProcessIdentity] = (), patience_seconds: float = 20.0
) -> int:
    """End a family: first its heads, politely, then whoever is left. Returns how many there were.

    Args:
        family: The mark.
        first: Heads in the order in which to ask them; each may stop its own children.
        patience_seconds: How long a head may take before it is killed.
    """
    found = {process.pid for process in family_members(family)}
    for head in first:
        if head.is_alive and head.pid in found:
            _end([psutil.Process(head.pid)], patience_seconds)
    rest = family_members(family)
    _end(rest, min(patience_seconds, 5.0))
    return len(found)


def _end(processes: Sequence[psutil.Process], patience_seconds: float) -> None:
    for process in processes:
        try:
            process.terminate()
        except GONE:
            continue
    _, alive = psutil.wait_procs(processes, timeout=patience_seconds)
    for process in alive:
        logger.warning("process %d did not stop in %g s: killed", process.pid, patience_seconds)
        try:
            process.kill()
        except GONE:
            continue
    psutil.wait_procs(alive, timeout=5)


def stop_event(*, parent: int | None = None) -> threading.Event:
    """An event that is set by SIGTERM, by SIGINT, and when ``parent`` is no longer the parent.

    Call it after ``ray.init``, which brings a handler of its own.
    """
    stop = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        stop.set()

    def watch() -> None:
        while not stop.wait(LOOK_SECONDS):
            if os.getppid() != parent:
                logger.warning("parent process %s is gone: stopping", parent)
                stop.set()

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, remember)
    if parent is not None:
        threading.Thread(target=watch, name="watch-parent", daemon=True).start()
    return stop


def check_port(host: str, port: int, *, setting: str) -> None:
    """Refuse a port that someone else listens on.

    Raises:
        ResourceError: the port is taken, or the address is not one of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"{setting}: cannot listen on {host}:{port} ({error.strerror}); stop what listens "
                f"there (`driftline down` if it is ours) or choose another with --set {setting}=..."
            ) from error


def free_port() -> int:
    """A port that nobody listens on at this moment, below those the system hands out by itself."""
    for _ in range(100):
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ResourceError("found no free port between 20000 and 29999 in 100 attempts")


def wait_for(
    condition: Path, *, process: subprocess.Popen[bytes], log: Path, seconds: float, name: str
) -> None:
    """Wait until a child has written the file that says it is ready.

    Raises:
        ResourceError: the child ended, or time ran out; with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not condition.exists():
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            state = f"ended with code {code}" if code is not None else f"not ready in {seconds:g} s"
            raise ResourceError(f"{name} {state}; the end of {log}:\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path, *, num_lines: int = 15) -> str:
    """The last lines of a text file, indented."""
    if not log.exists():
        return "  (empty)"
    lines = log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"  {line}" for line in lines) or "  (empty)"
