"""The face of the replica in this process, for what stands between uvicorn and Ray Serve."""

import asyncio
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from driftline.serving.transport.short_way import Exchange


class Face(Protocol):
    """Answers ``POST /v1/score``."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """By ASGI."""

    def take(self, exchange: "Exchange") -> None:
        """A request that has arrived whole, now or in its turn; does not raise."""


@runtime_checkable
class Replica(Protocol):
    """A deployment whose face may be used without Ray Serve."""

    face: Face
    loop: asyncio.AbstractEventLoop
    """The only event loop that it may be used on."""


def face_of_this_process() -> Face | None:
    """The face of the replica that this process runs; ``None`` where there is none of ours.

    A proxy's process has none. Nor has a replica whose code Ray Serve runs on a thread of its own,
    as it does without ``RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0``.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        replica = serve.get_replica_context().servable_object
    except RayServeException:
        return None
    if not isinstance(replica, Replica) or replica.loop is not asyncio.get_running_loop():
        return None
    return replica.face
