"""Who answers which request: shares, sticky keys, and bundles that come and go."""

import json
import operator
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_market import TinyMarket

from driftline.platform.arm_health import read_health
from driftline.platform.bundle import Bundle
from driftline.platform.errors import ArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import BundleRef, Canary, Traffic, read_traffic, write_traffic
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.routes import key_place
from driftline.serving.service import BundleService

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
KNOWN = 100_001

Change = Callable[..., DriftlineSettings]


def ref(bundle: Bundle, version: int) -> BundleRef:
    return BundleRef(version, bundle.fingerprint, bundle.path.resolve())


def canary(bundle: Bundle, share: float, **changes: Any) -> Canary:
    return replace(Canary(ref(bundle, 2), share, "salt", NOW, step_at=NOW), **changes)


@pytest.fixture
def set_traffic(market: TinyMarket, pointer: Path) -> Iterator[Callable[[Traffic], None]]:
    """Writes ``TRAFFIC``; gone afterwards."""
    bundles = Workspace.of(market.settings).bundles
    yield lambda traffic: write_traffic(bundles, traffic)
    (bundles / "TRAFFIC").unlink(missing_ok=True)


def ask(service: BundleService, key: str | None = None, ads: int = 1) -> dict[str, Any]:
    body: dict[str, Any] = {"page_product_id": KNOWN, "ad_product_ids": list(range(ads))}
    answer = orjson.loads(service.score(orjson.dumps(body | ({"request_key": key} if key else {}))))
    assert isinstance(answer, dict)
    return answer


# --- keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_share_of_the_keys_is_a_share_within_binomial_bounds(share: float) -> None:
    num = 20_000
    inside = sum(key_place("salt", f"session-{index}") < share for index in range(num))
    bound = 4.5 * np.sqrt(num * share * (1 - share))
    assert abs(inside - num * share) < bound


def test_keys_are_spread_evenly_and_independently_between_salts() -> None:
    places = np.array([[key_place(salt, f"k{i}") for salt in ("a", "b")] for i in range(20_000)])
    for column in places.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        chi_square = ((counts - 1_000) ** 2 / 1_000).sum()
        assert chi_square < 50  # 19 degrees of freedom: exceeded once in 7,000
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.03


@given(key=st.text(min_size=1, max_size=40), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_share_keeps_every_key_of_a_smaller_one(key: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    place = key_place("salt", key)
    assert 0 <= place < 1
    assert not (place < low) or place < high


def test_another_process_puts_every_key_at_the_same_place() -> None:
    keys = ["", "a", "session-17", "ключ", "🙂", "x" * 256]
    code = (
        "import json, sys; from driftline.serving.rollout.routes import key_place; "
        "print(json.dumps([key_place('salt', key) for key in json.load(sys.stdin)]))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(keys),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert json.loads(found.stdout) == [key_place("salt", key) for key in keys]


# --- the file -----------------------------------------------------------------------------


def test_traffic_reads_back_as_it_was_written_also_after_a_move(
    tmp_path: Path, first: Bundle, second: Bundle
) -> None:
    here = tmp_path / "here"
    folder = here / first.fingerprint
    folder.mkdir(parents=True)
    inside = BundleRef(2, first.fingerprint, folder.resolve())
    plan = Canary(inside, 0.25, "salt", NOW, step=3, step_at=NOW)
    traffic = Traffic(plan, (ref(second, 4),), NOW, "ann")
    write_traffic(here, traffic)
    assert read_traffic(here) == traffic
    assert plan.experiment == "salt/3"
    here.rename(tmp_path / "there")
    moved = read_traffic(tmp_path / "there").canary
    assert moved is not None
    assert moved.bundle.path == (tmp_path / "there" / first.fingerprint).resolve()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_a_share_that_empties_an_arm_is_refused(
    tmp_path: Path, first: Bundle, share: float
) -> None:
    write_traffic(tmp_path, Traffic(canary(first, share)))
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        read_traffic(tmp_path)


# --- following ----------------------------------------------------------------------------


def test_a_canary_answers_its_keys_and_only_those(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    keys = [f"session-{index}" for index in range(60)]
    set_traffic(Traffic(canary(second, 0.3)))
    service.look()
    small = {key: ask(service, key)["bundle"] for key in keys}
    set_traffic(Traffic(canary(second, 0.6, step=2)))
    service.look()
    large = {key: ask(service, key)["bundle"] for key in keys}

    for share, found in ((0.3, small), (0.6, large)):
        for key, bundle in found.items():
            expected = second if key_place("salt", key) < share else first
            assert bundle == expected.fingerprint
    assert {small[key] for key in keys} == {first.fingerprint, second.fingerprint}

    set_traffic(Traffic())
    service.look()
    assert {ask(service, key)["bundle"] for key in keys[:10]} == {first.fingerprint}


def test_the_status_names_every_live_bundle_with_its_share(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    third = market.bundle(seed=4)
    market.promote(first)
    set_traffic(Traffic(canary(second, 0.25), (ref(third, 3),)))
    service = BundleService(market.settings)
    service.look()
    try:
        routes = service.status()["routes"]
        assert [(r["role"], r["bundle"], r["version"], r["share"]) for r in routes] == [
            ("champion", first.fingerprint, 1, 0.75),
            ("canary", second.fingerprint, 2, 0.25),
            ("shadow", third.fingerprint, 3, 0.0),
        ]
        assert json.loads(json.dumps(service.status())) == service.status() | {
            "uptime_seconds": pytest.approx(service.status()["uptime_seconds"], abs=5)
        }
    finally:
        service.stop()


def test_requests_without_a_key_are_drawn_by_lot(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    set_traffic(Traffic(canary(second, 0.5)))
    service = BundleService(market.settings)
    service.look()
    answers = [ask(service) for _ in range(60)]
    drawn = [answer["bundle"] == second.fingerprint for answer in answers]
    by_made_up_id = [key_place("salt", answer["request_id"]) < 0.5 for answer in answers]
    assert 8 < sum(drawn) < 52  # outside once in 10^9
    assert 8 < sum(map(operator.eq, drawn, by_made_up_id)) < 52, "the server's id decided"


def test_a_canary_that_cannot_be_used_is_left_out_and_named(
    market: TinyMarket, first: Bundle, altered: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    set_traffic(Traffic(canary(altered, 0.9)))
    service = BundleService(market.settings)
    for _ in range(3):
        service.look()

    assert {ask(service, f"k{index}")["bundle"] for index in range(20)} == {first.fingerprint}
    status = service.status()
    assert status["last_refusal"]["fingerprint"] == altered.fingerprint
    assert (status["loads"], status["refusals"]) == (1, 1)
    assert [route["role"] for route in status["routes"]] == ["champion"]


REST = '"shadow": [], "changed_at": null, "by": null'
DAMAGED = {
    "{": "is no JSON",
    "\x00" * 300: "is no JSON",
    "[]": r"must hold a JSON object, got \[\]",
    "{}": "lacks 'changed_at'",
    f'{{"canary": 3, {REST}}}': "holds a value that means nothing",
    f'{{"canary": {{}}, {REST}}}': "lacks 'share'",
    f'{{"canary": {{"share": 2}}, {REST}}}': r"share must lie between 0 and 1, got 2\.0",
    '{"canary": null, "shadow": [{"version": "x"}], "changed_at": null}': "means nothing",
    '{"canary": null, "shadow": [], "changed_at": "today", "by": null}': "time must be ISO 8601",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_broken_traffic_file_changes_nothing_and_is_explained(
    market: TinyMarket,
    first: Bundle,
    second: Bundle,
    set_traffic: Callable[[Traffic], None],
    content: str,
) -> None:
    market.promote(first)
    set_traffic(Traffic(canary(second, 0.5)))
    service = BundleService(market.settings)
    service.look()
    before = service.routes
    path = Workspace.of(market.settings).bundles / "TRAFFIC"
    path.write_text(content)
    service.look()
    service.look()

    assert service.routes is before
    assert service.status()["refusals"] == 1
    with pytest.raises(ArtefactError, match=DAMAGED[content]) as damaged:
        read_traffic(path.parent)
    assert str(damaged.value).startswith(f"{path} ")
    assert "`driftline traffic CONFIG --stop` writes it anew" in str(damaged.value)


def test_a_promoted_canary_is_not_loaded_again(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    set_traffic(Traffic(canary(second, 0.5)))
    service = BundleService(market.settings)
    service.look()
    market.promote(second, version=2)
    service.look()
    both = service.status()
    set_traffic(Traffic())
    service.look()

    assert both["loads"] == service.status()["loads"] == 2
    assert [route["share"] for route in both["routes"]] == [1.0]
    assert both["version"] == 2


def test_a_bundle_that_nobody_names_is_let_go(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    set_traffic(Traffic(canary(second, 0.5)))
    service = BundleService(market.settings)
    service.look()
    assert service.routes.canary is not None
    dropped = weakref.ref(service.routes.canary.prepared)
    scorer = weakref.ref(service.routes.canary.prepared.scorer)
    ask(service, "key")
    set_traffic(Traffic())
    service.look()
    assert dropped() is None
    assert scorer() is None


def test_warming_up_replays_the_newest_requests(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    for number in range(1, 100):
        ask(service, ads=number)
    replayed: list[int] = []
    score = service._answer

    def watch(*arguments: Any, **more: Any) -> Any:
        replayed.append(len(arguments[1].ads))
        return score(*arguments, **more)

    service._answer = watch  # type: ignore[method-assign]
    set_traffic(Traffic(canary(second, 0.5)))
    service.look()
    assert replayed[1:] == list(range(36, 100))


# --- failing ------------------------------------------------------------------------------


def test_where_the_canary_fails_the_champion_answers_and_the_error_is_counted(
    market: TinyMarket,
    first: Bundle,
    second: Bundle,
    set_traffic: Callable[[Traffic], None],
    serving_settings: Change,
) -> None:
    market.promote(first)
    plan = canary(second, 0.5, salt="failing")
    set_traffic(Traffic(plan))
    delivery = market.settings.serving.delivery.model_copy(update={"health_seconds": 1e-9})
    service = BundleService(serving_settings(delivery=delivery), replica="counting")
    service.look()
    assert service.routes.canary is not None
    keys = [f"key-{index}" for index in range(40)]
    others = [key for key in keys if key_place("failing", key) < 0.5]
    for key in keys:
        ask(service, key)
    # From now on its head answers NaN, as with weights that overflowed in training.
    calibration = service.routes.canary.prepared.scorer.calibration
    object.__setattr__(calibration, "slope", float("nan"))
    for key in keys:
        answer = ask(service, key)
        assert answer["bundle"] == first.fingerprint
        assert np.isfinite(answer["probabilities"]).all()
    service.look()

    workspace = Workspace.of(market.settings)
    health = read_health(workspace, plan.experiment, canary=second.fingerprint)
    assert (health.canary.answers, health.canary.errors) == (len(others), len(others))
    num_rest = 2 * (len(keys) - len(others))
    assert (health.champion.answers, health.champion.errors) == (num_rest, 0)
    assert 0 < health.canary.quantile(0.99) < 10
    service.stop()


# --- concurrency --------------------------------------------------------------------------


def test_whatever_is_swapped_every_answer_is_one_published_bundles_score(
    market: TinyMarket, first: Bundle, second: Bundle, set_traffic: Callable[[Traffic], None]
) -> None:
    third = market.bundle(seed=4)
    bundles = [first, second, third]
    expected = {}
    for bundle in bundles:
        market.promote(bundle)
        service = BundleService(market.settings)
        service.look()
        expected[bundle.fingerprint] = ask(service, ads=6)["probabilities"]
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def hammer(thread: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            answers.append(ask(service, f"{thread}-{number}", ads=6))

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    random = np.random.default_rng(0)
    for version in range(2, 14):
        champion, other, shadow = (bundles[index] for index in random.permutation(3))
        if random.random() < 0.7:
            market.promote(champion, version=version)
        share = float(random.uniform(0.1, 0.9))
        plan = canary(other, share, step=version) if random.random() < 0.8 else None
        set_traffic(Traffic(plan, (ref(shadow, 9),) if random.random() < 0.5 else ()))
        service.look()
    stop.set()
    for thread in threads:
        thread.join()
    service.stop()

    assert len({answer["bundle"] for answer in answers}) > 1
    for answer in answers:
        np.testing.assert_allclose(
            answer["probabilities"], expected[answer["bundle"]], atol=1e-9, rtol=0
        )
