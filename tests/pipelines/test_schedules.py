"""When jobs fall due, and which moment a run stands for."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.pipelines.run_log import RunLog
from driftline.pipelines.schedules import Clock, intervals
from driftline.platform.settings import CadenceSettings, parse_settings
from driftline.platform.windows import HOUR, Split, Window

WALL = datetime(2026, 11, 1, 10, 20, 30, tzinfo=UTC)
START = datetime(2026, 1, 5, tzinfo=UTC)
SPLIT = Split(ood=Window(START - 24 * HOUR, START), id=Window(START, START + 48 * HOUR))
MARKET = {
    "name": "m",
    "workspace": "w",
    "source": {"kind": "simulate", "start": "2026-01-01T00:00:00Z"},
    "features": [],
}


def test_intervals_follow_from_the_tiers() -> None:
    tiers = {
        "short": {"value_freshness_hours": 4, "parameter_freshness_hours": 6},
        "medium": {"value_freshness_hours": 100, "parameter_freshness_hours": 3},
        "long": {"value_freshness_hours": 500, "parameter_freshness_hours": 300},
    }
    found = intervals(parse_settings({**MARKET, "tiers": tiers}, origin="test"))

    assert found == {"materialize": 2 * HOUR, "head": 3 * HOUR, "arms": 300 * HOUR}


def test_the_wall_clock_is_now() -> None:
    clock = Clock.of(CadenceSettings(), now=WALL)

    assert clock.event_time(WALL + HOUR) == WALL + HOUR
    assert clock.wall_interval(HOUR) == HOUR
    assert clock.as_of(WALL, interval=HOUR) == WALL.replace(minute=0, second=0)


def test_the_event_clock_passes_an_hour_in_the_seconds_given() -> None:
    clock = Clock.of(CadenceSettings(clock="event", seconds_per_hour=10), now=WALL, split=SPLIT)

    assert clock.event_time(WALL) == START
    assert clock.event_time(WALL + timedelta(seconds=25)) == START + 2.5 * HOUR
    assert clock.as_of(WALL + timedelta(seconds=25), interval=HOUR) == START + 2 * HOUR
    assert clock.wall_interval(HOUR) == timedelta(seconds=10)


def test_the_event_clock_stops_at_the_end_of_the_log() -> None:
    clock = Clock.of(CadenceSettings(clock="event"), now=WALL, split=SPLIT)

    assert clock.event_time(WALL + 1000 * HOUR) == SPLIT.id.end


@given(
    seconds=st.floats(0, 400, allow_nan=False),
    speed=st.floats(0.5, 3600),
)
def test_wall_and_event_time_are_inverse(seconds: float, speed: float) -> None:
    clock = Clock(anchor=WALL, start=START, speed=speed)
    wall = WALL + timedelta(seconds=seconds)

    assert abs(clock.wall_time(clock.event_time(wall)) - wall) < timedelta(milliseconds=1)
    assert Clock.from_json(clock.to_json()) == clock


def test_the_run_log_remembers_the_last_run_of_each_kind(tmp_path: Path) -> None:
    runs = RunLog(tmp_path / "state" / "runs.db")
    assert runs.last("head") is None
    first = runs.begin("head", as_of=START, now=WALL, log=tmp_path / "1.log")
    runs.end(first, "failed", "no champion", now=WALL + HOUR)
    runs.begin("head", as_of=START + HOUR, now=WALL, log=tmp_path / "2.log")
    runs.begin("arms", as_of=START, now=WALL, log=tmp_path / "3.log")

    last = runs.last("head")

    assert last is not None
    assert (last.as_of, last.outcome, last.ended) == ("2026-01-05T01:00:00Z", "running", None)
    assert [run.kind for run in runs.runs()] == ["arms", "head", "head"]
    assert runs.runs()[-1].message == "no champion"


def test_runs_of_a_killed_service_are_marked(tmp_path: Path) -> None:
    runs = RunLog(tmp_path / "runs.db")
    runs.begin("head", as_of=START, now=WALL, log=tmp_path / "1.log")

    assert runs.interrupt_unfinished(now=WALL) == 1
    last = runs.last("head")
    assert last is not None
    assert last.outcome == "interrupted"


@pytest.mark.parametrize("clock", ["wall", "event"])
def test_an_unknown_wish_of_the_cadence_is_refused(clock: str) -> None:
    with pytest.raises(ValueError, match="seconds_per_our"):
        CadenceSettings.model_validate({"clock": clock, "seconds_per_our": 3})
