"""The report's pictures: what staleness costs, who is better, each hour, each refresh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from driftline.pipelines.report_numbers import (
    HourlyFigures,
    OracleGap,
    PolicyFigures,
    StalenessFigures,
    StalePoint,
)
from driftline.pipelines.report_rows import NEVER, REFRESHED, moment
from driftline.pipelines.report_style import (
    ARMS,
    COLOURS,
    DASHES,
    INK,
    LABELS,
    LINE,
    PAPER,
    REFUSED,
    SOFT,
    band,
    dates,
    limit,
    minus,
    scaled,
    whisker,
)
from driftline.platform.bootstrap import Interval, Metric

MEASURE_LABELS: Final[Mapping[Metric, str]] = {
    "auc": "AUC",
    "mean_auc": "AUC within a request",
    "ne": "normalised entropy",
    "calibration": "predicted clicks per click",
}


# --- what staleness costs -----------------------------------------------------------------


def draw_staleness(figures: StalenessFigures, *, every: str) -> Figure:
    """AUC and NE by hours of staleness, and AUC kept against what refreshing costs."""
    priced = [c for c in figures.cadences if c.core_seconds_per_day]
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    axes = figure.subplots(1, 3 if priced else 2, width_ratios=[1, 1, 1.25][: 3 if priced else 2])
    _draw_loss(axes[0], figures, lambda point: scaled(point.auc_lost, -100))
    axes[0].set_title("AUC points lost")
    axes[0].set_ylabel(f"AUC points against {every}")
    _draw_loss(axes[1], figures, lambda point: scaled(point.ne_lost, -100))
    axes[1].set_title("Points of fit (NE) lost")
    axes[1].set_ylabel("points of NE, down is worse")
    if priced:
        _draw_cadences(axes[2], figures, every=every)
    return figure


def _draw_loss(
    axes: Any, figures: StalenessFigures, take: Callable[[StalePoint], Interval]
) -> None:
    hours = [point.hours for point in figures.points]
    losses = [take(point) for point in figures.points]
    band(axes, hours, losses, COLOURS[REFRESHED])
    axes.plot(hours, [loss.value for loss in losses], "o-", color=COLOURS[REFRESHED], ms=5, lw=2)
    for hour, loss in zip(hours[1:], losses[1:], strict=True):
        axes.annotate(
            minus(f"{loss.value:.1f}" if abs(loss.value) >= 1 else f"{loss.value:.2f}"),
            (hour, loss.value),
            xytext=(-7, -11),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    axes.axhline(0, color=SOFT, lw=1)
    axes.set_xscale("log")
    ticks: list[float] = list(hours)
    labels = [str(hour) for hour in hours]
    if figures.never is not None:
        where = hours[-1] * 2.1
        loss = take(figures.never)
        whisker(axes, where, loss, COLOURS[NEVER], "s")
        ticks.append(where)
        labels.append("never")
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(hours[0] / 1.35, ticks[-1] * 1.45)
    axes.set_xlabel("hours without a refresh")


def _draw_cadences(axes: Any, figures: StalenessFigures, *, every: str) -> None:
    chosen = [c for c in figures.cadences if c.core_seconds_per_day]
    costs = [c.core_seconds_per_day or 0.0 for c in chosen]
    losses = [scaled(c.auc_lost, -100) for c in chosen]
    band(axes, costs, losses, COLOURS[REFRESHED])
    axes.plot(costs, [loss.value for loss in losses], "o-", color=COLOURS[REFRESHED], lw=2, ms=5)
    span = max(abs(loss.low) for loss in losses) or 1.0
    for cadence, cost, loss in zip(chosen, costs, losses, strict=True):
        axes.annotate(
            f"every {cadence.every_hours:g} h",
            (cost, loss.value - 0.035 * span),
            xytext=(7, -8),
            textcoords="offset points",
            fontsize=9,
        )
    axes.axhline(0, color=SOFT, lw=1)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.3, max(costs) * 2.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("core-seconds of head refreshes a day")
    axes.set_ylabel(f"mean AUC points against {every}")
    axes.set_title("What each cadence buys")


# --- who is better ------------------------------------------------------------------------


def draw_policies(policies: Sequence[PolicyFigures]) -> Figure:
    """Each policy's distance to the refreshed student, with paired intervals."""
    others = [figures for figures in policies if figures.to_refreshed]
    shown: tuple[tuple[Metric, str, float], ...] = (
        ("auc", "AUC points", 100),
        ("mean_auc", "AUC points within a request", 100),
        ("ne", "normalised entropy (lower is better)", 1),
    )
    figure = Figure(figsize=(11, 1.35 + 0.42 * len(others)), layout="constrained")
    for axes, (metric, title, factor) in zip(
        figure.subplots(1, len(shown), sharey=True), shown, strict=True
    ):
        for row, figures in enumerate(others):
            difference = scaled(figures.to_refreshed[metric], factor)
            colour = COLOURS[figures.policy]
            if difference.is_known:
                axes.plot([difference.low, difference.high], [row, row], color=colour, lw=3)
                axes.plot(difference.value, row, "o", color=colour, ms=7)
        axes.axvline(0, color=COLOURS[REFRESHED], lw=1.6)
        axes.set_yticks(range(len(others)), [LABELS[figures.policy] for figures in others])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(title)
    figure.suptitle("Difference to the refreshed student (blue line)", x=0.01, ha="left", size=11)
    return figure


def draw_oracle(gap: OracleGap) -> Figure:
    """Never refreshed, refreshed and the best possible on one line."""
    figure = Figure(figsize=(11, 1.5), layout="constrained")
    axes = figure.subplots()
    line: dict[str, Any] = {"lw": 9, "solid_capstyle": "round"}
    axes.plot([gap.never, gap.oracle], [0, 0], color=LINE, **line)
    axes.plot([gap.never, gap.refreshed], [0, 0], color=COLOURS[REFRESHED], **line)
    for value, policy, label, height in (
        (gap.never, NEVER, "never refreshed", 13),
        (gap.refreshed, REFRESHED, "refreshed", -38),  # below, where no other label can be
        (gap.oracle, "oracle", "best possible", 13),
    ):
        axes.plot(value, 0, "o", color=COLOURS[policy], ms=13, mec=PAPER, mew=2)
        text = f"{label}\nAUC {value:.4f}"
        axes.annotate(text, (value, 0), xytext=(0, height), textcoords="offset points", ha="center")
    axes.set_ylim(-1, 1)
    margin = 0.12 * (gap.oracle - gap.never)
    axes.set_xlim(gap.never - margin, max(gap.oracle, gap.refreshed) + margin)
    axes.set_axis_off()
    return figure


# --- through time -------------------------------------------------------------------------


def draw_hours(
    pooled: HourlyFigures, single: HourlyFigures, *, refreshes: Sequence[Mapping[str, Any]]
) -> Figure:
    """Gain, AUC, NE and calibration through the replay, with refreshes marked."""
    rows = ["gain"] if pooled.gain else []
    rows += ["auc", "ne", "calibration"]
    figure = Figure(figsize=(11, 1.2 + 2.35 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        if row == "gain":
            _draw_gain(axes, pooled, single)
        else:
            _draw_measure(axes, row, pooled, single)  # type: ignore[arg-type]
        for refresh in refreshes:
            if refresh["kind"] == "arms":
                axes.axvline(moment(refresh["as_of"]), color=SOFT, lw=1, ls=(0, (6, 3)))
    _mark_decisions(panels[0], refreshes)
    dates(panels[-1])
    handles, labels = panels[-3].get_legend_handles_labels()
    extra, extra_labels = panels[0].get_legend_handles_labels() if pooled.gain else ([], [])
    handles, labels = handles[::-1] + extra, labels[::-1] + extra_labels
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9.5)
    return figure


def _mark_decisions(axes: Any, refreshes: Sequence[Mapping[str, Any]]) -> None:
    """Name the vertical lines, and put refusals on the lower edge of the first panel."""
    if any(refresh["kind"] == "arms" for refresh in refreshes):
        axes.plot([], [], color=SOFT, lw=1, ls=(0, (6, 3)), label="arms refresh")
    refused = [moment(r["as_of"]) for r in refreshes if r["decision"] == "refused"]
    if refused:
        bottom = axes.get_ylim()[0]
        marks = {"color": REFUSED, "ms": 8, "clip_on": False, "label": "refresh refused"}
        axes.plot(refused, [bottom] * len(refused), "X", **marks)


def _draw_gain(axes: Any, pooled: HourlyFigures, single: HourlyFigures) -> None:
    gains = [scaled(gain, 100) for gain in pooled.gain]
    band(axes, pooled.hours, gains, COLOURS[REFRESHED])
    axes.plot(pooled.hours, [gain.value for gain in gains], color=COLOURS[REFRESHED], lw=2)
    dots = [100 * gain.value for gain in single.gain]
    axes.plot(single.hours, dots, ".", color=COLOURS[REFRESHED], alpha=0.35, ms=4)
    axes.axhline(0, color=SOFT, lw=1)
    limit(axes, [gains], keep=0.0)
    axes.set_title("What refreshing was worth: AUC points over the never-refreshed student")
    axes.set_ylabel("AUC points gained")


def _draw_measure(axes: Any, metric: Metric, pooled: HourlyFigures, single: HourlyFigures) -> None:
    for policy in reversed(list(pooled.measures)):
        colour, intervals = COLOURS[policy], pooled.measures[policy][metric]
        main = policy in (REFRESHED, NEVER)
        if main:
            band(axes, pooled.hours, intervals, colour)
            dots = [interval.value for interval in single.measures[policy][metric]]
            axes.plot(single.hours, dots, ".", color=colour, alpha=0.3, ms=4)
        axes.plot(
            pooled.hours,
            [interval.value for interval in intervals],
            color=colour,
            lw=2.2 if main else 1.2,
            ls=DASHES.get(policy, "-"),
            label=LABELS[policy],
        )
    if metric == "calibration":
        axes.axhline(1, color=SOFT, lw=1)
    main_lines = [pooled.measures[p][metric] for p in pooled.measures]
    limit(axes, main_lines, keep=1.0 if metric == "calibration" else None)
    better = {"auc": "higher is better", "ne": "lower is better", "calibration": "1 is right"}
    axes.set_title(f"{MEASURE_LABELS[metric][0].upper()}{MEASURE_LABELS[metric][1:]}")
    axes.set_ylabel(better[metric])


def draw_refreshes(refreshes: Sequence[Mapping[str, Any]]) -> Figure:
    """What the gate saw at each refresh, and what each refresh cost."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    gate, cost = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 1])
    for decision, marker, colour in (
        ("promoted", "o", COLOURS[REFRESHED]),
        ("kept", "d", SOFT),
        ("refused", "X", REFUSED),
    ):
        chosen = [r for r in refreshes if r["decision"] == decision and _gate_saw(r) is not None]
        if chosen:
            gate.plot(
                [moment(r["as_of"]) for r in chosen],
                [100 * (_gate_saw(r) or 0.0) for r in chosen],
                marker,
                color=colour,
                ms=9 if decision == "refused" else 5,
                label=decision,
            )
    gate.axhline(0, color=SOFT, lw=1)
    gate.set_title("What the gate saw: challenger against champion on the newest matured slice")
    gate.set_ylabel("AUC points")
    if gate.get_legend_handles_labels()[0]:
        gate.legend(loc="upper right", bbox_to_anchor=(1, 1.2), ncols=3)
    for kind, marker, colour in (("head", ".", COLOURS[REFRESHED]), ("arms", "s", ARMS)):
        chosen = [r for r in refreshes if r["kind"] == kind]
        cost.plot(
            [moment(r["as_of"]) for r in chosen],
            [float(r["core_seconds"]) for r in chosen],
            marker,
            color=colour,
            ms=6,
            label=f"{kind} refresh",
        )
    cost.set_yscale("log")
    cost.margins(y=0.25)
    cost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    cost.yaxis.set_minor_locator(NullLocator())
    cost.set_title("What each refresh cost")
    cost.set_ylabel("core-seconds")
    cost.legend(loc="upper right", bbox_to_anchor=(1, 1.25), ncols=2)
    dates(cost)
    return figure


def _gate_saw(refresh: Mapping[str, Any]) -> float | None:
    champion, challenger = refresh.get("auc_champion"), refresh.get("auc_challenger")
    return None if champion is None or challenger is None else float(challenger - champion)
