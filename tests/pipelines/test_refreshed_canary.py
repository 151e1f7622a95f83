"""``gate.promote: canary``: a refreshed bundle that passed is tried beside the champion first."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_market import AS_OF, TinyMarket, tiny_settings

from driftline.pipelines.publish import Challenger, publish
from driftline.pipelines.records import RefreshRecord, record_path
from driftline.pipelines.traffic import act_on_canary
from driftline.platform.arm_health import ArmCounts, ArmKey, health_folder, write_health
from driftline.platform.bundle import Bundle
from driftline.platform.errors import SettingsError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.traffic import read_traffic
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.delivery import Delivery

LENIENT = {
    "promote": "canary",
    "min_rows": 1_000_000,  # random weights: what cannot be judged is no ground to refuse
}

Refresh = Callable[..., RefreshRecord]


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    serving = {"clock": "snapshot", "delivery": {"canary_share": 0.25}}
    folder = tmp_path_factory.mktemp("canary")
    return TinyMarket.make(tiny_settings(folder, gate=LENIENT, serving=serving))


@pytest.fixture
def refresh(market: TinyMarket, tmp_path: Path) -> Refresh:
    """Publishes a bundle as a refresh does."""

    def publish_one(bundle: Bundle, champion: Bundle | None, *, hours: int) -> RefreshRecord:
        return publish(
            market.settings,
            Challenger(bundle, num_rows=1, seconds=1.0, core_seconds=1.0),
            champion=champion,
            as_of=AS_OF + hours * HOUR,
            scratch=tmp_path / "scratch",
        )

    return publish_one


def live(market: TinyMarket) -> tuple[str, str | None]:
    """Fingerprints of champion and canary."""
    bundles = Workspace.of(market.settings).bundles
    champion, canary = read_champion(bundles), read_traffic(bundles).canary
    assert champion is not None
    return champion.fingerprint, None if canary is None else canary.bundle.fingerprint


def decision_of(market: TinyMarket, bundle: Bundle) -> tuple[str, str]:
    registry = Registry(market.settings, Workspace.of(market.settings))
    (known,) = (one for one in registry.versions() if one.fingerprint == bundle.fingerprint)
    return known.decision, "; ".join(known.reasons)


def failing(market: TinyMarket) -> None:
    """What a replica would have counted: every second answer of the canary failed."""
    workspace = Workspace.of(market.settings)
    canary = read_traffic(workspace.bundles).canary
    assert canary is not None
    key = ArmKey(canary.experiment, "canary", canary.bundle.fingerprint)
    counts = ArmCounts()
    for number in range(200):
        counts.add(0.001)
        counts.errors += number % 2
    write_health(health_folder(workspace) / "r.json", {key: counts})


def test_what_passes_is_tried_first_and_one_at_a_time(market: TinyMarket, refresh: Refresh) -> None:
    first, arms = (market.bundle(seed=seed) for seed in (1, 2))
    head, other = (market.bundle(seed=seed, kind="head") for seed in (3, 4))

    begun = refresh(first, None, hours=0)
    assert (begun.decision, live(market)) == ("promoted", (first.fingerprint, None))

    tried = refresh(head, first, hours=1)
    assert (tried.decision, tried.champion) == ("canary", first.fingerprint)
    assert live(market) == (first.fingerprint, head.fingerprint)
    assert "25% of the request keys as canary" in tried.reasons[-1]
    assert decision_of(market, head)[0] == "pending"
    traffic = read_traffic(Workspace.of(market.settings).bundles)
    assert traffic.canary is not None
    assert traffic.canary.share == 0.25

    record_path(Workspace.of(market.settings), "head", AS_OF + HOUR).unlink()  # killed before it
    assert refresh(head, first, hours=1) == tried
    assert read_traffic(Workspace.of(market.settings).bundles) == traffic

    waits = refresh(other, first, hours=2)
    assert (waits.decision, live(market)) == ("refused", (first.fingerprint, head.fingerprint))
    assert "canary version 2 is still being judged" in waits.reasons[-1]
    assert decision_of(market, other)[0] == "refused"

    rotated = refresh(arms, first, hours=2)
    assert (rotated.decision, live(market)) == ("canary", (first.fingerprint, arms.fingerprint))

    failing(market)
    delivery = Delivery(market.settings, by="up", via="automatic")
    verdict = act_on_canary(market.settings, delivery=delivery, now=AS_OF + timedelta(days=300))
    assert verdict.decision.action == "withdraw"
    assert live(market) == (first.fingerprint, None)
    assert decision_of(market, arms) == ("refused", "; ".join(verdict.decision.reasons))

    again = refresh(other, first, hours=3)
    assert (again.decision, live(market)) == ("canary", (first.fingerprint, other.fingerprint))
    delivery.deploy_champion(other.fingerprint, reasons=("shown to be as good",))
    assert live(market) == (other.fingerprint, None)
    assert decision_of(market, other) == ("promoted", "shown to be as good")


@pytest.mark.parametrize("rate", [0, 0.5])
def test_a_canary_needs_a_log_to_be_judged_by(tmp_path: Path, rate: float) -> None:
    changes: dict[str, Any] = {"serving": {"decision_log": {"sample_rate": rate}}}
    if rate:
        tiny_settings(tmp_path, gate=LENIENT, **changes)
    else:
        with pytest.raises(SettingsError, match=r"decision_log\.sample_rate must be above 0"):
            tiny_settings(tmp_path, gate=LENIENT, **changes)
