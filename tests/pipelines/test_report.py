import importlib.util
import json
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from driftline.pipelines.report import ReportPaths, build_report, plain
from driftline.pipelines.report_figures import ReplayFigures, measure_replay
from driftline.pipelines.report_numbers import measure_staleness
from driftline.pipelines.report_rows import read_rows
from driftline.pipelines.report_words import describe_headline
from driftline.platform.bootstrap import Interval, paired_bootstrap
from driftline.platform.errors import ContractError, EmptyWindowError
from driftline.platform.metrics import normalised_entropy, roc_auc
from driftline.platform.windows import Window

MADE_AT = datetime(2026, 11, 21, 9, tzinfo=UTC)


def load_synthetic() -> ModuleType:
    path = Path(__file__).parent / "synthetic_replay.py"
    spec = importlib.util.spec_from_file_location("synthetic_replay", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = load_synthetic()


@pytest.fixture(scope="module")
def scores() -> pa.Table:
    table: pa.Table = synthetic.scores_table(num_hours=40, requests_per_hour=25)
    return table


@pytest.fixture(scope="module")
def replay() -> dict[str, Any]:
    made: dict[str, Any] = synthetic.summary(num_hours=40)
    return made | {"last_hours": 30, "num_bootstrap": 60}


@pytest.fixture(scope="module")
def figures(scores: pa.Table, replay: dict[str, Any]) -> ReplayFigures:
    return measure_replay(replay, scores)


@pytest.fixture(scope="module")
def report(
    scores: pa.Table, replay: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> ReportPaths:
    return build_report(replay, scores, tmp_path_factory.mktemp("report"), made_at=MADE_AT)


def last_30_hours(scores: pa.Table) -> pa.Table:
    first = synthetic.START + timedelta(hours=10)
    return scores.filter(pa.compute.greater_equal(scores["event_time"], pa.scalar(first)))


def test_the_page_needs_nothing_but_itself(report: ReportPaths) -> None:
    page = report.html.read_text()
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page)
    assert all(address.startswith("#") for address in addresses)
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("<svg") == 5
    assert len(page) < 600_000


def test_the_page_has_no_hole_where_a_number_belongs(report: ReportPaths) -> None:
    for path in (report.html, report.markdown):
        text = path.read_text()
        assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S).lower()
        assert "None" not in text
        assert "Interval(" not in text


def test_pictures_follow_a_dark_page(report: ReportPaths) -> None:
    page = report.html.read_text()
    assert "prefers-color-scheme: dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert "var(--ink)" in drawings
    assert "#1b1f24" not in drawings
    assert "#fefefe" not in drawings


def test_drawings_on_one_page_do_not_share_identifiers(report: ReportPaths) -> None:
    drawings = re.findall(r"<svg.*?</svg>", report.html.read_text(), flags=re.S)
    owners: dict[str, int] = {}
    for number, drawing in enumerate(drawings):
        for name in set(re.findall(r'\bid="([^"]+)"', drawing)):
            assert owners.setdefault(name, number) == number
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', drawing))
        assert used <= set(re.findall(r'\bid="([^"]+)"', drawing))


def test_every_picture_is_also_a_png(report: ReportPaths) -> None:
    names = [path.stem for path in report.pictures]
    assert names == ["staleness", "policies", "oracle", "hours", "refreshes"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures)


def test_the_figures_are_those_of_the_last_hours(
    report: ReportPaths, scores: pa.Table, replay: dict[str, Any]
) -> None:
    figures = json.loads(report.json.read_text())["figures"]
    last = last_30_hours(scores)
    labels = last["clicked"].to_numpy()
    never, refreshed = (last[name].to_numpy() for name in ("never", "refreshed"))
    assert figures["num_rows"] == last.num_rows
    assert figures["num_clicks"] == int(labels.sum())
    (found,) = (each for each in figures["policies"] if each["policy"] == "never")
    auc, ne = roc_auc(labels, never), normalised_entropy(labels, never)
    assert found["measures"]["auc"]["value"] == pytest.approx(auc, abs=1e-6)
    assert found["measures"]["ne"]["value"] == pytest.approx(ne, abs=1e-6)
    difference = paired_bootstrap(
        labels,
        never,
        refreshed,
        groups=np.unique(last["request_id"].to_numpy(), return_inverse=True)[1],
        num_samples=60,
        seed=replay["seed"],
    )
    shown = found["to_refreshed"]["auc"]
    assert shown["value"] == pytest.approx(difference.value, abs=1e-6)
    width = difference.high - difference.low  # requests are numbered otherwise: other resamples
    assert shown["high"] - shown["low"] == pytest.approx(width, rel=0.5)


def test_each_hour_holds_its_own_rows(report: ReportPaths, scores: pa.Table) -> None:
    figures = json.loads(report.json.read_text())["figures"]
    single = figures["single"]
    assert sum(single["num_rows"]) == scores.num_rows
    assert sum(single["num_clicks"]) == int(scores["clicked"].to_numpy().sum())
    hours = np.array([when.replace(minute=0) for when in scores["event_time"].to_pylist()])
    starts = sorted({when.replace(second=0, microsecond=0) for when in hours})
    seventh = scores.filter(
        pa.compute.equal(
            pa.compute.floor_temporal(scores["event_time"], unit="hour"), pa.scalar(starts[6])
        )
    )
    expected = roc_auc(seventh["clicked"].to_numpy(), seventh["refreshed"].to_numpy())
    assert single["measures"]["refreshed"]["auc"]["value"][6] == pytest.approx(expected, abs=1e-6)
    assert figures["pooled"]["pooled_hours"] > 1


def test_a_pooled_point_covers_the_hours_up_to_its_own(
    scores: pa.Table, figures: ReplayFigures
) -> None:
    pooled = figures.pooled.pooled_hours
    rows = read_rows(scores)
    chosen = rows.where((rows.hours <= 30) & (rows.hours > 30 - pooled))
    expected = roc_auc(chosen.labels, chosen.predictions["refreshed"])
    assert figures.pooled.measures["refreshed"]["auc"][30].value == pytest.approx(expected)


def test_staler_students_lose_more_and_cost_less(figures: ReplayFigures) -> None:
    staleness = figures.staleness
    assert staleness is not None
    assert [point.hours for point in staleness.points] == [1, 3, 6, 12]
    assert staleness.too_short == (24, 48)
    lost = [point.auc_lost.value for point in staleness.points]
    assert lost[-1] > lost[0]
    costs = [cadence.core_seconds_per_day for cadence in staleness.cadences]
    assert [cadence.every_hours for cadence in staleness.cadences] == [1, 3, 6, 12]
    assert all(a is not None and b is not None and a > b for a, b in pairwise(costs))
    assert staleness.cadences[0].auc_lost == Interval(0, 0, 0)


def test_a_cadence_costs_the_mean_over_the_ages_between_two_refreshes(scores: pa.Table) -> None:
    rows = read_rows(scores)
    common = rows.having([f"stale_{hours}h" for hours in (1, 3, 6, 12)])
    fresh = roc_auc(common.labels, common.predictions["refreshed"])
    losses = [0.0] + [
        fresh - roc_auc(common.labels, common.predictions[f"stale_{hours}h"])
        for hours in (1, 3, 6, 12)
    ]
    by_age = [float(np.interp(age, [0, 1, 3, 6, 12], losses)) for age in range(6)]
    short = {n: v for n, v in common.predictions.items() if n not in ("stale_24h", "stale_48h")}
    figures = measure_staleness(
        type(common)(common.start, common.hours, common.labels, common.groups, short, {}),
        head_core_seconds=10,
        head_every=1,
        num_samples=5,
        seed=0,
    )
    assert figures is not None
    (six,) = (cadence for cadence in figures.cadences if cadence.every_hours == 6)
    assert six.auc_lost.value == pytest.approx(np.mean(by_age))
    assert six.core_seconds_per_day == 40


def test_the_recovered_share_is_that_of_the_oracles_gap(
    scores: pa.Table, figures: ReplayFigures
) -> None:
    gap = figures.oracle_gap
    assert gap is not None
    last = last_30_hours(scores)
    labels = last["clicked"].to_numpy()
    never, refreshed, oracle = (
        roc_auc(labels, last[name].to_numpy()) for name in ("never", "refreshed", "oracle")
    )
    assert gap.recovered.value == pytest.approx((refreshed - never) / (oracle - never))
    assert gap.recovered.low < gap.recovered.value < gap.recovered.high


def test_refusals_stand_there_with_their_reasons(report: ReportPaths) -> None:
    page = report.html.read_text()
    assert "AUC fell by 0.0312 [0.0121, 0.0500], more than the 0.0100 allowed" in page
    assert "The gate refused 1 of 40 refreshes." in page
    assert "0123456789ab" in page
    assert "2026-11-21 09:00 UTC" in page


def test_the_headline_says_how_sure_one_may_be() -> None:
    def headline(low: float, value: float, high: float) -> str:
        lost = Interval(-value, -high, -low)
        window = Window(MADE_AT, MADE_AT + timedelta(hours=72))
        policy = type(FIGURES)("never", 1.0, {"auc": Interval(0.7, 0.6, 0.8)}, {"auc": lost})
        return describe_headline([policy], window)

    over = "over the last 72 hours"
    assert headline(0.01, 0.02, 0.03) == (
        f"Refreshing was worth 2.00 [1.00, 3.00] AUC points {over}"
    )
    assert headline(-0.03, -0.02, -0.01).startswith("Refreshing cost 2.00 [1.00, 3.00] AUC points")
    assert headline(-0.01, 0.001, 0.02).startswith("Refreshing made no difference that")


FIGURES = measure_replay(
    {"last_hours": 1, "num_bootstrap": 2},
    pa.table(
        {
            "event_time": pa.array([MADE_AT, MADE_AT], pa.timestamp("us", tz="UTC")),
            "clicked": [True, False],
            "refreshed": [0.6, 0.4],
        }
    ),
).policies[0]


def test_what_the_scores_lack_is_left_out_and_said(scores: pa.Table, tmp_path: Path) -> None:
    least = scores.select(["event_time", "clicked", "refreshed"])
    paths = build_report({"name": "least", "last_hours": 30, "num_bootstrap": 20}, least, tmp_path)
    page = paths.html.read_text()
    assert [path.stem for path in paths.pictures] == ["hours"]
    assert "The refreshed student ranked with AUC 0." in page
    for lacking in (
        "the never-refreshed student, so the worth of refreshing is not measured",
        "LightGBM re-trained hourly",
        "students of some hours ago",
        "the true click probabilities",
        "marks of new or rare items",
    ):
        assert lacking in page
    assert "What staleness costs" not in page


def test_hours_without_a_click_leave_gaps_and_no_error(tmp_path: Path) -> None:
    times = [MADE_AT + timedelta(minutes=20 * number) for number in range(12)]
    table = pa.table(
        {
            "event_time": pa.array(times, pa.timestamp("us", tz="UTC")),
            "clicked": [False] * 12,
            "request_id": pa.array([None] * 12, pa.string()),
            "refreshed": [0.1] * 12,
            "never": [0.2] * 12,
            "stale_1h": [0.15] * 12,
        }
    )
    paths = build_report({"name": "quiet", "last_hours": 72}, table, tmp_path)
    text = paths.json.read_text()
    assert "NaN" not in text
    figures = json.loads(text)["figures"]
    assert figures["policies"][0]["measures"]["auc"]["value"] is None
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", paths.html.read_text(), flags=re.S)


def test_the_same_replay_gives_the_same_files(
    report: ReportPaths, scores: pa.Table, replay: dict[str, Any], tmp_path: Path
) -> None:
    repeated = build_report(replay, scores, tmp_path, made_at=MADE_AT)
    assert repeated.json.read_text() == report.json.read_text()
    assert repeated.html.read_text() == report.html.read_text()


def test_scores_that_cannot_be_reported_are_named(scores: pa.Table, tmp_path: Path) -> None:
    replay = {"name": "bad", "last_hours": 3}
    with pytest.raises(ContractError, match=r"\['refreshed'\] are missing"):
        build_report(replay, scores.drop_columns(["refreshed"]), tmp_path)
    with pytest.raises(EmptyWindowError, match="no row"):
        build_report(replay, scores.slice(0, 0), tmp_path)
    hole = scores.set_column(
        scores.column_names.index("refreshed"), "refreshed", scores["stale_1h"]
    )
    with pytest.raises(ContractError, match="every row needs a value of 'refreshed'"):
        build_report(replay, hole, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plain_json_keeps_no_nan() -> None:
    nan = float("nan")
    value = {"a": Interval(nan, 0.25, 1 / 3), "b": [nan, MADE_AT], "c": (Interval(1, 0, 2),)}
    assert plain(value) == {
        "a": {"value": None, "low": 0.25, "high": 0.333333},
        "b": [None, "2026-11-21T09:00:00Z"],
        "c": {"value": [1], "low": [0], "high": [2]},
    }
