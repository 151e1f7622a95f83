"""The same steps on logs of another shape: no text, other keys and names, untied arms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from driftline.features.frame_files import read_frames
from driftline.features.log import ImpressionLog
from driftline.features.parquet_log import ingest_parquet
from driftline.features.quality import check_log
from driftline.features.scales import estimate_scales, resolve_tiers, write_scales
from driftline.features.simulate import simulate
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.refresh_arms import refresh_arms
from driftline.pipelines.refresh_head import refresh_head
from driftline.pipelines.replay import log_split
from driftline.pipelines.teacher import train_teacher
from driftline.platform.bundle import ARMS, Bundle
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings, ParquetSource
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace

MakeSettings = Callable[..., DriftlineSettings]


def loop(settings: DriftlineSettings) -> Bundle:
    """Features, teacher, arms, one head refresh; gives the last bundle, which must answer."""
    prepare_features(settings)
    train_teacher(settings)
    start = log_split(settings).id.start
    refresh_arms(settings, as_of=start)
    record = refresh_head(settings, as_of=start + HOUR)
    bundle = Bundle.open(Workspace.of(settings).bundles / record.bundle)
    frame = read_frames(settings, Window(start + HOUR, start + 2 * HOUR))
    scores = Scorer.of(bundle).score(frame)
    assert len(scores) == frame.num_rows > 0
    assert np.isfinite(scores).all()
    return bundle


def simulated(settings: DriftlineSettings) -> DriftlineSettings:
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    span = ImpressionLog.open(workspace.log, settings).span
    check_log(workspace.log, workspace.clean, settings=settings, now=span.end)
    return settings


def test_a_market_without_text_has_a_head_and_no_arms(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    features = [
        {"name": "category", "kind": "categorical", "entity": "product", "tier": "medium"},
        {"name": "application", "kind": "categorical", "entity": "impression", "tier": "medium"},
    ]
    bundle = loop(simulated(make_settings(tmp_path / "market", features=features)))
    assert not (bundle.path / ARMS).exists()
    assert bundle.vectors.page.shape == (0, 0)


def test_untied_arms_have_two_backbones(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "market")
    student = settings.student.model_copy(update={"tie_arms": False})
    bundle = loop(simulated(settings.model_copy(update={"student": student})))
    assert bundle.student["tie_arms"] is False
    assert (bundle.vectors.page != bundle.vectors.ad).any()


@pytest.mark.parametrize("key", ["integer", "string"])
def test_a_log_of_ones_own_with_other_names_and_measured_tiers(
    make_settings: MakeSettings, tmp_path: Path, key: str
) -> None:
    settings = _own_log(make_settings, tmp_path, as_text=key == "string")
    workspace = Workspace.of(settings)
    assert isinstance(settings.source, ParquetSource)
    ingest_parquet(settings.source, workspace.log, settings=settings)
    span = ImpressionLog.open(workspace.log, settings).span
    check_log(workspace.log, workspace.clean, settings=settings, now=span.end)
    log = ImpressionLog.open(workspace.clean, settings)
    assert str(log.key_type) == {"integer": "int64", "string": "string"}[key]
    write_scales(estimate_scales(log, settings), workspace.scales)
    bundle = loop(resolve_tiers(settings, workspace.scales))
    names = {column["name"] for column in bundle.contract["columns"]}
    assert {"shop", "page__shelf", "ad__shelf"} <= names


def _own_log(make_settings: MakeSettings, tmp_path: Path, *, as_text: bool) -> DriftlineSettings:
    """One day of somebody's log: other names, no counters of theirs, no title."""
    made = simulated(make_settings(tmp_path / "source", num_days=1))
    log = ImpressionLog.open(Workspace.of(made).clean, made)
    kind = pa.string() if as_text else pa.int64()
    shown = log.impressions()
    rows = {
        "id": shown["impression_id"],
        "at": shown["event_time"].cast(pa.timestamp("ms"), safe=False),
        "page_sku": shown["page_product_id"].cast(kind),
        "sku": shown["ad_product_id"].cast(kind),
        "shop": shown["application"],
        "click": shown["clicked"].cast(pa.int8()),
    }
    goods = log.catalogue()
    products: dict[str, Any] = {
        "sku": goods["product_id"].cast(kind),
        "since": goods["event_time"].cast(pa.timestamp("ms"), safe=False),
        "about": pc.if_else(pc.equal(goods["title"], ""), None, goods["description"]),
        "shelf": goods["category"],
    }
    pq.write_table(pa.table(rows), tmp_path / "impressions.parquet")
    pq.write_table(pa.table(products), tmp_path / "catalogue.parquet")
    source = {
        "kind": "parquet",
        "impressions": str(tmp_path / "impressions.parquet"),
        "catalogue": str(tmp_path / "catalogue.parquet"),
        "columns": {
            "impression_id": "id",
            "impressions.event_time": "at",
            "catalogue.event_time": "since",
            "page_product_id": "page_sku",
            "ad_product_id": "sku",
            "product_id": "sku",
            "clicked": "click",
        },
    }
    features = [
        {"name": "about", "kind": "text", "entity": "product", "tier": "auto"},
        {"name": "shelf", "kind": "categorical", "entity": "product", "tier": "auto"},
        {"name": "shop", "kind": "categorical", "entity": "impression", "tier": "auto"},
    ]
    return make_settings(
        tmp_path / "market",
        source=source,
        features=features,
        counters={"category": "shelf", "windows_hours": [1, 24]},
        teacher={"columns": ["ad__shelf"]},
    )
