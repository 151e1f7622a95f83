"""Rows taken apart by columns and put together anew: permuted, drawn, paired again."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.errors import SettingsError
from driftline.platform.transfer.texts import with_column

FIXED: Final = (
    "impression_id",
    "request_id",
    "event_time",
    "clicked",
    "clicked_ever",
    "click_time",
)
"""Columns that say which row it is and what came of it; all others are features."""

OWNERS: Final = {"page": "page", "ad": "ad", "ad_category": "ad", "category_pair": "pair"}
"""What the columns of each alias belong to; see ``platform.columns``."""

MICROS_PER_HOUR: Final = 3_600_000_000
NOWHERE: Final = -1


def column_groups(frame: pa.Table) -> dict[str, tuple[str, ...]]:
    """Feature columns by what they belong to: ``page``, ``ad``, ``pair``, ``context``.

    Every feature is in one group; the key and the text of a product are features of it.
    """
    groups: dict[str, list[str]] = {"page": [], "ad": [], "pair": [], "context": []}
    for name in frame.column_names:
        if name not in FIXED:
            groups[_owner(name)].append(name)
    return {group: tuple(names) for group, names in groups.items()}


def permuted(
    frame: pa.Table, groups: Iterable[Sequence[str]], random: np.random.Generator
) -> pa.Table:
    """The columns of each group in an order of their own; every marginal is kept exactly."""
    for names in groups:
        frame = moved(frame, names, random.permutation(frame.num_rows))
    return frame


def moved(frame: pa.Table, names: Sequence[str], rows: NDArray[np.int64]) -> pa.Table:
    """The frame with some columns taken from other rows; null for row -1."""
    place = pa.array(rows, pa.int64(), mask=rows == NOWHERE)
    for name in names:
        frame = with_column(frame, name, frame[name].take(place))
    return frame


def drawn(frame: pa.Table, random: np.random.Generator) -> pa.Table:
    """Every feature drawn on its own: a category by its frequency, a number by its quantiles."""
    count = frame.num_rows
    for name in (name for names in column_groups(frame).values() for name in names):
        if pa.types.is_floating(frame.schema.field(name).type):
            frame = with_column(frame, name, _drawn_numbers(frame[name], random))
        else:
            frame = moved(frame, [name], random.integers(0, count, size=count))
    return frame


def exchanged_ads(
    frame: pa.Table, random: np.random.Generator, *, within_hours: int | None
) -> NDArray[np.int64]:
    """For each page the row whose ad it gets; each row lends its ad once. ``[N]``."""
    period = np.zeros(frame.num_rows, np.int64)
    if within_hours is not None:
        times = frame["event_time"].cast(pa.int64()).to_numpy()
        period = times // (within_hours * MICROS_PER_HOUR)
    rows = np.empty(frame.num_rows, np.int64)
    rows[np.argsort(period, kind="stable")] = np.lexsort((random.random(len(rows)), period))
    return rows


def latest_of_pair(frame: pa.Table, paired: pa.Table, *, category: str) -> NDArray[np.int64]:
    """For each new pair a logged row with its two categories: the last before it, or the next.

    Args:
        frame: Logged rows.
        paired: Rows with other pairs. ``[N]``.
        category: Product feature that makes a pair of categories.

    Returns:
        Rows of ``frame``, -1 where no row has these categories. ``[N]``.

    Raises:
        SettingsError: the products have no such feature.
    """
    columns = [f"{role}__{category}" for role in ("page", "ad")]
    if missing := [column for column in columns if column not in frame.column_names]:
        raise SettingsError(
            f"re_paired.category: the frame has no column {missing}; give the feature that is "
            "counted by pairs (counters.category), or none to leave pair counters out"
        )
    logged, wanted = (_pairs(table, columns) for table in (frame, paired))
    found = np.full(paired.num_rows, NOWHERE, np.int64)
    for direction in ("backward", "forward"):
        open_rows = wanted[(found[wanted["row"]] == NOWHERE)]
        merged = pd.merge_asof(
            open_rows, logged, on="time", by="pair", suffixes=("", "_logged"), direction=direction
        )
        found[merged["row"]] = merged["row_logged"].fillna(NOWHERE).astype(np.int64)
    return found


def _owner(name: str) -> str:
    if name in ("page_product_id", "ad_product_id"):
        return name.removesuffix("_product_id")
    alias, is_aliased, _ = name.partition("__")
    return OWNERS.get(alias, "context") if is_aliased else "context"


def _pairs(frame: pa.Table, columns: Sequence[str]) -> pd.DataFrame:
    """Time, pair and number of the rows that have both categories, in order of time."""
    key = pc.binary_join_element_wise(*(frame[name] for name in columns), "\x1f")
    times = frame["event_time"].cast(pa.int64()).to_numpy()
    pairs = pd.DataFrame({"time": times, "pair": key.to_pylist(), "row": np.arange(frame.num_rows)})
    return pairs.dropna(subset="pair").sort_values("time", kind="stable")


def _drawn_numbers(column: pa.ChunkedArray, random: np.random.Generator) -> pa.Array:
    values = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    present = values[~np.isnan(values)]
    missing = random.random(len(values)) < 1 - len(present) / max(len(values), 1)
    chances = random.random(len(values))
    numbers = np.quantile(present, chances) if len(present) else np.zeros(len(values))
    return pa.array(numbers, pa.float64(), mask=missing)
