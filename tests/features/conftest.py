"""A small log written by hand, through the contract's schemas."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.workspace import Workspace

Rows = Sequence[Mapping[str, Any]]

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
"""First hour of every hand-made log; the day ends four hours later."""

FEATURES = [
    {"name": "title", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "about", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "category", "kind": "categorical", "entity": "product", "tier": "medium"},
    {"name": "place", "kind": "categorical", "entity": "impression", "tier": "medium"},
    {"name": "depth", "kind": "numeric", "entity": "impression", "tier": "short"},
    {"name": "sales", "kind": "numeric", "entity": "product", "tier": "short"},
]


def make_settings(workspace: Path, **changes: Any) -> DriftlineSettings:
    raw: dict[str, Any] = {
        "name": "hand-made",
        "workspace": str(workspace),
        "source": {"kind": "mind"},
        "features": FEATURES,
        "counters": {"category": "category", "windows_hours": [1, 3, 24]},
        "labels": {"maturity_minutes": 20},
        "store": {"threads": 1, "memory_limit": "1GB"},
    }
    return parse_settings(raw | changes, origin="test")


def write_clean_log(
    settings: DriftlineSettings,
    *,
    impressions: Rows,
    catalogue: Rows = (),
    counters: Rows | None = None,
    key: pa.DataType | None = None,
) -> None:
    root = Workspace.of(settings).clean
    kind = key or pa.string()
    shown = pa.Table.from_pylist(
        [{"click_time": None, **row} for row in impressions],
        schema=impressions_schema(settings, key=kind),
    ).sort_by([("event_time", "ascending"), ("impression_id", "ascending")])
    (root / "impressions").mkdir(parents=True, exist_ok=True)
    days = pc.strftime(shown.column("event_time"), "%Y-%m-%d")
    for day in pc.unique(days).to_pylist():
        pq.write_table(shown.filter(pc.equal(days, day)), root / "impressions" / f"{day}.parquet")
    tables = {"catalogue": (catalogue, catalogue_schema(settings, key=kind))}
    if counters is not None:
        tables["counters"] = (counters, counters_schema(settings, key=kind))
    for name, (rows, schema) in tables.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        pq.write_table(table, root / name / f"{name}.parquet")


@pytest.fixture(scope="session")
def market_of() -> Callable[..., dict[str, Any]]:
    return random_market


@pytest.fixture(scope="session")
def handmade_settings() -> Callable[..., DriftlineSettings]:
    return make_settings


@pytest.fixture(scope="session")
def clean_log() -> Callable[..., None]:
    return write_clean_log


def random_market(seed: int, *, num_rows: int, integer_keys: bool = False) -> dict[str, Any]:
    """Impressions, catalogue and counters of a few products over nine hours, full of edge cases."""
    random = np.random.default_rng(seed)
    products = [f"p{n}" if not integer_keys else n for n in range(6)]

    def moment(low_minutes: int) -> datetime:
        minute = int(random.integers(low_minutes, 9 * 60 - 1))
        whole = random.random() < 0.4  # many moments fall on the hour or meet another one
        return START + timedelta(minutes=minute // 60 * 60 if whole else minute)

    def product(limit: int) -> Any:
        return products[int(random.integers(0, limit))]

    impressions = []
    for number in range(num_rows):
        time = moment(0)
        clicked = bool(random.random() < 0.4)
        delay = timedelta(minutes=int(random.integers(0, 40)))
        impressions.append(
            {
                "impression_id": f"i{number:03d}",
                "request_id": f"r{number // 3}",
                "event_time": time,
                "page_product_id": product(6),
                "ad_product_id": product(6),
                "place": ["top", "side", None][int(random.integers(0, 3))],
                "depth": None if random.random() < 0.2 else float(random.integers(0, 9)) / 3,
                "clicked": clicked,
                "click_time": time + delay if clicked and random.random() < 0.7 else None,
            }
        )
    words = ["red", "blue", "", None]
    catalogue = [  # the last product is in no catalogue
        {
            "product_id": product(5),
            "event_time": moment(-600),
            "title": words[int(random.integers(0, 4))],
            "about": words[int(random.integers(0, 4))],
            "category": ["toys", "books", None][int(random.integers(0, 3))],
        }
        for _ in range(12)
    ]
    counters = []
    for _ in range(40):
        time = moment(-240)
        late = [timedelta(0), timedelta(minutes=30), timedelta(hours=3)][int(random.integers(0, 3))]
        row = {"product_id": product(6), "event_time": time, "created_time": time + late}
        counters.append(row | {"sales": float(random.integers(0, 99))})
        if random.random() < 0.3:  # a correction
            created = time + late + timedelta(minutes=int(random.integers(1, 200)))
            counters.append(row | {"created_time": created, "sales": float(random.integers(0, 99))})
    return {"impressions": impressions, "catalogue": catalogue, "counters": counters}
