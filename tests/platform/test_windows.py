"""Windows hold every moment once; the split leaves no hour out."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.windows import (
    HOUR,
    Window,
    ceil_time,
    floor_time,
    format_time,
    parse_time,
    split_span,
)

moments = st.datetimes(datetime(2015, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))


@given(start=moments, minutes=st.integers(0, 5_000), probe=st.floats(0, 1))
def test_hours_cover_the_window_once_and_in_order(
    start: datetime, minutes: int, probe: float
) -> None:
    window = Window(start, start + timedelta(minutes=minutes))
    hours = list(window.hours())
    if minutes == 0:
        assert hours == []
        return
    assert hours[0].start == window.start
    assert hours[-1].end == window.end
    assert all(left.end == right.start for left, right in pairwise(hours))
    assert all(hour.end - hour.start <= HOUR for hour in hours)
    moment = start + probe * (window.end - window.start)
    assert sum(moment in hour for hour in hours) == (moment in window)


@given(moment=moments)
def test_floor_and_ceil_enclose_a_moment(moment: datetime) -> None:
    low, high = floor_time(moment, HOUR), ceil_time(moment, HOUR)
    assert low <= moment <= high
    assert low.minute == high.minute == 0
    assert high - low in (timedelta(0), HOUR)


@given(moment=moments)
def test_a_written_time_reads_back(moment: datetime) -> None:
    assert parse_time(format_time(moment)) == moment


@pytest.mark.parametrize("text", ["yesterday", "2019-11-12T05:00:00", ""])
def test_a_time_that_is_none_or_has_no_zone_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ISO 8601|zone"):
        parse_time(text)


def test_a_window_needs_zones_and_order() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match="time zone"):
        Window(datetime(2026, 1, 1), now)
    with pytest.raises(ValueError, match="ends before it starts"):
        Window(now, now - HOUR)


@given(start=moments, hours=st.integers(4, 2_000), share=st.floats(0.01, 0.99))
def test_a_split_loses_nothing(start: datetime, hours: int, share: float) -> None:
    span = Window(floor_time(start, HOUR), floor_time(start, HOUR) + hours * HOUR)
    end = ceil_time(span.start + (span.end - span.start) * share, HOUR)
    if end >= span.end:
        with pytest.raises(ValueError, match="inside the log"):
            split_span(span, ood_share=share)
        return
    split = split_span(span, ood_share=share)
    assert (split.ood.start, split.ood.end) == (span.start, split.id.start)
    assert split.id.end == span.end
    assert split.ood.end.minute == 0


def test_a_split_at_a_moment_outside_the_log_names_the_setting() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match=r"split\.ood_end"):
        split_span(Window(start, start + 5 * HOUR), ood_share=0.5, ood_end=start - HOUR)
