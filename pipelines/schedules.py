"""What falls due when: the tiers' two clocks as intervals, and event time as wall time."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from driftline.pipelines.plan import schedule
from driftline.platform.settings import CadenceSettings, DriftlineSettings
from driftline.platform.windows import HOUR, Split, floor_time, format_time, parse_time

JobKind = Literal["materialize", "head", "arms"]
JOB_KINDS: Final[tuple[JobKind, ...]] = ("materialize", "head", "arms")


def intervals(settings: DriftlineSettings) -> dict[JobKind, timedelta]:
    """How often each job runs, in event time, as ``driftline plan`` says.

    One job brings all tiers online, as often as the fastest one asks for: what has not changed
    costs next to nothing.
    """
    due = schedule(settings)
    return {"materialize": min(due.materialize.values()), "head": due.head, "arms": due.arms}


@dataclass(frozen=True)
class Clock:
    """Event time as a function of wall time; the identity when ``speed`` is 1 and nothing moved.

    ``event = start + speed * (wall - anchor)``, and never beyond ``end``.
    """

    anchor: datetime
    """Wall time at which ``start`` was the event time."""
    start: datetime
    speed: float = 1.0
    """Seconds of event time that pass in one second."""
    end: datetime | None = None

    @classmethod
    def of(
        cls,
        cadence: CadenceSettings,
        *,
        now: datetime,
        split: Split | None = None,
        known: datetime | None = None,
    ) -> "Clock":
        """The clock of ``driftline up`` at wall time ``now``.

        Args:
            cadence: Which clock is asked for.
            now: Wall time of the start.
            split: The log's stale and recent part; only for the event clock.
            known: What the champion knows up to; the event clock does not start before it.
        """
        if cadence.clock == "wall":
            return cls(anchor=now, start=now)
        assert split is not None, "the event clock needs a log"
        start = cadence.start or max(split.id.start, known or split.id.start)
        return cls(now, start, speed=3600 / cadence.seconds_per_hour, end=split.id.end)

    @property
    def identity(self) -> str:
        """Equal for clocks that show the same time; every wall clock does."""
        offset = (self.start - self.anchor).total_seconds()
        return "wall" if (offset, self.speed) == (0, 1) else str(self.to_json())

    def event_time(self, wall: datetime) -> datetime:
        """Event time at a moment of wall time."""
        event = self.start + (wall - self.anchor) * self.speed
        return event if self.end is None else min(event, self.end)

    def wall_time(self, event: datetime) -> datetime:
        """The moment of wall time at which an event time is reached."""
        return self.anchor + (event - self.start) / self.speed

    def wall_interval(self, interval: timedelta) -> timedelta:
        """How long an interval of event time takes."""
        return max(interval / self.speed, timedelta(seconds=1))

    def as_of(self, wall: datetime, *, interval: timedelta) -> datetime:
        """The moment a run stands for: the newest whole hour (or interval, if that is shorter).

        Two runs within one hour stand for the same moment, so the second one has nothing to do.
        """
        return floor_time(self.event_time(wall), min(interval, HOUR))

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "anchor": format_time(self.anchor),
            "start": format_time(self.start),
            "speed": self.speed,
            "end": None if self.end is None else format_time(self.end),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Clock":
        """Read what ``to_json`` gave."""
        end = raw["end"]
        return cls(
            anchor=parse_time(raw["anchor"]),
            start=parse_time(raw["start"]),
            speed=float(raw["speed"]),
            end=None if end is None else parse_time(end),
        )
