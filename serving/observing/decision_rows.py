"""Answers to rows of the decision log: many answers at once, a column at a time.

Shape suffixes: A answers, R rows, one for each ad of each answer.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.decisions import AGE, SERVED, STALE
from driftline.features.served_columns import ServedColumns

if TYPE_CHECKING:
    from driftline.serving.answers import Answer


class Decision(NamedTuple):
    """An answer that waits to become rows."""

    answer: "Answer"
    answered_at: float
    """Wall time, seconds since the epoch."""


class DecisionRows:
    """Makes rows.

    Args:
        replica: Name of this copy.
        breathe: Called between two columns.
    """

    def __init__(self, *, replica: str, breathe: Callable[[], None] = lambda: None) -> None:
        self._replica = replica
        self._breathe = breathe
        self._served = ServedColumns()

    def batch(self, decisions: Sequence[Decision], schema: pa.Schema) -> pa.RecordBatch:
        """The rows of one or more answers, in their order. ``[R]``."""
        answers = [decision.answer for decision in decisions]
        counts_A = np.array([len(answer.request.ads) for answer in answers])
        of_answer = pa.array(np.arange(len(answers)).repeat(counts_A))
        served = self._served.of([answer.read for answer in answers], breathe=self._breathe)
        own = _columns_of_ads(answers, counts_A, of_answer)
        columns = []
        for field in schema:
            name = field.name
            if name in own:
                column = own[name]
            elif name.startswith(SERVED):
                column = served[name.removeprefix(SERVED)]
            else:
                column = self._of_answers(name, field.type, decisions).take(of_answer)
            columns.append(column)
            self._breathe()
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _of_answers(self, name: str, kind: pa.DataType, decisions: Sequence[Decision]) -> pa.Array:
        """A column that is alike for all ads of an answer, once for each answer. ``[A]``."""
        if name == "replica":
            values: list[Any] = [self._replica] * len(decisions)
        elif name == "answered_at":
            values = [datetime.fromtimestamp(one.answered_at, UTC) for one in decisions]
        elif (value := OF_ANSWER.get(name)) is not None:
            values = [value(one.answer) for one in decisions]
        elif name.startswith(AGE):
            tier = name.removeprefix(AGE)
            values = [one.answer.tiers.get(tier, UNTOLD)[0] for one in decisions]
            return pa.array(values, kind, from_pandas=True)  # NaN: nothing of the tier was used
        elif name.startswith(STALE):
            tier = name.removeprefix(STALE)
            values = [one.answer.tiers.get(tier, UNTOLD)[1] for one in decisions]
        else:
            values = [one.answer.request.context.get(name) for one in decisions]
        return pa.array(values, kind)


UNTOLD: Final = (None, None)
OF_ANSWER: Final[Mapping[str, Callable[["Answer"], Any]]] = {
    "event_time": lambda answer: answer.now,
    "page_product_id": lambda answer: answer.request.page,
    "request_id": lambda answer: answer.request_id,
    "bundle": lambda answer: answer.live.fingerprint,
    "version": lambda answer: answer.live.version,
    "arm": lambda answer: answer.live.arm,
    "experiment": lambda answer: answer.live.experiment,
    "request_key": lambda answer: answer.request.request_key,
    "form": lambda answer: answer.form,
    "features_as_of": lambda answer: answer.features_as_of,
    "latency_ms": lambda answer: 1e3 * latency_seconds(answer.stages),
    "page_fallback": lambda answer: answer.page_fallback,
}


def _columns_of_ads(
    answers: Sequence["Answer"], counts_A: NDArray[np.int64], of_answer: pa.Array
) -> dict[str, pa.Array]:
    """Columns that say something of each ad. ``[R]`` each."""
    starts_A = counts_A.cumsum() - counts_A
    places_R = np.arange(len(of_answer)) - starts_A.repeat(counts_A)
    positions = pa.array(places_R.astype(np.int32))
    request_ids = pa.array([answer.request_id for answer in answers], pa.string())
    fallbacks: list[str | None] = [None] * len(of_answer)
    for start, answer in zip(starts_A.tolist(), answers, strict=True):
        for place, reason in answer.ad_fallbacks.items():
            fallbacks[start + place] = reason
    return {
        "impression_id": pc.binary_join_element_wise(
            request_ids.take(of_answer), positions.cast(pa.string()), ":"
        ),
        "ad_product_id": _products([answer.request.ads for answer in answers]),
        "position": positions,
        "probability": pa.array(np.concatenate([answer.probabilities for answer in answers])),
        "ad_fallback": pa.array(fallbacks, pa.string()),
    }


def _products(ads: Sequence[Any]) -> pa.Array:
    """Products of all answers; strings come as tuples, integers mostly as arrays."""
    if isinstance(ads[0][0], str):
        return pa.array(list(chain.from_iterable(ads)), pa.string())
    return pa.array(np.concatenate(ads, dtype=np.int64))


def latency_seconds(stages: Mapping[str, float]) -> float:
    """Time that an answer took in the replica: the stage ``total``, else the sum of all stages."""
    total = stages.get("total")
    return sum(stages.values()) if total is None else total
