"""The gate's decision: may this challenger replace the champion? With reasons a person can read.

A refresh should be boring, so the challenger is promoted unless something speaks against it:

- a *mechanical* check fails (loads, answers, finite, fast): refused, whatever the figures;
- AUC fell or NE rose, compared pairwise on the newest matured slice: refused only when the whole
  95 % interval lies beyond what the settings allow, so that bad luck alone refuses nothing;
- predicted clicks per click: refused when its whole interval lies outside the allowed range *and*
  the challenger is further from 1 than the champion. When the market jumps, both are off; the one
  that is less off should serve. A market's first bundle has nothing to be better than: its
  calibration is reported and not judged, for refusing it would leave the market with nothing.

A slice with too few rows or clicks is not evidence enough to refuse; then only the mechanical
checks decide, and the verdict says so. Slices of new or rare items are reported, not judged: they
are small, and judging many of them would refuse good refreshes by chance.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftline.pipelines.verdict import Check, GateVerdict, Outcome, SliceFigures
from driftline.platform.bootstrap import ClusterBootstrap, Interval
from driftline.platform.metrics import FloatArray
from driftline.platform.settings import GateSettings
from driftline.platform.windows import Window

__all__ = ["GateVerdict", "describe_slice", "describe_window", "judge"]


def judge(
    labels: ArrayLike,
    *,
    champion: ArrayLike | None,
    challenger: ArrayLike,
    groups: ArrayLike | None,
    slices: Mapping[str, NDArray[np.bool_]],
    mechanical: Mapping[str, bool | float],
    settings: GateSettings,
    seed: int,
    window: Window | None = None,
) -> GateVerdict:
    """Decide on a challenger.

    Args:
        labels: Clicks of the newest matured slice, 0/1. ``[N]``, may be empty.
        champion: Its probabilities on the same rows; ``None`` for a market's first bundle.
        challenger: The challenger's probabilities. ``[N]``.
        groups: Request of each row, the unit of the bootstrap; rows when not given. ``[N]``.
        slices: Masks of rows to report on, by name. ``[N]`` each.
        mechanical: Checks by name. A boolean must be true; a number is the milliseconds needed
            to score 100 ads and must not exceed ``max_milliseconds``.
        settings: The bounds.
        seed: Of the bootstrap.
        window: Event time of the slice, for the sentences.
    """
    labels_N = np.asarray(labels, dtype=np.float64)
    challenger_N = np.asarray(challenger, dtype=np.float64)
    champion_N = _usable(champion)
    checks = [_mechanical(name, value, settings) for name, value in mechanical.items()]
    checks.append(_probabilities(challenger_N))
    figures: dict[str, float | None] = {
        "num_rows": len(labels_N),
        "num_clicks": int(labels_N.sum()),
    }
    judged: list[Check] = []
    parts: tuple[SliceFigures, ...] = ()
    if checks[-1].outcome == "passed":
        evidence = _Evidence(
            labels_N, champion_N, challenger_N, groups=groups, settings=settings, seed=seed
        )
        judged = list(evidence.checks(describe_slice(labels_N, window)))
        figures |= evidence.figures()
        parts = tuple(evidence.part(name, mask) for name, mask in slices.items() if mask.any())
    checks += judged
    failed = tuple(check.sentence for check in checks if check.outcome == "failed")
    said = [check.sentence for check in judged]
    if champion_N is None:
        said.insert(0, "there is no champion to compare with")
    if any(check.outcome == "not judged" for check in judged):
        said.append("promoted by default: what cannot be judged is no ground to refuse")
    return GateVerdict(
        promote=not failed,
        reasons=failed or (*said, "all mechanical checks held"),
        figures=figures,
        checks=tuple(checks),
        slices=parts,
        has_champion=champion_N is not None,
        window=window,
        settings=settings,
    )


def describe_slice(labels_N: FloatArray, window: Window | None) -> str:
    """For example ``slice 2026-01-05T03:00Z..09:00Z, 5,812 rows, 291 clicks``."""
    size = f"{len(labels_N):,} rows, {int(labels_N.sum()):,} clicks"
    return f"slice {describe_window(window)}, {size}" if window else f"slice of {size}"


def describe_window(window: Window) -> str:
    """Event time to the minute; the second date is left out when it is the first."""
    start, end = window.start.astimezone(UTC), window.end.astimezone(UTC)
    last = f"{end:%H:%M}Z" if start.date() == end.date() else f"{end:%Y-%m-%dT%H:%M}Z"
    return f"{start:%Y-%m-%dT%H:%M}Z..{last}"


# --- the checks ---------------------------------------------------------------------------


def _mechanical(name: str, value: bool | float, settings: GateSettings) -> Check:
    if isinstance(value, bool | np.bool_):
        return Check(
            name, "passed" if value else "failed", f"check {name!r} {'held' if value else 'failed'}"
        )
    limit = settings.max_milliseconds
    needed = f"scoring 100 ads took {value:.2f} ms"
    if value <= limit:
        return Check(name, "passed", f"{needed}, at most {limit:g} ms are allowed")
    return Check(name, "failed", f"{needed}, more than the {limit:g} ms allowed")


def _is_probability(values_N: FloatArray) -> NDArray[np.bool_]:
    return (values_N >= 0) & (values_N <= 1)  # False for NaN


def _usable(champion: ArrayLike | None) -> FloatArray | None:
    """The champion's predictions; one that answers with nonsense is no standard."""
    values = None if champion is None else np.asarray(champion, dtype=np.float64)
    return values if values is not None and _is_probability(values).all() else None


def _probabilities(challenger_N: FloatArray) -> Check:
    wrong = ~_is_probability(challenger_N)
    if not wrong.any():
        said = f"all {len(wrong):,} predictions lie between 0 and 1"
        return Check("probabilities", "passed", said)
    said = f"{wrong.sum():,} of {len(wrong):,} predictions are not between 0 and 1"
    return Check("probabilities", "failed", said)


class _Evidence:
    """Champion and challenger on the slice; the resamples are shared by all measures."""

    def __init__(
        self,
        labels_N: FloatArray,
        champion_N: FloatArray | None,
        challenger_N: FloatArray,
        *,
        groups: ArrayLike | None,
        settings: GateSettings,
        seed: int,
    ) -> None:
        self.labels_N, self.champion_N, self.challenger_N = labels_N, champion_N, challenger_N
        self.groups_N = np.arange(len(labels_N)) if groups is None else np.asarray(groups)
        self.settings, self.seed = settings, seed
        self.bootstrap = self._resample(np.ones(len(labels_N), dtype=bool))
        self.is_enough = (
            len(labels_N) >= settings.min_rows and labels_N.sum() >= settings.min_clicks
        )
        self.auc, self.ne = self._difference("auc"), self._difference("ne")
        self.calibration = self.bootstrap.interval("calibration", challenger_N)

    def _resample(self, mask_N: NDArray[np.bool_]) -> ClusterBootstrap:
        return ClusterBootstrap(
            self.labels_N[mask_N],
            groups=self.groups_N[mask_N],
            num_samples=self.settings.num_bootstrap,
            seed=self.seed,
        )

    def _difference(self, metric: Literal["auc", "ne"]) -> Interval | None:
        if self.champion_N is None:
            return None
        return self.bootstrap.paired(metric, self.challenger_N, self.champion_N)

    def checks(self, where: str) -> Iterable[Check]:
        if not self.is_enough:
            needed = f"{self.settings.min_rows:,} rows and {self.settings.min_clicks:,} clicks"
            sentence = f"not enough evidence to refuse: {where}; {needed} are needed to judge"
            return [Check("evidence", "not judged", sentence)]
        fall, rise = self.settings.max_auc_drop, self.settings.max_ne_rise
        checks = []
        if self.auc is not None:
            failed = self.auc.high < -fall
            checks.append(_compared("AUC", self.auc, failed, (-fall, None), where))
        if self.ne is not None:
            failed = self.ne.low > rise
            checks.append(_compared("normalised entropy", self.ne, failed, (None, rise), where))
        return [*checks, self._calibration_check(where)]

    def _calibration_check(self, where: str) -> Check:
        low, high = self.settings.calibration_range
        ratio = self.calibration
        outside = ratio.high < low or ratio.low > high
        said = (
            f"{ratio.value:.2f} clicks predicted per click [{ratio.low:.2f}, {ratio.high:.2f}], "
            f"{low:.2f} to {high:.2f} are allowed"
        )
        if outside and self.champion_N is not None:
            champion = self.bootstrap.measure("calibration", self.champion_N)
            nearer = _times_off(ratio.value) < _times_off(champion)
            outside = not nearer
            word = "nearer to 1 than" if nearer else "further from 1 than or as far as"
            said += f"; {word} the champion's {champion:.2f}"
        outcome: Outcome = "failed" if outside else "passed"
        if outside and self.champion_N is None:
            outcome = "not judged"  # a market's first bundle is better than none
        return Check("calibration", outcome, f"{said}; {where}", ratio, (low, high))

    def figures(self) -> dict[str, float | None]:
        figures: dict[str, float | None] = {}
        for metric in ("auc", "ne", "calibration"):
            figures[f"{metric}_challenger"] = self.bootstrap.measure(metric, self.challenger_N)
            figures[f"{metric}_champion"] = (
                None if self.champion_N is None else self.bootstrap.measure(metric, self.champion_N)
            )
        for name, interval in (("auc", self.auc), ("ne", self.ne)):
            if interval is not None:
                figures[f"{name}_difference"] = interval.value
                figures[f"{name}_difference_low"] = interval.low
                figures[f"{name}_difference_high"] = interval.high
        return figures | {
            "calibration_challenger_low": self.calibration.low,
            "calibration_challenger_high": self.calibration.high,
        }

    def part(self, name: str, mask_N: NDArray[np.bool_]) -> SliceFigures:
        bootstrap = self._resample(mask_N)
        challenger = self.challenger_N[mask_N]
        champion = None if self.champion_N is None else self.champion_N[mask_N]
        return SliceFigures(
            name=name,
            num_rows=int(mask_N.sum()),
            num_clicks=int(self.labels_N[mask_N].sum()),
            auc_champion=None if champion is None else bootstrap.measure("auc", champion),
            auc_challenger=bootstrap.measure("auc", challenger),
            auc_difference=(
                None if champion is None else bootstrap.paired("auc", challenger, champion)
            ),
            calibration_champion=(
                None if champion is None else bootstrap.measure("calibration", champion)
            ),
            calibration_challenger=bootstrap.measure("calibration", challenger),
        )


# --- sentences ----------------------------------------------------------------------------


def _compared(
    name: str,
    difference: Interval,
    failed: bool,
    bounds: tuple[float | None, float | None],
    where: str,
) -> Check:
    if not difference.is_known:
        sentence = f"{name} cannot be compared: too few clicks or non-clicks; {where}"
        return Check(name, "not judged", sentence, difference, bounds)
    allowed = next(abs(bound) for bound in bounds if bound is not None)
    direction, harm = (
        ("fall", -difference.value) if bounds[1] is None else ("rise", difference.value)
    )
    if failed:
        limit = f"more than the {allowed:.4f} allowed"
    elif harm > allowed:
        limit = f"but not surely more than the {allowed:.4f} allowed"
    else:
        limit = f"a {direction} of {allowed:.4f} is allowed"
    outcome: Outcome = "failed" if failed else "passed"
    return Check(
        name, outcome, f"{name} {_moved(difference)}, {limit}; {where}", difference, bounds
    )


def _times_off(ratio: float) -> float:
    """How many times too high or too low a calibration ratio is."""
    return max(ratio, 1 / ratio) if ratio > 0 else float("inf")


def _moved(difference: Interval) -> str:
    """``fell by 0.0312 [0.0121, 0.0500]``: the direction in words, so no sign is misread."""
    if difference.value < 0:
        return f"fell by {-difference.value:.4f} [{-difference.high:.4f}, {-difference.low:.4f}]"
    return f"rose by {difference.value:.4f} [{difference.low:.4f}, {difference.high:.4f}]"
