"""Who reaches what listens: a Ray of one machine, and Ray Serve's gRPC servers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Final

RAY_OF_MANY_MACHINES: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for systems whose firewall asks about every port. Off: a Ray of one machine, whose
ports are bound to loopback. On, as by default on Linux: they listen on every interface."""
LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = "[::]"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """A Ray that starts in the block, and its workers, listen on loopback alone.

    Ray keeps its switch in a constant on import, and reads it in every process that it starts; so
    both are changed, and put back when the block ends. A switch that stands in the environment
    counts as it is.
    """
    if RAY_OF_MANY_MACHINES in os.environ:
        yield
        return
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[RAY_OF_MANY_MACHINES], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[RAY_OF_MANY_MACHINES]


def bind_serve_grpc(host: str) -> None:
    """Let the gRPC servers that Ray Serve starts in this process listen at ``host`` only.

    A replica has one for other replicas and, where gRPC is served, one for clients; Serve's proxy
    has the latter. Ray Serve 2.60 has them all listen on ``[::]``, and so two of its functions are
    replaced; that can go when it takes an address (ray#62522). Harmless to call again.
    """
    from ray.serve._private import default_impl, replica

    place = f"[{host}]" if ":" in host else host
    default_impl.add_grpc_address = _At(place, default_impl.add_grpc_address)
    replica.add_port_to_grpc_server = _At(place, replica.add_port_to_grpc_server)


class _At:
    """Adds a port to a gRPC server as Ray does, but not on all interfaces."""

    def __init__(self, place: str, add: Any) -> None:
        self._place = place
        self._add: Any = add._add if isinstance(add, _At) else add

    def __call__(self, server: Any, address: str) -> Any:
        return self._add(server, address.replace(EVERYWHERE, self._place))
