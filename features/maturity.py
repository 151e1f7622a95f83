"""When the outcome of an impression is known, and what it then is; the one rule for everybody.

An outcome is known ``maturity`` after the impression. A click that arrives later is lost: it
counts as no click, in counters and in training labels alike.
"""

from datetime import timedelta
from typing import Final

import duckdb
import pyarrow as pa

HOUR_MICROS: Final = 3_600_000_000


def known_label_sql(maturity: timedelta) -> str:
    """SQL over ``clicked``, ``event_time`` and ``click_time``: the label once it is known.

    A click without a time counts as a click before its label matured.
    """
    return (
        f"(clicked AND (click_time IS NULL OR "
        f"epoch_us(click_time) - epoch_us(event_time) <= {to_micros(maturity)}))"
    )


def known_hour_sql(maturity: timedelta) -> str:
    """SQL over ``event_time``: the first hour boundary (hours since the epoch) that knows it."""
    late = to_micros(maturity) + HOUR_MICROS - 1
    return f"((epoch_us(event_time) + {late}) // {HOUR_MICROS})"


def known_label(impressions: pa.Table, *, maturity: timedelta) -> pa.ChunkedArray:
    """Matured label of each row, boolean, in the order of the rows. ``[B]``.

    Args:
        impressions: Contract columns ``event_time``, ``clicked`` and ``click_time``.
        maturity: ``settings.labels.maturity``.
    """
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("impressions", impressions)
        query = f"SELECT {known_label_sql(maturity)} AS label FROM impressions"
        return connection.sql(query).to_arrow_table().column("label")


def to_micros(duration: timedelta) -> int:
    """Whole microseconds."""
    return duration // timedelta(microseconds=1)
