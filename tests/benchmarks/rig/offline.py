"""What every answer must say: the offline scores of the published bundles."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.rig.forms import Form, Told
from tests.benchmarks.rig.market import Asked, BenchMarket
from tests.benchmarks.rig.open_loop import KeptAnswer

from driftline.features.online import OnlineFeatures
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings

AWAY = "store_unavailable"

Key = tuple[str, datetime]
"""Fingerprint, and moment of the snapshot."""
Scores = list[NDArray[np.float64]]


@dataclass(frozen=True)
class Verdict:
    """What became of the answers that were checked."""

    counts: Mapping[str, int]
    """``right``: the offline scores of the bundle and the snapshot that the answer names.
    ``right without store``: the same without features, and the answer says so. ``mixed``: each
    probability is that of some bundle and snapshot, but not all of the one that is named.
    ``wrong``: a probability that nobody has published. ``unreadable``."""
    examples: Sequence[str]

    @property
    def num_bad(self) -> int:
        """Answers that must not be."""
        return sum(self.counts[name] for name in ("mixed", "wrong", "unreadable"))


@dataclass
class Offline:
    """Offline scores of some requests, by bundle and snapshot."""

    market: BenchMarket
    asked: Sequence[Asked]
    scores: dict[Key, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scorers = {b.fingerprint: Scorer.of(b) for b in self.market.bundles}
        self._away: dict[str, Scores] | None = None

    def learn(self, settings: DriftlineSettings) -> datetime:
        """Take note of the present snapshot; its moment.

        ``Scorer`` on whole columns is what the gate and the replay score with; a request is scored
        by other code, which never builds them.
        """
        features = OnlineFeatures.open(settings)
        as_of = features.as_of
        assert as_of is not None
        for fingerprint, scorer in self._scorers.items():
            self.scores[fingerprint, as_of] = [
                scorer.score(
                    features.read(one.page, one.ads, context=one.context, now=as_of).columns
                )
                for one in self.asked
            ]
        return as_of

    def check(self, answers: Sequence[KeptAnswer], form: Form) -> Verdict:
        """Compare every answer that is no refusal."""
        counts: Counter[str] = Counter()
        examples: list[str] = []
        for kept in answers:
            if kept.status != 200:
                continue
            try:
                told = form.read(kept.content)
            except Exception as error:  # what a server sends may be anything
                kind, detail = "unreadable", f"{error!r}: {kept.content[:200]!r}"
            else:
                kind = self._judge(told, kept.body, form.tolerance)
                detail = f"names {told.bundle} as of {told.as_of}"
            counts[kind] += 1
            if not kind.startswith("right") and len(examples) < 5:
                examples.append(f"{kind}: request {kept.request}, {detail}")
        return Verdict(counts, examples)

    def _judge(self, told: Told, body: int, tolerance: float) -> str:
        expected = self.scores.get((told.bundle, told.as_of))
        if AWAY in told.fallbacks:
            away = self._without_store().get(told.bundle)
            if away is not None and _equal(told.probabilities, away[body], tolerance):
                return "right without store"
        elif expected is not None and _equal(told.probabilities, expected[body], tolerance):
            return "right"
        known = np.stack([scores[body] for scores in self.scores.values()])
        if known.shape[1:] != told.probabilities.shape:
            return "wrong"
        near = np.abs(known - told.probabilities) <= tolerance
        return "mixed" if near.any(axis=0).all() else "wrong"

    def _without_store(self) -> dict[str, Scores]:
        if self._away is None:
            self._away = {
                fingerprint: [scorer.score(self._nothing(one)) for one in self.asked]
                for fingerprint, scorer in self._scorers.items()
            }
        return self._away

    def _nothing(self, asked: Asked) -> dict[str, NDArray[np.generic]]:
        """Columns of a request about whose products nothing is known."""
        num = len(asked.ads)
        columns: dict[str, NDArray[np.generic]] = {}
        for column in head_columns(self.market.settings):
            value = asked.context.get(column.name) if column.alias is None else None
            if column.kind == "numeric":
                columns[column.name] = np.full(num, np.nan if value is None else value, np.float32)
            else:
                columns[column.name] = np.full(num, value, np.object_)
        return columns | {name: np.zeros(num, np.int64) for name in TEXT_ID_COLUMNS}


def _equal(found: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float) -> bool:
    return found.shape == expected.shape and bool((np.abs(found - expected) <= tolerance).all())
