"""What the refreshed student is measured against in a replay: an MLP and LightGBM.

Both read the same tabular features as the head, and every row of the known log. The MLP is the
published baseline (papers.md S0.34); LightGBM is what many teams run today. Each comes as *never*
(fitted once, when the replay begins) and *hourly*.
"""

import logging
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.pipelines.mlp_peer import MlpPeer
from driftline.pipelines.plan import schedule
from driftline.pipelines.training_sets import known_frame
from driftline.platform.artefacts import read_json, whole_directory, write_json
from driftline.platform.columns import head_columns
from driftline.platform.errors import EmptyWindowError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.tabular import TabularEncoder
from driftline.platform.windows import Window, format_time, parse_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

LIGHTGBM_PARAMETERS: Final[dict[str, Any]] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 2,
}
LIGHTGBM_TREES: Final = 150
COST = "cost.json"


@dataclass(frozen=True)
class LightGbmPeer:
    """Gradient-boosted trees on raw values, fitted from scratch each time."""

    booster: lightgbm.Booster
    tabular: TabularEncoder

    @classmethod
    def fit(cls, frame: pa.Table, settings: DriftlineSettings) -> "LightGbmPeer":
        """Fit on all rows of the frame, none thinned."""
        tabular = TabularEncoder.fit(frame, head_columns(settings))
        data = lightgbm.Dataset(
            raw_matrix(frame, tabular),
            label=frame["clicked"].to_numpy().astype(np.float32),
            categorical_feature=list(range(len(tabular.categories))),
        )
        parameters = LIGHTGBM_PARAMETERS | {"seed": settings.seed}
        return cls(lightgbm.train(parameters, data, num_boost_round=LIGHTGBM_TREES), tabular)

    def score(self, frame: pa.Table) -> NDArray[np.float64]:
        """Click probability of each row. ``[B]``."""
        return np.asarray(self.booster.predict(raw_matrix(frame, self.tabular)), np.float64)

    def save(self, folder: Path) -> None:
        """Keep it, so that a killed replay continues with the same trees."""
        (folder / "tabular.json").write_text(self.tabular.to_json())
        self.booster.save_model(str(folder / "model.txt"))

    @classmethod
    def load(cls, folder: Path) -> "LightGbmPeer":
        """Read what ``save`` wrote."""
        tabular = TabularEncoder.from_json((folder / "tabular.json").read_text())
        return cls(lightgbm.Booster(model_file=str(folder / "model.txt")), tabular)


@dataclass
class Peers:
    """The peers of one replay, kept on disk by hour of their last fit."""

    settings: DriftlineSettings
    folder: Path

    def refresh(self, now: datetime) -> None:
        """Fit those that are due at ``now``; what was fitted before is kept."""
        for policy in self._policies():
            folder = self._folder(policy, now)
            hourly = policy.endswith("_hourly")
            if folder.exists() or (not hourly and self._newest(policy) is not None):
                continue
            started, cpu = time.monotonic(), time.process_time()
            before = self._newest(policy)
            try:
                peer = self._fit(policy, now, before)
            except EmptyWindowError as error:
                if before is None:
                    raise
                logger.info("%s keeps its fit at %s: %s", policy, format_time(now), error)
                continue
            with whole_directory(folder) as scratch:
                peer.save(scratch)
                cost = {
                    "policy": policy,
                    "as_of": format_time(now),
                    "seconds": round(time.monotonic() - started, 3),
                    "core_seconds": round(time.process_time() - cpu, 3),
                }
                write_json(scratch / COST, cost)

    def score(self, frame: pa.Table) -> dict[str, NDArray[np.float64]]:
        """Probabilities of the newest fit of each policy."""
        return {policy: self._load(policy).score(frame) for policy in self._policies()}

    def costs(self) -> list[dict[str, Any]]:
        """What each fit took."""
        return [read_json(path) for path in sorted(self.folder.glob(f"*/*/{COST}"))]

    def _fit(self, policy: str, now: datetime, before: Path | None) -> LightGbmPeer | MlpPeer:
        span = ImpressionLog.open(Workspace.of(self.settings).clean, self.settings).span
        window = Window(span.start, now)
        if policy.startswith("lightgbm"):
            return LightGbmPeer.fit(known_frame(self.settings, window, as_of=now), self.settings)
        if before is None or self._retrains(policy, now):
            return MlpPeer.fit(self.settings, window, as_of=now)
        return MlpPeer.load(before).continued(self.settings, window, as_of=now)

    def _retrains(self, policy: str, now: datetime) -> bool:
        """From scratch as often as the student's head is, with each arms refresh."""
        fitted = sorted((self.folder / policy).glob("[0-9]*"))
        first = parse_time(read_json(fitted[0] / COST)["as_of"])
        return (now - first) % schedule(self.settings).arms == timedelta(0)

    def _policies(self) -> list[str]:
        return [p for p in self.settings.replay.peers if p.startswith(("mlp", "lightgbm"))]

    def _folder(self, policy: str, now: datetime) -> Path:
        return self.folder / policy / format_time(now)[:13]

    def _newest(self, policy: str) -> Path | None:
        fitted = sorted((self.folder / policy).glob("[0-9]*"))
        return fitted[-1] if fitted else None

    def _load(self, policy: str) -> LightGbmPeer | MlpPeer:
        newest = self._newest(policy)
        assert newest is not None, policy
        kind = LightGbmPeer if policy.startswith("lightgbm") else MlpPeer
        return kind.load(newest)


def raw_matrix(frame: pa.Table, tabular: TabularEncoder) -> NDArray[np.float32]:
    """Category numbers, then raw numbers, NaN for missing; trees need no scaling. ``[B, F]``."""
    columns = [c.encode(frame[c.column].combine_chunks()) for c in tabular.categories]
    columns += [
        pc.fill_null(frame[n.column].cast(pa.float32()), float("nan")).to_numpy()
        for n in tabular.numbers
    ]
    return np.column_stack(columns).astype(np.float32)
