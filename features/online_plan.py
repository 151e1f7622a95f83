"""What a materialisation must read: only what became known since the last one, if that is enough.

``materialized.json`` keeps, by view, the moment of the last materialisation and the fingerprint of
each hour's rows at that time. An online store can only be moved forward: when an old hour differs,
or the asked moment lies before the last one, the view starts anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from driftline.features.feast_plugins.scan import DuckDbSettings, connect
from driftline.features.feast_plugins.snapshot import current_version
from driftline.features.paths import online_folder
from driftline.features.sources import hour_fingerprints
from driftline.features.views import View
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, format_time, parse_time

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Kind = Literal["unchanged", "added", "rebuilt"]


@dataclass(frozen=True)
class ViewPlan:
    """What to do with one view."""

    view: View
    kind: Kind
    start: datetime
    """Oldest event time to read."""
    state: Mapping[str, Any]
    """What ``materialized.json`` says of the view afterwards."""


def plan_view(
    view: View, settings: DriftlineSettings, state: Mapping[str, Any] | None, *, as_of: datetime
) -> ViewPlan:
    """Decide how a view gets to ``as_of`` from what the last materialisation left."""
    hours = _known_hours(view, settings, as_of=as_of)
    kind, start = _decide(view, settings, state, hours=hours, as_of=as_of)
    after = {
        "version": view.version,
        "as_of": format_time(as_of),
        "hours": {str(hour): value for hour, value in hours.items()},
    }
    return ViewPlan(view, kind, start, after)


def _decide(
    view: View,
    settings: DriftlineSettings,
    state: Mapping[str, Any] | None,
    *,
    hours: Mapping[int, str],
    as_of: datetime,
) -> tuple[Kind, datetime]:
    everything = EPOCH if view.ttl is None else as_of - view.ttl
    if state is None or state["version"] != view.version or not _is_online(view, settings):
        return "rebuilt", everything
    before = parse_time(state["as_of"])
    old = {int(hour): value for hour, value in state["hours"].items()}
    # Hours before this one are settled. Derived rows lie on the hour; others may come within it.
    settled = (before - EPOCH) // HOUR + (1 if view.origin == "derived" else 0)
    oldest = _oldest_hour(view, as_of)
    kept = {hour: value for hour, value in old.items() if oldest <= hour < settled}
    if as_of < before or kept != {h: v for h, v in hours.items() if h < settled}:
        return "rebuilt", everything
    grown = [hour for hour in hours if hour >= settled]
    if not grown or (as_of == before and hours == old):
        return "unchanged", as_of
    start = EPOCH + min(grown) * HOUR
    if view.origin == "counters":  # a row may become known long after its event time
        start = _first_event(view, settings, since=start)
    return "added", max(everything, min(start, as_of))


def _known_hours(view: View, settings: DriftlineSettings, *, as_of: datetime) -> dict[int, str]:
    """Fingerprints of the hours that hold rows known at ``as_of`` which can still count."""
    first, last = _oldest_hour(view, as_of), (as_of - EPOCH) // HOUR
    found = hour_fingerprints(view, settings)
    return {hour: value for hour, value in found.items() if first <= hour <= last}


def _oldest_hour(view: View, as_of: datetime) -> int:
    return 0 if view.ttl is None else (as_of - view.ttl - EPOCH) // HOUR


def _first_event(view: View, settings: DriftlineSettings, *, since: datetime) -> datetime:
    """Oldest event time of the rows that became known at or after ``since``."""
    moment = f"make_timestamptz({(since - EPOCH) // timedelta(microseconds=1)})"
    files = f"{view.folder(settings)}/*.parquet".replace("'", "''")
    limits = DuckDbSettings(settings.store.threads, settings.store.memory_limit)
    with connect(limits) as connection:
        found = connection.execute(
            f"SELECT epoch_us(min(event_time)) FROM read_parquet('{files}') "
            f"WHERE event_time >= {moment} OR created_time >= {moment}"
        ).fetchone()
    assert found is not None
    return since if found[0] is None else EPOCH + timedelta(microseconds=found[0])


def _is_online(view: View, settings: DriftlineSettings) -> bool:
    if settings.store.online == "redis":
        return True
    return current_version(online_folder(settings) / view.name) is not None
