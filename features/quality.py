"""The quality check: a log in contract form, or a clear refusal; nothing disappears silently.

A *file* whose columns cannot be used is refused. A *row* that may not enter goes to ``quarantine/``
with its reasons and is counted. What is unusual but usable is counted only: rows out of order (they
are sorted), two versions of a product at the same moment (the last wins), and impressions of
products that the catalogue does not hold: serving answers for such products too, so a model must
learn from them.

Memory stays bounded by ``store.memory_limit`` whatever the length of the log: files are read a
batch at a time, staged by day, and sorted a day at a time by DuckDB, which spills to disk.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from driftline.features.log import span_of
from driftline.features.quality_rows import DUPLICATE, Quarantine, find_faults, split_rows
from driftline.features.quality_schema import (
    FilePlan,
    find_key_type,
    parquet_files,
    plan_file,
)
from driftline.features.quality_sort import (
    ORDINAL,
    Stage,
    connect,
    find_repeats,
    read_files,
    read_repeats,
    write_sorted,
)
from driftline.platform.artefacts import (
    hash_files,
    hash_value,
    read_json,
    whole_directory,
    write_json,
)
from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.errors import ContractError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import Window, format_time

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

KEYS: Final = {
    "impressions": ("impression_id",),
    "catalogue": ("product_id", "event_time"),
    "counters": ("product_id", "event_time", "created_time"),
}
SORTED_BY: Final = {
    "impressions": ("event_time", "impression_id"),
    "catalogue": ("event_time", "product_id"),
    "counters": ("event_time", "product_id", "created_time"),
}


@dataclass(frozen=True)
class TableVerdict:
    """What became of one table."""

    num_rows: int = 0
    num_clean: int = 0
    num_quarantined: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Reason: rows it holds for; a row may have several."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """Reason: where the first such row stands."""
    num_out_of_order: int = 0
    """Rows older than a row before them; they are sorted, not put aside."""
    num_replaced: int = 0
    """Rows whose key came again later (catalogue, counters): the last one counts."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of a quality check that did not refuse the log."""

    impressions: TableVerdict
    catalogue: TableVerdict
    counters: TableVerdict | None
    span: Window
    num_clicks: int
    key_type: str
    num_products: int
    """Products with at least one version in the catalogue."""
    num_unknown_products: int
    """Products of impressions that the catalogue does not hold."""
    num_rows_unknown_page: int
    num_rows_unknown_ad: int
    put_aside_at_ingest: Mapping[str, int]
    content: str
    """Hash of all files of the clean log: two logs may agree in every count."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self) | {"span": [format_time(self.span.start), format_time(self.span.end)]}

    def rows(self) -> list[tuple[str, str]]:
        """What a person wants to know, as (name, text) pairs."""
        seen = self.impressions
        share = self.num_clicks / seen.num_clean
        lines = [
            ("span", f"{self.span} ({self.span.num_hours:,.0f} h)"),
            ("impressions", f"{seen.num_clean:,} clean of {seen.num_rows:,}"),
            ("clicks", f"{self.num_clicks:,} ({share:.2%})"),
            ("out of order", f"{seen.num_out_of_order:,} (sorted)"),
            ("products", f"{self.num_products:,} in {self.catalogue.num_clean:,} versions"),
            (
                "unknown products",
                f"{self.num_unknown_products:,} (page of {self.num_rows_unknown_page:,}, "
                f"ad of {self.num_rows_unknown_ad:,} impressions; kept)",
            ),
        ]
        if self.counters is not None:
            lines.append(("counter rows", f"{self.counters.num_clean:,}"))
        for name, table in self._tables():
            lines += [
                (f"quarantine, {name}", f"{count:,} {reason} (first: {table.examples[reason]})")
                for reason, count in table.reasons.items()
            ]
            if table.num_replaced:
                lines.append((f"replaced, {name}", f"{table.num_replaced:,} by a later row"))
            lines += [(f"note, {name}", note) for note in table.notes]
        lines += [
            ("put aside at ingest", f"{count:,} {reason}")
            for reason, count in self.put_aside_at_ingest.items()
        ]
        return lines

    def _tables(self) -> list[tuple[str, TableVerdict]]:
        tables = [("impressions", self.impressions), ("catalogue", self.catalogue)]
        return tables + ([("counters", self.counters)] if self.counters is not None else [])


def check_log(
    raw: Path,
    clean: Path,
    *,
    settings: DriftlineSettings,
    now: datetime,
    progress: Progress | None = None,
) -> Verdict:
    """Check a log and write its clean form, sorted, one file a UTC day.

    Args:
        raw: Folder with ``impressions/`` and, where there are any, ``catalogue/``, ``counters/``.
        clean: Becomes the clean log with ``quarantine/`` and ``verdict.json``; replaced if present.
        settings: Features (the columns), quality limits, memory limit.
        now: Clock against which the future is judged.
        progress: Called with (rows read, rows in all).

    Raises:
        ContractError: a file that does not fit; more rows in quarantine than allowed; no row left.
    """
    tables = _find_tables(raw, settings)
    key = find_key_type(tables, {})
    schemas = {
        "impressions": impressions_schema(settings, key=key),
        "catalogue": catalogue_schema(settings, key=key),
        "counters": counters_schema(settings, key=key),
    }
    plans = {
        table: [plan_file(path, schemas[table], columns={}, refuse_extra=True) for path in paths]
        for table, paths in tables.items()
    }
    latest = now.astimezone(UTC) + timedelta(minutes=settings.quality.max_future_minutes)
    count = _Count(sum(plan.num_rows for group in plans.values() for plan in group), progress)
    with whole_directory(clean) as scratch:
        work = scratch / ".work"
        work.mkdir()
        with connect(
            memory_limit=settings.store.memory_limit,
            threads=settings.store.threads,
            spill=work / "spill",
        ) as connection:
            verdicts = {
                table: _clean_table(
                    table,
                    group,
                    schemas[table],
                    scratch,
                    connection,
                    latest=latest,
                    labels=[label.name for label in settings.select(kind="label")],
                    count=count,
                )
                for table, group in plans.items()
            }
            _refuse_if_hopeless(raw, verdicts["impressions"], settings)
            span, num_clicks = _describe_clean(scratch, connection)
            unknown = _count_unknown(scratch, connection)
        shutil.rmtree(work)
        verdict = Verdict(
            impressions=verdicts["impressions"],
            catalogue=verdicts.get("catalogue", TableVerdict()),
            counters=verdicts.get("counters"),
            key_type=str(key),
            put_aside_at_ingest=_put_aside(raw),
            span=span,
            num_clicks=num_clicks,
            **unknown,
            content=hash_value(hash_files(scratch)),
        )
        write_json(scratch / "verdict.json", verdict.to_json())
    logger.info("checked %s: %d of %d rows clean", raw, verdict.impressions.num_clean,
                verdict.impressions.num_rows)  # fmt: skip
    return verdict


@dataclass
class _Count:
    """Rows read so far."""

    total: int
    progress: Progress | None
    done: int = 0

    def add(self, num_rows: int) -> None:
        self.done += num_rows
        if self.progress is not None:
            self.progress(self.done, self.total)


def _find_tables(raw: Path, settings: DriftlineSettings) -> dict[str, list[Path]]:
    if not raw.is_dir():
        raise ContractError(
            f"{raw} is not a folder; expected a log with impressions/, catalogue/ and counters/ "
            "as written by `driftline ingest` or `driftline simulate`"
        )
    tables = {"impressions": parquet_files(raw / "impressions", table="impressions")}
    for table in ("catalogue", "counters"):
        if any((raw / table).glob("**/*.parquet")):
            tables[table] = parquet_files(raw / table, table=table)
    declared = [feature.name for feature in settings.select(kind="numeric", entity="product")]
    if declared and "counters" not in tables:
        raise ContractError(
            f"{raw} has no counters/, but `features:` declares numeric product features "
            f"({', '.join(declared)}); bring a counters table or declare them no longer: counters "
            "of the log itself are derived without being declared"
        )
    return tables


def _clean_table(
    table: str,
    plans: Sequence[FilePlan],
    schema: pa.Schema,
    scratch: Path,
    connection: duckdb.DuckDBPyConnection,
    *,
    latest: datetime,
    labels: Sequence[str],
    count: _Count,
) -> TableVerdict:
    """Judge, stage, de-duplicate, sort and write one table."""
    stage = Stage(scratch / ".work" / table, schema)
    quarantine = Quarantine(scratch / "quarantine" / f"{table}.parquet", schema)
    offsets: list[int] = []
    num_rows = num_out_of_order = 0
    newest = np.int64(np.iinfo(np.int64).min)
    for plan in plans:
        offsets.append(num_rows)
        for first, rows in plan.batches():
            bad, reasons = split_rows(rows, find_faults(rows, schema, latest=latest, labels=labels))
            ordinals = num_rows + np.arange(rows.num_rows)
            if bad.any():
                numbers = (first + np.flatnonzero(bad)).tolist()
                quarantine.add(
                    rows.filter(pa.array(bad)),
                    files=[plan.path.name] * len(numbers),
                    numbers=numbers,
                    reasons=reasons,
                )
                rows, ordinals = rows.filter(pa.array(~bad)), ordinals[~bad]
            if rows.num_rows:
                times = np.asarray(pc.cast(rows.column("event_time"), pa.int64()))
                running = np.maximum.accumulate(np.concatenate([[newest], times]))
                num_out_of_order += int((times < running[:-1]).sum())
                newest = running[-1]
                stage.add(rows, ordinals)
            num_rows += len(bad)
            count.add(len(bad))
    stage.close()
    keep = "first" if table == "impressions" else "last"
    num_repeats = find_repeats(connection, stage, keys=KEYS[table], keep=keep)
    if num_repeats and table == "impressions":
        _quarantine_repeats(connection, stage, quarantine, plans, offsets)
    quarantine.close()
    (scratch / table).mkdir(exist_ok=True)
    num_clean = sum(
        write_sorted(
            connection,
            day,
            scratch / table / f"{day.name}.parquet",
            schema=schema,
            order=SORTED_BY[table],
            any_repeats=num_repeats > 0,
        )
        for day in stage.days()
    )
    return TableVerdict(
        num_rows=num_rows,
        num_clean=num_clean,
        num_quarantined=quarantine.num_rows,
        reasons=dict(sorted(quarantine.counts.items())),
        examples=dict(sorted(quarantine.examples.items())),
        num_out_of_order=num_out_of_order,
        num_replaced=0 if table == "impressions" else num_repeats,
        notes=_merge_notes(plans),
    )


def _quarantine_repeats(
    connection: duckdb.DuckDBPyConnection,
    stage: Stage,
    quarantine: Quarantine,
    plans: Sequence[FilePlan],
    offsets: Sequence[int],
) -> None:
    starts = np.asarray(offsets)
    for batch in read_repeats(connection, stage):
        ordinals = np.asarray(batch.column(ORDINAL))
        files = np.searchsorted(starts, ordinals, side="right") - 1
        quarantine.add(
            pa.Table.from_batches([batch]),
            files=[plans[index].path.name for index in files],
            numbers=(ordinals - starts[files]).tolist(),
            reasons=[[DUPLICATE]] * len(ordinals),
        )


def _refuse_if_hopeless(raw: Path, verdict: TableVerdict, settings: DriftlineSettings) -> None:
    found = "; ".join(
        f"{count:,} {reason} (first: {verdict.examples[reason]})"
        for reason, count in verdict.reasons.items()
    )
    if verdict.num_clean == 0:
        raise ContractError(
            f"{raw}: none of {verdict.num_rows:,} impressions is usable; {found or 'no rows'}"
        )
    share = verdict.num_quarantined / verdict.num_rows
    limit = settings.quality.max_quarantine_share
    if share > limit:
        raise ContractError(
            f"{raw}: {verdict.num_quarantined:,} of {verdict.num_rows:,} impressions ({share:.1%}) "
            f"would go to quarantine, at most {limit:.1%} may "
            f"(quality.max_quarantine_share): {found}"
        )


def _describe_clean(scratch: Path, connection: duckdb.DuckDBPyConnection) -> tuple[Window, int]:
    """Span and number of clicks of the clean impressions."""
    [(first, last, num_clicks)] = connection.sql(
        f"""
        SELECT epoch_us(min(event_time)), epoch_us(max(event_time)),
               count(*) FILTER (WHERE clicked)
        FROM {read_files(scratch / "impressions" / "*.parquet")}
        """
    ).fetchall()
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    moments = [epoch + timedelta(microseconds=value) for value in (first, last)]
    return span_of(*moments), num_clicks


def _count_unknown(scratch: Path, connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    impressions = read_files(scratch / "impressions" / "*.parquet")
    has_catalogue = any((scratch / "catalogue").glob("*.parquet"))
    known = (
        "SELECT DISTINCT product_id FROM " + read_files(scratch / "catalogue" / "*.parquet")
        if has_catalogue
        else "SELECT page_product_id AS product_id FROM " + impressions + " LIMIT 0"
    )
    connection.execute(f"CREATE OR REPLACE TABLE known AS {known}")
    [row] = connection.sql(
        f"""
        WITH shown AS (
            SELECT page_product_id AS product_id, count(*) AS as_page, 0 AS as_ad
            FROM {impressions} GROUP BY 1
            UNION ALL
            SELECT ad_product_id, 0, count(*) FROM {impressions} GROUP BY 1
        )
        SELECT (SELECT count(*) FROM known),
               count(DISTINCT product_id), coalesce(sum(as_page), 0), coalesce(sum(as_ad), 0)
        FROM shown ANTI JOIN known USING (product_id)
        """
    ).fetchall()
    names = ("num_products", "num_unknown_products", "num_rows_unknown_page", "num_rows_unknown_ad")
    return {name: int(value) for name, value in zip(names, row, strict=True)}


def _put_aside(raw: Path) -> dict[str, int]:
    """What the adapter put aside, if one of ours wrote the log."""
    path = raw / "ingest.json"
    return dict(read_json(path).get("put_aside", {})) if path.exists() else {}


def _merge_notes(plans: Sequence[FilePlan]) -> tuple[str, ...]:
    """Each note once, with the number of files it holds for."""
    notes = [note for plan in plans for note in plan.notes]
    return tuple(
        f"{note} ({notes.count(note)} file{'s' * (notes.count(note) > 1)})"
        for note in dict.fromkeys(notes)
    )
