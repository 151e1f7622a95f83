"""Keeps the services of ``driftline up`` alive: Ray, the Serve application, the cadence service.

A crashed service is started again after a pause that doubles with each crash. Ray comes first:
when it is lost, the others are stopped, and all start anew. What is alive stands in ``up.json``.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from driftline.platform.artefacts import read_json, write_json
from driftline.platform.processes import (
    MARK,
    ProcessIdentity,
    spawn_module,
    stop_event,
    stop_family,
    tail,
)
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.2
MAX_PAUSE_SECONDS: Final = 60.0
CALM_SECONDS: Final = 60.0
"""A service that has run so long is forgiven its earlier crashes."""
STOP_SECONDS: Final = 20.0


@dataclass(frozen=True)
class UpPaths:
    """Files of a running market, below ``Workspace.state``."""

    root: Path

    @property
    def report(self) -> Path:
        """What runs; written by the supervisor, gone after ``down``."""
        return self.root / "up.json"

    @property
    def settings(self) -> Path:
        """The settings that were in force at ``up``, with all overrides."""
        return self.root / "settings.json"

    @property
    def lock(self) -> Path:
        """Held while ``up`` or ``down`` is under way."""
        return self.root / "up.lock"

    def ready(self, service: str) -> Path:
        """Written by a service when it is ready."""
        return self.root / f"{service}.ready.json"

    def log(self, service: str) -> Path:
        """Output of a service."""
        return self.root / "logs" / f"{service}.log"


@dataclass
class Service:
    """One child process and how often it had to be started again."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    num_restarts: int = 0
    pause_seconds: float = 0.0
    start_after: float = 0.0
    last_exit: str | None = None
    identity: ProcessIdentity | None = field(default=None)

    @property
    def runs(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def to_json(self) -> dict[str, Any]:
        """Its entry in ``up.json``."""
        return {
            "process": self.identity.to_json() if self.identity else None,
            "restarts": self.num_restarts,
            "last_exit": self.last_exit,
        }


class Supervisor:
    """The loop that keeps services alive.

    Args:
        settings: ``ray.address`` decides whether a private Ray belongs to the services.
        paths: Where files lie.
        scratch: Short-named folder for sockets, removed by ``down``.
    """

    def __init__(self, settings: DriftlineSettings, paths: UpPaths, *, scratch: Path) -> None:
        self._settings = settings
        self._paths = paths
        self._scratch = scratch
        self._address = settings.ray.address
        names = ["serving", "cadence"] if self._address else ["ray", "serving", "cadence"]
        self._services = {name: Service(name) for name in names}
        self._written: dict[str, Any] = {}

    def run(self) -> None:
        """Start the services and look after them until told to stop."""
        stop = stop_event()
        logger.info("supervising %s", ", ".join(self._services))
        while not stop.wait(LOOK_SECONDS):
            for service in self._services.values():
                self._look_after(service)
            self._report()
        for name in reversed(self._services):
            self._stop(self._services[name])

    def _look_after(self, service: Service) -> None:
        now = time.monotonic()
        if service.runs:
            if now - service.started > CALM_SECONDS:
                service.pause_seconds = 0.0
            return
        if service.process is not None:
            self._bury(service, now=now)
        if now >= service.start_after and self._may_start(service):
            self._start(service, now=now)

    def _bury(self, service: Service, *, now: float) -> None:
        assert service.process is not None
        code = service.process.poll()
        first = self._settings.cadence.restart_seconds
        service.pause_seconds = min(MAX_PAUSE_SECONDS, max(first, 2 * service.pause_seconds))
        service.start_after = now + service.pause_seconds
        service.num_restarts += 1
        service.last_exit = f"{format_time(datetime.now(UTC))} with code {code}"
        service.process, service.identity = None, None
        logger.warning(
            "%s ended with code %s, starting again in %.1f s; the end of its log:\n%s",
            service.name,
            code,
            service.pause_seconds,
            tail(self._paths.log(service.name), num_lines=5),
        )
        if service.name == "ray":
            self._clear()

    def _clear(self) -> None:
        """End all that lived on a lost Ray; HAProxy, for one, outlives it and keeps the port."""
        stop_family(os.environ[MARK], patience_seconds=2)
        for service in self._services.values():
            if service.process is not None:
                service.process.wait()
            service.process, service.identity = None, None

    def _may_start(self, service: Service) -> bool:
        if service.name == "ray" or self._address:
            return True
        return self._services["ray"].runs and self._paths.ready("ray").exists()

    def _start(self, service: Service, *, now: float) -> None:
        ready = self._paths.ready(service.name)
        ready.unlink(missing_ok=True)
        arguments = [str(self._paths.settings), "--ready", str(ready)]
        arguments += ["--parent", str(os.getpid()), "--scratch", str(self._scratch)]
        environment: Mapping[str, str] = {}
        if service.name != "ray":
            address, environment = self._ray()
            arguments += ["--address", address]
        module = "driftline.serving.server"
        if service.name != "serving":
            module, arguments = "driftline.pipelines.services", [service.name, *arguments]
        service.process = spawn_module(
            module,
            arguments,
            family=os.environ[MARK],
            log=self._paths.log(service.name),
            environment=environment,
        )
        service.identity = ProcessIdentity.of(service.process.pid)
        service.started = now
        logger.info("%s started (process %d)", service.name, service.process.pid)

    def _ray(self) -> tuple[str, Mapping[str, str]]:
        """Ray's address, and what the environment of its clients must hold."""
        if self._address:
            return self._address, {}
        facts = read_json(self._paths.ready("ray"))
        return facts["address"], facts["environment"]

    def _stop(self, service: Service) -> None:
        if service.process is None or not service.runs:
            return
        service.process.terminate()
        try:
            service.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("%s did not stop in %g s: killed", service.name, STOP_SECONDS)
            service.process.kill()
            service.process.wait()

    def _report(self) -> None:
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        ready = all(
            service.runs and self._paths.ready(service.name).exists()
            for service in self._services.values()
        )
        value = {
            "name": self._settings.name,
            "family": os.environ[MARK],
            "scratch": str(self._scratch),
            "supervisor": me.to_json(),
            "ready": ready,
            "services": {name: service.to_json() for name, service in self._services.items()},
        }
        if value != self._written:
            write_json(self._paths.report, value)
            self._written = value


def read_report(settings: DriftlineSettings) -> Mapping[str, Any] | None:
    """What ``up`` started here, if it has not been taken down; it may have died since."""
    path = UpPaths(Workspace.of(settings).state).report
    return read_json(path) if path.exists() else None


def living_supervisor(report: Mapping[str, Any] | None) -> ProcessIdentity | None:
    """The living supervisor, if there is one."""
    if report is None or "supervisor" not in report:
        return None
    found = ProcessIdentity.from_json(report["supervisor"])
    return found if found.is_alive else None


def main(arguments: list[str] | None = None) -> None:
    """Entry: ``python -m driftline.pipelines.supervisor SETTINGS.json --scratch DIR``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if MARK not in os.environ:
        sys.exit("the supervisor is started by `driftline up`")
    settings = parse_settings(read_json(given.settings), origin=str(given.settings))
    paths = UpPaths(Workspace.of(settings).state)
    try:
        Supervisor(settings, paths, scratch=given.scratch).run()
    finally:
        shutil.rmtree(given.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
