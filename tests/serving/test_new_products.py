"""A product that came after the bundle: encoded, served by its own text, never by half of it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.texts import read_texts
from driftline.pipelines.catalogue_vectors import encode_catalogue
from driftline.platform.bundle import Bundle
from driftline.platform.errors import ArtefactError, MissingArtefactError
from driftline.platform.traffic import BundleRef, Canary, Traffic, write_traffic
from driftline.platform.vector_deltas import deltas_folder, known_vectors
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace
from driftline.serving.service import BundleService

LATER = AS_OF + 2 * HOUR
KNOWN = 100_001


@pytest.fixture
def short_of_half(market: TinyMarket, pointer: Path) -> Iterator[Bundle]:
    """The champion: it lacks the vectors of half the texts."""
    num_texts = read_texts(market.settings).num_rows
    bundle = market.bundle(seed=2, num_uncached=num_texts // 2)
    market.promote(bundle)
    yield bundle
    for path in deltas_folder(bundle).glob("*"):
        path.unlink()


def ask(service: BundleService, ads: list[int]) -> dict[str, Any]:
    body = {"page_product_id": KNOWN, "ad_product_ids": ads, "request_id": "view-1"}
    answer = orjson.loads(service.score(orjson.dumps(body)))
    assert isinstance(answer, dict)
    return answer


def some_ads(market: TinyMarket) -> list[int]:
    return list(dict.fromkeys(market.frame()["ad_product_id"].to_pylist()))[:30]


def looking(market: TinyMarket) -> BundleService:
    service = BundleService(market.settings)
    service.look()
    return service


def test_new_products_are_served_by_their_own_text_after_one_look(
    market: TinyMarket, second: Bundle, short_of_half: Bundle
) -> None:
    ads = some_ads(market)
    market.promote(second)
    expected = ask(looking(market), ads)
    market.promote(short_of_half, version=2)
    service = looking(market)
    before = ask(service, ads)
    loads = service.status()["loads"]
    assert {entry["reason"] for entry in before["fallbacks"]["ads"]} == {"neutral_text"}

    report = encode_catalogue(market.settings, as_of=LATER)
    assert ask(service, ads) == before
    service.look()

    after = ask(service, ads)
    assert after["fallbacks"] == {"page": None, "ads": []}
    assert after["bundle"] == before["bundle"]
    np.testing.assert_allclose(after["probabilities"], expected["probabilities"], atol=1e-6)
    assert service.status()["loads"] == loads  # nothing was loaded anew
    assert [one.bundle for one in report.bundles] == [short_of_half.fingerprint]
    again = encode_catalogue(market.settings, as_of=LATER)
    assert [(one.num_texts, one.delta) for one in again.bundles] == [(0, None)]
    np.testing.assert_allclose(
        ask(looking(market), ads)["probabilities"], after["probabilities"], atol=1e-9
    )


def test_concurrent_answers_know_all_of_the_new_texts_or_none(
    market: TinyMarket, short_of_half: Bundle
) -> None:
    ads = some_ads(market)
    service = looking(market)
    expected = [ask(service, ads)]
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            answers.append(ask(service, ads))

    thread = threading.Thread(target=hammer)
    thread.start()
    encode_catalogue(market.settings, as_of=LATER)
    service.look()
    expected.append(ask(service, ads))
    stop.set()
    thread.join()
    assert expected[0]["fallbacks"] != expected[1]["fallbacks"]
    for answer in answers:
        (whole,) = (one for one in expected if one["fallbacks"] == answer["fallbacks"])
        np.testing.assert_allclose(answer["probabilities"], whole["probabilities"], atol=1e-9)


def test_a_canary_gets_the_new_texts_from_its_own_arms(
    market: TinyMarket, first: Bundle, short_of_half: Bundle
) -> None:
    num_texts = read_texts(market.settings).num_rows
    canary = market.bundle(seed=5, num_uncached=num_texts // 3)
    bundles = Workspace.of(market.settings).bundles
    test = Canary(_ref(canary, 9), share=0.5, salt="s", started_at=AS_OF)
    write_traffic(bundles, Traffic(canary=test, shadows=(_ref(first, 8),)))
    try:
        report = encode_catalogue(market.settings, as_of=LATER)
    finally:
        (bundles / "TRAFFIC").unlink()
    numbers = {one.bundle: one.num_texts for one in report.bundles}
    assert numbers[first.fingerprint] == 0
    assert 0 < numbers[canary.fingerprint] < numbers[short_of_half.fingerprint]
    whole = market.bundle(seed=5).vectors
    found = known_vectors(canary)
    np.testing.assert_allclose(found.page, whole.part(found.text_id).page, atol=1e-5)


def test_a_damaged_traffic_file_is_named_before_anything_is_encoded(
    market: TinyMarket, short_of_half: Bundle
) -> None:
    path = Workspace.of(market.settings).bundles / "TRAFFIC"
    path.write_text("{}")
    try:
        with pytest.raises(ArtefactError, match=r"TRAFFIC lacks 'changed_at'; .*--stop"):
            encode_catalogue(market.settings, as_of=LATER)
    finally:
        path.unlink()
    assert not list(deltas_folder(short_of_half).glob("*"))


def test_without_a_champion_there_is_nothing_to_encode_for(
    market: TinyMarket, pointer: Path
) -> None:
    with pytest.raises(MissingArtefactError, match="refresh arms"):
        encode_catalogue(market.settings, as_of=LATER)


def _ref(bundle: Bundle, version: int) -> BundleRef:
    return BundleRef(version, bundle.fingerprint, bundle.path)
