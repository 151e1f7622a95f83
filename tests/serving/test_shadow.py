"""Shadows compare and never answer: their figures, their errors, what they drop."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.platform.delivery_settings import DeliverySettings
from driftline.platform.traffic import BundleRef, Traffic, write_traffic
from driftline.platform.workspace import Workspace
from driftline.serving.answers import Answer
from driftline.serving.rollout.routes import LiveBundle
from driftline.serving.rollout.shadow import ShadowScorer, rank_correlation
from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm

IDLE = DeliverySettings()


@given(
    first=st.lists(st.integers(0, 5), min_size=2, max_size=12),
    second=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_rank_correlation_equals_a_count_over_ranks(first: list[int], second: list[int]) -> None:
    second = second[: len(first)]

    def ranks(values: list[int]) -> list[float]:
        return [
            sum(other < value for other in values)
            + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    a, b = ranks(first), ranks(second)
    found = rank_correlation(np.array(first, float), np.array(second, float))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)


@pytest.fixture
def live(
    market: TinyMarket, first: Bundle, second: Bundle, pointer: Path
) -> Iterator[tuple[BundleService, LiveBundle, list[Answer]]]:
    """A service, a shadow for it, and answers with 1, 2, ... ads. The shadow's thread sleeps."""
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    shadow = service.try_out(BundleRef(2, second.fingerprint, second.path))
    ads = list(dict.fromkeys(market.frame()["ad_product_id"].to_pylist()))
    answers = []
    for number in range(1, 9):
        body = {"page_product_id": 100_001, "ad_product_ids": ads[:number]}
        answers.append(service.answer(orjson.dumps(body), JsonForm()))
    yield service, shadow, answers
    service.stop()


class Resting(ShadowScorer):
    """Scores when told to, in the test's own thread."""

    def _run(self) -> None:
        return


def after_all(answers: list[Answer], shadow: LiveBundle) -> dict[str, Any]:
    """Figures of a shadow that has scored all answers."""
    scorer = Resting(IDLE)
    scorer.follow((shadow,))
    for answer in answers:
        scorer.answered(answer)
    while scorer.score_next():
        pass
    (figures,) = scorer.status()["bundles"]
    assert isinstance(figures, dict)
    return figures


def test_figures_are_those_of_scoring_everything_twice(
    live: tuple[BundleService, LiveBundle, list[Answer]],
) -> None:
    _, shadow, answers = live
    figures = after_all(answers, shadow)

    moved, ranked, other_top = [], [], []
    for answer in answers:
        ours = answer.probabilities
        theirs = shadow.prepared.scorer.score(answer.read.columns)
        pairs = zip(np.log(ours / (1 - ours)), np.log(theirs / (1 - theirs)), strict=True)
        moved += [abs(a - b) for a, b in pairs]
        if len(ours) > 1:
            orders = [np.argsort(np.argsort(values)) for values in (ours, theirs)]
            ranked.append(np.corrcoef(orders[0], orders[1])[0, 1])
            other_top.append(ours.argmax() != theirs.argmax())
    assert figures["requests"] == len(answers)
    assert figures["mean_logit_difference"] == pytest.approx(np.mean(moved), rel=1e-6)
    assert figures["largest_logit_difference"] == pytest.approx(np.max(moved), rel=1e-6)
    assert figures["mean_rank_correlation"] == pytest.approx(np.mean(ranked), rel=1e-6)
    assert figures["share_other_top_ad"] == pytest.approx(np.mean(other_top))
    assert figures["mean_milliseconds"] > 0
    assert figures["errors"] == 0


def test_a_shadow_like_the_champion_agrees_in_everything(
    live: tuple[BundleService, LiveBundle, list[Answer]], first: Bundle
) -> None:
    service, _, answers = live
    twin = service.try_out(BundleRef(7, first.fingerprint, first.path))
    object.__setattr__(twin.prepared.bundle, "manifest", {"fingerprint": "a twin"})
    figures = after_all(answers, twin)
    assert figures["requests"] == len(answers)
    assert figures["largest_logit_difference"] < 1e-4  # frames and requests differ by rounding
    assert figures["mean_rank_correlation"] == pytest.approx(1)
    assert figures["share_other_top_ad"] == 0


def test_what_does_not_fit_is_dropped_and_counted(
    live: tuple[BundleService, LiveBundle, list[Answer]],
) -> None:
    _, shadow, answers = live
    scorer = Resting(DeliverySettings(max_shadow_waiting=3))
    scorer.answered(answers[0])  # nobody to compare with
    assert scorer.status()["waiting"] == 0
    scorer.follow((shadow,))
    for answer in answers:
        scorer.answered(answer)
    assert (scorer.status()["waiting"], scorer.status()["dropped"]) == (3, len(answers) - 3)
    scorer.follow(())
    assert scorer.status() == {"waiting": 0, "dropped": len(answers) - 3, "bundles": []}


def test_a_shadow_that_fails_is_counted_and_harms_nobody(
    live: tuple[BundleService, LiveBundle, list[Answer]],
) -> None:
    _, shadow, answers = live
    object.__setattr__(shadow.prepared.scorer.calibration, "slope", float("nan"))
    figures = after_all(answers, shadow)
    assert (figures["requests"], figures["errors"]) == (0, len(answers))
    assert figures["mean_logit_difference"] is None


def test_the_service_lets_a_shadow_of_the_traffic_file_score_its_answers(
    market: TinyMarket, first: Bundle, second: Bundle, pointer: Path
) -> None:
    market.promote(first)
    bundles = Workspace.of(market.settings).bundles
    ref = BundleRef(2, second.fingerprint, second.path.resolve())
    write_traffic(bundles, Traffic(shadows=(ref,)))
    service = BundleService(market.settings)
    try:
        service.look()
        body = orjson.dumps({"page_product_id": 100_001, "ad_product_ids": [1, 2, 3]})
        found = {orjson.loads(service.score(body))["bundle"] for _ in range(5)}
        assert found == {first.fingerprint}
        wait_until(lambda: service.status()["shadows"]["bundles"][0]["requests"] == 5)
    finally:
        (bundles / "TRAFFIC").unlink()
        service.stop()


def wait_until(true: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_thread_keeps_to_its_share_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's: after each request it rests in proportion to the work."""
    times: list[float] = []
    now = 0.0

    class Busy(ShadowScorer):
        def score_next(self) -> bool:
            nonlocal now
            times.append(now)
            now += 0.001 * len(times)
            if len(times) == 6:
                self._stop.set()
            return True

    def rest(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return False

    scorer: Any = Busy(DeliverySettings(max_shadow_load=0.25))
    monkeypatch.setattr("driftline.serving.rollout.shadow.time.perf_counter", lambda: now)
    monkeypatch.setattr(scorer._stop, "wait", rest)
    scorer._run()
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps == pytest.approx([4 * 0.001 * number for number in range(1, 6)])
