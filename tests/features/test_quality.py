import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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

from driftline.features.log import ImpressionLog, nullable
from driftline.features.quality import Verdict, check_log
from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.errors import ContractError
from driftline.platform.settings import DriftlineSettings, parse_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=3)


def make_settings(**changes: Any) -> DriftlineSettings:
    raw: dict[str, Any] = {
        "name": "test",
        "workspace": "runs/test",
        "source": {"kind": "parquet", "impressions": "x"},
        "quality": {"max_quarantine_share": 0.99},
        "features": [
            {"name": "title", "kind": "text", "entity": "product", "tier": "long"},
            {"name": "device", "kind": "categorical", "entity": "impression", "tier": "medium"},
            {"name": "depth", "kind": "numeric", "entity": "impression", "tier": "medium"},
        ],
    }
    return parse_settings(raw | changes, origin="test")


SETTINGS = make_settings()
WITH_SALES = make_settings(
    features=[{"name": "sales", "kind": "numeric", "entity": "product", "tier": "short"}]
)


def impression(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "impression_id": f"i{number}",
        "event_time": START + timedelta(minutes=7 * number),
        "page_product_id": 1,
        "ad_product_id": 2,
        "device": "phone",
        "depth": 1.0,
        "clicked": False,
        "click_time": None,
        "request_id": None,
        "position": 0,
        "propensity": 0.5,
    } | changes


def write_table(root: Path, table: str, name: str, rows: pa.Table) -> None:
    (root / table).mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, root / table / f"{name}.parquet")


def write_impressions(
    root: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str = "a",
    settings: DriftlineSettings = SETTINGS,
    key: pa.DataType | None = None,
) -> None:
    schema = nullable(impressions_schema(settings, key=key or pa.int64()))
    write_table(root, "impressions", name, pa.Table.from_pylist(list(rows), schema=schema))


def write_catalogue(root: Path, rows: Sequence[tuple[int | None, datetime, str | None]]) -> None:
    schema = nullable(catalogue_schema(SETTINGS, key=pa.int64()))
    listed = [dict(zip(schema.names, row, strict=True)) for row in rows]
    write_table(root, "catalogue", "a", pa.Table.from_pylist(listed, schema=schema))


def check(root: Path, *, settings: DriftlineSettings = SETTINGS) -> Verdict:
    return check_log(root / "raw", root / "clean", settings=settings, now=NOW)


def quarantine(root: Path, table: str = "impressions") -> list[dict[str, Any]]:
    path = root / "clean" / "quarantine" / f"{table}.parquet"
    return list(pq.read_table(path).to_pylist()) if path.exists() else []


# --- rows ---------------------------------------------------------------------------------

FAULTS: dict[str, dict[str, Any]] = {
    "impression_id is missing": {"impression_id": None},
    "impression_id is empty": {"impression_id": ""},
    "event_time is missing": {"event_time": None},
    "page_product_id is missing": {"page_product_id": None},
    "ad_product_id is missing": {"ad_product_id": None},
    "clicked is missing": {"clicked": None},
    "depth is not finite": {"depth": math.nan},
    "event_time in the future": {"event_time": NOW + timedelta(minutes=6)},
    "click_time before event_time": {"clicked": True, "click_time": START},
    "click_time in the future": {"clicked": True, "click_time": NOW + timedelta(hours=1)},
    "click_time without a click": {"click_time": START + timedelta(hours=2)},
    "propensity outside (0, 1]": {"propensity": 0.0},
    "propensity is not finite": {"propensity": math.inf, "clicked": True},
    "position is negative": {"position": -1},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_row_that_may_not_enter_is_put_aside_with_its_reason(tmp_path: Path, reason: str) -> None:
    rows = [impression(n) for n in range(1, 6)]
    rows[2] |= FAULTS[reason]
    write_impressions(tmp_path / "raw", rows)
    verdict = check(tmp_path)
    [aside] = quarantine(tmp_path)
    assert reason in aside["reasons"]
    assert (aside["file"], aside["row"]) == ("a.parquet", 2)
    assert verdict.impressions.num_clean == 4
    assert verdict.impressions.num_quarantined == 1
    assert verdict.impressions.examples[reason] == "a.parquet row 2"
    kept = ImpressionLog.open(tmp_path / "clean", SETTINGS).impressions()
    assert kept.column("impression_id").to_pylist() == ["i1", "i2", "i4", "i5"]


def test_a_row_may_have_several_faults_and_is_counted_once(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1), impression(2, position=-1, depth=math.inf)])
    verdict = check(tmp_path)
    assert verdict.impressions.num_quarantined == 1
    assert set(quarantine(tmp_path)[0]["reasons"]) == {
        "depth is not finite",
        "position is negative",
    }


def test_what_is_optional_may_be_null(tmp_path: Path) -> None:
    empty = dict.fromkeys(("device", "depth", "click_time", "request_id", "position", "propensity"))
    write_impressions(tmp_path / "raw", [impression(1, **empty), impression(2, clicked=True)])
    assert check(tmp_path).impressions.num_quarantined == 0


def test_a_row_within_the_tolerated_future_stays(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1, event_time=NOW + timedelta(minutes=5))])
    assert check(tmp_path).impressions.num_clean == 1


def test_of_rows_with_one_id_the_first_stays_whatever_file_or_day(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1), impression(500, depth=2.0)], name="a")
    write_impressions(
        tmp_path / "raw",
        [impression(2), impression(3, impression_id="i500"), impression(4, impression_id="i1")],
        name="b",
    )
    verdict = check(tmp_path)
    assert verdict.impressions.reasons == {"duplicate impression_id": 2}
    assert [(row["file"], row["row"]) for row in quarantine(tmp_path)] == [
        ("b.parquet", 1),
        ("b.parquet", 2),
    ]
    kept = ImpressionLog.open(tmp_path / "clean", SETTINGS).impressions().to_pylist()
    assert [row["impression_id"] for row in kept] == ["i1", "i2", "i500"]
    assert kept[2]["depth"] == 2.0


@st.composite
def odd_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    faults: list[dict[str, Any]] = [{}, {}, {}, *FAULTS.values()]
    count = draw(st.integers(2, 40))
    return [
        impression(draw(st.integers(0, 60)), depth=float(n)) | draw(st.sampled_from(faults))
        for n in range(count)
    ]


@hypothesis_settings(max_examples=25)
@given(rows=odd_rows(), cut=st.integers(0, 40))
def test_the_clean_log_is_what_a_slow_reader_keeps(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int
) -> None:
    root = tmp_path_factory.mktemp("log")
    kept: dict[str, dict[str, Any]] = {}
    num_out_of_order, newest = 0, datetime(1970, 1, 1, tzinfo=UTC)
    for row in rows:
        required = ("impression_id", "event_time", "page_product_id", "ad_product_id", "clicked")
        time, click_time = row["event_time"], row["click_time"]
        if any(row[name] in (None, "") for name in required):
            continue
        if not math.isfinite(row["depth"]) or not math.isfinite(row["propensity"]):
            continue
        if not 0 < row["propensity"] <= 1 or row["position"] < 0:
            continue
        if time > NOW + timedelta(minutes=5):
            continue
        if click_time is not None and (
            not row["clicked"] or click_time < time or click_time > NOW + timedelta(minutes=5)
        ):
            continue
        num_out_of_order += time < newest
        newest = max(newest, time)
        kept.setdefault(row["impression_id"], row)
    write_impressions(root / "raw", rows[:cut], name="a")
    write_impressions(root / "raw", rows[cut:], name="b")
    if not kept:
        with pytest.raises(ContractError, match=r"none of .* impressions is usable"):
            check(root)
        return
    verdict = check(root)
    found = ImpressionLog.open(root / "clean", SETTINGS).impressions().to_pylist()
    expected = sorted(kept.values(), key=lambda row: (row["event_time"], row["impression_id"]))
    assert found == expected
    assert verdict.impressions.num_clean + verdict.impressions.num_quarantined == len(rows)
    assert len(quarantine(root)) == verdict.impressions.num_quarantined
    assert verdict.impressions.num_out_of_order == num_out_of_order
    assert verdict.num_clicks == sum(row["clicked"] for row in expected)


# --- the other tables -----------------------------------------------------------------------


def test_of_two_versions_at_one_moment_the_last_counts(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1)])
    write_catalogue(
        tmp_path / "raw",
        [(1, START, "old"), (2, START, "other"), (1, START, "new"), (None, START, "lost")],
    )
    verdict = check(tmp_path)
    assert verdict.catalogue.num_replaced == 1
    assert verdict.catalogue.reasons == {"product_id is missing": 1}
    rows = ImpressionLog.open(tmp_path / "clean", SETTINGS).catalogue().to_pylist()
    assert [(row["product_id"], row["title"]) for row in rows] == [(1, "new"), (2, "other")]


def test_products_that_the_catalogue_lacks_are_counted_and_kept(tmp_path: Path) -> None:
    rows = [impression(1), impression(2, ad_product_id=9), impression(3, page_product_id=9)]
    write_impressions(tmp_path / "raw", rows)
    write_catalogue(tmp_path / "raw", [(1, START, "a"), (2, START, "b"), (2, NOW, "c")])
    verdict = check(tmp_path)
    assert verdict.impressions.num_clean == 3
    assert (verdict.num_products, verdict.num_unknown_products) == (2, 1)
    assert (verdict.num_rows_unknown_page, verdict.num_rows_unknown_ad) == (1, 1)


def test_a_log_without_a_catalogue_passes_and_all_its_products_are_unknown(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1)])
    verdict = check(tmp_path)
    assert verdict.num_unknown_products == 2
    assert ImpressionLog.open(tmp_path / "clean", SETTINGS).catalogue().num_rows == 0


def sales(hour: int, known_after: int, value: float) -> dict[str, Any]:
    moment = START + timedelta(hours=hour)
    created = moment + timedelta(minutes=known_after)
    return {"product_id": 1, "event_time": moment, "created_time": created, "sales": value}


def test_corrections_of_counters_stay_and_impossible_rows_do_not(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1)], settings=WITH_SALES)
    rows = [
        sales(1, 5, 1),
        sales(1, 90, 2),
        sales(1, 90, 3),
        sales(2, -1, 9),
        sales(3, 1, math.nan),
    ]
    schema = counters_schema(WITH_SALES, key=pa.int64())
    write_table(tmp_path / "raw", "counters", "a", pa.Table.from_pylist(rows, schema=schema))
    verdict = check(tmp_path, settings=WITH_SALES)
    assert verdict.counters is not None
    assert verdict.counters.num_replaced == 1
    assert verdict.counters.reasons == {
        "created_time before event_time": 1,
        "sales is not finite": 1,
    }
    counters = ImpressionLog.open(tmp_path / "clean", WITH_SALES).counters()
    assert counters is not None
    assert counters.column("sales").to_pylist() == [1.0, 3.0]


def test_declared_numbers_without_a_counters_table_are_refused(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1)], settings=WITH_SALES)
    with pytest.raises(ContractError, match=r"no counters/.*\(sales\)"):
        check(tmp_path, settings=WITH_SALES)


# --- columns --------------------------------------------------------------------------------


def with_column(
    name: str, change: Callable[[pa.ChunkedArray], pa.Array | None]
) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        column = change(table.column(name))
        return (
            table.remove_column(index) if column is None else table.set_column(index, name, column)
        )

    return apply


CASTS = {
    "int32 keys": with_column("ad_product_id", lambda c: c.cast(pa.int32())),
    "nanoseconds": with_column("event_time", lambda c: c.cast(pa.timestamp("ns", tz="UTC"))),
    "another zone": with_column(
        "event_time", lambda c: c.cast(pa.timestamp("us", tz="Europe/Berlin"))
    ),
    "naive times are UTC": with_column("event_time", lambda c: c.cast(pa.timestamp("us"))),
    "dictionary text": with_column("device", lambda c: c.dictionary_encode()),
    "large text": with_column("impression_id", lambda c: c.cast(pa.large_string())),
    "float32": with_column("depth", lambda c: c.cast(pa.float32())),
    "int64 position": with_column("position", lambda c: c.cast(pa.int64())),
    "null-typed column": with_column("click_time", lambda c: pa.nulls(len(c))),
    "absent request_id": with_column("request_id", lambda c: None),
}


@pytest.mark.parametrize("case", CASTS)
def test_a_type_that_can_be_converted_without_loss_is_converted_and_noted(
    tmp_path: Path, case: str
) -> None:
    rows = [impression(n) for n in range(5)]
    table = pa.Table.from_pylist(rows, schema=impressions_schema(SETTINGS, key=pa.int64()))
    write_table(tmp_path / "raw", "impressions", "a", CASTS[case](table))
    verdict = check(tmp_path)
    assert len(verdict.impressions.notes) == 1
    found = ImpressionLog.open(tmp_path / "clean", SETTINGS).impressions()
    assert found.schema == table.schema
    assert found.equals(table)


def test_all_mistakes_in_the_columns_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    table = pa.table(
        {
            "impression_id": ["a"],
            "event_time": [3.5],
            "page_product_id": [1],
            "ad_product_id": [1],
            "clicked": [True],
            "device": [1.5],
            "colour": ["red"],
        }
    )
    write_table(tmp_path / "raw", "impressions", "a", table)
    with pytest.raises(ContractError) as caught:
        check(tmp_path)
    message = str(caught.value)
    for part in (
        "a.parquet",
        "'event_time' has type double, expected a timestamp",
        "'device' has type double, expected text",
        "'depth' is missing (expected numbers)",
        "'colour' not declared",
    ):
        assert part in message
    assert not (tmp_path / "clean").exists()


def test_text_keys_work_as_integer_keys_do(tmp_path: Path) -> None:
    rows = [impression(1, page_product_id="a", ad_product_id="b")]
    write_impressions(tmp_path / "raw", rows, key=pa.string())
    assert check(tmp_path).key_type == "string"


def test_keys_of_two_types_are_refused_with_both_places(tmp_path: Path) -> None:
    write_impressions(
        tmp_path / "raw", [impression(1, page_product_id="a", ad_product_id="b")], key=pa.string()
    )
    write_catalogue(tmp_path / "raw", [(1, START, "a")])
    with pytest.raises(ContractError, match=r"one type in all tables.*integers in catalogue.*text"):
        check(tmp_path)


# --- the whole ------------------------------------------------------------------------------


def test_a_log_with_too_many_bad_rows_is_refused_with_the_reasons(tmp_path: Path) -> None:
    rows = [impression(n, position=-1 if n % 2 else 0) for n in range(10)]
    write_impressions(tmp_path / "raw", rows)
    strict = make_settings(quality={"max_quarantine_share": 0.2})
    with pytest.raises(ContractError, match=r"5 of 10 .*50\.0%.*20\.0%.*5 position is negative"):
        check(tmp_path, settings=strict)
    assert not (tmp_path / "clean").exists()


def test_checking_twice_gives_the_same_bytes_and_replaces_the_old(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [impression(n) for n in range(300)] + [impression(n) for n in range(20)]
    draw.shuffle(rows)
    write_impressions(tmp_path / "raw", rows)
    write_catalogue(tmp_path / "raw", [(1, START, "a")])
    contents = []
    for _ in range(2):
        check(tmp_path)
        files = sorted(path for path in (tmp_path / "clean").rglob("*") if path.is_file())
        contents.append([(path.name, path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "clean"}


def test_the_clean_log_has_one_file_a_day_in_contract_form(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(n) for n in range(400, 0, -1)])
    verdict = check(tmp_path)
    files = ImpressionLog.open(tmp_path / "clean", SETTINGS).impression_files()
    assert [path.name for path in files] == ["2026-01-01.parquet", "2026-01-02.parquet"]
    for path in files:
        table = pq.read_table(path)
        assert table.schema == impressions_schema(SETTINGS, key=pa.int64())
        times = table.column("event_time").to_pylist()
        assert {time.strftime("%Y-%m-%d") for time in times} == {path.stem}
        assert all(left <= right for left, right in pairwise(times))
    assert verdict.impressions.num_out_of_order == 399


def test_the_verdict_reads_as_text_and_as_json(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1), impression(2, position=-3)])
    (tmp_path / "raw" / "ingest.json").write_text('{"put_aside": {"no page": 7}}')
    verdict = check(tmp_path)
    stored = json.loads((tmp_path / "clean" / "verdict.json").read_text())
    assert stored == json.loads(json.dumps(verdict.to_json()))
    assert stored["impressions"]["reasons"] == {"position is negative": 1}
    rows = dict(verdict.rows())
    assert rows["impressions"] == "1 clean of 2"
    assert rows["quarantine, impressions"] == "1 position is negative (first: a.parquet row 1)"
    assert rows["put aside at ingest"] == "7 no page"


def test_progress_counts_all_rows(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(n) for n in range(10)])
    write_catalogue(tmp_path / "raw", [(1, START, "a")])
    seen: list[tuple[int, int]] = []
    check_log(
        tmp_path / "raw",
        tmp_path / "clean",
        settings=SETTINGS,
        now=NOW,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (11, 11)


KILL_MIDWAY = """
import json, os, signal, sys
from datetime import datetime, UTC
from pathlib import Path
from driftline.features.quality import check_log
from driftline.platform.settings import parse_settings
settings = parse_settings(json.loads(sys.argv[1]), origin="test")
def kill(done, total):
    if done == total:
        os.kill(os.getpid(), signal.SIGKILL)
now = datetime(2026, 1, 4, tzinfo=UTC)
check_log(Path(sys.argv[2]), Path(sys.argv[3]), settings=settings, now=now, progress=kill)
"""


def test_a_killed_check_leaves_the_last_clean_log_and_runs_again(tmp_path: Path) -> None:
    write_impressions(tmp_path / "raw", [impression(1)])
    check(tmp_path)
    write_impressions(tmp_path / "raw", [impression(2)], name="b")
    call = [sys.executable, "-c", KILL_MIDWAY, SETTINGS.model_dump_json()]
    killed = subprocess.run([*call, str(tmp_path / "raw"), str(tmp_path / "clean")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert ImpressionLog.open(tmp_path / "clean", SETTINGS).num_rows == 1
    check(tmp_path)
    assert ImpressionLog.open(tmp_path / "clean", SETTINGS).num_rows == 2
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "clean"}


CHECK_IN_A_PROCESS = """
import sys
from datetime import datetime, UTC
from pathlib import Path
from driftline.features.quality import check_log
from driftline.platform.settings import parse_settings
import json
settings = parse_settings(json.loads(sys.argv[1]), origin="test")
raw, clean = Path(sys.argv[2]), Path(sys.argv[3])
def peak():  # of this process alone; ru_maxrss would begin with the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
check_log(raw, clean, settings=settings, now=datetime(2026, 2, 1, tzinfo=UTC))
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_bounded_on_a_log_several_times_its_limit(tmp_path: Path) -> None:
    """1.2 M rows, 240 MB in memory, out of order and one in 100 twice, under a limit of 64 MB."""
    import numpy as np

    rng = np.random.default_rng(0)
    schema = impressions_schema(SETTINGS, key=pa.int64())
    (tmp_path / "raw" / "impressions").mkdir(parents=True)
    per_file, nbytes = 300_000, 0
    for part in range(4):
        numbers = part * per_file + rng.permutation(per_file)
        numbers[::100] = numbers[1::100]
        times = 1_767_225_600_000_000 + rng.integers(0, 2 * 86_400_000_000, size=per_file)
        ids = pa.array(numbers).cast(pa.string())
        columns = {
            "impression_id": pa.compute.binary_join_element_wise(
                "an-identifier-as-long-as-a-uuid-is-", ids, "-" * 90, ""
            ),
            "event_time": pa.array(times).cast(pa.timestamp("us", tz="UTC")),
            "page_product_id": pa.array(rng.integers(0, 1000, size=per_file)),
            "ad_product_id": pa.array(rng.integers(0, 1000, size=per_file)),
            "clicked": pa.array(rng.random(per_file) < 0.05),
            "device": ids,
            "depth": pa.array(rng.random(per_file)),
        }
        table = pa.table(
            [columns.get(f.name, pa.nulls(per_file, f.type)) for f in schema], schema=schema
        )
        nbytes += table.nbytes
        pq.write_table(table, tmp_path / "raw" / "impressions" / f"{part}.parquet")
        del table, columns, ids
    settings = make_settings(store={"memory_limit": "64MB", "threads": 1})
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHECK_IN_A_PROCESS,
            settings.model_dump_json(),
            str(tmp_path / "raw"),
            str(tmp_path / "clean"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert nbytes > 3 * 64 * 2**20
    assert int(done.stdout) < 280, "MB beyond what the imports need"
    assert ImpressionLog.open(tmp_path / "clean", settings).num_rows == 1_200_000 - 12_000
