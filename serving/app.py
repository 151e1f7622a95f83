"""The Ray Serve application: ``driftline.serving.app:app`` is a typed builder.

Loading a new bundle is not a matter of Serve's ``reconfigure``, which leaves replicas unready
(ray#54509): each replica follows the champion by itself, in a thread.
"""

import asyncio
import logging
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import torch
from pydantic import model_validator
from ray import serve
from ray.serve import Application

from driftline.platform.errors import ResourceError
from driftline.platform.priority import OwnCore
from driftline.platform.settings import DriftlineSettings, Settings, load_settings, parse_settings
from driftline.serving.observing.observation import Observation
from driftline.serving.observing.repeating import Repeating
from driftline.serving.rollout.admin import with_administration
from driftline.serving.service import BundleService
from driftline.serving.transport.asgi import HttpFace
from driftline.serving.transport.grpc_face import Encoded, GrpcFace
from driftline.serving.transport.guard import middlewares

logger = logging.getLogger(__name__)

MAX_ONGOING: Final = 10_000
"""Requests handed to a replica at once, more than HAProxy has connections: who waits, and how long,
is the business of our own line, and slow clients must not fill Ray Serve's."""
HEALTH_CHECK_SECONDS: Final = 1.0
"""How often Ray Serve asks a replica how it is: so soon one that was killed is missed, and another
started. Ray Serve's own is 10 s."""
SWITCH_SECONDS: Final = 0.0005
"""How long a request waits for a thread of ours that has the interpreter; Python's own is 5 ms."""

CORE_SECONDS: Final = 2.0
"""How often a replica looks whether there is a core for it, and a better one than it has."""


class ServingAppSettings(Settings):
    """What to serve: a market's settings, or the file that holds them."""

    market: DriftlineSettings | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    """``a.b=c`` on top of ``config``."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.market is None) == (self.config is None):
            raise ValueError("give either market (all settings) or config (a file), not both")
        return self

    def resolve(self) -> DriftlineSettings:
        """The settings of the market, tiers resolved."""
        if self.market is not None:
            return self.market
        assert self.config is not None
        return load_settings(self.config, overrides=self.overrides)


class ScoringReplica:
    """One copy of the application; holds a bundle and a feature snapshot of its own.

    Ray Serve calls it on the replica's event loop. There the guard hands scoring requests straight
    to its ``face``.
    """

    def __init__(self, market: dict[str, Any]) -> None:
        middlewares()  # where Ray Serve does not call it itself: behind its own proxy
        torch.set_num_threads(1)  # requests run beside each other, not one on many cores
        sys.setswitchinterval(SWITCH_SECONDS)
        settings = parse_settings(market, origin="of the Serve application")
        replica = f"{settings.name}-{uuid.uuid4().hex[:6]}"
        self._market = settings
        self._observation = Observation.of(settings, replica=replica, within_ray=True)
        self._service = BundleService(
            settings, replica=replica, observers=self._observation.observers
        )
        self.face = HttpFace(self._service, settings.serving, pages=self._observation.pages)
        self.loop = asyncio.get_running_loop()
        self._grpc = GrpcFace(self._service, settings.serving, line=self.face.line)
        self._observation.follow(self._service.status, waiting=lambda: len(self.face.line))
        self._service.start()
        self._observation.start()
        if settings.serving.own_cores:
            core = OwnCore()
            Repeating("own-core", seconds=CORE_SECONDS, action=core.look).start()

    def __del__(self) -> None:
        """Ray Serve calls this when the replica goes: write what waits."""
        if hasattr(self, "_service"):
            self._observation.close()
            self._service.stop()

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        """Ray Serve asks for the ASGI application after construction."""
        return with_administration(self.face, self._market, status=self._service.status)

    async def Score(self, request: bytes, grpc_context: Any) -> Encoded:  # noqa: N802
        """Ray Serve calls it by the method of ``serving/scoring.proto``."""
        return await self._grpc.score(request, grpc_context)

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here.

        Raises:
            ResourceError: the thread that follows the champion has died.
        """
        if not self._service.is_following:
            raise ResourceError("the thread that follows the champion has died")


def app(settings: ServingAppSettings) -> Application:
    """Build the application; nothing starts before ``serve.run``.

    The same for ``serve run driftline.serving.app:app config=FILE``.
    """
    market = settings.resolve()
    serving = market.serving
    deployment = serve.deployment(
        serve.ingress()(ScoringReplica),
        name="scorer",
        num_replicas=serving.num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        ray_actor_options={"num_cpus": serving.num_cpus_per_replica},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(market.model_dump(mode="json"))
