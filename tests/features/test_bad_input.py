"""Malformed logs: each is refused with a message that names the thing, and leaves nothing behind.

Rows that go to quarantine one by one are in ``test_quality.py`` and ``test_mind.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftline.features.mind import ingest_mind
from driftline.features.parquet_log import ingest_parquet
from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.platform.errors import ContractError, DriftlineError, SettingsError
from driftline.platform.settings import DriftlineSettings, ParquetSource, parse_settings

NOW = datetime(2026, 2, 1, tzinfo=UTC)
TIMES = pa.array([1_767_225_600_000_000 + 60_000_000 * n for n in range(4)]).cast(
    pa.timestamp("us", tz="UTC")
)
BEHAVIOR = "1\tU1\t11/9/2019 9:05:58 AM\tN1\tN2-0 N3-1\n"
NEWS = "N1\tnews\t\tA title\t\turl\t[]\t[]\n"


def make_settings(*features: tuple[str, str, str], kind: str = "parquet") -> DriftlineSettings:
    sources: dict[str, dict[str, Any]] = {
        "parquet": {"kind": "parquet", "impressions": "x"},
        "mind": {"kind": "mind"},
        "simulate": {"kind": "simulate", "start": "2026-01-01T00:00:00Z", "num_days": 1},
    }
    chosen = features or (("title", "text", "product"), ("device", "categorical", "impression"))
    return parse_settings(
        {
            "name": "test",
            "workspace": "runs/test",
            "source": sources[kind],
            "features": [
                {"name": name, "kind": kind, "entity": entity, "tier": "long"}
                for name, kind, entity in chosen
            ],
        },
        origin="test",
    )


def table(**changes: Any) -> pa.Table:
    """Four good impressions with some columns changed; ``None`` leaves a column out."""
    columns: dict[str, Any] = {
        "impression_id": ["a", "b", "c", "d"],
        "event_time": TIMES,
        "page_product_id": [1, 1, 2, 2],
        "ad_product_id": [3, 4, 3, 4],
        "device": ["phone", "desk", "phone", "desk"],
        "clicked": [False, True, False, False],
    } | changes
    return pa.table({name: column for name, column in columns.items() if column is not None})


def catalogue(**changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "product_id": [1, 2],
        "event_time": TIMES[:2],
        "title": ["x", "y"],
    } | changes
    return pa.table({name: column for name, column in columns.items() if column is not None})


SETTINGS = make_settings()

Prepare = Callable[[Path], Any]


def impressions_only(rows: pa.Table) -> Prepare:
    return lambda root: put(root / "impressions" / "a.parquet", rows)


def with_catalogue(rows: pa.Table) -> Prepare:
    def prepare(root: Path) -> None:
        put(root / "impressions" / "a.parquet", table())
        put(root / "catalogue" / "a.parquet", rows)

    return prepare


def put(path: Path, rows: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path)


def put_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cut_short(root: Path) -> None:
    put(root / "impressions" / "a.parquet", table())
    path = root / "impressions" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def spoilt_page(root: Path) -> None:
    """A file whose footer is whole but whose data are not."""
    path = root / "impressions" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table(), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(bytes(content))


def twice_named(root: Path) -> None:
    rows = table()
    put(root / "impressions" / "a.parquet", rows.append_column("clicked", rows["clicked"]))


def second_file_differs(root: Path) -> None:
    put(root / "impressions" / "a.parquet", table())
    put(root / "impressions" / "b.parquet", table(device=None))


def mind_files(behaviors: str | None, news: str | None) -> Prepare:
    def prepare(root: Path) -> None:
        root.mkdir()
        if behaviors is not None:
            (root / "behaviors.tsv").write_text(behaviors)
        if news is not None:
            (root / "news.tsv").write_text(news)

    return prepare


Step = Callable[[Path, Path, DriftlineSettings], Any]


def check(raw: Path, out: Path, settings: DriftlineSettings) -> None:
    check_log(raw, out, settings=settings, now=NOW)


def read_mind(raw: Path, out: Path, settings: DriftlineSettings) -> None:
    ingest_mind(raw, out, settings=settings)


def read_parquet(**changes: Any) -> Step:
    def step(raw: Path, out: Path, settings: DriftlineSettings) -> None:
        extra = {name: value for name, value in changes.items() if name != "impressions"}
        path = raw / changes.get("impressions", "impressions")
        source = ParquetSource(kind="parquet", impressions=path, **extra)
        ingest_parquet(source, out, settings=settings)

    return step


def make_market(raw: Path, out: Path, settings: DriftlineSettings) -> None:
    simulate(settings, out)


@dataclass(frozen=True)
class Case:
    step: Step
    prepare: Prepare
    says: tuple[str, ...]
    error: type[DriftlineError] = ContractError
    settings: DriftlineSettings = SETTINGS


CASES = {
    # --- whole files
    "no folder": Case(check, lambda root: None, ("raw is not a folder", "driftline ingest")),
    "no impressions": Case(
        check, lambda root: root.mkdir(), ("no Parquet file at", "impressions", "*.parquet")
    ),
    "a text file": Case(
        check,
        lambda root: put_bytes(root / "impressions" / "a.parquet", b"id,time\n1,2\n"),
        ("a.parquet is not a complete Parquet file",),
    ),
    "an empty file": Case(
        check,
        lambda root: put_bytes(root / "impressions" / "a.parquet", b""),
        ("a.parquet is not a complete Parquet file",),
    ),
    "a file cut short": Case(check, cut_short, ("a.parquet is not a complete Parquet file",)),
    "a spoilt page": Case(check, spoilt_page, ("a.parquet: damaged after row 0", "write")),
    "no rows": Case(
        check, impressions_only(table().slice(0, 0)), ("none of 0 impressions", "no rows")
    ),
    "all rows bad": Case(
        check,
        impressions_only(table(clicked=pa.nulls(4, pa.bool_()))),
        ("none of 4 impressions is usable", "4 clicked is missing", "a.parquet row 0"),
    ),
    "too many duplicates": Case(
        check,
        impressions_only(table(impression_id=["a", "a", "b", "c"])),
        ("1 of 4 impressions (25.0%)", "max_quarantine_share", "1 duplicate impression_id"),
    ),
    # --- columns
    "a missing column": Case(
        check,
        impressions_only(table(clicked=None)),
        ("a.parquet", "'clicked' is missing", "booleans, 0/1, or true/false"),
    ),
    "a missing declared feature": Case(
        check, impressions_only(table(device=None)), ("'device' is missing", "text")
    ),
    "an undeclared column": Case(
        check, impressions_only(table(colour=["red"] * 4)), ("'colour' not declared", "features:")
    ),
    "several mistakes at once": Case(
        check,
        impressions_only(table(clicked=None, colour=["r"] * 4, event_time=[1.5] * 4)),
        ("'clicked' is missing", "'colour' not declared", "'event_time' has type double"),
    ),
    "a column twice": Case(check, twice_named, ("'clicked' occurs 2 times",)),
    "another schema in the second file": Case(
        check, second_file_differs, ("b.parquet", "'device' is missing")
    ),
    "float keys": Case(
        check,
        impressions_only(table(ad_product_id=[1.0, 2.0, 3.0, 4.0])),
        ("'ad_product_id'", "type double", "expected integers or text"),
    ),
    "keys of two types": Case(
        check,
        impressions_only(table(ad_product_id=["1", "2", "3", "4"])),
        ("one type in all tables", "'page_product_id'", "'ad_product_id'"),
    ),
    "catalogue keys of another type": Case(
        check,
        with_catalogue(catalogue(product_id=["1", "2"])),
        ("one type in all tables", "catalogue column 'product_id'"),
    ),
    "text as numbers": Case(
        check,
        with_catalogue(catalogue(title=[1.5, 2.5])),
        ("catalogue", "'title' has type double, expected text"),
    ),
    "nested text": Case(
        check, with_catalogue(catalogue(title=[["x"], ["y"]])), ("'title' has type list",)
    ),
    "a catalogue without times": Case(
        check, with_catalogue(catalogue(event_time=None)), ("'event_time' is missing",)
    ),
    "numbers without counters": Case(
        check,
        impressions_only(table(device=None)),
        ("no counters/", "price", "declare them no longer"),
        settings=make_settings(("price", "numeric", "product")),
    ),
    # --- values
    "labels beyond 0 and 1": Case(
        check,
        impressions_only(table(clicked=[0, 1, 2, 0])),
        ("column 'clicked', row 2: got 2, expected booleans",),
    ),
    "labels in words": Case(
        check,
        impressions_only(table(clicked=["yes", "no", "no", "no"])),
        ("column 'clicked', row 0: got 'yes'",),
    ),
    "times in words": Case(
        check,
        impressions_only(table(event_time=["2026-01-01", "2026-01-01", "noon", "2026-01-01"])),
        ("column 'event_time', row 2: got 'noon', expected a timestamp, ISO 8601",),
    ),
    "keys beyond 64 bits": Case(
        check,
        impressions_only(table(ad_product_id=pa.array([1, 2, 3, 2**63], pa.uint64()))),
        ("column 'ad_product_id', row 3: got 9223372036854775808",),
    ),
    "positions with fractions": Case(
        check,
        impressions_only(table(position=[0.0, 1.5, 2.0, 3.0])),
        ("column 'position', row 1: got 1.5, expected whole numbers",),
    ),
    "a time that the clocks skip": Case(
        read_parquet(time_zone="Europe/Berlin"),
        impressions_only(table(event_time=["2026-03-29T02:30:00"] * 4)),
        ("column 'event_time', row 0: got '2026-03-29T02:30:00'",),
    ),
    # --- Parquet source
    "no such path": Case(
        read_parquet(impressions="elsewhere"), lambda root: root.mkdir(), ("no Parquet file at",)
    ),
    "no such pattern": Case(
        read_parquet(impressions="*.pq"), lambda root: root.mkdir(), ("no Parquet file at", "*.pq")
    ),
    "an unknown zone": Case(
        read_parquet(time_zone="Mars/Olympus"),
        impressions_only(table()),
        ("time_zone 'Mars/Olympus' is not known", "Europe/Berlin"),
    ),
    "a mapping to a missing column": Case(
        read_parquet(columns={"clicked": "label"}),
        impressions_only(table()),
        ("column 'label' is missing",),
    ),
    "a mapping of an unknown column": Case(
        read_parquet(columns={"label": "clicked"}),
        impressions_only(table()),
        ("'label' is no column of the contract", "impression_id"),
        error=SettingsError,
    ),
    "no time at all": Case(
        read_parquet(),
        impressions_only(table(event_time=pa.nulls(4))),
        ("not one of 4 rows has an event_time",),
    ),
    # --- MIND
    "MIND without behaviors": Case(
        read_mind,
        mind_files(None, NEWS),
        ("behaviors.tsv does not exist",),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND without news": Case(
        read_mind,
        mind_files(BEHAVIOR, None),
        ("news.tsv does not exist",),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND with commas": Case(
        read_mind,
        mind_files(BEHAVIOR.replace("\t", ","), NEWS),
        ("no impression could be used", "line 1 of behaviors.tsv", "tab-separated"),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND without labels": Case(
        read_mind,
        mind_files(BEHAVIOR.replace("-0", "").replace("-1", ""), NEWS),
        ("candidate without click label", "N123-0 N456-1"),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND with empty files": Case(
        read_mind,
        mind_files("", ""),
        ("the file holds no lines",),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND with unreadable news": Case(
        read_mind,
        mind_files(BEHAVIOR, "N1\tonly\n"),
        ("no product could be read", "line 1 of news.tsv", "title entities"),
        settings=make_settings(("title", "text", "product"), kind="mind"),
    ),
    "MIND has no prices": Case(
        read_mind,
        mind_files(BEHAVIOR, NEWS),
        ("MIND has no price", "title, abstract, category, subcategory"),
        error=SettingsError,
        settings=make_settings(("price", "numeric", "product"), kind="mind"),
    ),
    # --- simulation
    "the market has no prices": Case(
        make_market,
        lambda root: None,
        ("market has no price (numeric, product)", "sales_Nh"),
        error=SettingsError,
        settings=make_settings(("price", "numeric", "product"), kind="simulate"),
    ),
    "a source that is no market": Case(
        make_market,
        lambda root: None,
        ("source.kind must be 'simulate'", "'parquet'"),
        error=SettingsError,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_by_name_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    raw, out = tmp_path / "raw", tmp_path / "out"
    case.prepare(raw)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(case.error) as caught:
        case.step(raw, out, case.settings)
    for part in case.says:
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["too many duplicates", "labels in words"])
def test_a_refusal_leaves_the_last_good_artefact_alone(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    put(tmp_path / "good" / "impressions" / "a.parquet", table())
    case.step(tmp_path / "good", tmp_path / "out", case.settings)
    verdict = (tmp_path / "out" / "verdict.json").read_bytes()
    case.prepare(tmp_path / "raw")
    with pytest.raises(case.error):
        case.step(tmp_path / "raw", tmp_path / "out", case.settings)
    assert (tmp_path / "out" / "verdict.json").read_bytes() == verdict
