"""What to do with a canary: promote it, withdraw it, or wait. A pure function of what was read out.

Each rule stands by itself: errors and times need only the servers' counts; clicks, NE and
calibration need a log. One rule that is broken beyond doubt is enough to withdraw; to promote, all
must be shown to hold.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, Literal

from driftline.pipelines.read_out import ReadOut, SliceReadOut
from driftline.platform.ab_test import rate_evidence
from driftline.platform.arm_health import ArmCounts
from driftline.platform.delivery_settings import DeliverySettings

Action = Literal["promote", "withdraw", "wait"]

SLOW_SHARE: Final = 0.01
"""The 99th percentile is the time that this share of the answers exceeds."""
MIN_CHAMPION_ANSWERS: Final = 500
"""Before that, the champion's 99th percentile is not known."""
LARGEST_ERROR_SHARE: Final = 0.5


@dataclass(frozen=True)
class Decision:
    """What to do and why, one sentence each."""

    action: Action
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"reasons": list(self.reasons)}


def decide(found: ReadOut, rules: DeliverySettings, *, now: datetime) -> Decision:
    """Promote, withdraw or wait.

    Args:
        found: From ``read_out``.
        rules: Bounds.
        now: Wall time.
    """
    broken = [*_health_rules(found, rules), *_quality_rules(found, rules)]
    if broken:
        return Decision("withdraw", tuple(broken))
    missing = list(_missing(found, rules, now=now))
    if missing:
        return Decision("wait", tuple(missing))
    overall = found.overall
    assert overall is not None, "nothing is shown without a log"
    lift, excess = overall.comparison.lift, overall.comparison.ne_excess
    return Decision(
        "promote",
        (
            f"the click rate's lift is {lift.value:+.2%} ({lift.low:+.2%} to {lift.high:+.2%}).",
            f"NE differs by {excess.value:+.4f} ({excess.low:+.4f} to {excess.high:+.4f}).",
        ),
    )


def _health_rules(found: ReadOut, rules: DeliverySettings) -> Iterator[str]:
    """Rules that are broken according to the servers' own counts."""
    enough = 1 / (1 - rules.confidence)
    champion, canary = found.health.champion, found.health.canary
    usual = champion.errors / champion.attempts if champion.attempts else 0.0
    allowed = min(usual + rules.max_error_share, LARGEST_ERROR_SHARE)
    if rate_evidence(canary.errors, canary.attempts, allowed=allowed) > enough:
        yield (
            f"{canary.errors:,} of {canary.attempts:,} requests failed, "
            f"more than {allowed:.2%} allows."
        )
    if champion.answers >= MIN_CHAMPION_ANSWERS:
        bound = rules.max_p99_ratio * champion.quantile(1 - SLOW_SHARE)
        slow = canary.num_slower(bound)
        if rate_evidence(slow, canary.answers, allowed=SLOW_SHARE) > enough:
            yield _slow(canary, champion, rules)


def _slow(canary: ArmCounts, champion: ArmCounts, rules: DeliverySettings) -> str:
    ours, theirs = (1e3 * counts.quantile(1 - SLOW_SHARE) for counts in (canary, champion))
    return (
        f"p99 is {ours:.2f} ms, the champion's {theirs:.2f} ms; "
        f"{rules.max_p99_ratio:g} times that is allowed."
    )


def _quality_rules(found: ReadOut, rules: DeliverySettings) -> Iterator[str]:
    """Rules that are broken according to the clicks."""
    overall = found.overall
    if overall is None or not overall.enough or not found.is_balanced:
        return
    compared = overall.comparison
    excess, lift, level = compared.ne_excess, compared.lift, compared.calibration[1]
    if excess.low > rules.max_ne_excess:
        yield (
            f"NE is higher by {excess.value:.4f} (at least {excess.low:.4f}), "
            f"{rules.max_ne_excess:g} is allowed."
        )
    low, high = rules.calibration_range
    if level.high < low or level.low > high:
        yield f"calibration is {level.value:.3f}, outside {low:g} to {high:g}."
    if lift.high < -rules.max_ctr_drop:
        yield (
            f"the click rate is lower by {-lift.value:.2%} (at least {-lift.high:.2%}), "
            f"{rules.max_ctr_drop:.1%} is allowed."
        )


def _missing(found: ReadOut, rules: DeliverySettings, *, now: datetime) -> Iterator[str]:
    """What must still be shown before the canary can be promoted."""
    if rules.promote_when == "never":
        yield "serving.delivery.promote_when is 'never': promoting is left to a person."
    since = found.canary.step_at or found.canary.started_at
    hours = (now - since).total_seconds() / 3600
    if hours < rules.min_hours:
        yield f"{hours:.1f} hours at this share, {rules.min_hours:g} are needed."
    if not found.health.canary.answers:
        yield "no server has counted an answer of it."
    yield from found.problems
    overall = found.overall
    if overall is not None and overall.enough and found.is_balanced:
        yield from _unproven(overall, rules)


def _unproven(overall: SliceReadOut, rules: DeliverySettings) -> Iterator[str]:
    compared = overall.comparison
    excess, lift, level = compared.ne_excess, compared.lift, compared.calibration[1]
    if not excess.high <= rules.max_ne_excess:
        yield (
            f"NE may be higher by {excess.high:.4f}, more than {rules.max_ne_excess:g}; "
            "more clicks will tell."
        )
    low, high = rules.calibration_range
    if not low <= level.value <= high:
        yield f"calibration is {level.value:.3f}, outside {low:g} to {high:g}."
    least = 0.0 if rules.promote_when == "better" else -rules.max_ctr_drop
    if not lift.low >= least:
        yield (
            f"the lift may be as low as {lift.low:+.2%}, {least:+.1%} must be shown; "
            "more clicks will tell."
        )
