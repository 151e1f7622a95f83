"""What is live, how the canary does, and acting on it: ``driftline traffic``.

The same is done every minute by the cadence service of ``driftline up``.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from driftline.pipelines.read_out import ReadOut, read_out
from driftline.pipelines.traffic_decision import Decision, decide
from driftline.platform.errors import DriftlineError
from driftline.platform.registry import Registry
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import read_traffic
from driftline.platform.workspace import Workspace
from driftline.serving.client import ScoringClient
from driftline.serving.rollout.delivery import Delivery, live_facts
from driftline.serving.server import serving_url

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What was read out, and what was done about it."""

    found: ReadOut
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"decision": self.decision.to_json(), "read_out": self.found.to_json()}


def act_on_canary(settings: DriftlineSettings, *, delivery: Delivery, now: datetime) -> Verdict:
    """Read out, decide, and promote or withdraw.

    Raises:
        MissingArtefactError: there is no canary.
        BundleError: the canary should be promoted but cannot be served any more.
    """
    found = read_out(settings)
    decision = decide(found, settings.serving.delivery, now=now)
    match decision.action:
        case "withdraw":
            delivery.stop(reasons=decision.reasons, shadows=False)
            _refuse(settings, found.canary.bundle.version, decision.reasons, now=now)
        case "promote":
            delivery.deploy_champion(found.canary.bundle.fingerprint, reasons=decision.reasons)
    return Verdict(found, decision)


def _refuse(
    settings: DriftlineSettings, version: int, reasons: Sequence[str], *, now: datetime
) -> None:
    """Write down what became of a refreshed bundle that nobody had decided about before."""
    registry = Registry(settings, Workspace.of(settings))
    (known,) = (one for one in registry.versions() if one.version == version)
    if known.decision == "pending":
        registry.log_refusal(version, reasons=reasons, decided_at=now)


def watch_canaries(settings: DriftlineSettings, *, until: threading.Event) -> None:
    """Act on canaries every now and then, until told to stop. Goes on after a failure."""
    rules = settings.serving.delivery
    delivery = Delivery(settings, by="driftline up", via="automatic")
    said = ""
    while not until.wait(rules.decide_seconds):
        if not rules.automatic:
            continue
        try:
            if read_traffic(Workspace.of(settings).bundles).canary is None:
                continue
            decision = act_on_canary(settings, delivery=delivery, now=datetime.now(UTC)).decision
            message = f"canary: {decision.action}: {' '.join(decision.reasons)}"
        except (DriftlineError, OSError, ValueError, LookupError) as error:
            message = f"canary not judged: {error}"
        if message != said:
            logger.info("%s", message)
            said = message


def traffic_facts(settings: DriftlineSettings) -> dict[str, Any]:
    """What the pointers say is live, and what a running server says it has. JSON-able."""
    facts: dict[str, Any] = {"live": live_facts(Workspace.of(settings)), "server": None}
    with ScoringClient(serving_url(settings), timeout_seconds=3) as client:
        try:
            status = client.status()
        except (OSError, ValueError):
            return facts
    if status.get("name") == settings.name:
        names = ("replica", "routes", "shadows", "last_refusal")
        facts["server"] = {name: status.get(name) for name in names}
    return facts


def traffic_text(facts: Mapping[str, Any]) -> str:
    """For a person: one line a bundle."""
    live, server = facts["live"], facts["server"]
    if live["champion"] is None:
        return "nothing is live; `driftline refresh arms CONFIG` trains and promotes a bundle"
    entries = [("champion", live["champion"]), ("canary", live["canary"])]
    entries += [("shadow", entry) for entry in live["shadow"]]
    loaded = {route["bundle"] for route in server["routes"]} if server else set()
    lines = []
    for role, entry in entries:
        if entry is None:
            continue
        share = entry.get("share", 0.0)
        state = "" if server is None or entry["bundle"] in loaded else "  NOT LOADED"
        name = f"version {entry['version']} ({entry['bundle']})"
        lines.append(f"{role:<9} {share:>6.1%}  {name}{state}")
    for shadow in server["shadows"]["bundles"] if server else ():
        if shadow["requests"]:
            lines.append(
                f"  shadow {shadow['version']}: {shadow['requests']:,} requests compared, mean "
                f"logit difference {shadow['mean_logit_difference']:.3f}, other top ad "
                f"{shadow['share_other_top_ad'] or 0:.1%}, {shadow['errors']} errors"
            )
    if live["by"]:
        lines.append(f"changed   {live['changed_at']} by {live['by']}")
    if live["champion"]["before"]:
        lines.append(f"before    version {live['champion']['before'][0]}; `driftline rollback`")
    if server is None:
        lines.append("no server of this market answers")
    elif server["last_refusal"]:
        lines.append(f"refused   {server['last_refusal']['message']}")
    return "\n".join(lines)
