"""The Redis online store against offline frames; runs where ``redis-server`` is installed."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from driftline.features.counters import compute_counters
from driftline.features.frames import build_frames, read_frames
from driftline.features.online import OnlineFeatures
from driftline.features.store import apply, materialize
from driftline.features.texts import write_product_sources
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

SERVER = shutil.which("redis-server")
START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + 9 * HOUR)

pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")


@pytest.fixture(scope="module")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [str(SERVER), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"localhost:{port}"
        server.terminate()


@pytest.mark.parametrize("integers", [False, True])
def test_a_read_through_redis_equals_the_frame_of_that_moment(
    tmp_path: Path,
    redis_address: str,
    integers: bool,
    handmade_settings: Callable[..., DriftlineSettings],
    clean_log: Callable[..., None],
    market_of: Callable[..., dict[str, Any]],
) -> None:
    key = pa.int64() if integers else pa.string()
    store = {"online": "redis", "redis_address": redis_address, "threads": 1}
    settings = handmade_settings(tmp_path, name=f"redis-{key}", store=store)
    clean_log(settings, **market_of(11, num_rows=40, integer_keys=integers), key=key)
    write_product_sources(settings)
    compute_counters(settings, window=SPAN)
    apply(settings, key_type=key)
    build_frames(settings, window=SPAN)
    rows = read_frames(settings, SPAN).to_pylist()
    features = OnlineFeatures.open(settings)
    moments = sorted({row["event_time"] for row in rows})
    for moment in [*moments[::8], moments[0]]:  # the clock is set back at the end
        materialize(settings, as_of=moment)
        assert features.refresh()
        for row in rows:
            if row["event_time"] == moment:
                assert_same_row(features, row, settings)


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
