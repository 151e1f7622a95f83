"""What a whole server writes down: a process of its own, a real Ray Serve, HTTP."""

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tests.listening import listeners
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.decisions import read_decisions
from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.processes import free_port
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.server import ServingHandle, start_serving

pytestmark = pytest.mark.ray

UNKNOWN = 999_999_999
NUM_REQUESTS = 5


@pytest.fixture(scope="module")
def settings(market: TinyMarket, first: Bundle) -> Iterator[DriftlineSettings]:
    materialize(market.settings, as_of=AS_OF)
    market.promote(first, version=4)
    raw = market.settings.model_dump()
    raw["serving"] |= {
        "port": free_port(),
        "ingress": "haproxy",
        "decision_log": {"sample_rate": 1.0, "flush_seconds": 3600},
        "slow_requests": {"threshold_ms": 0.001},
    }
    yield DriftlineSettings.model_validate(raw)
    shutil.rmtree(Workspace.of(market.settings).decisions, ignore_errors=True)
    (Workspace.of(market.settings).bundles / "CHAMPION").unlink()


@pytest.fixture(scope="module")
def server(settings: DriftlineSettings) -> Iterator[ServingHandle]:
    with start_serving(settings) as handle:
        with handle.client as client:
            deadline = time.monotonic() + 120
            while not client.ready():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for _ in range(NUM_REQUESTS):
                client.score(UNKNOWN, [100_001, 100_002])
        yield handle


def read(server: ServingHandle, path: str) -> bytes:
    with urllib.request.urlopen(f"{server.url}{path}") as answer:
        found: bytes = answer.read()
        return found


def test_numbers_and_slow_requests_are_pages_of_the_server(
    server: ServingHandle, first: Bundle
) -> None:
    text = read(server, "/metrics").decode()
    slow: dict[str, Any] = json.loads(read(server, "/v1/slow"))

    assert f'bundle="{first.fingerprint}"' in text
    assert f'arm="champion",form="json",replica="{slow["replica"]}"}} {NUM_REQUESTS}.0' in text
    assert slow["slow_since_start"] == len(slow["requests"]) == NUM_REQUESTS
    assert set(slow["requests"][0]["stages_ms"]) == {
        "wait", "parse", "features", "fuse", "write", "total",
    }  # fmt: skip


def test_rays_agent_exports_the_replica(server: ServingHandle, settings: DriftlineSettings) -> None:
    targets = Workspace.of(settings).state / "prometheus-targets.json"
    wanted = "ray_driftline_bundle_info{"
    deadline, page = time.monotonic() + 120, ""
    while wanted not in page:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        if targets.exists():
            (group,) = json.loads(targets.read_text())
            (target,) = group["targets"]
            with urllib.request.urlopen(f"http://{target}/metrics") as answer:
                page = answer.read().decode()
    assert target.startswith("127.0.0.1:")


def test_our_ray_listens_on_loopback_only(server: ServingHandle) -> None:
    open_to_others = {
        one
        for one in listeners(server.family)
        if one.process != "haproxy" and one.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    }
    assert open_to_others == set()


def test_a_server_that_stops_writes_its_decisions(
    server: ServingHandle, settings: DriftlineSettings, first: Bundle
) -> None:
    server.stop()

    decisions = read_decisions(settings)
    assert decisions.num_rows == 2 * NUM_REQUESTS
    assert set(decisions["bundle"].to_pylist()) == {first.fingerprint}
    assert set(decisions["version"].to_pylist()) == {4}
