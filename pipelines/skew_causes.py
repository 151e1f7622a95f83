"""Served values beside the same values computed offline, row by row, and why they differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.decisions import SERVED
from driftline.features.definitions import frame_sources
from driftline.features.frames import join_features
from driftline.features.store import open_store
from driftline.platform.bundle import Bundle
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.vector_deltas import scorer_with_deltas
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

Cause = Literal[
    "stale_snapshot",
    "late_counter",
    "different_category",
    "text_vector",
    "store_unavailable",
    "unexplained",
]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)
"""From harmless to worst; a probability has the worst cause among its features.

``stale_snapshot``: the value was right as of the server's snapshot, and a newer one was known by
the time of the request. ``late_counter``: the same, but the newer value is of an event before the
snapshot and became known only after it, so that no snapshot of that moment could hold it; or the
other way round, the server's snapshot is newer than the moment that the request asked for.
``different_category``: a counter of a category or pair, where the category itself differs.
``text_vector``: (probability) the text had no cached vector when it was served, or was encoded.
``store_unavailable``: the value was not served, and the answer said that the online store was away.
``unexplained``: a mistake somewhere.
"""

VALUE_TOLERANCE: Final = 1e-5
"""Relative; both sides are 32-bit floats of the same computation."""
PROBABILITY_TOLERANCE: Final = 1e-5, 1e-4
"""Absolute and relative: the server adds up in another order."""
MAX_EXAMPLES: Final = 5

_TEXTS: Final = ("neutral_text", "encoded_text")
_AWAY: Final = "store_unavailable"

Mask = NDArray[np.bool_]
Columns = Mapping[str, pa.ChunkedArray]


@dataclass(frozen=True)
class Mismatch:
    """How often one value differs."""

    num_compared: int
    causes: Mapping[Cause, int] = field(default_factory=dict)

    @property
    def num_different(self) -> int:
        """Rows in which it differs."""
        return sum(self.causes.values())

    @property
    def rate(self) -> float:
        """Share of rows in which it differs."""
        return self.num_different / self.num_compared if self.num_compared else 0.0


@dataclass(frozen=True)
class Example:
    """One value that differs."""

    impression_id: str
    event_time: str
    name: str
    served: Any
    offline: Any
    cause: Cause


class Comparison:
    """Served and offline values of the same rows, and why they differ."""

    def __init__(self, settings: DriftlineSettings, rows: pa.Table) -> None:
        self._settings = settings
        self._rows = rows
        self._store = open_store(settings)
        self._served = {
            name.removeprefix(SERVED): rows.column(name)
            for name in rows.column_names
            if name.startswith(SERVED)
        }
        self.names = tuple(self._served)
        self._lives = {
            column: view.ttl for column, _, view in frame_sources(settings) if view.ttl is not None
        }
        moments = rows.column("event_time")
        self._offline = self._join(rows, moments)
        self._differs = {
            name: ~_same(self._served[name], self._offline[name]) for name in self.names
        }
        self._causes = self._explain()
        self._probability_causes = np.full(rows.num_rows, "", object)
        self._scored: NDArray[np.float64] = np.full(rows.num_rows, np.nan)

    def mismatch(self, name: str) -> Mismatch:
        """How often a feature differs, by cause."""
        return Mismatch(self._rows.num_rows, _count(self._causes[name]))

    def probability(self) -> tuple[Mismatch, int]:
        """How often the probability differs, and the decisions that could not be scored."""
        fingerprints = np.array(self._rows.column("bundle").to_pylist(), object)
        known = np.zeros(self._rows.num_rows, bool)
        for fingerprint in sorted(set(fingerprints.tolist())):
            chosen = np.flatnonzero(fingerprints == fingerprint)
            scorer = _scorer(Workspace.of(self._settings).bundles / fingerprint)
            if scorer is not None:
                known[chosen] = True
                self._score(scorer, chosen)
        causes = _count(self._probability_causes[known])
        return Mismatch(int(known.sum()), causes), int((~known).sum())

    def examples(self) -> Iterator[Example]:
        """A few of each cause, the worst first."""
        columns = {
            "probability": (
                self._probability_causes,
                self._rows.column("probability").to_pylist(),
                self._scored.tolist(),
            )
        }
        columns |= {
            name: (self._causes[name], self._served[name], self._offline[name])
            for name in self.names
        }
        ids, times = self._rows.column("impression_id"), self._rows.column("event_time")
        for cause in reversed(CAUSES):
            left = MAX_EXAMPLES
            for name, (causes, served, offline) in columns.items():
                for row in np.flatnonzero(causes == cause)[: min(left, 2)].tolist():
                    left -= 1
                    yield Example(
                        impression_id=ids[row].as_py(),
                        event_time=format_time(times[row].as_py()),
                        name=name,
                        served=_plain(served[row]),
                        offline=_plain(offline[row]),
                        cause=cause,
                    )

    def _join(
        self, rows: pa.Table, moments: pa.ChunkedArray, *, as_known: bool = True
    ) -> dict[str, pa.ChunkedArray]:
        entities = pa.table(
            {
                "event_timestamp": moments,
                "page_product_id": rows.column("page_product_id"),
                "ad_product_id": rows.column("ad_product_id"),
            }
        )
        found = join_features(self._store, entities, self._settings, as_known=as_known)
        kinds = {name: values.type for name, values in self._served.items()}
        return {name: found[name].cast(kind, safe=False) for name, kind in kinds.items()}

    def _explain(self) -> dict[str, NDArray[np.object_]]:
        """By feature: the cause in each row, empty where it agrees. ``[B]`` each."""
        num = self._rows.num_rows
        causes = {
            name: np.where(differs, "unexplained", "").astype(object)
            for name, differs in self._differs.items()
        }
        every = np.logical_or.reduce([*self._differs.values(), np.zeros(num, bool)])
        as_of = self._rows.column("features_as_of")
        chosen = np.flatnonzero(every & ~np.asarray(as_of.is_null()))
        if len(chosen):
            rows = self._rows.take(pa.array(chosen))
            moments = rows.column("features_as_of")
            then = self._join(rows, moments)
            whole = self._join(rows, moments, as_known=False)
            ahead = np.asarray(pc.greater(moments, rows.column("event_time")))
            before: dict[timedelta, tuple[Columns, Columns]] = {}
            for name, found in causes.items():
                served, offline = (side[name].take(pa.array(chosen)) for side in self._both)
                held = _same(served, then[name])
                if name in self._lives:
                    gone = np.asarray(pc.and_(served.is_null(), then[name].is_valid())) & ~ahead
                    if gone.any():
                        life = self._lives[name]
                        if life not in before:
                            before[life] = self._one_life_before(rows, life)
                        held |= gone & _expired(name, rows, life, then[name], before[life])
                late = ahead | _same(offline, whole[name])
                cause = np.where(late, "late_counter", "stale_snapshot")
                found[chosen] = np.where(self._differs[name][chosen] & held, cause, found[chosen])
        for name, found in causes.items():
            found[self._differs[name] & self._category_differs(name)] = "different_category"
            missing = np.asarray(self._served[name].is_null())
            found[self._differs[name] & missing & self._away()] = "store_unavailable"
        return causes

    def _away(self) -> Mask:
        """Rows that were answered without the online store: page and ads are flagged alike."""
        return np.asarray(pc.fill_null(pc.equal(self._rows.column("page_fallback"), _AWAY), False))

    def _one_life_before(self, rows: pa.Table, life: timedelta) -> tuple[Columns, Columns]:
        """Values of one lifetime before the requests, as known then and as known now."""
        limit = pc.subtract(rows.column("event_time"), pa.scalar(life, pa.duration("us")))
        return self._join(rows, limit), self._join(rows, limit, as_known=False)

    @property
    def _both(self) -> tuple[Columns, Columns]:
        return self._served, self._offline

    def _category_differs(self, name: str) -> Mask:
        """Rows in which the key of a category's counter differs."""
        alias, category = name.split("__", 1)[0], self._settings.counters.category
        keys = {"ad_category": ("ad",), "category_pair": ("page", "ad")}.get(alias, ())
        differs = [self._differs[f"{key}__{category}"] for key in keys]
        return np.logical_or.reduce([*differs, np.zeros(self._rows.num_rows, bool)])

    def _score(self, scorer: Scorer, chosen: NDArray[np.int64]) -> None:
        """Score some rows from offline and from served values, and find causes."""
        rows = self._rows.take(pa.array(chosen))
        answered = np.asarray(rows.column("probability"))
        context = {
            feature.name: rows.column(feature.name)
            for feature in self._settings.select(entity="impression")
        }
        served, offline = (
            scorer.score(context | {k: v.take(pa.array(chosen)) for k, v in side.items()})
            for side in self._both
        )
        self._scored[chosen] = offline
        causes = np.full(len(chosen), "", object)
        for cause in CAUSES:  # the worst stays
            has = [self._causes[name][chosen] == cause for name in self.names]
            causes[np.logical_or.reduce(has)] = cause
        causes[causes == ""] = "unexplained"
        causes[~_close(answered, served)] = "unexplained"
        texts = [rows.column(f"{role}_fallback").to_pylist() for role in ("page", "ad")]
        without = [any(reason in _TEXTS for reason in pair) for pair in zip(*texts, strict=True)]
        causes[~_close(answered, served) & np.array(without, bool)] = "text_vector"
        self._probability_causes[chosen] = np.where(_close(answered, offline), "", causes)


def _scorer(path: Path) -> Scorer | None:
    return scorer_with_deltas(Bundle.open(path)) if path.is_dir() else None


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Mask:
    """Equal, both missing, or within the tolerance. ``[B]``."""
    both_missing = np.asarray(pc.and_(left.is_null(), right.is_null()))
    if pa.types.is_floating(left.type):
        first, second = (np.asarray(side.fill_null(np.nan), np.float64) for side in (left, right))
        return np.asarray(np.isclose(first, second, rtol=VALUE_TOLERANCE, atol=0)) | both_missing
    return np.asarray(pc.fill_null(pc.equal(left, right), False)) | both_missing


def _close(answered: NDArray[np.float64], again: NDArray[np.float64]) -> Mask:
    absolute, relative = PROBABILITY_TOLERANCE
    return np.asarray(np.isclose(answered, again, rtol=relative, atol=absolute))


def _expired(
    name: str,
    rows: pa.Table,
    life: timedelta,
    then: pa.ChunkedArray,
    before: tuple[Columns, Columns],
) -> Mask:
    """Whether what a snapshot held (``then``) had expired by the time of the request.

    Then the snapshot, or at least this value, is older than one lifetime before the request.
    """
    age = pc.subtract(rows.column("event_time"), rows.column("features_as_of"))
    expired = np.asarray(pc.greater_equal(age, pa.scalar(life, pa.duration("us"))))
    return np.logical_or.reduce([expired, *(_same(found[name], then) for found in before)])


def _count(causes: NDArray[np.object_]) -> dict[Cause, int]:
    return {cause: number for cause in CAUSES if (number := int((causes == cause).sum()))}


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value
