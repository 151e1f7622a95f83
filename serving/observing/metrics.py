"""Counts and latencies of a replica, gathered in process.

An observer. A call of Ray's metrics for each number of a request would cost more than scoring it
(measured: 4.5 to 5 us each, about twenty of them a request; and its agent would record every
latency once more, in Python). So the event loop only adds to plain numbers, without a lock, in
2.5 us a request, and others read them: ``GET /metrics`` (:func:`exposition`) and, once a second,
Ray's agent (``metrics_ray.py``). A reader may see a request counted and its latency not yet;
nothing is lost.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from driftline.platform.settings import DriftlineSettings
from driftline.serving.observing import metrics_series as series
from driftline.serving.observing.metrics_series import BOUNDS, REPLICA, Series
from driftline.serving.transport.requests import RefusedRequestError

if TYPE_CHECKING:
    from driftline.serving.answers import Answer

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class Distribution:
    """A histogram at one moment."""

    counts: tuple[int, ...]
    """By bucket, each for itself; the last one is for all above the highest bound."""
    total: float
    """Sum of all values, in seconds."""

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bound, as Prometheus writes it, and how many values do not exceed it."""
        found, passed = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            passed += count
            found.append((bound, float(passed)))
        return found


@dataclass(frozen=True)
class Sample:
    """One number of a series, with the values of the series' labels."""

    series: Series
    labels: tuple[str, ...]
    value: float | Distribution


Source = Callable[[], Iterable[Sample]]


class ServingMetrics:
    """Observer that counts; read it with :meth:`samples`.

    Args:
        settings: Names the policy of each tier.
        replica: Name of this copy, the label of all its numbers.
    """

    def __init__(self, settings: DriftlineSettings, *, replica: str) -> None:
        self.replica = replica
        self._tiers = settings.tiers
        self._sources: list[Source] = []
        self._answers: Counter[tuple[str, str]] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._page_fallbacks: Counter[str] = Counter()
        self._ad_fallbacks: Counter[str] = Counter()
        self._stale: Counter[str] = Counter()
        self._ages: dict[str, float] = {}
        self._num_ads = 0
        self._stages: dict[str, list[float]] = {}
        """By stage: the counts of the buckets, then the sum of all seconds."""

    def add_source(self, source: Source) -> None:
        """Export what ``source`` gives, too; it is called on a reader's thread."""
        self._sources.append(source)

    def answered(self, answer: "Answer") -> None:
        """Count an answer."""
        self._answers[answer.live.arm, answer.form] += 1
        self._num_ads += len(answer.probabilities)
        for stage, seconds in answer.stages.items():
            found = self._stages.get(stage)
            if found is None:
                found = self._stages[stage] = [0] * (len(BOUNDS) + 2)
            found[bisect_left(BOUNDS, seconds)] += 1
            found[-1] += seconds
        for tier, (age, stale) in answer.tiers.items():
            self._ages[tier] = age
            if stale:
                self._stale[tier] += 1
        if answer.page_fallback is not None:
            self._page_fallbacks[answer.page_fallback] += 1
        if answer.ad_fallbacks:
            self._ad_fallbacks.update(answer.ad_fallbacks.values())

    def refused(self, error: RefusedRequestError) -> None:
        """Count a refusal."""
        self._refused[error.code, str(error.status)] += 1

    def close(self) -> None:
        """Nothing waits here."""

    def samples(self) -> Iterator[Sample]:
        """All numbers of this moment, the sources' included."""
        for name, labelled in (
            (series.ANSWERS, dict(self._answers)),
            (series.REFUSED, dict(self._refused)),
        ):
            yield from (Sample(name, labels, count) for labels, count in labelled.items())
        yield Sample(series.ADS, (), self._num_ads)
        for stage, found in dict(self._stages).items():
            *counts, total = tuple(found)
            yield Sample(
                series.STAGE_SECONDS, (stage,), Distribution(tuple(map(int, counts)), total)
            )
        for role, reasons in (("page", self._page_fallbacks), ("ad", self._ad_fallbacks)):
            for reason, count in dict(reasons).items():
                yield Sample(series.FALLBACKS, (role, reason), count)
        for tier, age in dict(self._ages).items():
            yield Sample(series.FEATURE_AGE, (tier,), age)
            policy = getattr(self._tiers, tier).on_stale
            yield Sample(series.STALE_ANSWERS, (tier, policy), self._stale[tier])
        for source in self._sources:
            yield from source()


def exposition(metrics: ServingMetrics) -> bytes:
    """All numbers as OpenMetrics text, which Prometheus reads."""
    text: bytes = generate_latest(_Families(metrics))  # type: ignore[no-untyped-call]
    return text


class _Families:
    """What ``prometheus_client`` calls a registry: something that can be collected."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """One family a series."""
        families: dict[str, Any] = {}
        for sample in self._metrics.samples():
            name = sample.series.name
            if name not in families:
                families[name] = _family(sample.series)
            family, labels = families[name], (self._metrics.replica, *sample.labels)
            if isinstance(sample.value, Distribution):
                family.add_metric(labels, sample.value.cumulative(), sample.value.total)
            elif sample.series.kind == "info":
                values = dict(zip(sample.series.labels, sample.labels, strict=True))
                family.add_metric(labels[:1], values)
            else:
                family.add_metric(labels, sample.value)
        yield from families.values()


def _family(found: Series) -> Metric:
    labels = (REPLICA, *found.labels)
    if found.kind == "counter":
        return CounterMetricFamily(found.full_name, found.help, labels=labels)
    if found.kind == "histogram":
        return HistogramMetricFamily(found.full_name, found.help, labels=labels)
    if found.kind == "info":
        return InfoMetricFamily(found.full_name, found.help, labels=labels[:1])
    return GaugeMetricFamily(found.full_name, found.help, labels=labels)
