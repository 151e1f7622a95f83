"""A replica's numbers on their way to Prometheus through Ray.

Each node's agent of Ray exports what the processes of the node hand to it, on the port
``MetricsExportPort`` of ``ray.nodes()``, dashboard or not. Ray writes the list of these ports for
Prometheus only when the dashboard runs, so :func:`write_targets` does.
"""

import time
from pathlib import Path
from typing import Any, Final

import orjson

from driftline.platform.artefacts import whole_file
from driftline.serving.observing.metrics import Distribution, ServingMetrics
from driftline.serving.observing.metrics_series import REPLICA, Series
from driftline.serving.observing.repeating import Repeating

BREATH_SECONDS: Final = 0.000_2
TARGETS_SECONDS: Final = 60.0


class RayMetrics:
    """Hands the numbers of a replica to Ray, every so often, on a thread of its own.

    Counters are handed over as what was added since the last time. A histogram travels as gauges
    under the names Prometheus would give it, with the counts since the start: Ray's own histogram
    takes one value at a time, and its agent replays them one by one from the middles of the
    buckets.

    Args:
        metrics: What to hand over.
        seconds: How often.
        targets: File for :func:`write_targets`, written anew each minute.
    """

    def __init__(self, metrics: ServingMetrics, *, seconds: float, targets: Path) -> None:
        self._metrics = metrics
        self._targets = targets
        self._next_targets = 0.0
        self._made: dict[str, Any] = {}
        self._before: dict[tuple[str, tuple[str, ...]], float] = {}
        self._told: set[tuple[Series, tuple[str, ...]]] = set()
        self._thread = Repeating("ray-metrics", seconds=seconds, action=self.push)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Hand over the last numbers."""
        self._thread.close()

    def push(self) -> None:
        """Hand over all numbers once; only within a process of Ray."""
        told = set()
        for sample in self._metrics.samples():
            labels = (self._metrics.replica, *sample.labels)
            found = sample.series
            if isinstance(sample.value, Distribution):
                for bound, count in sample.value.cumulative():
                    self._set(found, "_bucket", (*labels, bound), count)
                self._set(found, "_sum", labels, sample.value.total)
                self._set(found, "_count", labels, float(sum(sample.value.counts)))
            elif found.kind == "counter":
                self._increase(found, labels, sample.value)
            elif found.kind == "info":
                self._set(found, "_info", labels, 1.0)
                told.add((found, labels))
            else:
                self._set(found, "", labels, sample.value)
            time.sleep(BREATH_SECONDS)  # the event loop waits for the interpreter's lock
        for found, labels in self._told - told:  # Ray would repeat a bundle that went
            self._set(found, "_info", labels, 0.0)
        self._told = told
        if time.monotonic() >= self._next_targets:
            self._next_targets = time.monotonic() + TARGETS_SECONDS
            write_targets(self._targets)

    def _increase(self, found: Series, labels: tuple[str, ...], value: float) -> None:
        key = found.name, labels
        added = value - self._before.get(key, 0.0)
        if added > 0:
            from ray.util.metrics import Counter

            metric = self._made.get(found.full_name)
            if metric is None:
                metric = Counter(found.full_name, found.help, (REPLICA, *found.labels))
                self._made[found.full_name] = metric
            metric.inc(added, tags=dict(zip((REPLICA, *found.labels), labels, strict=True)))
            self._before[key] = value

    def _set(self, found: Series, suffix: str, labels: tuple[str, ...], value: float) -> None:
        from ray.util.metrics import Gauge

        name = f"{found.full_name}{suffix}"
        keys = (REPLICA, *found.labels, *(("le",) if suffix == "_bucket" else ()))
        metric = self._made.get(name)
        if metric is None:
            metric = self._made[name] = Gauge(name, found.help, keys)
        metric.set(value, tags=dict(zip(keys, labels, strict=True)))


def write_targets(path: Path) -> None:
    """Write where Prometheus finds the agents of this Ray, in the form of ``file_sd_configs``."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    with whole_file(path) as scratch:
        scratch.write_bytes(orjson.dumps([{"labels": {"job": "driftline"}, "targets": targets}]))
