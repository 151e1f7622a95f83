"""The decision log: what was answered, and how it becomes the next log of impressions.

One row is one ad of one scored request: the columns of ``impressions`` that are known when the ad
is shown, then the answer, then every feature value it was made from. Whether the ad was clicked
comes later and from elsewhere: :func:`join_clicks`.

A log that was sampled by request is a fair sample of impressions, but counters derived from it
count only the sample. To train from the log alone, keep all of it
(``serving.decision_log.sample_rate: 1``) or bring counters of your own.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from driftline.features.views import TIERS
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.contract import TIME, impressions_schema
from driftline.platform.errors import ContractError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, floor_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

SERVED: Final = "served__"
"""Before the name of a frame's column: the value as served."""
AGE, STALE = "age__", "stale__"
"""Before the name of a tier: age in seconds of its oldest value used; whether it was too old."""
OUTCOME: Final = ("clicked", "click_time", "propensity")
"""Columns of ``impressions`` that a decision does not know."""


def decision_schema(settings: DriftlineSettings, *, key: pa.DataType) -> pa.Schema:
    """Columns of the decision log.

    ``impression_id`` is ``REQUEST_ID:PLACE``, the place (from 0, also ``position``) in the order of
    the request, and unique unless a client sends one ``request_id`` twice. ``request_id`` is what
    the answer said, the client's own or made up. ``event_time`` is the moment that the features
    stand for, ``answered_at`` the wall time. ``experiment`` names the A/B test that ran,
    ``request_key`` who was drawn into its ``arm``. Numbers are null, not NaN, where missing; a text
    id is null for a product without text.
    """
    shown = {label.name for label in settings.select(kind="label")} | set(OUTCOME)
    types = {"categorical": pa.string(), "numeric": pa.float32()}
    return pa.schema(
        [
            *(field for field in impressions_schema(settings, key=key) if field.name not in shown),
            pa.field("probability", pa.float64(), nullable=False),
            pa.field("bundle", pa.string(), nullable=False),
            pa.field("version", pa.int32(), nullable=False),
            pa.field("arm", pa.string(), nullable=False),
            pa.field("experiment", pa.string()),
            pa.field("request_key", pa.string()),
            pa.field("form", pa.string(), nullable=False),
            pa.field("replica", pa.string(), nullable=False),
            pa.field("answered_at", TIME, nullable=False),
            pa.field("features_as_of", TIME),
            pa.field("latency_ms", pa.float32(), nullable=False),
            pa.field("page_fallback", pa.string()),
            pa.field("ad_fallback", pa.string()),
            *(pa.field(f"{AGE}{tier}", pa.float32()) for tier in TIERS),
            *(pa.field(f"{STALE}{tier}", pa.bool_()) for tier in TIERS),
            *(pa.field(f"{SERVED}{name}", pa.int64()) for name in TEXT_ID_COLUMNS),
            *(
                pa.field(f"{SERVED}{column.name}", types[column.kind])
                for column in head_columns(settings)
                if column.alias is not None
            ),
        ]
    )


def hour_folder(root: Path, moment: datetime) -> Path:
    """Folder of the decisions of one hour of event time."""
    return root / f"{moment.astimezone(UTC):%Y-%m-%dT%H}"


def read_decisions(settings: DriftlineSettings, window: Window | None = None) -> pa.Table:
    """Decisions of a window (all when not given), by event time.

    Raises:
        MissingArtefactError: nothing was logged in it.
    """
    root = Workspace.of(settings).decisions
    if window is None:
        files = sorted(root.glob("*/*.parquet"))
    else:
        hours = Window(floor_time(window.start, HOUR), window.end).hours()
        files = [path for hour in hours for path in hour_folder(root, hour.start).glob("*.parquet")]
    if files:
        key = pq.read_schema(files[0]).field("page_product_id").type
        table = ds.dataset(files, schema=decision_schema(settings, key=key)).to_table(
            filter=None if window is None else _inside(window)
        )
        if table.num_rows:
            return table.sort_by([("event_time", "ascending"), ("impression_id", "ascending")])
    raise MissingArtefactError(
        f"{root} holds no decision{'' if window is None else f' of {window}'}; "
        f"serving.decision_log.sample_rate is {settings.serving.decision_log.sample_rate}, "
        "and a server writes what it answered every serving.decision_log.flush_seconds"
    )


def last_hour(settings: DriftlineSettings) -> datetime | None:
    """End of the newest hour of event time that holds a decision."""
    root = Workspace.of(settings).decisions
    names = sorted({path.parent.name for path in root.glob("*/*.parquet")})
    if not names:
        return None
    return datetime.strptime(names[-1], "%Y-%m-%dT%H").replace(tzinfo=UTC) + HOUR


def join_clicks(decisions: pa.Table, clicks: pa.Table, settings: DriftlineSettings) -> pa.Table:
    """Impressions in the form of the contract, by (event_time, impression_id).

    A request that a client sent twice under one id was answered twice and shown once: its first
    answer counts. Several clicks on one impression are one, the first. A click whose impression is
    not among the decisions (a sample has few of them) is left out.

    Args:
        decisions: From :func:`read_decisions`. Only hours whose clicks have all come in (see
            ``labels.maturity_minutes``): an impression without a click counts as not clicked.
        clicks: ``impression_id`` and, where known, ``click_time``; and any declared label.
        settings: Decides the columns.

    Raises:
        ContractError: ``clicks`` does not name the impression.
    """
    if "impression_id" not in clicks.column_names:
        raise ContractError(
            f"clicks need a column 'impression_id' (REQUEST_ID:PLACE), got {clicks.column_names}"
        )
    schema = impressions_schema(settings, key=decisions.schema.field("page_product_id").type)
    labels = [label.name for label in settings.select(kind="label")]
    outcomes = [name for name in ("click_time", *labels) if name in clicks.column_names]
    best = {"click_time": "min"}
    taken = "".join(f', {best.get(name, "max")}("{name}") AS "{name}"' for name in outcomes)
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("decisions", decisions)
        connection.register("clicks", clicks)
        joined = connection.sql(
            "WITH shown AS (SELECT * FROM decisions QUALIFY row_number() OVER "
            "(PARTITION BY impression_id ORDER BY answered_at) = 1), "
            f"clicked AS (SELECT impression_id, true AS clicked{taken} FROM clicks GROUP BY 1) "
            "SELECT shown.*, clicked.* EXCLUDE (impression_id) REPLACE "
            "(coalesce(clicked.clicked, false) AS clicked) "
            "FROM shown LEFT JOIN clicked USING (impression_id) "
            "ORDER BY event_time, impression_id"
        ).to_arrow_table()
    logger.info(
        "joined %d decisions with %d clicks: %d impressions",
        decisions.num_rows, clicks.num_rows, joined.num_rows,
    )  # fmt: skip
    arrays = [
        joined.column(field.name).cast(field.type)
        if field.name in joined.column_names
        else pa.nulls(joined.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _inside(window: Window) -> ds.Expression:
    time = ds.field("event_time")
    return (time >= pa.scalar(window.start, TIME)) & (time < pa.scalar(window.end, TIME))
