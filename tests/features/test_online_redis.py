"""The Redis online store against offline frames; runs where ``redis-server`` is installed."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.feast_lookup import feast_lookup

from driftline.features.counters import compute_counters
from driftline.features.feast_plugins.redis_connection import FAILURES_TO_OPEN
from driftline.features.frame_files import read_frames
from driftline.features.frames import build_frames
from driftline.features.online import OnlineFeatures
from driftline.features.online_redis import RedisVersion
from driftline.features.store import apply, materialize, open_store
from driftline.features.texts import write_product_sources
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

SERVER = shutil.which("redis-server")
START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + 9 * HOUR)

pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")


@dataclass
class RedisServer:
    """A Redis of our own on a free port; what it holds is lost when it ends."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        command = [str(SERVER), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "1 1", "--shutdown-on-sigterm", "save"]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = RedisServer(tmp_path_factory.mktemp("redis"), port)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module", params=[False, True], ids=["strings", "integers"])
def market(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    redis: RedisServer,
    handmade_settings: Callable[..., DriftlineSettings],
    clean_log: Callable[..., None],
    market_of: Callable[..., dict[str, Any]],
) -> DriftlineSettings:
    key = pa.int64() if request.param else pa.string()
    store = {"online": "redis", "redis_address": redis.address, "threads": 1}
    folder = tmp_path_factory.mktemp("market")
    # Long enough for a busy machine, where the slow and the dead are told apart by counting.
    store["redis_timeout_ms"] = 2_000
    settings = handmade_settings(folder, name=f"redis-{key}", store=store)
    clean_log(settings, **market_of(11, num_rows=40, integer_keys=request.param), key=key)
    write_product_sources(settings)
    compute_counters(settings, window=SPAN)
    apply(settings, key_type=key)
    build_frames(settings, window=SPAN)
    return settings


def test_a_read_through_redis_equals_the_frame_of_that_moment(market: DriftlineSettings) -> None:
    rows = read_frames(market, SPAN).to_pylist()
    features = OnlineFeatures.open(market)
    moments = sorted({row["event_time"] for row in rows})
    for moment in [*moments[::8], moments[0]]:  # the clock is set back at the end
        materialize(market, as_of=moment)
        assert features.refresh()
        for row in rows:
            if row["event_time"] == moment:
                assert_same_row(features, row, market)


def test_a_read_by_bytes_equals_feasts_own(market: DriftlineSettings) -> None:
    materialize(market, as_of=SPAN.end)
    features, store = OnlineFeatures.open(market), open_store(market)
    integers = read_frames(market, SPAN).schema.field("ad_product_id").type == pa.int64()
    products = [*(n if integers else f"p{n}" for n in range(6)), 77 if integers else "nobody", None]
    version = features._version
    assert isinstance(version, RedisVersion)
    groups = ["toys", "books", "toys|books", "books|books", "none", None]
    for wanted in features._wanted:
        is_product = wanted.view.entity == "product"
        keys = products if is_product else groups
        slow = feast_lookup(wanted, keys, store=store)
        found = version.products(keys) if is_product else {}
        fast = found[wanted.view.name] if found else version.group(wanted.view, keys)
        assert fast is not None
        known = slow.slots >= 0
        assert (fast.slots >= 0).tolist() == known.tolist()
        assert known.any()
        np.testing.assert_array_equal(
            fast.table.event_us[fast.slots[known]], slow.table.event_us[slow.slots[known]]
        )
        np.testing.assert_array_equal(
            fast.table.numbers[fast.slots], slow.table.numbers[slow.slots]
        )
        for name, (codes, values) in fast.table.categories.items():
            other_codes, other_values = slow.table.categories[name]
            expected = other_values[other_codes[slow.slots]].tolist()
            assert values[codes[fast.slots]].tolist() == expected
        if fast.table.text_id is not None:
            assert slow.table.text_id is not None
            expected = slow.table.text_id[slow.slots].tolist()
            assert fast.table.text_id[fast.slots].tolist() == expected


def read_columns(features: OnlineFeatures, market: DriftlineSettings) -> dict[str, list[Any]]:
    row = read_frames(market, SPAN).to_pylist()[0]
    page, ad = row["page_product_id"], row["ad_product_id"]
    read = features.read(page, [ad, page], context={}, now=SPAN.end)
    missing = {
        name: [v if v == v else None for v in c.tolist()] for name, c in read.columns.items()
    }
    return missing | {"away": [read.store_unavailable], "page": [read.unknown_page]}


def test_a_request_costs_one_round_trip_once_its_categories_are_known(
    market: DriftlineSettings,
) -> None:
    materialize(market, as_of=SPAN.end)
    features = OnlineFeatures.open(market)
    read_columns(features, market)
    first = features.counts()["store"]["reads"]
    assert features.refresh()  # the categories that were met are now in memory
    assert not features.refresh()
    for _ in range(5):
        read_columns(features, market)
    assert first > 1
    assert features.counts()["store"]["reads"] == first + 5


def test_while_redis_hangs_requests_go_on_without_features_and_soon_without_waiting(
    market: DriftlineSettings, redis: RedisServer
) -> None:
    materialize(market, as_of=SPAN.end)
    slow = market.model_copy(
        update={"store": market.store.model_copy(update={"redis_timeout_ms": 1_000.0})}
    )
    features = OnlineFeatures.open(slow)
    expected = read_columns(features, slow)
    assert expected["away"] == [False]
    redis.send(signal.SIGSTOP)
    try:
        for _ in range(FAILURES_TO_OPEN + 4):
            found = read_columns(features, slow)
            assert found["away"] == [True]
            assert found["page"] == [False]  # not unknown: it cannot be told
            assert set(found["ad__impressions_24h"]) == {None}
        counts = features.counts()["store"]
        assert (counts["failures"], counts["skipped"]) == (FAILURES_TO_OPEN, 4)
        assert features.status(now=SPAN.end)["store_away"]
    finally:
        redis.send(signal.SIGCONT)
    features.refresh()
    assert read_columns(features, slow) == expected
    assert not features.status(now=SPAN.end)["store_away"]


def test_after_a_restart_of_redis_the_next_request_is_answered(
    market: DriftlineSettings, redis: RedisServer
) -> None:
    materialize(market, as_of=SPAN.end)
    features = OnlineFeatures.open(market)
    expected = read_columns(features, market)
    redis.stop()
    assert read_columns(features, market)["away"] == [True]
    redis.start()
    assert read_columns(features, market) == expected
    redis.stop()
    redis.start()  # between two requests: the old connection is dead, a new one is made at once
    assert read_columns(features, market) == expected
    assert features.counts()["store"]["failures"] == 1


def assert_same_row(
    features: OnlineFeatures, row: dict[str, Any], settings: DriftlineSettings
) -> None:
    context = {c.name: row[c.name] for c in head_columns(settings) if c.alias is None}
    read = features.read(
        row["page_product_id"], [row["ad_product_id"]], context=context, now=row["event_time"]
    )
    for name in [*TEXT_ID_COLUMNS, *(column.name for column in head_columns(settings))]:
        found = read.columns[name].tolist()[0]
        is_missing = (name in TEXT_ID_COLUMNS and found == 0) or found is None or found != found
        assert (None if is_missing else found) == row[name], name
        assert not isinstance(found, np.generic)
