"""How a canary does beside its champion: clicks, fit, level, errors, times, by slice.

Source of what to report: papers.md S0.37 (click rate's lift, and the tail by itself). The
statistics are in ``platform/ab_test.py``. Read it as often as you like: the intervals hold at all
looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from driftline.pipelines.answered_rows import AnsweredRows, read_answered_rows
from driftline.platform.ab_test import ArmSums, Comparison, auc, boundary, compare
from driftline.platform.arm_health import ArmCounts, ExperimentHealth, read_health
from driftline.platform.bootstrap import Interval, json_number
from driftline.platform.delivery_settings import DeliverySettings
from driftline.platform.errors import DriftlineError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import Canary, read_traffic
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

UNREADABLE: Final = (DriftlineError, OSError, ValueError, duckdb.Error)
"""What a log that is missing, cut short or foreign raises. Rolling back must not wait for it."""
UNBALANCED_ALPHA: Final = 0.001
"""An honest division of the keys is called wrong once in so many tests."""


@dataclass(frozen=True)
class SliceReadOut:
    """Both arms on one kind of impressions, champion first."""

    name: str
    sizes: tuple[ArmSums, ArmSums]
    comparison: Comparison
    auc: tuple[float, float]
    enough: bool
    """Whether there is enough to say anything; see ``DeliverySettings.min_impressions``."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; figures without enough rows are null."""
        found = self.comparison
        arms = {}
        for place, arm in enumerate(("champion", "canary")):
            arms[arm] = {
                "keys": self.sizes[place].num_keys,
                "impressions": self.sizes[place].num_rows,
                "clicks": self.sizes[place].num_clicks,
                "click_rate": found.click_rates[place].to_json(),
                "ne": found.ne[place].to_json(),
                "calibration": found.calibration[place].to_json(),
                "auc": json_number(self.auc[place]),
            }
        lift, excess = found.lift.to_json(), found.ne_excess.to_json()
        return arms | {
            "lift": lift if self.enough else None,
            "ne_excess": excess if self.enough else None,
            "enough": self.enough,
        }


@dataclass(frozen=True)
class ReadOut:
    """A canary at its share so far."""

    canary: Canary
    health: ExperimentHealth
    slices: tuple[SliceReadOut, ...]
    """The first holds all impressions; none when there is no log of them."""
    share_of_keys: Interval | None
    """That the canary got."""
    problems: tuple[str, ...]
    """Why clicks, NE and calibration say nothing."""

    @property
    def overall(self) -> SliceReadOut | None:
        """All impressions."""
        return self.slices[0] if self.slices else None

    @property
    def is_balanced(self) -> bool:
        """Whether the canary got the keys that it should have; if not, nothing can be compared."""
        got = self.share_of_keys
        return got is None or got.low <= self.canary.share <= got.high

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "canary": {
                "bundle": self.canary.bundle.fingerprint,
                "version": self.canary.bundle.version,
                "share": self.canary.share,
                "since": format_time(self.canary.step_at or self.canary.started_at),
            },
            "share_of_keys": None if self.share_of_keys is None else self.share_of_keys.to_json(),
            "health": {
                "replicas": self.health.num_replicas,
                "champion": _health_json(self.health.champion),
                "canary": _health_json(self.health.canary),
            },
            "slices": {part.name: part.to_json() for part in self.slices},
            "problems": list(self.problems),
        }


def read_out(settings: DriftlineSettings) -> ReadOut:
    """The canary that is live now, beside its champion.

    Raises:
        MissingArtefactError: there is no canary.
    """
    workspace = Workspace.of(settings)
    canary = read_traffic(workspace.bundles).canary
    if canary is None:
        raise MissingArtefactError(
            f"{settings.name} has no canary to read out; "
            "`driftline deploy CONFIG --bundle B --canary SHARE` starts one"
        )
    health = read_health(workspace, canary.experiment, canary=canary.bundle.fingerprint)
    try:
        rows = read_answered_rows(settings, canary.experiment)
    except UNREADABLE as error:
        return ReadOut(canary, health, (), None, (str(error),))
    return judge_rows(canary, health, rows, rules=settings.serving.delivery)


def judge_rows(
    canary: Canary, health: ExperimentHealth, rows: AnsweredRows, *, rules: DeliverySettings
) -> ReadOut:
    """The same for rows at hand."""
    is_head = rows.is_head
    every = np.ones(len(rows), bool)
    parts = {"all": every, "head": is_head, "tail": ~is_head, "new items": rows.is_new}
    slices = tuple(
        _slice(name, rows, mask, canary=canary, rules=rules) for name, mask in parts.items()
    )
    problems = []
    if not slices[0].enough:
        problems.append(_too_few(slices[0], rows, rules=rules))
    share = share_of_keys(rows)
    found = ReadOut(canary, health, slices, share, tuple(problems))
    if not found.is_balanced:
        problems.append(
            f"the canary got {_percent(share)} of the keys instead of {canary.share:.1%}: what was "
            "logged or shown depends on the arm, and the arms cannot be compared"
        )
    return ReadOut(canary, health, slices, share, tuple(problems))


def share_of_keys(rows: AnsweredRows) -> Interval:
    """Share of the keys that the canary got, at all looks; papers call it sample ratio."""
    num_canary = len(np.unique(rows.keys[rows.is_canary].astype(str)))
    num_keys = num_canary + len(np.unique(rows.keys[~rows.is_canary].astype(str)))
    if not num_keys:
        return Interval(float("nan"), 0.0, 1.0)
    share = num_canary / num_keys
    # Never below the error of one key in either arm, so that a first key says nothing.
    spread = max(share * (1 - share), 1 / num_keys)
    half = boundary(num_keys, alpha=UNBALANCED_ALPHA) * float(np.sqrt(spread / num_keys))
    return Interval(share, share - half, share + half)


def read_out_text(found: ReadOut) -> str:
    """For a person."""
    canary = found.canary
    since = format_time(canary.step_at or canary.started_at)
    lines = [
        f"canary version {canary.bundle.version} ({canary.bundle.fingerprint}) "
        f"at {canary.share:.1%} of the keys since {since}"
    ]
    for arm, counts in (("champion", found.health.champion), ("canary", found.health.canary)):
        lines.append(
            f"  {arm:<9} {counts.answers:>9,} answers  {counts.errors:>6,} errors  "
            f"p50 {1e3 * counts.quantile(0.5):.2f} ms  p99 {1e3 * counts.quantile(0.99):.2f} ms"
        )
    if found.slices:
        lines.append("  slice      impressions        clicks           lift of the click rate")
    for part in found.slices:
        sizes = part.sizes
        lines.append(
            f"  {part.name:<9} {sizes[0].num_rows:>8,}{sizes[1].num_rows:>8,} "
            f"{sizes[0].num_clicks:>7,}{sizes[1].num_clicks:>7,}    "
            + (_percent(part.comparison.lift) if part.enough else "too few to tell")
        )
    overall = found.overall
    if overall is not None and overall.enough:
        compared = overall.comparison
        for arm, place in (("champion", 0), ("canary", 1)):
            lines.append(
                f"  {arm:<9} NE {_plain(compared.ne[place])}  calibration "
                f"{_plain(compared.calibration[place])}  AUC {overall.auc[place]:.4f}"
            )
        lines.append(f"  NE excess {_plain(compared.ne_excess)}")
    lines += [f"  {problem}" for problem in found.problems]
    return "\n".join(lines)


def _slice(
    name: str,
    rows: AnsweredRows,
    mask_N: NDArray[np.bool_],
    *,
    canary: Canary,
    rules: DeliverySettings,
) -> SliceReadOut:
    arms = [mask_N & ~rows.is_canary, mask_N & rows.is_canary]
    drawn = [_sums(rows, arm_N) for arm_N in arms]
    compared = compare(*drawn, confidence=rules.confidence)
    # How well a bundle predicts is asked only where it predicted; clicks go by the draw.
    ours = np.array([name == canary.bundle.fingerprint for name in rows.bundle], bool)
    own = [arms[0] & ~ours, arms[1] & ours]
    if any(sum(arm_N) != sum(own_N) for arm_N, own_N in zip(arms, own, strict=True)):
        predicted = compare(*(_sums(rows, own_N) for own_N in own), confidence=rules.confidence)
        compared = Comparison(
            click_rates=compared.click_rates,
            lift=compared.lift,
            ne=predicted.ne,
            ne_excess=predicted.ne_excess,
            calibration=predicted.calibration,
        )
    aucs = [auc(rows.clicks[own_N], rows.probabilities[own_N]) for own_N in own]
    enough = all(
        sums.num_rows >= rules.min_impressions
        and sums.num_clicks >= rules.min_clicks
        and sums.num_keys >= rules.min_keys
        for sums in drawn
    )
    return SliceReadOut(name, (drawn[0], drawn[1]), compared, (aucs[0], aucs[1]), enough)


def _sums(rows: AnsweredRows, mask_N: NDArray[np.bool_]) -> ArmSums:
    keys = rows.keys[mask_N].astype(str)
    return ArmSums.of(rows.clicks[mask_N], rows.probabilities[mask_N], keys)


def _too_few(part: SliceReadOut, rows: AnsweredRows, *, rules: DeliverySettings) -> str:
    sizes = [f"{s.num_rows:,}/{s.num_clicks:,}/{s.num_keys:,}" for s in part.sizes]
    wanted = f"{rules.min_impressions:,}/{rules.min_clicks:,}/{rules.min_keys:,}"
    return (
        f"too few to tell: impressions/clicks/keys with known labels are {sizes[0]} (champion) and "
        f"{sizes[1]} (canary) of {rows.num_decisions:,} decisions; each arm needs {wanted}"
    )


def _health_json(counts: ArmCounts) -> Mapping[str, Any]:
    return {
        "answers": counts.answers,
        "errors": counts.errors,
        "p50_milliseconds": json_number(1e3 * counts.quantile(0.5)),
        "p99_milliseconds": json_number(1e3 * counts.quantile(0.99)),
    }


def _percent(interval: Interval) -> str:
    return f"{interval.value:+.1%} ({interval.low:+.1%} to {interval.high:+.1%})"


def _plain(interval: Interval) -> str:
    return f"{interval.value:.4f} ({interval.low:.4f} to {interval.high:.4f})"
