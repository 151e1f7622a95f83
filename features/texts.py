"""Each distinct text of the catalogue has an id, the hash of its content.

Caches, soft labels and training files know texts by this id: an edited product has a new one, and
two products with the same words share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from driftline.features.log import ImpressionLog
from driftline.features.sources import replace_source
from driftline.features.views import NO_TEXT, TEXT_ID, feature_views
from driftline.platform.artefacts import whole_file
from driftline.platform.contract import TIME
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace, require

MASK_63_BITS: Final = 0x7FFF_FFFF_FFFF_FFFF


@dataclass(frozen=True)
class CatalogueReport:
    """What :func:`write_product_sources` found."""

    num_versions: int
    """Distinct (product, event_time) of the catalogue."""
    num_texts: int
    """Distinct texts ever seen, those of earlier calls included."""
    num_new_texts: int
    num_counter_rows: int
    """Rows of the user's own numbers."""


def texts_path(settings: DriftlineSettings) -> Path:
    """Where all distinct texts lie: ``text_id`` and one column a text feature."""
    return Workspace.of(settings).features / "texts.parquet"


def read_texts(settings: DriftlineSettings) -> pa.Table:
    """All distinct texts, oldest first; rows never change and are never removed.

    Raises:
        MissingArtefactError: the catalogue has not been read yet.
    """
    return pq.read_table(require(texts_path(settings), made_by="features prepare"))


def known_texts(settings: DriftlineSettings, *, as_of: datetime) -> pa.Table:
    """Distinct texts published until ``as_of``, ascending by ``text_id``; none without text."""
    views = [view for view in feature_views(settings) if TEXT_ID in view.features.names]
    texts = read_texts(settings)
    if not views:
        return texts.slice(0, 0)
    source = ds.dataset(views[0].folder(settings))
    published = ds.field("event_time") <= pa.scalar(as_of, TIME)
    ids = source.to_table(columns=[TEXT_ID], filter=published)[TEXT_ID].unique()
    return texts.filter(pc.is_in(texts[TEXT_ID], value_set=ids)).sort_by(TEXT_ID)


def text_ids(catalogue: pa.Table, *, names: Sequence[str]) -> pa.Array:
    """A positive 63-bit id for each row's text; null where every text field is blank. ``[N]``.

    The hash covers names and values of the fields, each value with its length in front, so that
    no two different rows serialise alike. Blank counts as missing.
    """
    if not names or catalogue.num_rows == 0:
        return pa.nulls(catalogue.num_rows, pa.int64())
    parts = [
        f"""CASE WHEN "{name}" IS NULL THEN ''
            ELSE '{name}:' || strlen("{name}") || ':' || "{name}" END"""
        for name in names
    ]
    query = f"""
        WITH serialised AS (SELECT {" || ".join(parts)} AS text FROM catalogue)
        SELECT CASE WHEN text = '' THEN NULL
            ELSE greatest(md5_number_lower(text) & {MASK_63_BITS}, 1)::BIGINT END AS id
        FROM serialised"""
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        texts = {name: _blank_to_null(catalogue.column(name)) for name in names}
        connection.register("catalogue", pa.table(texts))
        return connection.sql(query).to_arrow_table().column("id").combine_chunks()


def write_product_sources(settings: DriftlineSettings) -> CatalogueReport:
    """Write the sources that come from the catalogue and the user's counters, and new texts.

    Safe to repeat: files that would not change are not touched, texts are only ever appended.

    Raises:
        MissingArtefactError: there is no clean log.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    names = [feature.name for feature in settings.select(kind="text")]
    catalogue = _newest_rows(log.catalogue(), ["product_id", "event_time"])
    for name in names:
        index = catalogue.column_names.index(name)
        catalogue = catalogue.set_column(index, name, _blank_to_null(catalogue.column(name)))
    catalogue = catalogue.append_column(TEXT_ID, text_ids(catalogue, names=names))
    place = catalogue.column_names.index(TEXT_ID)
    numbered = catalogue.column(TEXT_ID).fill_null(NO_TEXT)
    products = catalogue.set_column(place, TEXT_ID, numbered)
    products = products.append_column("created_time", products.column("event_time"))
    counters = log.counters()
    for view in feature_views(settings):
        if view.origin == "derived":
            continue
        columns = view.schema(key=log.key_type).names
        rows = products if view.origin == "catalogue" else counters
        if rows is None:
            rows = view.schema(key=log.key_type).empty_table()
        elif view.origin == "counters":
            rows = _newest_rows(rows, ["product_id", "event_time", "created_time"])
        replace_source(view, rows.select(columns), settings, key=log.key_type)
    num_texts, num_new = _append_texts(texts_path(settings), catalogue.select([TEXT_ID, *names]))
    num_counters = 0 if counters is None else counters.num_rows
    return CatalogueReport(catalogue.num_rows, num_texts, num_new, num_counters)


def _append_texts(path: Path, rows: pa.Table) -> tuple[int, int]:
    rows = rows.filter(pc.is_valid(rows.column(TEXT_ID)))
    rows = rows.take(pa.array(_first_rows(rows, [TEXT_ID])))
    old = pq.read_table(path) if path.exists() else None
    if old is not None and old.schema.equals(rows.schema):
        is_new = pc.invert(pc.is_in(rows.column(TEXT_ID), value_set=old.column(TEXT_ID)))
        rows = rows.filter(is_new)
        if rows.num_rows == 0:
            return old.num_rows, 0
        merged = pa.concat_tables([old, rows])
    else:
        merged = rows
    with whole_file(path) as scratch:
        pq.write_table(merged, scratch, compression="zstd")
    return merged.num_rows, rows.num_rows


def _newest_rows(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Of rows with the same keys the last one; the order of the rest is kept."""
    return table.take(pa.array(_first_rows(table, keys, last=True)))


def _first_rows(
    table: pa.Table, keys: Sequence[str], *, last: bool = False
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    numbered = table.select(list(keys)).append_column("row", pa.array(np.arange(table.num_rows)))
    kind = "max" if last else "min"
    chosen = numbered.group_by(list(keys)).aggregate([("row", kind)]).column(f"row_{kind}")
    return np.sort(np.asarray(chosen))


def _blank_to_null(values: pa.ChunkedArray) -> pa.ChunkedArray:
    blank = pc.equal(pc.utf8_trim_whitespace(values), "")
    return pc.if_else(blank, pa.scalar(None, values.type), values)
