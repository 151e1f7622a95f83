"""What became of an experiment's answers: decisions joined with the impressions that came back.

A decision is an ad that was scored; an impression says that it was shown, and whether it was
clicked in time, as for training. What was never shown, and what is too young for its clicks to be
known, is left out of both arms alike.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.features.maturity import known_label
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import Window
from driftline.platform.workspace import Workspace

NEW_ITEM_HOURS = 24
SLACK = timedelta(days=1)
"""An impression may be dated so far from the moment that its features stand for."""

DECISION_COLUMNS = (
    "impression_id",
    "event_time",
    "ad_product_id",
    "request_id",
    "position",
    "request_key",
    "arm",
    "bundle",
    "probability",
    "answered_at",
)

IMPRESSION_COLUMNS = (
    "clicked",
    "click_time",
    "impression_id",
    "event_time",
    "ad_product_id",
    "request_id",
    "position",
)
CLICKED = IMPRESSION_COLUMNS.index("clicked")

JOIN = """
WITH answered AS (  -- a request that was sent twice was shown once
    SELECT * FROM decisions
    QUALIFY row_number() OVER (PARTITION BY impression_id ORDER BY answered_at) = 1
), by_id AS (
    SELECT a.*, i.clicked, i.event_time AS shown_at
    FROM answered a JOIN impressions i USING (impression_id)
), rest AS (
    SELECT *, row_number() OVER (PARTITION BY request_id, ad_product_id ORDER BY position) AS turn
    FROM answered ANTI JOIN by_id USING (impression_id)
), shown AS (
    SELECT *, row_number() OVER (
        PARTITION BY request_id, ad_product_id ORDER BY position, impression_id) AS turn
    FROM impressions
), by_request AS (  -- a log with names of its own still knows the request and the ad
    SELECT rest.* EXCLUDE (turn), shown.clicked, shown.event_time AS shown_at
    FROM rest JOIN shown USING (request_id, ad_product_id, turn)
), both_ways AS (SELECT * FROM by_id UNION ALL SELECT * FROM by_request)
SELECT arm, bundle, coalesce(request_key, request_id) AS key, ad_product_id, probability,
       clicked, shown_at, coalesce(shown_at < first_seen + INTERVAL (hours) HOUR, false) AS is_new
FROM both_ways LEFT JOIN products ON product_id = ad_product_id
WHERE shown_at < known_until
ORDER BY shown_at, impression_id
"""


@dataclass(frozen=True)
class AnsweredRows:
    """Impressions of an experiment with known clicks, in the order of showing. ``[N]`` each."""

    is_canary: NDArray[np.bool_]
    """By the draw, whoever answered in the end."""
    bundle: NDArray[np.object_]
    """Fingerprint of the bundle that answered."""
    keys: NDArray[np.object_]
    """What was drawn: the request key, or the request itself."""
    clicks: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    ads: NDArray[np.object_]
    is_new: NDArray[np.bool_]
    """The ad's product appeared within the last ``NEW_ITEM_HOURS`` hours."""
    num_decisions: int
    """Ads that were scored in the experiment, shown or not."""

    def __len__(self) -> int:
        """Impressions."""
        return len(self.clicks)

    @property
    def is_head(self) -> NDArray[np.bool_]:
        """Impressions of head products: the most shown, which have half of all impressions.

        Source: papers.md S0.37 (slices by impression count). Counted over both arms.
        """
        if not len(self):
            return np.zeros(0, bool)
        _, codes_N, counts = np.unique(self.ads, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]
        is_head = np.zeros(len(counts), bool)
        is_head[order] = before < len(self) / 2
        return is_head[codes_N]


def read_answered_rows(settings: DriftlineSettings, experiment: str) -> AnsweredRows:
    """Join the decision log with the checked log.

    Raises:
        MissingArtefactError: one of the two holds nothing of the experiment.
    """
    decisions = _decisions(settings, experiment)
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    times = decisions["event_time"].combine_chunks()
    first, last = times.to_pylist()[0], times.to_pylist()[-1]
    window = Window(first - SLACK, last + SLACK)
    impressions = log.impressions(window, columns=IMPRESSION_COLUMNS)
    label = known_label(impressions, maturity=settings.labels.maturity)
    impressions = impressions.set_column(CLICKED, "clicked", label)
    catalogue = log.catalogue()
    products = catalogue.group_by("product_id").aggregate([("event_time", "min")])
    rows = _join(
        decisions,
        impressions,
        products.rename_columns({"event_time_min": "first_seen"}),
        known_until=log.span.end - settings.labels.maturity,
    )
    return AnsweredRows(
        is_canary=rows["arm"].to_numpy() == "canary",
        bundle=_objects(rows["bundle"]),
        keys=_objects(rows["key"]),
        clicks=rows["clicked"].to_numpy().astype(np.float64),
        probabilities=rows["probability"].to_numpy(),
        ads=_objects(rows["ad_product_id"]),
        is_new=rows["is_new"].to_numpy(),
        num_decisions=decisions.num_rows,
    )


def _decisions(settings: DriftlineSettings, experiment: str) -> pa.Table:
    """Decisions of an experiment, by event time; only their files' matching row groups are read."""
    root = Workspace.of(settings).decisions
    if files := sorted(root.glob("*/*.parquet")):
        wanted = ds.field("experiment") == experiment
        table = ds.dataset(files).to_table(columns=list(DECISION_COLUMNS), filter=wanted)
        if table.num_rows:
            return table.sort_by("event_time")
    raise MissingArtefactError(
        f"{root} holds no decision of this canary at this share; "
        f"serving.decision_log.sample_rate is {settings.serving.decision_log.sample_rate}, and "
        f"servers write every {settings.serving.decision_log.flush_seconds:g} s"
    )


def _join(
    decisions: pa.Table, impressions: pa.Table, products: pa.Table, *, known_until: datetime
) -> pa.Table:
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        connection.execute("SET TimeZone = 'UTC'")
        named = {"decisions": decisions, "impressions": impressions, "products": products}
        for name, table in named.items():
            connection.register(name, table)
        query = JOIN.replace("(hours)", f"({NEW_ITEM_HOURS})").replace("known_until", "$until")
        return connection.sql(query, params={"until": known_until}).to_arrow_table()


def _objects(column: pa.ChunkedArray) -> NDArray[np.object_]:
    return np.array(column.to_pylist(), dtype=object)
