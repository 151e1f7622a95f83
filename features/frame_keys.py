"""What each hour's frame is made from, as one key, without reading a feature row.

A frame depends on its own impressions, on the definitions of the views, and on every feature row
that its requests may see: known by the end of the hour and not yet expired at its start.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa

from driftline.features.feast_plugins.scan import DuckDbSettings, connect
from driftline.features.log import ImpressionLog
from driftline.features.maturity import HOUR_MICROS
from driftline.features.sources import hour_fingerprints
from driftline.features.views import View, feature_views
from driftline.platform.artefacts import hash_value
from driftline.platform.columns import head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

FORMAT: Final = 1
"""Raise it when the content of a frame changes for equal inputs."""


def frame_keys(
    log: ImpressionLog, settings: DriftlineSettings, *, hours: Sequence[datetime]
) -> dict[datetime, str]:
    """Key of each hour's frame.

    Args:
        log: The clean log.
        settings: Decides views and columns.
        hours: Starts of whole hours, ascending.
    """
    if not hours:
        return {}
    numbers = {hour: (hour - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR for hour in hours}
    shared = hash_value(
        [
            FORMAT,
            [(column.name, column.kind) for column in head_columns(settings)],
            settings.labels.maturity_minutes,
            str(log.key_type),
            *(label.name for label in settings.select(kind="label")),
        ]
    )
    own = _impression_fingerprints(log, settings, Window(hours[0], hours[-1] + HOUR))
    views = feature_views(settings)
    seen = {view.name: _visible(view, settings, list(numbers.values())) for view in views}
    return {
        hour: hash_value(
            [
                shared,
                own.get(number),
                [(view.name, view.version, seen[view.name][number]) for view in views],
            ]
        )[:32]
        for hour, number in numbers.items()
    }


def _visible(view: View, settings: DriftlineSettings, hours: Sequence[int]) -> dict[int, str]:
    """For each hour one hash of the rows of a view that its requests may see."""
    known: Mapping[int, str] = hour_fingerprints(view, settings)
    if view.ttl is not None:
        # A request at the start of the hour sees rows as old as the time to live.
        back = -(-view.ttl // HOUR)
        reach = range(back + 1)
        return {hour: hash_value([known.get(hour - age) for age in reach]) for hour in hours}
    chained: dict[int, str] = {}
    total, rest = "", iter([*known.items(), (1 << 62, "")])
    moment, fingerprint = next(rest)
    for hour in hours:
        while moment <= hour:
            total = hash_value([total, moment, fingerprint])
            moment, fingerprint = next(rest)
        chained[hour] = total
    return chained


def _impression_fingerprints(
    log: ImpressionLog, settings: DriftlineSettings, window: Window
) -> dict[int, str]:
    """Hash of the impressions of each hour that holds any, whatever their order."""
    rows = log.impressions(window)
    limits = DuckDbSettings(settings.store.threads, settings.store.memory_limit)
    with connect(limits) as connection:
        connection.register("impressions", rows)
        found: pa.Table = connection.sql(
            f"SELECT epoch_us(event_time) // {HOUR_MICROS} AS hour, count(*) AS num, "
            f"bit_xor(hash(impressions)) AS mix FROM impressions GROUP BY hour"
        ).to_arrow_table()
    return {row["hour"]: f"{row['num']}:{row['mix']:x}" for row in found.to_pylist()}
