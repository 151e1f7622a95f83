"""Decisions: which are kept, what a row says, and how the file becomes the next training log."""

import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.decisions import (
    decision_schema,
    join_clicks,
    last_hour,
    read_decisions,
)
from driftline.features.quality import check_log
from driftline.platform.bundle import Bundle
from driftline.platform.contract import impressions_schema
from driftline.platform.errors import ContractError, MissingArtefactError
from driftline.platform.observation_settings import DecisionLogSettings
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace
from driftline.serving.observing.decision_log import DecisionLog, is_sampled
from driftline.serving.observing.decision_writer import DecisionWriter, write_parquet
from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm

UNKNOWN = 999_999_999


def with_log(settings: DriftlineSettings, **log: object) -> DriftlineSettings:
    own = DecisionLogSettings.model_validate({"sample_rate": 1.0, **log})
    serving = settings.serving.model_copy(update={"decision_log": own})
    return settings.model_copy(update={"serving": serving})


@pytest.fixture
def logged(
    market: TinyMarket, first: Bundle, pointer: Path
) -> Iterator[tuple[TinyMarket, DecisionLog, BundleService]]:
    """A service over the first bundle with a complete log, empty before and removed after."""
    settings = with_log(market.settings)
    folder = Workspace.of(settings).decisions
    shutil.rmtree(folder, ignore_errors=True)
    market.promote(first, version=7)
    log = DecisionLog(settings, replica="tiny-1")
    service = BundleService(settings, observers=[log])
    service.look()
    yield market, log, service
    shutil.rmtree(folder, ignore_errors=True)


def ask(service: BundleService, body: dict[str, object]) -> dict[str, object]:
    form = JsonForm()
    answer = service.answer(orjson.dumps(body), form)
    service.sent(answer)
    found = orjson.loads(form.write(answer))
    assert isinstance(found, dict)
    return found


def replay(market: TinyMarket, service: BundleService, *, number: int = 12) -> pa.Table:
    """Send the first requests of the hour after ``AS_OF``; gives their rows of the log."""
    frame = market.frame()
    kept = []
    for place, request in enumerate(market.requests(frame)[:number]):
        ask(
            service,
            {
                "page_product_id": request.page,
                "ad_product_ids": request.ads,
                "context": request.context,
                "time": request.time.isoformat(),
                "request_id": f"view-{place}",
            },
        )
        kept += request.rows
    return frame.take(kept)


def test_a_row_says_what_was_asked_what_was_answered_and_from_what(
    logged: tuple[TinyMarket, DecisionLog, BundleService], first: Bundle
) -> None:
    market, log, service = logged
    ad = market.frame()["ad_product_id"][0].as_py()
    body = {
        "page_product_id": UNKNOWN,
        "ad_product_ids": [ad, UNKNOWN, ad],
        "context": {"application": "app1"},
        "request_id": "view-1",
        "request_key": "session-1",
    }
    answer = ask(service, body)
    log.close()

    table = read_decisions(market.settings)
    rows = table.to_pylist()
    assert table.schema.equals(decision_schema(market.settings, key=pa.int64()))
    assert [row["impression_id"] for row in rows] == ["view-1:0", "view-1:1", "view-1:2"]
    assert [row["position"] for row in rows] == [0, 1, 2]
    assert [row["probability"] for row in rows] == answer["probabilities"]
    assert [row["ad_fallback"] for row in rows] == [None, "unknown_product", None]
    for row in rows:
        assert (row["bundle"], row["version"], row["arm"]) == (first.fingerprint, 7, "champion")
        assert (row["page_product_id"], row["page_fallback"]) == (UNKNOWN, "unknown_product")
        assert (row["application"], row["hour_of_week"]) == ("app1", None)
        assert (row["event_time"], row["features_as_of"]) == (AS_OF, AS_OF)
        assert (row["request_id"], row["request_key"]) == ("view-1", "session-1")
        assert row["served__page__category"] is None
        assert row["served__page__text_id"] is None
        assert row["latency_ms"] > 0
    assert rows[0]["served__ad__text_id"] > 0
    assert rows[0]["served__ad__category"] == rows[2]["served__ad__category"] is not None
    assert rows[1]["served__ad__impressions_1h"] is None
    assert rows[0]["age__medium"] == pytest.approx(answer["features"]["medium"]["age_seconds"])  # type: ignore[index]
    path = Workspace.of(market.settings).decisions / "2026-01-02T12" / "tiny-1-000001.parquet"
    assert path.exists()
    assert last_hour(market.settings) == AS_OF + HOUR


def test_served_values_are_those_of_the_frame(
    logged: tuple[TinyMarket, DecisionLog, BundleService],
) -> None:
    market, log, service = logged
    frame = replay(market, service)
    log.close()

    found = read_decisions(market.settings).sort_by("impression_id")
    expected = frame.append_column(
        "name", pa.array(orders(frame["request_id"].to_pylist()))
    ).sort_by("name")
    assert found["ad_product_id"].to_pylist() == expected["ad_product_id"].to_pylist()
    served = [
        name
        for name in found.column_names
        # Sales become known within the hour, after the snapshot: that is what `skew` finds.
        if name.startswith("served__") and "sales" not in name
    ]
    assert len(served) > 30
    for name in served:
        ours, theirs = (
            np.array(t.to_pylist(), object)
            for t in (found[name], expected[name.removeprefix("served__")])
        )
        assert ours.tolist() == theirs.tolist(), name


def orders(requests: list[str]) -> list[str]:
    """``view-NUMBER:PLACE`` of rows by their request."""
    numbers: dict[str, int] = {}
    places: dict[str, int] = {}
    names = []
    for request in requests:
        number = numbers.setdefault(request, len(numbers))
        places[request] = places.get(request, -1) + 1
        names.append(f"view-{number}:{places[request]}")
    return names


def test_the_log_joined_with_clicks_is_the_next_training_log(
    logged: tuple[TinyMarket, DecisionLog, BundleService], tmp_path: Path
) -> None:
    market, log, service = logged
    settings = market.settings
    frame = replay(market, service)
    log.close()
    decisions = read_decisions(settings, Window(AS_OF, AS_OF + HOUR))
    clicked = decisions.slice(0, 3)
    clicks = pa.table(
        {
            "impression_id": [*clicked["impression_id"].to_pylist(), "of-another-sample:0"] * 2,
            "click_time": [AS_OF + 2 * HOUR] * 4 + [AS_OF + 3 * HOUR] * 4,
        }
    )

    impressions = join_clicks(decisions, clicks, settings)

    assert impressions.schema.equals(impressions_schema(settings, key=pa.int64()))
    assert impressions.num_rows == frame.num_rows
    told = impressions.filter(impressions["clicked"])
    assert set(told["impression_id"].to_pylist()) == set(clicked["impression_id"].to_pylist())
    assert set(told["click_time"].to_pylist()) == {AS_OF + 2 * HOUR}
    for table in ("catalogue", "counters"):
        shutil.copytree(Workspace.of(settings).log / table, tmp_path / "raw" / table)
    (tmp_path / "raw/impressions").mkdir()
    pq.write_table(impressions, tmp_path / "raw/impressions/decisions.parquet")
    verdict = check_log(
        tmp_path / "raw", tmp_path / "clean", settings=settings, now=AS_OF + 1000 * HOUR
    )
    assert verdict.impressions.num_clean == verdict.impressions.num_rows == frame.num_rows
    assert verdict.impressions.reasons == {}
    assert verdict.num_clicks == 3


def test_a_request_sent_twice_was_shown_once(
    logged: tuple[TinyMarket, DecisionLog, BundleService],
) -> None:
    market, log, service = logged
    body = {"page_product_id": UNKNOWN, "ad_product_ids": [1, 2], "request_id": "again"}
    for _ in range(2):
        ask(service, body)
    log.close()

    decisions = read_decisions(market.settings)
    clicks = pa.table({"impression_id": ["again:1"]})
    impressions = join_clicks(decisions, clicks, market.settings)

    assert decisions.num_rows == 4
    assert impressions["impression_id"].to_pylist() == ["again:0", "again:1"]
    assert impressions["clicked"].to_pylist() == [False, True]
    assert impressions["click_time"].to_pylist() == [None, None]
    with pytest.raises(ContractError, match="clicks need a column 'impression_id'"):
        join_clicks(decisions, clicks.rename_columns(["id"]), market.settings)


def test_reading_a_log_that_is_not_there_says_how_to_get_one(market: TinyMarket) -> None:
    with pytest.raises(MissingArtefactError, match=r"no decision.*sample_rate is 0\.01"):
        read_decisions(market.settings, Window(AS_OF, AS_OF + HOUR))
    assert last_hour(market.settings) is None


@given(rates=st.lists(st.floats(0, 1), min_size=2, max_size=2), name=st.text(max_size=20))
def test_a_larger_sample_holds_the_smaller_one(rates: list[float], name: str) -> None:
    low, high = sorted(rates)

    assert is_sampled(name, high) or not is_sampled(name, low)
    assert is_sampled(name, 1.0)
    assert not is_sampled(name, 0.0)


def test_the_sample_is_a_share_of_the_requests_whatever_their_names() -> None:
    for pattern in ("view-{}", "{}", "a-very-long-replica-name-{:010d}-x"):
        kept = sum(is_sampled(pattern.format(number), 0.2) for number in range(5_000))
        # Five deviations of a binomial with 5,000 draws.
        assert abs(kept - 1_000) < 5 * (5_000 * 0.2 * 0.8) ** 0.5


def test_what_finds_no_room_is_dropped_and_counted(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first)
    settings = with_log(market.settings, max_waiting_rows=25)
    log = DecisionLog(settings, replica="tiny-2")  # its thread never runs: a writer that hangs
    service = BundleService(settings, observers=[log])
    service.look()
    for _ in range(5):
        ask(service, {"page_product_id": UNKNOWN, "ad_product_ids": [1] * 10})

    status = log.status()
    assert (status["requests_kept"], status["requests_dropped"]) == (2, 3)
    assert (status["rows_waiting"], status["rows_dropped"]) == (20, 30)


def test_a_writer_that_hangs_holds_up_no_request(
    market: TinyMarket, first: Bundle, pointer: Path, tmp_path: Path
) -> None:
    market.promote(first)
    settings = with_log(market.settings, flush_rows=1, max_waiting_rows=40)
    disk_works = threading.Event()
    hangs = threading.Event()

    def slow(table: pa.Table, path: Path) -> None:
        hangs.set()
        disk_works.wait()
        write_parquet(table, path)

    own = settings.serving.decision_log
    writer = DecisionWriter(tmp_path, replica="slow", settings=own, write=slow)
    log = DecisionLog(settings, replica="slow", writer=writer)
    service = BundleService(settings, observers=[log])
    service.look()
    log.start()
    ask(service, {"page_product_id": UNKNOWN, "ad_product_ids": [1] * 10})
    assert hangs.wait(60)
    for _ in range(9):  # all of them are answered while the disk does nothing
        ask(service, {"page_product_id": UNKNOWN, "ad_product_ids": [1] * 10})
    status = log.status()
    assert (status["requests_kept"], status["requests_dropped"]) == (5, 5)

    disk_works.set()
    log.close()
    assert sum(pq.read_table(path).num_rows for path in tmp_path.rglob("*.parquet")) == 50
    assert log.status()["rows_waiting"] == 0


def test_requests_without_an_id_get_one_that_no_other_has_and_the_answer_tells_it(
    logged: tuple[TinyMarket, DecisionLog, BundleService],
) -> None:
    market, log, service = logged
    restarted = BundleService(market.settings, observers=[log])
    restarted.look()
    told = [
        str(ask(one, {"page_product_id": UNKNOWN, "ad_product_ids": [1, 2]})["request_id"])
        for one in (service, restarted, service, restarted)
    ]
    log.close()

    found = read_decisions(market.settings)
    assert len(set(told)) == 4
    assert sorted(set(found["request_id"].to_pylist())) == sorted(told)
    assert sorted(found["impression_id"].to_pylist()) == sorted(
        f"{name}:{place}" for name in told for place in range(2)
    )


def test_hours_that_come_mixed_are_kept_apart(
    logged: tuple[TinyMarket, DecisionLog, BundleService],
) -> None:
    market, log, service = logged
    hours = [4, 5, 4, 6, 5, 4]
    for number, hour in enumerate(hours):
        time, name = (AS_OF + hour * HOUR).isoformat(), f"view-{number}"
        request = {"page_product_id": UNKNOWN, "ad_product_ids": [1], "time": time}
        ask(service, {**request, "request_id": name})
    log.close()

    folder = Workspace.of(market.settings).decisions
    for hour in set(hours):
        (path,) = (folder / f"{AS_OF + hour * HOUR:%Y-%m-%dT%H}").glob("*.parquet")
        found = pq.read_table(path)["request_id"].to_pylist()
        assert found == [f"view-{n}" for n, asked in enumerate(hours) if asked == hour]


def test_the_clock_of_the_log_is_event_time(
    logged: tuple[TinyMarket, DecisionLog, BundleService],
) -> None:
    market, log, service = logged
    before = datetime.now(UTC)
    ask(
        service,
        {
            "page_product_id": UNKNOWN,
            "ad_product_ids": [1],
            "time": (AS_OF + timedelta(hours=5, minutes=3)).isoformat(),
        },
    )
    log.close()

    row = read_decisions(market.settings, Window(AS_OF + 5 * HOUR, AS_OF + 6 * HOUR)).to_pylist()[0]
    assert row["event_time"] == AS_OF + timedelta(hours=5, minutes=3)
    assert row["answered_at"] >= before.replace(microsecond=0)
