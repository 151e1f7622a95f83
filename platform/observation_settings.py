"""Settings of what a server writes down about its answers: decisions, numbers, slow requests."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from driftline.platform.data_settings import Settings


class DecisionLogSettings(Settings):
    """Answers as Parquet by hour, in the form of ``impressions``; by ``serving/observing``.

    A sample by default, because the skew check (``driftline skew``) and every question of the kind
    "why was this shown" need one, it costs a request nothing, and its room is bounded. All of it
    (``sample_rate: 1``) when the log is to be the next training log: counters of a sample are too
    small by the sample's share.
    """

    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of requests that are kept, chosen by their ``request_id``; 0 keeps none."""
    flush_seconds: PositiveFloat = 60.0
    """A file is written at least this often; so much is lost when a replica is killed."""
    flush_rows: PositiveInt = 50_000
    """A file is written when this many ads wait in the form of rows."""
    max_waiting_rows: PositiveInt = 200_000
    """So many ads may wait in memory to become rows, newcomers being dropped beyond it; and so many
    rows to be written, the oldest being dropped. All that is dropped is counted."""
    keep_hours: PositiveInt = 168
    """Files are deleted this long after they were written."""
    max_bytes: PositiveInt = 2_000_000_000
    """Room on disk for the log of all replicas that share the workspace; the oldest goes first."""


class MetricsSettings(Settings):
    """Counters and histograms for Prometheus; see ``serving/observing/metrics.py``."""

    push_seconds: NonNegativeFloat = 1.0
    """How often a replica hands its numbers to Ray's agent, which reports them every ten seconds;
    0 leaves them to ``GET /metrics`` alone."""


class SlowRequestSettings(Settings):
    """Requests worth a look, with where their time went; see ``serving/observing``."""

    threshold_ms: PositiveFloat = 5.0
    """A request that takes longer in the replica is kept."""
    capacity: PositiveInt = 100
    """So many of them, the newest, are held for ``GET /v1/slow``."""
    minutes: PositiveFloat = 15.0
    """How long they are held."""
    max_bytes: PositiveInt = 20_000_000
    """Room on disk for all of them, one JSON object a line; the oldest file goes first."""
