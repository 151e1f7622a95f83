"""The Ray Serve application: ``driftline.serving.app:app`` is a typed builder.

Loading a new bundle is not a matter of Serve's ``reconfigure``, which leaves replicas unready
(ray#54509): each replica follows the champion by itself, in a thread.
"""

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import torch
from pydantic import model_validator
from ray import serve
from ray.serve import Application

from driftline.platform.errors import ResourceError
from driftline.platform.settings import DriftlineSettings, Settings, load_settings, parse_settings
from driftline.serving.asgi import HttpFace
from driftline.serving.service import BundleService

logger = logging.getLogger(__name__)

MAX_ONGOING: Final = 1_000
"""Requests handed to a replica at once; they wait in its own event loop, not in the router's."""


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
    """One copy of the application; holds a bundle and a feature snapshot of its own."""

    def __init__(self, market: dict[str, Any]) -> None:
        torch.set_num_threads(1)  # requests run beside each other, not one on many cores
        settings = parse_settings(market, origin="of the Serve application")
        replica = f"{settings.name}-{uuid.uuid4().hex[:6]}"
        self._max_bytes = settings.serving.max_request_bytes
        self._service = BundleService(settings, replica=replica)
        self._service.start()

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        """Ray Serve asks for the ASGI application after construction."""
        return HttpFace(self._service, max_request_bytes=self._max_bytes)

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
        ray_actor_options={"num_cpus": serving.num_cpus_per_replica},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(market.model_dump(mode="json"))
