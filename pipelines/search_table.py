"""The table of a search: like Table 3 of CTR-BERT, with intervals and costs (papers.md S0.31)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftline.pipelines.search_place import RESULTS
from driftline.pipelines.strategy_measures import TestSets
from driftline.pipelines.study_statistics import Estimate, Sample, combine, estimate
from driftline.platform.bootstrap import ClusterBootstrap, json_number
from driftline.platform.metrics import FloatArray, relative_delta
from driftline.platform.settings import SearchSettings

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SearchRow:
    """One strategy, over its seeds."""

    name: str
    measures: dict[str, float]
    """Means over the seeds."""
    auc: Estimate
    """On the next slice; the interval covers seeds and requests."""
    behind: Estimate
    """AUC of the best strategy minus this one's, on the same seeds and requests."""
    delta: float
    """Percent of the baseline's AUC on the next slice (papers.md S0.28)."""
    ood_delta: float | None
    """The same on stale rows, before fine-tuning; None without a student by then (A0.19)."""


@dataclass(frozen=True)
class SearchTable:
    """All strategies, the best first."""

    search: SearchSettings
    rows: tuple[SearchRow, ...]
    baseline: dict[str, float]
    core_seconds_shared: float
    """Of everything trained and labelled, each stage once."""
    core_seconds_alone: float
    """If every trial had trained its stages for itself."""
    num_stages: int
    """Distinct stages."""
    num_stages_alone: int
    teacher_passes: int


def make_table(
    trials: Results, reference: Results, *, folder: Path, search: SearchSettings, tests: TestSets
) -> SearchTable:
    """Rows from the results of all trials and of the baseline."""
    rows = tests.next
    bootstrap = ClusterBootstrap(
        rows.clicked, groups=rows.requests, num_samples=search.num_bootstrap, seed=0
    )
    names = list(dict.fromkeys(trial["name"] for trial in trials))
    samples = {name: _sample(_of(trials, name), folder, bootstrap) for name in names}
    baseline = _means(reference)
    order = sorted(
        names,
        key=lambda name: (-float(samples[name].values.mean()), _means(_of(trials, name))["cost"]),
    )
    best = samples[order[0]]
    nodes = {node["identity"]: node for trial in trials for node in trial["nodes"]}
    everything = [node for trial in trials for node in trial["nodes"]]
    return SearchTable(
        search=search,
        rows=tuple(
            _row(name, _of(trials, name), samples[name], best=best, baseline=baseline)
            for name in order
        ),
        baseline=baseline,
        core_seconds_shared=sum(node["core_seconds"] for node in nodes.values()),
        core_seconds_alone=sum(node["core_seconds"] for node in everything),
        num_stages=_num_stages(list(nodes.values())),
        num_stages_alone=_num_stages(everything),
        teacher_passes=sum(node["teacher_passes"] for node in nodes.values()),
    )


def _row(
    name: str, trials: Results, sample: Sample, *, best: Sample, baseline: Mapping[str, float]
) -> SearchRow:
    measures = _means(trials)
    behind = combine({"best": best, "this": sample}, lambda best, this: best - this)
    assert behind is not None
    before = measures.get("distilled_ood_auc")
    return SearchRow(
        name=name,
        measures=measures,
        auc=estimate(sample),
        behind=estimate(behind),
        delta=relative_delta(measures["id_auc"], baseline=baseline["id_auc"]).percent,
        ood_delta=None
        if before is None
        else relative_delta(before, baseline=baseline["ood_auc"]).percent,
    )


def _of(trials: Results, name: str) -> list[Mapping[str, Any]]:
    return [trial for trial in trials if trial["name"] == name]


def _sample(trials: Results, folder: Path, bootstrap: ClusterBootstrap) -> Sample:
    scores: list[FloatArray] = [np.load(folder / RESULTS / trial["scores"]) for trial in trials]
    return Sample(
        seeds=tuple(trial["seed"] for trial in trials),
        values=np.array([trial["measures"]["id_auc"] for trial in trials]),
        resamples=np.stack([bootstrap.resample("auc", p) for p in scores]),
    )


def _means(trials: Results) -> dict[str, float]:
    """Means over seeds; ``cost`` is core-seconds as if alone."""
    names = [name for name in trials[0]["measures"] if all(name in t["measures"] for t in trials)]
    means = {name: float(np.mean([t["measures"][name] for t in trials])) for name in names}
    return means | {"cost": means["core_seconds"]}


def _num_stages(nodes: Results) -> int:
    return sum(node["num_steps"] is not None for node in nodes)


def table_json(table: SearchTable) -> dict[str, Any]:
    """All of it as plain JSON; NaN becomes null."""
    return {
        "method": table.search.method,
        "seeds": list(table.search.seeds),
        "rows": [
            {
                "name": row.name,
                "auc": row.auc.interval.to_json(),
                "behind": row.behind.interval.to_json(),
                "delta_percent": json_number(row.delta),
                "ood_delta_percent": json_number(row.ood_delta),
                "measures": {name: json_number(value) for name, value in row.measures.items()},
            }
            for row in table.rows
        ],
        "baseline": {name: json_number(value) for name, value in table.baseline.items()},
        "core_seconds": {
            "shared": table.core_seconds_shared,
            "alone": table.core_seconds_alone,
        },
        "num_stages": {"shared": table.num_stages, "alone": table.num_stages_alone},
        "teacher_passes": table.teacher_passes,
    }


def table_markdown(
    table: SearchTable,
    *,
    teacher: Mapping[str, float],
    later: Mapping[str, Mapping[int, float]],
    as_of: str,
) -> str:
    """The table for people."""
    search, baseline = table.search, table.baseline
    lines = [
        f"# Search {search.name}",
        "",
        f"As of {as_of}; judged on the {search.slice_hours:g} h after it; {len(search.seeds)} "
        f"seeds; 95 % intervals over seeds and requests.",
        "",
        "| strategy | OOD Δ% | ID soft AUC | ID AUC | behind the best | ID Δ% | NE | core-s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        auc, behind = row.auc.interval, row.behind.interval
        lines.append(
            f"| {row.name} | {_signed(row.ood_delta)} | {_number(row.measures.get('id_soft_auc'))} "
            f"| {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}] "
            f"| {behind.value:.4f} [{behind.low:.4f}, {behind.high:.4f}] "
            f"| {_signed(row.delta)} | {row.measures['normalised_entropy']:.4f} "
            f"| {row.measures['cost']:.1f} |"
        )
    for name, measures in (("MLP baseline", baseline), ("frozen teacher", teacher)):
        ood, id_ = (
            relative_delta(measures[key], baseline=baseline[key]).percent
            for key in ("ood_auc", "id_auc")
        )
        lines.append(
            f"| {name} | {_signed(ood)} | {_number(measures.get('id_soft_auc'))} "
            f"| {measures['id_auc']:.4f} | | {_signed(id_)} "
            f"| {measures['normalised_entropy']:.4f} | {measures['core_seconds']:.1f} |"
        )
    lines += [
        "",
        "OOD Δ%: on stale rows, before fine-tuning. Δ% is relative to the MLP baseline's AUC on "
        "the same rows. core-s: as if the strategy ran alone.",
        "",
        f"{table.num_stages} stages trained instead of {table.num_stages_alone}, "
        f"{table.core_seconds_shared:.1f} core-seconds instead of {table.core_seconds_alone:.1f}; "
        f"{table.teacher_passes:,} rows through the teacher, each once.",
        "",
        "On the slice after that one, which had no say in the choice:",
        "",
    ]
    for name, values in later.items():
        lines.append(f"- {name}: AUC {np.mean(list(values.values())):.4f}")
    return "\n".join([*lines, ""])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
