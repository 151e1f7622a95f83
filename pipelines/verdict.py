"""What the gate found: checks, figures, slices, and the decision they led to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from driftline.platform.bootstrap import Interval, json_number
from driftline.platform.settings import GateSettings
from driftline.platform.windows import Window

Outcome = Literal["passed", "failed", "not judged"]


@dataclass(frozen=True)
class Check:
    """One question the gate asked."""

    name: str
    outcome: Outcome
    sentence: str
    """The answer in plain English, with numbers."""
    interval: Interval | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    """What the settings allow, for the picture."""


@dataclass(frozen=True)
class SliceFigures:
    """Champion and challenger on part of the slice; ``None`` where there is no champion."""

    name: str
    num_rows: int
    num_clicks: int
    auc_champion: float | None
    auc_challenger: float
    auc_difference: Interval | None
    calibration_champion: float | None
    calibration_challenger: float


@dataclass(frozen=True)
class GateVerdict:
    """Promote or not, why, and every number behind it."""

    promote: bool
    reasons: tuple[str, ...]
    """What decided, one sentence each; for a promotion, what was checked."""
    figures: Mapping[str, float | None]
    """Rows, clicks, and each measure for champion, challenger, difference and its bounds."""
    checks: tuple[Check, ...]
    slices: tuple[SliceFigures, ...]
    has_champion: bool
    window: Window | None
    settings: GateSettings


def verdict_json(verdict: GateVerdict) -> dict[str, Any]:
    """All of it as plain JSON; NaN becomes null."""
    return {
        "promote": verdict.promote,
        "reasons": list(verdict.reasons),
        "window": str(verdict.window) if verdict.window else None,
        "has_champion": verdict.has_champion,
        "figures": {name: json_number(value) for name, value in verdict.figures.items()},
        "checks": [_check_json(check) for check in verdict.checks],
        "slices": [_slice_json(part) for part in verdict.slices],
        "settings": verdict.settings.model_dump(mode="json"),
    }


def _check_json(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "outcome": check.outcome,
        "sentence": check.sentence,
        "interval": check.interval.to_json() if check.interval else None,
        "allowed": list(check.bounds),
    }


def _slice_json(part: SliceFigures) -> dict[str, Any]:
    return {
        "name": part.name,
        "num_rows": part.num_rows,
        "num_clicks": part.num_clicks,
        "auc_champion": json_number(part.auc_champion),
        "auc_challenger": json_number(part.auc_challenger),
        "auc_difference": part.auc_difference.to_json() if part.auc_difference else None,
        "calibration_champion": json_number(part.calibration_champion),
        "calibration_challenger": json_number(part.calibration_challenger),
    }
