from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from driftline.features.log import ImpressionLog
from driftline.features.scales import (
    ScalesReport,
    estimate_scales,
    read_scales,
    resolve_tiers,
    suggest_tier,
    write_scales,
)
from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings, parse_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
FEATURES = (
    ("title", "text", "product"),
    ("brand", "categorical", "product"),
    ("sales", "numeric", "product"),
    ("device", "categorical", "impression"),
)


def make_settings(tier: str = "auto") -> DriftlineSettings:
    return parse_settings(
        {
            "name": "test",
            "workspace": "runs/test",
            "source": {"kind": "parquet", "impressions": "x"},
            "features": [
                {"name": name, "kind": kind, "entity": entity, "tier": tier}
                for name, kind, entity in FEATURES
            ],
        },
        origin="test",
    )


SETTINGS = make_settings()
Rows = Sequence[tuple[float, int, str | None]]
"""(hours after the start, product, value)."""


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def make_log(
    root: Path,
    *,
    end_hours: int = 10,
    titles: Rows = (),
    devices: Rows = (),
    sales: Sequence[tuple[float, float, int, float | None]] = (),
) -> ImpressionLog:
    """A log that ends after ``end_hours``; counters are (hours, known, product, value)."""
    key = pa.int64()
    shown: list[tuple[float, int, str | None]] = [
        *devices,
        (end_hours - 0.5, 999, None),
        (0, 999, None),
    ]
    impressions = [
        {
            "impression_id": f"{number:04d}",
            "event_time": at(hours),
            "page_product_id": 0,
            "ad_product_id": product,
            "clicked": False,
            "device": value,
        }
        for number, (hours, product, value) in enumerate(shown)
    ]
    versions = [
        {"product_id": product, "event_time": at(hours), "title": value}
        for hours, product, value in titles
    ]
    counts = [
        {"product_id": k, "event_time": at(hours), "created_time": at(known), "sales": value}
        for hours, known, k, value in sales
    ]
    tables: list[tuple[str, pa.Schema, list[dict[str, Any]]]] = [
        ("impressions", impressions_schema(SETTINGS, key=key), impressions),
        ("catalogue", catalogue_schema(SETTINGS, key=key), versions),
        ("counters", counters_schema(SETTINGS, key=key), counts),
    ]
    for name, schema, rows in tables:
        if rows:
            (root / name).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / name / "a.parquet")
    return ImpressionLog.open(root, SETTINGS)


FIXTURE: Rows = (
    *((hours, 1, f"a{hours}") for hours in (0, 1, 3)),
    *((hours, 2, f"b{hours}") for hours in (0, 4)),
    (2, 3, "c"),
)


def test_fixture_t1_gives_the_published_scale(tmp_path: Path) -> None:
    scale = estimate_scales(make_log(tmp_path, titles=FIXTURE), SETTINGS)["title"]
    assert scale.hours == pytest.approx(2.75)  # mean of 1.5 and 4, not 2.333 over all gaps
    assert (scale.num_products, scale.num_censored, scale.num_changes) == (3, 1, 3)


def test_the_censoring_aware_figure_divides_all_observed_time_by_all_changes(
    tmp_path: Path,
) -> None:
    scale = estimate_scales(make_log(tmp_path, titles=FIXTURE), SETTINGS)["title"]
    assert scale.censored_hours == pytest.approx((10 + 10 + 8) / 3)


def test_a_version_that_repeats_the_value_is_no_change(tmp_path: Path) -> None:
    rows = [(0, 1, "a"), (2, 1, "a"), (5, 1, "b"), (6, 1, "a")]
    scale = estimate_scales(make_log(tmp_path, titles=rows), SETTINGS)["title"]
    assert scale.hours == pytest.approx(6 / 2)
    assert scale.num_changes == 2


def test_text_that_never_changes_is_long(tmp_path: Path) -> None:
    log = make_log(tmp_path, titles=[(0, 1, "a"), (0, 2, "b")])
    scale = estimate_scales(log, SETTINGS)["title"]
    assert scale.hours is None
    assert scale.censored_hours is None
    assert scale.num_censored == 2
    assert scale.tier == "long"


def test_of_corrected_counters_the_last_known_value_counts(tmp_path: Path) -> None:
    rows = [(0, 0.1, 1, 5.0), (1, 3.0, 1, 7.0), (1, 1.1, 1, 5.0), (2, 2.1, 1, 7.0)]
    scale = estimate_scales(make_log(tmp_path, sales=rows), SETTINGS)["sales"]
    assert scale.num_changes == 1
    assert scale.hours == pytest.approx(1.0)
    assert scale.tier == "short"


def test_a_feature_without_a_value_gets_the_published_tier_of_its_kind(tmp_path: Path) -> None:
    report = estimate_scales(make_log(tmp_path, titles=[(0, 1, "a")]), SETTINGS)
    assert report["brand"].num_products == report["sales"].num_products == 0
    assert report["brand"].tier == "medium"
    assert report["sales"].tier == "short"


@hypothesis_settings(max_examples=20)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 30).map(lambda n: n / 4),
            st.integers(1, 4),
            st.sampled_from([None, "x", "y", "z"]),
        ),
        max_size=40,
    )
)
def test_scales_of_impression_columns_equal_a_slow_count(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int, str | None]]
) -> None:
    by_product: dict[int, list[tuple[float, str]]] = {}
    for hours, product, value in sorted(rows, key=lambda row: row[0]):
        if value is not None:
            by_product.setdefault(product, []).append((hours, value))
    gaps, observed, changes = [], 0.0, 0
    for series in by_product.values():
        times = [series[0][0]]
        for (_, before), (hours, value) in pairwise(series):
            if value != before:
                times.append(hours)
        observed += series[-1][0] - series[0][0]
        changes += len(times) - 1
        if len(times) > 1:
            gaps.append((times[-1] - times[0]) / (len(times) - 1))
    log = make_log(tmp_path_factory.mktemp("log"), devices=rows)
    scale = estimate_scales(log, SETTINGS)["device"]
    assert scale.num_products == len(by_product)
    assert scale.num_changes == changes
    assert scale.num_censored == len(by_product) - len(gaps)
    if gaps:
        assert scale.hours == pytest.approx(sum(gaps) / len(gaps))
        assert scale.censored_hours == pytest.approx(observed / changes)
    else:
        assert scale.hours is None


@pytest.mark.parametrize(
    ("hours", "tier"),
    [
        (0.01, "short"),
        (12.9, "short"),
        (13, "medium"),
        (347, "medium"),
        (348, "long"),
        (1e9, "long"),
    ],
)
def test_the_tier_is_the_nearest_on_a_log_scale(hours: float, tier: str) -> None:
    assert suggest_tier(hours) == tier


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = estimate_scales(make_log(tmp_path / "log", titles=FIXTURE), SETTINGS)
    write_scales(report, tmp_path / "scales.json")
    assert read_scales(tmp_path / "scales.json") == report
    assert not any(path.name.startswith(".spill") for path in tmp_path.iterdir())


def test_auto_tiers_are_replaced_by_measured_ones(tmp_path: Path) -> None:
    report = estimate_scales(make_log(tmp_path / "log", titles=FIXTURE), SETTINGS)
    write_scales(report, tmp_path / "scales.json")
    resolved = resolve_tiers(SETTINGS, tmp_path / "scales.json")
    assert {f.name: f.tier for f in resolved.features} == {
        scale.name: scale.tier for scale in report.features
    }
    assert resolve_tiers(resolved, tmp_path / "scales.json") == resolved


def test_declared_tiers_stay_and_need_no_report(tmp_path: Path) -> None:
    declared = make_settings("medium")
    assert resolve_tiers(declared, tmp_path / "scales.json") == declared


def test_auto_tiers_without_a_report_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match=r"title, brand.*driftline scales"):
        resolve_tiers(SETTINGS, tmp_path / "scales.json")
    with pytest.raises(MissingArtefactError, match="driftline scales"):
        read_scales(tmp_path / "scales.json")


def test_a_report_that_lacks_a_feature_asks_for_another(tmp_path: Path) -> None:
    report = estimate_scales(make_log(tmp_path / "log"), SETTINGS)
    older = ScalesReport(span=report.span, features=report.features[:2])
    write_scales(older, tmp_path / "scales.json")
    with pytest.raises(MissingArtefactError, match=r"nothing about sales, device"):
        resolve_tiers(SETTINGS, tmp_path / "scales.json")
