"""The end of ``driftline run``: serve real requests and compare each answer with the offline score.

The online store is brought to the start of the log's last hour; requests of that hour are sent
with their own time and context. What the server says must be what the frames say.
"""

import logging
import time
from typing import Any, Final

import numpy as np
import pyarrow as pa

from driftline.features.frames import read_frames
from driftline.features.log import ImpressionLog
from driftline.pipelines.prepare import materialize_features
from driftline.platform.bundle import Bundle
from driftline.platform.columns import head_columns
from driftline.platform.registry import read_champion
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace, require
from driftline.serving.server import start_serving

logger = logging.getLogger(__name__)

NUM_REQUESTS: Final = 300
MAX_ADS: Final = 100


def serve_some_requests(settings: DriftlineSettings) -> dict[str, Any]:
    """Start the server, send requests of the log's last hour, stop it; gives what was measured."""
    workspace = Workspace.of(settings)
    span = ImpressionLog.open(workspace.clean, settings).span
    hour = Window(span.end - HOUR, span.end)
    materialize_features(settings, as_of=hour.start)
    champion = read_champion(workspace.bundles)
    assert champion is not None, require(workspace.bundles, made_by="refresh arms CONFIG")
    frame = read_frames(settings, hour)
    expected = Scorer.of(Bundle.open(champion.path)).score(frame)
    serving = settings.serving.model_copy(update={"clock": "snapshot"})
    answers = _send(settings.model_copy(update={"serving": serving}), frame)
    differences = [abs(expected[row] - p) for row, p in answers["scores"].items()]
    seconds = np.array(answers["seconds"])
    p50, p99 = (1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    largest = max(differences, default=0.0)
    return {
        "num_requests": len(seconds),
        "num_scores": len(differences),
        "bundle": champion.fingerprint,
        "largest_difference": largest,
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "summary": (
            f"{len(differences):,} scores, online = offline within {largest:.1e}; "
            f"one connection, p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        ),
    }


def _send(settings: DriftlineSettings, frame: pa.Table) -> dict[str, Any]:
    context_names = [column.name for column in head_columns(settings) if column.alias is None]
    rows = frame.append_column("row", pa.array(np.arange(frame.num_rows)))
    scores: dict[int, float] = {}
    seconds: list[float] = []
    with start_serving(settings) as server, server.client as client:
        for page in _pages(rows, context_names)[:NUM_REQUESTS]:
            started = time.perf_counter()
            answer = client.score(
                page["page"], page["ads"], context=page["context"], time=page["time"]
            )
            seconds.append(time.perf_counter() - started)
            scores |= dict(zip(page["rows"], answer["probabilities"], strict=True))
    return {"scores": scores, "seconds": seconds}


def _pages(rows: pa.Table, context_names: list[str]) -> list[dict[str, Any]]:
    """Rows shown together (same time, page and context) become one request."""
    keys = ["event_time", "page_product_id", *context_names]
    grouped = rows.group_by(keys, use_threads=False).aggregate(
        [("ad_product_id", "list"), ("row", "list")]
    )
    return [
        {
            "time": row["event_time"],
            "page": row["page_product_id"],
            "ads": row["ad_product_id_list"][:MAX_ADS],
            "rows": row["row_list"][:MAX_ADS],
            "context": {name: row[name] for name in context_names},
        }
        for row in grouped.to_pylist()
    ]
