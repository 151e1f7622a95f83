"""Rows made of many answers at once are those that one answer and one ad after the other gives."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import isnan
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.decisions import decision_schema
from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.windows import HOUR
from driftline.serving.answers import Answer
from driftline.serving.observing.decision_rows import Decision, DecisionRows
from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm

UNKNOWN = 999_999_999
NUM_REQUESTS = 40


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and isnan(value))


def slow_rows(decisions: Sequence[Decision], schema: pa.Schema) -> list[dict[str, Any]]:
    """A row after the other, a value after the other."""
    rows = []
    for answer, answered_at in decisions:
        request, columns = answer.request, answer.read.columns
        for place, ad in enumerate(request.ads):
            row: dict[str, Any] = {
                "impression_id": f"{answer.request_id}:{place}",
                "event_time": answer.now,
                "page_product_id": request.page,
                "ad_product_id": ad,
                "position": place,
                **request.context,
                "request_id": answer.request_id,
                "probability": answer.probabilities[place],
                "bundle": answer.live.fingerprint,
                "version": answer.live.version,
                "arm": answer.arm,
                "experiment": answer.experiment,
                "request_key": request.request_key,
                "form": answer.form,
                "replica": "r",
                "answered_at": datetime.fromtimestamp(answered_at, UTC),
                "features_as_of": answer.features_as_of,
                "latency_ms": 1e3 * sum(answer.stages.values()),
                "page_fallback": answer.page_fallback,
                "ad_fallback": answer.ad_fallbacks.get(place),
            }
            for tier, (age, stale) in answer.tiers.items():
                row |= {f"age__{tier}": age, f"stale__{tier}": stale}
            for name, values in columns.items():
                is_no_text = name.endswith("text_id") and values[place] == 0
                row[f"served__{name}"] = None if is_no_text else values[place]
            told = {name: row.get(name) for name in schema.names}
            rows.append({k: None if missing(v) else v for k, v in told.items()})
    return rows


class Kept:
    """Observer that keeps answers."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)

    def refused(self, error: Exception) -> None:
        raise error

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="module")
def decisions(market: TinyMarket, first: Bundle) -> list[Decision]:
    """Answers to all kinds of requests, half of them before and half after a materialisation."""
    market.promote(first)
    kept = Kept()
    service = BundleService(market.settings, observers=[kept])
    service.look()
    random = np.random.default_rng(5)
    products = [*market.frame()["ad_product_id"].unique().to_pylist(), UNKNOWN]
    for number in range(NUM_REQUESTS):
        if number == NUM_REQUESTS // 2:
            materialize(market.settings, as_of=AS_OF + HOUR)
            service.look()
        some = [int(p) for p in random.choice(products, random.integers(2, 8))]
        optional = {
            "context": {"application": random.choice(["app0", "app1", "never seen"])},
            "request_id": f"view-{number}",
            "request_key": f"session-{number % 3}",
            "time": (AS_OF + timedelta(minutes=70 + number)).isoformat(),
        }
        body = {k: v for k, v in optional.items() if random.uniform() < 0.6}
        page = UNKNOWN if number % 8 == 3 else some[0]
        asked = {"page_product_id": page, "ad_product_ids": some[1:], **body}
        service.sent(service.answer(orjson.dumps(asked), JsonForm()))
    assert len({id(answer.read.parts[0].found.table) for answer in kept.answers}) == 2
    return [Decision(answer, 1.75e9 + 0.123_457 * n) for n, answer in enumerate(kept.answers)]


def check(decisions: Sequence[Decision], schema: pa.Schema) -> None:
    batch = DecisionRows(replica="r").batch(decisions, schema)

    expected = pa.Table.from_pylist(slow_rows(decisions, schema), schema=schema)
    batch.validate(full=True)
    for name in schema.names:
        assert batch[name].to_pylist() == expected[name].to_pylist(), name
    assert pa.Table.from_batches([batch]).equals(expected)


def test_many_answers_at_once_give_the_rows_of_one_ad_after_the_other(
    market: TinyMarket, decisions: list[Decision]
) -> None:
    schema = decision_schema(market.settings, key=pa.int64())
    check(decisions, schema)
    for one in decisions[:10]:
        check([one], schema)


def test_no_column_of_the_comparison_is_empty(
    market: TinyMarket, decisions: list[Decision]
) -> None:
    schema = decision_schema(market.settings, key=pa.int64())
    batch = DecisionRows(replica="r").batch(decisions, schema)

    empty = {name for name in schema.names if batch[name].null_count == batch.num_rows}
    assert empty <= {"experiment", "hour_of_week"}
    partly = {name for name in schema.names if 0 < batch[name].null_count < batch.num_rows}
    assert {"request_key", "page_fallback", "ad_fallback", "application"} <= partly
    assert {"served__ad__text_id", "served__page__category", "served__ad__sales_1h"} <= partly


def test_products_may_be_strings_and_answers_of_any_arm(
    market: TinyMarket, decisions: list[Decision]
) -> None:
    renamed = []
    for number, (answer, answered_at) in enumerate(decisions):
        ads = tuple(f"ad {ad}" for ad in answer.request.ads)
        request = replace(answer.request, page=f"page {number}", ads=ads)
        live = replace(answer.live, arm="canary", experiment="salt/2", version=number)
        live = live if number % 2 else answer.live
        renamed.append(Decision(replace(answer, request=request, live=live), answered_at))

    check(renamed, decision_schema(market.settings, key=pa.string()))


def test_it_breathes_between_columns(market: TinyMarket, decisions: list[Decision]) -> None:
    schema = decision_schema(market.settings, key=pa.int64())
    breaths: list[None] = []
    DecisionRows(replica="r", breathe=lambda: breaths.append(None)).batch(decisions, schema)

    assert len(breaths) >= len(schema.names)
