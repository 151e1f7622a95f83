import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from driftline.features.log import ImpressionLog
from driftline.features.quality import check_log
from driftline.features.simulate import SimulationReport, simulate
from driftline.features.simulate_market import Campaigns, draw
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings, parse_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
FEATURES = [
    {"name": "title", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "description", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "category", "kind": "categorical", "entity": "product", "tier": "medium"},
    {"name": "advertiser", "kind": "categorical", "entity": "product", "tier": "medium"},
    {"name": "application", "kind": "categorical", "entity": "impression", "tier": "medium"},
    {"name": "hour_of_week", "kind": "categorical", "entity": "impression", "tier": "medium"},
    {"name": "sales_1h", "kind": "numeric", "entity": "product", "tier": "short"},
    {"name": "sales_24h", "kind": "numeric", "entity": "product", "tier": "short"},
]


def make_settings(
    *, seed: int = 3, features: list[dict[str, str]] = FEATURES, **changes: Any
) -> DriftlineSettings:
    market = {"num_days": 4, "impressions_per_day": 12_000, "num_products": 400}
    return parse_settings(
        {
            "name": "test",
            "workspace": "runs/test",
            "seed": seed,
            "source": {"kind": "simulate", "start": "2026-01-01T00:00:00Z"} | market | changes,
            "features": features,
        },
        origin="test",
    )


@dataclass(frozen=True)
class Simulated:
    root: Path
    settings: DriftlineSettings
    report: SimulationReport
    log: ImpressionLog

    def oracle(self) -> pa.Table:
        parts = sorted((self.root / "oracle").glob("*.parquet"))
        return pa.concat_tables([pq.read_table(path) for path in parts])


def run(root: Path, settings: DriftlineSettings) -> Simulated:
    report = simulate(settings, root)
    return Simulated(root, settings, report, ImpressionLog.open(root, settings))


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return run(tmp_path_factory.mktemp("market") / "log", make_settings())


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def auc(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> float:
    """Count of won pairs, ties half; slow and obvious."""
    ups, downs = scores[labels], np.sort(scores[~labels])
    won = np.searchsorted(downs, ups, "left") + np.searchsorted(downs, ups, "right")
    return float(won.sum() / (2 * len(ups) * len(downs)))


# --- files ----------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    small: dict[str, Any] = {"num_days": 2, "impressions_per_day": 1_000, "num_products": 50}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(make_settings(seed=seed, **small), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_simulated_log_passes_the_quality_check_without_a_complaint(
    market: Simulated, tmp_path: Path
) -> None:
    now = START + timedelta(days=30)
    verdict = check_log(market.root, tmp_path / "clean", settings=market.settings, now=now)
    assert verdict.impressions.num_clean == market.report.ingest.num_impressions
    assert verdict.catalogue.num_replaced == 0
    assert verdict.num_unknown_products == 0
    assert verdict.counters is not None
    assert verdict.counters.num_quarantined == verdict.counters.num_replaced == 0
    assert verdict.span == market.report.span


KILL_AFTER_A_DAY = """
import json, os, signal, sys
from pathlib import Path
from driftline.features.simulate import simulate
from driftline.platform.settings import parse_settings
settings = parse_settings(json.loads(sys.argv[1]), origin="test")
simulate(settings, Path(sys.argv[2]), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_simulation_leaves_no_log_and_runs_again_to_the_same_end(tmp_path: Path) -> None:
    settings = make_settings(num_days=2, impressions_per_day=500, num_products=30)
    simulate(settings, tmp_path / "whole")
    call = [sys.executable, "-c", KILL_AFTER_A_DAY, settings.model_dump_json()]
    killed = subprocess.run([*call, str(tmp_path / "log")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "log").exists()
    simulate(settings, tmp_path / "log")
    assert contents(tmp_path / "log") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "whole"}


def test_progress_tells_the_days(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = make_settings(num_days=3, impressions_per_day=100, num_products=20)
    simulate(settings, tmp_path / "log", progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_only_declared_columns_are_written(tmp_path: Path) -> None:
    settings = make_settings(features=FEATURES[:1], num_days=1)
    made = run(tmp_path / "log", settings)
    assert made.log.catalogue().column_names == ["product_id", "event_time", "title"]
    assert made.log.counters() is None
    assert not (tmp_path / "log" / "counters").exists()


def test_a_feature_that_the_market_lacks_is_refused_with_what_it_has(tmp_path: Path) -> None:
    price = {"name": "price", "kind": "numeric", "entity": "product", "tier": "short"}
    long = {"name": "sales_999h", "kind": "numeric", "entity": "product", "tier": "short"}
    with pytest.raises(SettingsError) as caught:
        simulate(make_settings(features=[price, long]), tmp_path / "log")
    assert "no price (numeric, product), sales_999h (numeric, product)" in str(caught.value)
    assert "sales_Nh" in str(caught.value)
    assert not (tmp_path / "log").exists()


# --- the oracle -----------------------------------------------------------------------------


def test_clicks_follow_the_stored_probabilities(market: Simulated) -> None:
    truth = np.asarray(market.oracle()["click_probability"])
    clicked = np.asarray(market.log.impressions(columns=["clicked"])["clicked"])
    for low, high in ((0, 0.02), (0.02, 0.05), (0.05, 0.1), (0.1, 1)):
        inside = (truth >= low) & (truth < high)
        error = clicked[inside].mean() - truth[inside].mean()
        assert abs(error) < 4 * math.sqrt(truth[inside].mean() / inside.sum())


def test_oracle_figures_are_those_of_the_stored_rows(market: Simulated) -> None:
    oracle = market.oracle()
    rows = market.log.impressions(columns=["impression_id", "clicked"])
    merged = rows.join(oracle, "impression_id", join_type="inner")
    assert merged.num_rows == rows.num_rows == oracle.num_rows
    clicked = np.asarray(merged["clicked"])
    truth = np.asarray(merged["click_probability"])
    stored = json.loads((market.root / "oracle.json").read_text())
    assert stored["auc"] == pytest.approx(auc(clicked, truth), abs=1e-4)  # bins of 0.0005 logits
    loss = -np.log(np.where(clicked, truth, 1 - truth)).mean()
    assert stored["log_loss"] == pytest.approx(loss)
    assert stored["click_rate"] == pytest.approx(clicked.mean())
    assert stored["seed"] == 3
    assert len(stored["settings_hash"]) == 64
    days = np.asarray(pc.cast(pc.floor_temporal(merged["event_time"], unit="day"), pa.int64()))
    by_day = [auc(clicked[days == day], truth[days == day]) for day in np.unique(days)]
    assert list(stored["auc_by_day"].values()) == pytest.approx(by_day, abs=2e-4)


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.2])
def test_the_click_rate_is_held_each_day(tmp_path: Path, rate: float) -> None:
    made = run(tmp_path / "log", make_settings(click_rate=rate, num_days=3))
    oracle = made.oracle()
    truth = np.asarray(oracle["click_probability"])
    days = np.asarray(pc.cast(oracle["event_time"], pa.int64())) // 86_400_000_000
    for day in np.unique(days):
        assert truth[days == day].mean() == pytest.approx(rate, rel=0.15)


# --- the market -----------------------------------------------------------------------------


def test_no_product_is_shown_before_its_first_version(market: Simulated) -> None:
    known = {
        row["product_id"]: row["event_time"]
        for row in market.log.catalogue().sort_by([("event_time", "descending")]).to_pylist()
    }
    rows = market.log.impressions(columns=["event_time", "page_product_id", "ad_product_id"])
    for row in rows.to_pylist():
        assert known[row["page_product_id"]] <= row["event_time"]
        assert known[row["ad_product_id"]] <= row["event_time"]


def test_new_products_appear_every_day_and_some_texts_are_edited(market: Simulated) -> None:
    versions = market.log.catalogue().to_pandas()
    first = versions.groupby("product_id").event_time.min()
    launches = first[first > START].dt.floor("D").value_counts()
    assert len(launches) == 4
    assert 30 <= launches.min() <= launches.max() <= 90
    edited = versions.groupby("product_id").title.nunique()
    assert 2 <= (edited > 1).sum() <= 60


def test_most_clicks_are_known_within_an_hour_and_some_are_not(market: Simulated) -> None:
    rows = market.log.impressions().filter(pc.field("clicked"))
    wait = pc.subtract(rows["click_time"], rows["event_time"]).cast(pa.int64())
    minutes = np.asarray(wait) / 60e6
    assert (minutes >= 0).all()
    assert 2 < np.median(minutes) < 8
    assert 0.001 < (minutes > 60).mean() < 0.05


def test_counters_become_known_later_and_a_few_are_corrected(market: Simulated) -> None:
    counters = market.log.counters()
    assert counters is not None
    frame = counters.to_pandas()
    late = (frame.created_time - frame.event_time).dt.total_seconds() / 60
    first = frame.assign(late=late).groupby(["product_id", "event_time"]).late.min()
    assert first.min() >= 2
    assert first.max() <= 20
    again = frame.groupby(["product_id", "event_time"]).size()
    assert 0.005 < (again == 2).mean() < 0.02
    assert again.max() == 2


def test_a_day_of_sales_is_the_sum_of_its_hours(market: Simulated) -> None:
    counters = market.log.counters()
    assert counters is not None
    frame = counters.to_pandas().sort_values("created_time")
    final = frame.groupby(["product_id", "event_time"]).last()
    for product in final.index.get_level_values(0).unique()[:20]:
        series = final.loc[product]
        total = series.sales_1h.rolling(24).sum()
        assert np.allclose(total[24:], series.sales_24h[24:])


def test_sales_move_with_the_demand_for_a_product(market: Simulated) -> None:
    """Within a product, hours of high sales are hours of high click probability."""
    counters = market.log.counters()
    assert counters is not None
    sales = counters.to_pandas().sort_values("created_time")
    sales = sales.groupby(["product_id", "event_time"], as_index=False).last()
    rows = market.log.impressions(columns=["impression_id", "event_time", "ad_product_id"])
    shown = rows.join(market.oracle().drop(["event_time"]), "impression_id").to_pandas()
    shown["event_time"] = shown.event_time.dt.floor("h")
    merged = shown.merge(
        sales, left_on=["ad_product_id", "event_time"], right_on=["product_id", "event_time"]
    )
    merged["logit"] = np.log(merged.click_probability / (1 - merged.click_probability))
    merged["sold"] = np.log1p(merged.sales_1h)
    centred = merged[["logit", "sold"]] - merged.groupby("ad_product_id")[
        ["logit", "sold"]
    ].transform("mean")
    assert centred.corr().iloc[0, 1] > 0.2


def test_what_advertisers_are_worth_yesterday_tells_more_than_last_week(tmp_path: Path) -> None:
    """The reason to refresh: campaigns turn, so old estimates mislead and recent ones hold."""
    made = run(
        tmp_path / "log", make_settings(num_days=8, impressions_per_day=24_000, campaign_days=4)
    )
    names = ["impression_id", "event_time", "ad_product_id"]
    rows = made.log.impressions(columns=names)
    shown = rows.join(made.oracle().drop(["event_time"]), "impression_id").to_pandas()
    names = made.log.catalogue().to_pandas().groupby("product_id").advertiser.first()
    shown["advertiser"] = names.loc[shown.ad_product_id].to_numpy()
    shown["day"] = shown.event_time.dt.dayofyear
    shown["logit"] = np.log(shown.click_probability / (1 - shown.click_probability))
    worth = shown.groupby(["advertiser", "day"]).logit.mean().unstack()
    correlation = worth.corr().to_numpy()
    gaps = {gap: np.diagonal(correlation, gap).mean() for gap in (1, 3)}
    assert gaps[1] > 0.5
    assert gaps[3] < gaps[1] - 0.2


def test_the_market_is_the_same_however_many_impressions_are_drawn(tmp_path: Path) -> None:
    few = run(tmp_path / "a", make_settings(impressions_per_day=1_000, num_days=2))
    many = run(tmp_path / "b", make_settings(impressions_per_day=5_000, num_days=2))
    assert few.log.catalogue().equals(many.log.catalogue())
    assert contents(few.root / "counters") == contents(many.root / "counters")


def test_campaigns_end_within_their_lengths_and_the_next_is_drawn_afresh() -> None:
    rng = np.random.default_rng(0)
    campaigns = Campaigns(rng, 300, mean_days=2.0)
    history = [campaigns.worth]
    for _ in range(400):
        campaigns.pass_hour(rng)
        history.append(campaigns.worth)
    worth = np.stack(history)
    changed = worth[1:] != worth[:-1]
    following = np.corrcoef(worth[1:][changed], worth[:-1][changed])[0, 1]
    assert abs(following) < 0.1  # five standard errors of 2,400 pairs
    for column in changed.T:
        lengths = np.diff(np.flatnonzero(column))
        assert lengths.min() >= 32
        assert lengths.max() <= 64
    assert worth.std() == pytest.approx(1, abs=0.1)


def test_products_are_drawn_by_their_weight_in_their_hour() -> None:
    cdf = np.array([[0.2, 0.2, 1.0], [0.0, 0.5, 1.0]])
    hours = np.array([0, 0, 0, 1, 1, 1])
    chances = np.array([0.0, 0.199, 0.2, 0.0, 0.499, 0.999999])
    assert draw(cdf, hours, chances).tolist() == [0, 0, 2, 1, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_products": 1, "new_products_per_day": 0},
        {"num_advertisers": 1, "num_applications": 1, "num_categories": 1},
        {"ads_per_page": 50, "impressions_per_day": 10},
        {"start": "2026-01-01T13:30:00+05:30"},
    ],
)
def test_odd_markets_work(tmp_path: Path, changes: dict[str, Any]) -> None:
    small = {"num_days": 2, "impressions_per_day": 300, "num_products": 10} | changes
    made = run(tmp_path / "log", make_settings(**small))
    assert made.log.num_rows == made.report.ingest.num_impressions > 0
