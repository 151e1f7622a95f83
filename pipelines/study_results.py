"""The finished trials of a study: one readable JSON file each, and the resamples beside it.

``trials/CELL.seed-N.json`` says what was measured and how it came about;
``trials/CELL.seed-N.parquet`` holds the measures on resampled requests, a column each. A trial is
done when both are there and its key is the one of the settings at hand.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from driftline.pipelines.study_statistics import Sample, combine
from driftline.platform.artefacts import read_json, whole_file, write_json
from driftline.platform.bootstrap import json_number
from driftline.platform.metrics import FloatArray
from driftline.platform.study_contrasts import Contrast


@dataclass(frozen=True)
class Trial:
    """One trained and measured model."""

    cell: str
    seed: int
    measures: Mapping[str, float]
    """NaN where the test rows cannot give one."""
    resamples: Mapping[str, FloatArray] = field(default_factory=dict)
    """Measures on every resample of the test requests, ``[R]``; all trials share the resamples."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it came about: stages, costs, provenance of the rows. Plain values."""


@dataclass(frozen=True)
class TrialFolder:
    """Finished trials on disk."""

    path: Path

    def read(self, cell: str, seed: int, *, key: str) -> Trial | None:
        """The finished trial, or None if there is none or it was made from other settings."""
        described = self._json(cell, seed)
        if not described.exists():
            return None
        raw = read_json(described)
        if raw["key"] != key:
            return None
        drawn: dict[str, FloatArray] = {}
        if self._parquet(cell, seed).exists():
            table = pq.read_table(self._parquet(cell, seed))
            drawn = {name: table[name].to_numpy() for name in table.column_names}
        measures = {n: np.nan if v is None else float(v) for n, v in raw["measures"].items()}
        return Trial(cell, seed, measures, drawn, raw["notes"])

    def write(self, trial: Trial, *, key: str) -> None:
        """Keep a trial; the JSON file comes last and makes it count."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._json(trial.cell, trial.seed).unlink(missing_ok=True)
        self._parquet(trial.cell, trial.seed).unlink(missing_ok=True)
        if trial.resamples:
            columns = {name: pa.array(values) for name, values in trial.resamples.items()}
            with whole_file(self._parquet(trial.cell, trial.seed)) as scratch:
                pq.write_table(pa.table(columns), scratch)
        write_json(
            self._json(trial.cell, trial.seed),
            {
                "cell": trial.cell,
                "seed": trial.seed,
                "key": key,
                "measures": {n: json_number(v) for n, v in trial.measures.items()},
                "notes": dict(trial.notes),
            },
        )

    def _json(self, cell: str, seed: int) -> Path:
        return self.path / f"{cell}.seed-{seed}.json"

    def _parquet(self, cell: str, seed: int) -> Path:
        return self.path / f"{cell}.seed-{seed}.parquet"


class StudyResults:
    """All trials of a study, to be asked for one number over its seeds."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self.trials = tuple(trials)
        self._by_cell: dict[str, list[Trial]] = {}
        for trial in self.trials:
            self._by_cell.setdefault(trial.cell, []).append(trial)

    def sample(self, cell: str, measure: str) -> Sample | None:
        """A measure of a cell over its seeds; None if it was never measured."""
        known = [
            trial
            for trial in self._by_cell.get(cell, ())
            if np.isfinite(trial.measures.get(measure, np.nan))
        ]
        if not known:
            return None
        drawn = [trial.resamples.get(measure) for trial in known]
        have = [each for each in drawn if each is not None]
        counts = {len(each) for each in have}
        resamples = np.stack(have) if len(have) == len(known) and len(counts) == 1 else None
        values = np.array([trial.measures[measure] for trial in known])
        return Sample(tuple(trial.seed for trial in known), values, resamples)

    def contrast(self, contrast: Contrast) -> Sample | None:
        """A resolved expression (over ``cell:measure``) over the seeds that all its cells have."""
        samples: dict[str, Sample] = {}
        for name in contrast.weights:
            cell, _, measure = name.partition(":")
            found = self.sample(cell, measure)
            if found is None:
                return None
            samples[name] = found
        weights = dict(contrast.weights)

        def weighted(**values: FloatArray) -> FloatArray:
            total = sum(weights[name] * each for name, each in values.items())
            return np.asarray(total + contrast.constant, dtype=np.float64)

        return combine(samples, weighted)

    def delta(self, cell: str, baseline: str, measure: str) -> Sample | None:
        """100 (measure / baseline - 1), paired by seed (papers.md S0.28)."""
        samples = {"value": self.sample(cell, measure), "base": self.sample(baseline, measure)}
        known = {name: sample for name, sample in samples.items() if sample is not None}
        if len(known) < len(samples):
            return None
        return combine(known, lambda value, base: 100 * (value / base - 1))

    def share(self, cell: str, ends: tuple[str, str], measure: str) -> Sample | None:
        """Percent of the way from one cell to another that this one has gone (papers.md S1.13)."""
        names = {"value": cell, "first": ends[0], "last": ends[1]}
        samples = {key: self.sample(name, measure) for key, name in names.items()}
        known = {key: sample for key, sample in samples.items() if sample is not None}
        if len(known) < len(samples):
            return None
        return combine(known, _percent_of_the_way)


def _percent_of_the_way(value: FloatArray, first: FloatArray, last: FloatArray) -> FloatArray:
    way = last - first
    gone = np.divide(value - first, way, out=np.full_like(way, np.nan), where=way != 0)
    return np.asarray(100 * gone)
