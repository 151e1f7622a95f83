"""Scoring a request from the tables equals scoring the frame that it would be."""

import gc
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.online import OnlineFeatures
from driftline.platform.bundle import Bundle
from driftline.platform.scorer import Scorer
from driftline.serving.request_scorer import RequestScorer

KEYS = st.one_of(st.integers(99_999, 100_075), st.integers(-5, 5), st.just(2**62))
CONTEXT = st.dictionaries(
    st.sampled_from(["application", "hour_of_week"]),
    st.one_of(st.none(), st.sampled_from(["app0", "app1", "17", "never seen"])),
)


@pytest.fixture(scope="module")
def features(market: TinyMarket) -> OnlineFeatures:
    return OnlineFeatures.open(market.settings)


@pytest.fixture(scope="module")
def scorer(first: Bundle) -> Scorer:
    return Scorer.of(first)


@pytest.fixture(scope="module", params=["folded", "from tables", "folded too late"])
def requests(
    scorer: Scorer, features: OnlineFeatures, request: pytest.FixtureRequest
) -> RequestScorer:
    found = RequestScorer(scorer, max_folded_bytes=10**6)
    if request.param == "folded":
        found.prepare(features.version)
        assert len(found._folded) == 1
    elif request.param == "folded too late":
        found.prepare(OnlineFeatures.open(features._settings).version)  # of another reader
    return found


@settings(max_examples=150)
@given(
    page=KEYS,
    ads=st.lists(KEYS, max_size=40),
    context=CONTEXT,
    hours=st.sampled_from([0.0, 0.5, 3.0, 400.0, 5_000.0]),
)
def test_a_request_scores_as_its_frame(
    features: OnlineFeatures,
    scorer: Scorer,
    requests: RequestScorer,
    page: int,
    ads: list[int],
    context: dict[str, Any],
    hours: float,
) -> None:
    read = features.read(page, ads, context=context, now=AS_OF + timedelta(hours=hours))

    found = requests.score(read)

    np.testing.assert_allclose(found.probabilities, scorer.score(read.columns), atol=1e-6)
    ids = np.column_stack([read.columns[name] for name in ("page__text_id", "ad__text_id")])
    uncached = (scorer.text_rows(read.columns) < 0) & (ids > 0)
    named = np.zeros(len(ads) + 1, bool) if found.uncached is None else found.uncached
    assert named[1:].tolist() == uncached[:, 1].tolist()
    if ads:
        assert named[0] == uncached[0, 0]


def test_another_snapshot_brings_its_own_categories(
    market: TinyMarket, features: OnlineFeatures, requests: RequestScorer, scorer: Scorer
) -> None:
    """Codes of a table mean nothing in another one."""
    again = OnlineFeatures.open(market.settings)
    for source in (features, again, features):
        read = source.read(100_001, [100_002, 100_003], context={}, now=AS_OF)
        assert read.parts[0].found.table is not None
        np.testing.assert_allclose(
            requests.score(read).probabilities, scorer.score(read.columns), atol=1e-6
        )


def test_a_prepared_snapshot_costs_no_request_a_mapping(
    features: OnlineFeatures, scorer: Scorer
) -> None:
    fresh = RequestScorer(scorer)
    fresh.prepare(features.version)
    mapped = {table: dict(columns) for table, columns in fresh._rows._known.items()}
    assert mapped

    fresh.score(features.read(100_001, [100_002, 100_003], context={}, now=AS_OF))

    assert {table: dict(columns) for table, columns in fresh._rows._known.items()} == mapped


def test_a_catalogue_too_large_is_scored_from_the_tables(
    features: OnlineFeatures, scorer: Scorer
) -> None:
    small = RequestScorer(scorer, max_folded_bytes=10)
    small.prepare(features.version)
    assert not small._folded


def test_what_was_folded_goes_with_its_snapshot(market: TinyMarket, scorer: Scorer) -> None:
    features = OnlineFeatures.open(market.settings)
    requests = RequestScorer(scorer, max_folded_bytes=10**6)
    requests.prepare(features.version)
    assert len(requests._folded) == 1
    del features
    gc.collect()
    assert not requests._folded
