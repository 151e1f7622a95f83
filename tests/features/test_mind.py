import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from driftline.features.log import ImpressionLog
from driftline.features.mind import ingest_mind
from driftline.features.quality import check_log
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.windows import Window

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "mind"
START = datetime(2019, 11, 9, tzinfo=UTC)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FEATURES = (
    ("title", "text", "product"),
    ("abstract", "text", "product"),
    ("category", "categorical", "product"),
    ("hour_of_week", "categorical", "impression"),
    ("hour_of_day", "categorical", "impression"),
    ("history_length", "numeric", "impression"),
    ("num_candidates", "numeric", "impression"),
)


def make_settings(features: Sequence[tuple[str, str, str]] = FEATURES) -> DriftlineSettings:
    return parse_settings(
        {
            "name": "test",
            "workspace": "runs/test",
            "source": {"kind": "mind"},
            "features": [
                {"name": name, "kind": kind, "entity": entity, "tier": "long"}
                for name, kind, entity in features
            ],
        },
        origin="test",
    )


def mind_time(moment: datetime) -> str:
    return f"{moment.month}/{moment.day}/{moment.year} {moment.strftime('%I:%M:%S %p').lstrip('0')}"


def write_mind(folder: Path, *, seed: int = 0, num_lines: int = 60) -> list[dict[str, Any]]:
    """Write the two files; give the rows that a slow reader would find."""
    draw = random.Random(seed)
    items = [f"N{number}" for number in range(30)]
    news = [
        f"{item}\tnews\t\tTitle of {item}\t{'' if index % 2 else 'Some words'}\turl\t[]\t[]"
        for index, item in enumerate(items)
    ]
    lines, expected = [], []
    for number in range(1, num_lines + 1):
        moment = START + timedelta(minutes=37 * number)
        history = draw.choices(items, k=draw.randrange(4))
        shown = [(item, draw.random() < 0.2) for item in draw.sample(items, draw.randrange(1, 13))]
        candidates = " ".join(f"{item}-{int(click)}" for item, click in shown)
        lines.append(f"{number}\tU1\t{mind_time(moment)}\t{' '.join(history)}\t{candidates}")
        if not history:
            continue
        for position, (item, click) in enumerate(shown):
            expected.append(
                {
                    "impression_id": f"{number}-{position}",
                    "event_time": moment,
                    "page_product_id": history[-1],
                    "ad_product_id": item,
                    "hour_of_week": f"{moment.strftime('%a').lower()}-{moment.hour:02d}",
                    "hour_of_day": f"{moment.hour:02d}",
                    "history_length": float(len(history)),
                    "num_candidates": float(len(shown)),
                    "clicked": click,
                    "click_time": None,
                    "request_id": str(number),
                    "position": position,
                    "propensity": None,
                }
            )
    folder.mkdir(exist_ok=True)
    (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n")
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    return expected


def test_every_pair_becomes_the_row_that_a_slow_reader_finds(tmp_path: Path) -> None:
    expected = write_mind(tmp_path / "mind")
    settings = make_settings()
    report = ingest_mind(tmp_path / "mind", tmp_path / "log", settings=settings)
    log = ImpressionLog.open(tmp_path / "log", settings)
    found = log.impressions().to_pylist()
    assert found == sorted(expected, key=lambda row: (row["event_time"], row["impression_id"]))
    assert report.num_impressions == len(expected)
    assert report.num_clicks == sum(row["clicked"] for row in expected)
    assert report.span == log.span


def test_articles_are_dated_to_the_hour_they_are_first_seen_in(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    settings = make_settings()
    ingest_mind(tmp_path / "mind", tmp_path / "log", settings=settings)
    log = ImpressionLog.open(tmp_path / "log", settings)
    first: dict[str, datetime] = {}
    for row in log.impressions().to_pylist():
        for product in (row["page_product_id"], row["ad_product_id"]):
            first[product] = min(first.get(product, row["event_time"]), row["event_time"])
    rows = log.catalogue().to_pylist()
    assert len(rows) == 30
    for row in rows:
        seen = first.get(row["product_id"], log.span.start)
        assert row["event_time"] == seen.replace(minute=0, second=0, microsecond=0)
    assert rows[0]["abstract"] == "Some words"
    assert rows[1]["abstract"] is None


def test_impressions_without_history_are_put_aside_and_counted(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    lines = (tmp_path / "mind" / "behaviors.tsv").read_text().splitlines()
    without = [number for number, line in enumerate(lines, 1) if not line.split("\t")[3]]
    report = ingest_mind(tmp_path / "mind", tmp_path / "log", settings=make_settings())
    assert report.put_aside == {"no page": len(without)}
    aside = pq.read_table(tmp_path / "log" / "quarantine" / "ingest.parquet").to_pylist()
    assert [row["line"] for row in aside] == without
    assert {row["file"] for row in aside} == {"behaviors.tsv"}


BAD_LINES = {
    "wrong number of fields": b"7\tU1\t11/9/2019 9:05:58 AM\tN1",
    "unreadable time": b"7\tU1\t2019-11-09 09:05\tN1\tN2-0",
    "candidate without click label": b"7\tU1\t11/9/2019 9:05:58 AM\tN1\tN2 N3",
    "no impression id": b"\tU1\t11/9/2019 9:05:58 AM\tN1\tN2-0",
    "not UTF-8": b"7\tU1\t11/9/2019 9:05:58 AM\tN\xff\tN2-0",
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_line_that_cannot_be_read_is_put_aside_with_its_number(
    tmp_path: Path, reason: str
) -> None:
    write_mind(tmp_path / "mind")
    path = tmp_path / "mind" / "behaviors.tsv"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:10], BAD_LINES[reason], *lines[10:]]))
    good = ingest_mind(tmp_path / "mind", tmp_path / "log", settings=make_settings())
    assert good.put_aside[reason] == 1
    aside = pq.read_table(tmp_path / "log" / "quarantine" / "ingest.parquet").to_pylist()
    assert [row["line"] for row in aside if row["reason"] == reason] == [11]


def test_of_an_article_listed_twice_the_first_line_counts(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    with (tmp_path / "mind" / "news.tsv").open("a") as stream:
        stream.write("N3\tnews\t\tAnother title\t\turl\t[]\t[]\n")
    settings = make_settings()
    report = ingest_mind(tmp_path / "mind", tmp_path / "log", settings=settings)
    assert report.put_aside["product listed twice"] == 1
    catalogue = ImpressionLog.open(tmp_path / "log", settings).catalogue().to_pylist()
    assert [row["title"] for row in catalogue if row["product_id"] == "N3"] == ["Title of N3"]


def test_only_declared_columns_are_written(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    settings = make_settings([("title", "text", "product")])
    ingest_mind(tmp_path / "mind", tmp_path / "log", settings=settings)
    log = ImpressionLog.open(tmp_path / "log", settings)
    assert log.catalogue().column_names == ["product_id", "event_time", "title"]
    assert "hour_of_week" not in pq.read_schema(log.impression_files()[0]).names


def test_a_feature_that_mind_does_not_have_is_refused_with_what_it_has(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    settings = make_settings(
        [("price", "numeric", "product"), ("hour_of_day", "numeric", "impression")]
    )
    with pytest.raises(SettingsError) as caught:
        ingest_mind(tmp_path / "mind", tmp_path / "log", settings=settings)
    assert "price (numeric, product), hour_of_day (numeric, impression)" in str(caught.value)
    assert "history_length (numeric)" in str(caught.value)
    assert not (tmp_path / "log").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"behaviors\.tsv does not exist"):
        ingest_mind(tmp_path, tmp_path / "log", settings=make_settings())


def test_a_file_of_another_kind_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    (tmp_path / "mind" / "behaviors.tsv").write_text("id,time\n1,2\n")
    with pytest.raises(ContractError, match=r"no impression could be used; line 1 .*tab-separated"):
        ingest_mind(tmp_path / "mind", tmp_path / "log", settings=make_settings())
    assert [path.name for path in tmp_path.iterdir()] == ["mind"]


def test_ingesting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind")
    contents = []
    for _ in range(2):
        ingest_mind(tmp_path / "mind", tmp_path / "log", settings=make_settings())
        files = sorted(path for path in (tmp_path / "log").rglob("*") if path.is_file())
        contents.append([(path.name, path.read_bytes()) for path in files])
    assert contents[0] == contents[1]


@pytest.mark.skipif(not SAMPLE.exists(), reason="the MIND sample is not beside this checkout")
def test_the_sample_has_its_documented_counts(tmp_path: Path) -> None:
    settings = make_settings()
    lines = (SAMPLE / "behaviors.tsv").read_text().splitlines()
    pairs = [(line.split("\t")[3] != "", line.split("\t")[4].split()) for line in lines]
    assert len(lines) == 6_936
    assert sum(len(shown) for _, shown in pairs) == 262_619
    assert sum(item.endswith("-1") for _, shown in pairs for item in shown) == 10_403
    report = ingest_mind(SAMPLE, tmp_path / "log", settings=settings)
    assert report.put_aside == {"no page": sum(not with_page for with_page, _ in pairs)}
    assert report.num_impressions == sum(len(shown) for with_page, shown in pairs if with_page)
    assert report.num_clicks == sum(
        item.endswith("-1") for with_page, shown in pairs if with_page for item in shown
    )
    assert report.num_products == 23_042
    assert report.span == Window(START, START + timedelta(days=6))
    verdict = check_log(tmp_path / "log", tmp_path / "clean", settings=settings, now=NOW)
    assert verdict.impressions.num_quarantined == 0
    assert verdict.num_unknown_products == 0
    assert verdict.put_aside_at_ingest == {"no page": 136}
