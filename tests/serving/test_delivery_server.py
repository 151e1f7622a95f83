"""Delivery through the whole server: HAProxy, Ray Serve, replicas that follow by themselves."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.rig.usage import replicas
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.platform.processes import free_port
from driftline.platform.registry import Registry
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.delivery import Delivery
from driftline.serving.rollout.routes import key_place
from driftline.serving.server import ServingHandle, start_serving

pytestmark = pytest.mark.ray

SHARE = 0.4


@pytest.fixture(scope="module")
def settings(market: TinyMarket, first: Bundle, second: Bundle) -> DriftlineSettings:
    """Version 1 is the champion of two replicas; administration is on."""
    registry = Registry(market.settings, Workspace.of(market.settings))
    for bundle in (first, second):
        registry.register(bundle.path, fingerprint=bundle.fingerprint, lineage={}, metrics={})
    registry.promote(1)
    changes = {
        "port": free_port(),
        "ingress": "haproxy",
        "num_replicas": 2,
        "admin_token_file": Path("admin.token"),
    }
    serving = market.settings.serving.model_copy(update=changes)
    return market.settings.model_copy(update={"serving": serving})


@pytest.fixture(scope="module")
def server(settings: DriftlineSettings) -> Iterator[ServingHandle]:
    with start_serving(settings) as handle:
        yield handle


def test_two_replicas_agree_about_every_key_and_administration_needs_the_token(
    settings: DriftlineSettings, first: Bundle, second: Bundle, server: ServingHandle
) -> None:
    Delivery(settings, by="ann", via="test").deploy_canary("2", share=SHARE)
    canary = json.loads((Workspace.of(settings).bundles / "TRAFFIC").read_text())["canary"]
    wait_for_canary(server)

    for number in range(40):
        key = f"session-{number // 2}"  # one request after the other goes to the other replica
        body = {"page_product_id": 100_001, "ad_product_ids": [100_002], "request_key": key}
        with server.client as client:
            status, answer = client.request("POST", "/v1/score", json.dumps(body).encode())
        assert status == 200
        in_canary = key_place(canary["salt"], key) < SHARE
        assert answer["bundle"] == (second if in_canary else first).fingerprint

    token = (Workspace.of(settings).root / "admin.token").read_text().strip()
    assert ask(server, "GET", "routes", token="wrong")[0] == 401
    status, answer = ask(server, "GET", "routes", token=token)
    assert status == 200
    assert answer["live"]["canary"]["share"] == SHARE
    status, answer = ask(server, "POST", "traffic", token=token, body=b'{"stop": true}')
    assert status in (200, 202)
    deadline = time.monotonic() + 120
    while ask(server, "GET", f"changes/{answer['id']}", token=token)[1]["state"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status, answer = ask(server, "GET", "routes", token=token)
    assert answer["live"]["canary"] is None


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores, and a system that lets threads keep to one",
)
def test_each_replica_answers_on_a_core_of_its_own(server: ServingHandle) -> None:
    def kept() -> list[set[int]]:
        cores = [
            [os.sched_getaffinity(thread.id) for thread in replica.threads()]
            for replica in replicas(server.family)
        ]
        return [min(of_threads, key=len) for of_threads in cores]

    deadline = time.monotonic() + 30
    while len(set().union(*(found := kept()))) != 2 or max(map(len, found)) > 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_killed_replica_costs_no_request(server: ServingHandle) -> None:
    address = server.url.removeprefix("http://")
    body = b'{"page_product_id": 100001, "ad_product_ids": [100002]}'
    enough = threading.Event()

    def drive() -> list[int]:
        found = []
        with closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            while not enough.is_set():
                connection.request("POST", "/v1/score", body)
                response = connection.getresponse()
                response.read()
                found.append(response.status)
        return found

    with ThreadPoolExecutor(4) as pool:
        driven = [pool.submit(drive) for _ in range(4)]
        try:
            time.sleep(0.5)
            replicas(server.family)[0].kill()
            time.sleep(1.5)
        finally:
            enough.set()
        statuses = [status for one in driven for status in one.result()]

    assert len(statuses) > 100
    assert set(statuses) == {200}


def ask(
    server: ServingHandle, method: str, path: str, *, token: str, body: bytes | None = None
) -> tuple[int, dict[str, Any]]:
    headers = {"authorization": f"Bearer {token}"}
    with server.client as client:
        return client.request(method, f"/v1/admin/{path}", body, headers)


def wait_for_canary(server: ServingHandle) -> None:
    """Until both replicas are there and have it."""
    deadline = time.monotonic() + 90
    roles: dict[str, set[str]] = {}
    while [role for role in roles.values() if "canary" in role] != list(roles.values()) or (
        len(roles) < 2
    ):
        assert time.monotonic() < deadline, roles
        with server.client as client:
            status = client.status()
        roles[status["replica"]] = {route["role"] for route in status["routes"]}
        time.sleep(0.05)
