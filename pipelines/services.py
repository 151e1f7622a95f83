"""Two of the processes that ``driftline up`` keeps alive: a private Ray, and the cadence service.

The third is ``driftline.serving.server``. Each ends when it is told to, or when its parent is gone.
"""

import argparse
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from driftline.pipelines.console import quiet_libraries
from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import DriftlineError
from driftline.platform.loopback import RAY_OF_MANY_MACHINES, is_loopback, ray_on_loopback
from driftline.platform.priority import FOREGROUND
from driftline.platform.processes import stop_event
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

OF_CLIENTS: Final = ("RAY_AUTH_MODE", RAY_OF_MANY_MACHINES)
"""Who connects by address must know that Ray asks for a token, as it does by default, and which
address this machine has."""


def hold_ray(settings: DriftlineSettings, *, ready: Path, parent: int, scratch: Path) -> None:
    """Run a private Ray until told to stop; its address goes to ``ready``."""
    import ray

    shutil.rmtree(scratch / "ray", ignore_errors=True)  # what a killed one left
    os.environ.update(FOREGROUND)
    with ray_on_loopback() if is_loopback(settings.serving.host) else nullcontext():
        try:
            context = ray.init(
                "local",
                num_cpus=settings.ray.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=str(scratch / "ray"),
            )
            until = stop_event(parent=parent)
            facts = {
                "address": context.address_info["gcs_address"],
                "environment": {k: os.environ[k] for k in OF_CLIENTS if k in os.environ},
            }
            write_json(ready, facts)
            until.wait()
        finally:
            ray.shutdown()


def run_cadence(settings: DriftlineSettings, *, address: str, ready: Path, parent: int) -> None:
    """Run the cadence service on a Ray until told to stop."""
    import ray

    from driftline.pipelines.cadence import CadenceService
    from driftline.pipelines.schedules import Clock
    from driftline.pipelines.traffic import watch_canaries

    ray.init(address, namespace="driftline", log_to_driver=False)
    try:
        clock = Clock.from_json(read_json(Workspace.of(settings).state / "clock.json"))
        service = CadenceService(settings, clock=clock)
        service.start(now=datetime.now(UTC))
        until = stop_event(parent=parent)
        write_json(ready, {"address": address})
        watch_canaries(settings, until=until)
        service.stop()
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Entry: ``python -m driftline.pipelines.services ray|cadence SETTINGS.json --ready FILE``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("service", choices=["ray", "cadence"])
    parser.add_argument("settings", type=Path)
    parser.add_argument("--ready", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--address")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    quiet_libraries()
    settings = parse_settings(read_json(given.settings), origin=str(given.settings))
    try:
        if given.service == "ray":
            hold_ray(settings, ready=given.ready, parent=given.parent, scratch=given.scratch)
        else:
            run_cadence(settings, address=given.address, ready=given.ready, parent=given.parent)
    except DriftlineError as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
