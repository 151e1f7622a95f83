"""The scores of a replay as arrays, and policies compared on the same rows and resamples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.bootstrap import (
    ClusterBootstrap,
    Interval,
    Metric,
    percentile_interval,
)
from driftline.platform.errors import ContractError, EmptyWindowError
from driftline.platform.metrics import FloatArray
from driftline.platform.windows import HOUR, floor_time, parse_time

REFRESHED: Final = "refreshed"
NEVER: Final = "never"
POLICIES: Final = (
    "refreshed", "never", "arms_only", "mlp_hourly", "mlp_never", "lightgbm_hourly", "oracle"
)  # fmt: skip
NOT_POLICIES: Final = frozenset({"impression_id", "request_id", "event_time", "clicked"})


@dataclass(frozen=True)
class Rows:
    """The scores of some impressions, in order of time."""

    start: datetime
    """Beginning of hour 0."""
    hours: NDArray[np.int64]
    """Hour of each row, counted from ``start``. ``[N]``, like all arrays here."""
    labels: FloatArray
    groups: NDArray[np.int64]
    """Request of each row."""
    predictions: Mapping[str, FloatArray]
    """By policy, NaN where it has none."""
    parts: Mapping[str, NDArray[np.bool_]]
    """Masks of new items, the tail and the like."""

    def where(self, chosen: NDArray[np.bool_] | slice) -> "Rows":
        """Some of the rows."""
        return Rows(
            start=self.start,
            hours=self.hours[chosen],
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            predictions={name: values[chosen] for name, values in self.predictions.items()},
            parts={name: values[chosen] for name, values in self.parts.items()},
        )

    def having(self, policies: Iterable[str]) -> "Rows":
        """The rows that all these policies scored."""
        known = [np.isfinite(self.predictions[name]) for name in policies]
        return self.where(np.logical_and.reduce(known)) if known else self

    def share_known(self, policy: str) -> float:
        """Share of the rows that the policy scored."""
        values = self.predictions[policy]
        return float(np.isfinite(values).mean()) if len(values) else 0.0

    @property
    def num_clicks(self) -> int:
        """Clicked rows."""
        return int(self.labels.sum())

    @property
    def num_requests(self) -> int:
        """Distinct requests."""
        return len(np.unique(self.groups))


def read_rows(scores: pa.Table) -> Rows:
    """Take a scores table apart: floating columns are policies, boolean ones are parts.

    Raises:
        ContractError: a needed column is missing, or ``refreshed`` has a row without a score.
        EmptyWindowError: there is no row.
    """
    needed = ("event_time", "clicked", REFRESHED)
    missing = [name for name in needed if name not in scores.column_names]
    if missing:
        raise ContractError(
            f"scores need the columns {list(needed)}, {missing} are missing; "
            f"there are {scores.column_names}"
        )
    if not scores.num_rows:
        raise EmptyWindowError("scores hold no row; there is nothing to report")
    scores = scores.sort_by("event_time")
    start = floor_time(scores["event_time"][0].as_py(), HOUR)
    micros = scores["event_time"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
    origin = int(start.timestamp() * 1_000_000)
    others = [field for field in scores.schema if field.name not in NOT_POLICIES]
    predictions = {
        field.name: scores[field.name].cast(pa.float64()).fill_null(np.nan).to_numpy()
        for field in others
        if pa.types.is_floating(field.type)
    }
    unscored = int(np.count_nonzero(~np.isfinite(predictions[REFRESHED])))
    if unscored:
        raise ContractError(
            f"scores: every row needs a value of {REFRESHED!r}, {unscored:,} have none"
        )
    return Rows(
        start=start,
        hours=(micros - origin) // 3_600_000_000,
        labels=scores["clicked"].cast(pa.float64()).to_numpy(),
        groups=_requests(scores),
        predictions=predictions,
        parts={
            field.name: scores[field.name].fill_null(False).to_numpy()
            for field in others
            if pa.types.is_boolean(field.type)
        },
    )


def _requests(scores: pa.Table) -> NDArray[np.int64]:
    """A number for each request; a row without one is its own."""
    own = np.arange(scores.num_rows, dtype=np.int64)
    if "request_id" not in scores.column_names:
        return own
    column = scores["request_id"].combine_chunks()
    codes = pc.dictionary_encode(column).indices.cast(pa.int64()).fill_null(-1).to_numpy()
    return np.where(codes < 0, own + scores.num_rows, codes)


class Paired:
    """Policies on the same rows and the same resamples; each is resampled once."""

    def __init__(self, rows: Rows, *, num_samples: int, seed: int) -> None:
        self.rows = rows
        self.bootstrap = ClusterBootstrap(
            rows.labels, groups=rows.groups, num_samples=num_samples, seed=seed
        )
        self._values: dict[tuple[Metric, str], float] = {}
        self._samples: dict[tuple[Metric, str], FloatArray] = {}

    def value(self, metric: Metric, policy: str) -> float:
        """The measure on the rows as they are."""
        key = metric, policy
        if key not in self._values:
            predictions = self.rows.predictions[policy]
            self._values[key] = self.bootstrap.measure(metric, predictions)
        return self._values[key]

    def samples(self, metric: Metric, policy: str) -> FloatArray:
        """The measure on every resample."""
        key = metric, policy
        if key not in self._samples:
            predictions = self.rows.predictions[policy]
            self._samples[key] = self.bootstrap.resample(metric, predictions)
        return self._samples[key]

    def interval(self, metric: Metric, policy: str) -> Interval:
        """One policy with its 95 % interval."""
        return percentile_interval(self.value(metric, policy), self.samples(metric, policy))

    def difference(self, metric: Metric, first: str, second: str) -> Interval:
        """First policy minus second with its 95 % interval."""
        return percentile_interval(
            self.value(metric, first) - self.value(metric, second),
            self.samples(metric, first) - self.samples(metric, second),
        )


def present(rows: Rows, policies: Iterable[str] = POLICIES) -> list[str]:
    """Those of the policies that scored anything."""
    return [p for p in policies if p in rows.predictions and rows.share_known(p) > 0]


def moment(value: str | datetime) -> datetime:
    """A time that JSON may have turned into text."""
    return parse_time(value) if isinstance(value, str) else value
