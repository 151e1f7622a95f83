"""What was answered, kept for the next training log, the skew check and the curious.

An observer: on the request's thread it decides by a hash whether a request is kept, and puts a
reference to the answer into a bounded queue. Everything else happens on the writer's thread, which
takes a breath after each request, because whoever holds the interpreter's lock makes the event loop
wait. What does not fit in the queue is dropped and counted.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.decisions import AGE, SERVED, STALE, decision_schema
from driftline.features.views import NO_TEXT
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.observing.decision_writer import DecisionWriter
from driftline.serving.observing.repeating import Repeating
from driftline.serving.transport.requests import RefusedRequestError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from driftline.serving.answers import Answer

POLL_SECONDS: Final = 0.05
BREATH_SECONDS: Final = 0.000_2
SPACE: Final = 1 << 32


class Decision(NamedTuple):
    """An answer that waits to become rows."""

    answer: "Answer"
    answered_at: float
    """Wall time, seconds since the epoch."""


class DecisionLog:
    """Observer that keeps answers in ``Workspace.decisions``; get it going with :meth:`start`.

    Args:
        settings: ``serving.decision_log`` says how much.
        replica: Name of this copy; part of every file's name.
        writer: Where the rows go.
    """

    def __init__(
        self, settings: DriftlineSettings, *, replica: str, writer: DecisionWriter | None = None
    ) -> None:
        own = settings.serving.decision_log
        self._settings = settings
        self._replica = replica
        self._rate = own.sample_rate
        self._max_rows = own.max_waiting_rows
        self._writer = writer or DecisionWriter(
            Workspace.of(settings).decisions, replica=replica, settings=own
        )
        self._schemas: dict[str, pa.Schema] = {}
        self._queue: deque[Decision] = deque()
        self._rows_put = 0  # counted by the request's thread only
        self._rows_taken = 0  # counted by the writer's thread only
        self._requests_kept = 0
        self._requests_dropped = 0
        self._rows_dropped = 0
        self._thread = Repeating("decision-log", seconds=POLL_SECONDS, action=self.drain)

    def start(self) -> None:
        """Start the writer's thread."""
        self._thread.start()

    def answered(self, answer: "Answer") -> None:
        """Keep the answer, if its request is one of the sample and there is room."""
        if not is_sampled(answer.request_id, self._rate):
            return
        num_rows = len(answer.request.ads)
        if self._rows_put - self._rows_taken + num_rows > self._max_rows:
            self._requests_dropped += 1
            self._rows_dropped += num_rows
            return
        self._rows_put += num_rows
        self._requests_kept += 1
        self._queue.append(Decision(answer, time.time()))

    def refused(self, error: RefusedRequestError) -> None:
        """Nothing was decided."""

    def close(self) -> None:
        """Write what waits; a writer that hangs is left behind."""
        if not self._thread.close():
            logger.warning("decision log: the disk hangs, %s rows are lost", self._num_waiting)
            return
        self.drain()
        self._writer.close()

    def drain(self) -> None:
        """Turn what waits into rows, and write if it is time; on the writer's thread."""
        while self._queue:
            decision = self._queue.popleft()
            self._rows_taken += len(decision.answer.request.ads)
            batch = decision_batch(decision, self._schema(decision.answer), replica=self._replica)
            self._writer.add(decision.answer.now, batch)
            time.sleep(BREATH_SECONDS)
        self._writer.flush_if_due()

    def status(self) -> dict[str, Any]:
        """How many decisions were kept, dropped and written so far, and what went wrong last."""
        counts = asdict(self._writer.counts)
        return counts | {
            "errors": self._thread.num_errors,
            "sample_rate": self._rate,
            "requests_kept": self._requests_kept,
            "requests_dropped": self._requests_dropped,
            "rows_dropped": counts["rows_dropped"] + self._rows_dropped,
            "rows_waiting": self._num_waiting,
        }

    @property
    def _num_waiting(self) -> int:
        return self._writer.counts.rows_waiting + self._rows_put - self._rows_taken

    def _schema(self, answer: "Answer") -> pa.Schema:
        kind = answer.live.prepared.bundle.contract["key_type"]
        if kind not in self._schemas:
            key = pa.int64() if kind == "int64" else pa.string()
            self._schemas[kind] = decision_schema(self._settings, key=key)
        return self._schemas[kind]


def is_sampled(request_id: str, rate: float) -> bool:
    """Whether a request is kept: always the same for one id, and for a share ``rate`` of all ids.

    The hash has a name of its own, so that it says nothing about other hashes of the same id, such
    as the one that chooses the arm of an A/B test.
    """
    if rate <= 0 or rate >= 1:
        return rate >= 1
    digest = hashlib.blake2b(request_id.encode(), digest_size=4, person=b"decision-log").digest()
    return int.from_bytes(digest) < rate * SPACE


def decision_batch(decision: Decision, schema: pa.Schema, *, replica: str) -> pa.RecordBatch:
    """The rows of one answer, one for each ad. ``[B]``."""
    answer, request_id = decision.answer, decision.answer.request_id
    request, num = answer.request, len(answer.request.ads)
    served = answer.columns()
    same: dict[str, Any] = {
        "event_time": answer.now,
        "page_product_id": request.page,
        **request.context,
        "request_id": request_id,
        "bundle": answer.live.fingerprint,
        "version": answer.live.version,
        "arm": answer.live.arm,
        "experiment": answer.live.experiment,
        "request_key": request.request_key,
        "form": answer.form,
        "replica": replica,
        "answered_at": datetime.fromtimestamp(decision.answered_at, UTC),
        "features_as_of": answer.features_as_of,
        "latency_ms": 1e3 * latency_seconds(answer.stages),
        "page_fallback": answer.page_fallback,
    }
    for tier, (age, stale) in answer.tiers.items():
        same[f"{AGE}{tier}"] = None if np.isnan(age) else age
        same[f"{STALE}{tier}"] = stale
    own: dict[str, Any] = {
        "impression_id": [f"{request_id}:{place}" for place in range(num)],
        "ad_product_id": list(request.ads),
        "position": np.arange(num, dtype=np.int32),
        "probability": answer.probabilities,
        "ad_fallback": [answer.ad_fallbacks.get(place) for place in range(num)],
    }
    arrays = [
        pa.array(own[field.name], field.type)
        if field.name in own
        else _served(served[field.name.removeprefix(SERVED)], field.type)
        if field.name.startswith(SERVED)
        else _repeated(same.get(field.name), field.type, num)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def latency_seconds(stages: Mapping[str, float]) -> float:
    """Time that an answer took in the replica: the stage ``total``, else the sum of all stages."""
    total = stages.get("total")
    return sum(stages.values()) if total is None else total


def _repeated(value: Any, kind: pa.DataType, num: int) -> pa.Array:
    return pa.nulls(num, kind) if value is None else pa.repeat(pa.scalar(value, kind), num)


def _served(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A frame's column as a request has it: NaN, ``None`` and text id 0 stand for missing."""
    if pa.types.is_integer(kind):
        return pa.array(values, kind, mask=values == NO_TEXT)
    return pa.array(values, kind, from_pandas=True)
