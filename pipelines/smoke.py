"""The end of ``driftline run``: serve real requests and compare each answer with the offline score.

The log's last hours are served as they came: every few minutes of event time the online store is
brought up to date, then the requests of those minutes are sent, with their own time and context.
What the server says must be what the frames say, except where a value became known after the
snapshot. The skew check of the log's newest decisions, which these are in a new workspace, tells
such values from mistakes. The first minutes of an hour are left out: the user's own counters of
that hour arrive in them.
"""

import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa

from driftline.features.frame_files import read_frames
from driftline.features.log import ImpressionLog
from driftline.pipelines.prepare import materialize_features
from driftline.pipelines.skew import check_skew
from driftline.platform.bundle import Bundle
from driftline.platform.columns import head_columns
from driftline.platform.errors import ResourceError
from driftline.platform.registry import read_champion
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, format_time
from driftline.platform.workspace import Workspace, require
from driftline.serving.client import ScoringClient
from driftline.serving.server import start_serving

NUM_HOURS: Final = 3
SLICE: Final = timedelta(minutes=10)
TOLERANCE: Final = 1e-5
WAIT_SECONDS: Final = 30
NUM_CHECKED: Final = 10_000


def serve_some_requests(settings: DriftlineSettings) -> dict[str, Any]:
    """Start the server, send the requests of the log's last hours, stop it; gives what was seen."""
    workspace = Workspace.of(settings)
    span = ImpressionLog.open(workspace.clean, settings).span
    champion = read_champion(workspace.bundles)
    assert champion is not None, require(workspace.bundles, made_by="refresh arms CONFIG")
    scorer = Scorer.of(Bundle.open(champion.path))
    log = settings.serving.decision_log.model_copy(update={"sample_rate": 1.0})
    serving = settings.serving.model_copy(update={"clock": "snapshot", "decision_log": log})
    settings = settings.model_copy(update={"serving": serving})
    seconds: list[float] = []
    differences: list[float] = []
    window = Window(span.start, span.end).last(NUM_HOURS * HOUR)
    materialize_features(settings, as_of=window.start)
    with start_serving(settings) as server, server.client as client:
        for minutes in window.steps(SLICE):
            frame = read_frames(settings, minutes)
            if frame.num_rows == 0 or minutes.start.minute == 0:
                continue
            materialize_features(settings, as_of=minutes.start)
            expected = scorer.score(frame)
            pages = _pages(settings, frame)
            _wait_for_snapshot(client, pages[0], minutes.start)
            for page in pages:
                started = time.perf_counter()
                answer = client.score(
                    page["page"], page["ads"], context=page["context"], time=page["time"]
                )
                seconds.append(time.perf_counter() - started)
                found = np.array(answer["probabilities"])
                differences += np.abs(found - expected[page["rows"]]).tolist()
    skew = check_skew(settings, hours=NUM_HOURS, sample=NUM_CHECKED)
    p50, p99 = (1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    largest = max(differences, default=0.0)
    equal = float(np.mean(np.array(differences) <= TOLERANCE))
    return {
        "num_requests": len(seconds),
        "num_scores": len(differences),
        "bundle": champion.fingerprint,
        "largest_difference": largest,
        "share_equal": equal,
        "skew": skew.to_json(),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "summary": (
            f"{len(differences):,} scores, {equal:.2%} equal to the offline score within "
            f"{TOLERANCE:.0e} (largest difference {largest:.1e}); of all values that differ, the "
            f"skew check leaves {skew.num_unexplained} unexplained; "
            f"one connection, p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        ),
    }


def _wait_for_snapshot(client: ScoringClient, page: Mapping[str, Any], as_of: datetime) -> None:
    """Replicas look for a newer snapshot every ``poll_seconds``; an answer names its moment."""
    deadline = time.monotonic() + WAIT_SECONDS
    while client.score(page["page"], page["ads"][:1])["as_of"] != format_time(as_of):
        if time.monotonic() > deadline:
            raise ResourceError(
                f"the server did not take up the snapshot of {format_time(as_of)} within "
                f"{WAIT_SECONDS} s; see its log"
            )
        time.sleep(0.05)


def _pages(settings: DriftlineSettings, frame: pa.Table) -> list[dict[str, Any]]:
    """Rows shown together (same time, page and context) become one request."""
    context_names = [column.name for column in head_columns(settings) if column.alias is None]
    rows = frame.append_column("row", pa.array(np.arange(frame.num_rows)))
    keys = ["event_time", "page_product_id", *context_names]
    grouped = rows.group_by(keys, use_threads=False).aggregate(
        [("ad_product_id", "list"), ("row", "list")]
    )
    return [
        {
            "time": row["event_time"],
            "page": row["page_product_id"],
            "ads": row["ad_product_id_list"],
            "rows": row["row_list"],
            "context": {name: row[name] for name in context_names},
        }
        for row in grouped.to_pylist()
    ]
