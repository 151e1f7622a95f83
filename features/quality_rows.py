"""Judge rows: which of them may not enter a clean log, and why."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from driftline.platform.contract import TIME

Mask = np.ndarray[Any, np.dtype[np.bool_]]

DUPLICATE: Final = "duplicate impression_id"
FUTURE: Final = "event_time in the future"


def find_faults(
    rows: pa.Table, schema: pa.Schema, *, latest: datetime, labels: Sequence[str] = ()
) -> list[tuple[str, Mask]]:
    """Reasons against rows of any of the three tables, each with the rows it holds for.

    Args:
        rows: In the form of the contract, nulls allowed anywhere.
        schema: The contract's schema, which says what may be null.
        latest: Rows with a later ``event_time`` are from the future.
        labels: Columns of impressions that must lie in [0, 1].
    """
    faults: list[tuple[str, Mask]] = []
    for field in schema:
        column = rows.column(field.name)
        if not field.nullable:
            faults.append((f"{field.name} is missing", _mask(pc.is_null(column))))
            if pt.is_string(field.type):
                faults.append((f"{field.name} is empty", _mask(pc.equal(column, ""))))
        if pt.is_floating(field.type):
            finite = pc.is_finite(column)
            faults.append((f"{field.name} is not finite", _mask(pc.invert(finite))))
    limit = pa.scalar(latest, TIME)
    event_time = rows.column("event_time")
    faults.append((FUTURE, _mask(pc.greater(event_time, limit))))
    if "clicked" in schema.names:
        faults += _impression_faults(rows, limit)
        faults += [(f"{name} outside [0, 1]", _outside(rows.column(name))) for name in labels]
    if "created_time" in schema.names:
        early = pc.less(rows.column("created_time"), event_time)
        faults.append(("created_time before event_time", _mask(early)))
    return [(reason, mask) for reason, mask in faults if mask.any()]


def _impression_faults(rows: pa.Table, limit: pa.Scalar) -> list[tuple[str, Mask]]:
    click_time, clicked = rows.column("click_time"), rows.column("clicked")
    propensity = rows.column("propensity")
    outside = pc.or_(pc.less_equal(propensity, 0), pc.greater(propensity, 1))
    timed = pc.is_valid(click_time)
    return [
        (
            "click_time before event_time",
            _mask(pc.less(click_time, rows.column("event_time"))),
        ),
        ("click_time in the future", _mask(pc.greater(click_time, limit))),
        ("click_time without a click", _mask(pc.and_(timed, pc.invert(clicked)))),
        ("propensity outside (0, 1]", _mask(outside)),
        ("position is negative", _mask(pc.less(rows.column("position"), 0))),
    ]


def _outside(column: pa.ChunkedArray) -> Mask:
    return _mask(pc.or_(pc.less(column, 0), pc.greater(column, 1)))


def _mask(values: pa.ChunkedArray) -> Mask:
    """Null, the result of comparing with null, counts as no fault."""
    return np.asarray(pc.fill_null(values, False), dtype=bool)


class Quarantine:
    """Rows put aside, written as they come; one Parquet file a table, none if there are none.

    Columns: those of the contract (nullable), then ``file``, ``row`` (from 0) and ``reasons``.
    """

    def __init__(self, destination: Path, schema: pa.Schema) -> None:
        self.schema = pa.schema(
            [
                *(field.with_nullable(True) for field in schema),
                pa.field("file", pa.string()),
                pa.field("row", pa.int64()),
                pa.field("reasons", pa.list_(pa.string())),
            ]
        )
        self.destination = destination
        self.counts: Counter[str] = Counter()
        self.num_rows = 0
        self.examples: dict[str, str] = {}
        self._writer: pq.ParquetWriter | None = None

    def add(
        self,
        rows: pa.Table,
        *,
        files: Sequence[str],
        numbers: Sequence[int],
        reasons: list[list[str]],
    ) -> None:
        """Put rows aside, each with where it stood and all that is wrong with it."""
        for file, number, row_reasons in zip(files, numbers, reasons, strict=True):
            self.counts.update(row_reasons)
            for reason in row_reasons:
                self.examples.setdefault(reason, f"{file} row {number}")
        self.num_rows += rows.num_rows
        columns = [rows.column(name) for name in self.schema.names[:-3]]
        places = [pa.array(files, pa.string()), pa.array(numbers, pa.int64())]
        table = pa.table(
            [*columns, *places, pa.array(reasons, pa.list_(pa.string()))], schema=self.schema
        )
        if self._writer is None:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self.destination, self.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def split_rows(rows: pa.Table, faults: list[tuple[str, Mask]]) -> tuple[Mask, list[list[str]]]:
    """Which rows have a fault, and the reasons of each of those, in order of rows."""
    if not faults:
        return np.zeros(rows.num_rows, dtype=bool), []
    table = np.stack([mask for _, mask in faults])
    bad: Mask = np.any(table, axis=0)
    names = [reason for reason, _ in faults]
    reasons = [
        [name for name, hit in zip(names, hits, strict=True) if hit] for hits in table[:, bad].T
    ]
    return bad, reasons
