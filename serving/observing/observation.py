"""Everything that watches a replica: decision log, metrics, slow requests, and their pages."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.answers import Observer
from driftline.serving.observing import metrics_series as series
from driftline.serving.observing.decision_log import DecisionLog
from driftline.serving.observing.metrics import CONTENT_TYPE, Sample, ServingMetrics, exposition
from driftline.serving.observing.metrics_ray import RayMetrics
from driftline.serving.observing.slow_requests import SlowRequests
from driftline.serving.transport.pages import Page

METRICS, SLOW = "/metrics", "/v1/slow"
TARGETS: Final = "prometheus-targets.json"
"""In ``Workspace.state``: where Prometheus finds the agents of Ray."""


@dataclass(frozen=True)
class Observation:
    """The observers of one replica; get one by :meth:`of`, and it runs after :meth:`start`."""

    metrics: ServingMetrics
    slow: SlowRequests
    decisions: DecisionLog | None
    """Nothing when ``serving.decision_log.sample_rate`` is 0."""
    ray: RayMetrics | None
    """Nothing outside Ray, or when ``serving.metrics.push_seconds`` is 0."""

    @classmethod
    def of(
        cls, settings: DriftlineSettings, *, replica: str, within_ray: bool = False
    ) -> "Observation":
        """The observers that the settings ask for; nothing runs yet."""
        serving, state = settings.serving, Workspace.of(settings).state
        metrics = ServingMetrics(settings, replica=replica)
        slow = SlowRequests(serving.slow_requests, folder=state / "slow", replica=replica)
        kept = serving.decision_log.sample_rate > 0
        seconds = serving.metrics.push_seconds
        made = cls(
            metrics=metrics,
            slow=slow,
            decisions=DecisionLog(settings, replica=replica) if kept else None,
            ray=RayMetrics(metrics, seconds=seconds, targets=state / TARGETS)
            if within_ray and seconds > 0
            else None,
        )
        metrics.add_source(made._samples)
        return made

    @property
    def observers(self) -> tuple[Observer, ...]:
        """To be told of every request."""
        own: tuple[Observer, ...] = (self.metrics, self.slow)
        return own if self.decisions is None else (*own, self.decisions)

    @property
    def pages(self) -> Mapping[str, Callable[[], Page]]:
        """Routes to read."""
        return {
            METRICS: lambda: Page(exposition(self.metrics), content_type=CONTENT_TYPE),
            SLOW: lambda: Page(orjson.dumps(self.slow.to_json())),
        }

    def start(self) -> None:
        """Start the threads behind the observers."""
        for part in (self.slow, self.decisions, self.ray):
            if part is not None:
                part.start()

    def follow(
        self, status: Callable[[], Mapping[str, Any]], *, waiting: Callable[[], int]
    ) -> None:
        """Export what a service says of itself, and how many requests wait for their turn."""
        self.metrics.add_source(lambda: service_samples(status()))
        self.metrics.add_source(lambda: [Sample(series.WAITING, (), waiting())])

    def close(self) -> None:
        """Stop what the service does not: the hand-over to Ray."""
        if self.ray is not None:
            self.ray.close()

    def _samples(self) -> Iterator[Sample]:
        yield Sample(series.SLOW, (), self.slow.num_slow)
        yield Sample(series.LOOP_LAG, (), self.slow.lag.worst_seconds)
        if self.decisions is not None:
            found = self.decisions.status()
            for name, key in (
                (series.DECISIONS_WRITTEN, "rows_written"),
                (series.DECISIONS_DROPPED, "rows_dropped"),
                (series.DECISIONS_FAILED, "failed_writes"),
                (series.DECISIONS_WAITING, "rows_waiting"),
                (series.DECISION_BYTES, "bytes_on_disk"),
            ):
                lost = found["errors"] if name is series.DECISIONS_FAILED else 0
                yield Sample(name, (), found[key] + lost)


def service_samples(status: Mapping[str, Any]) -> Iterator[Sample]:
    """Numbers out of what ``BundleService.status`` says."""
    for live in status["routes"]:
        yield Sample(series.BUNDLE, (live["role"], live["bundle"], str(live["version"])), 1.0)
    yield Sample(series.BUNDLE_LOADS, (), status["loads"])
    yield Sample(series.BUNDLE_REFUSALS, (), status["refusals"])
    yield from _feature_samples(status["features"])
    shadows = status["shadows"]
    yield Sample(series.SHADOW_DROPPED, (), shadows["dropped"])
    yield Sample(series.SHADOW_WAITING, (), shadows["waiting"])
    for shadow in shadows["bundles"]:
        labels = (shadow["bundle"],)
        yield Sample(series.SHADOW_REQUESTS, labels, shadow["requests"])
        yield Sample(series.SHADOW_ERRORS, labels, shadow["errors"])
        for name, key in (
            (series.SHADOW_DIFFERENCE, "mean_logit_difference"),
            (series.SHADOW_OTHER_TOP, "share_other_top_ad"),
        ):
            if shadow[key] is not None:
                yield Sample(name, labels, shadow[key])


def _feature_samples(features: Mapping[str, Any]) -> Iterator[Sample]:
    behind = features["seconds_behind"]
    if behind is not None:
        yield Sample(series.FEATURES_BEHIND, (), behind)
    for tier, handlings in features["counts"]["stale"].items():
        for handling, count in handlings.items():
            yield Sample(series.STALE_VALUES, (tier, handling), count)
    for outcome, count in features["counts"]["store"].items():
        yield Sample(series.STORE_REQUESTS, (outcome,), count)
    yield Sample(series.STORE_AWAY, (), float(features["store_away"]))
