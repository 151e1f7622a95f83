"""What a replica counts is what happened, under names that do not change by accident."""

import asyncio
import json
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.tiny_market import TinyMarket, tiny_settings

from driftline.platform.bundle import Bundle
from driftline.serving.observing import metrics_series
from driftline.serving.observing.metrics import ServingMetrics, exposition
from driftline.serving.observing.metrics_ray import RayMetrics
from driftline.serving.observing.metrics_series import BOUNDS, all_series
from driftline.serving.observing.observation import Observation
from driftline.serving.service import BundleService
from driftline.serving.transport.asgi import HttpFace
from driftline.serving.transport.requests import refuse

UNKNOWN = 999_999_999


def parsed(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """By sample name, then labels without the replica's: the value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    families = text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call]
    for family in families:
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "replica"))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def an_answer(stages: dict[str, float], **changes: Any) -> Any:
    """What an observer reads of an answer."""
    return SimpleNamespace(
        live=SimpleNamespace(arm="champion", fingerprint="f"),
        form="json",
        probabilities=[0.1] * 3,
        stages=stages,
        tiers={"short": (10.0, False)},
        page_fallback=None,
        ad_fallbacks={},
        **changes,
    )


@pytest.fixture
def metrics(tmp_path: Path) -> ServingMetrics:
    return ServingMetrics(tiny_settings(tmp_path), replica="r")


@given(seconds=st.lists(st.floats(0, 2), max_size=30))
def test_a_histogram_counts_what_does_not_exceed_each_bound(seconds: list[float]) -> None:
    metrics = ServingMetrics(tiny_settings(Path("nowhere")), replica="r")
    for value in seconds:
        metrics.answered(an_answer({"total": value}))

    found = parsed(exposition(metrics))

    buckets = found.get("driftline_stage_seconds_bucket", {})
    for bound in BOUNDS:
        key = (("le", str(bound)), ("stage", "total"))
        assert buckets.get(key, 0) == sum(value <= bound for value in seconds)
    if seconds:
        assert buckets[("le", "+Inf"), ("stage", "total")] == len(seconds)
        total = found["driftline_stage_seconds_sum"][(("stage", "total"),)]
        assert total == pytest.approx(sum(seconds))


def test_refusals_are_counted_by_code(metrics: ServingMetrics) -> None:
    errors = [("overloaded", 503), ("no_ads", 422), ("overloaded", 503)]
    for code, status in errors:
        metrics.refused(refuse("x", status=status, code=code))

    found = parsed(exposition(metrics))["driftline_refused_total"]

    assert found == {
        tuple(sorted({"code": code, "status": str(status)}.items())): number
        for (code, status), number in Counter(errors).items()
    }


def call(face: HttpFace, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
    """One request to the face, without a server."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    asyncio.run(face(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers["content-type"], sent[1]["body"]


def test_a_replica_tells_all_its_numbers_over_http(
    market: TinyMarket, first: Bundle, pointer: Path, tmp_path: Path
) -> None:
    market.promote(first, version=3)
    observation = Observation.of(market.settings, replica="tiny-1")
    service = BundleService(market.settings, observers=observation.observers)
    face = HttpFace(service, market.settings.serving, pages=observation.pages)
    observation.follow(service.status, waiting=lambda: len(face.line))
    service.look()
    good = {"page_product_id": UNKNOWN, "ad_product_ids": [UNKNOWN, 100_001, 100_002]}
    for _ in range(4):
        assert call(face, "POST", "/v1/score", orjson.dumps(good))[0] == 200
    assert call(face, "POST", "/v1/score", b"{")[0] == 400
    assert call(face, "GET", "/v1/nothing")[0] == 404

    status, kind, text = call(face, "GET", "/metrics")

    found = parsed(text)
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    assert found["driftline_answers_total"] == {(("arm", "champion"), ("form", "json")): 4}
    assert found["driftline_ads_total"] == {(): 12}
    assert sum(found["driftline_refused_total"].values()) == 2
    counts = found["driftline_stage_seconds_count"]
    stages = ("wait", "parse", "features", "fuse", "write", "total")
    assert counts == {(("stage", stage),): 4 for stage in stages}
    sums = {key[0][1]: value for key, value in found["driftline_stage_seconds_sum"].items()}
    assert sum(sums.values()) - sums["total"] <= sums["total"]
    assert found["driftline_fallbacks_total"] == {
        (("reason", "unknown_product"), ("role", "page")): 4,
        (("reason", "unknown_product"), ("role", "ad")): 4,
    }
    bundle = {"role": "champion", "bundle": first.fingerprint, "version": "3"}
    assert found["driftline_bundle_info"] == {tuple(sorted(bundle.items())): 1}
    assert found["driftline_features_behind_seconds"] == {(): 0}
    assert {key[0][1] for key in found["driftline_feature_age_seconds"]} == {
        "long", "medium", "short",
    }  # fmt: skip
    known = {name for series in all_series() for name in series.exported}
    assert set(found) <= known
    assert call(face, "POST", "/metrics")[0] == 405


def test_names_of_series_are_distinct_and_good_for_prometheus() -> None:
    names = [name for series in all_series() for name in series.exported]

    assert len(names) == len(set(names)) > 20
    assert all(name.replace("_", "a").isalnum() and name.islower() for name in names)
    assert len(list(all_series())) == sum(
        isinstance(value, metrics_series.Series) for value in vars(metrics_series).values()
    )


DASHBOARD = Path(__file__).parents[2] / "configs/grafana/driftline-serving.json"


def test_every_panel_of_the_dashboard_asks_for_a_series_that_is_exported() -> None:
    known = {name for series in all_series() for name in series.exported}
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            names = set(re.findall(r"\$\{prefix\}_([a-z0-9_]+)", target["expr"]))
            assert names, (panel["title"], target["expr"])
            assert not re.search(r"(?<!\})\bdriftline_", target["expr"]), panel["title"]
            asked |= {f"driftline_{name}" for name in names}
    assert len(panels) >= 12
    assert asked <= known
    families = {s.full_name for s in all_series() if any(n in asked for n in s.exported)}
    assert families == {s.full_name for s in all_series()}, "a series that nobody looks at"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.ray
def test_prometheus_finds_the_numbers_at_rays_agent(
    local_ray: None, metrics: ServingMetrics, tmp_path: Path
) -> None:
    metrics.answered(an_answer({"total": 0.001, "fuse": 0.0004}))
    metrics.refused(refuse("x", status=503, code="overloaded"))
    pusher = RayMetrics(metrics, seconds=0.2, targets=tmp_path / "targets.json")
    pusher.start()
    wanted = {
        "ray_driftline_answers_total{": 'arm="champion"',
        "ray_driftline_refused_total{": 'code="overloaded"',
        "ray_driftline_stage_seconds_bucket{": 'le="0.001"',
        "ray_driftline_stage_seconds_count{": 'stage="total"',
        "ray_driftline_feature_age_seconds{": 'tier="short"',
    }
    deadline, page = time.monotonic() + 120, ""
    try:
        while not all(name in page for name in wanted):
            assert time.monotonic() < deadline, page[-2000:]
            time.sleep(0.5)
            if (tmp_path / "targets.json").exists():
                (group,) = json.loads((tmp_path / "targets.json").read_text())
                with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics") as answer:
                    page = answer.read().decode()
    finally:
        pusher.close()

    lines = [line for line in page.splitlines() if line.startswith("ray_driftline_")]
    for name, label in wanted.items():
        assert any(line.startswith(name) and label in line for line in lines), (name, lines)
    (answers,) = [line for line in lines if line.startswith("ray_driftline_answers_total{")]
    assert answers.rpartition(" ")[2] == "1.0"
    (total,) = [
        line for line in lines
        if line.startswith("ray_driftline_stage_seconds_bucket{")
        and 'stage="total"' in line and 'le="+Inf"' in line
    ]  # fmt: skip
    assert total.rpartition(" ")[2] == "1.0"
