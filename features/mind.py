"""Microsoft News in its published layout (Wu et al. 2020) as a log in contract form.

One *pair* of an impression and a candidate becomes one row: the ad is the candidate, the page is
the last article that the user read before (a proxy: the log does not say where the list was shown;
click rates are higher where page and ad share a category). An impression of a user without any
history has no page; it is put aside and counted, as is every line that cannot be read.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from driftline.features.log import ROWS_PER_GROUP, IngestReport, hour_columns, nullable, span_of
from driftline.platform.artefacts import whole_directory, write_json
from driftline.platform.contract import TIME, catalogue_schema, impressions_schema
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.settings import DriftlineSettings

logger = logging.getLogger(__name__)

BEHAVIOR_FIELDS: Final = ("impression id", "user", "time", "history", "impressions")
NEWS_FIELDS: Final = (
    "id", "category", "subcategory", "title", "abstract", "url",
    "title entities", "abstract entities",
)  # fmt: skip
PRODUCT_COLUMNS: Final = ("title", "abstract", "category", "subcategory")
CONTEXT_COLUMNS: Final = {
    "hour_of_week": "categorical",
    "hour_of_day": "categorical",
    "history_length": "numeric",
    "num_candidates": "numeric",
}
TIME_FORMAT: Final = "%m/%d/%Y %I:%M:%S %p"
LINES_PER_CHUNK: Final = 8_192

QUARANTINE_SCHEMA: Final = pa.schema(
    [
        pa.field("file", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def ingest_mind(
    source: Path,
    destination: Path,
    *,
    settings: DriftlineSettings,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Turn ``behaviors.tsv`` and ``news.tsv`` into ``impressions/`` and ``catalogue/``.

    ``impression_id`` is ``ID-POSITION`` and ``request_id`` is ``ID``; ``click_time`` is null, for
    the layout has none. Times are taken as UTC. The layout does not say when an article appeared;
    its single version is dated to the beginning of the hour in which it is first a page or a
    candidate, and to the start of the log if it never is.

    Args:
        source: Folder with the two files.
        destination: Becomes the log; replaced if it exists.
        settings: Their ``features`` say which columns are written.
        progress: Called with (bytes read, bytes in all).

    Raises:
        SettingsError: a declared feature that the layout does not have.
        ContractError: a file is missing, or none of its lines can be read.
    """
    check_columns(settings)
    behaviors, news = _find(source, "behaviors.tsv"), _find(source, "news.tsv")
    aside = _Aside()
    schema = nullable(impressions_schema(settings, key=pa.string()))
    num_rows = num_clicks = 0
    times: list[tuple[datetime, datetime]] = []
    seen: list[pa.Table] = []
    with whole_directory(destination) as scratch:
        (scratch / "impressions").mkdir()
        with pq.ParquetWriter(scratch / "impressions" / "behaviors.parquet", schema) as writer:
            for lines, first_line, share in _chunks(behaviors, progress):
                rows = _pairs(lines, first_line=first_line, aside=aside)
                if rows.num_rows == 0:
                    continue
                limits = pc.min_max(rows.column("event_time"))
                times.append((limits["min"].as_py(), limits["max"].as_py()))
                seen.append(_first_seen(rows))
                num_rows += rows.num_rows
                num_clicks += pc.sum(rows.column("clicked")).as_py()
                writer.write_table(_complete(rows, schema), row_group_size=ROWS_PER_GROUP)
                logger.debug("read %d pairs (%.0f %%)", num_rows, 100 * share)
        if not times:
            raise ContractError(
                f"{behaviors}: no impression could be used; {aside.summary()}; expected lines of "
                f"{len(BEHAVIOR_FIELDS)} tab-separated fields ({', '.join(BEHAVIOR_FIELDS)}) with "
                "times like '11/9/2019 12:01:13 AM' and candidates like 'N123-0 N456-1'"
            )
        span = span_of(min(low for low, _ in times), max(high for _, high in times))
        products = _dated(_products(news, aside=aside), pa.concat_tables(seen), start=span.start)
        wanted = catalogue_schema(settings, key=pa.string())
        (scratch / "catalogue").mkdir()
        pq.write_table(_complete(products, wanted), scratch / "catalogue" / "news.parquet")
        aside.write(scratch / "quarantine")
        report = IngestReport(
            kind="mind",
            num_impressions=num_rows,
            num_clicks=num_clicks,
            num_products=products.num_rows,
            num_counter_rows=0,
            span=span,
            put_aside=dict(sorted(aside.counts.items())),
            notes=("page = last article of the history", "times taken as UTC"),
        )
        write_json(scratch / "ingest.json", report.to_json())
    logger.info("wrote %s (%d impressions, %d clicks)", destination, num_rows, num_clicks)
    return report


def check_columns(settings: DriftlineSettings) -> None:
    """Refuse declared features that the layout cannot give.

    Raises:
        SettingsError: names every such feature and what is available.
    """
    missing = [
        f"{feature.name} ({feature.kind}, {feature.entity})"
        for feature in settings.features
        if not (
            (
                feature.entity == "product"
                and feature.kind != "numeric"
                and feature.name in PRODUCT_COLUMNS
            )
            or (
                feature.entity == "impression" and CONTEXT_COLUMNS.get(feature.name) == feature.kind
            )
        )
    ]
    if missing:
        context = ", ".join(f"{name} ({kind})" for name, kind in CONTEXT_COLUMNS.items())
        raise SettingsError(
            f"features: MIND has no {', '.join(missing)}; available are the product columns "
            f"{', '.join(PRODUCT_COLUMNS)} (text or categorical) and the impression columns "
            f"{context}; counters are derived from the log without being declared"
        )


@dataclass
class _Aside:
    """Lines that are not in the log, with their reasons."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, file: str, line: int, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        self.rows.append({"file": file, "line": line, "reason": reason, "detail": detail[:200]})

    def summary(self) -> str:
        shown = [
            f"line {row['line']} of {row['file']}: {row['reason']} ({row['detail']:.60})"
            for row in self.rows[:3]
        ]
        return "; ".join(shown) or "the file holds no lines"

    def write(self, folder: Path) -> None:
        folder.mkdir()
        table = pa.Table.from_pylist(self.rows, schema=QUARANTINE_SCHEMA)
        pq.write_table(table, folder / "ingest.parquet")


def _find(source: Path, name: str) -> Path:
    path = source / name
    if not path.is_file():
        raise ContractError(
            f"{path} does not exist; the MIND layout needs behaviors.tsv and news.tsv in one folder"
        )
    return path


def _chunks(
    path: Path, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[list[bytes], int, float]]:
    """Lines in chunks, with the number of the first (from 1) and the share read so far."""
    total = max(1, path.stat().st_size)
    first = 1
    with path.open("rb") as stream:
        while lines := list(itertools.islice(stream, LINES_PER_CHUNK)):
            yield lines, first, stream.tell() / total
            first += len(lines)
            if progress is not None:
                progress(stream.tell(), total)


def _fields(
    lines: list[bytes], names: tuple[str, ...], *, file: str, first_line: int, aside: _Aside
) -> tuple[dict[str, pa.Array], np.ndarray[Any, np.dtype[np.int64]]]:
    """Columns of the readable lines, and the numbers of these lines."""
    texts: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=first_line):
        if not line.strip():
            continue
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            aside.add(file, number, "not UTF-8", f"byte {error.start}: {line[error.start]:#x}")
            continue
        found = text.count("\t") + 1
        if found != len(names):
            reason = "wrong number of fields"
            aside.add(file, number, reason, f"{found} instead of {len(names)}: {text}")
            continue
        texts.append(text)
        numbers.append(number)
    split = pc.split_pattern(pa.array(texts, pa.string()), "\t")
    columns = {name: pc.list_element(split, index) for index, name in enumerate(names)}
    return columns, np.asarray(numbers, dtype=np.int64)


def _pairs(lines: list[bytes], *, first_line: int, aside: _Aside) -> pa.Table:
    """All (impression, candidate) rows of some lines, with every column the layout can give."""
    file = "behaviors.tsv"
    columns, numbers = _fields(
        lines, BEHAVIOR_FIELDS, file=file, first_line=first_line, aside=aside
    )
    times = pc.cast(
        pc.strptime(columns["time"], format=TIME_FORMAT, unit="s", error_is_null=True), TIME
    )
    history = pc.utf8_trim_whitespace(columns["history"])
    shown = pc.utf8_trim_whitespace(columns["impressions"])
    checks = (
        ("no impression id", columns["impression id"], pc.equal(columns["impression id"], "")),
        ("unreadable time", columns["time"], pc.is_null(times)),
        (
            "candidate without click label",
            shown,
            pc.invert(pc.match_substring_regex(shown, r"^(\S+-[01])(\s+\S+-[01])*$")),
        ),
        ("no page", columns["impression id"], pc.equal(history, "")),
    )
    keep = np.ones(len(numbers), dtype=bool)
    for reason, values, failed in checks:
        failing = np.flatnonzero(np.asarray(failed, dtype=bool) & keep)
        for index in failing:
            aside.add(file, int(numbers[index]), reason, values[index].as_py())
        keep[failing] = False
    chosen = pa.array(np.flatnonzero(keep))
    times, history, shown = times.take(chosen), history.take(chosen), shown.take(chosen)
    articles = pc.split_pattern_regex(history, r"\s+")
    candidates = pc.split_pattern_regex(shown, r"\s+")
    parent = pc.list_parent_indices(candidates)
    offsets = np.asarray(candidates.offsets)
    parents = np.asarray(parent)
    position = (np.arange(len(parents)) - (offsets - offsets[0])[parents]).astype(np.int32)
    tokens = candidates.flatten()
    request = columns["impression id"].take(chosen).take(parent)
    return pa.table(
        {
            "impression_id": pc.binary_join_element_wise(
                request, pc.cast(pa.array(position), pa.string()), "-"
            ),
            "event_time": times.take(parent),
            "page_product_id": _last_element(articles).take(parent),
            "ad_product_id": pc.utf8_slice_codeunits(tokens, 0, -2),
            "clicked": pc.equal(pc.utf8_slice_codeunits(tokens, -1), "1"),
            "request_id": request,
            "position": pa.array(position),
            **{name: column.take(parent) for name, column in _context(times).items()},
            "history_length": pc.cast(pc.list_value_length(articles), pa.float64()).take(parent),
            "num_candidates": pc.cast(pc.list_value_length(candidates), pa.float64()).take(parent),
        }
    )


def _last_element(lists: pa.ListArray) -> pa.Array:
    ends = np.asarray(lists.offsets)[1:]
    return lists.values.take(pa.array(ends - 1))


def _context(times: pa.Array) -> dict[str, pa.Array]:
    """Hour of the week (``sat-07``) and of the day (``07``), UTC."""
    hours = np.asarray(pc.cast(times, pa.int64())) // 3_600_000_000
    return hour_columns(hours)


def _first_seen(rows: pa.Table) -> pa.Table:
    """When each product of these rows is first a page or a candidate."""
    sides = [
        pa.table({"product_id": rows.column(side), "event_time": rows.column("event_time")})
        for side in ("page_product_id", "ad_product_id")
    ]
    grouped = pa.concat_tables(sides).group_by("product_id").aggregate([("event_time", "min")])
    return grouped.rename_columns(["product_id", "event_time"])


def _dated(products: pa.Table, seen: pa.Table, *, start: datetime) -> pa.Table:
    """Products with ``event_time``: the hour they are first seen in, or the start of the log."""
    first = seen.group_by("product_id").aggregate([("event_time", "min")])
    at = pc.index_in(products.column("product_id"), value_set=first.column("product_id"))
    times = first.column("event_time_min").combine_chunks().take(at.combine_chunks())
    hours = pc.floor_temporal(times, unit="hour").cast(TIME)
    dated = pc.fill_null(hours, pa.scalar(start, TIME))
    return products.add_column(1, pa.field("event_time", TIME), dated)


def _products(path: Path, *, aside: _Aside) -> pa.Table:
    """One version of each article; of a repeated id the first line counts."""
    parts = []
    for lines, first_line, _ in _chunks(path, None):
        columns, numbers = _fields(
            lines, NEWS_FIELDS, file="news.tsv", first_line=first_line, aside=aside
        )
        parts.append(pa.table({**columns, "line": numbers}))
    table = pa.concat_tables(parts) if parts else None
    if table is None or table.num_rows == 0:
        raise ContractError(
            f"{path}: no product could be read; {aside.summary()}; expected lines of "
            f"{len(NEWS_FIELDS)} tab-separated fields ({', '.join(NEWS_FIELDS)})"
        )
    first = table.group_by("id", use_threads=False).aggregate([("line", "min")]).column("line_min")
    unique = pc.is_in(table.column("line"), value_set=first.combine_chunks())
    for row in table.filter(pc.invert(unique)).select(["id", "line"]).to_pylist():
        aside.add("news.tsv", row["line"], "product listed twice", row["id"])
    table = table.filter(unique)
    named = pc.not_equal(table.column("id"), "")
    for row in table.filter(pc.invert(named)).select(["line"]).to_pylist():
        aside.add("news.tsv", row["line"], "no product id", "")
    table = table.filter(named)
    texts = {name: _empty_to_null(table.column(name)) for name in PRODUCT_COLUMNS}
    return pa.table({"product_id": table.column("id"), **texts})


def _empty_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of the schema; those the layout does not have are null."""
    columns = [
        table.column(name).cast(type_)
        if name in table.column_names
        else pa.nulls(table.num_rows, type_)
        for name, type_ in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(columns, schema=schema)
