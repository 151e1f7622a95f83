"""What the replica does, without a server in front."""

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tests.tiny_market import AS_OF, Request, TinyMarket

from driftline.features.store import materialize
from driftline.features.texts import read_texts
from driftline.features.views import feature_views
from driftline.platform.bundle import Bundle
from driftline.platform.errors import MissingArtefactError, RequestError
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.serving.once import parse_context, score_once
from driftline.serving.service import BundleService
from driftline.serving.transport.requests import RefusedRequestError

Change = Callable[..., DriftlineSettings]

KNOWN, UNKNOWN = 100_001, 999_999_999


def ask(service: BundleService, page: int, ads: list[int], **more: Any) -> dict[str, Any]:
    body = {"page_product_id": page, "ad_product_ids": ads, **more}
    answer = orjson.loads(service.score(orjson.dumps(body)))
    assert isinstance(answer, dict)
    return answer


def looking(settings: DriftlineSettings) -> BundleService:
    service = BundleService(settings)
    service.look()
    return service


def some_ads(market: TinyMarket, number: int = 8) -> list[int]:
    return list(dict.fromkeys(market.frame()["ad_product_id"].to_pylist()))[:number]


def test_online_scores_equal_offline_scores(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first)
    frame = market.frame(num_hours=2)
    offline = Scorer.of(first).score(frame)
    requests = market.requests(frame)
    service = looking(market.settings)
    for request in requests[:: len(requests) // 6]:
        materialize(market.settings, as_of=request.time)
        service.look()

        answer = ask(
            service,
            request.page,
            request.ads,
            context=request.context,
            time=request.time.isoformat(),
        )

        np.testing.assert_allclose(answer["probabilities"], offline[request.rows], atol=1e-5)
        assert answer["bundle"] == first.fingerprint
        assert answer["fallbacks"] == {"page": None, "ads": []}


def test_answers_follow_the_order_of_the_ads(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first)
    service = looking(market.settings)
    ads = some_ads(market)
    alone = {ad: ask(service, KNOWN, [ad])["probabilities"][0] for ad in ads}
    random = np.random.default_rng(0)
    for _ in range(5):
        order = random.choice(ads, 12).tolist()

        found = ask(service, KNOWN, order)["probabilities"]

        np.testing.assert_allclose(found, [alone[ad] for ad in order], atol=1e-7)
    assert len({round(value, 6) for value in alone.values()}) > 1


def test_unknown_products_are_flagged_by_place(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first)
    answer = ask(looking(market.settings), UNKNOWN, [KNOWN, UNKNOWN, KNOWN, UNKNOWN])

    reason = "unknown_product"
    assert answer["fallbacks"]["page"] == reason
    assert answer["fallbacks"]["ads"] == [
        {"index": 1, "reason": reason},
        {"index": 3, "reason": reason},
    ]
    assert np.isfinite(answer["probabilities"]).all()


@pytest.fixture(scope="module")
def uncached(market: TinyMarket) -> Bundle:
    """The second bundle without any vectors of half its texts."""
    num_texts = read_texts(market.settings).num_rows
    return market.bundle(seed=2, num_uncached=num_texts // 2)


def test_a_text_without_a_vector_is_neutral_and_flagged(
    market: TinyMarket, uncached: Bundle, pointer: Path, serving_settings: Change
) -> None:
    market.promote(uncached)
    service = looking(serving_settings(unknown_product="neutral"))

    answer = ask(service, KNOWN, some_ads(market, 30))

    reasons = {entry["reason"] for entry in answer["fallbacks"]["ads"]}
    assert reasons == {"neutral_text"}
    assert 0 < len(answer["fallbacks"]["ads"]) < 30


def test_encoding_while_serving_equals_a_full_cache(
    market: TinyMarket, uncached: Bundle, second: Bundle, pointer: Path, serving_settings: Change
) -> None:
    ads = some_ads(market, 30)
    market.promote(second)
    expected = ask(looking(market.settings), KNOWN, ads)
    market.promote(uncached, version=2)
    service = looking(serving_settings(unknown_product="encode"))

    for _ in range(2):  # the second time from memory
        answer = ask(service, KNOWN, ads)
        np.testing.assert_allclose(answer["probabilities"], expected["probabilities"], atol=1e-6)
        assert {entry["reason"] for entry in answer["fallbacks"]["ads"]} == {"encoded_text"}


def test_without_a_champion_the_service_says_so(market: TinyMarket, pointer: Path) -> None:
    service = looking(market.settings)

    with pytest.raises(RefusedRequestError, match="no champion yet") as refused:
        ask(service, KNOWN, [KNOWN])

    assert refused.value.status == 503
    assert not service.ready
    assert service.status()["bundle"] is None


def test_an_altered_champion_is_refused_and_the_old_one_stays(
    market: TinyMarket, first: Bundle, second: Bundle, altered: Bundle, pointer: Path
) -> None:
    market.promote(first)
    service = looking(market.settings)
    market.promote(altered, version=2)
    for _ in range(3):
        service.look()

    assert ask(service, KNOWN, [KNOWN])["bundle"] == first.fingerprint
    status = service.status()
    assert (status["loads"], status["refusals"]) == (1, 1)
    assert status["last_refusal"]["fingerprint"] == altered.fingerprint
    assert "calibration.json was altered" in status["last_refusal"]["message"]

    market.promote(second, version=3)
    service.look()
    assert ask(service, KNOWN, [KNOWN])["bundle"] == second.fingerprint


BROKEN: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "Expecting property name"),
    "no fingerprint": ('{"version": 1}', "CHAMPION lacks"),
    "wrong folder": ("other", "the registry names"),
    "no folder": ("gone", "is no bundle"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pointer_does_not_end_the_service(
    market: TinyMarket, first: Bundle, second: Bundle, pointer: Path, name: str
) -> None:
    market.promote(first)
    service = looking(market.settings)
    content, words = BROKEN[name]
    if content in ("other", "gone"):
        market.promote(second, version=2)
        raw = json.loads(pointer.read_text())
        raw["bundle"] = first.fingerprint if content == "other" else "gone"
        content = json.dumps(raw)
    pointer.write_text(content)
    service.look()

    assert ask(service, KNOWN, [KNOWN])["bundle"] == first.fingerprint
    assert words in service.status()["last_refusal"]["message"]


def test_a_bundle_of_other_features_is_refused(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first)
    fewer = [f for f in market.settings.features if f.name != "advertiser"]
    service = looking(market.settings.model_copy(update={"features": tuple(fewer)}))

    message = service.status()["last_refusal"]["message"]
    assert "only in the bundle: ['ad__advertiser', 'page__advertiser']" in message

    maturity = market.settings.labels.model_copy(update={"maturity_minutes": 7})
    service = looking(market.settings.model_copy(update={"labels": maturity}))
    assert "other definitions of the feature views" in service.status()["last_refusal"]["message"]


def test_every_answer_comes_from_one_bundle_while_bundles_are_swapped(
    market: TinyMarket, first: Bundle, second: Bundle, pointer: Path
) -> None:
    ads = some_ads(market)
    expected = {}
    for bundle in (first, second):
        market.promote(bundle)
        answer = ask(looking(market.settings), KNOWN, ads)
        expected[answer["bundle"]] = answer["probabilities"]
    market.promote(first)
    service = looking(market.settings)
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            answers.append(ask(service, KNOWN, ads))

    thread = threading.Thread(target=hammer)
    thread.start()
    for version in range(2, 12):
        market.promote(second if version % 2 == 0 else first, version=version)
        service.look()
    stop.set()
    thread.join()

    assert {answer["bundle"] for answer in answers} == set(expected)
    for answer in answers:
        np.testing.assert_allclose(
            answer["probabilities"], expected[answer["bundle"]], atol=1e-9, rtol=0
        )
    assert service.status()["loads"] == 11


def test_the_background_thread_follows_the_champion(
    market: TinyMarket, first: Bundle, second: Bundle, pointer: Path
) -> None:
    market.promote(first)
    service = BundleService(market.settings)
    service.start()
    try:
        market.promote(second, version=2)
        waited = threading.Event()
        for _ in range(100):
            if ask(service, KNOWN, [KNOWN])["bundle"] == second.fingerprint:
                break
            waited.wait(0.05)
        assert service.status()["version"] == 2
        assert service.is_following
    finally:
        service.stop()
    assert not service.is_following


def test_the_clock_is_the_snapshots_a_fixed_moment_or_now(
    market: TinyMarket, first: Bundle, pointer: Path, serving_settings: Change
) -> None:
    market.promote(first)
    materialize(market.settings, as_of=AS_OF + timedelta(hours=2))
    later = AS_OF + timedelta(hours=3)

    snapshot = ask(looking(serving_settings(clock="snapshot")), KNOWN, [KNOWN])
    fixed = ask(looking(serving_settings(clock=later)), KNOWN, [KNOWN])
    wall = ask(looking(serving_settings(clock="wall")), KNOWN, [KNOWN])

    assert snapshot["as_of"] == "2026-01-02T14:00:00Z"
    assert fixed["as_of"] == "2026-01-02T15:00:00Z"
    assert wall["as_of"] > "2026-01-03"
    ages = [a["features"]["medium"]["age_seconds"] for a in (snapshot, fixed)]
    assert ages[1] - ages[0] == pytest.approx(3600)
    assert wall["features"]["short"] == {"age_seconds": None, "stale": True}
    assert wall["features"]["medium"]["stale"]


def test_the_status_names_bundle_snapshot_and_clock(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    market.promote(first, version=5)
    status = looking(market.settings).status()

    assert (status["bundle"], status["version"]) == (first.fingerprint, 5)
    assert status["lineage"]["kind"] == "arms"
    assert status["clock"] == "snapshot"
    assert status["features"]["as_of"] == status["now"]
    assert json.loads(json.dumps(status)) == status


def test_one_request_is_scored_without_a_server(
    market: TinyMarket, first: Bundle, pointer: Path, serving_settings: Change
) -> None:
    market.promote(first)
    request: Request = market.requests(market.frame())[0]
    expected = ask(looking(market.settings), request.page, request.ads, time="2026-01-02T16:00:00Z")

    answer = score_once(
        serving_settings(clock="wall"),
        page=str(request.page),
        ads=[str(ad) for ad in request.ads],
        as_of=AS_OF + timedelta(hours=4),
    )

    assert answer.pop("request_id") != expected.pop("request_id")
    assert answer == expected


def test_the_command_refuses_what_is_no_product_or_no_pair(
    market: TinyMarket, first: Bundle, pointer: Path
) -> None:
    with pytest.raises(MissingArtefactError, match="no champion to score with"):
        score_once(market.settings, page=1, ads=[2])
    market.promote(first)
    with pytest.raises(RequestError, match="ad: products of this log are integers, got 'x'"):
        score_once(market.settings, page="1", ads=["x"])
    with pytest.raises(RequestError, match=r"context\.app: is not known"):
        score_once(market.settings, page=1, ads=[2], context=parse_context(["app=web"]))
    with pytest.raises(RequestError, match="name=value"):
        parse_context(["app"])


def test_settings_that_travelled_as_json_name_the_same_features(market: TinyMarket) -> None:
    written = json.dumps(market.settings.model_dump(mode="json"))
    read = parse_settings(json.loads(written), origin="test")

    assert read == market.settings
    assert feature_views(read) == feature_views(market.settings)


def test_a_tier_that_refuses_stale_values_answers_503_with_tier_and_age(
    market: TinyMarket, first: Bundle, pointer: Path, serving_settings: Change
) -> None:
    market.promote(first)
    materialize(market.settings, as_of=AS_OF)
    medium = market.settings.tiers.medium.model_copy(update={"on_stale": "refuse"})
    tiers = market.settings.tiers.model_copy(update={"medium": medium})

    def asked(hours: float) -> dict[str, Any]:
        settings = serving_settings(clock=AS_OF + timedelta(hours=hours))
        return ask(looking(settings.model_copy(update={"tiers": tiers})), KNOWN, [KNOWN])

    assert not asked(1)["features"]["medium"]["stale"]
    with pytest.raises(RefusedRequestError, match=r"features of tier medium are .* old") as refused:
        asked(medium.value_freshness_hours + 100)
    assert (refused.value.status, refused.value.code) == (503, "stale_features")
    assert refused.value.field == "medium"
    assert refused.value.allowed == {"age_seconds": 3600 * medium.value_freshness_hours}
