"""Anyone's own log in Parquet: map its columns to the contract's and store it in contract form.

Only columns are settled here; which rows may stay is for the quality check to say, so a null where
the contract wants a value passes through and is put aside, with its reason, there.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from driftline.features.log import ROWS_PER_GROUP, IngestReport, nullable, span_of
from driftline.features.quality_schema import (
    FilePlan,
    find_key_type,
    parquet_files,
    plan_file,
    read_file_schema,
)
from driftline.platform.artefacts import whole_directory, write_json
from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.settings import DriftlineSettings, ParquetSource

logger = logging.getLogger(__name__)


def ingest_parquet(
    source: ParquetSource,
    destination: Path,
    *,
    settings: DriftlineSettings,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write ``impressions/``, ``catalogue/`` and ``counters/`` in contract form.

    Each table is a file, a folder that is searched for ``*.parquet``, or a pattern. Times may be
    timestamps of any unit, dates, ISO 8601 texts, or whole numbers since 1970; labels booleans, 0/1
    or true/false; categories also whole numbers. Columns that no one declared are left out with a
    note. Files are read a batch at a time.

    Args:
        source: Where the tables lie and what their columns are called.
        destination: Becomes the log; replaced if it exists.
        settings: Their ``features`` are the columns beside the fixed ones.
        progress: Called with (rows written, rows in all).

    Raises:
        SettingsError: ``columns`` maps something that is no column of the contract.
        ContractError: a file cannot be read, or its columns or values cannot be used.
    """
    tables = {
        name: parquet_files(path, table=name)
        for name, path in (
            ("impressions", source.impressions),
            ("catalogue", source.catalogue),
            ("counters", source.counters),
        )
        if path is not None
    }
    columns = _map_columns(source, settings, tables)
    key = find_key_type(tables, columns)
    schemas = _schemas(settings, key)
    plans = {
        name: [
            plan_file(
                path,
                schemas[name],
                columns=columns[name],
                time_zone=source.time_zone,
                refuse_extra=False,
            )
            for path in paths
        ]
        for name, paths in tables.items()
    }
    tally = _Tally(sum(plan.num_rows for group in plans.values() for plan in group), progress)
    with whole_directory(destination) as scratch:
        for name, group in plans.items():
            (scratch / name).mkdir()
            for number, plan in enumerate(group):
                tally.copy(name, plan, scratch / name / f"{number:05d}.parquet")
        report = tally.report(plans)
        write_json(scratch / "ingest.json", report.to_json())
    logger.info("wrote %s (%d impressions)", destination, report.num_impressions)
    return report


@dataclass
class _Tally:
    """Copies files and counts what goes by."""

    total: int
    progress: Callable[[int, int], None] | None
    rows: dict[str, int] = field(default_factory=dict)
    num_clicks: int = 0
    first: datetime | None = None
    last: datetime | None = None

    def copy(self, name: str, plan: FilePlan, destination: Path) -> None:
        """Convert one file."""
        with pq.ParquetWriter(destination, plan.schema) as writer:
            for _, rows in plan.batches():
                writer.write_table(rows, row_group_size=ROWS_PER_GROUP)
                self.rows[name] = self.rows.get(name, 0) + rows.num_rows
                if name == "impressions" and rows.num_rows:
                    self._look(rows)
                if self.progress is not None:
                    self.progress(sum(self.rows.values()), self.total)

    def _look(self, rows: pa.Table) -> None:
        self.num_clicks += pc.sum(rows.column("clicked")).as_py() or 0
        limits = pc.min_max(rows.column("event_time"))
        low, high = limits["min"].as_py(), limits["max"].as_py()
        if low is not None:
            self.first = min(self.first or low, low)
            self.last = max(self.last or high, high)

    def report(self, plans: Mapping[str, list[FilePlan]]) -> IngestReport:
        """Figures of the whole log.

        Raises:
            ContractError: no impression has a time.
        """
        if self.first is None or self.last is None:
            where = plans["impressions"][0].path
            raise ContractError(
                f"impressions: not one of {self.rows.get('impressions', 0):,} rows has an "
                f"event_time (first file: {where}); expected at least one row"
            )
        notes = [
            f"{name}: {note}" for name, group in plans.items() for p in group for note in p.notes
        ]
        return IngestReport(
            kind="parquet",
            num_impressions=self.rows["impressions"],
            num_clicks=self.num_clicks,
            num_products=self.rows.get("catalogue", 0),
            num_counter_rows=self.rows.get("counters", 0),
            span=span_of(self.first.astimezone(UTC), self.last.astimezone(UTC)),
            put_aside={},
            notes=tuple(dict.fromkeys(notes)),
        )


def _schemas(settings: DriftlineSettings, key: pa.DataType) -> dict[str, pa.Schema]:
    return {
        "impressions": nullable(impressions_schema(settings, key=key)),
        "catalogue": nullable(catalogue_schema(settings, key=key)),
        "counters": nullable(counters_schema(settings, key=key)),
    }


def _map_columns(
    source: ParquetSource, settings: DriftlineSettings, tables: Mapping[str, list[Path]]
) -> dict[str, dict[str, str]]:
    """The mapping of each table.

    ``event_time: ts`` holds for every table that has a column ``ts``; ``catalogue.event_time: ts``
    holds for the catalogue alone and wins.

    Raises:
        SettingsError: a key is no column of the contract.
    """
    names = {table: set(schema.names) for table, schema in _schemas(settings, pa.string()).items()}
    mapping: dict[str, dict[str, str]] = {table: {} for table in tables}
    found = {table: set(read_file_schema(paths[0]).names) for table, paths in tables.items()}
    unknown = []
    for key, column in source.columns.items():
        table, _, name = key.rpartition(".")
        if table:
            if table in mapping and name in names[table]:
                mapping[table][name] = column
            else:
                unknown.append(key)
            continue
        owners = [owner for owner in tables if name in names[owner]]
        if not owners:
            unknown.append(key)
        holders = [owner for owner in owners if column in found[owner]] or owners
        for owner in holders:
            if f"{owner}.{name}" not in source.columns:
                mapping[owner][name] = column
    if unknown:
        known = ", ".join(sorted(set().union(*names.values())))
        raise SettingsError(
            f"source.columns: {', '.join(map(repr, unknown))} is no column of the contract; keys "
            f"must be among {known}, with the table before it (catalogue.event_time) where tables "
            "differ; values are columns of the file"
        )
    return mapping
