"""Start, find and stop the Serve application: in the foreground, or as a child process.

The server lives in a process of its own, because Ray Serve reads its switches on import and one
process holds one Ray. It runs a private Ray unless an address is given, and takes down only what
it brought up.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import DriftlineError
from driftline.platform.processes import (
    ProcessIdentity,
    check_port,
    new_family,
    spawn_module,
    stop_event,
    stop_family,
    wait_for,
)
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.workspace import Workspace
from driftline.serving.client import ScoringClient
from driftline.serving.transport.ingress import ingress_environment

logger = logging.getLogger(__name__)

READY_SECONDS: Final = 120.0


@dataclass
class ServingHandle:
    """A server started by :func:`start_serving`; also a context manager."""

    url: str
    log: Path
    ray_address: str
    process: subprocess.Popen[bytes] = field(repr=False)
    family: str = field(repr=False)
    scratch: Path = field(repr=False)
    grpc_address: str | None = None
    """Host and port of gRPC, where it is served."""

    @property
    def is_alive(self) -> bool:
        """Whether the server's process runs."""
        return self.process.poll() is None

    @property
    def client(self) -> ScoringClient:
        """A client of this server."""
        return ScoringClient(self.url)

    def stop(self) -> None:
        """Stop the server and everything it started; harmless when it is gone."""
        head = ProcessIdentity.of(self.process.pid)
        stop_family(self.family, first=[head] if head else [])
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self) -> "ServingHandle":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start_serving(
    settings: DriftlineSettings,
    *,
    address: str | None = None,
    ready_seconds: float = READY_SECONDS,
) -> ServingHandle:
    """Start the Serve application in the background and wait until it answers.

    Args:
        settings: ``serving`` says where it listens. Without a champion it answers 503.
        address: A running Ray to use; else ``settings.ray.address``, else a private one.
        ready_seconds: How long to wait.

    Raises:
        ResourceError: the port is taken, or the server did not come up; with the end of its log.
    """
    _check_port(settings)
    state = Workspace.of(settings).state / "serving"
    written, ready, log = state / "settings.json", state / "ready.json", state / "server.log"
    write_json(written, settings.model_dump(mode="json"))
    ready.unlink(missing_ok=True)
    family = new_family()
    scratch = Path(tempfile.mkdtemp(prefix="dl-")).resolve()  # short: a socket's path is limited
    arguments = [str(written), "--ready", str(ready), "--parent", str(os.getpid())]
    arguments += ["--scratch", str(scratch)]
    arguments += ["--address", address] if address else []
    process = spawn_module("driftline.serving.server", arguments, family=family, log=log)
    try:
        wait_for(ready, process=process, log=log, seconds=ready_seconds, name="the server")
    except DriftlineError:
        stop_family(family)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    facts = read_json(ready)
    return ServingHandle(
        url=facts["url"],
        log=log,
        ray_address=facts["ray_address"],
        process=process,
        family=family,
        scratch=scratch,
        grpc_address=grpc_address(settings),
    )


def serve_forever(
    settings: DriftlineSettings,
    *,
    address: str | None = None,
    on_ready: Callable[[str, str], None] | None = None,
    parent: int | None = None,
    scratch: Path | None = None,
) -> None:
    """Run the Serve application until SIGINT or SIGTERM.

    Args:
        settings: ``serving`` says where it listens.
        address: A running Ray to use; else ``settings.ray.address``, else a private one.
        on_ready: Called once with the server's URL and Ray's address.
        parent: Stop, too, when this is no longer the parent process.
        scratch: Short-named folder for sockets; a temporary one when not given.

    Raises:
        ResourceError: the port is taken.
    """
    where = address or settings.ray.address
    if where is None:
        _check_port(settings)
    ours = where is None or where != settings.ray.address
    with _folder(scratch) as folder:
        switches = ingress_environment(settings.serving, scratch=folder if ours else None)
        os.environ.update(switches)
        with _ray(settings, address=where, switches=switches, scratch=folder) as ray_address:
            url = serving_url(settings)
            if ours and _answers(settings):
                logger.info("took over the application of a driver that was killed")
            else:
                _run_application(settings)
            stop = stop_event(parent=parent)
            logger.info("serving %s at %s", settings.name, url)
            if on_ready is not None:
                on_ready(url, ray_address)
            stop.wait()
            _stop_application(settings)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="dl-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary).resolve()


@contextmanager
def _ray(
    settings: DriftlineSettings, *, address: str | None, switches: dict[str, str], scratch: Path
) -> Iterator[str]:
    """Ray for the duration of the block; gives its address. A running Ray is only left."""
    # Read when Ray starts: no usage report, and no warning about accelerators that are not there.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if address is not None:
        runtime: dict[str, Any] = {"runtime_env": {"env_vars": switches}}
    else:
        runtime = {
            "num_cpus": settings.ray.num_cpus,
            "include_dashboard": False,
            "_temp_dir": str(scratch / "ray"),
        }
    context = ray.init(address or "local", log_to_driver=False, **runtime)
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def _answers(settings: DriftlineSettings) -> bool:
    """Whether this Ray serves exactly these settings, as it does after its driver was killed.

    To deploy again would replace the replica and cost requests.
    """
    if not _serve_runs():
        return False
    with ScoringClient(serving_url(settings), timeout_seconds=5) as client:
        try:
            return client.status().get("settings") == settings.identity
        except (OSError, ValueError):
            return False


def _run_application(settings: DriftlineSettings) -> None:
    """Deploy, and wait until the application answers."""
    from ray import serve

    from driftline.serving.app import ServingAppSettings, app

    options = {"host": settings.serving.host, "port": settings.serving.port}
    logging_config = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(
        proxy_location="HeadOnly",
        http_options=options,
        grpc_options=_grpc_options(settings),
        logging_config=logging_config,
    )
    serve.run(app(ServingAppSettings(market=settings)), name=application_name(settings))
    with ScoringClient(serving_url(settings)) as client:
        client.wait_until_up(seconds=READY_SECONDS)


def _grpc_options(settings: DriftlineSettings) -> dict[str, Any] | None:
    if settings.serving.grpc_port is None:
        return None
    from driftline.serving.transport.grpc_face import SERVICER

    return {"port": settings.serving.grpc_port, "grpc_servicer_functions": [SERVICER]}


def _stop_application(settings: DriftlineSettings) -> None:
    from ray import serve

    name = application_name(settings)
    others = set(serve.status().applications) - {name}
    if others:
        logger.info("leaving Ray Serve to %s", sorted(others))
        serve.delete(name)
    else:
        serve.shutdown()


def _serve_runs() -> bool:
    """Whether this Ray has a Serve already, e.g. after its driver was killed."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in actors)


def application_name(settings: DriftlineSettings) -> str:
    """Name of a market's Serve application."""
    return f"driftline-{settings.name}"


def _check_port(settings: DriftlineSettings) -> None:
    serving = settings.serving
    check_port(serving.host, serving.port, setting="serving.port")
    if serving.grpc_port is not None:
        check_port(serving.host, serving.grpc_port, setting="serving.grpc_port")


def serving_url(settings: DriftlineSettings) -> str:
    """Where the application answers on this machine."""
    return f"http://{_reachable(settings.serving.host)}:{settings.serving.port}"


def grpc_address(settings: DriftlineSettings) -> str | None:
    """Where it answers gRPC on this machine; ``None`` when it does not."""
    if settings.serving.grpc_port is None:
        return None
    return f"{_reachable(settings.serving.host)}:{settings.serving.grpc_port}"


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def main(arguments: list[str] | None = None) -> None:
    """Entry of the child process: ``python -m driftline.serving.server SETTINGS.json``."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--ready", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--address")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = parse_settings(read_json(given.settings), origin=str(given.settings))

    def say_ready(url: str, ray_address: str) -> None:
        facts: dict[str, Any] = {"url": url, "ray_address": ray_address, "pid": os.getpid()}
        write_json(given.ready, facts)

    try:
        serve_forever(
            settings,
            address=given.address,
            on_ready=say_ready,
            parent=given.parent,
            scratch=given.scratch,
        )
    except DriftlineError as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
