"""``driftline up`` and ``down``: a market that keeps itself fresh in the background."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from driftline.features.log import ImpressionLog
from driftline.pipelines.schedules import Clock
from driftline.pipelines.status import champion_facts
from driftline.pipelines.supervisor import UpPaths, living_supervisor, read_report
from driftline.platform.artefacts import write_json
from driftline.platform.errors import ResourceError
from driftline.platform.processes import (
    check_port,
    new_family,
    spawn_detached,
    stop_family,
    tail,
)
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import parse_time
from driftline.platform.workspace import Workspace
from driftline.serving.server import serving_url

logger = logging.getLogger(__name__)

READY_SECONDS: Final = 180.0
DOWN_SECONDS: Final = 60.0
MAX_CRASHES: Final = 2
"""A service that crashes more often before it is ready will not come up."""


@dataclass(frozen=True)
class UpReport:
    """What ``up`` left behind."""

    url: str
    already: bool
    """Whether it was up before."""
    logs: Path


def up(settings: DriftlineSettings, *, ready_seconds: float = READY_SECONDS) -> UpReport:
    """Start Ray, the Serve application and the cadence service; return when all are ready.

    Raises:
        ResourceError: the port is taken, another ``up`` is under way, or a service does not come
            up; then nothing is left running.
        MissingArtefactError: the event clock needs a checked log.
    """
    paths = UpPaths(Workspace.of(settings).state)
    with _alone(paths):
        report = UpReport(url=serving_url(settings), already=False, logs=paths.root / "logs")
        if living_supervisor(read_report(settings)) is not None:
            return UpReport(report.url, already=True, logs=report.logs)
        _take_down(settings, paths)
        check_port(settings.serving.host, settings.serving.port, setting="serving.port")
        clock = _clock(settings, now=datetime.now(UTC))
        write_json(paths.root / "clock.json", clock.to_json())
        write_json(paths.settings, settings.model_dump(mode="json"))
        scratch = Path(tempfile.mkdtemp(prefix="dl-")).resolve()
        supervisor = spawn_detached(
            "driftline.pipelines.supervisor",
            [str(paths.settings), "--scratch", str(scratch)],
            family=(family := new_family()),
            log=paths.log("supervisor"),
        )
        write_json(paths.report, {"name": settings.name, "family": family, "services": {}})
        deadline = time.monotonic() + ready_seconds
        while not (found := read_report(settings) or {}).get("ready"):
            late = time.monotonic() > deadline
            if not supervisor.is_alive or late or _crashes(found) > MAX_CRASHES:
                message = _explain(settings, found, paths)
                _take_down(settings, paths)
                raise ResourceError(message)
            time.sleep(0.1)
        return report


def down(settings: DriftlineSettings) -> int:
    """Stop what ``up`` started, and nothing else; gives the number of processes. Twice is fine.

    Raises:
        ResourceError: another ``up`` or ``down`` is under way.
    """
    paths = UpPaths(Workspace.of(settings).state)
    if not paths.root.exists():
        return 0
    with _alone(paths):
        return _take_down(settings, paths)


@contextmanager
def _alone(paths: UpPaths) -> Iterator[None]:
    paths.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.lock)
    try:
        lock.acquire(timeout=1)
    except Timeout as error:
        raise ResourceError(
            f"another `driftline up` or `down` is under way ({paths.lock} is held); wait for it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _take_down(settings: DriftlineSettings, paths: UpPaths) -> int:
    report = read_report(settings)
    if report is None:
        return 0
    supervisor = living_supervisor(report)
    heads = [supervisor] if supervisor else []
    num_stopped = stop_family(report["family"], first=heads, patience_seconds=DOWN_SECONDS)
    if "scratch" in report:
        shutil.rmtree(report["scratch"], ignore_errors=True)
    paths.report.unlink(missing_ok=True)
    logger.info("stopped %d processes", num_stopped)
    return num_stopped


def _crashes(report: Mapping[str, Any]) -> int:
    entries = report.get("services", {}).values()
    return max((entry["restarts"] for entry in entries), default=0)


def _explain(settings: DriftlineSettings, report: Mapping[str, Any], paths: UpPaths) -> str:
    entries = report.get("services", {})
    missing = [name for name in entries if not paths.ready(name).exists()] or ["supervisor"]
    log = paths.log(missing[0])
    return f"{settings.name}: {missing[0]} did not come up; the end of {log}:\n{tail(log)}"


def _clock(settings: DriftlineSettings, *, now: datetime) -> Clock:
    if settings.cadence.clock == "wall":
        return Clock.of(settings.cadence, now=now)
    split = ImpressionLog.open(Workspace.of(settings).clean, settings).split
    champion = champion_facts(Workspace.of(settings))
    known = None if champion is None else parse_time(champion["as_of"])
    return Clock.of(settings.cadence, now=now, split=split, known=known)
