"""Event time: half-open windows, the stale/recent split, and when a label may be believed."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from driftline.platform.errors import SettingsError

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@dataclass(frozen=True, order=True)
class Window:
    """Half-open interval of event time, ``[start, end)``, both zone-aware.

    Raises:
        ValueError: a bound has no time zone, or the end lies before the start.
    """

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise ValueError(f"window bounds need a time zone, got {self.start!r} and {self.end!r}")
        if self.end < self.start:
            raise ValueError(f"window ends before it starts: {self.start} .. {self.end}")

    def __str__(self) -> str:
        return f"{format_time(self.start)}..{format_time(self.end)}"

    def __contains__(self, moment: datetime) -> bool:
        return self.start <= moment < self.end

    @property
    def num_hours(self) -> float:
        """Length in hours."""
        return (self.end - self.start) / HOUR

    def hours(self) -> Iterator["Window"]:
        """Whole clock hours that touch the window, clipped to it, in order."""
        return self.steps(HOUR)

    def days(self) -> Iterator["Window"]:
        """Whole UTC days that touch the window, clipped to it, in order."""
        return self.steps(DAY)

    def steps(self, step: timedelta) -> Iterator["Window"]:
        """Clock-aligned pieces of length ``step``, clipped to the window, in order."""
        left = floor_time(self.start, step) if self.start < self.end else self.end
        while left < self.end:
            yield Window(max(left, self.start), min(left + step, self.end))
            left += step

    def last(self, length: timedelta) -> "Window":
        """The newest part of the window, at most ``length`` long."""
        return Window(max(self.start, self.end - length), self.end)


def floor_time(moment: datetime, step: timedelta) -> datetime:
    """The newest multiple of ``step`` since the epoch that is not after ``moment``."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return epoch + (moment - epoch) // step * step


def ceil_time(moment: datetime, step: timedelta) -> datetime:
    """The first multiple of ``step`` since the epoch that is not before ``moment``."""
    floor = floor_time(moment, step)
    return floor if floor == moment else floor + step


def format_time(moment: datetime) -> str:
    """ISO 8601 in UTC with a ``Z``; fractions only if there are any. Sorts like the time."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """Read ISO 8601 with a time zone.

    Raises:
        ValueError: not a time, or no time zone.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"time must be ISO 8601 such as 2019-11-12T05:00:00Z, got {text!r}"
        ) from error
    if moment.tzinfo is None:
        raise ValueError(f"time needs a zone, e.g. {text}Z for UTC, got {text!r}")
    return moment.astimezone(UTC)


@dataclass(frozen=True)
class Split:
    """The stale, abundant part of a log (OOD) and the recent part that is replayed (ID).

    Source: papers.md S0.23, S0.24, A0.15 (temporal boundary).
    """

    ood: Window
    id: Window


def split_span(span: Window, *, ood_share: float, ood_end: datetime | None = None) -> Split:
    """Cut a log in two at an hour boundary.

    Raises:
        SettingsError: the boundary leaves one side empty.
    """
    end = ceil_time(ood_end or span.start + (span.end - span.start) * ood_share, HOUR)
    if not span.start < end < span.end:
        raise SettingsError(
            f"split must fall inside the log {span}, got {format_time(end)}; "
            f"change split.ood_share or split.ood_end"
        )
    return Split(ood=Window(span.start, end), id=Window(end, span.end))
