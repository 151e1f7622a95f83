"""The numbers that a replica exports: their names, labels and what they mean.

Names follow Prometheus: what is exported is ``driftline_NAME`` with the suffix of its kind. Through
Ray's agent the same names come with ``ray_`` in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

PREFIX: Final = "driftline"
REPLICA: Final = "replica"
"""Label of every series: which copy of the application."""

BOUNDS: Final = (
    0.000_1, 0.000_2, 0.000_3, 0.000_5, 0.000_75, 0.001, 0.001_5, 0.002, 0.003, 0.004, 0.005,
    0.007_5, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0,
)  # fmt: skip
"""Upper bounds of the buckets of a latency, in seconds; 5 ms, the promise, is one of them."""

SUFFIXES: Final = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}


@dataclass(frozen=True)
class Series:
    """One family of numbers."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """With the prefix, without the suffix of its kind."""
        return f"{PREFIX}_{self.name}"

    @property
    def exported(self) -> tuple[str, ...]:
        """Names of the samples, as Prometheus knows them."""
        return tuple(f"{self.full_name}{suffix}" for suffix in SUFFIXES[self.kind])


ANSWERS: Final = Series(
    "answers", "counter", "Requests that were scored, by arm and form.", ("arm", "form")
)
ADS: Final = Series("ads", "counter", "Ads that were scored.")
REFUSED: Final = Series(
    "refused", "counter", "Requests answered with an error, by its code and status.",
    ("code", "status"),
)  # fmt: skip
STAGE_SECONDS: Final = Series(
    "stage_seconds", "histogram",
    "Where the time of a request went; total is from its arrival in the replica to its answer.",
    ("stage",),
)  # fmt: skip
FALLBACKS: Final = Series(
    "fallbacks", "counter",
    "Products not scored as usual: unknown_product, neutral_text, encoded_text, store_unavailable.",
    ("role", "reason"),
)  # fmt: skip
FEATURE_AGE: Final = Series(
    "feature_age_seconds", "gauge", "Age of the oldest value that the last answer used.", ("tier",)
)
STALE_ANSWERS: Final = Series(
    "stale_answers", "counter", "Answers that met a value older than its tier allows.",
    ("tier", "policy"),
)  # fmt: skip
STALE_VALUES: Final = Series(
    "stale_values", "counter",
    "Values older than their tier allows, by what became of them: used, defaulted, refused.",
    ("tier", "handling"),
)  # fmt: skip
STORE_REQUESTS: Final = Series(
    "store_requests", "counter",
    "Requests to a Redis online store: reads, failures, and those skipped while it was away.",
    ("outcome",),
)  # fmt: skip
STORE_AWAY: Final = Series(
    "store_away", "gauge", "1 while a Redis online store counts as dead, else 0."
)
BUNDLE: Final = Series("bundle", "info", "The bundles that answer.", ("role", "bundle", "version"))
BUNDLE_LOADS: Final = Series("bundle_loads", "counter", "Bundles that went live.")
BUNDLE_REFUSALS: Final = Series("bundle_refusals", "counter", "Bundles that could not be used.")
FEATURES_BEHIND: Final = Series(
    "features_behind_seconds", "gauge", "How far the feature snapshot is behind the clock."
)
WAITING: Final = Series("waiting_requests", "gauge", "Requests that wait for their turn.")
LOOP_LAG: Final = Series(
    "event_loop_lag_seconds", "gauge", "Longest delay of the event loop in the last ten seconds."
)
SLOW: Final = Series("slow_requests", "counter", "Requests above slow_requests.threshold_ms.")
DECISIONS_WRITTEN: Final = Series(
    "decision_rows_written", "counter", "Rows of the decision log on disk."
)
DECISIONS_DROPPED: Final = Series(
    "decision_rows_dropped", "counter", "Rows of the decision log that found no room."
)
DECISIONS_FAILED: Final = Series(
    "decision_write_failures", "counter", "Files of the decision log that could not be written."
)
DECISIONS_WAITING: Final = Series(
    "decision_rows_waiting", "gauge", "Rows of the decision log that wait to be written."
)
DECISION_BYTES: Final = Series(
    "decision_bytes", "gauge", "Size of the decision log on disk, all replicas together."
)
SHADOW_REQUESTS: Final = Series(
    "shadow_requests", "counter", "Answered requests that a shadow scored, too.", ("bundle",)
)
SHADOW_ERRORS: Final = Series(
    "shadow_errors", "counter", "Requests that a shadow could not score.", ("bundle",)
)
SHADOW_DROPPED: Final = Series(
    "shadow_dropped", "counter", "Answered requests that no shadow had time for."
)
SHADOW_WAITING: Final = Series(
    "shadow_waiting", "gauge", "Answered requests that wait for the shadows."
)
SHADOW_DIFFERENCE: Final = Series(
    "shadow_logit_difference", "gauge",
    "Mean absolute difference of logits between a shadow and the answers.", ("bundle",),
)  # fmt: skip
SHADOW_OTHER_TOP: Final = Series(
    "shadow_other_top_share", "gauge", "Share of requests whose best ad is another one.",
    ("bundle",),
)  # fmt: skip


def all_series() -> Iterator[Series]:
    """Every series of this module."""
    return (value for value in globals().values() if isinstance(value, Series))
