"""Reading a canary out and acting on it: from served requests to a promoted or withdrawn bundle."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import yaml
from tests.tiny_market import TinyMarket, tiny_settings

from driftline.pipelines.answered_rows import AnsweredRows, read_answered_rows
from driftline.pipelines.cli import main
from driftline.pipelines.read_out import ReadOut, judge_rows, read_out, read_out_text
from driftline.pipelines.traffic import act_on_canary, traffic_facts, traffic_text, watch_canaries
from driftline.pipelines.traffic_decision import decide
from driftline.platform import metrics
from driftline.platform.arm_health import (
    ArmCounts,
    ArmKey,
    ExperimentHealth,
    health_folder,
    write_health,
)
from driftline.platform.bundle import Bundle
from driftline.platform.delivery_settings import DeliverySettings
from driftline.platform.errors import MissingArtefactError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import BundleRef, Canary, read_traffic
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace
from driftline.serving.observing.decision_log import DecisionLog
from driftline.serving.rollout.audit import audit_path
from driftline.serving.rollout.delivery import Delivery
from driftline.serving.service import BundleService

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
RULES = DeliverySettings()
CANARY = Canary(BundleRef(2, "ours", Path("ours")), 0.5, "salt", NOON, step_at=NOON)
GOOD_HEALTH = ExperimentHealth(ArmCounts(), ArmCounts(), num_replicas=1)


def healthy(answers: int = 10_000, *, errors: int = 0, milliseconds: float = 1.0) -> ArmCounts:
    counts = ArmCounts(errors=errors)
    random = np.random.default_rng(answers)
    for seconds in milliseconds / 1e3 * random.lognormal(0, 0.3, answers):
        counts.add(seconds)
    return counts


@pytest.fixture(scope="module")
def health() -> ExperimentHealth:
    return ExperimentHealth(healthy(), healthy(9_000), num_replicas=1)


def simulated(
    *,
    effect: float = 0.0,
    noise: float = 0.0,
    level: float = 0.0,
    num_rows: int = 60_000,
    share: float = 0.5,
    seed: int = 0,
) -> AnsweredRows:
    """An experiment: keys with tastes of their own, in two arms.

    Args:
        effect: On the log-odds of a click in the canary's arm.
        noise: Of the canary's log-odds, beside what the champion errs.
        level: Added to the canary's log-odds.
        num_rows: Impressions.
        share: Of the keys in the canary's arm.
        seed: Of everything.
    """
    random = np.random.default_rng(seed)
    num_keys = num_rows // 10
    keys = random.integers(0, num_keys, num_rows)
    is_canary = (random.random(num_keys) < share)[keys]
    logits = -2.0 + random.normal(0, 0.6, num_keys)[keys] + random.normal(0, 0.8, num_rows)
    chance = 1 / (1 + np.exp(-(logits + effect * is_canary)))
    error = random.normal(0, 0.2, num_rows)
    error += is_canary * (effect + level + noise * random.normal(0, 1, num_rows))
    return AnsweredRows(
        is_canary=is_canary,
        bundle=np.where(is_canary, "ours", "theirs").astype(object),
        keys=keys.astype(str).astype(object),
        clicks=(random.random(num_rows) < chance).astype(np.float64),
        probabilities=1 / (1 + np.exp(-(logits + error))),
        ads=(random.zipf(1.4, num_rows) % 500).astype(object),
        is_new=random.random(num_rows) < 0.1,
        num_decisions=num_rows,
    )


def found(rows: AnsweredRows, health: ExperimentHealth) -> ReadOut:
    return judge_rows(CANARY, health, rows, rules=RULES)


def later(hours: float = 2.0) -> datetime:
    return NOON + timedelta(hours=hours)


# --- the read-out -------------------------------------------------------------------------


def test_slices_are_cut_and_measured_as_a_loop_would(health: ExperimentHealth) -> None:
    rows = simulated(num_rows=6_000, noise=0.5)
    counts = Counter(rows.ads.tolist())
    head, shown = set(), 0
    for ad in sorted(counts, key=lambda ad: (-counts[ad], ad)):
        if shown >= len(rows) / 2:
            break
        head.add(ad)
        shown += counts[ad]
    masks = {
        "all": [True] * len(rows),
        "head": [ad in head for ad in rows.ads],
        "tail": [ad not in head for ad in rows.ads],
        "new items": list(rows.is_new),
    }
    for part in found(rows, health).slices:
        rates = []
        for place, in_canary in enumerate((False, True)):
            chosen = [
                row
                for row in range(len(rows))
                if masks[part.name][row] and rows.is_canary[row] == in_canary
            ]
            clicks, predicted = rows.clicks[chosen], rows.probabilities[chosen]
            rates.append(clicks.mean())
            compared = part.comparison
            assert part.sizes[place].num_rows == len(chosen)
            assert part.sizes[place].num_keys == len({rows.keys[row] for row in chosen})
            assert compared.ne[place].value == pytest.approx(
                metrics.normalised_entropy(clicks, predicted)
            )
            assert compared.calibration[place].value == pytest.approx(
                metrics.calibration_ratio(clicks, predicted)
            )
            assert part.auc[place] == pytest.approx(metrics.roc_auc(clicks, predicted))
        assert part.comparison.lift.value == pytest.approx(rates[1] / rates[0] - 1)


def test_too_few_rows_are_not_interpreted(health: ExperimentHealth) -> None:
    few = found(simulated(num_rows=1_000, noise=2.0), health)
    assert few.overall is not None
    assert not few.overall.enough
    assert few.to_json()["slices"]["all"]["lift"] is None
    assert "too few to tell: impressions/clicks/keys" in few.problems[0]
    assert "too few to tell" in read_out_text(few)
    assert decide(few, RULES, now=later()).action == "wait"


def test_an_arm_that_got_other_keys_than_drawn_is_not_compared(health: ExperimentHealth) -> None:
    """As when the canary's answers were shown less often: then clicks per impression mislead."""
    rows = simulated(share=0.4, noise=2.0)
    uneven = found(rows, health)
    assert not uneven.is_balanced
    assert "instead of 50.0%" in uneven.problems[-1]
    assert decide(uneven, RULES, now=later()).action == "wait"
    assert found(simulated(), health).is_balanced


def test_what_the_champion_answered_in_the_canarys_place_does_not_count_for_its_fit(
    health: ExperimentHealth,
) -> None:
    rows = simulated(num_rows=20_000)
    stands_in = rows.is_canary & (np.arange(len(rows)) % 4 == 0)
    bundle, predicted = rows.bundle.copy(), rows.probabilities.copy()
    bundle[stands_in], predicted[stands_in] = "theirs", 0.999
    mixed = found(replace(rows, bundle=bundle, probabilities=predicted), health).overall
    assert mixed is not None
    own = rows.is_canary & ~stands_in
    expected = metrics.normalised_entropy(rows.clicks[own], rows.probabilities[own])
    assert mixed.comparison.ne[1].value == pytest.approx(expected)
    assert mixed.comparison.click_rates[1].value == pytest.approx(
        rows.clicks[rows.is_canary].mean()
    )


# --- deciding -----------------------------------------------------------------------------


def test_a_canary_as_good_as_the_champion_is_promoted(health: ExperimentHealth) -> None:
    wide = RULES.model_copy(update={"max_ctr_drop": 0.15, "max_ne_excess": 0.05})
    decision = decide(found(simulated(), health), wide, now=later())
    assert decision.action == "promote", decision.reasons
    assert "lift" in decision.reasons[0]


BAD: dict[str, tuple[dict[str, float], str]] = {
    "it fits worse": ({"noise": 2.5, "level": -2.0}, "NE is higher by"),
    "it promises too much": ({"level": 0.8}, "calibration is"),
    "its ads are clicked less": ({"effect": -0.6}, "the click rate is lower by"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_worse_canary_is_withdrawn(name: str, health: ExperimentHealth) -> None:
    changes, words = BAD[name]
    decision = decide(found(simulated(**changes), health), RULES, now=later(0))  # type: ignore[arg-type]
    assert decision.action == "withdraw", decision.reasons
    assert any(words in reason for reason in decision.reasons), decision.reasons


@pytest.mark.parametrize(
    ("canary", "words"),
    [
        (healthy(40, errors=4), "4 of 44 requests failed"),
        (healthy(3_000, milliseconds=3.0), "p99 is"),
    ],
    ids=["errors", "times"],
)
def test_errors_and_times_are_enough_to_withdraw_without_any_log(
    canary: ArmCounts, words: str
) -> None:
    health = ExperimentHealth(healthy(), canary, num_replicas=1)
    blind = ReadOut(CANARY, health, (), None, ("no log",))
    decision = decide(blind, RULES, now=later(0))
    assert decision.action == "withdraw"
    assert words in decision.reasons[0]


def test_a_few_bad_moments_are_no_reason_to_withdraw(health: ExperimentHealth) -> None:
    """One error, a champion that fails as often, times that differ by chance: all are usual."""
    usual = [
        (healthy(), healthy(2_000, errors=1)),
        (healthy(errors=500), healthy(2_000, errors=100)),
        (healthy(), healthy(5_000, milliseconds=1.2)),
        (ArmCounts(), healthy(50, milliseconds=30)),
    ]
    for champion, canary in usual:
        blind = ReadOut(CANARY, ExperimentHealth(champion, canary, 1), (), None, ("no log",))
        decision = decide(blind, RULES, now=later())
        assert decision.action == "wait", decision.reasons
        assert decision.reasons == ("no log",)


@pytest.mark.parametrize(
    ("changes", "hours", "words"),
    [
        ({"promote_when": "never"}, 2.0, "left to a person"),
        ({"promote_when": "better"}, 2.0, "the lift may be as low as"),
        ({}, 0.5, "0.5 hours at this share"),
        ({"max_ne_excess": 0.0}, 2.0, "NE may be higher by"),
    ],
)
def test_a_canary_waits_until_all_is_shown(
    changes: dict[str, Any], hours: float, words: str, health: ExperimentHealth
) -> None:
    wide = {"max_ctr_drop": 0.15, "max_ne_excess": 0.05}
    rules = RULES.model_copy(update=wide | changes)
    decision = decide(found(simulated(), health), rules, now=later(hours))
    assert decision.action == "wait"
    assert any(words in reason for reason in decision.reasons), decision.reasons


@pytest.mark.slow
def test_equal_canaries_are_seldom_withdrawn_however_often_one_looks(
    health: ExperimentHealth,
) -> None:
    """Three statements at 95 % each, and 15 looks: at most 15 in 100 experiments."""
    strict = RULES.model_copy(update={"max_ctr_drop": 0.0, "max_ne_excess": 0.0})
    withdrawn = 0
    for seed in range(60):
        rows = simulated(num_rows=30_000, seed=seed)
        for until in range(4_000, 30_001, 2_000):
            seen = {
                name: value[:until] for name, value in vars(rows).items() if name != "num_decisions"
            }
            part = AnsweredRows(**seen, num_decisions=until)
            if decide(found(part, health), strict, now=later(0)).action == "withdraw":
                withdrawn += 1
                break
    assert withdrawn <= 9 + 7  # a binomial's 99.5 % point


# --- from requests to decisions -----------------------------------------------------------


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    few = {"min_impressions": 50, "min_clicks": 1, "min_keys": 10, "health_seconds": 1e-9}
    serving = {
        "clock": "snapshot",
        "ingress": "proxy",
        "decision_log": {"sample_rate": 1.0},
        "delivery": few | {"decide_seconds": 0.01},
    }
    return TinyMarket.make(tiny_settings(tmp_path_factory.mktemp("traffic"), serving=serving))


@pytest.fixture(scope="module")
def bundles(market: TinyMarket) -> tuple[Bundle, Bundle]:
    """Registered as versions 1 and 2."""
    registry = Registry(market.settings, Workspace.of(market.settings))
    found = market.bundle(seed=1), market.bundle(seed=2)
    for bundle in found:
        registry.register(bundle.path, fingerprint=bundle.fingerprint, lineage={}, metrics={})
    return found


@pytest.fixture
def delivery(market: TinyMarket, bundles: tuple[Bundle, Bundle]) -> Iterator[Delivery]:
    """Version 1 is the champion, version 2 the canary."""
    workspace = Workspace.of(market.settings)
    delivery = Delivery(market.settings, by="ann", via="test")
    delivery.deploy_champion("1")
    delivery.deploy_canary("2", share=0.4)
    yield delivery
    for name in ("CHAMPION", "TRAFFIC"):
        (workspace.bundles / name).unlink(missing_ok=True)
    for path in workspace.decisions.glob("*/*.parquet"):
        path.unlink()


def serve(market: TinyMarket) -> list[dict[str, Any]]:
    """Let a service answer what the market was asked in two hours; the rows it should log."""
    log = DecisionLog(market.settings, replica="one")
    service = BundleService(market.settings, replica="one", observers=[log])
    service.look()
    frame = market.frame(num_hours=2)
    clicks = frame["clicked"].to_pylist()
    names = frame["request_id"].to_pylist()
    rows = []
    for number, request in enumerate(market.requests(frame)):
        key = f"user-{number % 150}"
        body = {
            "page_product_id": request.page,
            "ad_product_ids": request.ads,
            "context": request.context,
            "time": request.time.isoformat(),
            "request_id": names[request.rows[0]],
            "request_key": key,
        }
        answer = orjson.loads(service.score(orjson.dumps(body)))
        rows += [
            {
                "bundle": answer["bundle"],
                "key": key,
                "ad": ad,
                "clicked": clicks[row],
                "score": score,
            }
            for ad, row, score in zip(
                request.ads, request.rows, answer["probabilities"], strict=True
            )
        ]
    service.look()
    service.stop()
    return rows


def test_served_requests_come_back_as_the_rows_of_two_arms(
    market: TinyMarket, bundles: tuple[Bundle, Bundle], delivery: Delivery
) -> None:
    served = serve(market)
    canary = read_traffic(Workspace.of(market.settings).bundles).canary
    assert canary is not None
    rows = read_answered_rows(market.settings, canary.experiment)

    def multiset(entries: Any) -> Counter[tuple[Any, ...]]:
        return Counter(entries)

    assert multiset(
        zip(rows.bundle, rows.keys, rows.ads, rows.clicks, rows.probabilities.round(9), strict=True)
    ) == multiset(
        (row["bundle"], row["key"], row["ad"], float(row["clicked"]), round(row["score"], 9))
        for row in served
    )
    assert {row["bundle"] for row in served} == {bundle.fingerprint for bundle in bundles}
    assert (rows.is_canary == (rows.bundle == bundles[1].fingerprint)).all()
    shown = read_out(market.settings)
    assert shown.health.canary.answers + shown.health.champion.answers == len(
        market.requests(market.frame(num_hours=2))
    )
    assert shown.overall is not None
    assert json.loads(json.dumps(shown.to_json())) == shown.to_json()
    text = read_out_text(shown)
    assert "canary version 2" in text
    assert "tail" in text

    delivery.set_share(0.5)
    again = read_traffic(Workspace.of(market.settings).bundles).canary
    assert again is not None
    with pytest.raises(MissingArtefactError, match="no decision of this canary at this share"):
        read_answered_rows(market.settings, again.experiment)


def answered(settings: DriftlineSettings, *, errors: int) -> None:
    """What a replica would have counted: many answers, and so many errors of the canary."""
    workspace = Workspace.of(settings)
    canary = read_traffic(workspace.bundles).canary
    assert canary is not None
    keys = [
        ArmKey(canary.experiment, "champion", "any"),
        ArmKey(canary.experiment, "canary", canary.bundle.fingerprint),
    ]
    counts = dict(zip(keys, (healthy(1_000), healthy(100, errors=errors)), strict=True))
    write_health(health_folder(workspace) / "other.json", counts)


def test_a_failing_canary_is_withdrawn_though_the_log_is_gone(
    market: TinyMarket, bundles: tuple[Bundle, Bundle], delivery: Delivery
) -> None:
    answered(market.settings, errors=50)
    workspace = Workspace.of(market.settings)
    folder = workspace.decisions / "2026-01-02T12"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cut.parquet").write_bytes(b"PAR1 and then the disk was full")

    verdict = act_on_canary(market.settings, delivery=delivery, now=datetime.now(UTC))

    assert verdict.decision.action == "withdraw"
    assert "50 of 150 requests failed" in verdict.decision.reasons[0]
    assert read_traffic(workspace.bundles).canary is None
    champion = read_champion(workspace.bundles)
    assert champion is not None
    assert champion.version == 1
    last = json.loads(audit_path(workspace).read_text().splitlines()[-1])
    assert (last["action"], last["state"]) == ("stop", "done")
    assert last["arguments"]["reasons"] == list(verdict.decision.reasons)


def test_a_good_canary_becomes_the_champion(
    market: TinyMarket, bundles: tuple[Bundle, Bundle], delivery: Delivery
) -> None:
    serve(market)
    loose = {
        "max_ctr_drop": 0.999999,
        "max_ne_excess": 100.0,
        "calibration_range": (0.001, 1_000.0),
        "max_p99_ratio": 1_000.0,
    }
    rules = market.settings.serving.delivery.model_copy(update=loose)
    serving = market.settings.serving.model_copy(update={"delivery": rules})
    settings = market.settings.model_copy(update={"serving": serving})
    soon = act_on_canary(settings, delivery=delivery, now=datetime.now(UTC))
    assert soon.decision.action == "wait"
    verdict = act_on_canary(settings, delivery=delivery, now=datetime.now(UTC) + 2 * HOUR)

    workspace = Workspace.of(settings)
    assert verdict.decision.action == "promote", verdict.decision.reasons
    champion = read_champion(workspace.bundles)
    assert champion is not None
    assert (champion.version, champion.before) == (2, (1,))
    assert read_traffic(workspace.bundles).is_empty
    registered = Registry(settings, workspace).champion()
    assert registered is not None
    assert registered.reasons == verdict.decision.reasons


def test_the_cadence_service_withdraws_by_itself_and_survives_damage(
    market: TinyMarket, delivery: Delivery
) -> None:
    workspace = Workspace.of(market.settings)
    traffic = workspace.bundles / "TRAFFIC"
    kept = traffic.read_text()
    traffic.write_text("{")
    until = threading.Event()
    thread = threading.Thread(
        target=watch_canaries, args=(market.settings,), kwargs={"until": until}
    )
    thread.start()
    try:
        until.wait(0.1)
        traffic.write_text(kept)
        answered(market.settings, errors=60)
        for _ in range(6_000):
            if read_traffic(workspace.bundles).canary is None:
                break
            until.wait(0.02)
        assert read_traffic(workspace.bundles).canary is None
        assert thread.is_alive()
    finally:
        until.set()
        thread.join()


def test_what_is_live_is_shown_with_its_shares(
    market: TinyMarket, bundles: tuple[Bundle, Bundle], delivery: Delivery
) -> None:
    facts = traffic_facts(market.settings)
    assert facts["live"]["champion"]["share"] == 0.6
    text = traffic_text(facts)
    assert f"champion   60.0%  version 1 ({bundles[0].fingerprint})" in text
    assert f"canary     40.0%  version 2 ({bundles[1].fingerprint})" in text
    assert "no server of this market answers" in text
    delivery.stop()
    assert "canary" not in traffic_text(traffic_facts(market.settings))


def test_the_commands_do_the_same(
    market: TinyMarket, delivery: Delivery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "market.yaml"
    config.write_text(yaml.safe_dump(market.settings.model_dump(mode="json")))

    def run(command: str, *arguments: str) -> tuple[Any, Any]:
        with pytest.raises(SystemExit) as ended:
            main([command, str(config), "--json", *arguments])
        return ended.value.code, capsys.readouterr()

    def driftline(command: str, *arguments: str) -> dict[str, Any]:
        code, printed = run(command, *arguments)
        assert code == 0, printed.err
        answer = json.loads(printed.out)
        assert isinstance(answer, dict)
        return answer

    assert driftline("traffic", "--canary", "0.2")["live"]["canary"]["share"] == 0.2
    assert driftline("traffic", "--read-out")["canary"]["version"] == 2
    assert driftline("traffic", "--decide")["decision"]["action"] == "wait"
    (Workspace.of(market.settings).bundles / "TRAFFIC").write_text("{")
    for arguments in ((), ("--read-out",), ("--canary", "0.3")):
        code, printed = run("traffic", *arguments)
        assert (code, printed.err.count("\n")) == (1, 1)
        assert "TRAFFIC is no JSON" in printed.err
    assert driftline("traffic", "--stop")["live"]["canary"] is None
    shadows = driftline("deploy", "--bundle", "2", "--shadow")["live"]["shadow"]
    assert [entry["version"] for entry in shadows] == [2]
    champion = driftline("deploy", "--bundle", "2", "--champion")["live"]["champion"]
    assert (champion["version"], champion["before"]) == (2, [1])
    assert driftline("rollback")["live"]["champion"]["version"] == 1
    assert driftline("rollback", "--to", "2")["live"]["champion"]["version"] == 2
