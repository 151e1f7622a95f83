"""What was answered, kept for the next training log, the skew check and the curious.

An observer: on the request's thread it decides by a hash whether a request is kept, and puts a
reference to the answer into a bounded queue. Everything else happens on the writer's thread, for
many answers at once, and with a breath whenever it held the interpreter's lock for long, because
the event loop waits for it. What does not fit in the queue is dropped and counted.
"""

import hashlib
import logging
import time
from collections import deque
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from driftline.features.decisions import decision_schema
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, floor_time
from driftline.platform.workspace import Workspace
from driftline.serving.observing.decision_rows import Decision, DecisionRows
from driftline.serving.observing.decision_writer import DecisionWriter
from driftline.serving.observing.repeating import Repeating
from driftline.serving.transport.requests import RefusedRequestError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from driftline.serving.answers import Answer

POLL_SECONDS: Final = 0.2
ROWS_AT_ONCE: Final = 10_000
HOLD_SECONDS: Final = 0.000_3
BREATH_SECONDS: Final = 0.000_2
SPACE: Final = 1 << 32


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
        self._many_rows = min(ROWS_AT_ONCE, own.flush_rows, own.max_waiting_rows // 2)
        self._writer = writer or DecisionWriter(
            Workspace.of(settings).decisions, replica=replica, settings=own
        )
        self._schemas: dict[str, pa.Schema] = {}
        self._rows = DecisionRows(replica=replica, breathe=self._breathe)
        self._breathed_at = 0.0
        self._queue: deque[Decision] = deque()
        self._rows_put = 0  # counted by the request's thread only
        self._rows_taken = 0  # counted by the writer's thread only
        self._requests_kept = 0
        self._requests_dropped = 0
        self._rows_dropped = 0
        self._thread = Repeating("decision-log", seconds=POLL_SECONDS, action=self._look)

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

    def _look(self) -> None:
        """Let answers wait until there are many: one alone costs ten times more to write down."""
        if self._rows_put - self._rows_taken >= self._many_rows or self._writer.is_due:
            self.drain()

    def drain(self) -> None:
        """Turn what waits into rows, and write if it is time; on the writer's thread."""
        while self._queue:
            for (hour, kind), decisions in self._take().items():
                self._writer.add(hour, self._rows.batch(decisions, self._schema(kind)))
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

    def _take(self) -> dict[tuple[datetime, str], list[Decision]]:
        """The oldest of those that wait, by hour of event time and type of the products."""
        taken: dict[tuple[datetime, str], list[Decision]] = {}
        num_rows = 0
        while self._queue and num_rows < ROWS_AT_ONCE:
            decision = self._queue.popleft()
            answer = decision.answer
            num_rows += len(answer.request.ads)
            hour, kind = (
                floor_time(answer.now, HOUR),
                answer.live.prepared.bundle.contract["key_type"],
            )
            taken.setdefault((hour, kind), []).append(decision)
        self._rows_taken += num_rows
        return taken

    def _breathe(self) -> None:
        """Let requests have the interpreter, if it was held for long."""
        if time.perf_counter() - self._breathed_at > HOLD_SECONDS:
            time.sleep(BREATH_SECONDS)
            self._breathed_at = time.perf_counter()

    def _schema(self, kind: str) -> pa.Schema:
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
