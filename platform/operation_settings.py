"""Settings of operation: gate, serving, cadences, replay, Ray, stores. Import from ``settings``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from driftline.platform.data_settings import Settings
from driftline.platform.delivery_settings import DeliverySettings
from driftline.platform.observation_settings import (
    DecisionLogSettings,
    MetricsSettings,
    SlowRequestSettings,
)


class GateSettings(Settings):
    """A challenger is promoted only within these bounds, on the newest matured slice."""

    promote: Literal["champion", "canary"] = "champion"
    """What becomes of a refreshed bundle that passed. ``champion``: it answers at once. ``canary``:
    it answers ``serving.delivery.canary_share`` of the requests until the rules there promote or
    withdraw it, which takes a decision log and clicks. One at a time: a bundle that passes while
    another is judged is refused; but an arms refresh takes the place of a head's canary. The first
    bundle of a market is promoted, and so are replays'."""
    slice_hours: PositiveInt = 24
    """Length of the newest matured slice; only requests of the gate part are judged."""
    min_rows: PositiveInt = 200
    min_clicks: PositiveInt = 5
    max_auc_drop: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Refuse when the paired interval of AUC lies wholly below minus this."""
    max_ne_rise: Annotated[float, Field(ge=0)] = 0.02
    """Refuse when the paired interval of normalised entropy lies wholly above this."""
    calibration_range: tuple[PositiveFloat, PositiveFloat] = (0.6, 1.6)
    """Allowed mean prediction / click rate, once the slice has ``min_clicks`` clicks."""
    max_milliseconds: PositiveFloat = 50.0
    """Mechanical check: time to score 100 ads in process."""
    num_bootstrap: PositiveInt = 200


class ServingSettings(Settings):
    """The Ray Serve application."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(gt=0, lt=65536)] = 8700
    num_replicas: PositiveInt = 1
    num_cpus_per_replica: NonNegativeFloat = 0
    """CPUs that Ray reserves for each replica; raise it on a cluster so that replicas spread."""
    max_ads_per_request: PositiveInt = 1_000
    unknown_product: Literal["encode", "neutral"] = "neutral"
    """``encode`` runs the arms for a product of the catalogue that the cache lacks; ``neutral``
    takes the mean vector. A product in no table is always neutral. Both are flagged."""
    poll_seconds: PositiveFloat = 1.0
    """How often a replica looks for a newer champion or snapshot."""
    clock: Literal["wall", "snapshot"] | AwareDatetime = "wall"
    """The time at which features are read and hours are counted. ``wall`` is now; ``snapshot`` is
    the moment of the newest materialisation, for logs of the past and simulated markets; a moment
    stands still. Only with the last two may a request bring a ``time`` of its own."""
    ingress: Literal["haproxy", "proxy"] = "haproxy"
    """``haproxy`` puts the bundled HAProxy (Linux) in front of the replicas and turns on Ray
    Serve's throughput flags; ``proxy`` is Ray Serve's own Python proxy, slower but everywhere."""
    max_request_bytes: PositiveInt = 250_000
    """A larger body is refused unread (HTTP 413). Room for a thousand ads with long names; reading
    a body holds up the other requests of a replica, tens of milliseconds for a hostile one."""
    max_waiting: PositiveInt = 200
    """Requests that may wait for their turn in one replica; one more is answered 503 with
    ``Retry-After`` at once. At a millisecond each, 200 wait a fifth of a second."""
    read_timeout_seconds: PositiveFloat = 5.0
    """How long a client may take to send its body; then 408."""
    request_timeout_seconds: PositiveFloat = 1.0
    """A request that has waited so long since it arrived is answered 503 instead of scored."""
    grpc_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Also answer gRPC (``serving/scoring.proto``) at this port; not when left out."""
    folded_megabytes: NonNegativeInt = 256
    """Memory that a replica may spend, for each bundle and snapshot, on what every product adds to
    the head's first layer, computed beforehand: about 8 bytes a product and unit of that layer. A
    larger catalogue is scored from the feature tables, which takes longer. 0 turns it off."""
    own_cores: bool = True
    """Whether the event loop of each replica keeps to a core of its own, as far as there are cores:
    tails get shorter. One that waits for its core longer than it runs there takes another."""
    decision_log: DecisionLogSettings = DecisionLogSettings()
    metrics: MetricsSettings = MetricsSettings()
    slow_requests: SlowRequestSettings = SlowRequestSettings()
    delivery: DeliverySettings = DeliverySettings()
    admin_token_file: Path | None = None
    """Turns on ``/v1/admin/`` (deploy, traffic, rollback) for who brings the token in this file.
    Relative to the workspace; made with a random token, readable by its owner alone, when it is
    not there. Without it there is no administration over HTTP."""

    @property
    def max_folded_bytes(self) -> int:
        """``folded_megabytes`` in bytes."""
        return self.folded_megabytes * 10**6


class CadenceSettings(Settings):
    """When ``driftline up`` runs what; the intervals themselves follow from the tiers."""

    clock: Literal["wall", "event"] = "wall"
    """``wall`` refreshes as of now. ``event`` replays the recent part of the log, from what the
    champion knows on: an hour of it passes in ``seconds_per_hour``; for demonstrations."""
    seconds_per_hour: PositiveFloat = 10.0
    """Wall seconds that stand for one hour of event time; only with the event clock."""
    start: AwareDatetime | None = None
    """First moment of the event clock; what the champion knows up to when not given, or the start
    of the log's recent part."""
    restart_seconds: PositiveFloat = 1.0
    """Pause before a crashed service is started again; doubles with each crash, up to 60 s."""


class ReplaySettings(Settings):
    """Which policies are replayed beside the refreshed student."""

    num_hours: PositiveInt | None = None
    """Replay only the last so many hours of the ID part; all of it when not given."""
    peers: tuple[
        Literal["never", "arms_only", "mlp_never", "mlp_hourly", "lightgbm_hourly"], ...
    ] = ("never", "arms_only", "mlp_never", "mlp_hourly", "lightgbm_hourly")
    last_hours: PositiveInt = 72
    """The verdict is given on the last so many hours."""
    num_bootstrap: PositiveInt = 500


class RaySettings(Settings):
    """Where Ray runs. Nothing given: a private local Ray on this machine."""

    address: str | None = None
    num_cpus: PositiveInt | None = None
    num_cpus_per_worker: PositiveFloat | None = None
    """Processors of one training worker; an even share of the largest node when not given."""
    num_gpus_per_worker: NonNegativeFloat = 0
    teacher_workers: NonNegativeInt = 0
    """Size of the teacher's worker group; 0 trains in a warm actor, right for one machine."""


class StoreSettings(Settings):
    """Where Feast keeps things; embedded by default."""

    registry: str | None = None
    """SQLAlchemy address of the registry; a SQLite file in the workspace when not given."""
    online: Literal["snapshot", "redis"] = "snapshot"
    redis_address: str = "localhost:6379"
    """``HOST:PORT`` and, after commas, ``db``, ``username``, ``password``, ``ssl=true``."""
    redis_timeout_ms: PositiveFloat = 50.0
    """Longest wait of a request for Redis; then its features are missing and it says so."""
    memory_limit: str = "4GB"
    threads: PositiveInt = 2


class RegistrySettings(Settings):
    """MLflow model registry and tracking."""

    tracking_uri: str | None = None
    """Any MLflow tracking address; a SQLite file in the workspace when not given."""
