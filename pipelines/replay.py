"""The log, once more, hour by hour: every policy scores an hour before anybody may learn from it.

One folder holds the whole replay: ``scores/HOUR.parquet`` with one column a policy, and
``hours/HOUR.json`` saying which bundle was champion. An hour that has both is done, so a killed
replay continues where it was.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from driftline.features.frame_files import read_frames
from driftline.features.log import ImpressionLog
from driftline.pipelines.peers import Peers
from driftline.pipelines.plan import schedule
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.provenance import code_version, machine, settings_hash
from driftline.pipelines.records import RefreshRecord, read_records
from driftline.pipelines.refresh_arms import refresh_arms
from driftline.pipelines.refresh_head import refresh_head
from driftline.platform.artefacts import read_json, whole_file, write_json
from driftline.platform.bundle import Bundle
from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Split, Window, format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

STALE_HOURS: Final = (1, 3, 6, 12, 24, 48)
IDENTITY: Final = ("impression_id", "request_id", "event_time", "clicked")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayResult:
    """Scores of all hours, and what the report says beside them."""

    scores: pa.Table
    summary: dict[str, Any]


def replay(settings: DriftlineSettings, *, progress: Progress | None = None) -> ReplayResult:
    """Drive the whole loop through event time over the ID part of the log.

    Each hour: (1) refresh what is due with what is known at its start, (2) score its impressions
    with the champion and with every peer. Labels come back after their maturity.

    Raises:
        SettingsError: the log was replayed with other settings in this workspace.
    """
    workspace = Workspace.of(settings)
    gate = settings.gate.model_copy(update={"promote": "champion"})  # nobody asks a canary here
    settings = settings.model_copy(update={"gate": gate})
    prepare_features(settings)
    run = _Replay(settings, workspace, split=log_split(settings))
    run.check_settings()
    hours = list(run.window.hours())
    for done, hour in enumerate(hours):
        if not run.is_done(hour):
            run.play(hour)
        if progress is not None:
            progress(done + 1, len(hours))
    return run.result()


def log_split(settings: DriftlineSettings) -> Split:
    """Stale and recent part of the workspace's log."""
    return ImpressionLog.open(Workspace.of(settings).clean, settings).split


@dataclass
class _Replay:
    settings: DriftlineSettings
    workspace: Workspace
    split: Split
    peers: Peers = field(init=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self.settings, self.folder / "peers")

    @property
    def folder(self) -> Path:
        return self.workspace.reports / "replay"

    @property
    def window(self) -> Window:
        limit = self.settings.replay.num_hours
        return self.split.id if limit is None else self.split.id.last(timedelta(hours=limit))

    def check_settings(self) -> None:
        """One replay folder, one set of settings: mixed hours would be no measurement."""
        path = self.folder / "replay.json"
        now = {
            "settings": settings_hash(self.settings),
            "window": str(self.window),
            "gate": self.settings.gate.model_dump(mode="json", exclude={"promote"}),
            "peers": list(self.settings.replay.peers),
        }
        if path.exists() and (before := read_json(path)) != now:
            raise SettingsError(
                f"replay {self.folder} was begun with other settings or hours ({before}, now "
                f"{now}); use another workspace"
            )
        write_json(path, now)

    def is_done(self, hour: Window) -> bool:
        return self._scores(hour).exists() and self._state(hour).exists()

    def play(self, hour: Window) -> None:
        """Refresh what is due at the start of the hour, then score the hour."""
        self._refresh(hour.start)
        champion = self._champion(hour.start)
        self.peers.refresh(hour.start)
        frame = read_frames(self.settings, hour)
        scores: dict[str, NDArray[np.float64]] = {"refreshed": self._score(champion, frame)}
        for policy, fingerprint in self._students(hour.start).items():
            scores[policy] = self._score(fingerprint, frame)
        scores |= self.peers.score(frame)
        columns = {name: frame[name] for name in IDENTITY}
        columns |= {"new_item": _is_new(frame)}
        columns |= {name: pa.array(values) for name, values in scores.items()}
        with whole_file(self._scores(hour)) as scratch:
            pq.write_table(pa.table(columns), scratch)
        write_json(self._state(hour), {"hour": format_time(hour.start), "champion": champion})

    def _refresh(self, now: datetime) -> None:
        """Arms first: a rotation brings its own head, so no head refresh is due with it."""
        due = schedule(self.settings)
        age = now - self.window.start
        if age % due.arms == timedelta(0):
            refresh_arms(self.settings, as_of=now)
        elif age % due.head == timedelta(0):
            try:
                refresh_head(self.settings, as_of=now)
            except EmptyWindowError as error:
                logger.info("no head refresh at %s: %s", format_time(now), error)

    def _champion(self, now: datetime) -> str:
        """Fingerprint of the champion after the newest refresh that is not after ``now``."""
        return self._records_until(now)[-1].champion

    def _records_until(self, now: datetime) -> list[RefreshRecord]:
        limit = format_time(now)
        first = format_time(self.window.start)
        return [r for r in read_records(self.workspace) if first <= r.as_of <= limit]

    def _students(self, now: datetime) -> dict[str, str]:
        """The same student under other policies: never refreshed, arms only, k hours stale."""
        records = self._records_until(now)
        every = [record for record in records if record.kind == "arms"]
        arms = [record for record in every if record.decision == "promoted"] or every[:1]
        chosen = {"never": arms[0].bundle, "arms_only": arms[-1].bundle}
        chosen = {k: v for k, v in chosen.items() if k in self.settings.replay.peers}
        for stale in STALE_HOURS:
            then = now - stale * HOUR
            if then >= self.window.start:
                chosen[f"stale_{stale}h"] = self._champion(then)
        return chosen

    def _score(self, fingerprint: str, frame: pa.Table) -> NDArray[np.float64]:
        return _scorer(self.workspace.bundles / fingerprint).score(frame)

    def _scores(self, hour: Window) -> Path:
        return self.folder / "scores" / f"{format_time(hour.start)[:13]}.parquet"

    def _state(self, hour: Window) -> Path:
        return self.folder / "hours" / f"{format_time(hour.start)[:13]}.json"

    def result(self) -> ReplayResult:
        """All hours together, with the oracle's probabilities where they are known."""
        parts = [pq.read_table(self._scores(hour)) for hour in self.window.hours()]
        scores = pa.concat_tables(self._aligned(parts))
        oracle = self._oracle()
        if oracle is not None:
            scores = _with_oracle(scores, oracle)
        return ReplayResult(scores, self._summary())

    def _aligned(self, parts: list[pa.Table]) -> Iterator[pa.Table]:
        """Stale policies start some hours late: NaN before."""
        names = list(dict.fromkeys(name for part in parts for name in part.column_names))
        for part in parts:
            nothing = pa.array(np.full(part.num_rows, np.nan))
            yield pa.table({n: part[n] if n in part.column_names else nothing for n in names})

    def _oracle(self) -> pa.Table | None:
        folder = self.workspace.log / "oracle"
        return pq.read_table(folder) if folder.exists() else None

    def _summary(self) -> dict[str, Any]:
        span = ImpressionLog.open(self.workspace.clean, self.settings).span
        return {
            "name": self.settings.name,
            "span": [format_time(span.start), format_time(span.end)],
            "id_window": [format_time(self.window.start), format_time(self.window.end)],
            "last_hours": self.settings.replay.last_hours,
            "seed": self.settings.seed,
            "num_bootstrap": self.settings.replay.num_bootstrap,
            "machine": machine(),
            "commit": code_version(),
            "settings_hash": settings_hash(self.settings),
            "refreshes": [
                {
                    "kind": r.kind,
                    "as_of": r.as_of,
                    "seconds": r.seconds,
                    "core_seconds": r.core_seconds,
                    "num_rows": r.num_rows,
                    "decision": r.decision,
                    "reasons": list(r.reasons),
                    "bundle": r.bundle,
                    "auc_champion": r.auc_champion,
                    "auc_challenger": r.auc_challenger,
                }
                for r in self._records_until(self.window.end)
            ],
            "peers": self.peers.costs(),
        }


@lru_cache(maxsize=64)
def _scorer(path: Path) -> Scorer:
    return Scorer.of(Bundle.open(path))


def _is_new(frame: pa.Table) -> pa.Array:
    """Ads first shown less than a day ago, or never before."""
    age = frame["ad__hours_since_first"].fill_null(0.0).to_numpy()
    return pa.array(age < 24.0)


def _with_oracle(scores: pa.Table, oracle: pa.Table) -> pa.Table:
    known = oracle.select(["impression_id", "click_probability"])
    joined = scores.select(["impression_id"]).append_column(
        "row", pa.array(np.arange(scores.num_rows))
    )
    matched = joined.join(known, "impression_id").sort_by("row")
    return scores.append_column("oracle", matched["click_probability"].combine_chunks())
